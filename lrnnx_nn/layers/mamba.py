# SPDX-License-Identifier: MIT
"""Mamba and STREAM as Modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrnnx_core.models import _selective
from lrnnx_core.models.mamba import options_of
from lrnnx_core.sequences import Layout
from lrnnx_core.types import Discretization, Params
from lrnnx_nn.layers.base import Held
from lrnnx_nn.layers.projected import ProjectedLayer, in_directions


class Mamba(ProjectedLayer):
    """Mamba / S6 (Gu & Dao 2023): a gated block around a selective scan.

    ``Mamba(d_model, d_state=16, discretization=None, **options)``; d_state is the number of states
    a channel. Options are those of `lrnnx_core.mamba.init` and `lrnnx_core.mamba.scan`: ``d_conv``,
    ``expand``, ``dt_rank``, ``dt_init``, ``dt_min``, ``dt_max``, ``conv_bias``, ``bias``,
    ``inner_norm``, ``timestep_mode``, ``alpha``, ``bidirectional`` and more.
    """

    name = "mamba"
    projections = ("in_proj", "out_proj")
    kept_wide = in_directions("A_log", "D", "dt_proj.bias", "dtA_bias")
    ssm_parameters = in_directions("A_log", "D", "dt_proj.bias")

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        discretization: Discretization | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_model, d_state, discretization, **options)

    def _inner(
        self, u: Tensor, state: Any, seq: Layout, mode: str, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        bundled = self._bundle(options, mode)
        xz = self._project("in_proj", u)
        y, new = _selective.inner(self.name, self._inner_params(), xz, state, seq, bundled)
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
            held, dt_scale, lambda o: (self._bundle(o, self.mode), _selective.rates(params))
        )
        xz = self._project("in_proj", u_t)
        y, new = _selective.step(self.name, params, xz, state, timestep, bundled, A)
        return self._project("out_proj", y), new

    def _bundle(self, options: dict[str, Any], mode: str) -> _selective.Options:
        return options_of(
            self.name,
            options.get("discretization"),
            options.get("timestep_mode", self.model.timestep_modes[0]),
            options.get("alpha"),
            options["dt_scale"],
            options.get("inner_norm", "none"),
            mode,  # pyright: ignore[reportArgumentType]
            options.get("bidirectional", False),
        )


class STREAM(Mamba):
    """STREAM: event-driven Mamba, whose memory fades with elapsed time.

    ``STREAM(d_model, d_state=16, discretization=None, **options)``; options as `Mamba`, except that
    ``timestep_mode`` is always ``state_only``. Give ``integration_timesteps``; without them every
    gap is 1.
    """

    name = "stream"
    ssm_parameters = in_directions("A_log", "D", "dt_proj.bias", "dtA_bias")
