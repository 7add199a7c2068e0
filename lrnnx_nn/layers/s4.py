# SPDX-License-Identifier: MIT
"""S4 as a Module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.models import s4
from lrnnx_core.models._s4_scan import convolved_at_once, convolves
from lrnnx_nn.layers.base import Layer


class S4(Layer):
    """S4 (Gu et al. 2022): a diagonal plus low-rank state for each channel.

    ``S4(d_model, d_state, discretization=None, **options)``; d_state is the number N of real
    states a channel. Options are those of `lrnnx_core.s4.init` and `lrnnx_core.s4.scan`:
    ``A_init``, ``rank``, ``n_ssm``, ``channels``, ``tied_dt``, ``bidirectional``, ``l_kernel``,
    ``dt_min``, ``dt_max``, ``dt_transform``, ``A_transform``, ``timestep_mode``.

    With ``l_kernel`` the parameters C_re, C_im hold C~, made for that length; a checkpoint is
    loaded into a layer of the same ``l_kernel``.
    """

    name = "s4"
    ssm_parameters = frozenset({"log_dt", "A_log", "A_im", "B_re", "B_im", "P_re", "P_im"})

    @property
    def l_kernel(self) -> int | None:
        """The length that C~ is stored for; None where C itself is."""
        return self._options.get("l_kernel")

    @torch.no_grad()
    def extend(self) -> None:
        """Double ``l_kernel``, and write C~ for it into the parameters. The function is the same.

        Raises:
            ValueError: a layer that stores C itself.
        """
        length = self.l_kernel
        if length is None:
            raise ValueError("S4.extend: the layer stores C itself (l_kernel=None), at any length")
        longer = s4.extend(self.params, length, **self._transforms())
        for key, value in self.params.items():
            if key.startswith("C"):
                value.copy_(longer[key])
        for options in (self._options, self._init_options):
            options["l_kernel"] = 2 * length
        self._forget()

    def step(
        self,
        u_t: Tensor,
        state: Any,
        *,
        integration_timestep: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, Any]:
        """Take one step: u_t (..., H), state from `init_state`, `prefill` or `step`.

        In evaluation the true C, which steps need, is recovered from C~ once and kept.

        Raises:
            ValueError: a bidirectional layer.
        """
        self._check_causal("step")
        self._check_scale(dt_scale)
        self._watch_stability(u_t)
        held, true = self._hold(), self._true_params()
        options = {**self._known("step", held), "dt_scale": dt_scale}
        if true is not None:
            options["l_kernel"] = None
        params = self.params if true is None else true
        if integration_timestep is not None:
            self._check_values(u_t, integration_timestep, None)
            options["integration_timestep"] = integration_timestep
        elif held is not None and not isinstance(dt_scale, Tensor):
            make = lambda: s4.transition(params, **self._transforms(), dt_scale=dt_scale)  # noqa: E731
            at = self._cached("discrete", (dt_scale,), make, held)
            return s4.advance("S4.step", params, u_t, state, at)
        return self.model.step(params, u_t, state, **options)

    def _true_params(self) -> dict[str, Tensor] | None:
        length = self.l_kernel
        if length is None:
            return None
        recover = lambda: s4.ctilde_to_c(self.params, length, **self._transforms())  # noqa: E731
        return self._cached("true_C", (length,), recover)

    def _transforms(self) -> dict[str, Any]:
        return {k: v for k, v in self._options.items() if k in ("dt_transform", "A_transform")}

    def _convolves(self, u: Tensor) -> bool:
        if self.mode != "auto":
            return self.mode == "conv"
        if self._options.get("chunk_size") is not None:
            return True
        return convolves(u.shape[-2], self.l_kernel)

    def _convolved_at_once(self, u: Tensor) -> int:
        return convolved_at_once("S4", self._options.get("chunk_size"), u, self.l_kernel)
