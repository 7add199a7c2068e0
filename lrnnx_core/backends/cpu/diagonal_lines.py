# SPDX-License-Identifier: MIT
# pyright: basic, reportCallIssue=false
"""What the kernels of the diagonal scan share: their arguments, and the lines of a worker.

An item is a block of neighbouring channels of one batch element. What a step needs beside its
sequences lies in lines of the worker's own, a block wide and padded to whole vectors, so that the
coefficients of a step are formed a vector at a time whatever the width.

The arguments come as one table of integers: a row of address and strides (in bytes; of the shared
batch axes, the other ones, time) for each sequence, then addresses, sizes and flags. Halves are
[re | im], a row of channels apart.
"""

from __future__ import annotations

from numba import carray

from lrnnx_core.backends.cpu.compiling import inline
from lrnnx_core.backends.cpu.pointers import at, fill, flagged
from lrnnx_core.backends.cpu.selective_coefficients import plane

CHUNK = 64  # steps between sums in float64
LINES = 25  # of a worker, at most
LANES = 16  # numbers of a vector; lines are a multiple of it
SEQUENCES = ("x", "h", "g", "dx", "dt", "ddt")
VALUES = (
    "tables", "h0", "last", "dh0", "times", "dtimes", "reset", "mask", "sums", "scratch",
    "scratch_step", "itemsize", "batches", "inner", "length", "channels", "blocks", "block",
    "gained", "state_only",
)  # fmt: skip
FIELDS = 4
X, H, G, DX, DT, DDT = range(0, FIELDS * len(SEQUENCES), FIELDS)
(
    TABLES, H0, LAST, DH0, TIMES, DTIMES, RESET, MASK, SUMS, SCRATCH, SCRATCH_STEP, ITEMSIZE,
    BATCHES, INNER, LENGTH, CHANNELS, BLOCKS, BLOCK, GAINED, STATE_ONLY,
) = range(FIELDS * len(SEQUENCES), FIELDS * len(SEQUENCES) + len(VALUES))  # fmt: skip
A_RE, A_IM, STEP, GAIN_RE, GAIN_IM = range(5)
TABLES_EACH = 5
"""Tables of channels (P, 5, S): A, the constant step, the constant gain."""
SUMS_EACH = 4
"""Sums over time (batch, 4, S): of dA or of the decay's gradient, then of the step's or gain's."""


@inline
def place(x, tensor, p, r, t):
    """Return the address of a step of a sequence."""
    return x[tensor] + p * x[tensor + 1] + r * x[tensor + 2] + t * x[tensor + 3]


@inline
def planes(address, shape, one):
    """Return an array over memory that this worker alone uses."""
    return carray(plane(address, one), shape)


@inline
def erase(line):
    """Fill a line with zeros."""
    for i in range(line.shape[0]):
        line[i] = 0


@inline
def block(x, item):
    """Return (batch element, block, first channel, channels) of an item."""
    k = item % x[BLOCKS]
    first = k * x[BLOCK]
    return item // x[BLOCKS], k, first, min(x[BLOCK], x[CHANNELS] - first)


@inline
def six(address, line, W, one):
    """Return six lines that lie one after the other, and where the next one is."""
    return (
        planes(address, W, one), planes(address + line, W, one),
        planes(address + 2 * line, W, one), planes(address + 3 * line, W, one),
        planes(address + 4 * line, W, one), planes(address + 5 * line, W, one),
        address + 6 * line,
    )  # fmt: skip


@inline
def read(address, n, line, one):
    """Fill a line with n numbers from an address."""
    source = at(address, one)
    for c in range(n):
        line[c] = source[c]


@inline
def write(address, n, line, one):
    """Write n numbers of a line to an address."""
    target = at(address, one)
    for c in range(n):
        target[c] = line[c]


@inline
def table(x, p, k, first, n, line, one):
    """Fill a line with n channels of a table, and zeros behind them."""
    erase(line)
    read(x[TABLES] + ((p * TABLES_EACH + k) * x[CHANNELS] + first) * x[ITEMSIZE], n, line, one)


@inline
def step(x, sequence, p, r, t, first):
    """Return the address of a block of a step, and of its second half."""
    address = place(x, sequence, p, r, t) + first * x[ITEMSIZE]
    return address, address + x[CHANNELS] * x[ITEMSIZE]


@inline
def end(x, which, batch, first):
    """Return the addresses of the halves of a state (batch, 2S)."""
    half = x[CHANNELS] * x[ITEMSIZE]
    address = x[which] + 2 * batch * half + first * x[ITEMSIZE]
    return address, address + half


@inline
def begun(x, batch, first, n, re, im, one):
    """Set a state to h0, or zero."""
    erase(re)
    erase(im)
    if x[H0]:
        address, other = end(x, H0, batch, first)
        read(address, n, re, one)
        read(other, n, im, one)


@inline
def cleared(x, batch, t):
    """Return whether the state is cleared before a step."""
    return x[RESET] != 0 and flagged(x[RESET] + batch * x[LENGTH], t)


@inline
def padding(x, batch, t):
    """Return whether a step leaves the state alone."""
    return x[MASK] != 0 and not flagged(x[MASK] + batch * x[LENGTH], t)


@inline
def blank(x, sequence, p, r, t, first, n, one):
    """Write zeros to a step of halves."""
    address, other = step(x, sequence, p, r, t, first)
    fill(address, n, one)
    fill(other, n, one)


@inline
def settle(x, batch, k, first, n, part, one):
    """Add a line to the sums in float64, and empty it."""
    total = at(x[SUMS] + ((batch * SUMS_EACH + k) * x[CHANNELS] + first) * 8, 0.0)
    for c in range(n):
        total[c] += part[c]
        part[c] = 0
