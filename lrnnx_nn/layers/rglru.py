# SPDX-License-Identifier: MIT
"""The Griffin recurrent block as a Module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrnnx_core.models import _griffin
from lrnnx_core.sequences import Layout
from lrnnx_core.types import Discretization, Params
from lrnnx_nn.layers.base import Held
from lrnnx_nn.layers.projected import ProjectedLayer, in_directions


class RGLRU(ProjectedLayer):
    """RG-LRU in the Griffin recurrent block (De et al. 2024): gated decays on a ring.

    ``RGLRU(d_model, d_state=None, **options)``; d_state is the recurrent width, ``expand`` (or 1)
    times d_model if None.
    Options are those of `lrnnx_core.rglru.init` and `lrnnx_core.rglru.scan`: ``heads``, ``d_conv``,
    ``expand``, ``c``, ``init_power``, ``r_min``, ``r_max``, ``start_rule``, ``timestep_mode``,
    ``gelu``, ``bidirectional`` and more.
    """

    name = "rglru"
    projections = ("linear_x", "linear_y", "linear_out")
    kept_wide = in_directions("rg_lru.recurrent_param")
    ssm_parameters = in_directions("rg_lru.recurrent_param")

    def __init__(
        self,
        d_model: int,
        d_state: int | None = None,
        discretization: Discretization | None = None,
        **options: Any,
    ) -> None:
        width = d_state
        if width is None:
            expand = options.pop("expand", None)
            width = d_model if expand is None else expand * d_model
        super().__init__(d_model, width, discretization, **options)

    def _inner(
        self, u: Tensor, state: Any, seq: Layout, mode: str, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        bundled = self._bundle(options, mode)
        x, y = self._project("linear_x", u), self._project("linear_y", u)
        out, new = _griffin.inner(self.name, self._inner_params(), x, y, state, seq, bundled)
        return self._project("linear_out", out), new

    def _step(
        self,
        u_t: Tensor,
        state: Any,
        timestep: Tensor | None,
        dt_scale: float | Tensor,
        params: Params,
        held: Held | None,
    ) -> tuple[Tensor, Any]:
        def make(options: dict[str, Any]) -> tuple[_griffin.Options, Tensor]:
            bundled = self._bundle(options, self.mode)
            return bundled, _griffin.rate_of(params, params["rg_lru.recurrent_param"], bundled)

        bundled, rate = self._kept_for_steps(held, dt_scale, make)
        x, y = self._project("linear_x", u_t), self._project("linear_y", u_t)
        out, new = _griffin.step(self.name, params, x, y, state, timestep, bundled, rate)
        return self._project("linear_out", out), new

    def _bundle(self, options: dict[str, Any], mode: str) -> _griffin.Options:
        return _griffin.options_of(
            self.name,
            options.get("discretization"),
            options.get("timestep_mode", "both"),
            options.get("c", 8.0),
            options["dt_scale"],
            options.get("start_rule", True),
            mode,  # pyright: ignore[reportArgumentType]
            options.get("bidirectional", False),
            options.get("gelu", "tanh"),
        )
