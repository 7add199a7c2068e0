# SPDX-License-Identifier: MIT
"""Whole networks made of blocks, one frozen config dataclass each."""

from lrnnx_nn.architectures.classifier import Classifier, ClassifierConfig

__all__ = ["Classifier", "ClassifierConfig"]
