# SPDX-License-Identifier: MIT
"""Regression on sequences: to one value each, or to a sequence that can be streamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lrnnx_nn.architectures import checkpoint
from lrnnx_nn.architectures.encoder import StagedNetwork, copy_statistics
from lrnnx_nn.architectures.stages import EncoderOptions, check_choice
from lrnnx_nn.pooling import VALUE_POOLINGS, Grouped, pool

ARCHITECTURE = "regressor"
Output = Literal["value", "sequence"]
OUTPUTS: tuple[str, ...] = get_args(Output)


@dataclasses.dataclass(frozen=True)
class _RegressorSizes:
    d_input: int
    d_target: int


@dataclasses.dataclass(frozen=True)
class RegressorConfig(EncoderOptions, _RegressorSizes):
    """What a `Regressor` is built from.

    Attributes:
        d_input: channels of the sequences; 1 with tokens.
        d_target: numbers to predict, for a sequence or for each of its samples.
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
        output: ``value``, one prediction a sequence, or ``sequence``, one for each sample of the
            last stage: for every sample of the input, or every group if stages pool.
        pooling: of ``value``: ``mean``, ``last``, ``max`` or ``time_weighted`` over the valid
            samples of the last stage; ``mean`` if None. A ``sequence`` has none.

    Raises:
        ValueError: a size < 1, an unknown choice, no stage, an option the layer does not have, a
            pooling of a ``sequence``.
    """

    output: str = "value"
    pooling: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "RegressorConfig"
        check_choice(where, "output", self.output, OUTPUTS)
        if self.output == "sequence":
            if self.pooling is not None:
                raise ValueError(
                    f"{where}: pooling = {self.pooling!r} with output = 'sequence', expected None"
                )
        else:
            check_choice(where, "pooling", self.pooling or "mean", VALUE_POOLINGS)


class Regressor(StagedNetwork):
    """Predict d_target numbers for sequences (..., L, d_input), or tokens (..., L).

    Inputs and targets are standardised by buffers, zero and one until `set_statistics` says
    otherwise: a loaded network takes data as measured and predicts in the targets' own unit.

    With ``output="sequence"``, causal layers and no pooling it is a `lrnnx_nn.Mixer` from d_input
    to d_target channels: `prefill` and `step` go on from a state, and agree with `forward` in
    evaluation.

    Args:
        config: sizes and choices.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(self, config: RegressorConfig) -> None:
        super().__init__(config, config.d_input)
        self.config = config
        self.decoder = nn.Linear(self.d_encoded, config.d_target)
        self.register_buffer("target_mean", torch.zeros(config.d_target))
        self.register_buffer("target_std", torch.ones(config.d_target))

    @property
    def d_model(self) -> int:
        """Channels of the input, as a mixer calls them."""
        return self.config.d_input

    @property
    def d_output(self) -> int:
        """Channels of the output."""
        return self.config.d_target

    def set_statistics(
        self,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        target_mean: Tensor | None = None,
        target_std: Tensor | None = None,
    ) -> None:
        """Set what inputs (d_input,) and targets (d_target,) are standardised by; None keeps it.

        Raises:
            ValueError: another shape, a deviation that is not above zero, or input statistics with
                token input.
        """
        inputs = {"input_mean": mean, "input_std": std}
        inputs = {k: v for k, v in inputs.items() if v is not None}
        targets = {"target_mean": target_mean, "target_std": target_std}
        if inputs and self.config.n_tokens is not None:
            raise ValueError("Regressor: tokens have no statistics")
        given = inputs | {k: v for k, v in targets.items() if v is not None}
        copy_statistics("Regressor", self, given)

    def standardize(self, target: Tensor) -> Tensor:
        """Return targets or predictions (..., d_target) in units of their deviation, for a loss."""
        return (target - self.target_mean) / self.target_std

    def forward(
        self,
        u: Tensor,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Return the predictions: (..., d_target), or (..., M, d_target) of a ``sequence``.

        Args:
            u: (..., L, d_input), as measured, or tokens (..., L). What stands at padding does not
                matter.
            integration_timesteps: (..., L), time elapsed before each sample.
            lengths: (...), samples per row of a right-padded batch.
            mask: (..., L) bool, False is padding.
            reset: (..., L) bool, a document starts; for a ``sequence`` alone.
            dt_scale: multiplies the step of every layer.

        M is L without pooling stages. With them a prediction belongs to a group of ``stride``
        samples: `output_lengths` counts them, and `lrnnx_nn.pooling.pool_groups` makes the targets
        alike. Predictions at padding are zero.

        Raises:
            ValueError: shapes that do not fit, tokens outside the vocabulary, a reset for a value.
        """
        if self.config.output == "value" and reset is not None:
            raise ValueError(
                "Regressor: reset with output = 'value', expected none: a sequence has one value"
            )
        out = self.encode(
            u, integration_timesteps=integration_timesteps, lengths=lengths, mask=mask,
            reset=reset, dt_scale=dt_scale,
        )  # fmt: skip
        if self.config.output == "sequence":
            return self._predict(out)
        pooling = self.config.pooling or "mean"
        value = pool(out.y, out.valid(), pooling, out.integration_timesteps)
        return self._in_units(self.decoder(value))

    def init_state(self, batch_shape: Sequence[int] = (), **options: Any) -> tuple[Any, ...]:
        """Return the state before any sample, one of each block; options go to theirs.

        Raises:
            ValueError: a network that cannot stream.
        """
        self._check_streams("init_state")
        return tuple(block.init_state(batch_shape, **options) for block in self._mixers())

    def prefill(
        self,
        u: Tensor,
        state: Sequence[Any] | None = None,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Run over u (..., L, d_input), any part of a stream; return also the state after it.

        Arguments as `forward`'s.

        Raises:
            ValueError: a network that cannot stream: one value, pooling, a bidirectional layer; a
                state of another number of blocks.
        """
        states = self._check_streams("prefill", state)
        now = self._embed(
            "prefill", u, integration_timesteps=integration_timesteps, lengths=lengths, mask=mask,
            reset=reset,
        )  # fmt: skip
        given = now._asdict()
        x = given.pop("y")
        left, after = iter(states), list[Any]()
        for _, projection, blocks in self._stages():
            x = projection(x)
            for block in blocks:
                x, new = block.prefill(x, next(left), dt_scale=dt_scale, **given)
                after.append(new)
        return self._predict(now._replace(y=self.norm(x))), tuple(after)

    def step(
        self,
        u_t: Tensor,
        state: Sequence[Any],
        *,
        integration_timestep: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Take one step: u_t (..., d_input), or a token (...); return (..., d_target) and state.

        Raises:
            ValueError: a network that cannot stream; see `prefill`.
        """
        states = self._check_streams("step", state)
        axis = -1 if self.config.n_tokens is not None else -2
        if axis == -2 and u_t.ndim < 1:
            raise ValueError(f"Regressor.step: u_t (), expected (..., {self.config.d_input})")
        x = self._embed("step", u_t.unsqueeze(axis)).y.squeeze(-2)
        left, after = iter(states), list[Any]()
        for _, projection, blocks in self._stages():
            x = projection(x)
            for block in blocks:
                x, new = block.step(
                    x, next(left), integration_timestep=integration_timestep, dt_scale=dt_scale
                )
                after.append(new)
        return self._in_units(self.decoder(self.norm(x))), tuple(after)

    def save(self, folder: Path | str) -> None:
        """Write config and weights into a folder; see `checkpoint.save`."""
        checkpoint.save(folder, ARCHITECTURE, self.config.to_dict(), self)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Regressor:
        """Read what `save` wrote; the network is in evaluation mode.

        Raises:
            ValueError: not such a folder, a truncated or corrupt file; the message names it.
        """
        return checkpoint.load(
            folder, ARCHITECTURE, lambda values: cls(RegressorConfig.from_dict(values)),
            device=device, dtype=dtype,
        )  # fmt: skip

    def _in_units(self, standard: Tensor) -> Tensor:
        return standard * self.target_std + self.target_mean

    def _predict(self, out: Grouped) -> Tensor:
        """Return predictions (..., M, d_target), zero at padding."""
        y, valid = self._in_units(self.decoder(out.y)), out.valid()
        return y if valid is None else torch.where(valid.unsqueeze(-1), y, torch.zeros_like(y))

    def _mixers(self) -> list[Any]:
        return list(self.blocks)

    def _check_streams(self, what: str, state: Sequence[Any] | None = None) -> Sequence[Any]:
        """Return a state for each block; raise where samples do not give predictions one by one."""
        if self.config.output != "sequence":
            raise ValueError(f"Regressor.{what}: output = 'value', expected 'sequence'")
        if self.stride != 1 or any(stage.event for stage in self._plan):
            raise ValueError(
                f"Regressor.{what}: a prediction for every {self.stride} samples, expected stages "
                "without pooling"
            )
        if state is None:
            return (None,) * len(self.blocks)
        if len(state) != len(self.blocks):
            raise ValueError(
                f"Regressor.{what}: a state of {len(state)} blocks, expected {len(self.blocks)}"
            )
        return state
