# SPDX-License-Identifier: MIT
"""One step of a Mamba block between its projections on CUDA: two kernels, cuda/mamba_step*.cu."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import cuda, donation, library
from lrnnx_core.backends.cuda_selective_step import partition

THREADS = 64  # of a block of the second kernel
BLOCKS = (12, 8)  # of it on a multiprocessor, at least, without and with a loop over states
FEW_BLOCKS = 6  # the same where a thread has one row: there are hardly more
ROWS = (4, 2)  # of the batch that a thread of it works on together, at most; the same
ROWS_BLOCKS = 8  # of it on a multiprocessor that there are then, at least
RANK_VECTOR = 4  # neighbours of r that a thread of it reads at a time, at most
RANK_HELD = (10, 4)  # such reads that a thread asks for ahead, at most, for one row and for several
MANY = 8  # rows of the batch from which on the first kernel runs on tensor cores
MANY_VECTOR = 8  # neighbouring channels of its threads, which with the next ones fixes its sums
MANY_SLICES, MANY_WARPS = 8, 12  # of the channels, of a block, at most
MANY_ROWS, MANY_TILES = 8, 6  # rows of the batch and, at most, 16s of outputs of a block
MANY_BLOCKS = 2.5  # on a multiprocessor: as few outputs a block as give no more
MANY_CAPABILITY = (9, 0)
MIXED_THREADS = 256  # of a block of the first kernel, at most
MIXED_ROWS, MIXED_OUTPUTS = 2, 16  # that a block of the first kernel has, at most
MOST_TAPS = 8
MOST_OF_A_ROW = 2**28  # numbers of a weight and of a row of the state
LAYOUT = "16P9qd"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def mixed_kernel(
    dtype: torch.dtype, taps: int, vector: int, outputs: int, rows: int
) -> cuda.Kernel:
    """Return the kernel of v, r, B and C.

    Args:
        dtype: of activations and weights.
        taps: of the convolution.
        vector: neighbouring channels of a thread.
        outputs: rows of x_proj of a block.
        rows: of the batch, of a block.
    """
    definitions = {
        "DTYPE": cuda.NAMES[dtype],
        "TAPS": taps,
        "VECTOR": vector,
        "OUTPUTS": outputs,
        "ROWS": rows,
    }
    return cuda.Kernel(
        "mamba_step_mixed.cu", "mamba_step_mixed", definitions, LAYOUT, overlaps=True
    )


@functools.cache
def many_kernel(
    taps: int, tiles: int, vector: int, warps: int, pieces: int, slices: int
) -> cuda.Kernel:
    """Return the kernel of v, r, B and C on tensor cores, in bfloat16.

    Args:
        taps: of the convolution.
        tiles: 16s of outputs of a block.
        vector: neighbouring channels of a thread.
        warps: of a block.
        pieces: of four times so many channels that a warp takes.
        slices: of the channels.
    """
    shared = _many_bytes(tiles, vector, warps, slices)
    definitions = {
        "DTYPE": cuda.NAMES[torch.bfloat16],
        "TAPS": taps,
        "TILES": tiles,
        "VECTOR": vector,
        "WARPS": warps,
        "PIECES": pieces,
        "SLICES": slices,
        "SHARED_BYTES": shared,
    }
    return cuda.Kernel(
        "mamba_step_many.cu", "mamba_step_many", definitions, LAYOUT, shared, overlaps=True
    )


def _many_bytes(tiles: int, vector: int, warps: int, slices: int) -> int:
    """Return the shared memory of a block: weights, sums of its warps and of slices, a barrier."""
    weights = 2 * tiles * cuda.WARP * warps * vector * torch.bfloat16.itemsize
    share = -(-MANY_ROWS * 16 * tiles // slices)
    sums = warps * MANY_ROWS * (16 * tiles + 4) + slices * share
    total = weights + sums * torch.float32.itemsize
    return -(-(total + 8) // 16) * 16


def kernel(
    dtype: torch.dtype,
    taps: int,
    scheme: str,
    split: bool,
    states: int,
    rank: int,
    rows: int,
) -> cuda.Kernel:
    """Return the kernel of the recurrence.

    Args:
        dtype: of activations and weights.
        taps: of the convolution.
        scheme: the discretization.
        split: whether decay and input may have different steps.
        states: N.
        rank: R.
        rows: of the batch that a thread works on together.
    """
    state = torch.promote_types(dtype, torch.float32)
    vector, lanes = partition(states, state)
    width = min(_width(rank, dtype), RANK_VECTOR)
    held = min(-(-rank // (width * lanes)), RANK_HELD[rows > 1])
    return _kernel(
        dtype, taps, scheme, split, vector, lanes, rows, width, held,
        rank if rank == held * width * lanes else 0, states == vector * lanes,
        states > vector * lanes,
    )  # fmt: skip


@functools.cache
def _kernel(
    dtype: torch.dtype,
    taps: int,
    scheme: str,
    split: bool,
    vector: int,
    lanes: int,
    rows: int,
    rank_vector: int,
    rank_held: int,
    rank: int,
    full: bool,
    loop: bool,
) -> cuda.Kernel:
    definitions = {
        "DTYPE": cuda.NAMES[dtype],
        "TAPS": taps,
        "SCHEME": scheme.upper(),
        "SPLIT": "true" if split else "false",
        "VECTOR": vector,
        "LANES": lanes,
        "ROWS": rows,
        "RANK_VECTOR": rank_vector,
        "RANK_HELD": rank_held,
        "FULL_RANK": rank,
        "FULL": "true" if full else "false",
        "LOOP": "true" if loop else "false",
        "THREADS": THREADS,
        "BLOCKS": BLOCKS[loop] if rows > 1 else FEW_BLOCKS,
    }
    return cuda.Kernel("mamba_step.cu", "mamba_step", definitions, LAYOUT, overlaps=True)


def _columns(rank: int, states: int, state: torch.dtype) -> tuple[int, int, int]:
    """Return where B and C begin in a row of what the first kernel makes, and its length."""
    unit = 16 // state.itemsize
    B_at = -(-rank // unit) * unit
    C_at = B_at + -(-states // unit) * unit
    return B_at, C_at, C_at + C_at - B_at


def _width(size: int, dtype: torch.dtype) -> int:
    """Return how many neighbours out of ``size`` go into 16 bytes and leave no rest."""
    vector = 16 // dtype.itemsize
    while size % vector:
        vector //= 2
    return vector


class First(NamedTuple):
    """The launch of the first kernel."""

    kernel: cuda.Kernel | None
    blocks: int
    threads: int
    shared: int
    tiles: int  # of outputs


def _first(
    dtype: torch.dtype, taps: int, batch: int, channels: int, outputs: int, device: int
) -> First:
    vector, busy = _width(channels, dtype), cuda.limits(device).multiprocessors
    if (
        dtype is torch.bfloat16
        and batch >= MANY
        and vector >= MANY_VECTOR
        and torch.cuda.get_device_capability(device) >= MANY_CAPABILITY
    ):
        return _many(taps, batch, channels, outputs, busy)
    threads = min(MIXED_THREADS, -(-channels // vector // cuda.WARP) * cuda.WARP)
    together, held = 1, 1
    while held < MIXED_OUTPUTS and batch * -(-outputs // (2 * held)) >= busy:
        held *= 2
    while together < MIXED_ROWS and -(-batch // (2 * together)) * -(-outputs // held) >= busy:
        together *= 2
    tiles = -(-outputs // held)
    chosen = mixed_kernel(dtype, taps, vector, held, together)
    return First(chosen, tiles * -(-batch // together), threads, 0, tiles)


def _many(taps: int, batch: int, channels: int, outputs: int, busy: int) -> First:
    chunks = -(-channels // (4 * MANY_VECTOR))  # a warp takes them one at a time
    warps = min(MANY_WARPS, -(-chunks // MANY_SLICES))
    pieces = -(-chunks // (MANY_SLICES * warps))
    slices = -(-chunks // (warps * pieces))
    blocks = slices * -(-batch // MANY_ROWS)
    count, tiles = -(-outputs // 16), 1
    while tiles < MANY_TILES and blocks * -(-count // tiles) > MANY_BLOCKS * busy:
        tiles += 1
    groups = -(-count // tiles)
    chosen = many_kernel(taps, -(-count // groups), MANY_VECTOR, warps, pieces, slices)
    return First(chosen, blocks * groups, cuda.WARP * warps, chosen.shared, groups)


class Shape(NamedTuple):
    """Everything of a launch that does not change while shapes and dtypes do not.

    Attributes:
        first: the launch of the first kernel, None where the formulas run in PyTorch.
        kernel: the second kernel.
        blocks: its grid.
        tiles: of channels.
        sizes: batch, channels, states, rank, columns of B and C, pitch.
    """

    first: First
    kernel: cuda.Kernel | None
    blocks: int
    tiles: int
    sizes: tuple[int, ...]


_NONE = Shape(First(None, 0, 0, 0, 0), None, 0, 0, ())


@functools.lru_cache(maxsize=4096)
def _shape(
    batch_shape: torch.Size,
    A_shape: torch.Size,
    rank: int,
    taps: int,
    narrow: tuple[torch.dtype | None, ...],
    wide: tuple[torch.dtype | None, ...],
    split: bool,
    normalized: bool,
    scheme: str,
    device: int,
) -> Shape:
    """Return the launch.

    Args:
        batch_shape: the batch axes.
        A_shape: (E, N).
        rank: R.
        taps: of the convolution.
        narrow: dtypes of what the kernels read as activations, those first; None if not given.
        wide: dtypes of A and the state.
        split: whether decay and input may have different steps.
        normalized: the argument.
        scheme: the argument.
        device: the index of the device.
    """
    dtype, (channels, states), batch = narrow[0], A_shape, math.prod(batch_shape)
    if dtype not in DTYPES or normalized or not 1 <= taps <= MOST_TAPS:
        return _NONE
    state = torch.promote_types(dtype, torch.float32)
    if any(d is not None and d is not dtype for d in narrow) or any(d is not state for d in wide):
        return _NONE
    if not (batch and channels and states and rank):
        return _NONE
    if channels * max(2 * MOST_TAPS, rank + 2 * states) > MOST_OF_A_ROW:
        return _NONE
    busy = cuda.limits(device).multiprocessors
    pieces, lanes = partition(states, state)
    rows, most = 1, min(ROWS[states > pieces * lanes], lanes)
    tiles = -(-channels // (THREADS // lanes))
    while rows < most and tiles * -(-batch // (2 * rows)) >= ROWS_BLOCKS * busy:
        rows *= 2
    sizes = (batch, channels, states, rank, *_columns(rank, states, state))
    return Shape(
        _first(dtype, taps, batch, channels, rank + 2 * states, device),
        kernel(dtype, taps, scheme, split, states, rank, rows),
        tiles * -(-batch // rows), tiles, sizes,
    )  # fmt: skip


def _ready(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor as the kernels read it: of this dtype, contiguous, at a multiple of 16."""
    if dtype is not None and t.dtype is not dtype:
        t = t.to(dtype)
    t = t.contiguous()
    return t.clone() if t.data_ptr() & 15 else t


def mamba_step(
    xz: Tensor,
    conv: Tensor,
    h: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    decay_dt: Tensor | None,
    timesteps: Tensor | None,
    dt_norm: Tensor | None,
    B_norm: Tensor | None,
    C_norm: Tensor | None,
    dt_scale: float,
    normalized: bool,
    state_only: bool,
    scheme: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.mamba_step`.

    Inner norms, weights of another dtype than the activations and more than eight taps run in
    PyTorch. While states are given away (`donation`), the new ones take their places.

    Raises:
        ValueError: a tensor on another device.
    """
    tensors = {
        "conv": conv, "h": h, "conv_weight": conv_weight, "conv_bias": conv_bias,
        "x_proj": x_proj, "dt_proj": dt_proj, "dt_bias": dt_bias, "A": A, "D": D,
        "decay_dt": decay_dt, "timesteps": timesteps,
    }  # fmt: skip
    device = xz.get_device()
    for name, t in tensors.items():
        if t is not None and t.get_device() != device:
            raise ValueError(f"mamba_step: {name} is on {t.device}, xz on {xz.device}")
    narrow = (
        xz.dtype, conv.dtype, conv_weight.dtype, None if conv_bias is None else conv_bias.dtype,
        x_proj.dtype, dt_proj.dtype,
    )  # fmt: skip
    split = decay_dt is not None or (timesteps is not None and state_only)
    call = _NONE
    if cuda.ready():
        call = _shape(
            xz.shape[:-1], A.shape, dt_proj.shape[1], conv_weight.shape[-1], narrow,
            (A.dtype, h.dtype), split, normalized, scheme, device,
        )  # fmt: skip
    first = call.first
    if first.kernel is None or call.kernel is None:
        return library.default("mamba_step")(
            xz, conv, h, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, decay_dt,
            timesteps, dt_norm, B_norm, C_norm, dt_scale, normalized, state_only, scheme,
        )  # fmt: skip
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return mamba_step(
                xz, conv, h, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, decay_dt,
                timesteps, dt_norm, B_norm, C_norm, dt_scale, normalized, state_only, scheme,
            )  # fmt: skip
    state = A.dtype
    y = xz.new_empty((*xz.shape[:-1], A.shape[0]))
    tail = donation.new_state(conv, conv.shape, xz.dtype)
    new = donation.new_state(h, h.shape, state)
    mixed = A.new_empty((call.sizes[0], call.sizes[-1]))
    # held until the launches: copies among them are freed with the last name
    held = (
        _ready(xz), _ready(conv), _ready(conv_weight),
        None if conv_bias is None else _ready(conv_bias), _ready(x_proj), _ready(dt_proj),
        _ready(dt_bias, state), _ready(A), _ready(D, state),
        None if decay_dt is None else _ready(decay_dt, state),
        None if timesteps is None else _ready(timesteps, state), _ready(h),
    )  # fmt: skip
    pointers = [0 if t is None else t.data_ptr() for t in held]
    pointers += [mixed.data_ptr(), y.data_ptr(), tail.data_ptr(), new.data_ptr()]
    sizes, rest = call.sizes, (int(state_only), dt_scale)
    first.kernel.launch(
        device, first.blocks, first.threads, first.shared, *pointers, *sizes, first.tiles, *rest
    )
    call.kernel.launch(device, call.blocks, THREADS, 0, *pointers, *sizes, call.tiles, *rest)
    return y, tail, new


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of the library's models: N = 16, rank 48, one row and many."""
    found: list[cuda.Kernel] = []
    for dtype, many in (
        (torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True),
        (torch.float32, False), (torch.float16, False), (torch.float64, False),
    ):  # fmt: skip
        tile = (MIXED_OUTPUTS, MIXED_ROWS) if many else (1, 1)
        found.append(mixed_kernel(dtype, 4, 16 // dtype.itemsize, *tile))
        found.append(kernel(dtype, 4, "mamba", False, 16, 48, 4 if many else 1))
    found.append(many_kernel(4, 1, MANY_VECTOR, 48 // MANY_VECTOR, 1, 8))  # to 64 rows
    found.append(many_kernel(4, 3, MANY_VECTOR, 48 // MANY_VECTOR, 1, 8))
    found.append(kernel(torch.bfloat16, 4, "mamba", True, 16, 48, 1))  # STREAM
    found.append(kernel(torch.bfloat16, 4, "zoh", False, 16, 48, 4))
    found.append(kernel(torch.bfloat16, 4, "mamba", False, 128, 48, 2))
    return found


cuda.KERNELS["mamba_step"] = kernels
