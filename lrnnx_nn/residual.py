# SPDX-License-Identifier: MIT
"""The pre-norm residual block of language models: a mixer in time, then an MLP in channels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrnnx_core.sequences import layout
from lrnnx_nn.blocks import Dropout, reset_parts
from lrnnx_nn.norms import make_norm
from lrnnx_nn.residual_stream import Method, Stream, add_and_normalize, run

_OUTPUTS = ("out_proj", "linear_out", "o_proj")
"""What the layers call the ``nn.Linear`` that writes into the residual stream."""


class ResidualBlock(nn.Module):
    """x = u + drop(mixer(norm1(u))), then x + drop(mlp(norm2(x))) if there is an MLP.

    With ``parallel`` both read one norm: u + drop(mixer(norm1(u))) + drop(mlp(norm1(u))).

    Args:
        d_model: channels H.
        mixer: a layer, attention, or another `Mixer` of H channels in and out.
        mlp: a Module of (..., H) to (..., H), or None.
        norm: ``layer``, ``rms``, ``none``, ``batch``, or a callable ``d_model -> Module``.
        norm_eps: added to the variance; the norm's own if None.
        dropout: probability of a zero at the end of each branch.
        residual_in_fp32: keep the sum in at least float32. Else it has the dtype of the input.
        parallel: run mixer and MLP side by side.
        device: where the norms' parameters are made.
        dtype: their dtype.

    The sum and the norms are computed in at least float32; mixer and MLP get the narrowest
    floating dtype of the block's parameters, and autocast does the rest. So the output of a
    bfloat16 block is float32 unless ``residual_in_fp32=False``.

    It is a `Mixer` itself: `forward`, `prefill` and `step` agree in evaluation, and padding comes
    out as zero. Its state is the mixer's.

    Raises:
        ValueError: a mixer of another width or number of output channels, a norm that does not
            exist, ``parallel`` without an MLP.
    """

    def __init__(
        self,
        d_model: int,
        mixer: nn.Module,
        mlp: nn.Module | None = None,
        *,
        norm: str | Callable[[int], nn.Module] = "rms",
        norm_eps: float | None = None,
        dropout: float = 0.0,
        residual_in_fp32: bool = True,
        parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name in ("d_model", "d_output"):
            width = getattr(mixer, name, d_model)
            if width != d_model:
                raise ValueError(f"ResidualBlock: d_model = {d_model}, the mixer's {name} {width}")
        if parallel and mlp is None:
            raise ValueError("ResidualBlock: parallel = True without an mlp")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.residual_in_fp32, self.parallel = d_model, residual_in_fp32, parallel
        self.norm1 = make_norm(norm, d_model, norm_eps, **place)
        self.mixer = mixer
        second = mlp is not None and not parallel
        self.norm2 = make_norm(norm, d_model, norm_eps, **place) if second else None
        self.mlp = mlp
        self.dropout = Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draw every parameter again, in place."""
        reset_parts(self.norm1, self.mixer, self.norm2, self.mlp)

    def output_projections(self) -> list[nn.Linear]:
        """Return the last ``nn.Linear`` of each branch that has one: what writes into the sum."""
        named: list[tuple[nn.Module | None, str]] = [(self.mixer, name) for name in _OUTPUTS]
        named.append((self.mlp, getattr(self.mlp, "output_projection", "")))
        children = (getattr(part, name, None) for part, name in named if name)
        return [child for child in children if isinstance(child, nn.Linear)]

    def init_state(self, batch_shape: Sequence[int] = (), *, capacity: int | None = None) -> Any:
        """Return the mixer's state before any sample.

        Args:
            batch_shape: leading dimensions.
            capacity: what attention keeps room for, in samples; the others need none.
        """
        mixer: Any = self.mixer
        if capacity is not None and takes_capacity(mixer):
            return mixer.init_state(batch_shape, capacity=capacity)
        return mixer.init_state(batch_shape)

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

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"{self.d_model}, residual_in_fp32={self.residual_in_fp32}, parallel={self.parallel}"

    def _on_stream(
        self, method: Method, stream: Stream, *state: Any, **sequence: Any
    ) -> tuple[Stream, Any]:
        """Run the block; its last branch is left to whoever reads the stream next."""
        valid = self._check(method, stream.x, **sequence)
        wide = torch.promote_types(stream.x.dtype, torch.float32)
        if self.residual_in_fp32 and stream.x.dtype != wide:
            stream = Stream(stream.total().to(wide))
        dtype = self._inner_dtype(stream.x)
        x, inner = add_and_normalize(self.norm1, stream, valid, dtype)
        y, new = run(self.mixer, method, inner, *state, **sequence)
        stream = Stream(x, self.dropout(y))
        if self.mlp is not None:
            if self.norm2 is None:
                x = stream.total()
            else:
                x, inner = add_and_normalize(self.norm2, stream, valid, dtype)
            stream = Stream(x, self.dropout(self.mlp(inner)))
        if valid is None:
            return stream, new
        x = stream.total()
        return Stream(torch.where(valid.unsqueeze(-1), x, torch.zeros_like(x))), new

    def _check(
        self,
        method: Method,
        u: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor | None:
        """Check the input; return where it counts, None for everywhere."""
        step = method == "step"
        if u.ndim < (1 if step else 2) or u.shape[-1] != self.d_model:
            shape = "(..., " if step else "(..., L, "
            raise ValueError(f"ResidualBlock: u {tuple(u.shape)}, expected {shape}{self.d_model})")
        if step:
            return None
        return layout("ResidualBlock", u, lengths=lengths, mask=mask).valid(u.shape[-2])

    def _inner_dtype(self, x: Tensor) -> torch.dtype:
        """Return the narrowest floating dtype of at least 16 bits among the parameters."""
        found: set[torch.dtype] = set()
        _collect_dtypes(self, found)
        if len(found) == 1:
            dtype = next(iter(found))
            return dtype if dtype.is_floating_point and dtype.itemsize >= 2 else x.dtype
        found = {dtype for dtype in found if dtype.is_floating_point and dtype.itemsize >= 2}
        return min(found, key=lambda dtype: dtype.itemsize, default=x.dtype)


def _collect_dtypes(module: nn.Module, found: set[torch.dtype]) -> None:
    """Add the dtypes of all parameters; ``module.parameters()`` takes longer than a small step."""
    for parameter in module._parameters.values():
        if parameter is not None:
            found.add(parameter.dtype)
    for child in module._modules.values():
        if child is not None:
            _collect_dtypes(child, found)


def takes_capacity(mixer: Any) -> bool:
    """Return whether ``init_state`` takes a ``capacity``, or passes it on to a mixer that does."""
    parameters = inspect.signature(mixer.init_state).parameters
    if "capacity" in parameters:
        return True
    inner = getattr(mixer, "mixer", None)
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return passes_on and inner is not None and takes_capacity(inner)
