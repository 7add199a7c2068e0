# SPDX-License-Identifier: MIT
"""Scans of other libraries, as functions of a and b (batch, L, channels) to be timed.

Each is imported when it is called. accelerated-scan keeps time last; the transposition is no part
of what is timed. chunk_hgrn takes log a, so it gets |a|.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.timing import Row, Session

Check = Callable[[Tensor, Tensor, Tensor], float]


def torch_compile(session: Session, a: Tensor, b: Tensor, check: Check) -> Row:
    """torch.compile of the associative scan; its backward is not differentiable that way."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(x: Any, y: Any) -> Any:
        return y[0] * x[0], y[0] * x[1] + y[1]

    def scan(a: Tensor, b: Tensor) -> Tensor:
        return associative_scan(combine, (a, b), dim=1, combine_mode="pointwise")[1]

    f = torch.compile(scan)
    error = check(f(a, b), a, b)
    return {"forward": session.median_ms(lambda: f(a, b), 11), "error": error}


def differentiable(
    session: Session, f: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> Row:
    """Time a function of two tensors forward, and forward + backward."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()

    def both() -> Any:
        h = f(x, y)
        return torch.autograd.grad(h, (x, y), y.detach())

    def forward() -> Tensor:
        with torch.no_grad():
            return f(x, y)

    return {"forward": session.median_ms(forward, 11), "both": session.median_ms(both, 11)}


def accelerated_scan(session: Session, a: Tensor, b: Tensor, check: Check) -> Row:
    """accelerated-scan's Triton kernel, (batch, channels, L)."""
    if a.is_complex():
        from accelerated_scan.complex import scan
    else:
        from accelerated_scan.scalar import scan
    x, y = (t.expand(b.shape).transpose(1, 2).contiguous() for t in (a, b))
    error = check(scan(x, y).transpose(1, 2), a, b)
    return {**differentiable(session, scan, x, y), "error": error}


def chunk_hgrn(session: Session, a: Tensor, b: Tensor, check: Check) -> Row:
    """flash-linear-attention's chunked HGRN: h_t = exp(g_t) h_{t-1} + x_t."""
    from fla.ops.hgrn import chunk_hgrn as scan

    g = a.abs().log()
    error = check(scan(b, g)[0], a.abs(), b)
    return {**differentiable(session, lambda x, y: scan(x, y)[0], b, g), "error": error}


def jax(session: Session, a: Tensor, b: Tensor, check: Check) -> Row:
    """jax.lax.associative_scan under jit; the clock is the host's, around a synchronous call."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    x, y = (jax.dlpack.from_dlpack(t.detach()) for t in (a, b))

    def scan(x: Any, y: Any) -> Any:
        def combine(p: Any, q: Any) -> Any:
            return q[0] * p[0], q[0] * p[1] + q[1]

        return jax.lax.associative_scan(combine, (x, y), axis=1)[1]

    def both(x: Any, y: Any, g: Any) -> Any:
        h, pull = jax.vjp(scan, x, y)
        return h, pull(g)

    def timed(f: Any, *inputs: Any) -> float:
        f(*inputs)
        times = []
        for _ in range(1 if session.tiny else 11):
            jax.block_until_ready(inputs)
            start = time.perf_counter()
            jax.block_until_ready(f(*inputs))
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)

    error = check(torch.from_dlpack(jax.jit(scan)(x, y)), a, b)
    return {"forward": timed(jax.jit(scan), x, y), "both": timed(jax.jit(both), x, y, y),
            "error": error}  # fmt: skip
