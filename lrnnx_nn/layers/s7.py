# SPDX-License-Identifier: MIT
"""S7 as a Module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.models import _s7_full
from lrnnx_core.sequences import Layout
from lrnnx_core.types import Params
from lrnnx_nn.layers.base import Held, Layer
from lrnnx_nn.layers.projected import ProjectedLayer, in_directions

_UNTIMED = "S7: variant='full' takes no integration_timesteps and no dt_scale; use 'delta'"


class S7(ProjectedLayer):
    """S7 (Soydan et al. 2024): a state space whose recurrence depends on the input.

    ``S7(d_model, d_state, discretization=None, variant="delta", **options)``. Options are those of
    `lrnnx_core.s7.init` and `lrnnx_core.s7.scan`: for ``variant="delta"`` those of S5,
    ``stable_reparam`` and ``dt_init_scale``; for ``variant="full"`` ``init_memory``, ``abar_min``,
    ``abar_max`` and ``chunk_size``; for both ``bidirectional``.
    """

    name = "s7"
    projections = ("in_proj", "gate_proj")
    kept_wide = in_directions("base") | {
        "Lambda_w", "Lambda_re", "Lambda_im", "B_re", "B_im", "C_re", "C_im", "C2_re", "C2_im", "D",
        "step_proj.weight", "step_proj.bias",
    }  # fmt: skip
    ssm_parameters = in_directions("base") | {
        "Lambda_w", "Lambda_re", "Lambda_im", "B_re", "B_im", "step_proj.weight", "step_proj.bias",
    }  # fmt: skip

    @property
    def _full(self) -> bool:
        return self._options.get("variant") == "full"

    def _scan(self, u: Tensor, state: Any, **sequence: Any) -> tuple[Tensor, Any]:
        if not self._full:
            return Layer._scan(self, u, state, **sequence)
        if sequence["integration_timesteps"] is not None or sequence["dt_scale"] != 1.0:
            raise ValueError(_UNTIMED)
        return super()._scan(u, state, **sequence)

    def step(
        self,
        u_t: Tensor,
        state: Any,
        *,
        integration_timestep: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, Any]:
        """Take one step: u_t (..., H), state from `init_state`, `prefill` or `step`."""
        if self._full and (integration_timestep is not None or dt_scale != 1.0):
            raise ValueError(_UNTIMED)
        take = ProjectedLayer.step if self._full else Layer.step
        return take(self, u_t, state, integration_timestep=integration_timestep, dt_scale=dt_scale)

    def _inner(
        self, u: Tensor, state: Any, seq: Layout, mode: str, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        v = self._project("in_proj", u)
        y, new = _s7_full.inner(
            self.name, self._inner_params(), v, state, seq,
            chunk_size=options.get("chunk_size"),
            recurrent=mode == "recurrent", bidirectional=options.get("bidirectional", False),
        )  # fmt: skip
        return self._gated(y, v), new

    def _gated(self, y: Tensor, v: Tensor) -> Tensor:
        y = y.to(v.dtype)
        opening = self._project("gate_proj", torch.nn.functional.gelu(y))
        return y * torch.sigmoid(opening)

    def _step(
        self,
        u_t: Tensor,
        state: Any,
        timestep: Tensor | None,
        dt_scale: float | Tensor,
        params: Params,
        held: Held | None,
    ) -> tuple[Tensor, Any]:
        v = self._project("in_proj", u_t)
        y, new = _s7_full.step(self.name, params, v, state)
        return self._gated(y, v), new
