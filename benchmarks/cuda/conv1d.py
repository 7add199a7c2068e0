# SPDX-License-Identifier: MIT
"""Time the short depthwise convolution with SiLU on a GPU: 4 taps, as Mamba has it.

    python -m benchmarks.cuda.conv1d [--json FILE] [--quick]

The floor is the bytes: forward reads x and writes y; backward reads x and the gradient of y and
writes that of x. The peer is `torch.nn.functional.conv1d` with `silu` on (batch, channels, L).
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cuda import timing
from benchmarks.cuda.timing import Row, Session, relative_error
from lrnnx_core.ops import causal_conv1d

F32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "B8 L4096 C2048 K4, fp32": ((8, 4096, 2048), F32),
    "B8 L4096 C2048 K4, bf16": ((8, 4096, 2048), BF16),
}
TAPS = 4


def in_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve (batch, channels, L)."""
    y = F.conv1d(x, weight, bias, padding=TAPS - 1, groups=x.shape[1])
    return F.silu(y[..., : x.shape[-1]])


def measured(session: Session, f: partial[Tensor], x: Tensor, *rest: Tensor) -> Row:
    """Time f forward without gradients, and forward + backward with those of every input."""
    inputs = [t.detach().requires_grad_() for t in (x, *rest)]

    def forward() -> Tensor:
        with torch.no_grad():
            return f(x, *rest)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(f(*inputs), inputs, x)

    return {
        "forward": session.median_ms(forward),
        "both": session.median_ms(both),
        "peak_mib": session.peak_mib(both),
    }


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Return the error of y (batch, L, channels) on the first batch element."""
    exact = in_torch(x[:1].double().transpose(1, 2), weight.double(), bias.double())
    return relative_error(y[:1], exact.transpose(1, 2))


def ours(session: Session, x: Tensor, weight: Tensor, bias: Tensor) -> Row:
    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, activation="silu")[0]

    error = check(f(x, weight, bias), x, weight, bias)
    return {**measured(session, partial(f), x, weight, bias), "error": error}


def peer(session: Session, x: Tensor, weight: Tensor, bias: Tensor) -> Row:
    turned = x.transpose(1, 2).contiguous()
    error = check(in_torch(turned, weight, bias).transpose(1, 2), x, weight, bias)
    return {**measured(session, partial(in_torch), turned, weight, bias), "error": error}


def measure(session: Session) -> None:
    """Measure every case."""
    for name, (shape, dtype) in CASES.items():
        batch, length, channels = (2, 20, 12) if session.tiny else shape
        x = session.random(batch, length, channels, dtype=dtype, seed=1)
        weight = session.random(channels, 1, TAPS, dtype=dtype, seed=2) / 2
        bias = session.random(channels, dtype=dtype, seed=3)
        floors = [session.floor_ms(2 * x.nbytes), session.floor_ms(5 * x.nbytes)]
        arguments = (session, x, weight, bias)
        session.case(name, floors, partial(ours, *arguments),
                     {"torch conv1d (B,C,L)": partial(peer, *arguments)})  # fmt: skip


if __name__ == "__main__":
    sys.exit(timing.main(__doc__, measure))
