# SPDX-License-Identifier: MIT
"""Time S7 on a GPU: the full variant, whose matrices come from the input, and the delta variant.

    python -m benchmarks.cuda.s7 [--json FILE] [--quick]

The layer is `models.s7.scan` with gradients of u and of all parameters: captured in a CUDA graph,
and `eager ...`. "cuBLAS" forms the matrices of 64 MiB of samples at a time, without a kernel of its
own; "TF32" is the layer with TF32 products allowed. The floor is memory or arithmetic, whichever
takes longer: u and y, and backward u and both gradients; for the full variant 2 N H² multiply-adds
a sample forward and 7 in all, of three TF32 products each at 494.5 TFLOP/s (the data sheet of an
H100 SXM). The error is that of the first batch element against float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cuda import timing
from benchmarks.cuda.timing import Row, Session, relative_error
from lrnnx_core.backends import cuda_trilinear
from lrnnx_core.models import s7

RATE = 494.5e9 / 2 / 3  # float32 multiply-adds a millisecond


class Case(NamedTuple):
    """(batch, length, channels), states, variant."""

    shape: tuple[int, int, int]
    d_state: int = 16
    variant: Any = "full"


CASES = {
    "full B8 H128 N16 L2048": Case((8, 2048, 128)),
    "full B8 H256 N16 L2048": Case((8, 2048, 256)),
    "full B32 H128 N16 L2048": Case((32, 2048, 128)),
    "full B1 H128 N16 L2048": Case((1, 2048, 128)),
    "delta B8 H256 P16 L2048": Case((8, 2048, 256), 32, "delta"),
}


def floors(session: Session, case: Case, nbytes: int) -> list[float]:
    """Return the floors of forward, and of forward + backward."""
    batch, length, width = case.shape
    unit = batch * length * width**2 * case.d_state if case.variant == "full" else 0
    return [
        max(session.floor_ms(arrays * nbytes), units * unit / RATE)
        for arrays, units in ((2, 2), (5, 7))
    ]


def layer(session: Session, variant: Any, params: dict[str, Tensor], u: Tensor) -> Row:
    """Time the layer eagerly and in a CUDA graph."""
    inputs = [t.detach().clone().requires_grad_() for t in (u, *params.values())]

    def forward() -> Tensor:
        with torch.no_grad():
            return s7.scan(params, u, variant=variant)[0]

    def both() -> tuple[Tensor, ...]:
        x, *values = inputs
        y, _ = s7.scan(dict(zip(params, values, strict=True)), x, variant=variant)
        return torch.autograd.grad(y, inputs, u)

    with torch.no_grad():
        wide = {k: v.double() for k, v in params.items()}
        want, _ = s7.scan(wide, u[:1].double(), variant=variant)
    found = {"error": relative_error(forward()[:1], want)}
    found["eager forward"] = session.median_ms(forward)
    found["eager both"] = session.median_ms(both)
    found["forward"], found["both"] = session.graph_ms(forward), session.graph_ms(both)
    return found | {"peak_mib": session.peak_mib(both)}


def in_tf32(run: Callable[[], Row]) -> Row:
    """Run with TF32 products allowed."""
    torch.set_float32_matmul_precision("high")
    try:
        return run()
    finally:
        torch.set_float32_matmul_precision("highest")


def by_products(run: Callable[[], Row]) -> Row:
    """Run without the kernels of the trilinear form."""
    with mock.patch.object(cuda_trilinear, "possible", return_value=False):
        return run()


def measure(session: Session) -> None:
    """Measure every case."""
    for name, case in CASES.items():
        if session.tiny:
            case = case._replace(shape=(2, 40, 8))
        generator = torch.Generator(session.device).manual_seed(0)
        params = s7.init(
            case.shape[-1], case.d_state, variant=case.variant, generator=generator,
            device=session.device,
        )  # fmt: skip
        u = session.random(*case.shape)
        run = partial(layer, session, case.variant, params, u)
        others = {"TF32": partial(in_tf32, run)}
        if case.variant == "full":
            others["cuBLAS"] = partial(by_products, run)
        session.case(name, floors(session, case, u.nbytes), run, others=others)


if __name__ == "__main__":
    sys.exit(timing.main(__doc__, measure))
