# SPDX-License-Identifier: MIT
"""Linear recurrent networks as ``nn.Module``s, for ordinary training loops."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrnnx_nn.architectures import Classifier, ClassifierConfig
    from lrnnx_nn.blocks import Block
    from lrnnx_nn.event_stage import EventPoolingBlock, EventStage
    from lrnnx_nn.gated import Gated
    from lrnnx_nn.layers import (
        LAYERS,
        LRU,
        RGLRU,
        S4,
        S4D,
        S5,
        S7,
        STREAM,
        Centaurus,
        EventPooling,
        EventSSM,
        Layer,
        Mamba,
        Mamba2,
    )
    from lrnnx_nn.norms import BatchNorm
    from lrnnx_nn.optimizer_groups import param_groups
    from lrnnx_nn.stack import Mixer, Stack

__all__ = [
    "LAYERS", "LRU", "RGLRU", "S4", "S4D", "S5", "S7", "STREAM", "Centaurus", "EventSSM", "Layer",
    "Mamba", "Mamba2",
    "EventPooling", "EventPoolingBlock", "EventStage",
    "BatchNorm", "Block", "Gated", "Mixer", "Stack", "param_groups",
    "Classifier", "ClassifierConfig",
]  # fmt: skip

# On first use only: `lrnnx --help` must not wait for torch.
_HOMES = {
    "lrnnx_nn.layers": (
        "LAYERS",
        "LRU",
        "RGLRU",
        "S4",
        "S4D",
        "S5",
        "S7",
        "STREAM",
        "Centaurus",
        "EventPooling",
        "EventSSM",
        "Layer",
        "Mamba",
        "Mamba2",
    ),
    "lrnnx_nn.norms": ("BatchNorm",),
    "lrnnx_nn.blocks": ("Block",),
    "lrnnx_nn.gated": ("Gated",),
    "lrnnx_nn.event_stage": ("EventPoolingBlock", "EventStage"),
    "lrnnx_nn.optimizer_groups": ("param_groups",),
    "lrnnx_nn.stack": ("Mixer", "Stack"),
    "lrnnx_nn.architectures": ("Classifier", "ClassifierConfig"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
