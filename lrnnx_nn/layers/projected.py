# SPDX-License-Identifier: MIT
"""The shell of layers with projections: the projections are called as modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from lrnnx_core.backends.transforms import autocasting
from lrnnx_core.models._common import check_input, check_timestep
from lrnnx_core.models._projected import REVERSE, around_padding
from lrnnx_core.sequences import Layout, layout
from lrnnx_core.types import Params
from lrnnx_nn.layers.base import Held, Layer
from lrnnx_nn.linears import apply_linear


def in_directions(*keys: str) -> frozenset[str]:
    """Return parameter names of both directions of a bidirectional layer."""
    return frozenset(keys) | {REVERSE + key for key in keys}


class ProjectedLayer(Layer):
    """A layer ``out(inner(in(u)))`` whose in and out are ``nn.Linear`` children.

    Calling them, rather than reading their weights, lets LoRA, quantisation and hooks apply.
    """

    def _inner_params(self) -> Params:
        """Return the parameters without those of the projections."""
        own = (k for k in self._keys if k.split(".")[0] not in self.projections)
        return self._collect(own)

    def _project(self, name: str, x: Tensor) -> Tensor:
        """Call a projection; outside autocast its input takes the dtype of its weight."""
        module = self._modules[name]
        weight = getattr(module, "weight", None)
        if (
            isinstance(weight, Tensor)
            and weight.dtype is not x.dtype
            and weight.is_floating_point()
            and not autocasting(x.device)
        ):
            x = x.to(weight.dtype)
        return apply_linear(module, x)  # pyright: ignore[reportArgumentType]

    def _inner(
        self, u: Tensor, state: Any, seq: Layout, mode: str, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Return y and the new state for u with padding, if any, on the right and zero."""
        raise NotImplementedError

    def _scan(self, u: Tensor, state: Any, **sequence: Any) -> tuple[Tensor, Any]:
        self._check_values(u, sequence["integration_timesteps"], sequence["lengths"])
        self._check_scale(sequence["dt_scale"])
        self._check_width(u)
        options = self._known("scan") | {"dt_scale": sequence.pop("dt_scale")}
        seq = layout(type(self).__name__, u, **sequence)

        def body(x: Tensor, seq: Layout) -> tuple[Tensor, Any]:
            return self._inner(x, state, seq, self.mode, options)

        y, new = around_padding(u, seq, body)
        return y.to(u.dtype), new

    def step(
        self,
        u_t: Tensor,
        state: Any,
        *,
        integration_timestep: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, Any]:
        """Take one step: u_t (..., H), state from `init_state`, `prefill` or `step`.

        Raises:
            ValueError: a bidirectional layer.
        """
        self._check_causal("step")
        if self.mode == "recurrent":
            gaps = None if integration_timestep is None else integration_timestep.unsqueeze(-1)
            y, new = self._scan(
                u_t.unsqueeze(-2), state, integration_timesteps=gaps, lengths=None, mask=None,
                reset=None, dt_scale=dt_scale,
            )  # fmt: skip
            return y.squeeze(-2), new
        held = self._hold()
        params = self._inner_params() if held is None else held.params
        self._check_values(u_t, integration_timestep, None)
        self._check_scale(dt_scale)
        where = type(self).__name__
        check_input(where, u_t, self.d_model, next(iter(params.values())), rank=1, shape="(..., H)")
        check_timestep(where, integration_timestep, u_t)
        y, new = self._step(u_t, state, integration_timestep, dt_scale, params, held)
        return y if y.dtype is u_t.dtype else y.to(u_t.dtype), new

    def _step(
        self,
        u_t: Tensor,
        state: Any,
        timestep: Tensor | None,
        dt_scale: float | Tensor,
        params: Params,
        held: Held | None,
    ) -> tuple[Tensor, Any]:
        """Return y_t and the new state for checked arguments, as one sample of a sequence."""
        gaps = None if timestep is None else timestep.unsqueeze(-1)
        u = u_t.unsqueeze(-2)
        seq = layout(type(self).__name__, u, integration_timesteps=gaps)
        options = self._known("scan", held) | {"dt_scale": dt_scale}
        y, new = self._inner(u, state, seq, self.mode, options)
        return y.squeeze(-2), new

    def _kept_for_steps(
        self, held: Held | None, dt_scale: float | Tensor, make: Callable[[dict[str, Any]], Any]
    ) -> Any:
        """Return what ``make(options)`` gives, kept in evaluation as long as parameters stay."""
        if held is None or isinstance(dt_scale, Tensor):
            return make(self._known("scan", held) | {"dt_scale": dt_scale})
        found = held.made.get(dt_scale)
        if found is None:
            found = make(self._known("scan", held) | {"dt_scale": dt_scale})
            held.made = {dt_scale: found}
        return found

    def _held_keys(self) -> Iterable[str]:
        return tuple(k for k in self._keys if k.split(".")[0] not in self.projections)

    def _check_width(self, u: Tensor) -> None:
        like = next(iter(self._inner_params().values()))
        check_input(type(self).__name__, u, self.d_model, like, rank=2, shape="(..., L, H)")
