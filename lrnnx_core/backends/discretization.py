# SPDX-License-Identifier: MIT
"""A_bar and B_bar of a diagonal A in plain PyTorch, and their gradients.

    A (*S), A_im (*S) or None, dt and dt_input, B, B_im: of one rank, broadcastable

A and B are real, complex, or real parts of which A_im and B_im are the imaginary ones. ``dt_input``
None is dt, B None is 1. The scheme is ``zoh``, ``mamba``, ``dirac`` or ``gbt``, whose number alpha
is: 0 of Euler's rule, 1/2 of the bilinear one.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.discretize import FUSED, SCHEMES, Fused, gbt

Strides = tuple[int, ...]


class Arguments(NamedTuple):
    """The arguments of the leaf operator, in its order."""

    A: Tensor
    A_im: Tensor | None
    dt: Tensor
    dt_input: Tensor | None
    B: Tensor | None
    B_im: Tensor | None
    scheme: str
    alpha: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but scheme and number."""
        return self[:-2]

    @property
    def drive(self) -> Tensor:
        """The step of the input."""
        return self.dt if self.dt_input is None else self.dt_input


def formula(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Leaf: (A_bar, B_bar), each of the shape its arguments broadcast to; differentiable pieces."""
    p = Arguments(*arguments)
    rule = partial(gbt, alpha=p.alpha) if p.scheme == "gbt" else SCHEMES[p.scheme]
    A_bar, gamma = rule(_joined(p.A, p.A_im), p.dt, p.drive)
    return A_bar, gamma if p.B is None else gamma * _joined(p.B, p.B_im)


def gradients(grad_A_bar: Tensor, grad_B_bar: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Leaf: the gradients of all six tensors, empty where there is none."""
    p = Arguments(*arguments)
    rule = _generalised(p.alpha) if p.scheme == "gbt" else FUSED[p.scheme]
    z, dt, drive = _joined(p.A, p.A_im), p.dt, p.drive
    decay_rate, drive_rate = dt * z, drive * z
    w = rule.decay_slope(decay_rate, rule.decay(decay_rate)).conj_physical() * grad_A_bar
    dA, d_decay = dt * w, _real(z.conj_physical() * w)
    g, dB = grad_B_bar, None
    if p.B is not None:
        gamma = torch.ones_like(drive_rate) if rule.gain is None else rule.gain(drive_rate)
        gamma = gamma * drive if rule.scaled else gamma
        dB = gamma.conj_physical() * g
        g = _joined(p.B, p.B_im).conj_physical() * g
    dA, d_decay = dA.sum_to_size(z.shape), d_decay.sum_to_size(dt.shape)
    if rule.gain_slope is not None and rule.gain_dt is not None:
        slope = drive * drive * rule.gain_slope(drive_rate)
        dA = dA + (slope.conj_physical() * g).sum_to_size(z.shape)
        g = rule.gain_dt(drive_rate).conj_physical() * g
    d_drive = _real(g).sum_to_size(drive.shape) if rule.scaled else torch.zeros_like(drive)
    if p.dt_input is None:
        d_decay, d_drive = d_decay + d_drive, None
    found = (*_parts(dA, p.A, p.A_im), d_decay, d_drive, *_parts(dB, p.B, p.B_im))
    return tuple(dt.new_empty(0) if t is None else t.contiguous() for t in found)


def _generalised(alpha: float) -> Fused:
    """Return the record of the generalised bilinear transform."""

    def q(x: Tensor) -> Tensor:
        return 1 / (1 - alpha * x)

    return Fused(
        lambda x: (1 + (1 - alpha) * x) * q(x),
        lambda x, a: q(x) ** 2,
        q,
        lambda y: q(y) ** 2,
        lambda y: alpha * q(y) ** 2,
    )


def _joined(x: Tensor, im: Tensor | None) -> Tensor:
    return x if im is None else torch.complex(x, im)


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def _parts(
    gradient: Tensor | None, x: Tensor | None, im: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x, and of its imaginary part where that is a tensor of its own."""
    if gradient is None or x is None:
        return None, None
    gradient = gradient.sum_to_size(x.shape)
    return (gradient, None) if im is None else (gradient.real.clone(), gradient.imag.clone())


class Layout(NamedTuple):
    """How kernels see the elements of a problem.

    Attributes:
        shape: of the problem.
        sizes: (outer, n1, n2, states); A and B are the same for all of outer.
        strides: of every tensor, over these four.
        summed: leading axes of the problem that outer is made of.
    """

    shape: Strides
    sizes: Strides
    strides: tuple[Strides, ...]
    summed: int


def together(*tensors: Tensor | None) -> torch.Size:
    """Return the shape of tensors of one rank broadcast; `torch.broadcast_shapes` takes 20 us."""
    shapes = zip(*(t.shape for t in tensors if t is not None), strict=True)
    return torch.Size([next((n for n in sizes if n != 1), 1) for sizes in shapes])


def shared(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Return over which axes tensors of one rank are broadcast, and so their gradients summed."""
    shapes = zip(*(t.shape for t in tensors if t is not None), strict=True)
    return tuple(all(n == 1 for n in sizes) for sizes in shapes)


def strides(t: Tensor) -> Strides:
    """Return the strides of a tensor that is broadcast."""
    return tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True))


@functools.lru_cache(maxsize=1024)
def layout(shape: Strides, loops: tuple[bool, ...], every: tuple[Strides, ...]) -> Layout | None:
    """Merge the axes of a problem to four, None where that takes copies.

    Args:
        shape: of the problem.
        loops: over which axes A and B are broadcast.
        every: strides of every tensor.
    """
    merged: list[tuple[int, list[int], bool, int]] = []  # size, strides, loops, axes up to here
    for axis, size in enumerate(shape[:-1]):
        here = [s[axis] for s in every]
        if size == 1:
            continue
        if merged and merged[-1][2] == loops[axis] and merged[-1][1] == [size * s for s in here]:
            merged[-1] = (merged[-1][0] * size, here, loops[axis], axis + 1)
        else:
            merged.append((size, here, loops[axis], axis + 1))
    outer, along, summed = 1, [0] * len(every), 0
    if merged and merged[0][2]:
        outer, along, _, summed = merged.pop(0)
    if len(merged) > 2:
        return None
    rows = [(1, [0] * len(every))] * (2 - len(merged)) + [(n, s) for n, s, *_ in merged]
    axes = [along, *(s for _, s in rows), [s[-1] for s in every]]
    sizes = (outer, *(n for n, _ in rows), shape[-1])
    return Layout(shape, sizes, tuple(zip(*axes, strict=True)), summed)
