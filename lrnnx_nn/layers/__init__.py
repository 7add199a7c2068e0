# SPDX-License-Identifier: MIT
"""One small Module a model, all with the constructor ``Layer(d_model, d_state, ...)``."""

from lrnnx_nn.layers.base import Layer
from lrnnx_nn.layers.centaurus import Centaurus
from lrnnx_nn.layers.event_ssm import EventPooling, EventSSM
from lrnnx_nn.layers.lru import LRU
from lrnnx_nn.layers.mamba import STREAM, Mamba
from lrnnx_nn.layers.mamba2 import Mamba2
from lrnnx_nn.layers.rglru import RGLRU
from lrnnx_nn.layers.s4 import S4
from lrnnx_nn.layers.s4d import S4D
from lrnnx_nn.layers.s5 import S5
from lrnnx_nn.layers.s7 import S7

LAYERS: dict[str, type[Layer]] = {
    layer.name: layer
    for layer in (S4, S4D, S5, LRU, EventSSM, Centaurus, Mamba, Mamba2, STREAM, RGLRU, S7)
}
"""Layer classes by the registry's names."""

__all__ = [
    "LAYERS", "LRU", "RGLRU", "S4", "S4D", "S5", "S7", "STREAM", "Centaurus", "EventPooling",
    "EventSSM", "Layer", "Mamba", "Mamba2",
]  # fmt: skip
