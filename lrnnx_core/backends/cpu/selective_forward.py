# SPDX-License-Identifier: MIT
# pyright: basic
"""The forward of the selective scan on the CPU.

An item is a block of channels of one batch element. Its states and rates and a step's quantities
stay in cache; u, dt, z and y are read and written once.
"""

from __future__ import annotations

import functools
from typing import Any

from lrnnx_core.backends.cpu import selective_coefficients as c
from lrnnx_core.backends.cpu import selective_schemes as schemes
from lrnnx_core.backends.cpu.compiling import jit, paste, routine
from lrnnx_core.backends.cpu.mathematics import silu
from lrnnx_core.backends.cpu.pointers import at
from lrnnx_core.backends.cpu.selective_coefficients import place, plane, row

LINES = 9  # rows of a block's width that a worker has
PLANES = 4


def advance(scheme: int, wide: bool, keep: bool, complex_: bool) -> Any:
    """Return a function that takes a step, and sets ``total`` to the sum of what is read.

    Choices are the closure's constants: numba leaves out what is not taken before it infers types.

    Args:
        scheme: the discretization.
        wide: whether B and C are planes, ``drives`` and ``reads``; else they lie at addresses.
        keep: whether to write A_bar to ``decays``.
        complex_: whether states are; ``total`` is twice the real part then.

    Returns:
        A function of

        - N, W: states and the width of a row.
        - b_at, c_at: where B and C are; b_step, c_step: from one state to the next.
        - dd: the time over which the state decays.
        - di: the time over which the input acts.
        - du: the input times its gain, but for the scheme's own.
        - rates, drives, reads: A, B, C.
        - before: the states; after: where the new ones go; decays: where A_bar goes.
        - total: a row.
        - one: a number of the type to compute in.
    """
    gains = scheme > schemes.DIRAC

    @paste
    def real(
        N, W, b_at, c_at, b_step, c_step, dd, di, du, rates, drives, reads, before, after, decays,
        total, one,
    ):  # fmt: skip
        c.erase(total, W)
        for n in range(N):
            rate, old, new = row(rates, n * W), row(before, n * W), row(after, n * W)
            if wide:
                drive, read = row(drives, n * W), row(reads, n * W)
            else:
                b, q = at(b_at + n * b_step, one)[0], at(c_at + n * c_step, one)[0]
            if keep:
                kept = row(decays, n * W)
            for w in range(W):
                if wide:
                    b, q = drive[w], read[w]
                a, g = schemes.decay(scheme, dd[w] * rate[w]), du[w]
                if gains:
                    g *= schemes.gain(scheme, di[w] * rate[w])
                state = a * old[w] + g * b
                if keep:
                    kept[w] = a
                new[w] = state
                total[w] += q * state

    @paste
    def pairs(
        N, W, b_at, c_at, b_step, c_step, dd, di, du, rates, drives, reads, before, after, decays,
        total, one,
    ):  # fmt: skip
        c.erase(total, W)
        for n in range(N):
            k, m = n * W, (n + N) * W
            rate, rate_im, old, old_im = (
                row(rates, k),
                row(rates, m),
                row(before, k),
                row(before, m),
            )
            new, new_im = row(after, k), row(after, m)
            if wide:
                drive, drive_im = row(drives, k), row(drives, m)
                read, read_im = row(reads, k), row(reads, m)
            else:
                b_n, c_n = at(b_at + n * b_step, one), at(c_at + n * c_step, one)
                b_re, b_im, q, qi = b_n[0], b_n[1], c_n[0], c_n[1]
            if keep:
                kept, kept_im = row(decays, k), row(decays, m)
            for w in range(W):
                if wide:
                    b, bi, q, qi = drive[w], drive_im[w], read[w], read_im[w]
                else:
                    b, bi = b_re, b_im
                re, im = rate[w], rate_im[w]
                a, ai = schemes.complex_decay(scheme, dd[w] * re, dd[w] * im)
                if gains:
                    g, gi = schemes.complex_gain(scheme, di[w] * re, di[w] * im)
                    b, bi = schemes.times(b, bi, g, gi)
                h, hi = schemes.times(a, ai, old[w], old_im[w])
                h, hi = h + du[w] * b, hi + du[w] * bi
                if keep:
                    kept[w], kept_im[w] = a, ai
                new[w], new_im[w] = h, hi
                total[w] += q * h - qi * hi
        for w in range(W):
            total[w] += total[w]

    return pairs if complex_ else real


@routine
def write(x, p, r, t, first, width, total, v, skip, one):
    """Write y = (total + D u) silu(z) of a step."""
    offset = first * x[c.ITEMSIZE]
    target = at(place(x, c.Y, p, r, t) + offset, one)
    if x[c.Z] != 0:
        gate = at(place(x, c.Z, p, r, t) + offset, one)
        for w in range(width):
            target[w] = (total[w] + skip[w] * v[w]) * silu(gate[w])
    else:
        for w in range(width):
            target[w] = total[w] + skip[w] * v[w]


@functools.cache
def kernel(scheme: int, wide: bool, complex_: bool) -> Any:
    """Return the kernel of a scheme; ``wide``: B and C differ from channel to channel."""
    step = advance(scheme, wide, False, complex_)
    parts = 2 if complex_ else 1

    @jit
    def selective_forward(begin, end, worker, table, one):
        x = at(table, c.WORD)
        N, size, blocks = x[c.STATES], x[c.ITEMSIZE], x[c.BLOCKS]
        M = parts * N
        per_row = x[c.WIDTH] // x[c.PIECE] * blocks
        for item in range(begin, end):
            batch, k = item // per_row, item % per_row
            p, r = batch // x[c.INNER], batch % x[c.INNER]
            inside = k % blocks * x[c.BLOCK]
            first, width = k // blocks * x[c.PIECE] + inside, min(x[c.BLOCK], x[c.PIECE] - inside)
            W = (width + c.LANES - 1) // c.LANES * c.LANES
            line = W * size
            start = x[c.SCRATCH] + worker * x[c.SCRATCH_STEP]
            c.erase(at(start, one), (LINES + PLANES * M) * W)
            raw, delta = plane(start, one), plane(start + line, one)
            dd, di = plane(start + 2 * line, one), plane(start + 3 * line, one)
            v, du = plane(start + 4 * line, one), plane(start + 5 * line, one)
            bias, skip = plane(start + 6 * line, one), plane(start + 7 * line, one)
            total = plane(start + 8 * line, one)
            start += LINES * line
            line *= M
            h, rates = plane(start, one), plane(start + line, one)
            drives, reads = plane(start + 2 * line, one), plane(start + 3 * line, one)

            c.load_parameter(x, c.BIAS, p, first, width, bias, one)
            c.load_parameter(x, c.D, p, first, width, skip, one)
            c.load_state(x, place(x, c.A, p, r, 0), c.A, first, width, W, parts, rates, one)
            c.load_state(x, place(x, c.H0, p, r, 0), c.H0, first, width, W, parts, h, one)
            b_group = c.group(x, c.B, c.GROUPS_B, first)
            c_group = c.group(x, c.C, c.GROUPS_C, first)
            for t in range(x[c.LENGTH]):
                if x[c.KEPT] != 0 and t % x[c.CHUNK] == 0:
                    kept = place(x, c.KEPT, p, r, t // x[c.CHUNK])
                    c.store_plane(x, kept, first, width, W, parts, h, one)
                c.steps(x, p, r, t, first, width, W, raw, delta, dd, di, v, du, bias, one)
                if c.cleared(x, p, r, t):
                    c.erase(h, M * W)
                b_at, c_at = place(x, c.B, p, r, t), place(x, c.C, p, r, t)
                if wide:
                    if t == 0 or x[c.B_VARIES] != 0:
                        c.load_matrix(x, c.B, c.GROUPS_B, b_at, first, width, W, parts, drives, one)
                    if t == 0 or x[c.C_VARIES] != 0:
                        c.load_matrix(x, c.C, c.GROUPS_C, c_at, first, width, W, parts, reads, one)
                b_at, c_at = b_at + b_group, c_at + c_group
                step(
                    N, W, b_at, c_at, x[c.B + 5], x[c.C + 5], dd, di, du, rates, drives, reads, h,
                    h, h, total, one,
                )  # fmt: skip
                write(x, p, r, t, first, width, total, v, skip, one)
            c.store_plane(x, place(x, c.LAST, p, r, 0), first, width, W, parts, h, one)

    return selective_forward
