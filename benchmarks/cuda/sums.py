# SPDX-License-Identifier: MIT
"""Time the sums that S4D's, Centaurus' and S4's kernels are, `ops.vandermonde` and `ops.cauchy`.

    python -m benchmarks.cuda.sums [--json FILE] [--quick]

Forward without gradients, forward + backward with those of every input, from nodes and weights of
S4D and S4 at H channels and N states (pairs, where they are complex). "torch, in blocks" is the
operator without its kernels: tables of bounded size and cuBLAS. "torch, whole matrix" is the sum
as it is written, with a number for every channel, state and sample. The floor is arithmetic or
memory, whichever takes longer: the operations, fused where they can be, that a state and sample
(a state and frequency) take, at 33.5e12 a second (the data sheet of an H100 SXM), or the result
written, and for gradients read. "x K" is the memory that a training step allocates, in sizes of the
result. The error is that of the forward against float64, on 16 channels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cuda import timing
from benchmarks.cuda.timing import Row, Session, relative_error
from lrnnx_core import ops
from lrnnx_core.backends import cuda

RATE = 33.5e9  # fused multiply-adds a millisecond
CHECKED = 16
Context = Callable[[], AbstractContextManager[object]]


class Case(NamedTuple):
    """A sum, its sizes, and whether nodes are complex."""

    op: str
    channels: int
    states: int
    length: int
    rows: int = 1
    is_complex: bool = True

    @property
    def pairs(self) -> float:
        """States times samples, or frequencies, of all channels."""
        count = self.length if self.op == "vandermonde" else self.length // 2 + 1
        return self.channels * self.states * count

    @property
    def operations(self) -> tuple[float, float]:
        """Operations forward, and forward + backward: two and four products a part, or D's."""
        if self.op == "vandermonde":
            forward = self.rows * (2 if self.is_complex else 1)
            return forward * self.pairs, 3 * forward * self.pairs
        forward = 6 + 4 * self.rows
        return forward * self.pairs, (forward + 17 + 8 * self.rows) * self.pairs


CASES = {
    "vandermonde H1024 N64 L16384": Case("vandermonde", 1024, 64, 16384),
    "vandermonde H512 N32 L4096": Case("vandermonde", 512, 32, 4096),
    "vandermonde H1024 N32 L1024": Case("vandermonde", 1024, 32, 1024),
    "vandermonde H256 N32 L65536": Case("vandermonde", 256, 32, 65536),
    "vandermonde H4096 N1 L4096": Case("vandermonde", 4096, 1, 4096),
    "vandermonde H512 N64 L4096, real": Case("vandermonde", 512, 64, 4096, is_complex=False),
    "cauchy H1024 N64 L16384": Case("cauchy", 1024, 64, 16384),
    "cauchy H1024 N32 L16384, 4 rows": Case("cauchy", 1024, 32, 16384, 4),
    "cauchy H256 N32 L1024, 4 rows": Case("cauchy", 256, 32, 1024, 4),
}


def floors(session: Session, case: Case) -> list[float]:
    """Return the floors of forward, and of forward + backward."""
    count = case.length if case.op == "vandermonde" else 2 * (case.length // 2 + 1)
    result = 4 * case.rows * case.channels * count
    return [
        max(session.floor_ms(times * result), operations / RATE)
        for times, operations in zip((1, 2), case.operations, strict=True)
    ]


def inputs(session: Session, case: Case) -> tuple[Tensor, ...]:
    """Return v (R, H, N) and z (H, N), and for the Cauchy sums a (H,)."""
    like = {"device": session.device, "dtype": torch.float64}
    step = torch.logspace(-3, -1, case.channels, **like).unsqueeze(-1)
    rate = torch.full((case.channels, case.states), -0.5, **like)
    z = torch.complex(rate, math.pi * torch.arange(case.states, **like) + 0 * rate)
    z = z if case.is_complex else rate * (1 + torch.arange(case.states, **like))
    single = torch.complex64 if case.is_complex else torch.float32
    v = session.random(case.rows, case.channels, case.states, dtype=single)
    if case.op == "vandermonde":
        return v, (z * step).to(single)
    return v, z.to(single), (2 / step.squeeze(-1)).float()


def measured(
    session: Session, case: Case, backend: str, around: Context, tensors: tuple[Tensor, ...]
) -> Row:
    """Return times, memory and the error of one implementation."""
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    run = partial(getattr(ops, case.op), length=case.length)

    def forward() -> Tensor:
        with torch.no_grad(), around():
            return run(*tensors, backend=backend)

    def both() -> tuple[Tensor, ...]:
        with around():
            y = run(*leaves, backend=backend)
            return torch.autograd.grad(y, leaves, upstream)

    upstream = forward()
    wide = [t.to(torch.promote_types(t.dtype, torch.float64)) for t in _few(case, tensors)]
    with mock.patch.object(cuda, "ready", return_value=False):
        want = run(*wide)
    row = {
        "forward": session.median_ms(forward),
        "error": relative_error(upstream[..., :CHECKED], want),
    }
    try:
        row |= {"both": session.median_ms(both), "peak_mib": session.peak_mib(both)}
    except torch.OutOfMemoryError:
        if backend == "auto":
            raise
        torch.cuda.empty_cache()
        return row
    return row | {"x K": row["peak_mib"] * 2**20 / upstream.nbytes}


def _few(case: Case, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    v, z, *rest = tensors
    return [v[:, :CHECKED], z[:CHECKED], *(t[:CHECKED] for t in rest)]


def measure(session: Session) -> None:
    """Measure every case."""
    without: Context = partial(mock.patch.object, cuda, "ready", return_value=False)
    for name, full in CASES.items():
        case = full._replace(channels=20, length=100) if session.tiny else full
        tensors = inputs(session, case)
        run = partial(measured, session, case)
        session.case(
            name, floors(session, case), partial(run, "auto", nullcontext, tensors),
            peers={"torch, whole matrix": partial(run, "reference", nullcontext, tensors)},
            others={"torch, in blocks": partial(run, "auto", without, tensors)},
        )  # fmt: skip
        session.synchronize()


if __name__ == "__main__":
    sys.exit(timing.main(__doc__, measure))
