# SPDX-License-Identifier: MIT
"""The residual block around a recurrent layer: norm, mixer, activation or gate, dropout, skip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrnnx_core.sequences import layout
from lrnnx_nn.linears import apply_linear
from lrnnx_nn.norms import make_norm
from lrnnx_nn.residual_stream import Method, Stream, add_and_normalize, run
from lrnnx_nn.stack import Mixer

ACTIVATIONS = ("none", "gelu", "half_glu1", "half_glu2", "full_glu", "glu")
PROJECTING = ("full_glu", "glu")
"""The activations that end in a projection, and so take a mixer of any output width."""


class Dropout(nn.Module):
    """Dropout on (..., L, H) that can share one mask over time.

    Args:
        p: probability of a zero, 0 <= p < 1.
        tie: drop whole channels of a sequence rather than single samples.
    """

    def __init__(self, p: float, tie: bool = False) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout = {p}, expected 0 <= dropout < 1")
        self.p, self.tie = p, tie

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., L, H) with zeros drawn, in training mode."""
        if not self.training or self.p == 0.0:
            return x
        if not self.tie:
            return F.dropout(x, self.p)
        return x * F.dropout(torch.ones_like(x[..., :1, :]), self.p)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"p={self.p}, tie={self.tie}"


class Activation(nn.Module):
    """What follows the mixer: a nonlinearity, perhaps a gate, and dropout.

    With g = drop(gelu(y)), gelu by its tanh approximation except in ``glu``:

    | name | output |
    |---|---|
    | ``none`` | drop(y) |
    | ``gelu`` | g |
    | ``half_glu1`` | drop(g sigmoid(W g)) |
    | ``half_glu2`` | drop(y sigmoid(W g)) |
    | ``full_glu`` | drop((W1 g) sigmoid(W2 g)) |
    | ``glu`` | drop(GLU(W g)), W to twice the width, the exact gelu (S4, S4D) |

    Args:
        name: one of the table.
        d_input: width of y.
        d_model: width of the output; other than d_input for ``full_glu`` and ``glu`` alone.
        dropout, tie_dropout: see `Dropout`.

    Raises:
        ValueError: an unknown name, or widths it cannot bring together.

    Source: the released code of S5 (Smith et al. 2023) and of S4D (Gu et al. 2022).
    """

    def __init__(
        self,
        name: str,
        d_input: int,
        d_model: int,
        *,
        dropout: float = 0.0,
        tie_dropout: bool = True,
    ) -> None:
        super().__init__()
        if name not in ACTIVATIONS:
            raise ValueError(f"activation {name!r}, expected one of {ACTIVATIONS}")
        if d_input != d_model and name not in PROJECTING:
            raise ValueError(
                f"activation {name!r}: the mixer gives {d_input} channels and the block has "
                f"{d_model}; expected one of {PROJECTING}, which project"
            )
        self.name = name
        self.approximate = "none" if name == "glu" else "tanh"
        self.dropout = Dropout(dropout, tie_dropout)
        self.value = nn.Linear(d_input, d_model) if name == "full_glu" else None
        self.gate = nn.Linear(d_input, d_model) if "half" in name or name == "full_glu" else None
        self.output = nn.Linear(d_input, 2 * d_model) if name == "glu" else None

    def forward(self, y: Tensor) -> Tensor:
        """Map y (..., L, d_input) to (..., L, d_model)."""
        if self.name == "none":
            return self.dropout(y)
        g = self.dropout(F.gelu(y, approximate=self.approximate))
        if self.output is not None:
            return self.dropout(F.glu(apply_linear(self.output, g), dim=-1))
        if self.gate is None:
            return g
        if self.value is not None:
            content = apply_linear(self.value, g)
        else:
            content = g if self.name == "half_glu1" else y
        return self.dropout(content * torch.sigmoid(apply_linear(self.gate, g)))


def reset_parts(*parts: nn.Module | None) -> None:
    """Draw the parameters of each part again, in place, where a module says how it draws its own.

    A module with ``reset_parameters`` answers for what is inside of it: a layer draws its
    projections otherwise than ``nn.Linear`` would.
    """
    for part in parts:
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
        elif part is not None:
            reset_parts(*part.children())


class SizedMixer(Mixer, Protocol):
    """A Module with a `Mixer`'s methods that says its width: what a `Block` goes around.

    Its output has ``d_output`` channels, or d_model if it has no such attribute.
    """

    d_model: int

    def __call__(self, u: Tensor, **sequence: Any) -> Tensor:
        """Run `forward`."""
        ...


class Block(nn.Module):
    """A residual block: u + activation(mixer(norm(u))), or norm(u + activation(mixer(u))).

    Args:
        d_model: channels H.
        mixer: a layer of ``lrnnx_nn.layers``, attention or any other `Mixer` with that d_model;
            several output channels (S4D's ``channels``) call for an activation that projects.
        norm: ``layer``, ``rms``, ``batch``, ``none``, or a callable ``d_model -> Module``. Batch
            statistics count valid samples alone.
        activation: see `Activation`.
        dropout: probability of a zero.
        tie_dropout: share the dropout mask over time.
        prenorm: normalise before the mixer, else after the sum.

    Raises:
        ValueError: a mixer of another width, an unknown choice.

    `forward`, `prefill` and `step` agree with each other in evaluation. Padding comes out as zero.
    """

    def __init__(
        self,
        d_model: int,
        mixer: SizedMixer,
        *,
        norm: str | Callable[[int], nn.Module] = "layer",
        activation: str = "half_glu1",
        dropout: float = 0.0,
        tie_dropout: bool = True,
        prenorm: bool = True,
    ) -> None:
        super().__init__()
        if mixer.d_model != d_model:
            raise ValueError(f"Block: d_model = {d_model}, and the mixer's is {mixer.d_model}")
        self.d_model, self.prenorm = d_model, prenorm
        self.norm = make_norm(norm, d_model)
        self.mixer = mixer
        d_output = getattr(mixer, "d_output", d_model)
        self.activation = Activation(
            activation, d_output, d_model, dropout=dropout, tie_dropout=tie_dropout
        )

    def reset_parameters(self) -> None:
        """Draw every parameter again, in place."""
        reset_parts(*self.children())

    def init_state(self, batch_shape: Sequence[int] = (), **options: Any) -> Any:
        """Return the mixer's zero state; options go to the mixer's `init_state`."""
        return self.mixer.init_state(batch_shape, **options)

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
        """Run over whole sequences u (..., L, H); return (..., L, H). Arguments as a layer's."""
        stream, _ = self._on_stream(
            "forward", Stream(u), integration_timesteps=integration_timesteps, lengths=lengths,
            mask=mask, reset=reset, dt_scale=dt_scale,
        )  # fmt: skip
        return stream.total()

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
            ValueError: a bidirectional mixer.
        """
        stream, new = self._on_stream(
            "prefill", Stream(u), state, integration_timesteps=integration_timesteps,
            lengths=lengths, mask=mask, reset=reset, dt_scale=dt_scale,
        )  # fmt: skip
        return stream.total(), new

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
            ValueError: a bidirectional mixer.
        """
        stream, new = self._on_stream(
            "step", Stream(u_t), state, integration_timestep=integration_timestep,
            dt_scale=dt_scale,
        )  # fmt: skip
        return stream.total(), new

    def _on_stream(
        self, method: Method, stream: Stream, *state: Any, **sequence: Any
    ) -> tuple[Stream, Any]:
        """Run the block; before a norm, its branch is left to whoever reads the stream next."""
        if method == "step":
            valid = None
        else:
            valid = self._valid(stream.x, sequence["lengths"], sequence["mask"])
        if self.prenorm:
            x, inner = add_and_normalize(self.norm, stream, valid)
        else:
            x = inner = stream.total()
        y, new = run(self.mixer, method, inner, *state, **sequence)
        # a dropout mask may be shared over time, which one step has none of
        y = self.activation(y.unsqueeze(-2)).squeeze(-2) if method == "step" else self.activation(y)
        stream = Stream(x, y)
        if torch.promote_types(x.dtype, y.dtype) != x.dtype:
            stream = Stream(x + y)
        if not self.prenorm:
            stream = Stream(add_and_normalize(self.norm, stream, valid)[1])
        if valid is None:
            return stream, new
        out = stream.total()
        return Stream(torch.where(valid.unsqueeze(-1), out, torch.zeros_like(out))), new

    def _valid(self, u: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
        if u.ndim < 2:
            raise ValueError(f"Block: u {tuple(u.shape)}, expected (..., L, {self.d_model})")
        return layout("Block", u, lengths=lengths, mask=mask).valid(u.shape[-2])
