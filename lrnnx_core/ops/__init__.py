# SPDX-License-Identifier: MIT
"""Public operators: differentiable to any order, on any device, under any torch.func transform."""

from lrnnx_core.ops.linear_scan import linear_scan

__all__ = ["linear_scan"]
