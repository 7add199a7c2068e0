# SPDX-License-Identifier: MIT
# pyright: basic
"""The trilinear form on CUDA: launches of cuda/trilinear.cu, or a few large products of cuBLAS.

The kernels take float32, and axes that are multiples of four apart from the shortest one. Of the
two other axes one is summed in tiles; where the shortest is the output, both are. Where TF32 is
allowed and both are `LARGE`, cuBLAS is faster: it has the tensor cores' larger instructions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import cuda, cuda_tiles, library

WIDE, NARROW, OUTER = "wide", "narrow", "outer"
# Chosen by timing (benchmarks/cuda/NOTES.md).
TILE = {WIDE: (1, 4), NARROW: (1, 4), OUTER: (2, 4)}
"""Warps of a block over rows and columns of its tile, where both are filled."""
ROWS, COLUMNS = 64, 32  # of a tile that a warp has
DEPTHS = (32, 16)  # of a tile, the first that fits into shared memory
SUMMED = {3: 16, 1: 32}  # terms that tensor cores add up, which cut off, by passes
UNROLL = {WIDE: 2, NARROW: 2, OUTER: 1}  # such sums
STAGES = (4, 3, 2)
GROUPS = 4  # of the shortest axis, added up one by one
LEAST = 256  # samples of a run of the weight's gradient
LARGE = 256
COMPACT = torch.contiguous_format
LAYOUTS = {WIDE: "4P11q", NARROW: "4P11q", OUTER: "4P14q"}


class Choice(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        form: what is summed.
        passes: products on tensor cores for one of float32: 3, or 1 where TF32 is allowed.
        along: whether w's lines lie along the axis that is summed in tiles.
        down: warps of a block over rows of a tile, of 64.
        across: warps over columns, of 32.
    """

    form: str
    passes: int
    along: bool
    down: int
    across: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return cuda.WARP * self.down * self.across

    def shared(self, stages: int, depth: int) -> int:
        """Return the bytes of shared memory."""
        rows, columns = ROWS * self.down, COLUMNS * self.across
        if self.form == OUTER:
            return 4 * stages * depth * (rows + columns + 8 + 1)
        pitch = columns * (depth + 8) if self.along else depth * (columns + 4)
        return 4 * stages * (rows * (depth + 8) + pitch)


@functools.cache
def kernel(choice: Choice, limits: cuda.Limits) -> cuda.Kernel:
    """Return a kernel for a device."""
    blocks = max(1, 8 // (choice.down * choice.across))
    most = min(limits.shared_per_block, limits.shared // blocks - 1024) - 2048
    sizes = [(s, d) for d in DEPTHS for s in STAGES]
    stages, depth = next((x for x in sizes if choice.shared(*x) <= most), sizes[-1])
    definitions = {
        "DTYPE": "float32",
        choice.form.upper(): 1,
        "PASSES": choice.passes,
        "DEPTH": depth,
        "SUMMED": min(depth, SUMMED[choice.passes]),
        "UNROLL": UNROLL[choice.form],
        "WARPS_DOWN": choice.down,
        "WARPS_ACROSS": choice.across,
        "STAGES": stages,
        "BLOCKS": blocks,
    }
    if choice.form != OUTER:
        definitions["ALONG"] = "true" if choice.along else "false"
    entry = f"trilinear_{choice.form}"
    return cuda.Kernel(
        "trilinear.cu", entry, definitions, LAYOUTS[choice.form], choice.shared(stages, depth)
    )


def choose(form: str, along: bool, rows: int, columns: int) -> Choice:
    """Return what is compiled for a problem; nothing here depends on the number of samples.

    Args:
        form: what is summed.
        along: whether w's lines lie along the axis that is summed in tiles.
        rows: of a tile that there are, where these are not samples.
        columns: of a tile that there are.
    """
    passes = 1 if _tf32() else 3
    down, across = TILE[form]
    if 2 * columns <= across * COLUMNS:
        down, across = (down if form == OUTER else 2 * down), across // 2
    if form == OUTER and 2 * rows <= down * ROWS:
        down //= 2
    return Choice(form, passes, along, down, across)


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels that the library's models launch; those of TF32 compile at first use."""
    forms = ((WIDE, True), (WIDE, False), (NARROW, True), (OUTER, False))
    return [kernel(Choice(form, 3, along, *TILE[form]), limits) for form, along in forms]


def trilinear(w: Tensor, p: Tensor, q: Tensor, chunk_size: int) -> Tensor:
    """Leaf: w (*b, I, J, K), p (*b, T, J), q (*b, T, K) -> (*b, T, I)."""
    batch = p.shape[:-2]
    shared = all(n == 1 or s == 0 for n, s in zip(batch, w.stride(), strict=False))
    if batch and shared and p.numel():
        # one weight for all: its batch joins the samples
        w = w[(0,) * len(batch)]
        out = trilinear(w, p.flatten(0, len(batch)), q.flatten(0, len(batch)), chunk_size)
        return out.view(*batch, -1, w.shape[0])
    device = _check("trilinear", w, p, q)
    sizes = w.shape[-3:]
    shortest = min((2, 1, 0), key=lambda axis: sizes[axis])
    others = [axis for axis in range(3) if axis != shortest]
    if batch or not possible(w.dtype, sizes, others, p.shape[-2]):
        return library.default("trilinear")(w, p, q, chunk_size)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return trilinear(w, p, q, chunk_size)
    inputs = {1: p, 2: q}
    if shortest == 0:
        # the axis that is contiguous is summed in tiles
        a, c = sorted(others, key=lambda axis: w.stride(axis))
        form, x, y = NARROW, inputs[a], _rows(inputs[c])
    else:
        a, c = others[1], 0
        form, x, y = WIDE, inputs[a], inputs[shortest]
        y = y if y.stride(-1) == 1 else y.contiguous()
    x = _rows(x)
    w = w.permute(shortest, a, c)
    along = w.stride(1) == 1
    across = form == WIDE and w.stride(2) == 1
    line = w.stride(2 if along else 1)
    if not (along or across) or (line | w.stride(0)) % 4 or w.data_ptr() % 16:
        w, along = w.mT.clone(memory_format=COMPACT).mT, True
        line = w.stride(2)
    N, A, C = w.shape
    samples = p.shape[0]
    out = torch.empty(samples, sizes[0], dtype=w.dtype, device=w.device)
    choice, limits = choose(form, along, A, C), cuda.limits(device)
    tiles, to, groups, parts = -(-samples // (ROWS * choice.down)), out, 1, 1
    if form == WIDE:
        parts, each = -(-C // (COLUMNS * choice.across)), -(-N // GROUPS)
        if tiles * parts * 2 <= limits.multiprocessors:
            groups = -(-N // each)
            to = torch.empty(groups, *out.shape, dtype=w.dtype, device=w.device)
    else:
        each = -(-N // min(N, max(1, limits.multiprocessors // tiles)))
        parts = -(-N // each)
    found = kernel(choice, limits)
    found.launch(
        device, tiles * groups * parts, choice.threads, found.shared,
        w.data_ptr(), x.data_ptr(), y.data_ptr(), to.data_ptr(),
        samples, A, C, N, w.stride(0), line, x.stride(0), y.stride(0), parts, groups, each,
    )  # fmt: skip
    if groups > 1:
        cuda_tiles.add_up(device, to, out, groups)
    return out


def trilinear_outer(g: Tensor, p: Tensor, q: Tensor, chunk_size: int) -> Tensor:
    """Leaf: g (*b, T, I), p (*b, T, J), q (*b, T, K) -> sum of products over T, (*b, I, J, K)."""
    device = _check("trilinear_outer", g, p, q)
    parts = (g, p, q)
    sizes = [t.shape[-1] for t in parts]
    shortest = min((2, 1, 0), key=lambda axis: sizes[axis])
    a, c = (axis for axis in range(3) if axis != shortest)
    if g.ndim > 2 or not possible(g.dtype, sizes, [a, c], g.shape[-2]):
        return library.default("trilinear_outer")(g, p, q, chunk_size)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return trilinear_outer(g, p, q, chunk_size)
    samples, (N, A, C) = g.shape[0], (sizes[shortest], sizes[a], sizes[c])
    weight, x, y = parts[shortest], _rows(parts[a]), _rows(parts[c])
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    limits, choice = cuda.limits(device), choose(OUTER, False, A, C)
    down, across = -(-A // (ROWS * choice.down)), -(-C // (COLUMNS * choice.across))
    runs = max(1, min(limits.multiprocessors // (N * down * across), samples // LEAST))
    each = -(-samples // runs)
    each = -(-each // DEPTHS[0]) * DEPTHS[0]
    runs = -(-samples // each)
    out = torch.empty(sizes, dtype=g.dtype, device=g.device)
    partial = torch.empty((runs, *sizes), dtype=g.dtype, device=g.device) if runs > 1 else out
    found = kernel(choice, limits)
    found.launch(
        device, runs * N * down * across, choice.threads, found.shared,
        weight.data_ptr(), x.data_ptr(), y.data_ptr(), partial.data_ptr(),
        samples, A, C, N, weight.stride(0), x.stride(0), y.stride(0),
        *(out.stride(axis) for axis in (shortest, a, c)), down, across, each, out.numel(),
    )  # fmt: skip
    if runs > 1:
        cuda_tiles.add_up(device, partial, out, runs)
    return out


def possible(dtype: torch.dtype, sizes: Sequence[int], others: Sequence[int], samples: int) -> bool:
    """Return whether the kernels compute this; others: all axes but the shortest."""
    return (
        dtype == torch.float32
        and samples > 0
        and min(sizes) > 0
        and not any(sizes[axis] % 4 for axis in others)
        and not (_tf32() and min(sizes[axis] for axis in others) >= LARGE)
        and cuda.ready()
    )


def _tf32() -> bool:
    """Return whether cuBLAS may take TF32; other ways to ask raise where this one was set."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _rows(x: Tensor) -> Tensor:
    """Return x (T, .) with aligned rows."""
    aligned = x.stride(1) == 1 and x.stride(0) % 4 == 0 and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=COMPACT)


def _check(operator: str, first: Tensor, *others: Tensor) -> int:
    device = first.get_device()
    for other in others:
        if other.get_device() != device:
            raise ValueError(
                f"{operator}: tensors on {first.device} and {other.device}, expected one device"
            )
    return device


def implement() -> tuple[library.Implementation, ...]:
    """Register both operators for CUDA tensors; the handles keep them in force."""
    cuda.KERNELS["trilinear"] = kernels
    return (
        library.implement("trilinear", "cuda", trilinear),
        library.implement("trilinear_outer", "cuda", trilinear_outer),
    )
