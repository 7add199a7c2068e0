# SPDX-License-Identifier: MIT
"""Centaurus as a Module."""

from lrnnx_nn.layers.base import Layer


class Centaurus(Layer):
    """Centaurus (Pei 2025): state channels of several sub-states, in four connectivities.

    ``Centaurus(d_model, d_state, discretization=None, **options)``; d_state is the number of state
    channels for the variants ``neck`` and ``pointwise``, of sub-states for ``dws`` and ``full``.
    Options are those of `lrnnx_core.centaurus.init` and `lrnnx_core.centaurus.scan`: ``variant``,
    ``sub_state_dim``, ``d_out``, ``tied_dt``, ``bidirectional``, ``dt_min``, ``dt_max``,
    ``timestep_mode``. The output has ``d_out`` channels.
    """

    name = "centaurus"
    ssm_parameters = frozenset({"A_raw", "A_im", "log_dt"})

    def _keeps_kernel(self) -> bool:
        # the one variant that convolves with a kernel for each pair of channels
        return self._options.get("variant") == "full"
