# SPDX-License-Identifier: MIT
"""The linear scan h_t = a_t h_{t-1} + b_t on the CPU, channels last.

python -m benchmarks.cpu linear_scan
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.timing import OURS, PLAIN, Session, Way, jax_way, torch_way
from lrnnx_core.ops import linear_scan


def ours(a: Tensor, b: Tensor) -> Tensor:
    return linear_scan(a, b)[0]


def mambapy(a: Tensor, b: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    return pscan(a.unsqueeze(-1), b.unsqueeze(-1)).squeeze(-1)


def torch_loop(a: Tensor, b: Tensor) -> Tensor:
    h, hs = torch.zeros_like(b[:, 0]), []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_t * h + b_t
        hs.append(h)
    return torch.stack(hs, dim=1)


def jax_scan(a: Any, b: Any) -> Any:
    import jax

    def step(h: Any, ab: tuple[Any, Any]) -> tuple[Any, Any]:
        h = ab[0] * h + ab[1]
        return h, h

    _, h = jax.lax.scan(step, b[:, 0] * 0, (a.swapaxes(0, 1), b.swapaxes(0, 1)))
    return h.swapaxes(0, 1)


def jax_associative(a: Any, b: Any) -> Any:
    import jax

    def combine(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (a, b), axis=1)[1]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    b = torch.randn(shape, generator=g, dtype=dtype)
    size = 0.9 + 0.0999 * torch.rand(shape, generator=g)
    if not dtype.is_complex:
        return size.to(dtype), b
    return torch.polar(size, 3 * torch.rand(shape, generator=g)).to(dtype), b


def measure(session: Session) -> None:
    B, L, D = (2, 33, 16) if session.tiny else (8, 1024, 512)
    a, b = inputs((B, L, D), torch.float32)
    out = torch.empty_like(b)
    size = b.nbytes
    session.case(
        f"real, B{B} L{L} D{D}",
        (session.floor_ms(3 * size), session.floor_ms(8 * size)),
        {
            OURS: lambda: torch_way(ours, a, b),
            PLAIN: lambda: torch_way(ours, a, b, plain=True),
            "torch.add, out given": lambda: Way(lambda: torch.add(a, b, out=out)),
            "torch.add, fresh output": lambda: Way(lambda: torch.add(a, b)),
            "step loop, torch": lambda: torch_way(torch_loop, a, b),
            "mambapy pscan": lambda: torch_way(mambapy, a, b),
            "jax lax.scan": lambda: jax_way(jax_scan, a, b),
            "jax associative_scan": lambda: jax_way(jax_associative, a, b),
        },
    )
    c, d = inputs((B, L, D // 2), torch.complex64)
    session.case(
        f"complex, B{B} L{L} D{D // 2}",
        (session.floor_ms(3 * size), session.floor_ms(8 * size)),
        {
            OURS: lambda: torch_way(ours, c, d),
            PLAIN: lambda: torch_way(ours, c, d, plain=True),
            "jax lax.scan": lambda: jax_way(jax_scan, c, d),
            "jax associative_scan": lambda: jax_way(jax_associative, c, d),
        },
    )

    def at(who: str, length: int) -> Way:
        a, b = inputs((1, length, 128), torch.float32)
        if who.startswith("jax"):
            return jax_way(jax_scan if "lax" in who else jax_associative, a, b)
        if who == "mambapy pscan":
            return torch_way(mambapy, a, b)
        return torch_way(ours, a, b, plain=who == PLAIN)

    session.curve(
        "real, B1 D128",
        [2**n for n in range(8, 21, 2)],
        at,
        (OURS, PLAIN, "jax lax.scan", "jax associative_scan", "mambapy pscan"),
        lambda n: (session.floor_ms(3 * 512 * n), session.floor_ms(8 * 512 * n)),
    )
