"""Mamba and STREAM one sample at a time, as their papers write them: no line of the library."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Params = dict[str, Tensor]


def gain(name: str, A: Tensor, d: Tensor, alpha: float | None) -> Tensor:
    """Return the input gain gamma of a scheme, for rates A (E, N) and steps d (E, 1)."""
    if name in ("zoh", "async"):
        safe = torch.where(d == 0, torch.ones_like(d), d)
        return torch.where(d == 0, d, (torch.exp(safe * A) - 1) / A)
    if name in ("bilinear", "gbt"):
        return d / (1 - (0.5 if alpha is None else alpha) * d * A)
    return torch.ones_like(d * A) if name == "dirac" else d.expand_as(A)


def decay(name: str, A: Tensor, d: Tensor, alpha: float | None) -> Tensor:
    """Return A_bar of a scheme."""
    if name in ("bilinear", "gbt"):
        w = 0.5 if alpha is None else alpha
        return (1 + (1 - w) * d * A) / (1 - w * d * A)
    return 1 + d * A if name == "euler" else torch.exp(d * A)


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def rms(x: Tensor, weight: Tensor | None) -> Tensor:
    y = x / torch.sqrt((x * x).mean() + 1e-6)
    return y if weight is None else y * weight


def block(
    p: Params,
    u: Tensor,
    *,
    scheme: str = "mamba",
    alpha: float | None = None,
    gaps: Tensor | None = None,
    state_only: bool = False,
    dt_scale: float = 1.0,
    inner_norm: str = "none",
    collect: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one row u (L, H); return y (L, H), the last K - 1 inputs of the convolution and h.

    A row of p with dtA_bias is STREAM. ``collect`` sees each sample's (v, A_bar, gamma B).
    """
    E, N = p["A_log"].shape
    R, K = p["dt_proj.weight"].shape[1], p["conv1d.weight"].shape[-1]
    A, zero = -torch.exp(p["A_log"]), u.new_zeros(E)
    h, seen, ys = u.new_zeros(E, N), [zero] * (K - 1), []
    for t, sample in enumerate(u):
        xz = p["in_proj.weight"] @ sample + p.get("in_proj.bias", u.new_zeros(2 * E))
        x, z = xz[:E], xz[E:]
        seen = [*seen, x]
        v = p.get("conv1d.bias", zero)
        for k in range(K):
            v = v + p["conv1d.weight"][:, 0, k] * seen[k]
        seen = seen[1:]
        v = v / (1 + torch.exp(-v))
        r, B, C = torch.split(p["x_proj.weight"] @ v, [R, N, N])
        if inner_norm != "none":
            names = ("dt", "b", "c") if inner_norm == "learned" else ()
            weights = [p[f"{n}_layernorm.weight"] for n in names] or [None] * 3
            r, B, C = (rms(m, w) for m, w in zip((r, B, C), weights, strict=True))
        delta = softplus(p["dt_proj.weight"] @ r + p["dt_proj.bias"]) * dt_scale
        own = softplus(p["dtA_bias"]) * dt_scale if "dtA_bias" in p else delta
        tau = torch.ones(()) if gaps is None else gaps[t]
        untimed = state_only or "dtA_bias" in p or scheme == "async"
        A_bar = decay(scheme, A, (tau * own)[:, None], alpha)
        B_bar = gain(scheme, A, (delta if untimed else tau * delta)[:, None], alpha) * B
        if collect is not None:
            collect(v, A_bar, B_bar)
        h = A_bar * h + B_bar * v[:, None]
        y = (h @ C + p["D"] * v) * z / (1 + torch.exp(-z))
        ys.append(p["out_proj.weight"] @ y + p.get("out_proj.bias", u.new_zeros(u.shape[-1])))
    tail = torch.stack(seen) if seen else u.new_zeros(0, E)
    return torch.stack(ys), tail, h
