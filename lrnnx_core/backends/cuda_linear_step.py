# SPDX-License-Identifier: MIT
"""A linear map of few rows on CUDA: who computes it, and the shapes of cuda/linear_step.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrnnx_core.backends import cuda, cuda_linear_mma, cuda_linear_tile, donation
from lrnnx_core.backends.cuda_linear import Map, Shape
from lrnnx_core.backends.transforms import tf32_allowed

MOST_ROWS = 256  # of x; above, torch multiplies
FEW_ROWS = 4  # up to which linear_step.cu reads the weight once
THREADS = 128  # of a block, at least
UNROLL = 4  # pieces of a row of the weight that a thread asks for at a time
GROUPS = (8, 128)  # threads that share a row of the weight, at least and at most
OUTPUTS = 4  # rows of the weight that they work on together, at most
BUSY = (1024, 256)  # threads of a multiprocessor, enough for more outputs in each; > 2 rows of x
AT_ONCE = 8  # blocks of a multiprocessor; where there are more, asking ahead is slower
LAYOUT = "4P5q"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def partition(inputs: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return (neighbouring numbers of a thread, threads of a row); they fix the order of sums."""
    vector = 16 // dtype.itemsize
    while inputs % vector:
        vector //= 2
    group, most = GROUPS
    while group < most and group * UNROLL * vector < inputs:
        group *= 2
    return vector, group


@functools.cache
def kernel(
    dtype: torch.dtype,
    vector: int,
    group: int,
    outputs: int,
    rows: int,
    wide: bool,
    settled: bool = False,
) -> cuda.Kernel:
    """Return a kernel.

    Args:
        dtype: of everything.
        vector: neighbouring numbers of a thread.
        group: threads of a row of the weight.
        outputs: rows of the weight that they work on together.
        rows: of x, at most.
        wide: whether neighbours are loaded together.
        settled: whether the weight is asked for before the kernel ahead has ended.
    """
    definitions = {
        "DTYPE": cuda.NAMES[dtype],
        "VECTOR": vector,
        "GROUP": group,
        "OUTPUTS": outputs,
        "ROWS": rows,
        "UNROLL": UNROLL,
        "THREADS": max(THREADS, group),
        "WIDE": "true" if wide else "false",
        "SETTLED": "true" if settled else "false",
    }
    return cuda.Kernel("linear_step.cu", "linear_step", definitions, LAYOUT, overlaps=True)


@functools.lru_cache(maxsize=4096)
def _shape(
    rows: int,
    inputs: int,
    outputs: int,
    weight_strides: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    alignment: int,
    device: int,
    tf32: bool,
    settled: bool,
) -> Shape | None:
    """Return the launch, None where torch multiplies."""
    dtype, weight_row = dtypes[0], weight_strides[0]
    plain = weight_strides[1] == 1 or inputs == 1
    fits = 0 < rows <= MOST_ROWS and inputs > 0 and outputs > 0
    if not (fits and plain and dtype in DTYPES and all(d is dtype for d in dtypes)):
        return None
    x = Map(rows, inputs, outputs, weight_row, dtype, alignment, device, tf32, settled)
    if rows <= FEW_ROWS:
        return _few(x)
    return cuda_linear_tile.shape(x) or cuda_linear_mma.shape(x)


def _few(x: Map) -> Shape:
    """Return the launch of linear_step.cu."""
    vector, group = partition(x.inputs, x.dtype)
    wide = not x.alignment % (vector * x.dtype.itemsize) and not x.weight_row % vector
    held = 1
    while held < x.rows:
        held *= 2
    multiprocessors = max(cuda.limits(x.device).multiprocessors, 1)
    threads = x.outputs * group // multiprocessors
    together, busy = 1, BUSY[x.rows > 2]
    while together < OUTPUTS and together * held < 16 and threads >= 2 * together * busy:
        together *= 2
    block = max(THREADS, group)
    blocks = -(-x.outputs // (block // group * together))
    settled = x.settled and blocks <= AT_ONCE * multiprocessors
    call = kernel(x.dtype, vector, group, together, held, wide, settled)
    return Shape(call, blocks, block, 0, (x.rows, x.inputs, x.outputs, x.inputs, x.weight_row))


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y (..., outputs) = x W^T + b for x (..., inputs) and W (outputs, inputs).

    More than `MOST_ROWS` rows, and what no kernel reads, torch multiplies.

    Raises:
        ValueError: a tensor on another device.
    """
    device = x.get_device()
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.get_device() != device:
            raise ValueError(f"linear_step: {name} is on {t.device}, x on {x.device}")
    inputs = x.shape[-1]
    outputs, width = weight.shape
    rows = x.numel() // inputs if inputs else 0
    if rows > MOST_ROWS or width != inputs or not cuda.ready():
        return linear(x, weight, bias)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return linear_step(x, weight, bias)
    if bias is not None:
        bias = bias.contiguous()
    x = x.contiguous()
    at_x, at_weight = x.data_ptr(), weight.data_ptr()
    dtypes = (x.dtype, weight.dtype) if bias is None else (x.dtype, weight.dtype, bias.dtype)
    call = _shape(
        rows, inputs, outputs, weight.stride(), dtypes, (at_x | at_weight) & 15, device,
        rows > FEW_ROWS and tf32_allowed(), donation.settled(weight),
    )  # fmt: skip
    if call is None:
        return linear(x, weight, bias)
    y = x.new_empty((*x.shape[:-1], outputs))
    call.kernel.launch(
        device, call.blocks, call.threads, call.shared, at_x, at_weight,
        0 if bias is None else bias.data_ptr(), y.data_ptr(), *call.sizes,
    )  # fmt: skip
    return y


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of one and four rows for 768 and 1536 inputs, and a large vocabulary."""
    found: list[cuda.Kernel] = []
    for dtype, inputs, outputs, rows, settled in (
        (torch.bfloat16, 768, 1, 1, False), (torch.bfloat16, 1536, 1, 1, False),
        (torch.bfloat16, 768, 4, 1, False), (torch.bfloat16, 768, 2, 4, False),
        (torch.bfloat16, 1536, 1, 4, False), (torch.float32, 768, 1, 1, False),
        (torch.float16, 768, 1, 1, False), (torch.float64, 768, 1, 1, False),
        (torch.bfloat16, 768, 1, 1, True), (torch.bfloat16, 1536, 1, 1, True),
    ):  # fmt: skip
        vector, group = partition(inputs, dtype)
        found.append(kernel(dtype, vector, group, outputs, rows, True, settled))
    return found


cuda.KERNELS["linear_step"] = kernels
