# SPDX-License-Identifier: MIT
"""Choose the order in which y = Re C (K * (B u)) is computed.

Three orders give the same numbers:

* ``kernel``: contract C, K and B to the full kernel (L, H_out, H), then convolve with that;
* ``project``: project u by B, convolve each of the J channels, project by C;
* ``frequency``: transform u and K, contract all four in the frequency domain, transform back.

Which one is cheapest depends on batch, widths and length alone, so the choice is made from plain
integers and kept. The inner order of a contraction comes from opt_einsum.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from lrnnx_core.ops.causal_convolution import fast_length

Order = Literal["auto", "kernel", "project", "frequency"]
ORDERS = ("kernel", "project", "frequency")

KERNEL = "dj,lj,jc->ldc"
"""C, K, B to the full kernel."""
FREQUENCY = "blc,lj,jc,dj->bld"
"""The spectra of u and K, B, C to the spectrum of y."""

# Costs in multiply-adds of a large real matrix product; `benchmarks/cpu/contraction.py --fit`
# measures them. They depend on the machine, the ranking they give much less.
FFT = 9.0  # for each n log2(n) of a real channel
BATCHED = 8.0  # a multiply-add of many small complex products, one a frequency
MOVED = 10.0  # a real number read or written
CALL = 1e6  # one call of an operator

TRACED_LENGTH = 1024
"""The length that stands for all lengths while torch.compile traces."""


class Sizes(NamedTuple):
    """The integers that a choice is made from.

    ``batch`` rows of ``length`` samples, ``d_in`` channels to ``channels`` (J) to ``d_out``;
    ``taps`` of each kernel; whether K, B, C are complex; bytes of a real number.
    """

    batch: int
    length: int
    d_in: int
    channels: int
    d_out: int
    taps: int
    is_complex: bool
    itemsize: int


class Step(NamedTuple):
    """One pairwise contraction: which of the operands left, and the subscripts."""

    operands: tuple[int, ...]
    subscripts: str


class Candidate(NamedTuple):
    """One order: estimated cost, peak bytes of what it allocates, contraction of its tensors."""

    order: str
    cost: float
    peak_bytes: int
    steps: tuple[Step, ...]


class Plan(NamedTuple):
    """A choice, and the table it was made from; ``print`` it."""

    order: str
    reason: str
    sizes: Sizes
    candidates: tuple[Candidate, ...]
    max_bytes: int | None

    @property
    def chosen(self) -> Candidate:
        """The candidate that was chosen."""
        return next(c for c in self.candidates if c.order == self.order)

    def __str__(self) -> str:
        s = self.sizes
        least = min(c.cost for c in self.candidates)
        kind = "complex" if s.is_complex else "real"
        widths = f"{s.d_in} -> {s.channels} -> {s.d_out} channels"
        lines = [
            f"batch {s.batch}, length {s.length}, {widths}, {kind}",
            f"{'order':<12}{'Mcost':>10}{'ratio':>8}{'peak MiB':>10}  contraction",
        ]
        for c in self.candidates:
            mark = " *" if c.order == self.order else ""
            steps = "; ".join(step.subscripts for step in c.steps) or "-"
            lines.append(
                f"{c.order + mark:<12}{c.cost / 1e6:>10.3g}{c.cost / least:>8.2f}"
                f"{c.peak_bytes / 2**20:>10.1f}  {steps}"
            )
        cap = "" if self.max_bytes is None else f", cap {self.max_bytes / 2**20:.1f} MiB"
        return "\n".join([*lines, f"* {self.reason}{cap}"])


def plan(
    batch: int,
    length: int,
    d_in: int,
    channels: int,
    d_out: int,
    *,
    taps: int | None = None,
    is_complex: bool = False,
    itemsize: int = 4,
    order: Order = "auto",
    max_bytes: int | None = None,
) -> Plan:
    """Choose the order of y = Re C (K * (B u)) for these sizes.

    Args:
        batch: rows, the product of the leading dimensions of u.
        length: samples L.
        d_in: channels H of u.
        channels: J, of K.
        d_out: channels of y.
        taps: length of K; L if None.
        is_complex: whether K, B and C are complex.
        itemsize: bytes of a real number.
        order: ``auto`` for the cheapest, or one of ``kernel``, ``project``, ``frequency``.
        max_bytes: the cheapest order whose estimated peak is at most this; if none is, the one of
            the smallest peak. It does not overrule an order that is named.

    Returns:
        The plan: its ``order``, and ``candidates`` with their costs and peak bytes.

    Raises:
        ValueError: an unknown order, a negative size.

    Source: Pei 2025 (Centaurus), arXiv:2501.13230, which chooses the order of these contractions by
    their multiplications; transforms and memory traffic are counted here as well.
    """
    check_order("plan", order)
    sizes = Sizes(
        batch, length, d_in, channels, d_out, min(length if taps is None else taps, length),
        bool(is_complex), itemsize,
    )  # fmt: skip
    if min(sizes) < 0:
        raise ValueError(f"plan: {sizes}, expected no negative size")
    return _plan(sizes, order, max_bytes)


def check_order(where: str, order: str) -> None:
    """Raise with the list of orders unless this is one."""
    if order not in get_args(Order):
        raise ValueError(f"{where}: order = {order!r}, expected one of {get_args(Order)}")


@lru_cache(maxsize=4096)
def _plan(sizes: Sizes, order: str, max_bytes: int | None) -> Plan:
    candidates = (_kernel(sizes), _project(sizes), _frequency(sizes))
    fitting = [c for c in candidates if max_bytes is None or c.peak_bytes <= max_bytes]
    if order != "auto":
        chosen, reason = order, "asked for"
    elif fitting:
        chosen = min(fitting, key=lambda c: c.cost).order
        reason = "cheapest" if max_bytes is None else "cheapest under the cap"
    else:
        chosen = min(candidates, key=lambda c: c.peak_bytes).order
        reason = "smallest, for none fits the cap"
    return Plan(chosen, reason, sizes, candidates, max_bytes)


def traced_order(batch: int, d_in: int, channels: int, d_out: int, is_complex: bool) -> str:
    """Choose while torch.compile traces, by plain arithmetic that does not look at the length.

    A choice by length would compile it in, and opt_einsum cannot be traced. The contractions inside
    are then taken in their usual order: the largest factor last.
    """
    parts = 2 if is_complex else 1
    transform = FFT * 2 * math.log2(2 * TRACED_LENGTH)
    full = d_in * d_out
    kernel = parts * full * channels + 4 * BATCHED * batch * full
    kernel += transform * (batch * (d_in + d_out) + full) + 4 * MOVED * full
    project = parts * batch * channels * (d_in + d_out)
    project += parts * channels * (transform * (2 * batch + 1) + 8 * MOVED * batch)
    frequency = 4 * parts * batch * channels * (d_in + d_out)
    frequency += transform * (batch * (d_in + d_out) + parts * channels)
    frequency += 12 * MOVED * batch * parts * channels
    if kernel <= project and kernel <= frequency:
        return "kernel"
    return "project" if project <= frequency else "frequency"


def _kernel(s: Sizes) -> Candidate:
    parts, n, full = _parts(s), _transform_length(s), s.d_in * s.d_out
    sizes = {"d": s.d_out, "l": s.taps, "j": s.channels, "c": s.d_in}
    steps = _path(KERNEL, tuple(sizes.items()))
    cost, largest = _walk(steps, KERNEL, sizes, parts)
    rows = s.batch * (s.d_in + s.d_out)
    cost += _fft(n, full + rows) + 4 * BATCHED * (n / 2) * s.batch * full
    cost += MOVED * n * (full + rows) + 5 * CALL
    peak = max(parts * largest + s.taps * full, (s.taps + n) * full + n * rows)
    return Candidate("kernel", cost, s.itemsize * peak, steps)


def _project(s: Sizes) -> Candidate:
    parts, n = _parts(s), _transform_length(s)
    wide = s.batch * s.channels * parts
    cost = float(s.length * wide * (s.d_in + s.d_out))
    cost += MOVED * s.length * (2 * wide + s.batch * (s.d_in + s.d_out))
    cost += _fft(n, 2 * wide + parts * s.channels) + MOVED * 3 * n * wide + 6 * CALL
    peak = n * (parts * s.channels + 2 * wide) + s.length * wide
    return Candidate("project", cost, s.itemsize * peak, ())


def _frequency(s: Sizes) -> Candidate:
    parts, n = _parts(s), _transform_length(s)
    sizes = {"b": s.batch, "l": n // 2 + 1, "c": s.d_in, "d": s.d_out, "j": parts * s.channels}
    steps = _path(FREQUENCY, tuple(sizes.items()))
    cost, largest = _walk(steps, FREQUENCY, sizes, 4)
    rows = s.batch * (s.d_in + s.d_out)
    cost += _fft(n, rows + parts * s.channels) + 5 * CALL
    peak = n * (rows + parts * s.channels) + 2 * largest
    return Candidate("frequency", cost, s.itemsize * peak, steps)


def _parts(s: Sizes) -> int:
    return 2 if s.is_complex else 1


def _transform_length(s: Sizes) -> int:
    return fast_length(max(s.length + s.taps - 1, 1))


def _fft(n: int, real_channels: int) -> float:
    return FFT * n * math.log2(max(n, 2)) * real_channels


def _walk(
    steps: tuple[Step, ...], equation: str, sizes: dict[str, int], factor: int
) -> tuple[float, int]:
    """Return the cost of a contraction, and the elements of its largest intermediate pair.

    ``factor`` is how many real multiply-adds one of its multiply-adds takes; 4 are complex.
    """
    numbers = 2 if factor == 4 else factor
    cost, largest, before = 0.0, 0, 0
    for position, step in enumerate(steps):
        inputs, out = step.subscripts.split("->")
        left, right = (inputs + ",").split(",")[:2]
        union = set(left) | set(right)
        macs = math.prod(sizes[i] for i in union)
        summed = union - set(out)
        # a frequency in both operands makes one small product of each
        batched = "l" in left and "l" in right and bool(summed)
        if summed:
            cost += factor * macs * (BATCHED if batched else 1.0)
        elements = [math.prod(sizes[i] for i in term) for term in (left, right, out)]
        cost += MOVED * numbers * sum(elements) + CALL
        after = elements[2] if position < len(steps) - 1 else 0
        largest, before = max(largest, before + after), after
    return cost, largest


@lru_cache(maxsize=4096)
def _path(equation: str, sizes: tuple[tuple[str, int], ...]) -> tuple[Step, ...]:
    """Return the pairwise contractions opt_einsum finds best for an equation of these sizes."""
    import opt_einsum

    of = dict(sizes)
    # a size of 0 or 1 must not look like nothing to do
    shapes = [tuple(max(of[i], 1) for i in term) for term in equation.split("->")[0].split(",")]
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    return tuple(Step(tuple(c[0]), c[2]) for c in info.contraction_list)
