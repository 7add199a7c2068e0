# SPDX-License-Identifier: MIT
"""S5 as a Module."""

from lrnnx_nn.layers.base import Layer


class S5(Layer):
    """S5 (Smith et al. 2023): one multi-input multi-output diagonal state for all channels.

    ``S5(d_model, d_state, discretization=None, **options)``; d_state is the full state size P.
    Options are those of `lrnnx_core.s5.init` and `lrnnx_core.s5.scan`: ``blocks``, ``conj_sym``,
    ``bidirectional``, ``dense_D``, ``Lambda_init``, ``C_init``, ``dt_min``, ``dt_max``,
    ``clip_eigs``, ``timestep_mode``, ``alpha``.
    """

    name = "s5"
    ssm_parameters = frozenset({"Lambda_re", "Lambda_im", "log_dt", "B_re", "B_im"})
