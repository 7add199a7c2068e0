# SPDX-License-Identifier: MIT
# pyright: basic
"""The selective scan's leaf operators on the CPU; the contract is that of `blocked_selective`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrnnx_core.backends import blocked_selective
from lrnnx_core.backends.blocked_selective import Arguments, Gradients
from lrnnx_core.backends.cpu import pool, selective_backward, selective_forward, selective_step
from lrnnx_core.backends.cpu.pointers import ONES, rows
from lrnnx_core.backends.cpu.selective_coefficients import (
    FIELDS,
    LANES,
    SIZES,
    TENSORS,
)
from lrnnx_core.backends.cpu.selective_schemes import SCHEMES

WIDEST = 128  # channels of a block
FEW = 16  # items that a call is cut into where its blocks can be narrower
NARROWEST = 32
MANY = 64  # items of the backward; with less, blocks of a row are apart
CACHE = 2048  # numbers of a plane
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
NANOSECONDS = {torch.float32: 0.4, torch.float64: 1.0}  # of a state's step, one thread


class _Problem:
    """The arguments as the kernels' table."""

    def __init__(self, x: Arguments) -> None:
        u, A, B, C = x.u, x.A, x.B, x.C
        dtype = torch.float32
        for t in x[:11]:  # all but reset
            if t is not None:
                dtype = torch.promote_types(dtype, t.dtype)
        self.complex = dtype.is_complex
        self.dtype = dtype = dtype.to_real() if dtype.is_complex else dtype
        self.one = ONES[dtype]
        self.kind = COMPLEX[dtype] if self.complex else dtype
        self.batch, shared = u.shape[:-2], A.ndim - 2
        self.P, self.R = math.prod(self.batch[:shared]), math.prod(self.batch[shared:])
        (self.L, self.E), self.N = u.shape[-2:], A.shape[-1]
        self.M = 2 * self.N if self.complex else self.N
        self.table = np.zeros(FIELDS * len(TENSORS) + len(SIZES), np.int64)
        self.alive: list[Tensor] = []
        self.scheme = SCHEMES[x.scheme]
        self.groups = B.shape[-2], C.shape[-2]
        self._blocks()
        self.sequence("u", u)
        self.sequence("dt", x.dt)
        self.sequence("z", x.z)
        self.sequence("decay_dt", x.decay_dt)
        self.number("timesteps", None if x.timesteps is None else x.timesteps.to(dtype))
        self.number("reset", x.reset)
        self.matrix("B", B)
        self.matrix("C", C)
        self.state("A", A, self.P, 1)
        self.state("h0", x.h0, self.P, self.R)
        self.parameter("D", x.D)
        self.parameter("dt_bias", x.dt_bias)
        self.sizes(
            itemsize=dtype.itemsize, inner=self.R, length=self.L, width=self.E, states=self.N,
            chunk=blocked_selective.CHUNK, groups_B=self.groups[0], groups_C=self.groups[1],
            softplus=int(x.softplus), state_only=int(x.state_only),
            B_varies=int(B.shape[-3] == self.L), C_varies=int(C.shape[-3] == self.L),
            pulse=int(x.scheme == "dirac"),
        )  # fmt: skip

    def _blocks(self) -> None:
        """Cut the channels into blocks; none spans two groups of B or C unless these are narrow."""
        self.piece = math.gcd(*(self.E // g for g in self.groups))
        self.wide = self.piece < self.E and self.piece % LANES != 0 and self.piece < NARROWEST
        if self.wide:
            self.piece = self.E
        pieces = self.P * self.R * (self.E // self.piece)
        widest = max(min(WIDEST, CACHE // self.M // LANES * LANES), NARROWEST)
        while widest > NARROWEST and pieces * -(-self.piece // widest) < FEW:
            widest //= 2
        self.per_piece = -(-self.piece // widest)
        self.block = -(-self.piece // (self.per_piece * LANES)) * LANES
        self.per_piece = -(-self.piece // self.block)
        self.sizes(piece=self.piece, blocks=self.per_piece, block=self.block)

    def sizes(self, **values: int) -> None:
        for name, value in values.items():
            self.table[FIELDS * len(TENSORS) + SIZES.index(name)] = value

    def put(self, name: str, t: Tensor, strides: tuple[int, ...]) -> None:
        """Enter a tensor, with strides in its elements."""
        self.alive.append(t)
        at, size = FIELDS * TENSORS.index(name), t.element_size()
        self.table[at] = t.data_ptr()
        self.table[at + 1 : at + 1 + len(strides)] = [s * size for s in strides]

    def sequence(self, name: str, t: Tensor | None) -> None:
        """Enter (*batch, L or 1, E)."""
        if t is None:
            return
        length = t.shape[-2]
        x, (address, p, r, time) = rows(t, self.dtype, self.P, self.R, length, self.E)
        self.alive.append(x)
        at = FIELDS * TENSORS.index(name)
        self.table[at : at + 4] = address, p, r, time if length == self.L else 0

    def number(self, name: str, t: Tensor | None) -> None:
        """Enter (*batch, L)."""
        if t is not None:
            x = t.detach().reshape(self.P, self.R, self.L)
            self.put(name, x, x.stride())

    def pairs(self, t: Tensor) -> Tensor:
        """Return t in the dtype of states, as real numbers."""
        t = t.detach().to(self.kind).resolve_conj().resolve_neg()
        return torch.view_as_real(t) if self.complex else t.unsqueeze(-1)

    def matrix(self, name: str, t: Tensor) -> None:
        """Enter (*batch, L or 1, G, N)."""
        x = self.pairs(t).reshape(self.P, self.R, *t.shape[-3:], -1)
        p, r, time, group, state, _ = x.stride()
        self.put(name, x, (p, r, time if t.shape[-3] == self.L else 0, group, state))

    def state(self, name: str, t: Tensor | None, P: int, R: int) -> None:
        """Enter (*batch or *shared, E, N)."""
        if t is not None:
            x = self.pairs(t).reshape(P, R, self.E, self.N, -1)
            p, r, channel, state, _ = x.stride()
            self.put(name, x, (p, r if R > 1 else 0, 0, channel, state))

    def parameter(self, name: str, t: Tensor | None) -> None:
        """Enter (*shared, E)."""
        if t is not None:
            self.put(name, t.detach().to(self.dtype).contiguous(), (self.E,))

    def output(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an empty (P R, *shape) that the kernel writes, entered by its row."""
        x = torch.empty((self.P * self.R, *shape), dtype=dtype or self.dtype)
        numbers = math.prod(shape) * (2 if x.is_complex() else 1)
        real = torch.view_as_real(x) if x.is_complex() else x
        strides = [numbers // math.prod(shape[:i]) for i in range(min(len(shape), 3))]
        self.put(name, real, (self.R * numbers, *strides))
        return x

    def run(self, kernel: Any, items: int, lines: int, planes: int, cost: float) -> None:
        """Run a kernel whose workers have so many rows and planes of a block to themselves."""
        states = self.P * self.R * self.L * self.E * self.N
        workers = pool.workers(items, states * cost * NANOSECONDS[self.dtype] * COSTS[self.kind])
        step = (lines + planes * self.M) * self.block * self.dtype.itemsize
        memory = torch.empty(workers * step, dtype=torch.uint8)
        self.sizes(scratch=memory.data_ptr(), scratch_step=step)
        pool.run(kernel, workers, items, self.table.ctypes.data, self.one)


COSTS = {torch.float32: 1, torch.float64: 1, torch.complex64: 4, torch.complex128: 4}


def _default(x: Arguments) -> bool:
    """Return whether there is nothing to compute with."""
    return not x.u.numel() or not x.A.numel()


def selective_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf: y, the last state, and the states before every chunk."""
    x, keep = Arguments(*arguments[:-1]), arguments[-1]
    u = x.u
    if _default(x):
        return blocked_selective.selective_scan(*arguments)
    if u.shape[-2] == 1 and not keep:
        found = selective_step.selective_step(*x)
        if found is not None:
            return found
    p = _Problem(x)
    y = p.output("y", p.L, p.E)
    last = p.output("last", p.E, p.N, dtype=p.kind)
    chunks = -(-p.L // blocked_selective.CHUNK) if keep else 0
    if keep:
        kept = p.output("kept", chunks, p.E, p.N, dtype=p.kind)
    else:
        kept = last.new_empty(0)
    items = p.P * p.R * (p.E // p.piece) * p.per_piece
    kernel = selective_forward.kernel(p.scheme, p.wide, p.complex)
    p.run(kernel, items, selective_forward.LINES, selective_forward.PLANES, 1.0)
    kind = _state_dtype(u, x.A)
    return (
        y.to(u.dtype).reshape(u.shape),
        last.to(kind).reshape(*p.batch, p.E, p.N),
        kept.to(kind).reshape(*p.batch, chunks * p.E * p.N),
    )


def selective_scan_backward(
    checkpoints: Tensor, grad_y: Tensor, grad_last: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Leaf: all gradients, an empty one where the input was None."""
    x = Arguments(*arguments)
    if _default(x):
        found = blocked_selective.selective_scan_backward(checkpoints, grad_y, grad_last, *x)
        return tuple(grad_y.new_empty(0) if g is None else g for g in found)
    p = _Problem(x)
    K, pieces = blocked_selective.CHUNK, p.E // p.piece
    slots = min(p.per_piece, -(-MANY // (p.P * p.R * pieces)))
    slots = -(-p.per_piece // -(-p.per_piece // slots))  # none of them empty
    chunks = -(-p.L // K)
    kept = p.pairs(checkpoints).reshape(p.P, p.R, chunks, p.E * p.N, -1).contiguous()
    p.put("kept", kept, kept.stride()[:3])
    p.sequence("gy", grad_y)
    p.state("grad_last", grad_last, p.P, p.R)
    named: dict[str, Any] = x._asdict()
    decay = named["decay_dt"]
    p.sizes(slots=slots, decay_varies=int(decay is not None and decay.shape[-2] == p.L))
    parts = slots if p.wide else pieces * slots
    g: dict[str, Tensor] = {"u": p.output("du", p.L, p.E), "dt": p.output("ddt", p.L, p.E)}
    if named["z"] is not None:
        g["z"] = p.output("dz", p.L, p.E)
    if decay is not None:
        g["decay_dt"] = p.output("ddecay", decay.shape[-2], p.E)
    if named["timesteps"] is not None:
        g["timesteps"] = p.output("dtimesteps", p.L, parts)
    for name, groups in zip("BC", p.groups, strict=True):
        if not p.wide:
            g[name] = p.output(f"d{name}", p.L, parts, p.N, dtype=p.kind)
        elif named[name].shape[-3] == p.L:
            g[name] = p.output(f"d{name}", p.L, parts, groups, p.N, dtype=p.kind)
        else:
            g[name] = p.output(f"d{name}", p.E, p.N, dtype=p.kind)
    g["A"] = p.output("dA", p.E, p.N, dtype=p.kind)
    g["h0"] = p.output("dh0", p.E, p.N, dtype=p.kind)
    for name in ("D", "dt_bias"):
        if named[name] is not None:
            g[name] = p.output(f"d{name}", p.E)
    lines = selective_backward.LINES + K * selective_backward.STEP_LINES
    planes = selective_backward.PLANES + K * selective_backward.STEP_PLANES
    kernel = selective_backward.kernel(p.scheme, p.wide, p.complex)
    p.run(kernel, p.P * p.R * pieces * slots, lines, planes, 3.0)
    return tuple(
        grad_y.new_empty(0)
        if name not in g
        else _gathered(p, name, g[name], named[name], grad_last)
        for name in Gradients._fields
    )


def _gathered(p: _Problem, name: str, g: Tensor, like: Tensor | None, grad_last: Tensor) -> Tensor:
    """Sum what the items left, in the shape and dtype of the input."""
    if name == "h0" or like is None:
        return g.to(grad_last.dtype).reshape(grad_last.shape)
    if name in ("A", "D", "dt_bias"):
        g = g.unflatten(0, (p.P, p.R))
        g = g.squeeze(1) if p.R == 1 else g.sum(1)
    elif name == "timesteps":
        g = g.squeeze(-1) if g.shape[-1] == 1 else g.sum(-1)
    elif name in ("B", "C"):
        groups, varies = like.shape[-2], like.shape[-3] == p.L
        if not p.wide:
            g = g.unflatten(2, (groups, -1))
            g = g.squeeze(3) if g.shape[3] == 1 else g.sum(3)
            g = g if varies else g.sum(1)
        elif varies:
            g = g.squeeze(2) if g.shape[2] == 1 else g.sum(2)
        else:
            g = g.unflatten(1, (groups, -1)).sum(2)
    g = g.real if g.is_complex() and not like.is_complex() else g
    return g.to(like.dtype).reshape(like.shape)


def _state_dtype(u: Tensor, A: Tensor) -> torch.dtype:
    real = torch.promote_types(torch.promote_types(u.dtype, A.real.dtype), torch.float32)
    return torch.promote_types(real, A.dtype)


def warm() -> None:
    """Compile the ordinary variants, or load them from disk: float32, all channels in one group.

    Real A with the scheme of Mamba, complex A with ``zoh``. Others are compiled when first called.
    """
    x, A = torch.zeros(1, 2, 1), torch.zeros(1, 1)
    for scheme, kind in (("mamba", torch.float32), ("zoh", torch.complex64)):
        B = torch.zeros(1, 2, 1, 1, dtype=kind)
        rest = (None,) * 7
        given = (x, x, A.to(kind), B, B, *rest, False, False, scheme)
        y, last, kept = selective_scan(*given, True)
        selective_scan_backward(kept, y, last, *given)
    row, B = x[:, :1], torch.zeros(1, 1, 1, 1)
    selective_scan(row, row, A, B, B, *rest, False, False, "mamba", False)
