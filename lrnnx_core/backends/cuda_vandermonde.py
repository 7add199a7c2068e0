# SPDX-License-Identifier: MIT
# pyright: basic
"""Sums of exponentials on CUDA: launches of cuda/vandermonde.cu.

The contract is that of `blocked_sums`. Rows and batch elements that share their nodes read them
from one place; every row is summed on its own.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_sums, cuda, cuda_tiles, library

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
LAYOUTS = {"forward": "3P6q", "moments": "4P7q"}
ENTRIES = {"forward": "vandermonde", "moments": "vandermonde_moments"}
SHORT, MIDDLE = 2048, 8192
"""Lengths up to which a tile is 32 or 64 lines of as many samples."""
ACROSS = {False: 16, True: 4}  # threads that the states of a moments block lie on, by `narrow`
REGISTERS = 128  # of a thread
UNROLL = 2  # steps of the innermost product
DEPTH = {torch.float32: 32, torch.float64: 16}
"""Steps whose tables a moments block has at a time, by the real dtype."""
PARTS = {True: 2, False: 1}


class Choice(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        step: "forward" or "moments".
        dtype: of v and z.
        side: lines of a tile, and samples of a line.
        narrow: whether there are few states: a moments block takes a quarter of the others' number.
    """

    step: str
    dtype: torch.dtype
    side: int
    narrow: bool = False

    @property
    def each(self) -> int:
        """Lines of a thread; in the forward as many samples of each."""
        single = self.dtype.to_real() == torch.float32
        return 8 if single and (self.side > 32 or self.step == "moments") else 4

    @property
    def threads(self) -> int:
        """Threads of a block."""
        lines = self.side // self.each
        return lines * (lines if self.step == "forward" else ACROSS[self.narrow])

    @property
    def states(self) -> int:
        """States of a moments block."""
        return ACROSS[self.narrow] * 4 // PARTS[self.dtype.is_complex]


def choose(step: str, dtype: torch.dtype, length: int, states: int) -> Choice:
    """Return what is compiled for a problem; what depends on it fixes the order of operations."""
    side = 32 if length <= SHORT else 64
    if dtype.to_real() == torch.float32 and length > MIDDLE:
        side = 128
    few = Choice(step, dtype, side, True).states
    return Choice(step, dtype, side, step == "moments" and states <= few)


@functools.cache
def kernel(x: Choice) -> cuda.Kernel:
    """Return a kernel."""
    definitions: dict[str, object] = {
        "DTYPE": cuda.NAMES[x.dtype],
        "SIDE": x.side,
        "EACH": x.each,
        "BLOCKS": max(1, min(8, 65536 // (REGISTERS * max(x.threads, cuda.WARP)))),
        "UNROLL": UNROLL,
        x.step.upper(): 1,
    }
    if x.step == "moments":
        definitions |= {"ACROSS": ACROSS[x.narrow], "DEPTH": DEPTH[x.dtype.to_real()]}
    return cuda.Kernel("vandermonde.cu", ENTRIES[x.step], definitions, LAYOUTS[x.step])


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels that the library's models launch; sums of tiles are the linear scan's."""
    C64, C128, F32 = torch.complex64, torch.complex128, torch.float32
    choices = [
        *(Choice(step, C64, side) for step in ENTRIES for side in (32, 64, 128)),
        Choice("moments", C64, 128, True),
        *(Choice(step, dtype, 64) for step in ENTRIES for dtype in (C128, F32)),
    ]
    return [kernel(choice) for choice in choices]


def tiles(x: Choice, length: int) -> tuple[int, int]:
    """Return the number of tiles of a row, and their lines; all but the last are equal."""
    lines = -(-length // x.side)
    number = -(-lines // x.side)
    return number, -(-lines // number)


def vandermonde(v: Tensor, z: Tensor, length: int) -> Tensor:
    """Leaf: K (*batch, R, H, length), real, as `blocked_sums.vandermonde`."""
    if not cuda.ready():
        return blocked_sums.vandermonde(v, z, length)
    device = _check("vandermonde", v, z, v.dtype)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return vandermonde(v, z, length)
    out = torch.empty((*v.shape[:-1], length), dtype=z.dtype.to_real(), device=z.device)
    if not out.numel() or not v.shape[-1]:
        return out.zero_()
    N = v.shape[-1]
    P, R, H = blocked_sums.merged(v.shape[:-1], z)
    v, z = v.contiguous(), z[blocked_sums.first_nodes(z, P, H)].contiguous()
    x = choose("forward", v.dtype, length, N)
    number, lines = tiles(x, length)
    kernel(x).launch(
        device, P * R * H * number, x.threads, 0,
        v.data_ptr(), z.data_ptr(), out.data_ptr(), R, H, N, length, number, lines,
    )  # fmt: skip
    return out


def vandermonde_moments(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Leaf: both moments, (*batch, R, H, N), as `blocked_sums.vandermonde_moments`."""
    if not cuda.ready():
        return blocked_sums.vandermonde_moments(g, z)
    device = _check("vandermonde_moments", g, z, z.dtype.to_real())
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return vandermonde_moments(g, z)
    length, N = g.shape[-1], z.shape[-1]
    shape = (*g.shape[:-1], N)
    if not math.prod(shape) or not length:
        return z.new_zeros(shape), z.new_zeros(shape)
    P, R, H = blocked_sums.merged(g.shape[:-1], z)
    g, z = g.contiguous(), z[blocked_sums.first_nodes(z, P, H)].contiguous()
    x = choose("moments", z.dtype, length, N)
    number, lines = tiles(x, length)
    chunks = -(-N // x.states)
    found = [torch.empty((number, *shape), dtype=z.dtype, device=z.device) for _ in range(2)]
    kernel(x).launch(
        device, P * R * H * number * chunks, x.threads, 0,
        g.data_ptr(), z.data_ptr(), *(t.data_ptr() for t in found),
        R, H, N, length, number, lines, chunks,
    )  # fmt: skip
    if number == 1:
        return found[0].view(shape), found[1].view(shape)
    sums = [torch.empty(shape, dtype=z.dtype, device=z.device) for _ in range(2)]
    for partial, total in zip(found, sums, strict=True):
        cuda_tiles.add_up(device, partial, total, number)
    return sums[0], sums[1]


def _check(operator: str, x: Tensor, z: Tensor, expected: torch.dtype) -> int:
    device = x.get_device()
    if z.dtype not in DTYPES:
        names = ", ".join(cuda.NAMES[dtype] for dtype in DTYPES)
        raise ValueError(f"{operator}: z has dtype {z.dtype} on CUDA, expected one of {names}")
    if z.get_device() != device:
        raise ValueError(f"{operator}: z is on {z.device}, the other tensor on {x.device}")
    if x.dtype != expected or (operator == "vandermonde" and x.dtype != z.dtype):
        raise ValueError(f"{operator}: {x.dtype} and z {z.dtype}, which do not fit together")
    return device


def implement() -> tuple[library.Implementation, ...]:
    """Register both operators for CUDA tensors; the handles keep them in force."""
    cuda.KERNELS["vandermonde"] = kernels
    return (
        library.implement("vandermonde", "cuda", vandermonde),
        library.implement("vandermonde_moments", "cuda", vandermonde_moments),
    )
