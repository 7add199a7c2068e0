# SPDX-License-Identifier: MIT
"""LRU as a Module."""

from lrnnx_nn.layers.base import Layer


class LRU(Layer):
    """LRU (Orvieto et al. 2023): a complex diagonal recurrence, stable by construction.

    ``LRU(d_model, d_state, **options)``; d_state is the number of complex states. Options are those
    of `lrnnx_core.lru.init` and `lrnnx_core.lru.scan`: ``r_min``, ``r_max``, ``max_phase``,
    ``bidirectional``.
    """

    name = "lru"
    ssm_parameters = frozenset({"nu_log", "theta_log", "gamma_log", "B_re", "B_im"})
