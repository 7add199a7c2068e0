# SPDX-License-Identifier: MIT
"""The selective scan's leaf operators on CUDA.

The contract is that of `blocked_selective`. Where a row is long and alone cannot fill the chip,
time is cut into segments: what each makes of the state before it, a linear scan over these, and
then all segments at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import (
    blocked_selective,
    cuda,
    cuda_linear_scan,
    cuda_selective_step,
    cuda_tiles,
    library,
)
from lrnnx_core.backends.blocked_selective import CHUNK, Arguments, Gradients
from lrnnx_core.backends.cuda_selective import (
    Choice,
    Problem,
    aligned,
    kernel,
    kernels,
    shared_bytes,
)


def _check(operator: str, u: Tensor, *others: object) -> int:
    device = u.get_device()
    for other in others:
        if isinstance(other, Tensor) and other.get_device() != device:
            raise ValueError(f"{operator}: tensors on {u.device} and on {other.device}")
    return device


def selective_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf: y, the last state, and the states before every chunk, as `blocked_selective`."""
    a, keep = Arguments(*arguments[:-1]), arguments[-1]
    u = a.u
    if not cuda.ready() or not _fits(a):
        return blocked_selective.selective_scan(*arguments)
    device = _check("selective_scan", *a)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return selective_scan(*arguments)
    if u.shape[-2] == 1 and not keep:
        y, last = cuda_selective_step.selective_step(*a)
        return y, last, u.new_empty((*u.shape[:-2], 0), dtype=last.dtype)
    p = Problem(a)
    chunks = -(-p.length // CHUNK) if keep else 0
    last = torch.empty((*p.batch, p.width, p.states), dtype=p.state, device=u.device)
    kept = torch.empty((*p.batch, chunks * p.width * p.states), dtype=p.state, device=u.device)
    segments = p.segments(device)
    h0 = p.h0 if segments[1] == 1 else _between(p, segments, p.h0, device)
    ys = []
    for first, states in p.slices():
        x = p.choice("forward", states, segments[1], device)
        y = torch.empty(u.shape, dtype=p.dtype, device=u.device)
        offset = first * p.state.itemsize
        _launch(
            p, x, device, segments, p.inputs(first, states, _parts(p, x), segments, h0),
            y.data_ptr(), last.data_ptr() + offset, kept.data_ptr() + offset if keep else 0,
        )  # fmt: skip
        ys.append(y)
    y = ys[0] if len(ys) == 1 else torch.stack(ys).sum(0)
    return y.to(u.dtype), last, kept


def _parts(p: Problem, x: Choice) -> int:
    """Return the blocks of a piece."""
    return -(-p.piece // x.channels)


def _launch(
    p: Problem, x: Choice, device: int, segments: tuple[int, int], inputs: list[int], *rest: int
) -> None:
    blocks = p.rows * segments[1] * (p.width // p.piece) * _parts(p, x)
    kernel(x).launch(device, blocks, cuda.WARP * x.warps, shared_bytes(x), *inputs, *rest)


def _between(
    p: Problem,
    segments: tuple[int, int],
    edge: Tensor | None,
    device: int,
    adjoint: bool = False,
) -> Tensor:
    """Return the state before every segment, or the adjoint after it: (rows, segments, E, N).

    Args:
        p: the arguments.
        segments: (steps, number).
        edge: h0, or the gradient of the last state.
        device: its index.
        adjoint: which of them.
    """
    shape = (p.rows, segments[1], p.width * p.states)
    product, end = (torch.empty(shape, dtype=p.state, device=p.A.device) for _ in range(2))
    for first, states in p.slices():
        x = p.choice("ends", states, segments[1], device, adjoint)
        offset = first * p.state.itemsize
        _launch(
            p, x, device, segments,
            p.inputs(first, states, _parts(p, x), segments, None, adjoint),
            product.data_ptr() + offset, end.data_ptr() + offset,
        )  # fmt: skip
    edge = end.new_zeros(p.rows, 1, shape[2]) if edge is None else edge.reshape(p.rows, 1, shape[2])
    after, _ = cuda_linear_scan.linear_scan(product, end, edge.squeeze(1), None, adjoint)
    parts = (after[:, 1:], edge) if adjoint else (edge, after[:, :-1])
    return torch.cat(parts, 1)


def selective_scan_backward(
    checkpoints: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    *arguments: Any,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Leaf: all gradients, as `blocked_selective.selective_scan_backward`.

    Beyond the leaf's arguments: ``into``, two halves of the channels of a contiguous tensor. The
    gradient of z is written to the second, that of dt to the first or wherever it is returned.
    """
    a = Arguments(*arguments)
    u = a.u
    if not cuda.ready() or not _fits(a):
        gradients = blocked_selective.selective_scan_backward(checkpoints, grad_y, grad_last, *a)
        return _moved(gradients, into)
    device = _check("selective_scan_backward", u, checkpoints, grad_y, grad_last, *a[1:])
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return selective_scan_backward(checkpoints, grad_y, grad_last, *a, into=into)
    p = Problem(a, gy=grad_y)
    asked = into
    if p.z is None or p.dtype != u.dtype or len(p.slices()) > 1:
        into = None  # not as the kernel writes it
    segments = p.segments(device)
    grad_last, kept = aligned(grad_last.to(p.state)), aligned(checkpoints)
    if segments[1] > 1:
        grad_last = _between(p, segments, grad_last, device, adjoint=True)
    shape = (p.rows, p.width, p.states)
    dA = torch.empty((p.rows * segments[1], *shape[1:]), dtype=p.state, device=u.device)
    dh0 = torch.empty(shape, dtype=p.state, device=u.device)
    results = [
        _backward(p, n, states, segments, kept, grad_last, dA, dh0, device, into)
        for n, states in p.slices()
    ]
    return _moved(_gathered(p, results, dA, dh0, a), asked)


def _moved(
    gradients: tuple[Tensor | None, ...], into: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, ...]:
    """Copy the gradient of z to where it is asked for, if it is not there."""
    g = gradients[6]
    if into is None or g is None or g.data_ptr() == into[1].data_ptr():
        return gradients
    return *gradients[:6], into[1].copy_(g), *gradients[7:]


def _backward(
    p: Problem,
    first: int,
    states: int,
    segments: tuple[int, int],
    kept: Tensor,
    grad_last: Tensor,
    dA: Tensor,
    dh0: Tensor,
    device: int,
    into: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor | None]:
    """Launch the backward for some of the states, which have their place in dA and dh0."""
    x = p.choice("backward", states, segments[1], device)
    parts = _parts(p, x)
    blocks, pieces_of_time = p.width // p.piece * parts, p.rows * segments[1]

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=p.A.device)

    def like_u(there: bool) -> Tensor | None:
        return empty(p.rows, p.length, p.width, dtype=p.dtype) if there else None

    def of_matrix(varies: bool) -> Tensor:
        shape = (blocks, p.rows, p.length) if varies else (pieces_of_time, p.width)
        return empty(*shape, states, dtype=p.state)

    def of_channel(there: bool) -> Tensor | None:
        return empty(pieces_of_time, p.width, dtype=p.real) if there else None

    ddt, dz, gap = like_u(into is None), like_u(into is None and p.z is not None), 0
    if into is not None:
        (ddt, dz), gap = into, into[0].stride(-2) - p.width
    found = {
        "u": like_u(True), "dt": ddt, "z": dz,
        "decay": like_u(p.decay == 2), "B": of_matrix(x.b_varies), "C": of_matrix(x.c_varies),
        "A": dA, "h0": dh0,
        "D": of_channel(p.D is not None and not first), "dt_bias": of_channel(p.bias is not None),
        "own": of_channel(p.decay == 1),
        "timesteps": empty(blocks, p.rows, p.length, 1, dtype=p.real) if p.timed else None,
    }  # fmt: skip
    offset = first * p.state.itemsize
    gy = p.gy
    if gy is None:
        raise RuntimeError("selective_scan_backward: no gradient of y")
    _launch(
        p, x, device, segments, p.inputs(first, states, parts, segments, None),
        gy.data_ptr(), *p.places["gy"], gy.stride(-2), gy.stride(-1),
        grad_last.data_ptr() + offset, kept.data_ptr() + offset,
        *(
            0 if t is None else t.data_ptr() + (offset if n in ("A", "h0") else 0)
            for n, t in found.items()
        ),
        gap,
    )  # fmt: skip
    return found


def _gathered(
    p: Problem,
    results: list[dict[str, Tensor | None]],
    dA: Tensor,
    dh0: Tensor,
    inputs: Arguments,
) -> tuple[Tensor | None, ...]:
    """Sum what the blocks, the batch elements and the launches left, and shape it."""
    done: list[Tensor | None] = []
    for name in Gradients._fields:
        like = getattr(inputs, name)
        if name == "h0":
            done.append(dh0.reshape(*p.batch, p.width, p.states))
            continue
        if not isinstance(like, Tensor):
            done.append(None)
            continue
        if name == "A":
            g = dA
        elif name in ("B", "C") and not p.varies(like):
            g = _joined(results, name).unflatten(0, (p.rows, -1)).sum(1)
        elif name in ("B", "C"):
            groups = like.shape[-2]
            parts = [r[name] for r in results]
            g = torch.cat([_per_group(p, t, groups) for t in parts if t is not None], -1)
        else:
            g = _summed(results, {"decay_dt": "own" if p.decay == 1 else "decay"}.get(name, name))
            if name == "decay_dt" and p.decay == 1:
                g = g.unflatten(0, (p.rows, -1)).sum(1)
        if name in ("A", "D", "dt_bias"):
            rest = g.shape[1:]
            g = g.reshape(p.shared_rows, -1, *rest)
            g = g.squeeze(1) if g.shape[1] == 1 else g.sum(1)
        elif name in ("B", "C") and not p.varies(like):
            g = g.unflatten(-2, (like.shape[-2], -1)).sum(-2)
        elif name == "timesteps":
            blocks, g = g, torch.empty(g.shape[1:], dtype=p.real, device=g.device)
            cuda_tiles.add_up(g.get_device(), blocks, g, len(blocks))
        if g.is_complex() and not like.is_complex():
            g = g.real
        done.append(g.to(like.dtype).reshape(like.shape))
    return tuple(done)


def _per_group(p: Problem, t: Tensor, groups: int) -> Tensor:
    """Sum (blocks, rows, L, N) over the blocks of each group: (rows, L, groups, N).

    In an order that depends on the number of blocks alone.
    """
    tiles = t.shape[0] // groups
    out = p.dtype if not p.state.is_complex else p.state
    if tiles == 1:
        return t.movedim(0, 2).to(out)
    found = torch.empty((groups, *t.shape[1:]), dtype=out, device=t.device)
    for group in range(groups):
        cuda_tiles.add_up(t.get_device(), t[group * tiles], found[group], tiles)
    return found.movedim(0, 2)


def _joined(results: list[dict[str, Tensor | None]], name: str) -> Tensor:
    """Join the launches' states."""
    parts = [t for r in results if (t := r[name]) is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _summed(results: list[dict[str, Tensor | None]], name: str) -> Tensor:
    """Sum over the launches."""
    parts = [t for r in results if (t := r[name]) is not None]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _fits(a: Arguments) -> bool:
    """Return whether the kernels take such a size."""
    return a.u.numel() > 0 and a.A.numel() > 0


def implement() -> tuple[library.Implementation, ...]:
    """Register both operators for CUDA tensors; the handles keep them in force."""
    cuda.KERNELS["selective_scan"] = kernels

    def backward(kept: Tensor, gy: Tensor, glast: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        gradients = selective_scan_backward(kept, gy, glast, *arguments)
        return tuple(gy.new_empty(0) if g is None else g for g in gradients)

    return (
        library.implement("selective_scan", "cuda", selective_scan),
        library.implement("selective_scan_backward", "cuda", backward),
    )
