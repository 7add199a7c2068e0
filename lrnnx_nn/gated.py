# SPDX-License-Identifier: MIT
"""Gating around any layer, as in gated state spaces: a wide gate, and a narrow recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrnnx_core import registry
from lrnnx_core.sequences import layout
from lrnnx_nn.blocks import Dropout
from lrnnx_nn.layers import LAYERS
from lrnnx_nn.linears import apply_linear

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "none": lambda x: x}


class Gated(nn.Module):
    """A layer between projections, multiplied by a gate of the input.

        x = act(W_in u)                     (H / bottleneck), only with a bottleneck
        y = drop(act(layer(x)))
        y = (W_out y) * act(W_gate u)       (gate H), only with a gate
        out = GLU(W drop(mult_act(y)))      (H), W to twice the width

    Args:
        d_model: channels H.
        layer: any layer of ``lrnnx_nn.LAYERS``, by the registry's names and aliases.
        d_state: state size of that layer.
        gate: width of the gate, in units of H; None for no gate.
        bottleneck: what H is divided by before the layer; None for no projection there.
        activation: ``gelu`` (the exact one), ``silu``, ``relu`` or ``none``.
        mult_act: the same choices, after the product.
        dropout: probability of a zero, before W and after the layer.
        tie_dropout: share the dropout mask over time.
        device: where the parameters are made.
        dtype: their dtype; state-space parameters are at least float32.
        **options: of the layer.

    Raises:
        ValueError: an unknown choice, a bottleneck that does not divide H, a size < 1.

    `forward`, `prefill` and `step` take what the layer takes, and agree with each other in
    evaluation. Padding comes out as zero.

    Source: Mehta et al. 2022 (GSS), arXiv:2206.13947; the order is that of the released S4 block.
    Unlike that block, the layer has the narrow width and all projections the right one.
    """

    def __init__(
        self,
        d_model: int,
        layer: str = "s4",
        d_state: int = 64,
        *,
        gate: int | None = 4,
        bottleneck: int | None = 4,
        activation: str = "gelu",
        mult_act: str = "none",
        dropout: float = 0.0,
        tie_dropout: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if "generator" in options:
            raise ValueError(
                "Gated: its nn.Linear parts draw from torch's own generator; use torch.manual_seed"
            )
        for name, size in (("d_model", d_model), ("gate", gate), ("bottleneck", bottleneck)):
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"Gated: {name} = {size!r}, expected an integer >= 1 or None")
        for name, choice in (("activation", activation), ("mult_act", mult_act)):
            if choice not in ACTIVATIONS:
                raise ValueError(
                    f"Gated: {name} = {choice!r}, expected one of {tuple(ACTIVATIONS)}"
                )
        if d_model % (bottleneck or 1):
            raise ValueError(
                f"Gated: bottleneck = {bottleneck} does not divide d_model = {d_model}"
            )
        self.d_model, self.d_state = d_model, d_state
        self.activation, self.mult_act = activation, mult_act
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        narrow = d_model // (bottleneck or 1)
        make = LAYERS[registry.get(layer).name]
        self.input = None if bottleneck is None else nn.Linear(d_model, narrow, **place)
        self.gate = None if gate is None else nn.Linear(d_model, gate * d_model, **place)
        self.layer = make(narrow, d_state, **place, **options)
        inner = self.layer.d_output
        self.expand = None if gate is None else nn.Linear(inner, gate * d_model, **place)
        wide = inner if gate is None else gate * d_model
        self.output = nn.Linear(wide, 2 * d_model, **place)
        self.dropout = Dropout(dropout, tie_dropout)

    def init_state(self, batch_shape: Sequence[int] = ()) -> Any:
        """Return the layer's zero state."""
        return self.layer.init_state(batch_shape)

    def reset_parameters(self) -> None:
        """Draw every parameter again, in place."""
        for module in (self.input, self.gate, self.layer, self.expand, self.output):
            if module is not None:
                module.reset_parameters()

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
        """Run over whole sequences u (..., L, H); return (..., L, H). Arguments as the layer's."""
        sequence = _sequence(integration_timesteps, lengths, mask, reset, dt_scale)
        u, valid = self._prepare(u, lengths, mask)
        return self._after(u, self.layer(self._before(u), **sequence), valid)

    def prefill(
        self,
        u: Tensor,
        state: Any = None,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, Any]:
        """Run over u (..., L, H) from ``state``; return the output and the state after it.

        Raises:
            ValueError: a bidirectional layer.
        """
        sequence = _sequence(integration_timesteps, lengths, mask, reset, dt_scale)
        u, valid = self._prepare(u, lengths, mask)
        y, state = self.layer.prefill(self._before(u), state, **sequence)
        return self._after(u, y, valid), state

    def step(
        self,
        u_t: Tensor,
        state: Any,
        *,
        integration_timestep: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, Any]:
        """Take one step: u_t (..., H); return the output (..., H) and the new state.

        Raises:
            ValueError: a bidirectional layer.
        """
        options: dict[str, Any] = {"dt_scale": dt_scale}
        if integration_timestep is not None:
            options["integration_timestep"] = integration_timestep
        y, state = self.layer.step(self._before(u_t), state, **options)
        return self._after(u_t.unsqueeze(-2), y.unsqueeze(-2), None).squeeze(-2), state

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"d_model={self.d_model}, activation={self.activation}, mult_act={self.mult_act}"

    def _prepare(
        self, u: Tensor, lengths: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return u with zeros at padding, and where it counts."""
        if u.ndim < 2 or u.shape[-1] != self.d_model:
            raise ValueError(f"Gated: u {tuple(u.shape)}, expected (..., L, {self.d_model})")
        valid = layout("Gated", u, lengths=lengths, mask=mask).valid(u.shape[-2])
        if valid is not None:
            u = torch.where(valid.unsqueeze(-1), u, torch.zeros_like(u))
        return u, valid

    def _act(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x)

    def _before(self, u: Tensor) -> Tensor:
        return u if self.input is None else self._act(apply_linear(self.input, u))

    def _after(self, u: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
        y = self.dropout(self._act(y))
        if self.gate is not None and self.expand is not None:
            y = apply_linear(self.expand, y) * self._act(apply_linear(self.gate, u))
        y = self.dropout(ACTIVATIONS[self.mult_act](y))
        y = F.glu(apply_linear(self.output, y), dim=-1)
        return y if valid is None else torch.where(valid.unsqueeze(-1), y, torch.zeros_like(y))


def _sequence(
    integration_timesteps: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    dt_scale: float | Tensor,
) -> dict[str, Any]:
    return {
        "integration_timesteps": integration_timesteps, "lengths": lengths, "mask": mask,
        "reset": reset, "dt_scale": dt_scale,
    }  # fmt: skip
