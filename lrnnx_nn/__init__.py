# SPDX-License-Identifier: MIT
"""Linear recurrent networks as ``nn.Module``s, for ordinary training loops."""

from lrnnx_nn.layers import LAYERS, LRU, S4D, S5, Layer

__all__ = ["LAYERS", "LRU", "S4D", "S5", "Layer"]
