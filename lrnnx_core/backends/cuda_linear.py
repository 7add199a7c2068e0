# SPDX-License-Identifier: MIT
"""A linear map as its kernels are asked for it, and the launch with which one answers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lrnnx_core.backends import cuda


class Map(NamedTuple):
    """y = x W^T, of one dtype and not empty; x is compact, a row of W has neighbours.

    Attributes:
        rows: of x.
        inputs: of a row of x and of the weight.
        outputs: rows of the weight.
        weight_row: from one to the next, in elements.
        dtype: of everything.
        alignment: what the addresses of x and the weight leave, divided by 16.
        device: the index of the device.
        tf32: whether torch's product may be one in TF32.
        settled: whether no kernel in flight writes the weight.
    """

    rows: int
    inputs: int
    outputs: int
    weight_row: int
    dtype: torch.dtype
    alignment: int
    device: int
    tf32: bool
    settled: bool


class Shape(NamedTuple):
    """The launch for a `Map`.

    Attributes:
        kernel: what is launched.
        blocks: of the grid.
        threads: of a block.
        shared: dynamic shared memory of a block, in bytes.
        sizes: the arguments behind the addresses of x, the weight, the bias and y.
    """

    kernel: cuda.Kernel
    blocks: int
    threads: int
    shared: int
    sizes: tuple[int, ...]
