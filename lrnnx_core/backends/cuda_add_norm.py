# SPDX-License-Identifier: MIT
# pyright: basic
"""The residual sum with its norm on CUDA: launches of cuda/add_norm.cu."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import cuda, cuda_tiles, library, norm_formulas
from lrnnx_core.backends.reference import state_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ITEMS = {"forward": 8, "backward": 4}  # groups of neighbours that a thread holds, at most
BLOCK = {"forward": 4, "backward": 8}  # warps of a block whose rows take fewer
MOST_WARPS = 32
FEW = 4  # rows a multiprocessor in a forward up to which a warp has one group of each lane
RESIDENT = 2  # blocks of a multiprocessor that walk over the rows of a backward
LAYOUTS = {"forward": "7P3q2d", "backward": "8P4qd"}


class Choice(NamedTuple):
    """What a kernel is compiled for; see the source.

    Attributes:
        step: "forward" or "backward".
        stream: dtype of x, the sum and dx.
        branch: dtype of what is added.
        out: dtype of the normalized sum.
        weight: dtype of weight and bias.
        affine: how many of these there are.
        layer: whether the mean is subtracted.
        aligned: whether groups of neighbours lie aligned.
        warps: that share a row.
        items: groups of neighbours that a thread holds.
    """

    step: str
    stream: torch.dtype
    branch: torch.dtype
    out: torch.dtype
    weight: torch.dtype
    affine: int
    layer: bool
    aligned: bool
    warps: int
    items: int

    @property
    def teams(self) -> int:
        """How many rows a block takes at a time."""
        return max(BLOCK[self.step] // self.warps, 1)


@functools.cache
def kernel(x: Choice) -> cuda.Kernel:
    """Return the kernel."""
    threads, overlaps = cuda.WARP * x.warps * x.teams, x.step == "forward"
    definitions = {
        "DTYPE": cuda.NAMES[x.stream], "BRANCH": cuda.NAMES[x.branch], "OUT": cuda.NAMES[x.out],
        "WEIGHT": cuda.NAMES[x.weight], "AFFINE": x.affine, "LAYER": int(x.layer),
        "ALIGNED": int(x.aligned), "WIDTH": width(x.stream), "WARPS": x.warps, "TEAMS": x.teams,
        "ITEMS": x.items, "SPREAD": int(overlaps and x.items == 1 < x.warps),
        "BLOCKS": RESIDENT if threads <= 256 else 1, x.step.upper(): 1,
    }  # fmt: skip
    entry = "add_norm" if x.step == "forward" else "add_norm_backward"
    return cuda.Kernel("add_norm.cu", entry, definitions, LAYOUTS[x.step], overlaps=overlaps)


def width(stream: torch.dtype) -> int:
    """Return the neighbours of a group: 16 bytes of the stream, at least four."""
    return max(16 // stream.itemsize, 4)


def share(step: str, stream: torch.dtype, layer: bool, channels: int) -> tuple[int, int] | None:
    """Return the warps of a row and the groups of a thread, None where a row is too long."""
    most = ITEMS[step] // (2 if width(stream) * state_dtype(stream).itemsize > 16 else 1)
    if layer and step == "backward":
        most = max(most // 2, 1)  # sums of a bias are in registers too
    groups = -(-channels // (width(stream) * cuda.WARP))
    warps = -(-groups // most)
    if warps > 1:
        warps = 1 << (warps - 1).bit_length()  # one of few kernels
    return (warps, -(-groups // warps)) if warps <= MOST_WARPS else None


def spread(warps: int, items: int, rows: int, multiprocessors: int) -> tuple[int, int]:
    """Return the share of a forward: few rows that take a warp each get one for each group.

    Both give the same bits; other shares are a function of the dtype and the length alone.
    """
    few = warps == 1 and rows <= FEW * multiprocessors
    return (items, 1) if few else (warps, items)


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of the pre-norm models' usual dtypes, 1024 wide."""
    wide, narrow, double = torch.float32, torch.bfloat16, torch.float64
    kinds = [(wide, narrow, narrow, narrow), (wide,) * 4, (narrow,) * 4, (double,) * 4]
    found: list[cuda.Kernel] = []
    for stream, branch, out, weight in kinds:
        for step in ITEMS:
            for layer in (False, True):
                shared = share(step, stream, layer, 1024) or (1, 1)
                dtypes = (stream, branch, out, weight)
                found.append(kernel(Choice(step, *dtypes, 1 + layer, layer, True, *shared)))
    for out in (wide, narrow):  # a step of Mamba, 768 wide
        shared = spread(*(share("forward", wide, False, 768) or (1, 1)), 1, limits.multiprocessors)
        found.append(kernel(Choice("forward", wide, out, out, out, 1, False, True, *shared)))
    return found


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf: the sum, what it is normalized to, and its statistics, as `norm_formulas.add_norm`."""
    others = (branch, weight, bias)
    shared = _share("forward", layer, x, *others, dtype=dtype)
    if shared is None or (weight is None and bias is not None):
        return norm_formulas.add_norm(x, branch, weight, bias, eps, layer, dtype)
    device = _check("add_norm", x, *others)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return add_norm(x, branch, weight, bias, eps, layer, dtype)
    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    w, b = _parameters(x, weight, bias)
    total = x.new_empty(0 if branch is None else x.shape)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    state = state_dtype(x.dtype)
    stats = torch.empty((*x.shape[:-1], 1 + layer), dtype=state, device=x.device)
    channels = x.shape[-1]
    rows = x.numel() // channels
    groups = 1 if w is None else w.numel() // channels
    found = Choice(
        "forward", x.dtype, x.dtype if branch is None else branch.dtype, dtype,
        x.dtype if w is None else w.dtype, (w is not None) + (b is not None), layer,
        _vector(x, branch, w, b), *spread(*shared, rows, cuda.limits(device).multiprocessors),
    )  # fmt: skip
    kernel(found).launch(
        device, -(-rows // found.teams), cuda.WARP * found.warps * found.teams, 0,
        x.data_ptr(), _at(branch), _at(w), _at(b), _at(None if branch is None else total),
        out.data_ptr(), stats.data_ptr(), channels, rows // groups, rows, 1 / channels, eps,
    )  # fmt: skip
    return total, out, stats


def add_norm_backward(
    grad_sum: Tensor | None,
    grad_out: Tensor,
    total: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer: bool,
    branch: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaf: (dx, dbranch, dweight, dbias), as `norm_formulas.add_norm_backward`."""
    others = (grad_out, weight, bias, grad_sum, stats)
    shared = _share("backward", layer, total, *others, dtype=branch)
    if shared is None or (weight is None and bias is not None):
        return norm_formulas.add_norm_backward(
            grad_sum, grad_out, total, stats, weight, bias, layer, branch
        )
    device = _check("add_norm_backward", total, *others)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return add_norm_backward(grad_sum, grad_out, total, stats, weight, bias, layer, branch)
    grad_sum = None if grad_sum is None else grad_sum.to(total.dtype).contiguous()
    total, g, stats = total.contiguous(), grad_out.contiguous(), stats.contiguous()
    w, b = _parameters(total, weight, bias)
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    dbranch = total.new_empty(0 if branch == total.dtype else total.shape, dtype=branch)
    channels = total.shape[-1]
    groups = 1 if w is None else w.numel() // channels
    each = total.numel() // channels // groups
    affine = (w is not None) + (b is not None)
    found = Choice(
        "backward", total.dtype, branch, g.dtype, total.dtype if w is None else w.dtype, affine,
        layer, _vector(total, grad_sum, g, w, b), *shared,
    )  # fmt: skip
    most = cuda.limits(device).multiprocessors * RESIDENT
    blocks = min(-(-each // found.teams), -(-most // groups))
    state = state_dtype(total.dtype)
    partial = torch.empty(blocks * affine * groups * channels, dtype=state, device=total.device)
    kernel(found).launch(
        device, groups * blocks, cuda.WARP * found.warps * found.teams, 0,
        _at(grad_sum), g.data_ptr(), total.data_ptr(), stats.data_ptr(), _at(w), dx.data_ptr(),
        dbranch.data_ptr() if dbranch.numel() else 0, partial.data_ptr(),
        channels, each, groups, blocks, 1 / channels,
    )  # fmt: skip
    none = total.new_empty(0)
    if w is None or weight is None:
        return dx, dbranch, none, none
    kind = w.dtype if state_dtype(w.dtype) == state else state
    grads = torch.empty((affine, *weight.shape), dtype=kind, device=total.device)
    cuda_tiles.add_up(device, partial, grads, blocks)
    if bias is None:
        return dx, dbranch, grads.squeeze(0).to(weight.dtype), none
    dweight, dbias = grads.to(weight.dtype).unbind(0)
    return dx, dbranch, dweight, dbias.to(bias.dtype).clone()


def _share(
    step: str, layer: bool, x: Tensor, *others: Tensor | None, dtype: torch.dtype
) -> tuple[int, int] | None:
    """Return `share` if the kernels take such tensors."""
    if not cuda.ready() or x.numel() == 0 or x.dtype not in DTYPES or dtype not in DTYPES:
        return None
    state = state_dtype(x.dtype)
    kinds = {dtype, *(t.dtype for t in others if t is not None)}
    if any(kind not in DTYPES or torch.promote_types(kind, state) != state for kind in kinds):
        return None
    if state == torch.float64 and any(kind.itemsize < 4 for kind in kinds):
        return None  # no rounding from float64 to two bytes
    return share(step, x.dtype, layer, x.shape[-1])


def _check(operator: str, x: Tensor, *others: Tensor | None) -> int:
    device = x.get_device()
    for other in others:
        if other is not None and other.get_device() != device:
            raise ValueError(f"{operator}: tensors on {x.device} and on {other.device}")
    return device


def _parameters(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Bring weight and bias to one dtype, compact."""
    if weight is None:
        return None, None
    if bias is not None and bias.dtype != weight.dtype:
        state = state_dtype(x.dtype)
        weight, bias = weight.to(state), bias.to(state)
    return weight.contiguous(), None if bias is None else bias.contiguous()


def _vector(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether groups of neighbours lie aligned; fresh tensors begin at 16 bytes."""
    given = [t for t in (x, *others) if t is not None]
    return x.shape[-1] % width(x.dtype) == 0 and all(t.data_ptr() % 16 == 0 for t in given)


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def implement() -> tuple[library.Implementation, ...]:
    """Register both operators for CUDA tensors; the handles keep them in force."""
    cuda.KERNELS["add_norm"] = kernels
    return (
        library.implement("add_norm", "cuda", add_norm),
        library.implement("add_norm_backward", "cuda", add_norm_backward),
    )
