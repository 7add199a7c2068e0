# SPDX-License-Identifier: MIT
"""Linear recurrent networks as ``nn.Module``s, for ordinary training loops."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrnnx_nn.architectures import (
        Classifier,
        ClassifierConfig,
        Encoder,
        EncoderConfig,
        Regressor,
        RegressorConfig,
        StageConfig,
    )
    from lrnnx_nn.architectures.attenuate import load_attenuate
    from lrnnx_nn.architectures.autoencoder import Autoencoder, AutoencoderState
    from lrnnx_nn.architectures.language_config import LRNNLMConfig
    from lrnnx_nn.architectures.language_model import LanguageModelState, LRNNLMHeadModel
    from lrnnx_nn.architectures.latent import (
        AutoencoderConfig,
        Latent,
        LatentDecoder,
        LatentEncoder,
    )
    from lrnnx_nn.architectures.unet import UNet, UNetConfig, UNetState
    from lrnnx_nn.attention import Attention
    from lrnnx_nn.blocks import Block
    from lrnnx_nn.event_stage import EventPoolingBlock, EventStage
    from lrnnx_nn.gated import Gated
    from lrnnx_nn.generation import Generation, TextStreamer, fork, generate, rollout
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
    from lrnnx_nn.mlp import MLP, GatedMLP
    from lrnnx_nn.norms import BatchNorm
    from lrnnx_nn.optimizer_groups import param_groups
    from lrnnx_nn.resample import Downsample, Upsample
    from lrnnx_nn.residual import ResidualBlock
    from lrnnx_nn.stack import Mixer, Stack

__all__ = [
    "LAYERS", "LRU", "RGLRU", "S4", "S4D", "S5", "S7", "STREAM", "Centaurus", "EventSSM", "Layer",
    "Mamba", "Mamba2",
    "EventPooling", "EventPoolingBlock", "EventStage",
    "Attention", "BatchNorm", "Block", "Gated", "Mixer", "Stack", "param_groups",
    "Classifier", "ClassifierConfig", "Encoder", "EncoderConfig", "Regressor", "RegressorConfig",
    "StageConfig",
    "LRNNLMConfig", "LRNNLMHeadModel", "LanguageModelState",
    "Generation", "TextStreamer", "fork", "generate", "rollout",
    "MLP", "GatedMLP", "ResidualBlock",
    "UNet", "UNetConfig", "UNetState", "load_attenuate",
    "Autoencoder", "AutoencoderConfig", "AutoencoderState", "Latent", "LatentDecoder",
    "LatentEncoder", "Downsample", "Upsample",
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
    "lrnnx_nn.attention": ("Attention",),
    "lrnnx_nn.norms": ("BatchNorm",),
    "lrnnx_nn.blocks": ("Block",),
    "lrnnx_nn.gated": ("Gated",),
    "lrnnx_nn.generation": ("Generation", "TextStreamer", "fork", "generate", "rollout"),
    "lrnnx_nn.event_stage": ("EventPoolingBlock", "EventStage"),
    "lrnnx_nn.optimizer_groups": ("param_groups",),
    "lrnnx_nn.stack": ("Mixer", "Stack"),
    "lrnnx_nn.mlp": ("MLP", "GatedMLP"),
    "lrnnx_nn.residual": ("ResidualBlock",),
    "lrnnx_nn.resample": ("Downsample", "Upsample"),
    "lrnnx_nn.architectures.unet": ("UNet", "UNetConfig", "UNetState"),
    "lrnnx_nn.architectures.attenuate": ("load_attenuate",),
    "lrnnx_nn.architectures.autoencoder": ("Autoencoder", "AutoencoderState"),
    "lrnnx_nn.architectures.latent": (
        "AutoencoderConfig",
        "Latent",
        "LatentDecoder",
        "LatentEncoder",
    ),
    "lrnnx_nn.architectures.language_config": ("LRNNLMConfig",),
    "lrnnx_nn.architectures.language_model": ("LRNNLMHeadModel", "LanguageModelState"),
    "lrnnx_nn.architectures": (
        "Classifier",
        "ClassifierConfig",
        "Encoder",
        "EncoderConfig",
        "Regressor",
        "RegressorConfig",
        "StageConfig",
    ),
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
