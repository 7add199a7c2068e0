# SPDX-License-Identifier: MIT
"""Time S5 on a GPU: the layer beside S5 in JAX, and its scan alone.

    python -m benchmarks.cuda.s5 [--json FILE] [--quick]

The layer is discretization, real product, scan on [re | im] halves, real product, feedthrough, with
gradients of u and of all parameters: captured in a CUDA graph, and `eager ...`. The floor is the
bytes of u and y, and backward of u and both gradients. JAX is the authors' form: products around
`jax.lax.associative_scan`, vmapped over the batch, jitted; its clock is the host's, over calls in
a row that are waited for together. Both run with products in float32, PyTorch's default, and in
TF32, JAX's.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda import timing
from benchmarks.cuda.timing import Row, Session, relative_error
from lrnnx_core import s5
from lrnnx_core.ops import diagonal_scan

BATCH, WIDTH = 32, 128
STORED = (16, 64)  # pairs
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
IN_A_ROW = 10


def run(params: dict[str, Tensor], u: Tensor) -> Tensor:
    """Run the layer as `lrnnx_nn.S5` does."""
    return s5.scan(params, u)[0]


def exact(params: dict[str, Tensor], u: Tensor) -> Tensor:
    """Return the layer's output for the first batch element, in float64."""
    wide = {k: v.detach().double() for k, v in params.items()}
    with torch.no_grad():
        return s5.scan(wide, u[:1].double(), mode="scan")[0]  # products in float64 at any setting


def layer(session: Session, params: dict[str, Tensor], u: Tensor, products: str) -> Row:
    """Time the layer eagerly and in a CUDA graph."""
    torch.set_float32_matmul_precision(products)
    try:
        return timed_layer(session, params, u)
    finally:
        torch.set_float32_matmul_precision("highest")


def timed_layer(session: Session, params: dict[str, Tensor], u: Tensor) -> Row:
    """Time it with products as they are set."""
    inputs = [t.detach().clone().requires_grad_() for t in (u, *params.values())]

    def forward() -> Tensor:
        with torch.no_grad():
            return run(params, u)

    def both() -> tuple[Tensor, ...]:
        x, *values = inputs
        return torch.autograd.grad(run(dict(zip(params, values, strict=True)), x), inputs, u)

    want = exact(params, u)
    found = {"error": relative_error(forward()[:1], want)}
    found["eager forward"], found["eager both"] = (
        session.median_ms(forward),
        session.median_ms(both),
    )
    found["forward"], found["both"] = session.graph_ms(forward), session.graph_ms(both)
    return found | {"peak_mib": session.peak_mib(both)}


def jax_layer(precision: str | None, session: Session, params: dict[str, Tensor], u: Tensor) -> Row:
    """Time the layer in JAX, products in the given precision."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    values = {k: jax.numpy.asarray(v.detach().cpu().numpy()) for k, v in params.items()}
    x = jax.numpy.asarray(u.cpu().numpy())

    def one(p: dict[str, Any], u: Any) -> Any:
        Lambda = p["Lambda_re"] + 1j * p["Lambda_im"]
        A_bar = jax.numpy.exp(Lambda * jax.numpy.exp(p["log_dt"]))
        B_bar = ((A_bar - 1) / Lambda)[:, None] * (p["B_re"] + 1j * p["B_im"])
        Bu = u.astype(B_bar.dtype) @ B_bar.T

        def combine(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
            return left[0] * right[0], right[0] * left[1] + right[1]

        A = jax.numpy.broadcast_to(A_bar, Bu.shape)
        _, states = jax.lax.associative_scan(combine, (A, Bu))
        C = p["C_re"] + 1j * p["C_im"]
        return 2 * (states @ C.T).real + p["D"] * u

    def forward(p: dict[str, Any], u: Any) -> Any:
        return jax.vmap(one, (None, 0))(p, u)

    def both(p: dict[str, Any], u: Any, g: Any) -> Any:
        y, pull = jax.vjp(forward, p, u)
        return y, pull(g)

    def timed(f: Callable[..., Any], *inputs: Any) -> float:
        jax.block_until_ready(f(*inputs))
        times = []
        for _ in range(1 if session.tiny else 7):
            start = time.perf_counter()
            jax.block_until_ready([f(*inputs) for _ in range(IN_A_ROW)][-1])
            times.append((time.perf_counter() - start) * 1e3 / IN_A_ROW)
        return statistics.median(times)

    with jax.default_matmul_precision(precision):
        y = torch.from_dlpack(jax.jit(forward)(values, x))
        return {
            "forward": timed(jax.jit(forward), values, x),
            "both": timed(jax.jit(both), values, x, x),
            "error": relative_error(y[:1], exact(params, u).to(y.device)),
        }


def scan_alone(session: Session, x: Tensor, A: Tensor) -> Row:
    """Time the operator on the drive x, a decay constant in time."""
    inputs = [t.detach().requires_grad_() for t in (x, A)]

    def forward() -> Tensor:
        with torch.no_grad():
            return diagonal_scan(x, A)[0]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(diagonal_scan(*inputs)[0], inputs, x)

    want = diagonal_scan(x[:1].double(), A.to(torch.complex128))[0]
    return {
        "forward": session.median_ms(forward),
        "both": session.median_ms(both),
        "error": relative_error(forward()[:1], want),
        "peak_mib": session.peak_mib(both),
    }


def measure(session: Session) -> None:
    """Measure every case."""
    batch, width, lengths = (2, 8, (40,)) if session.tiny else (BATCH, WIDTH, LENGTHS)
    for stored in (4,) if session.tiny else STORED:
        generator = torch.Generator(session.device).manual_seed(0)
        params = s5.init(width, 2 * stored, generator=generator, device=session.device)
        A_bar, _ = s5.discretize(params)
        for length in lengths:
            u = session.random(batch, length, width)
            floors = [session.floor_ms(n * u.nbytes) for n in (2, 5)]
            session.case(
                f"layer B{batch} H{width} P{stored} L{length}", floors,
                partial(layer, session, params, u, "highest"),
                peers={
                    "JAX": partial(jax_layer, "highest", session, params, u),
                    "JAX, TF32": partial(jax_layer, None, session, params, u),
                },
                others={"TF32": partial(layer, session, params, u, "high")},
            )  # fmt: skip
            x = session.random(batch, length, 2 * stored)
            session.case(
                f"scan B{batch} P{stored} L{length}",
                [session.floor_ms(n * x.nbytes) for n in (2, 5)],
                partial(scan_alone, session, x, A_bar),
            )


if __name__ == "__main__":
    sys.exit(timing.main(__doc__, measure))
