# SPDX-License-Identifier: MIT
"""RG-LRU's gated scan, the short convolution with SiLU, and both variants of S7 on the CPU.

python -m benchmarks.cpu gated
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cpu.timing import (
    OURS,
    PLAIN,
    Session,
    Way,
    in_plain_torch,
    module_way,
    torch_way,
)
from lrnnx_core.ops import causal_conv1d, rg_lru_scan
from lrnnx_nn import S7


def rg_lru(x: Tensor, gate: Tensor, recurrent: Tensor, rate: Tensor) -> Tensor:
    return rg_lru_scan(x, gate, recurrent, rate)[0]


def rg_lru_loop(x: Tensor, gate: Tensor, recurrent: Tensor, rate: Tensor) -> Tensor:
    log_a = -rate * torch.sigmoid(recurrent)
    a = torch.exp(log_a)
    b = torch.sqrt(-torch.expm1(2 * log_a)) * torch.sigmoid(gate) * x
    h, hs = torch.zeros_like(b[:, 0]), []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_t * h + b_t
        hs.append(h)
    return torch.stack(hs, dim=1)


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, activation="silu")[0]


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    taps = weight.shape[-1]
    y = torch.nn.functional.conv1d(x.mT, weight, bias, padding=taps - 1, groups=x.shape[-1])
    return torch.nn.functional.silu(y[..., : x.shape[-2]]).mT


def measure(session: Session) -> None:
    B, L, D = (2, 33, 16) if session.tiny else (4, 1024, 512)
    g = torch.Generator().manual_seed(0)
    x, gate, recurrent = torch.randn(3, B, L, D, generator=g)
    rate = 8 * torch.nn.functional.softplus(torch.randn(D, generator=g) - 4)
    cells = x.numel()
    session.case(
        f"RG-LRU scan, B{B} L{L} W{D}",
        (session.floor_ms(4 * x.nbytes, 4 * cells), session.floor_ms(12 * x.nbytes, 8 * cells)),
        {
            OURS: lambda: torch_way(rg_lru, x, gate, recurrent, rate),
            PLAIN: lambda: torch_way(rg_lru, x, gate, recurrent, rate, plain=True),
            "step loop, torch": lambda: torch_way(rg_lru_loop, x, gate, recurrent, rate),
        },
    )
    weight, bias = torch.randn(D, 1, 4, generator=g), torch.randn(D, generator=g)
    session.case(
        f"convolution + SiLU, B{B} L{L} C{D} K4",
        (session.floor_ms(2 * x.nbytes, cells), session.floor_ms(5 * x.nbytes, 2 * cells)),
        {
            OURS: lambda: torch_way(conv, x, weight, bias),
            PLAIN: lambda: torch_way(conv, x, weight, bias, plain=True),
            "torch conv1d": lambda: torch_way(torch_conv, x, weight, bias),
        },
    )
    H, N = (8, 4) if session.tiny else (64, 16)
    torch.manual_seed(0)
    u = torch.randn(B, L, H)
    for variant in ("delta", "full"):
        layer = S7(H, N, variant=variant)
        products = 4 * B * L * H * H * N if variant == "full" else 4 * B * L * H * N
        session.case(
            f"S7 {variant}, B{B} L{L} H{H} N{N}",
            (session.floor_ms(flops=products), session.floor_ms(flops=3 * products)),
            {
                OURS: lambda layer=layer: module_way(layer, u),
                PLAIN: lambda layer=layer: in_plain_torch(module_way(layer, u)),
            },
        )

    def at(who: str, length: int) -> Way:
        x, gate, recurrent = torch.randn(3, 1, length, 128)
        rate = torch.full((128,), 0.1)
        return torch_way(rg_lru, x, gate, recurrent, rate, plain=who == PLAIN)

    session.curve(
        "RG-LRU scan, B1 W128",
        [2**n for n in range(8, 21, 2)],
        at,
        (OURS, PLAIN),
        lambda n: (
            session.floor_ms(4 * 512 * n, 4 * 128 * n),
            session.floor_ms(12 * 512 * n, 8 * 128 * n),
        ),
    )
