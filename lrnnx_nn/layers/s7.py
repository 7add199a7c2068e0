# SPDX-License-Identifier: MIT
"""S7 as a Module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.models import _s7_full
from lrnnx_core.sequences import Layout
from lrnnx_nn.layers.base import Layer
from lrnnx_nn.layers.projected import ProjectedLayer, in_directions


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
            raise ValueError(
                "S7: variant='full' takes no integration_timesteps and no dt_scale; use 'delta'"
            )
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
        take = ProjectedLayer.step if self._full else Layer.step
        return take(self, u_t, state, integration_timestep=integration_timestep, dt_scale=dt_scale)

    def _inner(
        self, u: Tensor, state: Any, seq: Layout, mode: str, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        v = self._project("in_proj", u)
        y, new = _s7_full.inner(
            self.name, self._inner_params(), v, state, seq,
            chunk_size=options.get("chunk_size", _s7_full.CHUNK_SIZE),
            recurrent=mode == "recurrent", bidirectional=options.get("bidirectional", False),
        )  # fmt: skip
        y = y.to(v.dtype)
        opening = self._project("gate_proj", torch.nn.functional.gelu(y))
        return y * torch.sigmoid(opening), new
