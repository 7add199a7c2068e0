# SPDX-License-Identifier: MIT
"""The S4D layer on the CPU: a fused scan, or a kernel and an FFT.

    python -m benchmarks.cpu s4d

"materialised" builds the Vandermonde matrix (H, N, L), as the published minimal S4D does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cpu.timing import OURS, PLAIN, Session, Way, in_plain_torch, module_way
from lrnnx_nn import S4D


class Materialised(torch.nn.Module):
    """S4D from the whole Vandermonde matrix and an FFT."""

    def __init__(self, layer: S4D) -> None:
        super().__init__()
        for name, value in layer.state_dict().items():
            self.register_parameter(name, torch.nn.Parameter(value.clone()))

    def forward(self, u: Tensor) -> Tensor:
        A = torch.complex(-torch.exp(self.A_log), self.A_im)
        B, C = torch.complex(self.B_re, self.B_im), torch.complex(self.C_re, self.C_im)
        dt = torch.exp(self.log_dt)
        z = A * (dt.unsqueeze(-1) if dt.ndim == 1 else dt)
        length = u.shape[-2]
        powers = torch.exp(z.unsqueeze(-1) * torch.arange(length))
        v = C * B * (torch.exp(z) - 1) / A
        K = 2 * torch.einsum("hn,hnl->hl", v, powers).real
        x = u.mT
        y = torch.fft.irfft(torch.fft.rfft(K, 2 * length) * torch.fft.rfft(x, 2 * length))
        return y[..., :length].mT + self.D * u


def measure(session: Session) -> None:
    B, H, N, L = (2, 8, 4, 33) if session.tiny else (8, 128, 64, 2048)
    torch.manual_seed(0)
    layer = S4D(H, N)
    u = torch.randn(B, L, H)
    # a complex step and a product a pair: 6 multiply-adds; backward again, and twice for gradients
    flops = B * L * H * (N // 2) * 12
    floors = (session.floor_ms(flops=flops), session.floor_ms(flops=4 * flops))

    def conv(u: Tensor = u, plain: bool = False) -> Way:
        layer_ = FixedMode(layer, "conv")
        way = module_way(layer_, u)
        return in_plain_torch(way) if plain else way

    session.case(
        f"S4D, B{B} H{H} {N // 2} pairs, L{L}",
        floors,
        {
            OURS: lambda: module_way(layer, u),
            PLAIN: lambda: in_plain_torch(module_way(layer, u)),
            "materialised Vandermonde + FFT": lambda: module_way(Materialised(layer), u),
        },
    )

    def at(who: str, length: int) -> Way:
        u = torch.randn(1, length, H)
        if who == OURS:
            return module_way(layer, u)
        if who == PLAIN:
            return in_plain_torch(module_way(layer, u))
        if who.endswith("FFT"):
            return module_way(Materialised(layer), u)
        return conv(u)

    session.curve(
        f"S4D, B1 H{H} {N // 2} pairs",
        [2**n for n in range(8, 21, 2)],
        at,
        (OURS, PLAIN, "materialised Vandermonde + FFT"),
        lambda n: (
            session.floor_ms(flops=flops / (B * L) * n),
            session.floor_ms(flops=4 * flops / (B * L) * n),
        ),
    )


class FixedMode(torch.nn.Module):
    """A layer that always runs one mode."""

    def __init__(self, layer: torch.nn.Module, mode: str) -> None:
        super().__init__()
        self.layer, self.mode = layer, mode

    def forward(self, u: Tensor) -> Tensor:
        return self.layer(u, mode=self.mode)
