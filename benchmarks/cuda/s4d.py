# SPDX-License-Identifier: MIT
"""Time an S4D layer on a GPU: its fused scan, its convolution, and what `auto` takes.

    python -m benchmarks.cuda.s4d [--json FILE] [--quick]

Each time is `models.s4d.scan` with 64 real states a channel (32 pairs) unless the case says
otherwise, forward without gradients and forward + backward with those of the input and of every
parameter: captured in a CUDA graph, and `eager ...`. The floor is arithmetic or memory, whichever
takes longer: 6 multiply-adds a pair and step forward and 14 backward at 33.5e12 a second (the data
sheet of an H100 SXM), or 2 arrays forward and 5 in all. "x input" is the memory that a training
step allocates, in sizes of the input. The error is that of the output against float64, on 16
channels.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cuda import timing
from benchmarks.cuda.timing import Row, Session, relative_error
from lrnnx_core.models import s4d

F32, BF16 = torch.float32, torch.bfloat16
RATE = 33.5e9  # fused multiply-adds a millisecond
CHECKED = 16
MODES = ("scan", "conv")


class Case(NamedTuple):
    """(batch, length, channels), real states a channel, dtype of the input."""

    shape: tuple[int, int, int]
    d_state: int = 64
    dtype: torch.dtype = F32
    is_real: bool = False


CASES = {
    "B16 H512 L4096": Case((16, 4096, 512)),
    "B16 H512 L4096, bf16": Case((16, 4096, 512), dtype=BF16),
    "B16 H1024 L16384": Case((16, 16384, 1024)),
    "B32 H128 L1024": Case((32, 1024, 128)),
    "B8 H256 L2048, 8 pairs": Case((8, 2048, 256), 16),
    "B8 H256 L2048, 128 pairs": Case((8, 2048, 256), 256),
    "B1 H256 L16384": Case((1, 16384, 256)),
    "B1 H256 L65536": Case((1, 65536, 256)),
    "B4 H512 L4096, 16 real states": Case((4, 4096, 512), 16, is_real=True),
}


def floors(session: Session, case: Case, nbytes: int) -> list[float]:
    """Return the floors of forward, and of forward + backward."""
    batch, length, channels = case.shape
    steps = batch * length * channels * (case.d_state if case.is_real else case.d_state // 2)
    forward, both = (2, 7) if case.is_real else (6, 20)
    return [
        max(session.floor_ms(2 * nbytes), forward * steps / RATE),
        max(session.floor_ms(5 * nbytes), both * steps / RATE),
    ]


def measured(session: Session, case: Case, mode: Any, u: Tensor, params: dict[str, Tensor]) -> Row:
    """Return times, memory and the error of one mode."""
    recorded = {k: t.detach().requires_grad_() for k, t in params.items()}
    x = u.detach().requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return s4d.scan(params, u, mode=mode)[0]

    def both() -> tuple[Tensor, ...]:
        y, _ = s4d.scan(recorded, x, mode=mode)
        return torch.autograd.grad(y, (x, *recorded.values()), u)

    want = _exact(params, u)
    row = {
        "eager forward": session.median_ms(forward),
        "eager both": session.median_ms(both),
        "error": relative_error(forward()[..., :CHECKED], want),
        "peak_mib": session.peak_mib(both),
    }
    row["forward"], row["both"] = session.graph_ms(forward), session.graph_ms(both)
    return row | {"x input": row["peak_mib"] * 2**20 / u.nbytes}


def _exact(params: dict[str, Tensor], u: Tensor) -> Tensor:
    part = {k: t[:CHECKED].double() for k, t in params.items()}
    with torch.no_grad():
        return s4d.scan(part, u[..., :CHECKED].double(), mode="conv")[0]


def measure(session: Session) -> None:
    """Measure every case."""
    for name, case in CASES.items():
        batch, length, channels = (2, 40, 20) if session.tiny else case.shape
        generator = torch.Generator(session.device).manual_seed(0)
        params = s4d.init(
            channels, case.d_state, is_real=case.is_real, A_init="real" if case.is_real else "lin",
            generator=generator, device=session.device,
        )  # fmt: skip
        u = session.random(batch, length, channels, dtype=case.dtype)

        runs = {m: partial(measured, session, case, m, u, params) for m in ("auto", *MODES)}
        others = {f"mode {m}": runs[m] for m in MODES}
        session.case(name, floors(session, case, u.nbytes), runs["auto"], others=others)


if __name__ == "__main__":
    sys.exit(timing.main(__doc__, measure))
