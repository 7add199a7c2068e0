# SPDX-License-Identifier: MIT
# pyright: basic, reportOperatorIssue=false
"""The backward of the selective scan on the CPU.

An item is a slot, some blocks in turn, of one batch element. From the end, a chunk's states are
computed again from the one before it and kept with the decays; then the adjoint runs through them.
What is summed over batch elements or slots is left apart for each, and summed outside in a fixed
order: results do not depend on the number of threads.
"""

from __future__ import annotations

import functools
from typing import Any

from lrnnx_core.backends.cpu import selective_coefficients as c
from lrnnx_core.backends.cpu import selective_schemes as schemes
from lrnnx_core.backends.cpu.compiling import jit, paste, routine
from lrnnx_core.backends.cpu.mathematics import sigmoid, softplus_slope
from lrnnx_core.backends.cpu.pointers import at
from lrnnx_core.backends.cpu.selective_coefficients import place, plane, row
from lrnnx_core.backends.cpu.selective_forward import advance

LINES = 12  # rows of a block's width that a worker has
STEP_LINES = 7  # and for each step of a chunk
PLANES = 12
STEP_PLANES = 2


@routine
def gate(x, p, r, t, first, width, gy, total, v, skip, dskip, one):
    """Set gy to the gradient of the sum under the gate; write that of z."""
    offset = first * x[c.ITEMSIZE]
    given = at(place(x, c.GY, p, r, t) + offset, one)
    if x[c.Z] != 0:
        z = at(place(x, c.Z, p, r, t) + offset, one)
        dz = at(place(x, c.DZ, p, r, t) + offset, one)
        for w in range(width):
            s = sigmoid(z[w])
            dz[w] = given[w] * (total[w] + skip[w] * v[w]) * (s * (one + z[w] * (one - s)))
            gy[w] = given[w] * (z[w] * s)
    else:
        for w in range(width):
            gy[w] = given[w]
    for w in range(width):
        dskip[w] += gy[w] * v[w]


@routine
def write(
    x, p, r, t, first, width, raw, delta, gy, gdd, gdi, gu, skip, dbias, ddecay,
    part, opened, one,
):  # fmt: skip
    """Write the gradients of a step's u, dt, decay_dt and timesteps.

    Of the arguments:

    - gdd: of the decay's step.
    - gdi: of the input's step.
    - gu: of u, but for D.
    - part: which of the sums over channels.
    - opened: whether something was written there before.
    """
    offset, zero = first * x[c.ITEMSIZE], one - one
    du = at(place(x, c.DU, p, r, t) + offset, one)
    ddt = at(place(x, c.DDT, p, r, t) + offset, one)
    for w in range(width):
        du[w] = gu[w] + skip[w] * gy[w]
    if x[c.TIMES] != 0:
        tau = at(place(x, c.TIMES, p, r, t), one)[0]
        own = at(place(x, c.DECAY, p, r, t) + offset, one)
        total = zero
        if x[c.DECAY] != 0:
            for w in range(width):
                total += gdd[w] * own[w]
        else:
            for w in range(width):
                total += gdd[w] * delta[w]
        for w in range(width):
            gdd[w] *= tau
        if x[c.STATE_ONLY] == 0:
            for w in range(width):
                total += gdi[w] * delta[w]
                gdi[w] *= tau
        target = at(place(x, c.DTIMES, p, r, t) + part * x[c.ITEMSIZE], one)
        target[0] = target[0] + total if opened else total
    if x[c.DECAY] != 0:
        for w in range(width):
            ddecay[w] += gdd[w]
        if x[c.DECAY_VARIES] != 0:
            target = at(place(x, c.DDECAY, p, r, t) + offset, one)
            for w in range(width):
                target[w] = gdd[w]
    else:
        for w in range(width):
            gdi[w] += gdd[w]
    if x[c.SOFTPLUS] != 0:
        for w in range(width):
            gdi[w] *= softplus_slope(raw[w])
    for w in range(width):
        ddt[w] = gdi[w]
        dbias[w] += gdi[w]


@routine
def spread(x, address, groups, first, width, W, parts, y, opened, one):
    """Add a plane to the gradient (G, N) of a step's matrix, and clear it."""
    N, per = x[c.STATES], x[c.WIDTH] // x[groups]
    target = at(address, one)
    if not opened:
        for i in range(x[groups] * N * parts):
            target[i] = one - one
    for w in range(width):
        base = (first + w) // per * N
        for n in range(N):
            for part in range(parts):
                target[(base + n) * parts + part] += y[(part * N + n) * W + w]
    c.erase(y, N * parts * W)


@routine
def finish(x, tensor, p, r, first, width, y, one):
    """Write a block's sum over time of the gradient of a parameter; nothing where there is none."""
    if x[tensor] != 0:
        target = at(place(x, tensor, p, r, 0) + first * x[c.ITEMSIZE], one)
        for w in range(width):
            target[w] = y[w]


def retreat(scheme: int, wide: bool, complex_: bool) -> Any:
    """Return a function that takes the adjoint through a step; choices as in `advance`.

    Returns:
        A function of what `advance` names and

        - db_at, dc_at: where the gradients of B and C are added, a number for each state, unless
          ``wide``.
        - opened: whether something was written there before.
        - gy: the gradient of the sum that is read.
        - v: the input.
        - s: conj(A_bar) lam of the step after, and then of this one.
        - dA: its gradient, added to; dB, dC: where ``wide``.
        - gdd: a row, added to.
        - gdi: a row, added to; not touched where the gain is free of A.
        - gu: a row, added to: the gradient of gamma times the input but for the step.
    """
    gains = scheme > schemes.DIRAC

    @paste
    def real(
        N, W, b_at, c_at, b_step, c_step, db_at, dc_at, opened, gy, dd, di, du, v, rates, drives,
        reads, before, after, decays, s, dA, dB, dC, gdd, gdi, gu, one,
    ):  # fmt: skip
        for n in range(N):
            k = n * W
            rate, old, new, kept = row(rates, k), row(before, k), row(after, k), row(decays, k)
            lams, to_rate = row(s, k), row(dA, k)
            if wide:
                drive, read, to_b, to_c = row(drives, k), row(reads, k), row(dB, k), row(dC, k)
            else:
                b, q = at(b_at + n * b_step, one)[0], at(c_at + n * c_step, one)[0]
                gb, gc = one - one, one - one
            for w in range(W):
                if wide:
                    b, q = drive[w], read[w]
                g, a = gy[w], kept[w]
                lam = g * q + lams[w]
                carried = a * lam
                lams[w] = carried
                driven = lam * du[w]
                if gains:
                    y = di[w] * rate[w]
                    grown = schemes.gain(scheme, y)
                    slope = lam * old[w] * schemes.decay_slope(scheme, dd[w] * rate[w], a)
                    held = lam * b * v[w]
                    gdi[w] += held * schemes.gain_dt(scheme, y)
                    bent = di[w] * di[w] * schemes.gain_slope(scheme, y)
                    to_rate[w] += slope * dd[w] + held * bent
                    gu[w] += lam * b * grown
                    driven *= grown
                else:
                    slope = carried * old[w]
                    to_rate[w] += slope * dd[w]
                    gu[w] += lam * b
                gdd[w] += slope * rate[w]
                if wide:
                    to_b[w] += driven
                    to_c[w] += g * new[w]
                else:
                    gb += driven
                    gc += g * new[w]
            if not wide:
                db, dc = row(at(db_at, one), n), row(at(dc_at, one), n)
                db[0] = db[0] + gb if opened else gb
                dc[0] = dc[0] + gc if opened else gc

    @paste
    def pairs(
        N, W, b_at, c_at, b_step, c_step, db_at, dc_at, opened, gy, dd, di, du, v, rates, drives,
        reads, before, after, decays, s, dA, dB, dC, gdd, gdi, gu, one,
    ):  # fmt: skip
        for n in range(N):
            k, m = n * W, (n + N) * W
            rate, rate_im, old, old_im = (
                row(rates, k),
                row(rates, m),
                row(before, k),
                row(before, m),
            )
            new, new_im, kept, kept_im = (
                row(after, k),
                row(after, m),
                row(decays, k),
                row(decays, m),
            )
            lams, lams_im, to_rate, to_rate_im = row(s, k), row(s, m), row(dA, k), row(dA, m)
            if wide:
                drive, drive_im = row(drives, k), row(drives, m)
                read, read_im = row(reads, k), row(reads, m)
                to_b, to_b_im, to_c, to_c_im = row(dB, k), row(dB, m), row(dC, k), row(dC, m)
            else:
                b_n, c_n = at(b_at + n * b_step, one), at(c_at + n * c_step, one)
                b, bi, q, qi = b_n[0], b_n[1], c_n[0], c_n[1]
                gb, gc, gbi, gci = one - one, one - one, one - one, one - one
            for w in range(W):
                if wide:
                    b, bi, q, qi = drive[w], drive_im[w], read[w], read_im[w]
                g = gy[w] + gy[w]
                a, ai, re, im = kept[w], kept_im[w], rate[w], rate_im[w]
                lam, lami = lams[w] + g * q, lams_im[w] - g * qi
                lams[w], lams_im[w] = schemes.times(a, -ai, lam, lami)
                # of A_bar: lam conj(before slope)
                f, fi = schemes.complex_decay_slope(scheme, dd[w] * re, dd[w] * im, a, ai)
                f, fi = schemes.times(old[w], old_im[w], f, fi)
                f, fi = schemes.times(lam, lami, f, -fi)
                gdd[w] += f * re + fi * im
                f, fi = f * dd[w], fi * dd[w]
                held, heldi = schemes.times(lam, lami, b, -bi)
                if gains:
                    y, yi = di[w] * re, di[w] * im
                    e, ei = schemes.complex_gain(scheme, y, yi)
                    gu[w] += held * e + heldi * ei
                    lam, lami = schemes.times(lam, lami, e, -ei)
                    held, heldi = held * v[w], heldi * v[w]
                    e, ei = schemes.complex_gain_dt(scheme, y, yi)
                    gdi[w] += held * e + heldi * ei
                    e, ei = schemes.complex_gain_slope(scheme, y, yi)
                    e, ei = schemes.times(held, heldi, e, -ei)
                    f, fi = f + di[w] * di[w] * e, fi + di[w] * di[w] * ei
                else:
                    gu[w] += held
                to_rate[w] += f
                to_rate_im[w] += fi
                if wide:
                    to_b[w] += lam * du[w]
                    to_b_im[w] += lami * du[w]
                    to_c[w] += g * new[w]
                    to_c_im[w] -= g * new_im[w]
                else:
                    gb += lam * du[w]
                    gbi += lami * du[w]
                    gc += g * new[w]
                    gci -= g * new_im[w]
            if not wide:
                db, dc = row(at(db_at, one), 2 * n), row(at(dc_at, one), 2 * n)
                db[0], db[1] = (db[0] + gb, db[1] + gbi) if opened else (gb, gbi)
                dc[0], dc[1] = (dc[0] + gc, dc[1] + gci) if opened else (gc, gci)

    return pairs if complex_ else real


@functools.cache
def kernel(scheme: int, wide: bool, complex_: bool) -> Any:
    """Return the kernel of a scheme; ``wide``: B and C differ from channel to channel."""
    forth, back = advance(scheme, wide, True, complex_), retreat(scheme, wide, complex_)
    parts = 2 if complex_ else 1
    free, scaled = scheme == schemes.EXPONENTIAL, scheme != schemes.DIRAC

    @jit
    def selective_backward(begin, end, worker, table, one):
        x = at(table, c.WORD)
        N, K, L, size = x[c.STATES], x[c.CHUNK], x[c.LENGTH], x[c.ITEMSIZE]
        M = parts * N
        slots = x[c.WIDTH] // x[c.PIECE] * x[c.SLOTS]
        per_slot = (x[c.BLOCKS] + x[c.SLOTS] - 1) // x[c.SLOTS]
        for item in range(begin, end):
            batch, part = item // slots, item % slots
            p, r = batch // x[c.INNER], batch % x[c.INNER]
            low = part % x[c.SLOTS] * per_slot
            for k in range(low, min(low + per_slot, x[c.BLOCKS])):
                opened = k > low
                inside = k * x[c.BLOCK]
                first = part // x[c.SLOTS] * x[c.PIECE] + inside
                width = min(x[c.BLOCK], x[c.PIECE] - inside)
                W = (width + c.LANES - 1) // c.LANES * c.LANES
                line, MW = W * size, M * W
                some = K * line
                start = x[c.SCRATCH] + worker * x[c.SCRATCH_STEP]
                c.erase(at(start, one), (LINES + STEP_LINES * K + PLANES * M) * W)
                raws, deltas = plane(start, one), plane(start + some, one)
                dds, dis = plane(start + 2 * some, one), plane(start + 3 * some, one)
                vs, dus = plane(start + 4 * some, one), plane(start + 5 * some, one)
                gys = plane(start + 6 * some, one)
                start += STEP_LINES * some
                bias, skip = plane(start, one), plane(start + line, one)
                total, dskip = plane(start + 2 * line, one), plane(start + 3 * line, one)
                dbias, ddecay = plane(start + 4 * line, one), plane(start + 5 * line, one)
                gdd, gdi = plane(start + 6 * line, one), plane(start + 7 * line, one)
                gu, all_skip = plane(start + 8 * line, one), plane(start + 9 * line, one)
                all_bias, all_decay = plane(start + 10 * line, one), plane(start + 11 * line, one)
                start += LINES * line
                line *= M
                s, rates = plane(start, one), plane(start + line, one)
                drives, reads = plane(start + 2 * line, one), plane(start + 3 * line, one)
                dA, all_A = plane(start + 4 * line, one), plane(start + 5 * line, one)
                dB, dC = plane(start + 6 * line, one), plane(start + 7 * line, one)
                all_B, all_C = plane(start + 8 * line, one), plane(start + 9 * line, one)
                start += 10 * line
                # zeros, and the states before a chunk and after each of its steps
                hs = plane(start, one)
                decays = plane(start + (K + 2) * line, one)

                c.load_parameter(x, c.BIAS, p, first, width, bias, one)
                c.load_parameter(x, c.D, p, first, width, skip, one)
                c.load_state(x, place(x, c.A, p, r, 0), c.A, first, width, W, parts, rates, one)
                c.load_state(x, place(x, c.GLAST, p, r, 0), c.GLAST, first, width, W, parts, s, one)
                b_group = c.group(x, c.B, c.GROUPS_B, first)
                c_group = c.group(x, c.C, c.GROUPS_C, first)
                for i in range((L + K - 1) // K - 1, -1, -1):
                    steps = min(K, L - i * K)
                    kept = place(x, c.KEPT, p, r, i)
                    c.load_plane(x, kept, first, width, W, parts, row(hs, MW), one)
                    for turn in range(2 * steps):
                        ahead = turn < steps
                        j = turn if ahead else 2 * steps - 1 - turn
                        t = i * K + j
                        raw, delta = row(raws, j * W), row(deltas, j * W)
                        dd, di = row(dds, j * W), row(dis, j * W)
                        v, du, gy = row(vs, j * W), row(dus, j * W), row(gys, j * W)
                        clear = c.cleared(x, p, r, t)
                        before = row(hs, 0 if clear else (j + 1) * MW)
                        after, kept = row(hs, (j + 2) * MW), row(decays, j * MW)
                        b_at, c_at = place(x, c.B, p, r, t), place(x, c.C, p, r, t)
                        if wide:
                            # once where they are constant in time
                            new = turn == 0 and i == (L + K - 1) // K - 1
                            if new or x[c.B_VARIES] != 0:
                                c.load_matrix(
                                    x, c.B, c.GROUPS_B, b_at, first, width, W, parts, drives, one
                                )
                            if new or x[c.C_VARIES] != 0:
                                c.load_matrix(
                                    x, c.C, c.GROUPS_C, c_at, first, width, W, parts, reads, one
                                )
                        b_at, c_at = b_at + b_group, c_at + c_group
                        if ahead:
                            c.steps(
                                x, p, r, t, first, width, W, raw, delta, dd, di, v, du, bias, one
                            )
                            forth(
                                N, W, b_at, c_at, x[c.B + 5], x[c.C + 5], dd, di, du, rates,
                                drives, reads, before, after, kept, total, one,
                            )  # fmt: skip
                            gate(x, p, r, t, first, width, gy, total, v, skip, dskip, one)
                            continue
                        c.erase(gdd, W)
                        c.erase(gdi, W)
                        c.erase(gu, W)
                        db_at = place(x, c.DB, p, r, t) + part * x[c.DB + 4]
                        dc_at = place(x, c.DC, p, r, t) + part * x[c.DC + 4]
                        back(
                            N, W, b_at, c_at, x[c.B + 5], x[c.C + 5], db_at, dc_at, opened, gy, dd,
                            di, du, v, rates, drives, reads, before, after, kept, s, dA, dB, dC,
                            gdd, gdi, gu, one,
                        )  # fmt: skip
                        if wide:
                            if x[c.B_VARIES] != 0:
                                spread(
                                    x, db_at, c.GROUPS_B, first, width, W, parts, dB, opened, one
                                )
                            if x[c.C_VARIES] != 0:
                                spread(
                                    x, dc_at, c.GROUPS_C, first, width, W, parts, dC, opened, one
                                )
                        if clear:
                            c.erase(s, MW)
                        if free:
                            for w in range(W):
                                gdi[w] = gu[w] * v[w]
                        if scaled:
                            for w in range(W):
                                gu[w] *= di[w]
                        write(
                            x, p, r, t, first, width, raw, delta, gy, gdd, gdi, gu, skip, dbias,
                            ddecay, part, opened, one,
                        )  # fmt: skip
                    # of a chunk first, then of all: rounding errors of long sums stay small
                    c.gather(all_A, dA, MW)
                    if wide:
                        c.gather(all_B, dB, MW)
                        c.gather(all_C, dC, MW)
                    c.gather(all_skip, dskip, W)
                    c.gather(all_bias, dbias, W)
                    c.gather(all_decay, ddecay, W)
                c.store_plane(x, place(x, c.DA, p, r, 0), first, width, W, parts, all_A, one)
                c.store_plane(x, place(x, c.DH0, p, r, 0), first, width, W, parts, s, one)
                if wide:
                    if x[c.B_VARIES] == 0:
                        b_at = place(x, c.DB, p, r, 0)
                        c.store_plane(x, b_at, first, width, W, parts, all_B, one)
                    if x[c.C_VARIES] == 0:
                        c_at = place(x, c.DC, p, r, 0)
                        c.store_plane(x, c_at, first, width, W, parts, all_C, one)
                finish(x, c.DD, p, r, first, width, all_skip, one)
                finish(x, c.DBIAS, p, r, first, width, all_bias, one)
                if x[c.DECAY_VARIES] == 0:
                    finish(x, c.DDECAY, p, r, first, width, all_decay, one)

    return selective_backward
