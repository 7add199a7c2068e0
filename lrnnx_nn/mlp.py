# SPDX-License-Identifier: MIT
"""The part of a residual block that mixes channels and not time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrnnx_nn.linears import apply_linear

MLPS = ("swiglu", "geglu", "gelu")
MakeMLP = Callable[[int, int], nn.Module]
"""``(d_model, d_intermediate) -> Module``, of (..., H) to (..., H)."""

_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": partial(F.gelu, approximate="tanh"),
}


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), with silu (SwiGLU) or the tanh gelu (GeGLU) as act.

    Args:
        d_model: channels H.
        d_intermediate: width of the gate and of what it multiplies.
        activation: ``swiglu`` or ``geglu``.
        bias: whether the three projections have one.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: a size < 1, an unknown activation.

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    output_projection = "down_proj"

    def __init__(
        self,
        d_model: int,
        d_intermediate: int,
        activation: str = "swiglu",
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(type(self).__name__, d_model, d_intermediate)
        if activation not in _GATES:
            raise ValueError(
                f"GatedMLP: activation {activation!r}, expected one of {tuple(_GATES)}"
            )
        self.activation = activation
        place: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(d_model, d_intermediate, **place)
        self.up_proj = nn.Linear(d_model, d_intermediate, **place)
        self.down_proj = nn.Linear(d_intermediate, d_model, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as ``nn.Linear`` does, and set biases to zero."""
        _reset(self.gate_proj, self.up_proj, self.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., H) to (..., H)."""
        gate = _GATES[self.activation](apply_linear(self.gate_proj, x))
        return apply_linear(self.down_proj, gate * apply_linear(self.up_proj, x))

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"activation={self.activation!r}"


class MLP(nn.Module):
    """down(gelu(up(x))), with the tanh gelu.

    Args:
        d_model: channels H.
        d_intermediate: width between the two projections.
        bias: whether they have one.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: a size < 1.
    """

    output_projection = "down_proj"

    def __init__(
        self,
        d_model: int,
        d_intermediate: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(type(self).__name__, d_model, d_intermediate)
        place: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.up_proj = nn.Linear(d_model, d_intermediate, **place)
        self.down_proj = nn.Linear(d_intermediate, d_model, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as ``nn.Linear`` does, and set biases to zero."""
        _reset(self.up_proj, self.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., H) to (..., H)."""
        hidden = F.gelu(apply_linear(self.up_proj, x), approximate="tanh")
        return apply_linear(self.down_proj, hidden)


def make_mlp(
    mlp: str | MakeMLP,
    d_model: int,
    d_intermediate: int,
    *,
    bias: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return the MLP of that name, or what the callable makes.

    Args:
        mlp: ``swiglu``, ``geglu`` (`GatedMLP`), ``gelu`` (`MLP`), or a callable
            ``(d_model, d_intermediate) -> Module``.
        d_model: channels H.
        d_intermediate: width inside.
        bias: whether the projections have one; a callable decides by itself.
        device: where the parameters are made; a callable decides by itself.
        dtype: their dtype.

    Raises:
        ValueError: an unknown name, a size < 1, a bias for a callable.
    """
    if callable(mlp):
        if bias:
            raise ValueError("mlp_bias = True, and mlp is a callable, which decides by itself")
        return mlp(d_model, d_intermediate)
    place: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
    if mlp in _GATES:
        return GatedMLP(d_model, d_intermediate, mlp, **place)
    if mlp == "gelu":
        return MLP(d_model, d_intermediate, **place)
    raise ValueError(f"mlp {mlp!r}, expected one of {MLPS} or a callable")


def _reset(*projections: nn.Linear) -> None:
    for projection in projections:
        projection.reset_parameters()
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)


def _check(where: str, d_model: int, d_intermediate: int) -> None:
    for name, size in (("d_model", d_model), ("d_intermediate", d_intermediate)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{where}: {name} = {size!r}, expected an integer >= 1")
