# SPDX-License-Identifier: MIT
"""The selective scan of Mamba on the CPU.

    python -m benchmarks.cpu selective_scan

transformers' slow path is the loop over time that it runs without its CUDA packages; its training
time grows with the square of the length, so it is trained at a short one only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.timing import OURS, PLAIN, Session, Way, jax_way, torch_way
from lrnnx_core.ops import selective_scan

Inputs = tuple[Tensor, ...]


def inputs(batch: int, length: int, width: int, states: int) -> Inputs:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return (
        draw(batch, length, width),
        draw(batch, length, width) - 3,
        -torch.arange(1, states + 1.0).repeat(width, 1),
        draw(batch, length, states),
        draw(batch, length, states),
        torch.ones(width),
    )


def ours(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return selective_scan(u, dt, A, B, C, D, softplus=True)[0]


def gated(*inputs: Tensor) -> Tensor:
    *scan, z, bias = inputs
    u, dt, A, B, C, D = scan
    return selective_scan(u, dt, A, B, C, D, z, bias, softplus=True)[0]


def mambapy(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    delta = torch.nn.functional.softplus(dt)
    a = torch.exp(delta.unsqueeze(-1) * A)
    b = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
    return (pscan(a, b) @ C.unsqueeze(-1)).squeeze(3) + D * u


def transformers(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    delta = torch.nn.functional.softplus(dt)
    a = torch.exp(delta.unsqueeze(-1) * A)
    b = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
    h = torch.zeros_like(b[:, 0])
    outputs = []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        outputs.append(torch.matmul(h, C[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1) + D * u


def jax_scan(u: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    import jax
    import jax.numpy as jnp

    def step(h: Any, x: Any) -> tuple[Any, Any]:
        u_t, delta, B_t, C_t = x
        h = jnp.exp(delta[..., None] * A) * h + (delta * u_t)[..., None] * B_t[:, None]
        return h, (h * C_t[:, None]).sum(-1)

    delta = jax.nn.softplus(dt)
    time_first = tuple(x.swapaxes(0, 1) for x in (u, delta, B, C))
    _, y = jax.lax.scan(step, jnp.zeros((u.shape[0], *A.shape)), time_first)
    return y.swapaxes(0, 1) + D * u


def without_training(way: Way) -> Way:
    return way._replace(train=None)


def measure(session: Session) -> None:
    for B, L, E, N in (
        ((2, 33, 32, 4),) if session.tiny else ((4, 256, 256, 16), (4, 1024, 256, 16))
    ):
        x = inputs(B, L, E, N)
        exps = B * L * E * (N + 1)
        moved = 3 * x[0].nbytes
        long = L > 256

        def loop(x: Inputs = x, long: bool = long) -> Way:
            way = torch_way(transformers, *x)
            return without_training(way) if long else way

        session.case(
            f"B{B} L{L} E{E} N{N}",
            (session.floor_ms(moved, exps), session.floor_ms(3 * moved, exps)),
            {
                OURS: lambda x=x: torch_way(ours, *x),
                PLAIN: lambda x=x: torch_way(ours, *x, plain=True),
                "mambapy": lambda x=x: torch_way(mambapy, *x),
                "transformers, slow path": loop,
                "jax lax.scan": lambda x=x: jax_way(jax_scan, *x),
            },
        )
    g = torch.Generator().manual_seed(1)
    more = (*x, torch.randn(x[0].shape, generator=g), torch.randn(E, generator=g))
    session.case(
        f"B{B} L{L} E{E} N{N}, z and bias",
        (
            session.floor_ms(4 * x[0].nbytes, exps + B * L * E),
            session.floor_ms(11 * x[0].nbytes, exps + B * L * E),
        ),
        {
            OURS: lambda: torch_way(gated, *more),
            PLAIN: lambda: torch_way(gated, *more, plain=True),
        },
    )

    def at(who: str, length: int) -> Way:
        x = inputs(1, length, 64, 16)
        if who == "jax lax.scan":
            return jax_way(jax_scan, *x)
        if who == "mambapy":
            return torch_way(mambapy, *x)
        if who == "transformers, slow path":
            return without_training(torch_way(transformers, *x))
        return torch_way(ours, *x, plain=who == PLAIN)

    session.curve(
        "B1 E64 N16",
        [2**n for n in range(8, 21, 2)],
        at,
        (OURS, PLAIN, "mambapy", "jax lax.scan", "transformers, slow path"),
        lambda n: 2 * (session.floor_ms(3 * 256 * n, 64 * 17 * n),),
    )
