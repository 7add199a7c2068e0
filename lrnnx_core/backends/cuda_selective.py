# SPDX-License-Identifier: MIT
"""The kernels of the selective scan on CUDA: which variant a size takes, and its arguments.

`cuda/selective.cuh` says how a block works; `cuda_selective_scan` launches.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import cuda
from lrnnx_core.backends.blocked_selective import CHUNK, Arguments

TILE, SUB = 32, 8  # steps of a forward tile; steps that the backward holds in registers
# Most states of a lane, by the bytes of a state: what registers hold.
MOST = {"forward": {4: 8, 8: 2, 16: 2}, "backward": {4: 8, 8: 2, 16: 1}}
WARPS_WANTED = 7  # of a multiprocessor, nearly two a scheduler; with less a lane gets fewer states
MOST_THREADS = 256  # of a multiprocessor, with the backward's registers
RESERVED = 1024  # bytes of shared memory that the driver takes of a block
SLICE = 256  # bytes of a channel's states that one launch computes; more are taken in turn
LAYOUT = "P4q" * 4 + "P5q" * 2 + "P3q" * 2 + "4P" + "12q"
LAYOUTS = {"forward": LAYOUT + "3P", "backward": LAYOUT + "P4q" + "14Pq", "ends": LAYOUT + "2P"}
LONG = 32768  # from this length on, time is cut into segments where a row does not fill the chip
SHORTEST = 4096  # steps of a segment
SEQUENCES = ("u", "dt", "z", "decay_dt")


class Choice(NamedTuple):
    """What a kernel is compiled for; see cuda/selective.cuh.

    Attributes:
        step: "forward", "backward" or "ends" (what a segment makes of the state before it).
        dtype: of the sequences.
        state: dtype of A and the states.
        scheme: the discretization's name.
        softplus: whether the step is the softplus of what is given.
        gate: whether there is a z.
        reset: whether there is a reset.
        timed: whether there are timesteps.
        state_only: whether they are in the decay alone.
        b_varies: whether B varies in time.
        c_varies: whether C does.
        decay: 0 no step of its own for the decay, 1 a constant one, 2 a varying one.
        adjoint: whether "ends" is meant of the adjoint, with gy for u and C for B.
        pack: neighbouring channels of a lane.
        per_lane: states of each of them on a lane.
        lanes: lanes that hold a channel's states.
        warps: of a block.
        tile: steps of a tile of the forward.
        together: steps of it whose outputs are summed over lanes together.
        stages: tiles under way, the one computed included.
        row_slots: SUB steps of the backward whose dB and dC are summed over warps together.
    """

    step: str
    dtype: torch.dtype
    state: torch.dtype
    scheme: str
    softplus: bool = False
    gate: bool = False
    reset: bool = False
    timed: bool = False
    state_only: bool = False
    b_varies: bool = True
    c_varies: bool = True
    decay: int = 0
    adjoint: bool = False
    pack: int = 1
    per_lane: int = 1
    lanes: int = 1
    warps: int = 1
    tile: int = TILE
    together: int = 8
    stages: int = 2
    row_slots: int = 4

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.warps * self.pack * cuda.WARP // self.lanes


@functools.lru_cache(maxsize=4096)
def shared_bytes(x: Choice) -> int:
    """Return the shared memory of a block, `struct Shared` of the source."""
    item, state = x.dtype.itemsize, x.state.itemsize
    real = state // 2 if x.state.is_complex else state
    matrix = state if x.state.is_complex else item
    states, channels, threads = x.per_lane * x.lanes, x.channels, cuda.WARP * x.warps
    held = x.pack * x.per_lane
    split = x.decay > 0 or (x.timed and x.state_only)
    step = real * (4 if split and x.scheme in ("zoh", "bilinear") else 2)
    steps = CHUNK if x.step == "backward" else x.tile

    def total(*pieces: tuple[bool, int]) -> int:
        return sum(-(-(bytes_ if there else 16) // 16) * 16 for there, bytes_ in pieces)

    sequence = steps * channels * item
    matrices_and_times = (
        (x.b_varies, steps * states * matrix), (x.c_varies, steps * states * matrix),
        (x.timed, steps * real),
    )  # fmt: skip
    stage_of_backward, slots = total(*matrices_and_times), CHUNK // SUB
    stage = total((True, sequence), (True, sequence), (x.decay == 2, sequence), *matrices_and_times)
    if x.step != "backward":
        wide, out = matrix != state, x.step == "forward"
        stage += total((x.gate, sequence))
        return stage * x.stages + total(
            (wide and x.b_varies, steps * states * state),
            (wide and x.c_varies, steps * states * state),
            (True, steps * channels * step), (out, steps * channels * real),
        )  # fmt: skip
    matrices = x.b_varies + x.c_varies
    word = SUB * channels  # elements of the lanes for SUB steps
    if channels // x.warps < 4:
        word = threads
    gain = x.scheme in ("zoh", "bilinear")
    in_place = x.softplus and item == real and not x.timed and not split
    rows = x.row_slots * SUB
    return stage_of_backward + total(
        (True, (slots + 1) * word * item), (True, (slots + 1) * word * item),
        (x.decay == 2, (slots + 1) * word * item),
        (True, 2 * word * item), (x.gate, 2 * word * item),
        (x.b_varies, steps * states * state), (x.c_varies, steps * states * state),
        (x.timed, steps * real), (True, steps * channels * real), (True, steps * channels * real),
        (split and gain, steps * channels * real),
        (True, SUB * channels * real), (x.gate, word * real),
        (x.softplus and not in_place, slots * word * real),
        (True, (2 + gain + x.gate) * (SUB * channels + 8 * x.warps) * real),
        (True, slots * held * threads * state),
        (matrices > 0, x.warps * rows * matrices * states * state),
        (x.timed, x.warps * rows * real), (True, (3 - matrices) * held * threads * state),
        (True, (2 + (x.decay == 1)) * word * real), (True, (2 + (x.decay == 1)) * channels * real),
    )  # fmt: skip


@functools.cache
def kernel(x: Choice) -> cuda.Kernel:
    """Return a kernel."""

    def flag(value: bool) -> str:
        return "true" if value else "false"

    shared = shared_bytes(x)
    definitions = {
        "DTYPE": cuda.NAMES[x.dtype], "STATE": cuda.NAMES[x.state], "SCHEME": x.scheme.upper(),
        "PER_LANE": x.per_lane, "LANES": x.lanes, "PACK": x.pack, "WARPS": x.warps,
        "SOFTPLUS": flag(x.softplus), "GATE": flag(x.gate),
        "RESET": flag(x.reset), "TIMED": flag(x.timed), "STATE_ONLY": flag(x.state_only),
        "B_VARIES": flag(x.b_varies), "C_VARIES": flag(x.c_varies), "DECAY": x.decay,
        "STAGES": x.stages, "TILE": x.tile, "TOGETHER": x.together,
        "BLOCKS": 1, "SHARED_BYTES": shared,
    }  # fmt: skip
    if x.adjoint:
        definitions["ADJOINT"] = "true"
    if x.step == "backward":
        definitions["ROW_SLOTS"] = x.row_slots
    files = {"forward": "scan", "backward": "scan_backward", "ends": "ends"}
    name = f"selective_{files[x.step]}"
    return cuda.Kernel(f"{name}.cu", name, definitions, LAYOUTS[x.step], shared)


@functools.lru_cache(maxsize=4096)
def choose(x: Choice, states: int, channels: int, pieces: int, limits: cuda.Limits) -> Choice:
    """Return x with the fields that depend on a size.

    How states and channels lie on lanes depends on how many there are, so that the chip is full;
    the order in which they are summed does not, so that a row's results, gradients included, do
    not depend on the batch around it.

    Args:
        x: what is computed.
        states: of a channel, in this launch.
        channels: of a piece: they share B and C.
        pieces: their number, over all batch elements and segments.
        limits: of the device.
    """
    backward = x.step == "backward"
    most = MOST["backward" if backward else "forward"][x.state.itemsize]
    padded = 1 << max(states - 1, 0).bit_length()
    wanted = WARPS_WANTED * limits.multiprocessors

    def lay(held: int) -> tuple[int, int, int]:
        """(pack, per_lane, lanes) where a lane holds so many states in all."""
        pack = 2 if backward and most >= 8 and padded >= 8 else 1
        per_lane = max(min(held // pack, padded), -(-padded // cuda.WARP))
        return pack, per_lane, padded // per_lane

    pack, per_lane, lanes = lay(most)
    rows = pack * cuda.WARP // lanes  # of a warp
    fewest = max(most // 2, min(most, 2))
    if pieces * -(-channels // rows) < wanted and fewest < most:
        pack, per_lane, lanes = lay(fewest)
    if backward:
        both = [x._replace(pack=p, per_lane=s, lanes=n) for p, s, n in (lay(most), lay(fewest))]
        block = min(64, 8 * both[1].pack * cuda.WARP // both[1].lanes)
        return _frugal(both, block, limits)[0 if per_lane == both[0].per_lane else 1]
    rows = pack * cuda.WARP // lanes
    warps = 2
    while warps > 1 and (warps // 2) * rows >= channels:
        warps //= 2
    x = x._replace(pack=pack, per_lane=per_lane, lanes=lanes, warps=warps)
    while shared_bytes(x) > limits.shared_per_block:
        if x.tile > SUB:
            x = x._replace(tile=x.tile // 2)
        elif x.warps > 1:
            x = x._replace(warps=x.warps // 2)
        else:
            break
    return x


def _frugal(layouts: list[Choice], block: int, limits: cuda.Limits) -> list[Choice]:
    """Return backwards with as much shared memory as costs no block of a multiprocessor.

    Args:
        layouts: of the same problem; they sum in one order.
        block: channels of a block, fewer where that many do not fit.
        limits: of the device.
    """
    layouts = [x._replace(warps=max(block * x.lanes // (x.pack * cuda.WARP), 1)) for x in layouts]

    def best(x: Choice) -> Choice | None:
        tries = [x, x._replace(row_slots=2), x._replace(row_slots=1)]
        fit = [y for y in tries if shared_bytes(y) <= limits.shared_per_block]
        blocks = [limits.shared // (shared_bytes(y) + RESERVED) for y in fit]
        wanted = min(max(blocks, default=0), MOST_THREADS // (cuda.WARP * x.warps))
        return next((y for y, n in zip(fit, blocks, strict=True) if n >= wanted), None)

    found = [y for x in layouts if (y := best(x)) is not None]
    if len(found) == len(layouts) or block == 1:
        return found or layouts
    return _frugal(layouts, block // 2, limits)


class Problem:
    """The arguments as the kernels take them."""

    def __init__(self, x: Arguments, gy: Tensor | None = None) -> None:
        u, A, B, C, decay_dt = x.u, x.A, x.B, x.C, x.decay_dt
        self.batch, (self.length, self.width) = u.shape[:-2], u.shape[-2:]
        self.states, self.scheme = A.shape[-1], x.scheme
        self.rows = math.prod(self.batch)
        self.shared_rows = math.prod(A.shape[:-2])
        real = torch.promote_types(torch.promote_types(u.dtype, A.real.dtype), torch.float32)
        self.real, self.state = real, torch.promote_types(real, A.dtype)
        varies = [t for t in (u, x.dt, x.z, gy) if t is not None]
        matrices = [t for t in (B, C) if self.varies(t)]
        if decay_dt is not None and self.varies(decay_dt, 1):
            varies.append(decay_dt)
        kinds = {t.dtype for t in varies}
        if not self.state.is_complex:
            kinds |= {t.dtype for t in matrices}
        self.dtype = u.dtype if kinds == {u.dtype} and _state(u.dtype) == real else real
        if self.states * self.state.itemsize > SLICE:
            self.dtype = real  # outputs of several launches are added
        self.softplus, self.state_only = x.softplus, x.state_only
        self.timed = x.timesteps is not None
        self.u, self.dt = _cast(u, self.dtype), _cast(x.dt, self.dtype)
        self.z, self.gy = (None if t is None else _cast(t, self.dtype) for t in (x.z, gy))
        self.decay, self.decay_dt = 0, decay_dt
        if decay_dt is not None:
            self.decay = 2 if self.varies(decay_dt, 1) else 1
            self.decay_dt = _cast(decay_dt, self.dtype if self.decay == 2 else real)
        self.B, self.C = self._matrix(B), self._matrix(C)
        self.timesteps = None if x.timesteps is None else _cast(x.timesteps, real)
        self.reset = x.reset
        self.A = aligned(_cast(A, self.state))
        self.D = None if x.D is None else _cast(x.D, real).contiguous()
        self.bias = None if x.dt_bias is None else _cast(x.dt_bias, real).contiguous()
        self.h0 = None if x.h0 is None else aligned(_cast(x.h0, self.state))
        per_group = [self.width // t.shape[-2] for t in (self.B, self.C)]
        sizes = [g for g, t in zip(per_group, (self.B, self.C), strict=True) if self.varies(t)]
        self.piece = math.gcd(*sizes) if sizes else self.width
        self.per_group = per_group
        self.inner, self.places = self._merged()

    def varies(self, t: Tensor, tail: int = 2) -> bool:
        """Return whether a tensor with so many axes after that of time varies in time."""
        return t.shape[-1 - tail] == self.length

    def _matrix(self, t: Tensor) -> Tensor:
        plain = self.varies(t) and not self.state.is_complex
        t = _cast(t, self.dtype if plain else self.state)
        return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()

    def _merged(self) -> tuple[int, dict[str, tuple[int, int]]]:
        """Merge the batch dimensions to (outer, inner); copy what does not allow it."""
        names = ("u", "dt", "z", "decay_dt", "B", "C", "timesteps", "reset", "gy")
        have = {n: t for n in names if (t := getattr(self, n)) is not None}
        d = len(self.batch)
        found = cuda.merge_batch(self.batch, [t.stride()[:d] for t in have.values()])
        if found is None:
            have = {n: t.contiguous() for n, t in have.items()}
            self.__dict__.update(have)
            found = cuda.merge_batch(self.batch, [t.stride()[:d] for t in have.values()])
        if found is None:  # contiguous tensors always merge
            raise RuntimeError("selective_scan: contiguous batch dimensions do not merge")
        inner, places = found
        return inner, dict(zip(have, places, strict=True))

    def _wide(self, t: Tensor, name: str, columns: int) -> bool:
        """Return whether rows of this many neighbours can be copied 16 bytes at a time."""
        size = t.itemsize
        steps = (*self.places[name], t.stride(len(self.batch)))
        if name in ("B", "C"):
            steps = (*steps, t.stride(-2))
        return (
            (t.stride(-1) == 1 or columns == 1)
            and columns * size % 16 == 0
            and t.data_ptr() % 16 == 0
            and all(s * size % 16 == 0 for s in steps)
        )

    def segments(self, device: int) -> tuple[int, int]:
        """Return (steps, number) of the segments of time.

        They depend on a row's size and the device alone, as does the order of operations.
        """
        whole = max(self.length, 1), 1
        if self.length < LONG:
            return whole
        padded = 1 << (self.states - 1).bit_length()
        warps = self.width * padded / (MOST["forward"][self.state.itemsize] * cuda.WARP)
        wanted = WARPS_WANTED * cuda.limits(device).multiprocessors / max(warps, 1)
        number = min(math.ceil(wanted), self.length // SHORTEST)
        if number < 2:
            return whole
        steps = -(-self.length // (number * CHUNK)) * CHUNK
        return steps, -(-self.length // steps)

    def inputs(
        self,
        first: int,
        states: int,
        parts: int,
        segments: tuple[int, int],
        h0: Tensor | None,
        adjoint: bool = False,
    ) -> list[int]:
        """Return the fields of `struct Inputs` for the states [first, first + states).

        Args:
            first: state.
            states: how many.
            parts: blocks of a piece.
            segments: (steps, number).
            h0: the state before every segment, compact.
            adjoint: whether gy stands in u's place and C in B's.
        """
        fields: list[int] = []
        wide = 0
        for bit, name in enumerate(("gy", *SEQUENCES[1:]) if adjoint else SEQUENCES):
            t = getattr(self, name)
            if t is None:
                fields += [0] * 5
                continue
            time = 0 if name == "decay_dt" and self.decay == 1 else t.stride(-2)
            fields += [t.data_ptr(), *self.places[name], time, t.stride(-1)]
            wide |= self._wide(t, name, self.piece) << bit
        if self.gy is not None:
            wide |= self._wide(self.gy, "gy", self.piece) << 6
        per_group = dict(zip("BC", self.per_group, strict=True))
        for bit, name in enumerate("CC" if adjoint else "BC", 4):
            t = getattr(self, name)
            fields += [
                t.data_ptr() + first * t.itemsize, *self.places[name],
                t.stride(-3) if self.varies(t) else 0, t.stride(-2), per_group[name],
            ]  # fmt: skip
            wide |= (self._wide(t, name, states) and first * t.itemsize % 16 == 0) << bit
        for name in ("timesteps", "reset"):
            t = getattr(self, name)
            fields += [0] * 4 if t is None else [t.data_ptr(), *self.places[name], t.stride(-1)]
        offset = first * self.state.itemsize
        vector = not (self.states * self.state.itemsize % 16 or offset % 16)
        pointers = [0 if t is None else t.data_ptr() for t in (self.D, self.bias)]
        if first:  # the direct path belongs to the first launch
            pointers[0] = 0
        return [
            *fields, self.A.data_ptr() + offset, *pointers,
            0 if h0 is None else h0.data_ptr() + offset,
            self.length, self.width, states, self.states, self.inner,
            self.rows // max(self.shared_rows, 1), self.piece, parts, *segments, wide, vector,
        ]  # fmt: skip

    def slices(self) -> list[tuple[int, int]]:
        """Return (first, states) of every launch."""
        most = SLICE // self.state.itemsize
        return [(n, min(most, self.states - n)) for n in range(0, self.states, most)]

    def choice(
        self, step: str, states: int, segments: int, device: int, adjoint: bool = False
    ) -> Choice:
        """Return the variant of a launch over so many states and segments."""
        ends = step == "ends"
        x = Choice(
            step, self.dtype, self.state, self.scheme, self.softplus,
            gate=self.z is not None and (adjoint or not ends),
            reset=self.reset is not None, timed=self.timed,
            state_only=self.timed and self.state_only,
            b_varies=self.varies(self.C if adjoint else self.B),
            c_varies=not ends and self.varies(self.C), decay=self.decay, adjoint=adjoint,
        )  # fmt: skip
        pieces = self.rows * segments * (self.width // self.piece)
        return choose(x, states, self.piece, pieces, cuda.limits(device))


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _state(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def aligned(t: Tensor) -> Tensor:
    """Return t compact and at a multiple of 16 bytes."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the variants that the library's models launch at ordinary sizes."""
    f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64

    def model(dtype: torch.dtype, state: torch.dtype, scheme: str = "mamba") -> Choice:
        return Choice("", dtype, state, scheme, softplus=True, gate=True)

    mamba = model(f32, f32)
    common = [mamba, model(bf16, f32)]
    others = [
        model(torch.float16, f32),
        model(f64, f64),
        mamba._replace(reset=True),
        *(model(f32, f32, scheme) for scheme in ("zoh", "bilinear", "dirac")),
        Choice("", f32, torch.complex64, "zoh"),
        mamba._replace(timed=True),  # lengths
        mamba._replace(timed=True, state_only=True, decay=1),  # STREAM
    ]
    found: list[cuda.Kernel] = []
    for step in ("forward", "backward"):
        sizes = [(x, rows) for x in common for rows in (64, 1)] + [(x, 64) for x in others]
        for x, rows in sizes:
            found.append(kernel(choose(x._replace(step=step), 16, 2048, rows, limits)))
    for x in common:
        ends = x._replace(step="ends", gate=False, c_varies=False)
        adjoint = ends._replace(gate=True, adjoint=True)
        found += [kernel(choose(y, 16, 2048, 64, limits)) for y in (ends, adjoint)]
    return list(dict.fromkeys(found))
