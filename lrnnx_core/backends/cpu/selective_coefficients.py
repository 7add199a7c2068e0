# SPDX-License-Identifier: MIT
# pyright: basic
"""What the kernels of the selective scan share: their arguments, planes and steps.

A kernel works on a block of neighbouring channels. Its state lies as planes (M, W): a row of W
channels for each of the N states, the imaginary parts of complex ones below the real parts. The
inner loop runs over channels. Rows are padded to whole vectors with zeros, which stay zeros.

Planes are pointers: an array's index is checked for its sign, and made of its shape, at every use,
which takes long to compile.

The arguments come as one table of integers: a row of address and strides (in bytes; of the shared
batch axes, the other ones, time, channel or group, state) for each tensor, then sizes and flags.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lrnnx_core.backends.cpu.compiling import paste, routine
from lrnnx_core.backends.cpu.mathematics import softplus
from lrnnx_core.backends.cpu.pointers import BYTE, at

TENSORS = (
    "u", "dt", "z", "decay_dt", "timesteps", "reset", "B", "C", "A", "D", "dt_bias", "h0",
    "gy", "grad_last", "y", "last", "kept",
    "du", "ddt", "dz", "ddecay", "dtimesteps", "dB", "dC", "dA", "dD", "ddt_bias", "dh0",
)  # fmt: skip
SIZES = (
    "scratch", "scratch_step", "itemsize", "inner", "length", "width", "states", "piece",
    "blocks", "block", "slots", "chunk", "groups_B", "groups_C",
    "softplus", "state_only", "B_varies", "C_varies", "decay_varies", "pulse",
)  # fmt: skip
FIELDS = 6
(
    U, DT, Z, DECAY, TIMES, RESET, B, C, A, D, BIAS, H0, GY, GLAST, Y, LAST, KEPT,
    DU, DDT, DZ, DDECAY, DTIMES, DB, DC, DA, DD, DBIAS, DH0,
) = range(0, FIELDS * len(TENSORS), FIELDS)  # fmt: skip
(
    SCRATCH, SCRATCH_STEP, ITEMSIZE, INNER, LENGTH, WIDTH, STATES, PIECE, BLOCKS, BLOCK, SLOTS,
    CHUNK, GROUPS_B, GROUPS_C, SOFTPLUS, STATE_ONLY, B_VARIES, C_VARIES, DECAY_VARIES, PULSE,
) = range(FIELDS * len(TENSORS), FIELDS * len(TENSORS) + len(SIZES))  # fmt: skip
LANES = 16  # numbers of a vector; rows are a multiple of it
WORD = np.int64(1)


def _place(typing_context, x, tensor, p, r, t):
    """Return the address of step t of batch element (p, r)."""

    def generate(context, builder, signature, arguments):
        table, at_, *counts = arguments
        row = builder.gep(table, [at_])
        total = builder.load(row)
        for i, count in enumerate(counts):
            stride = builder.load(builder.gep(row, [ir.Constant(ir.IntType(64), i + 1)]))
            total = builder.add(total, builder.mul(count, stride))
        return total

    return types.int64(x, types.int64, types.int64, types.int64, types.int64), generate


place: Any = intrinsic(_place)


@paste
def group(x, tensor, groups, first):
    """Return how far from the first one the group of a channel lies."""
    return first // (x[WIDTH] // x[groups]) * x[tensor + 4]


@paste
def cleared(x, p, r, t):
    """Return whether the state is cleared before step t."""
    return x[RESET] != 0 and at(place(x, RESET, p, r, t), BYTE)[0] != 0


# ---------------------------------------------------------------- planes


def _plane(typing_context, address, one):
    """Return a pointer to memory that, the compiler may believe, no other pointer reaches.

    A call returns it that is never inlined and whose result is marked as not aliased. Without this
    a loop over more than a few arrays checks at run time that they do not overlap, or is not
    vectorised at all.
    """

    def generate(context, builder, signature, arguments):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(byte, [ir.IntType(64)])
        name = "lrnnx_core_private"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        if function.is_declaration:
            function.linkage = "linkonce_odr"
            for attribute in ("noinline", "optnone"):
                function.attributes.add(attribute)
            function.return_value.add_attribute("noalias")
            body = ir.IRBuilder(function.append_basic_block("entry"))
            body.ret(body.inttoptr(function.args[0], byte))
        pointer = builder.call(function, [arguments[0]])
        return builder.bitcast(pointer, context.get_value_type(signature.return_type))

    return types.CPointer(one)(types.int64, one), generate


plane: Any = intrinsic(_plane)


def _row(typing_context, pointer, offset):
    """Return a pointer so many numbers further on."""

    def generate(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), generate


row: Any = intrinsic(_row)


@routine
def erase(y, count):
    """Write so many zeros."""
    for i in range(count):
        y[i] = 0


@routine
def gather(total, part, count):
    """Add so many numbers to others, and clear them."""
    for i in range(count):
        total[i] += part[i]
        part[i] = 0


@routine
def load_parameter(x, tensor, p, first, width, y, one):
    """Copy D or dt_bias of a block; nothing where there is none."""
    if x[tensor] != 0:
        source = at(x[tensor] + p * x[tensor + 1] + first * x[ITEMSIZE], one)
        for w in range(width):
            y[w] = source[w]


@routine
def load_state(x, start, tensor, first, width, W, parts, y, one):
    """Copy A or a state (E, N) of a block from ``start``; nothing where there is none."""
    if x[tensor] == 0:
        return
    N, channel, state = x[STATES], x[tensor + 4], x[tensor + 5]
    start += first * channel
    for part in range(parts):
        for w in range(width):
            for n in range(N):
                y[(part * N + n) * W + w] = at(start + w * channel + n * state, one)[part]


@routine
def load_matrix(x, tensor, groups, address, first, width, W, parts, y, one):
    """Copy a step's B or C to the block's channels."""
    N, per, step, state = x[STATES], x[WIDTH] // x[groups], x[tensor + 4], x[tensor + 5]
    for part in range(parts):
        for n in range(N):
            target = row(y, (part * N + n) * W)
            for w in range(width):
                target[w] = at(address + (first + w) // per * step + n * state, one)[part]


@routine
def store_plane(x, start, first, width, W, parts, y, one):
    """Copy a plane to its place in a compact (E, N)."""
    N = x[STATES]
    target = plane(start + first * N * parts * x[ITEMSIZE], one)
    for w in range(width):
        for n in range(N):
            for part in range(parts):
                target[(w * N + n) * parts + part] = y[(part * N + n) * W + w]


@routine
def load_plane(x, start, first, width, W, parts, y, one):
    """Copy a plane from its place in a compact (E, N)."""
    N = x[STATES]
    source = plane(start + first * N * parts * x[ITEMSIZE], one)
    for part in range(parts):
        for n in range(N):
            target = row(y, (part * N + n) * W)
            for w in range(width):
                target[w] = source[(w * N + n) * parts + part]


# ---------------------------------------------------------------- steps


@routine
def steps(x, p, r, t, first, width, padded, raw, delta, dd, di, v, du, bias, one):
    """Compute a step's quantities of each channel.

    Of the arguments:

    - raw: the step before softplus.
    - delta: after it.
    - dd: the time over which the state decays.
    - di: the time over which the input acts.
    - v: u.
    - du: what B is multiplied by, but for the scheme's gain.
    """
    offset = first * x[ITEMSIZE]
    inputs = at(place(x, U, p, r, t) + offset, one)
    given = at(place(x, DT, p, r, t) + offset, one)
    for w in range(width):
        v[w] = inputs[w]
        raw[w] = given[w] + bias[w]
    if x[SOFTPLUS] != 0:
        for w in range(padded):
            delta[w] = softplus(raw[w])
    else:
        for w in range(padded):
            delta[w] = raw[w]
    if x[DECAY] != 0:
        own = at(place(x, DECAY, p, r, t) + offset, one)
        for w in range(width):
            dd[w] = own[w]
    else:
        for w in range(padded):
            dd[w] = delta[w]
    if x[TIMES] != 0:
        tau = at(place(x, TIMES, p, r, t), one)[0]
        for w in range(padded):
            dd[w] *= tau
        if x[STATE_ONLY] != 0:
            tau = one
        for w in range(padded):
            di[w] = tau * delta[w]
    else:
        for w in range(padded):
            di[w] = delta[w]
    if x[PULSE] != 0:
        for w in range(padded):
            du[w] = v[w]
    else:
        for w in range(padded):
            du[w] = di[w] * v[w]
