# SPDX-License-Identifier: MIT
"""Whole networks made of blocks, one frozen config dataclass each."""

from lrnnx_nn.architectures.attenuate import load_attenuate
from lrnnx_nn.architectures.autoencoder import Autoencoder, AutoencoderState
from lrnnx_nn.architectures.classifier import Classifier, ClassifierConfig
from lrnnx_nn.architectures.encoder import Encoder, EncoderConfig
from lrnnx_nn.architectures.language_config import LRNNLMConfig
from lrnnx_nn.architectures.language_model import LanguageModelState, LRNNLMHeadModel
from lrnnx_nn.architectures.latent import (
    AutoencoderConfig,
    Latent,
    LatentDecoder,
    LatentEncoder,
)
from lrnnx_nn.architectures.regressor import Regressor, RegressorConfig
from lrnnx_nn.architectures.stages import StageConfig
from lrnnx_nn.architectures.unet import UNet, UNetConfig, UNetState

__all__ = [
    "Classifier", "ClassifierConfig", "Encoder", "EncoderConfig", "Regressor", "RegressorConfig",
    "UNet", "UNetConfig", "UNetState", "load_attenuate",
    "Autoencoder", "AutoencoderConfig", "AutoencoderState", "Latent", "LatentDecoder",
    "LatentEncoder",
    "StageConfig", "LRNNLMConfig", "LRNNLMHeadModel", "LanguageModelState",
]  # fmt: skip
