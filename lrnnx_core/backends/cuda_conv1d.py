# SPDX-License-Identifier: MIT
"""The short convolution's leaf operators on CUDA: shapes, strides, launches of its kernels."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_conv1d, cuda, library
from lrnnx_core.backends.reference import state_dtype

MOST_TAPS = 8
SUM_WARPS = 8
MOST_TILES = 1024  # partial sums of a parameter
LARGEST = 2**31 - 1
SEGMENTS = (128, 64, 32, 16)  # steps that a thread walks: the longest which fill the device
MOST_INNER = 256  # of a product that the backward makes: 128 KiB of shared memory
INNER_CHUNK = 32  # numbers of its inner axis that are multiplied at once
TILE_STEPS, TILE_CHANNELS = 16, 128  # of it that a warp has at once
GAP = 8  # numbers between steps in shared memory
PRODUCT_PACK = 4  # neighbouring channels of a thread where there is a product
INNER_PACK = 8  # numbers of its inner axis that are read at once
LISTED_INNER = (96,)  # of Mamba of width 528 to 1024 with 16 states
CAPABILITY = (8, 0)  # whose tensor cores multiply bfloat16
SEQUENCE, TAIL, PARAMETER, BITS, SIZE = "P3q", "P2q", "Pq", "P3q", "11q"
FACTOR = "P3q"
LAYOUTS = {
    "forward": SEQUENCE + TAIL + PARAMETER * 2 + BITS + "2P" + SIZE,
    "backward": SEQUENCE * 3 + FACTOR + TAIL * 2 + PARAMETER * 2 + BITS + SEQUENCE + "2P" + SIZE,
    "sum": "3P3q",
}
NAMES = {d: cuda.NAMES[d] for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


STATES = {dtype: state_dtype(dtype) for dtype in NAMES}
Strides = tuple[int, ...]


class Tuning(NamedTuple):
    """The shape of a launch, which changes the sums of the parameters' gradients and nothing else.

    Attributes:
        threads: of a block, at most.
        columns: packs of channels that a block spans, at most.
        blocks: that a multiprocessor must have registers for.
        unroll: steps whose inputs a thread asks for at once.
        pack: channels of a thread, at most, for up to four taps; half of it for more.
        resident: threads a multiprocessor that a launch should have at least.
        ahead: whether inputs are asked for while those before are computed.
        rounded: whether a product is rounded to the dtype where it waits to be added.
    """

    threads: int
    columns: int
    blocks: int
    unroll: int
    pack: int
    resident: int
    ahead: bool = False
    rounded: bool = False


FORWARD = Tuning(256, 256, 2, 4, 8, 1024)
# By the bytes of a number: with one gradient of y, and with two.
BACKWARD = {
    2: (Tuning(128, 32, 3, 4, 4, 512, True), Tuning(128, 32, 3, 4, 4, 512, True)),
    4: (Tuning(128, 32, 3, 2, 4, 512, True), Tuning(128, 32, 3, 1, 4, 512, True)),
    8: (Tuning(128, 32, 3, 2, 4, 512), Tuning(128, 32, 3, 1, 4, 512)),
}
PRODUCT = Tuning(128, 32, 3, 4, 4, 512, True)  # with a product beside the gradient of y, 2 bytes


def tuning_of(step: str, size: int, second: bool = False, inner: int = 0) -> Tuning:
    """Return the shape of a step's launches for numbers of so many bytes."""
    if step == "forward":
        return FORWARD
    return PRODUCT if inner else BACKWARD[size][second]


@functools.cache
def kernel(
    step: str,
    dtype: torch.dtype,
    weight: torch.dtype,
    taps: int,
    silu: bool,
    pack: int,
    tuning: Tuning,
    second: bool = False,
    inner: int = 0,
) -> cuda.Kernel:
    """Return a kernel.

    Args:
        step: "forward" or "backward".
        dtype: of the sequences.
        weight: dtype of the weight and the bias.
        taps: K.
        silu: whether it is the activation.
        pack: neighbouring channels that a thread computes.
        tuning: see `Tuning`.
        second: whether the backward adds a second gradient to that of y.
        inner: the length, in whole chunks, of the inner axis of a product that it adds; 0 for none.
    """
    definitions = {
        "DTYPE": NAMES[dtype],
        "WEIGHT": NAMES[weight],
        "TAPS": taps,
        "SILU": "true" if silu else "false",
        "PACK": pack,
        "THREADS": tuning.threads,
        "BLOCKS": tuning.blocks,
        "UNROLL": tuning.unroll,
        step.upper(): 1,
    }
    if step == "backward":
        definitions["AHEAD"] = "true" if tuning.ahead else "false"
        definitions["SECOND"] = "true" if second else "false"
        definitions["INNER"] = inner
    shared = 0
    if inner:
        definitions["KEPT"] = NAMES[dtype if tuning.rounded else STATES[dtype]]
        shared = product_bytes(inner, tuning.threads // cuda.WARP, tuning.rounded)
    entry = "causal_conv1d" if step == "forward" else "causal_conv1d_backward"
    return cuda.Kernel("causal_conv1d.cu", entry, definitions, LAYOUTS[step], shared=shared)


def product_bytes(inner: int, warps: int, rounded: bool) -> int:
    """Return the shared memory of a block that makes a product, as in cuda/thin_product.cuh."""
    step = 2 * (inner + GAP) + (2 if rounded else 4) * (TILE_CHANNELS + GAP)
    return 2 * inner * TILE_CHANNELS + warps * TILE_STEPS * step


@functools.cache
def _sum(weight: torch.dtype, state: torch.dtype, taps: int) -> cuda.Kernel:
    definitions = {
        "DTYPE": NAMES[state], "WEIGHT": NAMES[weight], "TAPS": taps, "WARPS": SUM_WARPS, "SUM": 1,
    }  # fmt: skip
    return cuda.Kernel("causal_conv1d.cu", "causal_conv1d_sum", definitions, LAYOUTS["sum"])


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of the models' convolutions, four taps wide, on aligned tensors."""
    found: list[cuda.Kernel] = []

    def add(
        step: str, weight: torch.dtype, silu: bool = True, second: bool = False, inner: int = 0
    ) -> None:
        tuning = tuning_of(step, dtype.itemsize, second, inner)
        pack = _most(tuning, dtype, 4)
        found.append(kernel(step, dtype, weight, 4, silu, pack, tuning, second, inner))

    for dtype in NAMES:
        state = STATES[dtype]
        weights = (dtype,) if dtype == torch.float16 else dict.fromkeys((dtype, state))
        for step, weight in itertools.product(("forward", "backward"), weights):
            add(step, weight)
        if dtype in (torch.float32, torch.bfloat16):
            add("forward", dtype, silu=False)  # RG-LRU's
            add("backward", dtype, silu=False)
            add("backward", dtype, second=True)  # Mamba's
        if dtype == torch.bfloat16:
            for inner in LISTED_INNER:
                if _has_room(tuning_of("backward", 2, inner=inner), inner, limits):
                    add("backward", dtype, inner=inner)  # the same with its product
        found.append(_sum(dtype, state, 4))
    return found


def _has_room(tuning: Tuning, inner: int, limits: cuda.Limits) -> bool:
    """Return whether a block's product fits beside its partial sums."""
    sums = tuning.pack * tuning.threads * 4
    bytes_ = product_bytes(inner, tuning.threads // cuda.WARP, tuning.rounded)
    return bytes_ + sums <= limits.shared_per_block


def _most(tuning: Tuning, dtype: torch.dtype, taps: int) -> int:
    """Return how many neighbouring channels a thread computes where alignment allows it."""
    return min(16 // dtype.itemsize, tuning.pack if taps <= 4 else tuning.pack // 2)


class Shape(NamedTuple):
    """Everything of a launch that does not change while shapes and strides do not.

    Attributes:
        kernel: what is launched.
        blocks: the grid.
        threads: of a block.
        sequences: (group, row, time) strides.
        tail: (group, row) strides of all tails, which are contiguous.
        parameters: the group strides of weight and bias.
        reset: its (group, row, time) strides.
        groups: of batch elements, each with a weight of its own.
        tiles: partial sums of a group.
        factor: (group, row) strides of a product's second factor, and their inner axis.
        sizes: the last fields of the arguments, without wide.
    """

    kernel: cuda.Kernel
    blocks: int
    threads: int
    sequences: tuple[Strides, ...]
    tail: tuple[int, int]
    parameters: tuple[int, int]
    reset: Strides
    groups: int
    tiles: int
    factor: tuple[int, int, int]
    sizes: Strides


@functools.lru_cache(maxsize=4096)
def _shape(
    step: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    shape: torch.Size,
    weight_shape: torch.Size,
    sequences: tuple[Strides, ...],
    weight: Strides,
    bias: Strides | None,
    reset: Strides | None,
    silu: bool,
    alignment: int,
    device: int,
    factor: tuple[torch.Size, Strides] | None = None,
) -> Shape | None:
    """Return the launch, None where a tensor must be made compact first, or a product.

    Args:
        step: "forward" or "backward".
        dtype: of the sequences.
        weight_dtype: of weight and bias.
        shape: of x.
        weight_shape: that of the weight.
        sequences: strides of x; backward of grad_y, what is added to it, x and dx.
        weight: its strides.
        bias: its strides.
        reset: its strides.
        silu: whether it is the activation.
        alignment: the bits of all addresses of sequences and tails below 16.
        device: its index.
        factor: the shape and strides of a product's second factor; the first one has the place of
            what is added to grad_y.
    """
    *batch, length, channels = shape
    shared, taps, size = len(weight_shape) - 3, weight_shape[-1], dtype.itemsize
    rows = [_rows(s, batch, shared, channels) for s in sequences]
    flags = (0, 0) if reset is None else _rows(reset, batch, shared)
    own = [_group(weight, weight_shape, shared), 0]
    if bias is not None:
        own[1] = _group(bias, weight_shape[:-2], shared)
    if None in (*rows, *own, flags) or alignment % size:
        return None
    times = [s[-2] if length > 1 else 0 for s in sequences]
    strides = tuple((*r, t) for r, t in zip(rows, times, strict=True) if r is not None)
    inner, product = 0, (0, 0, 0)
    if factor is not None:
        found = _factor(*factor, shared, strides[1])
        if found is None:
            return None
        inner, product = -(-found[-1] // INNER_CHUNK) * INNER_CHUNK, found
    second = len(sequences) == 4 and not inner
    tuning = tuning_of(step, size, second, inner)
    together = math.gcd(channels, *(x for s in (*strides, product[:2]) for x in s))
    pack = math.gcd(_most(tuning, dtype, taps), together, (alignment or 16) // size)
    limits = cuda.limits(device)
    if inner and (pack < PRODUCT_PACK or not _has_room(tuning, inner, limits)):
        return None
    groups, rows_of_group = math.prod(batch[:shared]), math.prod(batch[shared:])
    blocks, threads, tiles, sizes = _launch(
        step, tuning, groups, rows_of_group, length, channels // pack, limits, whole=inner > 0
    )
    entries = (taps - 1) * channels
    return Shape(
        kernel(step, dtype, weight_dtype, taps, silu, pack, tuning, second, inner),
        blocks, threads, strides, (rows_of_group * entries, entries), (own[0] or 0, own[1] or 0),
        (0, 0, 0) if reset is None else (*(flags or ()), reset[-1]),
        groups, tiles, product, (length, channels, *sizes),
    )  # fmt: skip


def _factor(
    shape: torch.Size, strides: Strides, shared: int, first: Strides
) -> tuple[int, int, int] | None:
    """Return the (group, row) strides of a product's second factor and its inner axis.

    None where the kernel cannot read it or, by its strides, the first factor.
    """
    inner = shape[-2]
    group = _merged(shape[:shared], strides[:shared])
    if group is None or strides[-1] != 1 or not 0 < inner <= MOST_INNER:
        return None
    if any(n % INNER_PACK for n in (inner, *first)):
        return None
    return group, strides[-2], inner


def _merged(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the stride of all dimensions read as one, None where that has none."""
    whole, step = 1, 0
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if whole == 1:
            step = stride
        elif stride != whole * step:
            return None
        whole *= size
    return step


def _rows(
    strides: Strides, batch: Sequence[int], shared: int, channels: int = 1
) -> tuple[int, int] | None:
    """Return the strides of groups and of their rows; None unless channels are neighbours."""
    group = _merged(batch[:shared], strides[:shared])
    row = _merged(batch[shared:], strides[shared : len(batch)])
    if group is None or row is None or (channels > 1 and strides[-1] != 1):
        return None
    return group, row


def _group(strides: Strides, shape: Sequence[int], shared: int) -> int | None:
    """Return the stride of a parameter's groups; None unless each is contiguous."""
    whole = 1
    for size, stride in zip(reversed(shape[shared:]), reversed(strides[shared:]), strict=True):
        if size > 1 and stride != whole:
            return None
        whole *= size
    return _merged(shape[:shared], strides[:shared])


def _launch(
    step: str,
    tuning: Tuning,
    groups: int,
    rows: int,
    length: int,
    packs: int,
    limits: cuda.Limits,
    whole: bool = False,
) -> tuple[int, int, int, Strides]:
    """Return blocks, threads, tiles of a group, and (rows, segment, ..., span) of the arguments.

    With ``whole`` a row of a block is a warp.
    """
    segment = next(
        (
            s
            for s in SEGMENTS
            if groups * rows * -(-length // s) * packs >= limits.multiprocessors * tuning.resident
        ),
        SEGMENTS[-1],
    )
    segments = -(-length // segment)
    items = rows * segments * (groups if step == "forward" else 1)
    threads = tuning.threads
    while True:
        column_blocks = -(-packs // (cuda.WARP if whole else min(tuning.columns, threads)))
        columns = cuda.WARP if whole else -(-packs // column_blocks)
        seats = min(threads // columns, items)  # rows of a block
        span = 1 if step == "forward" else -(-items // (seats * MOST_TILES))
        tiles = -(-items // (seats * span))
        blocks = column_blocks * tiles * (1 if step == "forward" else groups)
        if blocks >= limits.multiprocessors or threads <= 2 * cuda.WARP:
            break
        threads //= 2
    sizes = (rows, segment, segments, columns, column_blocks, items, tiles, span)
    return blocks, columns * seats, tiles, sizes


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Leaf: y (*batch, L, C) and the new tail, as `blocked_conv1d.causal_conv1d`."""
    if not _fits(x, weight):
        return blocked_conv1d.causal_conv1d(x, weight, bias, tail, reset, silu)
    device = _check("causal_conv1d", x, weight=weight, bias=bias, tail=tail, reset=reset)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return causal_conv1d(x, weight, bias, tail, reset, silu)
    weight, bias = _parameters(x, weight, bias)
    shape, taps = x.shape, weight.shape[-1]
    tail = None if tail is None or taps == 1 else tail.contiguous()
    at_x = x.data_ptr()
    at_tail = 0 if tail is None else tail.data_ptr()
    call = _shape(
        "forward", x.dtype, weight.dtype, shape, weight.shape, (x.stride(),), weight.stride(),
        None if bias is None else bias.stride(), None if reset is None else reset.stride(),
        silu, (at_x | at_tail) & 15, device,
    )  # fmt: skip
    if call is None:
        x, weight, bias, tail, reset = _compact(x, weight, bias, tail, reset)
        return causal_conv1d(x, weight, bias, tail, reset, silu)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    last = torch.empty((*shape[:-2], taps - 1, shape[-1]), dtype=x.dtype, device=x.device)
    call.kernel.launch(
        device, call.blocks, call.threads, 0,
        at_x, *call.sequences[0],
        at_tail, *call.tail,
        *_pointers(call, weight, bias),
        0 if reset is None else reset.data_ptr(), *call.reset,
        y.data_ptr(), last.data_ptr(),
        *call.sizes, _wide(call, weight),
    )  # fmt: skip
    return y, last


def causal_conv1d_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    reset: Tensor | None,
    silu: bool,
    more: Tensor | None = None,
    dx: Tensor | None = None,
    product: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaf: (dx, dweight, dbias, dtail), as `blocked_conv1d.causal_conv1d_backward`.

    Beyond the leaf's arguments: ``more``, like y, is added to grad_y, or in its place the
    ``product`` of (*batch, L, inner) and (*groups, inner, E), of x's dtype; the gradient is written
    to ``dx``, like x, some channels of a contiguous tensor.

    Raises:
        ValueError: more and product are given.
    """
    given = (grad_y, grad_last, x, weight, bias, tail, reset)
    if product is not None and more is not None:
        raise ValueError("causal_conv1d_backward: more and product are given, one can be added")
    if product is not None and not _multiplies(x, weight, product):
        more, product = multiply(*product), None
    if (
        not _fits(x, weight)
        or not grad_y.dtype == grad_last.dtype == x.dtype
        or (more is not None and more.dtype != x.dtype)
    ):
        given = given if more is None else (grad_y + more, *given[1:])
        found, *rest = blocked_conv1d.causal_conv1d_backward(*given, silu)
        return found if dx is None else dx.copy_(found), rest[0], rest[1], rest[2]
    device = _check(
        "causal_conv1d_backward", x, weight=weight, bias=bias, tail=tail, reset=reset,
        grad_y=grad_y, grad_last=grad_last, more=more,
        **dict(zip(("product", "factor"), product or (), strict=False)),
    )  # fmt: skip
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return causal_conv1d_backward(*given, silu, more, dx, product)
    w, b = _parameters(x, weight, bias)
    shape, taps = x.shape, weight.shape[-1]
    before = None if tail is None or taps == 1 else tail.contiguous()
    grad_last = grad_last.contiguous()
    at_g, at_x, at_last = grad_y.data_ptr(), x.data_ptr(), grad_last.data_ptr()
    at_tail = 0 if before is None else before.data_ptr()
    to = torch.empty(shape, dtype=x.dtype, device=x.device) if dx is None else dx
    added, factor = (more, None) if product is None else product
    at_dx, at_more = to.data_ptr(), 0 if added is None else added.data_ptr()
    at_factor = 0 if factor is None else factor.data_ptr()
    sequences = [t.stride() for t in (grad_y, added, x, to) if t is not None]
    call = _shape(
        "backward", x.dtype, w.dtype, shape, w.shape, tuple(sequences), w.stride(),
        None if b is None else b.stride(), None if reset is None else reset.stride(),
        silu, (at_g | at_more | at_x | at_last | at_tail | at_dx | at_factor) & 15, device,
        None if factor is None else (factor.shape, factor.stride()),
    )  # fmt: skip
    if call is None and product is not None:
        return causal_conv1d_backward(*given, silu, multiply(*product), dx)
    if call is None:
        grad_y, _, grad_last, more = _compact(grad_y, weight, grad_last, more)
        x, weight, bias, tail, reset = _compact(x, weight, bias, tail, reset)
        given = (grad_y, grad_last, x, weight, bias, tail, reset)
        return causal_conv1d_backward(*given, silu, more, dx)
    dtail = x.new_empty(0 if tail is None else tail.shape)
    dweight = torch.empty(w.shape, dtype=w.dtype, device=x.device)
    dbias = x.new_empty(0) if b is None else torch.empty(b.shape, dtype=b.dtype, device=x.device)
    channels, state = shape[-1], STATES[x.dtype]
    numbers = (taps + 1) * channels
    partial = torch.empty(call.groups * call.tiles * numbers, dtype=state, device=x.device)
    call.kernel.launch(
        device, call.blocks, call.threads, call.kernel.shared,
        at_g, *call.sequences[0],
        at_more, *(call.sequences[1] if at_more else (0, 0, 0)),
        at_x, *call.sequences[-2],
        at_factor, *call.factor,
        at_last, *call.tail,
        at_tail, *call.tail,
        *_pointers(call, w, b),
        0 if reset is None else reset.data_ptr(), *call.reset,
        at_dx, *call.sequences[-1],
        0 if tail is None else dtail.data_ptr(), partial.data_ptr(),
        *call.sizes, _wide(call, w),
    )  # fmt: skip
    blocks = -(-numbers // cuda.WARP)
    _sum(w.dtype, state, taps).launch(
        device, call.groups * blocks, cuda.WARP * SUM_WARPS, 0,
        partial.data_ptr(), dweight.data_ptr(), 0 if b is None else dbias.data_ptr(),
        call.tiles, channels, blocks,
    )  # fmt: skip
    dbias = dbias if bias is None else dbias.to(bias.dtype)
    return to, dweight.to(weight.dtype), dbias, dtail


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of (*groups, ..., L, inner) and (*groups, inner, E)."""
    rows = left.reshape(*right.shape[:-2], -1, left.shape[-1])
    return (rows @ right).reshape(*left.shape[:-1], right.shape[-1])


def _multiplies(x: Tensor, weight: Tensor, product: tuple[Tensor, Tensor]) -> bool:
    """Return whether the backward makes this product itself, strides aside."""
    left, right = product
    return (
        _fits(x, weight)
        and x.dtype == left.dtype == right.dtype
        and x.itemsize == 2
        and left.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(x.device) >= CAPABILITY
    )


def _pointers(call: Shape, weight: Tensor, bias: Tensor | None) -> tuple[int, int, int, int]:
    at_bias = 0 if bias is None else bias.data_ptr()
    return weight.data_ptr(), call.parameters[0], at_bias, call.parameters[1]


def _wide(call: Shape, weight: Tensor) -> bool:
    """Return whether the weight can be read 16 bytes at a time."""
    return (weight.data_ptr() | call.parameters[0] * weight.itemsize) % 16 == 0


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels compute this (or refuse it); plain PyTorch does the rest."""
    if not cuda.ready() or weight.shape[-1] > MOST_TAPS or x.numel() == 0:
        return False
    if x.numel() > LARGEST and x.numel() // x.shape[-1] // SEGMENTS[-1] > LARGEST:
        return False  # more segments than the kernels count
    state = STATES.get(x.dtype)
    return state is None or torch.promote_types(state, weight.dtype) == state


def _check(operator: str, x: Tensor, **others: Tensor | None) -> int:
    if x.dtype not in NAMES:
        raise ValueError(
            f"{operator}: dtype {x.dtype} on CUDA, expected one of {', '.join(NAMES.values())}"
        )
    device = x.get_device()
    for name, other in others.items():
        if other is not None and other.get_device() != device:
            raise ValueError(f"{operator}: {name} is on {other.device} and x on {x.device}")
    return device


def _parameters(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Bring weight and bias to one dtype: x's if both have it, else that of the state."""
    dtype = weight.dtype
    if (bias is None and dtype == x.dtype) or (bias is not None and bias.dtype == dtype == x.dtype):
        return weight, bias
    state = STATES[x.dtype]
    return weight.to(state), None if bias is None else bias.to(state)


def _compact(x: Tensor, weight: Tensor, *others: Tensor | None) -> list[Any]:
    """Copy what the kernels cannot read as it lies; x is a sequence, weight tells the groups."""
    shared, size = weight.ndim - 3, x.itemsize
    as_is = _rows(x.stride(), x.shape[:-2], shared, x.shape[-1]) is not None
    if not as_is or x.data_ptr() % size:
        x = x.clone(memory_format=torch.contiguous_format)
    rest = [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in others]
    return [x, weight.contiguous(), *rest]


def implement() -> tuple[library.Implementation, ...]:
    """Register both operators for CUDA tensors; the handles keep them in force."""
    cuda.KERNELS["causal_conv1d"] = kernels
    return (
        library.implement("causal_conv1d", "cuda", causal_conv1d),
        library.implement("causal_conv1d_backward", "cuda", causal_conv1d_backward),
    )
