# SPDX-License-Identifier: MIT
"""Time the linear scan on a GPU against what memory allows and against its peers.

    python -m benchmarks.cuda.linear_scan [--json FILE] [--quick]

The floor is the bytes a case must move: forward 3 arrays (2 where a is constant), backward 5 (3).
Every implementation is checked against float64 before it is timed.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.cuda import peers, timing
from benchmarks.cuda.timing import Row, Session, relative_error
from lrnnx_core.backends import blocked
from lrnnx_core.ops import linear_scan

F32, BF16, C64 = torch.float32, torch.bfloat16, torch.complex64
CASES: dict[str, tuple[tuple[int, int, int], torch.dtype, bool]] = {
    "16384 rows, L 4096": ((8, 4096, 2048), F32, False),
    "16384 rows, L 4096, constant a": ((8, 4096, 2048), F32, True),
    "256 rows, L 65536": ((1, 65536, 256), F32, False),
    "16384 rows, L 4096, bf16": ((8, 4096, 2048), BF16, False),
    "16384 rows, L 4096, complex64": ((8, 4096, 2048), C64, False),
    "256 rows, L 65536, complex64": ((1, 65536, 256), C64, False),
}
leaf = torch.ops.lrnnx_core.linear_scan.default
leaf_backward = torch.ops.lrnnx_core.linear_scan_backward.default


def problem(
    session: Session, shape: tuple[int, int, int], dtype: torch.dtype, constant: bool
) -> tuple[Tensor, Tensor]:
    """Return a with |a| < 1, and b."""
    batch, length, channels = shape
    real = F32 if dtype == BF16 else dtype
    a = session.random(batch, 1 if constant else length, channels, dtype=real, seed=1)
    return (a / (1 + a.abs())).to(dtype), session.random(*shape, dtype=dtype, seed=2)


def check(h: Tensor, a: Tensor, b: Tensor) -> float:
    """Return the relative error on the last 64 channels of the first batch element."""
    wide = torch.complex128 if b.is_complex() else torch.float64
    part = slice(-64, None)
    a, b = a[:1, :, part].to(wide), b[:1, :, part].to(wide)
    return relative_error(h[:1, :, part], blocked.linear_scan(a, b, None, None, False)[0])


def ours(session: Session, a: Tensor, b: Tensor) -> Row:
    h, last = leaf(a, b, None, None, False)
    error = check(h, a, b)

    def both() -> None:
        leaf(a, b, None, None, False)
        leaf_backward(a, h, None, None, b, last, False)

    return {
        "forward": session.median_ms(lambda: leaf(a, b, None, None, False)),
        "both": session.median_ms(both),
        "error": error,
        "peak_mib": session.peak_mib(both),
    }


def measure(session: Session) -> None:
    """Measure every case."""
    for name, (shape, dtype, constant) in CASES.items():
        batch, length, channels = shape
        small = (batch, min(length, 40), min(channels, 70))
        a, b = problem(session, small if session.tiny else shape, dtype, constant)
        forward = b.nbytes * 2 + a.nbytes
        floors = [
            session.floor_ms(forward),
            session.floor_ms(forward + 3 * b.nbytes + 2 * a.nbytes),
        ]
        others = {}
        if not constant:
            others["accelerated-scan (B,D,L)"] = peers.accelerated_scan
        if dtype == F32 and not constant:
            others |= {
                "torch.compile": peers.torch_compile,
                "FLA chunk_hgrn": peers.chunk_hgrn,
                "jax associative_scan": peers.jax,
            }
        bound = {who: partial(f, session, a, b, check) for who, f in others.items()}
        session.case(name, floors, partial(ours, session, a, b), bound)
        del a, b, bound
    a, b = problem(session, (2, 16, 8), F32, False)
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    session.note(
        "host_us",
        {
            "leaf": session.host_us(lambda: leaf(a, b, None, None, False)),
            "forward": session.host_us(lambda: linear_scan(x, y)),
            "forward_backward": session.host_us(
                lambda: torch.autograd.grad(linear_scan(x, y)[0], (x, y), b)
            ),
            "mul_forward_backward": session.host_us(lambda: torch.autograd.grad(x * y, (x, y), b)),
        },
    )


if __name__ == "__main__":
    sys.exit(timing.main(__doc__, measure))
