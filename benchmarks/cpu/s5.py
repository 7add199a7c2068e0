# SPDX-License-Identifier: MIT
"""S5 and LRU layers on the CPU: two real products around a complex scan.

    python -m benchmarks.cpu s5

"its two products" are the matrix products of the layer alone: (B L, H) x (H, 2 P) and back.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.timing import (
    OURS,
    PLAIN,
    Session,
    Way,
    in_plain_torch,
    jax_way,
    module_way,
)
from lrnnx_core import s5
from lrnnx_nn import LRU, S5


def jax_layer(params: dict[str, Tensor], u: Tensor) -> Way:
    """Return S5 as its authors write it: a product, an associative scan, a product, vmapped."""
    import jax

    A_bar, B_bar = s5.discretize(params)
    C = torch.complex(params["C_re"], params["C_im"])

    def one(u: Any, A_bar: Any, B_bar: Any, C: Any, D: Any) -> Any:
        Bu = u.astype(B_bar.dtype) @ B_bar.T
        A = jax.numpy.broadcast_to(A_bar, Bu.shape)

        def combine(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, x = jax.lax.associative_scan(combine, (A, Bu))
        return 2 * (x @ C.T).real + D * u

    def batched(u: Any, A_bar: Any, B_bar: Any, C: Any, D: Any) -> Any:
        return jax.vmap(one, (0, None, None, None, None))(u, A_bar, B_bar, C, D)

    return jax_way(batched, u, A_bar, B_bar, C, params["D"])


def s5_pytorch(width: int, state: int, u: Tensor) -> Way:
    from s5 import S5 as Theirs

    with contextlib.redirect_stdout(io.StringIO()):
        return module_way(Theirs(width, state), u, compare=False)


def lru_pytorch(width: int, state: int, u: Tensor) -> Way:
    from LRU_pytorch import LRU as Theirs

    return module_way(Theirs(width, width, state), u, compare=False)


def products(u: Tensor, stored: int) -> Way:
    B = torch.randn(u.shape[-1], 2 * stored)
    drive = torch.empty(*u.shape[:-1], 2 * stored)
    out = torch.empty_like(u)
    flat, wide, back = (t.flatten(0, 1) for t in (u, drive, out))

    def run() -> None:
        torch.mm(flat, B, out=wide)
        torch.mm(wide, B.mT, out=back)

    return Way(run)


def measure(session: Session) -> None:
    B, H, P, L = (2, 8, 4, 33) if session.tiny else (8, 128, 64, 2048)
    torch.manual_seed(0)
    u = torch.randn(B, L, H)
    flops = 4 * B * L * H * 2 * P
    floors = (session.floor_ms(flops=flops), session.floor_ms(flops=3 * flops))
    layer, other = S5(H, 2 * P), LRU(H, P)
    session.case(
        f"S5, B{B} H{H} P{P} stored, L{L}",
        floors,
        {
            OURS: lambda: module_way(layer, u),
            PLAIN: lambda: in_plain_torch(module_way(layer, u)),
            "its two products": lambda: products(u, P),
            "jax, as S5's authors": lambda: jax_layer(layer.state_dict(), u),
            "s5-pytorch": lambda: s5_pytorch(H, P, u),
        },
    )
    session.case(
        f"LRU, B{B} H{H} P{P}, L{L}",
        floors,
        {
            OURS: lambda: module_way(other, u),
            PLAIN: lambda: in_plain_torch(module_way(other, u)),
            "its two products": lambda: products(u, P),
            "lru-pytorch": lambda: lru_pytorch(H, P, u),
        },
    )
    elapsed = 2 * torch.rand(B, L)
    timed = Timed(layer, elapsed)
    session.case(
        f"S5, timesteps, B{B} H{H} P{P}, L{L}",
        floors,
        {
            OURS: lambda: module_way(timed, u),
            PLAIN: lambda: in_plain_torch(module_way(timed, u)),
        },
    )

    def at(who: str, length: int) -> Way:
        u = torch.randn(1, length, H)
        if who == OURS:
            return module_way(layer, u)
        if who == PLAIN:
            return in_plain_torch(module_way(layer, u))
        return jax_layer(layer.state_dict(), u) if "jax" in who else s5_pytorch(H, P, u)

    session.curve(
        f"S5, B1 H{H} P{P}",
        [2**n for n in range(8, 21, 2)],
        at,
        (OURS, PLAIN, "jax, as S5's authors", "s5-pytorch"),
        lambda n: (
            session.floor_ms(flops=flops / (B * L) * n),
            session.floor_ms(flops=3 * flops / (B * L) * n),
        ),
    )


class Timed(torch.nn.Module):
    """A layer under irregular time."""

    def __init__(self, layer: torch.nn.Module, elapsed: Tensor) -> None:
        super().__init__()
        self.layer, self.elapsed = layer, elapsed

    def forward(self, u: Tensor) -> Tensor:
        return self.layer(u, integration_timesteps=self.elapsed)
