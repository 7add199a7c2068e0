# SPDX-License-Identifier: MIT
"""S4D as a Module."""

from lrnnx_nn.layers.base import Layer


class S4D(Layer):
    """S4D (Gu et al. 2022): one diagonal state for each channel, run as a convolution.

    ``S4D(d_model, d_state, discretization=None, **options)``; d_state is the number N of real
    states a channel. Options are those of `lrnnx_core.s4d.init` and `lrnnx_core.s4d.scan`:
    ``A_init``, ``is_real``, ``n_ssm``, ``channels``, ``tied_dt``, ``bidirectional``, ``dt_min``,
    ``dt_max``, ``dt_transform``, ``A_transform``, ``timestep_mode``, ``alpha``, ``bandlimit``.
    """

    name = "s4d"
    ssm_parameters = frozenset({"log_dt", "A_log", "A_im", "B_re", "B_im"})
