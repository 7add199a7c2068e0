# SPDX-License-Identifier: MIT
"""Mamba-2 as a Module."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lrnnx_core.models import _ssd
from lrnnx_core.sequences import Layout
from lrnnx_core.types import Params
from lrnnx_nn.layers.base import Held
from lrnnx_nn.layers.projected import ProjectedLayer, in_directions


class Mamba2(ProjectedLayer):
    """Mamba-2 (Dao & Gu 2024): one decay a head, run as matrix products by chunk.

    ``Mamba2(d_model, d_state=128, **options)``; d_state is the number of states a channel. Options
    are those of `lrnnx_core.mamba2.init` and `lrnnx_core.mamba2.scan`: ``head_dim``, ``n_groups``,
    ``expand``, ``d_conv``, ``dt_limit``, ``norm_before_gate``, ``gated_norm``, ``chunk_size``,
    ``bidirectional`` and more.
    """

    name = "mamba2"
    projections = ("in_proj", "out_proj")
    kept_wide = in_directions("A_log", "D", "dt_bias")
    ssm_parameters = in_directions("A_log", "D", "dt_bias")

    def _inner(
        self, u: Tensor, state: Any, seq: Layout, mode: str, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        bundled = self._bundle(options, mode)
        parts = self._project("in_proj", u)
        y, new = _ssd.inner(self.name, self._inner_params(), parts, state, seq, bundled)
        return self._project("out_proj", y), new

    def _step(
        self,
        u_t: Tensor,
        state: Any,
        timestep: Tensor | None,
        dt_scale: float | Tensor,
        params: Params,
        held: Held | None,
    ) -> tuple[Tensor, Any]:
        bundled, A = self._kept_for_steps(
            held, dt_scale, lambda o: (self._bundle(o, self.mode), _ssd.rates(params))
        )
        parts = self._project("in_proj", u_t)
        y, new = _ssd.step(self.name, params, parts, state, timestep, bundled, A)
        return self._project("out_proj", y), new

    def _bundle(self, options: dict[str, Any], mode: str) -> _ssd.Options:
        return _ssd.options_of(
            self.name,
            options.get("discretization"),
            options.get("timestep_mode", "both"),
            options["dt_scale"],
            options.get("dt_limit", (0.0, math.inf)),
            options.get("n_groups", 1),
            options.get("norm_before_gate", False),
            mode,  # pyright: ignore[reportArgumentType]
            options.get("chunk_size", 64),
            options.get("bidirectional", False),
        )
