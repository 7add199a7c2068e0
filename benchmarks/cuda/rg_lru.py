# SPDX-License-Identifier: MIT
"""Time the RG-LRU's gates and recurrence in one operator on a GPU.

    python -m benchmarks.cuda.rg_lru [--json FILE] [--quick]

The floor is the bytes: forward reads x and two gates and writes h; backward reads those, h and the
gradient of h, and writes three gradients. "linear_scan" is the same recurrence as separate
operations: gates in PyTorch, then the linear scan.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cuda import timing
from benchmarks.cuda.timing import Row, Session, relative_error
from lrnnx_core.ops import linear_scan, rg_lru_scan

F32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "B8 L4096 W2048, fp32": ((8, 4096, 2048), F32),
    "B8 L4096 W2048, bf16": ((8, 4096, 2048), BF16),
    "B1 L65536 W2560, bf16": ((1, 65536, 2560), BF16),
}
CHECKED_CHANNELS, CHECKED_STEPS = 32, 4096


def composed(x: Tensor, input_gate: Tensor, recurrent_gate: Tensor, rate: Tensor) -> Tensor:
    """Compute the gates in PyTorch, in at least float32, and scan."""
    wide = torch.promote_types(x.dtype, F32)
    log_a = -rate.to(wide) * torch.sigmoid(recurrent_gate.to(wide))
    b = torch.sqrt(-torch.expm1(2 * log_a)) * torch.sigmoid(input_gate.to(wide)) * x.to(wide)
    return linear_scan(log_a.exp(), b)[0].to(x.dtype)


def fused(x: Tensor, input_gate: Tensor, recurrent_gate: Tensor, rate: Tensor) -> Tensor:
    """Compute the same in one operator."""
    return rg_lru_scan(x, input_gate, recurrent_gate, rate)[0]


def measured(session: Session, f: Callable[..., Tensor], inputs: list[Tensor]) -> Row:
    recorded = [t.detach().requires_grad_() for t in inputs]

    def forward() -> Tensor:
        with torch.no_grad():
            return f(*inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(f(*recorded), recorded, inputs[0])

    part = [t[:1, :CHECKED_STEPS, -CHECKED_CHANNELS:].double() for t in inputs[:3]]
    with torch.no_grad():
        want = composed(*part, inputs[3][-CHECKED_CHANNELS:].double())
    got = forward()[:1, :CHECKED_STEPS, -CHECKED_CHANNELS:]
    return {
        "forward": session.median_ms(forward),
        "both": session.median_ms(both),
        "error": relative_error(got, want),
        "peak_mib": session.peak_mib(both),
    }


def measure(session: Session) -> None:
    """Measure every case."""
    for name, (shape, dtype) in CASES.items():
        batch, length, width = (2, 20, 12) if session.tiny else shape
        inputs = [session.random(batch, length, width, dtype=dtype, seed=i) for i in range(3)]
        inputs.append(8 * torch.linspace(0.0, 1.0, width + 1, device=session.device)[1:])
        nbytes = inputs[0].nbytes
        floors = [session.floor_ms(4 * nbytes), session.floor_ms(12 * nbytes)]
        session.case(
            name, floors, partial(measured, session, fused, inputs),
            others={"linear_scan": partial(measured, session, composed, inputs)},
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(timing.main(__doc__, measure))
