# SPDX-License-Identifier: MIT
"""A language model of recurrent layers and attention, in any order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lrnnx_core.backends.transforms import autocasting
from lrnnx_core.sequences import Layout, check_tensor, layout
from lrnnx_nn import counts
from lrnnx_nn.architectures import checkpoint
from lrnnx_nn.architectures._tokens import check_range, last_valid, positions
from lrnnx_nn.architectures.language_config import LRNNLMConfig
from lrnnx_nn.blocks import Dropout
from lrnnx_nn.linears import apply_linear, apply_weight
from lrnnx_nn.mixers import make_mixer
from lrnnx_nn.mlp import make_mlp
from lrnnx_nn.norms import make_norm
from lrnnx_nn.residual import ResidualBlock, takes_capacity
from lrnnx_nn.residual_stream import Stream, add_and_normalize, run_on_stream
from lrnnx_nn.stack import Stack

ARCHITECTURE = "language_model"
EMBEDDING_STD = 0.02

Model = TypeVar("Model", bound="LRNNLMHeadModel")


class LanguageModelState(NamedTuple):
    """What a language model keeps of the tokens it has read: a value, and a pytree of tensors."""

    blocks: tuple[Any, ...]
    """The states of the blocks, in order."""
    position: Tensor
    """(...) int64, tokens of the current document so far."""


class LRNNLMHeadModel(nn.Module):
    """Predict the next token: embeddings, pre-norm residual blocks, a norm, and the head.

    ``LRNNLMHeadModel(d_model, d_state, n_layer, vocab_size, mixer_types=["S5", "attn"], ...)``

    Args:
        d_model: width H of the residual stream.
        d_state: states a channel, or of the layer, for the mixers that have such.
        n_layer: number of blocks.
        vocab_size: number of token ids.
        mixer_types: names of layers, or ``attn``, repeated in turn over the blocks.
        mixer_kwargs: options of the mixers, by type.
        d_intermediate: width of the MLP in each block; None or 0 for no MLP.
        device: where the parameters are made.
        dtype: their dtype; state-space parameters are at least float32.
        **options: the other fields of `LRNNLMConfig`, which says more of these too.

    `forward`, `prefill` and `step` agree with each other in evaluation: any split of a document
    into prefills and steps gives the logits of one forward. Logits have the dtype of the
    embedding.

    Raises:
        ValueError: what `LRNNLMConfig` or a mixer refuses.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int | None,
        n_layer: int,
        vocab_size: int,
        mixer_types: Sequence[str] = ("s5",),
        mixer_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        d_intermediate: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(options) - {f.name for f in dataclasses.fields(LRNNLMConfig)}):
            raise ValueError(f"LRNNLMHeadModel: unknown option {unknown[0]!r}, see LRNNLMConfig")
        self.config = config = LRNNLMConfig(
            d_model, d_state, n_layer, vocab_size, mixer_types, mixer_kwargs or {}, d_intermediate,
            **options,
        )  # fmt: skip
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = config.padded_vocab_size
        self.embedding = nn.Embedding(rows, d_model, **place)
        table = config.max_positions
        self.positions = None if table is None else nn.Embedding(table, d_model, **place)
        self.dropout = Dropout(config.dropout)
        blocks = [_block(config, name, place) for name in config.mixers]
        self.layers = Stack(blocks, checkpoint=config.gradient_checkpointing)
        self.norm = make_norm(config.norm, d_model, config.norm_eps, **place)
        tied = config.tie_embeddings
        self.head = None if tied else nn.Linear(d_model, rows, bias=False, **place)
        self._initialise()

    @classmethod
    def from_config(
        cls: type[Model],
        config: LRNNLMConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Model:
        """Make the model of a config, with fresh parameters."""
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return cls(**values, device=device, dtype=dtype)

    # --- parameters -----------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Draw every parameter again, in place. Safe on the meta device and after ``to_empty``.

        Embeddings (and an untied head) are normal with deviation 0.02. The projections by which
        the branches of named blocks write into the residual stream are scaled by
        1/sqrt(number of branches). Everything else, all state-space parameters among it, is as its
        own module draws it.

        Source of the scaling: Radford et al. 2019 (GPT-2).
        """
        self.layers.reset_parameters()
        reset = getattr(self.norm, "reset_parameters", None)
        if callable(reset):
            reset()
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        tables = [self.embedding, self.positions, self.head]
        for table in (t for t in tables if t is not None):
            nn.init.normal_(table.weight, std=EMBEDDING_STD)
            if table is not self.positions:
                table.weight[self.config.vocab_size :].zero_()
        blocks = [block for block in self.layers if isinstance(block, ResidualBlock)]
        branches = sum(1 if block.mlp is None else 2 for block in blocks)
        for block in blocks:
            for projection in block.output_projections():
                projection.weight.div_(math.sqrt(branches))

    def num_parameters(self, *, non_embedding: bool = False) -> int:
        """Return the number of parameters, each counted once, padded vocabulary included.

        Args:
            non_embedding: without those of tokens and positions; a tied head is the embedding.
        """
        without = [self.embedding, self.positions] if non_embedding else []
        return counts.parameters(self, [m for m in without if m is not None])

    def flops(self, length: int, batch: int = 1) -> counts.Flops:
        """Return the operations of one forward over ``batch`` sequences of ``length`` tokens.

        See `lrnnx_nn.counts` for what is counted: a backward pass takes about twice as many more.
        """
        return self._flops(length, 0).times(batch)

    def flops_per_token(self, context: int = 0) -> counts.Flops:
        """Return the operations of one step after ``context`` tokens; only attention looks back."""
        return self._flops(1, context)

    def _flops(self, length: int, context: int) -> counts.Flops:
        found = counts.flops(self, length, context)
        tied = 2 * self.embedding.weight.numel() * length if self.head is None else 0
        return found._replace(matrix=found.matrix + tied)

    # --- running --------------------------------------------------------------------------------

    def init_state(
        self, batch_shape: Sequence[int] = (), *, capacity: int | None = None
    ) -> LanguageModelState:
        """Return the state before any token.

        Args:
            batch_shape: leading dimensions.
            capacity: tokens that attention keeps room for from the start, so that its state has a
                fixed size; the others have one anyway.
        """
        states: list[Any] = []
        for block in self.layers:
            bounded = {"capacity": capacity} if takes_capacity(block) else {}
            states.append(block.init_state(batch_shape, **bounded))  # pyright: ignore[reportCallIssue]
        position = torch.zeros(
            tuple(batch_shape), dtype=torch.int64, device=self.embedding.weight.device
        )
        return LanguageModelState(tuple(states), position)

    def forward(
        self,
        ids: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
        last_only: bool = False,
    ) -> Tensor:
        """Run over whole documents ids (..., L); return the logits of each token's successor.

        Args:
            ids: (..., L) integers in 0 ... vocab_size - 1; at padding any.
            lengths: (...), tokens per row of a right-padded batch.
            mask: (..., L) bool, False is padding, on either side.
            reset: (..., L) bool, a new document starts with that token.
            integration_timesteps: (..., L), time elapsed before each token.
            dt_scale: multiplies the step of every layer.
            last_only: give the logits of the last valid token of each row alone.

        Returns:
            (..., L, vocab_size), zero at padding; with ``last_only`` (..., vocab_size), zero for a
            row without any valid token.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit; in eager mode on a CPU an id or
                a position that is out of range.
        """
        seq = self._layout("forward", ids, lengths, mask, reset, integration_timesteps)
        places, _ = positions(ids, seq, None, self.positions is not None)
        x = self._embed("forward", ids, seq, places)
        stream, _ = run_on_stream(
            self.layers, "forward", Stream(x), lengths=lengths, mask=mask, reset=reset,
            integration_timesteps=integration_timesteps, dt_scale=dt_scale,
        )  # fmt: skip
        return self._logits(stream, seq.valid(ids.shape[-1]), last_only)

    def prefill(
        self,
        ids: Tensor,
        state: LanguageModelState | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
        last_only: bool = False,
    ) -> tuple[Tensor, LanguageModelState]:
        """Run over a part of documents from ``state``; return the logits and the state after it.

        The arguments are those of `forward`, and L may be 0.

        Raises:
            ValueError: as `forward`, and a state of other rows or of another model.
        """
        seq = self._layout("prefill", ids, lengths, mask, reset, integration_timesteps)
        if state is not None:
            self._check_state("prefill", state, ids.shape[:-1])
        start = None if state is None else state.position
        places, position = positions(ids, seq, start, self.positions is not None)
        x = self._embed("prefill", ids, seq, places)
        stream, blocks = run_on_stream(
            self.layers, "prefill", Stream(x), None if state is None else state.blocks,
            lengths=lengths, mask=mask, reset=reset, integration_timesteps=integration_timesteps,
            dt_scale=dt_scale,
        )  # fmt: skip
        logits = self._logits(stream, seq.valid(ids.shape[-1]), last_only)
        return logits, LanguageModelState(blocks, position)

    def step(
        self,
        ids_t: Tensor,
        state: LanguageModelState,
        *,
        integration_timestep: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, LanguageModelState]:
        """Read one token ids_t (...) of each row; return logits (..., vocab_size) and the state.

        Raises:
            ValueError: as `prefill`.
        """
        self._check_ids("step", ids_t, 0)
        self._check_state("step", state, ids_t.shape)
        self._check_values("step", ids_t, None, state.position)
        x = self._scaled(self.embedding(ids_t))
        if self.positions is not None:
            x = x + self.positions(state.position)
        stream, blocks = run_on_stream(
            self.layers, "step", Stream(self.dropout(x)), state.blocks,
            integration_timestep=integration_timestep, dt_scale=dt_scale,
        )  # fmt: skip
        return self._read(stream), LanguageModelState(blocks, state.position + 1)

    def _embed(self, where: str, ids: Tensor, seq: Layout, places: Tensor | None) -> Tensor:
        valid = seq.valid(ids.shape[-1])
        self._check_values(where, ids, valid, places)
        if valid is not None:
            ids = torch.where(valid, ids, torch.zeros_like(ids))
        x = self._scaled(self.embedding(ids))
        if self.positions is not None and places is not None:
            if valid is not None:
                places = torch.where(valid, places, torch.zeros_like(places))
            x = x + self.positions(places)
        return self.dropout(x)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.config.embedding_scale == 1.0 else x * self.config.embedding_scale

    def _logits(self, stream: Stream, valid: Tensor | None, last_only: bool) -> Tensor:
        if last_only:
            x, valid = last_valid(stream.total(), valid)
            stream = Stream(x)
        logits = self._read(stream)
        if valid is None:
            return logits
        return torch.where(valid.unsqueeze(-1), logits, torch.zeros_like(logits))

    def _read(self, stream: Stream) -> Tensor:
        """Return the logits (..., vocab_size) of the stream (..., H)."""
        weight = self.embedding.weight
        dtype = None if autocasting(stream.x.device) else weight.dtype
        _, x = add_and_normalize(self.norm, stream, dtype=dtype)
        logits = apply_weight(x, weight) if self.head is None else apply_linear(self.head, x)
        if self.config.vocab_size < weight.shape[0]:
            logits = logits[..., : self.config.vocab_size]
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    # --- checks ---------------------------------------------------------------------------------

    def _layout(
        self,
        where: str,
        ids: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        reset: Tensor | None,
        integration_timesteps: Tensor | None,
    ) -> Layout:
        self._check_ids(where, ids, 1)
        rows, length = self.config.max_positions, ids.shape[-1]
        if rows is not None and length > rows and lengths is mask is reset is None:
            raise ValueError(
                f"LRNNLMHeadModel.{where}: ids {tuple(ids.shape)}, expected at most "
                f"max_positions = {rows} tokens a document"
            )
        return layout(
            f"LRNNLMHeadModel.{where}", ids.unsqueeze(-1), lengths=lengths, mask=mask, reset=reset,
            integration_timesteps=integration_timesteps,
        )  # fmt: skip

    def _check_ids(self, where: str, ids: Tensor, rank: int) -> None:
        where = f"LRNNLMHeadModel.{where}"
        check_tensor(where, "ids", ids)
        if ids.ndim < rank:
            raise ValueError(f"{where}: ids {tuple(ids.shape)}, expected (..., L)")
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{where}: ids of dtype {ids.dtype}, expected int64 or int32")
        if ids.device != self.embedding.weight.device:
            raise ValueError(
                f"{where}: ids on {ids.device}, and the model on {self.embedding.weight.device}"
            )

    def _check_state(self, where: str, state: Any, batch_shape: torch.Size) -> None:
        where = f"LRNNLMHeadModel.{where}"
        if not isinstance(state, LanguageModelState):
            raise ValueError(
                f"{where}: a state of type {type(state).__name__}, expected that of init_state, "
                "prefill or step"
            )
        if len(state.blocks) != len(self.layers):
            raise ValueError(
                f"{where}: a state of {len(state.blocks)} blocks, the model has {len(self.layers)}"
            )
        if state.position.shape != batch_shape:
            raise ValueError(
                f"{where}: a state of rows {tuple(state.position.shape)}, ids of rows "
                f"{tuple(batch_shape)}"
            )

    def _check_values(
        self, where: str, ids: Tensor, valid: Tensor | None, places: Tensor | None
    ) -> None:
        where = f"LRNNLMHeadModel.{where}"
        check_range(where, "id", ids, valid, self.config.vocab_size, "vocab_size")
        if self.positions is not None and places is not None:
            rows = self.positions.num_embeddings
            check_range(where, "position", places, valid, rows, "max_positions")

    # --- on disk --------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config and weights into a folder, which is made if need be.

        Raises:
            ValueError: a config that cannot be saved; nothing is written.
        """
        checkpoint.save(folder, ARCHITECTURE, self.config.to_dict(), self)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        vocab_size: int | None = None,
    ) -> Model:
        """Read what `save_pretrained` wrote; the model is in evaluation mode.

        Args:
            folder: where from.
            device: where the model shall be; the CPU if None.
            dtype: of its parameters, the file's if None; state-space parameters stay at least
                float32.
            vocab_size: of the vocabulary that will be used with it; another one is refused.

        Raises:
            ValueError: not such a folder, another architecture or config, a truncated or corrupt
                file, another vocabulary; the message names the file.
        """

        def build(values: dict[str, Any]) -> Model:
            config = LRNNLMConfig.from_dict(values)
            if vocab_size is not None and vocab_size != config.vocab_size:
                raise ValueError(
                    f"a model of vocab_size = {config.vocab_size}, and a vocabulary of {vocab_size}"
                )
            return cls.from_config(config, device="meta")

        return checkpoint.load(folder, ARCHITECTURE, build, device=device, dtype=dtype)


def _block(config: LRNNLMConfig, name: str, place: dict[str, Any]) -> nn.Module:
    """Return the block around a mixer of that type."""
    options = config.mixer_kwargs.get(name, {})
    mixer = make_mixer(name, config.d_model, config.d_state, options, **place)
    if callable(config.block):
        return config.block(config.d_model, mixer)
    mlp = None
    if config.d_intermediate is not None:
        mlp = make_mlp(
            config.mlp, config.d_model, config.d_intermediate, bias=config.mlp_bias, **place
        )
    return ResidualBlock(
        config.d_model, mixer, mlp, norm=config.norm, norm_eps=config.norm_eps,
        dropout=config.dropout, residual_in_fp32=config.residual_in_fp32,
        parallel=config.block == "parallel", **place,
    )  # fmt: skip
