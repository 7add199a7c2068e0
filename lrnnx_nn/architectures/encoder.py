# SPDX-License-Identifier: MIT
"""Sequences or tokens through stages of residual blocks, each at a coarser time perhaps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lrnnx_core.backends.transforms import transform_active
from lrnnx_core.sequences import check_tensor, layout
from lrnnx_nn.architectures.stages import EVENT_POOLINGS, EncoderOptions, Stage
from lrnnx_nn.blocks import Block
from lrnnx_nn.event_stage import EventPoolingBlock
from lrnnx_nn.layers import EventPooling
from lrnnx_nn.mixers import make_mixer
from lrnnx_nn.norms import make_norm
from lrnnx_nn.pooling import Grouped, grouped_lengths, pool_groups


@dataclasses.dataclass(frozen=True)
class _EncoderSizes:
    d_input: int


@dataclasses.dataclass(frozen=True)
class EncoderConfig(EncoderOptions, _EncoderSizes):
    """What an `Encoder` is built from.

    Attributes:
        d_input: channels of the sequences; 1 with tokens.
        layer: a model's name, looked up in the registry, or ``attn``. With stages this and the
            four after it hold for the stages that say nothing else.
        d_model: width H of the blocks.
        d_state: state size, with the meaning the model gives it. Attention has none.
        n_layer: number of blocks.
        layer_options: further options of the layer, such as ``{"bidirectional": True}``.
        norm: ``layer``, ``rms``, ``batch`` or ``none``.
        activation: see `lrnnx_nn.blocks.Activation`.
        dropout: probability of a zero in the blocks.
        tie_dropout: share the mask over time.
        prenorm: normalise before each mixer, else after each sum.
        final_norm: normalise once more at the end.
        stages: see `StageConfig`; one stage without pooling if None.
        n_tokens: size of the vocabulary of token input; sequences of d_input channels if None.

    Raises:
        ValueError: a size < 1, an unknown choice, no stage, an option the layer does not have.
    """


class StagedNetwork(nn.Module):
    """What every network of stages shares: its input, its blocks, its last norm.

    Continuous input is standardised by two buffers first, ``input_mean`` and ``input_std``, zero
    and one until `set_statistics` says otherwise: a loaded network takes data as it was measured.

    Args:
        config: sizes and choices.
        d_input: channels of continuous input.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, config: EncoderOptions, d_input: int) -> None:
        super().__init__()
        self._n_tokens, self._plan = config.n_tokens, config.plan()
        first = self._plan[0].d_model
        if config.n_tokens is None:
            self.register_buffer("input_mean", torch.zeros(d_input))
            self.register_buffer("input_std", torch.ones(d_input))
            self.encoder = nn.Linear(d_input, first)
        else:
            self.encoder = nn.Embedding(config.n_tokens, first)
        self.projections = nn.ModuleList()
        self.blocks = nn.ModuleList()
        width = first
        for stage in self._plan:
            same = stage.d_model == width
            self.projections.append(nn.Identity() if same else nn.Linear(width, stage.d_model))
            self.blocks.extend(_blocks(config, stage))
            width = stage.d_model
        self.d_encoded = width
        # not a batch norm: what is pooled must not depend on the other sequences of the batch
        last = {"batch": "layer"}.get(config.norm, config.norm) if config.final_norm else "none"
        self.norm = make_norm(last, width)

    @property
    def stride(self) -> int:
        """Samples of the input for each sample of the last stage."""
        return math.prod(stage.stride for stage in self._plan)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many samples the last stage has for ``lengths`` (...) of the input."""
        for stage in self._plan:
            if stage.event:
                lengths = lengths // stage.stride
            else:
                lengths = grouped_lengths(lengths, stage.stride)
        return lengths

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the mean and deviation (d_input,) by which inputs are standardised.

        Raises:
            ValueError: another shape, a deviation that is not above zero, or token input.
        """
        where = type(self).__name__
        if self._n_tokens is not None:
            raise ValueError(f"{where}: tokens have no statistics")
        copy_statistics(where, self, {"input_mean": mean, "input_std": std})

    def reset_parameters(self) -> None:
        """Draw every parameter again, in place; the statistics stay."""
        for child in self.children():
            for module in child if isinstance(child, nn.ModuleList) else (child,):
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()

    def encode(
        self,
        u: Tensor,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Grouped:
        """Run over whole sequences; return what the last stage gives and when.

        Args:
            u: (..., L, d_input), as measured, or tokens (..., L). What stands at padding does not
                matter.
            integration_timesteps: (..., L), time elapsed before each sample. Those of a later stage
                are the sums over its groups. None: every stage counts its own samples.
            lengths: (...), samples per row of a right-padded batch.
            mask: (..., L) bool, False is padding.
            reset: (..., L) bool, a document starts; see `lrnnx_nn.pooling.pool_groups`.
            dt_scale: multiplies the step of every layer.

        Returns:
            Grouped: y (..., M, H) after the last norm, with gaps, lengths, mask and reset of its
            samples. M is ceil(L / stride) stage by stage.

        Raises:
            ValueError: shapes that do not fit, tokens outside the vocabulary, a reset in an
                Event-SSM stage.
        """
        now = self._embed(
            "forward", u, integration_timesteps=integration_timesteps, lengths=lengths, mask=mask,
            reset=reset,
        )  # fmt: skip
        for stage, projection, blocks in self._stages():
            now = now._replace(y=projection(now.y))
            for block in blocks:
                now = _advance(block, now, dt_scale)
            if not stage.event:
                now = _pooled(now, stage)
        valid = now.valid()
        y = self.norm(now.y)
        if valid is not None:
            y = torch.where(valid.unsqueeze(-1), y, torch.zeros_like(y))
        return Grouped(y, *now[1:])  # torch 2.11 cannot compile a _replace that is returned

    def _stages(self) -> Iterator[tuple[Stage, nn.Module, list[Any]]]:
        """Yield every stage, the map in front of it, and its blocks."""
        blocks = iter(self.blocks)
        for stage, projection in zip(self._plan, self.projections, strict=True):
            yield stage, projection, [next(blocks) for _ in stage.layers]

    def _embed(self, where: str, u: Tensor, **sequence: Tensor | None) -> Grouped:
        """Return the input as (..., L, H) of the first stage, blind to what stands at padding."""
        where, tokens = f"{type(self).__name__}.{where}", self._n_tokens
        check_tensor(where, "u", u)
        if tokens is not None:
            if u.ndim < 1 or u.is_floating_point() or u.is_complex() or u.dtype == torch.bool:
                raise ValueError(
                    f"{where}: u {tuple(u.shape)} {u.dtype}, expected tokens (..., L), integers"
                )
            u = u.to(torch.int64).unsqueeze(-1)  # an index; bytes come as uint8
        elif u.ndim < 2 or u.shape[-1] != len(self.input_mean):
            raise ValueError(
                f"{where}: u {tuple(u.shape)}, expected (..., L, {len(self.input_mean)})"
            )
        given = layout(where, u, **sequence)
        valid, gaps = given.valid(u.shape[-2]), given.timesteps
        if valid is not None:
            u = torch.where(valid.unsqueeze(-1), u, torch.zeros_like(u))
            gaps = None if gaps is None else torch.where(valid, gaps, torch.zeros_like(gaps))
        if tokens is None:
            x = self.encoder((u - self.input_mean) / self.input_std)
        else:
            _check_tokens(where, u.squeeze(-1), tokens)
            x = self.encoder(u.squeeze(-1))
        return Grouped(x, gaps, given.lengths, given.mask, given.reset)


class Encoder(StagedNetwork):
    """Sequences (..., L, d_input), or tokens (..., L), to (..., M, H): a network without a head.

    `forward` returns a `lrnnx_nn.pooling.Grouped`, ready for `lrnnx_nn.pooling.pool` or a head of
    one's own.

    Args:
        config: sizes and choices.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, config.d_input)
        self.config = config

    def forward(
        self,
        u: Tensor,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Grouped:
        """Run over whole sequences; arguments and result as `encode`'s."""
        return self.encode(
            u, integration_timesteps=integration_timesteps, lengths=lengths, mask=mask,
            reset=reset, dt_scale=dt_scale,
        )  # fmt: skip


def copy_statistics(where: str, model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy means and deviations into buffers of a model, all or none.

    Raises:
        ValueError: another shape than the buffer's, a number that is not finite, or a deviation
            that is not above zero.
    """
    for key, value in values.items():
        name, width = key.removeprefix("input_"), len(model.get_buffer(key))
        if tuple(value.shape) != (width,):
            raise ValueError(f"{where}: {name} {tuple(value.shape)}, expected ({width},)")
        if key.endswith("_std") and not bool((value > 0).all()):
            raise ValueError(
                f"{where}: {name} = {value.tolist()}, expected numbers above 0 (one, for a channel "
                "that is constant)"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{where}: {name} = {value.tolist()}, expected finite numbers")
    for key, value in values.items():
        model.get_buffer(key).copy_(value)


def _blocks(config: EncoderOptions, stage: Stage) -> list[nn.Module]:
    around: dict[str, Any] = {
        "norm": config.norm, "activation": config.activation, "dropout": config.dropout,
        "tie_dropout": config.tie_dropout, "prenorm": config.prenorm,
    }  # fmt: skip
    made: list[nn.Module] = []
    for i, layer in enumerate(stage.layers):
        options = {k: v for k, v in layer.items() if k != "layer"}
        if stage.event and i == 0:
            pooling: Any = EVENT_POOLINGS[stage.pooling]
            mixer = EventPooling(stage.d_model, stride=stage.stride, pooling=pooling, **options)
            made.append(EventPoolingBlock(stage.d_model, mixer, **around))
        else:
            mixer: Any = make_mixer(layer["layer"], stage.d_model, options=options)
            made.append(Block(stage.d_model, mixer, **around))
    return made


def _advance(block: Any, now: Grouped, dt_scale: float | Tensor) -> Grouped:
    """Run one block over whole sequences."""
    given: dict[str, Any] = {
        "integration_timesteps": now.integration_timesteps, "lengths": now.lengths,
        "mask": now.mask, "dt_scale": dt_scale,
    }  # fmt: skip
    if not isinstance(block, EventPoolingBlock):
        return now._replace(y=block(now.y, reset=now.reset, **given))
    if now.reset is not None:
        raise ValueError("EventPoolingBlock: reset, expected none: events are pooled as one stream")
    return Grouped(*block(now.y, **given))


def _pooled(now: Grouped, stage: Stage) -> Grouped:
    return pool_groups(
        now.y, stage.stride, stage.pooling, integration_timesteps=now.integration_timesteps,
        lengths=now.lengths, mask=now.mask, reset=now.reset,
    )  # fmt: skip


def _check_tokens(where: str, ids: Tensor, n_tokens: int) -> None:
    """Raise for a token outside the vocabulary, eager on a CPU; elsewhere torch's lookup does."""
    if ids.device.type != "cpu" or transform_active() or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= n_tokens:
        at = tuple(int(i) for i in ((ids < 0) | (ids >= n_tokens)).nonzero()[0])
        raise ValueError(f"{where}: token {int(ids[at])} at {at}, expected 0 ... {n_tokens - 1}")
