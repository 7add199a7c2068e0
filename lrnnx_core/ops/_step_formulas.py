# SPDX-License-Identifier: MIT
"""Single steps of recurrences in plain PyTorch: what is differentiated, and what kernels compute.

Every function is a composition of differentiable pieces and the default of a leaf operator, whose
compiled form keeps the same contract. Batch axes lead, none included; states and arithmetic are at
least float32, and y has the dtype of u.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu, softplus

from lrnnx_core.discretize import SCHEMES
from lrnnx_core.ops.discretize_diagonal import apply_scheme
from lrnnx_core.ops.guarded_sqrt import guarded_sqrt

MAMBA_EPS, SSD_EPS = 1e-6, 1e-5


def diagonal_step(
    u: Tensor,
    state: Tensor,
    a: Tensor,
    gain: Tensor | None,
    B: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute h = a state + gain (B u) and y = scale Re(C h) + D u.

    u (*batch, H) real; state (*batch, P), a and gain (P,) or (*batch, P) and B (P, H) complex; C_re
    and C_im (H_out, P), D (H,) or (H_out, H) real. Returns y (*batch, H_out) and h.
    """
    x = u.to(a.real.dtype)
    b = torch.complex(x @ B.real.mT, x @ B.imag.mT)
    h = a * state.to(b.dtype) + (b if gain is None else gain * b)
    D = D.to(x.dtype)
    through = D * x if D.ndim == 1 else x @ D.mT
    y = scale * (h.real @ C_re.to(x.dtype).mT - h.imag @ C_im.to(x.dtype).mT) + through
    return y.to(u.dtype), h


def flow_step(
    u: Tensor,
    state: Tensor,
    A: Tensor,
    dt: Tensor,
    timesteps: Tensor | None,
    B: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor,
    scale: float,
    state_only: bool,
    scheme: str,
) -> tuple[Tensor, Tensor]:
    """Take `diagonal_step` with a and gain of A (P,), complex, and dt (P,) or (*batch, P), real.

    timesteps (*batch) multiply dt, under ``state_only`` in a alone.
    """
    dt = dt.to(A.real.dtype)
    decay = dt if timesteps is None else timesteps.to(dt.dtype).unsqueeze(-1) * dt
    drive = dt if state_only and timesteps is not None else None
    a, gain = apply_scheme(A, decay, drive, scheme=scheme)
    return diagonal_step(u, state, a, gain, B, C_re, C_im, D, scale)


def siso_step(
    u: Tensor,
    state: Tensor,
    a: Tensor,
    B: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    C_re: Tensor,
    C_im: Tensor | None,
    D: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute h = a state - sum_r U_r 2 Re(V_r . state) + B u and y = scale Re(C . h) + D u.

    For every channel: u (*batch, H) real; state (*batch, H, M); a and B (H, M) or (*batch, H, M);
    U and V (R, H, M) or (*batch, R, H, M), None for no low-rank part; C_re, and C_im or None,
    (H, M) or (Ch, H, M) real; D (H,) or (Ch, H), None for zero. a, B, the state, U and V are all
    complex, or all real and then without U, V and C_im. Returns y (*batch, Ch H) and h.
    """
    h = state.to(a.dtype)
    x = u.to(h.real.dtype)
    new = a * h + B * x.unsqueeze(-1)
    if U is not None and V is not None:
        feedback = 2 * (V * h.unsqueeze(-3)).sum(-1).real
        new = new - (U * feedback.unsqueeze(-1)).sum(-3)
    C = C_re.to(x.dtype) if C_im is None else torch.complex(C_re.to(x.dtype), C_im.to(x.dtype))
    C = C.unsqueeze(0) if C.ndim == 2 else C
    y = scale * (C * new.unsqueeze(-3)).sum(-1).real
    if D is not None:
        y = y + D.to(x.dtype) * x.unsqueeze(-2)
    return y.flatten(-2).to(u.dtype), new


def mamba_step(
    xz: Tensor,
    conv: Tensor,
    h: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    decay_dt: Tensor | None,
    timesteps: Tensor | None,
    dt_norm: Tensor | None,
    B_norm: Tensor | None,
    C_norm: Tensor | None,
    dt_scale: float,
    normalized: bool,
    state_only: bool,
    scheme: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step of a Mamba block between its projections.

        v = silu(conv(x)),  (r, B, C) = x_proj v,  delta = dt_scale softplus(dt_proj r + dt_bias)
        h_n = A_bar_n h_n + gamma_n B_n v,  y = (sum_n C_n h_n + D v) silu(z)

    xz (*batch, 2 E), conv (*batch, K - 1, E) and h (*batch, E, N); conv_weight (E, 1, K), conv_bias
    (E,), x_proj (R + 2 N, E), dt_proj (E, R), A (E, N); dt_bias, D and decay_dt (E,); timesteps
    (*batch). decay_dt is delta's place in A_bar (STREAM). Where ``normalized``, r, B and C are
    divided by their root mean squares and scaled by dt_norm (R,), B_norm and C_norm (N,), if given.
    Returns y (*batch, E) and conv in xz's dtype, and h.
    """
    dtype = A.dtype
    x, z = xz.to(dtype).chunk(2, dim=-1)
    seen, tail = _convolve(x, conv, conv_weight, conv_bias)
    v = silu(seen)
    rank, states = dt_proj.shape[1], A.shape[1]
    parts = linear(v, x_proj.to(dtype)).split([rank, states, states], dim=-1)
    if normalized:
        scales = (dt_norm, B_norm, C_norm)
        parts = [_normalized(p, w, MAMBA_EPS) for p, w in zip(parts, scales, strict=True)]
    r, B, C = parts
    delta = softplus(linear(r, dt_proj.to(dtype), dt_bias.to(dtype)))
    delta = delta if dt_scale == 1.0 else dt_scale * delta
    decay = delta if decay_dt is None else decay_dt.to(dtype)
    if timesteps is not None:
        elapsed = timesteps.to(dtype).unsqueeze(-1)
        decay, delta = elapsed * decay, delta if state_only else elapsed * delta
    A_bar, gamma = SCHEMES[scheme](A, decay.unsqueeze(-1), delta.unsqueeze(-1))
    if scheme == "dirac" and decay_dt is not None:
        # what makes delta has the gradient zero, as in a scan, and not none: DDP waits for it
        gamma = torch.where(torch.ones_like(gamma, dtype=torch.bool), gamma, delta.unsqueeze(-1))
    new = A_bar * h.to(dtype) + gamma * (B.unsqueeze(-2) * v.unsqueeze(-1))
    y = (new * C.unsqueeze(-2)).sum(-1) + D.to(dtype) * v
    return (y * silu(z)).to(xz.dtype), tail.to(xz.dtype), new


def griffin_step(
    x: Tensor,
    gate: Tensor,
    conv: Tensor,
    h: Tensor,
    started: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    input_weight: Tensor,
    input_bias: Tensor,
    recurrent_weight: Tensor,
    recurrent_bias: Tensor,
    rate: Tensor,
    timesteps: Tensor | None,
    state_only: bool,
    start_rule: bool,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take one step of a Griffin block between its projections.

        v = conv(x),  i, r = sigmoid(v W + bias) by blocks,  log a = -rate r
        h = a h + sqrt(1 - a^2) i v,  y = gelu(gate) h

    x, gate (*batch, W), conv (*batch, K - 1, W), h (*batch, W), started and timesteps (*batch);
    conv_weight (W, 1, K), conv_bias (W,), weights of the gates (heads, W / heads, W / heads), in by
    out, and their biases (W,); rate (W,). timesteps multiply log a, under ``state_only`` outside of
    the root alone. Under ``start_rule`` the state of a row that has not started counts as zero, and
    its root as one. Returns y (*batch, W) and conv in x's dtype, h, and started, true now.
    """
    dtype = rate.dtype
    v, tail = _convolve(x.to(dtype), conv, conv_weight, conv_bias)
    blocks = v.unflatten(-1, input_weight.shape[:2])

    def opened(weight: Tensor, bias: Tensor) -> Tensor:
        logits = torch.einsum("...hi,hij->...hj", blocks, weight.to(dtype)).flatten(-2)
        return torch.sigmoid(logits + bias.to(dtype))

    i, r = opened(input_weight, input_bias), opened(recurrent_weight, recurrent_bias)
    log_a = -rate * r
    timed = log_a if timesteps is None else timesteps.to(dtype).unsqueeze(-1) * log_a
    root = guarded_sqrt(-torch.expm1(2 * (log_a if state_only else timed)))
    before = h.to(dtype)
    if start_rule:
        fresh = started.logical_not().unsqueeze(-1)
        root = torch.where(fresh, torch.ones_like(root), root)
        before = torch.where(fresh, torch.zeros_like(before), before)
    new = torch.exp(timed) * before + root * (i * v)
    y = gelu(gate.to(dtype), approximate="tanh" if tanh else "none") * new
    return y.to(x.dtype), tail.to(x.dtype), new, torch.ones_like(started)


def ssd_step(
    parts: Tensor,
    conv: Tensor,
    h: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    timesteps: Tensor | None,
    n_groups: int,
    low: float,
    high: float,
    dt_scale: float,
    state_only: bool,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step of a Mamba-2 block between its projections.

        (z, xBC, r) = parts,  (x, B, C) = silu(conv(xBC))
        delta = dt_scale clamp(softplus(r + dt_bias), low, high)
        h = exp(delta A) h + delta B x,  y = norm((C h + D x) silu(z))

    parts (*batch, 2 E + 2 G N + nh), conv (*batch, K - 1, E + 2 G N), h (*batch, nh, P, N);
    conv_weight (E + 2 G N, 1, K), conv_bias (E + 2 G N,); dt_bias, A and D (nh,); norm_weight (E,),
    None for no norm; timesteps (*batch). The norm is of root mean squares by groups, and stands
    before the gate where ``norm_before_gate``. Returns y (*batch, E) and conv in parts' dtype, h.
    """
    dtype, (heads, size, states) = A.dtype, h.shape[-3:]
    width, mixed = heads * size, conv_weight.shape[0]
    z, xBC, r = parts.to(dtype).split([width, mixed, heads], dim=-1)
    seen, tail = _convolve(xBC, conv, conv_weight, conv_bias)
    x, B, C = silu(seen).split([width, n_groups * states, n_groups * states], dim=-1)
    x = x.unflatten(-1, (heads, size))
    B, C = (
        t.unflatten(-1, (n_groups, 1, states)).expand(
            *t.shape[:-1], n_groups, heads // n_groups, states
        ).flatten(-3, -2).unsqueeze(-2)
        for t in (B, C)
    )  # fmt: skip
    delta = softplus(r + dt_bias.to(dtype)).clamp(low, high) * dt_scale
    decay = delta if timesteps is None else timesteps.to(dtype).unsqueeze(-1) * delta
    delta = delta if state_only else decay
    a = torch.exp(decay * A)[..., None, None]
    new = a * h.to(dtype) + (delta.unsqueeze(-1) * x).unsqueeze(-1) * B
    y = ((new * C).sum(-1) + D.to(dtype).unsqueeze(-1) * x).flatten(-2)
    opening = silu(z)
    if norm_weight is None:
        y = y * opening
    else:
        y = y if norm_before_gate else y * opening
        y = _normalized(y.unflatten(-1, (n_groups, -1)), None, SSD_EPS).flatten(-2)
        y = y * norm_weight.to(dtype)
        y = y * opening if norm_before_gate else y
    return y.to(parts.dtype), tail.to(parts.dtype), new


def s7_step(v: Tensor, h: Tensor, weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of S7 with every matrix made from the input, between its projections.

        (a, B, C, d, beta) = weight v,  a += base,  h = (1 - 1 / (a^2 + 1/2)) h + B^T v + beta
        y = C h + d v

    v (*batch, H), h (*batch, N), weight (2 N + 2 H N + H, H), base (N,). Returns y in base's dtype.
    """
    v = v.to(base.dtype)
    width, states = v.shape[-1], base.shape[0]
    sizes = [states, width * states, width * states, width, states]
    a, B, C, d, beta = linear(v, weight.to(base.dtype)).split(sizes, dim=-1)
    B, C = (t.unflatten(-1, (width, states)) for t in (B, C))
    decay = 1 - 1 / ((a + base).square() + 0.5)
    new = decay * h.to(base.dtype) + (B * v.unsqueeze(-1)).sum(-2) + beta
    return (C * new.unsqueeze(-2)).sum(-1) + d * v, new


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide x (..., H) by its root mean square, and multiply by weight (H,), at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = None if weight is None else weight.to(wide.dtype)
    return torch.nn.functional.rms_norm(wide, x.shape[-1:], scale, eps).to(x.dtype)


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias for x (..., inputs), weight W (outputs, inputs) and bias (outputs,)."""
    return linear(x, weight, bias)


def argmax(x: Tensor) -> Tensor:
    """Return the index (...) of the largest of x (..., V): the first of several."""
    return x.argmax(-1)


def _convolve(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the last sample of a causal convolution of each channel, and what it has seen last."""
    past = torch.cat([before.to(x.dtype), x.unsqueeze(-2)], dim=-2)
    y = (past * weight.squeeze(1).mT.to(x.dtype)).sum(-2)
    return y if bias is None else y + bias.to(x.dtype), past[..., 1:, :].clone()


def _normalized(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else weight.to(x.dtype) * y
