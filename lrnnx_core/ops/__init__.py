# SPDX-License-Identifier: MIT
"""Public operators: differentiable to any order, on any device, under any torch.func transform."""

import lrnnx_core.ops.add_norm  # noqa: F401  # pyright: ignore[reportUnusedImport]  # its kernels
from lrnnx_core.ops.cauchy import cauchy
from lrnnx_core.ops.causal_conv1d import causal_conv1d
from lrnnx_core.ops.causal_convolution import causal_convolution
from lrnnx_core.ops.diagonal_scan import diagonal_scan
from lrnnx_core.ops.linear_scan import linear_scan
from lrnnx_core.ops.projected_convolution import projected_convolution
from lrnnx_core.ops.rg_lru_scan import rg_lru_scan
from lrnnx_core.ops.s4d_scan import s4d_scan
from lrnnx_core.ops.selective_scan import selective_scan
from lrnnx_core.ops.vandermonde import vandermonde

__all__ = [
    "causal_conv1d",
    "causal_convolution",
    "cauchy",
    "diagonal_scan",
    "linear_scan",
    "projected_convolution",
    "rg_lru_scan",
    "s4d_scan",
    "selective_scan",
    "vandermonde",
]
