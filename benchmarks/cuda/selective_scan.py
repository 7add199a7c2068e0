# SPDX-License-Identifier: MIT
"""Time the selective scan on a GPU: with D, z, dt_bias and softplus, as Mamba calls it.

    python -m benchmarks.cuda.selective_scan [--json FILE]

"lrnnx-core" is the public function, forward without gradients and forward + backward with those of
every input; "leaves" are the two operators below it. Floors: forward moves u, dt, z and y (and B
and C), backward reads u, dt, z and the gradient of y and writes three gradients; or (N + 2)
exponentials a channel and step, twice in a training step, where that takes longer. MiB is what a
training step allocates. The output and the gradient of u are checked against float64 on 32 channels
first (at most 8192 steps; the gradient where all steps are among them).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cuda import timing
from benchmarks.cuda.timing import Row, Session, relative_error
from lrnnx_core.backends import blocked_selective
from lrnnx_core.ops import selective_scan

F32, BF16, C64 = torch.float32, torch.bfloat16, torch.complex64
CHECKED_CHANNELS, CHECKED_STEPS = 32, 8192
leaf = torch.ops.lrnnx_core.selective_scan.default
leaf_backward = torch.ops.lrnnx_core.selective_scan_backward.default


class Case(NamedTuple):
    """One case: (batch, length, width, states), dtype of the activations and of A, scheme."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    A: torch.dtype = F32
    scheme: str = "mamba"


CASES = {
    "B8 E2048 N16 L4096, fp32": Case((8, 4096, 2048, 16), F32),
    "B8 E2048 N16 L4096, bf16": Case((8, 4096, 2048, 16), BF16),
    "B1 E2048 N16 L65536, fp32": Case((1, 65536, 2048, 16), F32),
    "B1 E2048 N16 L65536, bf16": Case((1, 65536, 2048, 16), BF16),
    "B8 E2048 N16 L2048, zoh complex": Case((8, 2048, 2048, 16), F32, C64, "zoh"),
}
Problem = dict[str, Tensor]


def problem(session: Session, case: Case) -> Problem:
    """Return the arguments of the public function, with slices where a Mamba block has them."""
    batch, length, width, states = case.shape
    if session.tiny:
        length, width = min(length, 40), 36
    matrix = C64 if case.A.is_complex else case.dtype
    draw = session.random
    xz = draw(batch, length, 2 * width, dtype=case.dtype, seed=1)
    BC = draw(batch, length, 2 * states, dtype=matrix, seed=2)
    u, z = xz.chunk(2, dim=-1)
    B, C = BC.chunk(2, dim=-1)
    n = torch.arange(1.0, states + 1, device=session.device).expand(width, states)
    A = torch.complex(-n / 4, math.pi * n) if case.A.is_complex else -n.contiguous()
    # steps between 1e-3 and 1e-1, as Mamba starts
    bias = torch.linspace(math.log(1e-3), math.log(1e-1), width, device=session.device).exp()
    return {
        "u": u, "dt": 0.1 * draw(batch, length, width, dtype=case.dtype, seed=3), "A": A, "B": B,
        "C": C, "D": draw(width, seed=4), "z": z, "dt_bias": torch.log(torch.expm1(bias)),
    }  # fmt: skip


def operands(x: Problem) -> list[Tensor | None]:
    """Return the arguments of the leaves: B and C have a group axis."""
    B, C = x["B"].unsqueeze(-2), x["C"].unsqueeze(-2)
    first = [x["u"], x["dt"], x["A"], B, C, x["D"], x["z"], x["dt_bias"]]
    return [*first, None, None, None, None]


def check(case: Case, x: Problem, y: Tensor, gradient: Tensor, grad_y: Tensor) -> Row:
    """Return the errors of y, and of the gradient of u."""
    length = min(y.shape[1], CHECKED_STEPS)
    channels = slice(-CHECKED_CHANNELS, None)

    def part(name: str, t: Tensor) -> Tensor:
        t = t.to(torch.complex128 if t.is_complex() else torch.float64)
        if name in ("D", "dt_bias"):
            return t[channels]
        if name == "A":
            return t[channels]
        return t[:1, :length] if name in ("B", "C") else t[:1, :length, channels]

    exact = operands({k: part(k, v) for k, v in x.items()})
    choices = (True, False, case.scheme)
    want, last, kept = blocked_selective.selective_scan(*exact, *choices, True)
    row = {"error": relative_error(y[:1, :length, channels], want)}
    if length == y.shape[1]:
        found = blocked_selective.selective_scan_backward(
            kept, part("u", grad_y), torch.zeros_like(last), *exact, *choices
        )
        row["error of du"] = relative_error(gradient[:1, :, channels], found.u)
    return row


def public(session: Session, case: Case, x: Problem) -> Row:
    inputs = {k: v.detach().requires_grad_() for k, v in x.items()}
    grad_y = session.random(*x["u"].shape, dtype=case.dtype, seed=9)

    def forward() -> Tensor:
        with torch.no_grad():
            return selective_scan(**x, softplus=True, discretization=case.scheme)[0]

    def both() -> tuple[Tensor, ...]:
        y, _ = selective_scan(**inputs, softplus=True, discretization=case.scheme)
        return torch.autograd.grad(y, tuple(inputs.values()), grad_y)

    errors = check(case, x, forward(), both()[0], grad_y)
    return {
        "forward": session.median_ms(forward),
        "both": session.median_ms(both),
        "peak_mib": session.peak_mib(both),
        **errors,
    }


def leaves(session: Session, case: Case, x: Problem) -> Row:
    tensors = operands(x)
    choices = (True, False, case.scheme)
    y, last, kept = leaf(*tensors, *choices, True)
    grad_last = torch.zeros_like(last)

    def both() -> Any:
        leaf(*tensors, *choices, True)
        return leaf_backward(kept, y, grad_last, *tensors, *choices)

    return {
        "forward": session.median_ms(lambda: leaf(*tensors, *choices, False)),
        "both": session.median_ms(both),
    }


def floors(session: Session, case: Case, x: Problem) -> list[float]:
    numbers, states = x["u"].numel(), case.shape[-1]
    item, matrices = x["u"].itemsize, x["B"].numel() * x["B"].itemsize * 2
    exponentials = numbers * (states + 2)
    forward = 4 * numbers * item + matrices
    return [
        session.floor_ms(forward, exponentials),
        session.floor_ms(forward + 7 * numbers * item + 2 * matrices, 2 * exponentials),
    ]


def measure(session: Session) -> None:
    """Measure every case."""
    for name, case in CASES.items():
        x = problem(session, case)
        others: dict[str, Callable[[], Row]] = {"leaves": partial(leaves, session, case, x)}
        session.case(
            name, floors(session, case, x), partial(public, session, case, x), others=others
        )
        del x, others
    x = problem(session, Case((2, 16, 32, 16), F32))
    inputs = {k: v.detach().requires_grad_() for k, v in x.items()}
    tensors = operands(x)

    def forward() -> Tensor:
        return selective_scan(**inputs, softplus=True)[0]

    session.note(
        "host_us",
        {
            "leaf": session.host_us(lambda: leaf(*tensors, True, False, "mamba", False)),
            "forward": session.host_us(forward),
            "forward_backward": session.host_us(
                lambda: torch.autograd.grad(forward().sum(), tuple(inputs.values()))
            ),
        },
    )


if __name__ == "__main__":
    sys.exit(timing.main(__doc__, measure))
