# SPDX-License-Identifier: MIT
"""Labelled sequences of their own lengths: sets that ship with aeon, `.ts` and `.npz` files."""

from lrnnx_nn.data.dataset import Dataset, Sequences, statistics, stratified_split
from lrnnx_nn.data.sources import bundled_names, load_dataset

__all__ = [
    "Dataset",
    "Sequences",
    "bundled_names",
    "load_dataset",
    "statistics",
    "stratified_split",
]
