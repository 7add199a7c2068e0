"""The models' equations as dense float64 state spaces, written from the papers alone.

Half-stored conjugate pairs are written out as full systems [x, conj(x)], A is a full matrix, and
steps are taken with `matrix_exp` and `torch.linalg.solve`: nothing of the library is used, neither
its factor 2 nor its formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Dense(NamedTuple):
    """S systems x' = A x + B u, y = Re(C x), in units of each state's own step.

    A (S, N, N); B (S, N, I) with the step in it and B_raw without; C (S, O, N), C2 the same of
    the reverse direction; D (H,) or (Ch, H), without ``siso`` (H,) or a matrix (O, I); ``stored``
    how many of the N states the library keeps; ``lag`` of the reverse direction: 0 where it counts
    the current sample.
    """

    A: Tensor
    B: Tensor
    B_raw: Tensor
    C: Tensor
    C2: Tensor | None
    D: Tensor
    stored: int
    siso: bool
    lag: int
    state: tuple[int, ...] | None = None
    """Given where S systems side by side read all inputs and their outputs add: a state's shape."""


def _complex(params: dict[str, Tensor], key: str) -> Tensor:
    re = params[key + "_re"].double()
    im = params.get(key + "_im")
    return torch.complex(re, torch.zeros_like(re) if im is None else im.double())


def _with_conjugates(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Append conj along the state axis, here the last one."""
    return tuple(None if t is None else torch.cat([t, t.conj()], dim=-1) for t in tensors)


def _real_part(params: dict[str, Tensor], choices: dict[str, Any]) -> Tensor:
    """Return Re A of S4 and S4D under their five transforms."""
    raw = params["A_log"].double()
    return {
        "exp": lambda: -raw.exp(),
        "softplus": lambda: -torch.log1p(raw.exp()),
        "relu": lambda: -raw.clamp(min=0) - 1e-4,
        "clip": lambda: raw.clamp(max=-1e-4),
        "none": lambda: raw,
    }[choices.get("A_transform", "exp")]()


def _step(params: dict[str, Tensor], choices: dict[str, Any]) -> Tensor:
    """Return dt of S4 and S4D."""
    step = params["log_dt"].double().exp()
    return torch.log1p(step) if choices.get("dt_transform") == "softplus" else step


def s4d(params: dict[str, Tensor], choices: dict[str, Any]) -> Dense:
    """Gu et al. 2022 (S4D): A = -exp(A_log) + i A_im a channel, channel h uses copy h mod S."""
    D = params["D"].double()
    H = D.shape[-1]
    A = _real_part(params, choices) + 0j
    if "A_im" in params:
        A = A + 1j * params["A_im"].double()
    B, C = _complex(params, "B"), _complex(params, "C")
    C2 = _complex(params, "C2") if "C2_re" in params else None
    copies = torch.arange(H) % A.shape[0]
    A, B = A[copies], B[copies]
    dt = _step(params, choices)
    dt = (dt if dt.ndim == 2 else dt[:, None].expand(A.shape)) + 0j
    stored = A.shape[-1]
    if "A_im" in params:
        A, B, C, C2, dt = _with_conjugates(A, B, C, C2, dt)

    def outputs(c: Tensor | None) -> Tensor | None:
        return c if c is None else (c[None] if c.ndim == 2 else c).transpose(0, 1)  # (H, Ch, N)

    return Dense(
        torch.diag_embed(dt * A), (dt * B)[..., None], B[..., None], outputs(C), outputs(C2), D,
        stored, siso=True, lag=1,
    )  # fmt: skip


def s4(params: dict[str, Tensor], choices: dict[str, Any]) -> Dense:
    """Gu et al. 2022 (S4): A = Lambda - P P^* on full vectors; C~ = C (I - A_bar^L) is undone."""
    D = params["D"].double()
    H = D.shape[-1]
    A = torch.complex(_real_part(params, choices), params["A_im"].double())
    B, P, dt = _complex(params, "B"), _complex(params, "P"), _step(params, choices)
    copies = torch.arange(H) % A.shape[0]
    A, B, P = A[copies], B[copies], P[:, copies].transpose(0, 1)  # (H, R, M)
    dt = (dt if dt.ndim == 2 else dt[:, None].expand(A.shape)) + 0j
    stored = A.shape[-1]
    readouts = [_complex(params, k) for k in ("C", "C2") if k + "_re" in params]
    A, B, P, dt, *readouts = _with_conjugates(A, B, P, dt, *readouts)
    full = torch.diag_embed(A) - P.transpose(-1, -2) @ P.conj()
    full = dt[..., None] * full
    outputs = [(c[None] if c.ndim == 2 else c).transpose(0, 1) for c in readouts]  # (H, Ch, N)
    if choices.get("l_kernel"):
        eye = torch.eye(2 * stored, dtype=full.dtype)
        A_bar = torch.linalg.solve(eye - full / 2, eye + full / 2)
        rest = eye - torch.linalg.matrix_power(A_bar, choices["l_kernel"])
        outputs = [torch.linalg.solve(rest.mT, c.mT).mT for c in outputs]
    return Dense(
        full, (dt * B)[..., None], B[..., None], outputs[0],
        outputs[1] if len(outputs) > 1 else None, D, stored, siso=True, lag=1,
    )  # fmt: skip


def s5(params: dict[str, Tensor], choices: dict[str, Any]) -> Dense:
    """Smith et al. 2023 (S5): one diagonal A for all channels, a step for every state."""
    re = params["Lambda_re"].double()
    if choices.get("clip_eigs"):
        re = torch.minimum(re, torch.tensor(-1e-4, dtype=torch.float64))
    A = torch.complex(re, params["Lambda_im"].double())
    B, C, dt = _complex(params, "B").T, _complex(params, "C"), params["log_dt"].double().exp() + 0j
    C2 = _complex(params, "C2") if "C2_re" in params else None
    stored = len(A)
    if choices.get("conj_sym", True):
        A, B, C, C2, dt = _with_conjugates(A, B, C, C2, dt)
    return Dense(
        torch.diag(dt * A)[None], (dt * B).T[None], B.T[None], C[None],
        None if C2 is None else C2[None], params["D"].double(), stored, siso=False, lag=0,
    )  # fmt: skip


def lru(params: dict[str, Tensor], choices: dict[str, Any]) -> Dense:
    """Orvieto et al. 2023 (LRU): lambda = exp(-exp(nu) + i exp(theta)), gain exp(gamma_log)."""
    log = torch.complex(-params["nu_log"].double().exp(), params["theta_log"].double().exp())
    B = params["gamma_log"].double().exp()[:, None] * _complex(params, "B")
    C = _complex(params, "C")
    C2 = _complex(params, "C2")[None] if "C2_re" in params else None
    return Dense(
        torch.diag(log)[None], B[None], B[None], C[None], C2, params["D"].double(), len(log),
        siso=False, lag=0,
    )  # fmt: skip


def event_ssm(params: dict[str, Tensor], choices: dict[str, Any]) -> Dense:
    """Schoene et al. 2024 (Event-SSM): the state space of S5, with outputs of another width."""
    return s5(params, choices)


def centaurus(params: dict[str, Tensor], choices: dict[str, Any]) -> Dense:
    """Pei 2025 (Centaurus): one system of M sub-states for each state channel, written out."""
    p = {k: v.double() for k, v in params.items()}
    variant = choices.get("variant", "neck")
    A = torch.complex(-torch.log1p(p["A_raw"].exp()), p["A_im"])
    *channels, size = shape = tuple(A.shape)
    S = math.prod(channels)
    dt = p["log_dt"].exp()
    if variant == "full":  # a step for each output, or for each output and sub-state
        dt = dt.reshape(channels[0], 1, -1)
    dt = dt.reshape(*dt.shape[: 2 if variant == "full" else 1], -1).expand(shape).reshape(S, size)
    B = torch.zeros(S, size, p["B"].shape[1] if "B" in p else channels[-1]).double()
    for s in range(S):
        for m in range(size):
            if "B" in p:
                B[s, m] = p["B"][s * size + m] if variant == "pointwise" else p["B"][s]
            else:  # state channel s belongs to input s, or to the pair (s // H, s % H)
                B[s, m, s % channels[-1]] = 1

    def outputs(second: str) -> Tensor:
        if variant == "neck":
            return torch.einsum("oj,jm->jom", p["C" + second], p["E"])
        if variant == "pointwise":
            return p["C" + second].reshape(-1, S, size).transpose(0, 1)
        E = p["E" + second].reshape(S, size)
        if variant == "dws":
            return torch.einsum("oh,hm->hom", p["W"], E)
        to = torch.eye(channels[0]).double().repeat_interleave(channels[1], 0)  # (S, H_out)
        return torch.einsum("so,sm->som", to, E)

    second = "C2" in p or "E2" in p
    zero = torch.zeros(outputs("").shape[1], B.shape[-1]).double()
    return Dense(
        torch.diag_embed(dt * A.reshape(S, size)), dt[..., None] * B + 0j, B + 0j,
        outputs("") + 0j, outputs("2") + 0j if second else None, zero, size, siso=False, lag=0,
        state=shape,
    )  # fmt: skip


DENSE: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Dense]] = {
    "s4": s4,
    "s4d": s4d,
    "s5": s5,
    "lru": lru,
    "event_ssm": event_ssm,
    "centaurus": centaurus,
}


def joined(system: Dense) -> Dense:
    """Return systems side by side, whose outputs add, as one system; any other one as it is."""
    if system.state is None:
        return system

    def stacked(m: Tensor) -> Tensor:  # (S, N, I) -> (1, S N, I)
        return m.flatten(0, 1)[None]

    def beside(m: Tensor) -> Tensor:  # (S, O, N) -> (1, O, S N)
        return m.transpose(0, 1).flatten(1)[None]

    return system._replace(
        A=torch.block_diag(*system.A)[None], B=stacked(system.B), B_raw=stacked(system.B_raw),
        C=beside(system.C), C2=None if system.C2 is None else beside(system.C2),
        stored=len(system.A) * system.stored, state=None,
    )  # fmt: skip


def matrix_exp(M: Tensor) -> Tensor:
    """Return exp(M) by scaling, 20 terms of the series, and squaring.

    `torch.linalg.matrix_exp` of one matrix (not of a batch) is off by 1e-10 in PyTorch 2.13.
    """
    eye = torch.eye(M.shape[-1], dtype=M.dtype)
    norm = float(torch.linalg.matrix_norm(M, 1).max()) if M.numel() else 0.0
    squarings = max(0, math.ceil(math.log2(max(norm, 1e-300)))) + 1
    small, total = M / 2**squarings, eye
    for k in range(20, 0, -1):
        total = eye + small @ total / k
    for _ in range(squarings):
        total = total @ total
    return total


def steps(
    system: Dense, scheme: str, decay: Tensor, drive: Tensor, alpha: float | None
) -> tuple[Tensor, Tensor]:
    """Discretize with full matrices; ``decay`` and ``drive`` (...) are elapsed times."""
    eye = torch.eye(system.A.shape[-1], dtype=system.A.dtype)
    M, by = decay[..., None, None, None] * system.A, drive[..., None, None, None]
    if scheme == "zoh":
        n, width = system.B.shape[-2:]
        block = torch.zeros(*by.shape[:-3], *system.A.shape[:-2], n + width, n + width) + 0j
        block = block.to(system.A.dtype)
        block[..., :n, :n] = by * system.A
        block[..., :n, n:] = by * system.B
        return matrix_exp(M), matrix_exp(block)[..., :n, n:]
    if scheme in ("dirac", "mamba", "none"):
        B = by * system.B if scheme == "mamba" else system.B_raw + 0 * by
        return matrix_exp(M), B
    a = {"bilinear": 0.5, "euler": 0.0, "gbt": alpha}[scheme]
    return (
        torch.linalg.solve(eye - a * M, eye + (1 - a) * M),
        torch.linalg.solve(eye - a * by * system.A, by * system.B),
    )


def _states(
    system: Dense, x: Tensor, u: Tensor, elapsed: Tensor, options: dict[str, Any]
) -> list[Tensor]:
    """Return the states (..., S, N) after each sample of u (..., L, S, I), elapsed (..., L)."""
    scheme, state_only = options["scheme"], options["state_only"]
    if scheme == "async":
        scheme, state_only = "zoh", True
    drive = torch.ones_like(elapsed) if state_only else elapsed
    A_bar, B_bar = steps(system, scheme, elapsed, drive, options["alpha"])
    states = []
    for t in range(u.shape[-3]):
        at = t if A_bar.shape[-4] > 1 else 0
        x = (A_bar[..., at, :, :, :] @ x[..., None])[..., 0]
        x = x + (B_bar[..., at, :, :, :] @ u[..., t, :, :, None])[..., 0]
        states.append(x)
    return states


def run(
    name: str,
    params: dict[str, Tensor],
    u: Tensor,
    state: Tensor | None = None,
    *,
    choices: dict[str, Any],
    scheme: str,
    timesteps: Tensor | None = None,
    state_only: bool = False,
    dt_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Run the dense system; return y (..., L, H_out) and the stored part of the final state."""
    system = DENSE[name](params, choices)
    options = {"scheme": scheme, "state_only": state_only, "alpha": choices.get("alpha")}
    u = u.double()
    length, S = u.shape[-2], system.A.shape[0]
    per = u[..., None] if system.siso else u[..., None, :]  # (..., L, S, I)
    per = per + 0j
    x0 = torch.zeros(*u.shape[:-2], S, system.A.shape[-1], dtype=torch.complex128)
    if state is not None:
        stored = state.reshape(x0.shape[:-1] + (system.stored,)).to(torch.complex128)
        full = system.A.shape[-1] == 2 * system.stored
        x0 = torch.cat([stored, stored.conj()], dim=-1) if full else stored
    elapsed = torch.ones(1, dtype=torch.float64) if timesteps is None else timesteps.double()
    scaled = system._replace(A=dt_scale * system.A, B=dt_scale * system.B)
    states = _states(scaled, x0, per, elapsed, options)
    final = (states[-1] if states else x0)[..., : system.stored]
    if system.state is not None:
        final = final.reshape(*u.shape[:-2], *system.state)
    elif not system.siso:
        final = final[..., 0, :]
    y = _read(system.C, states)
    if system.C2 is not None:
        back = elapsed
        if timesteps is not None:  # the gap to the successor; the last sample takes the first gap
            back = torch.cat([elapsed[..., 1:], elapsed[..., :1]], dim=-1).flip(-1)
        reverse = _states(scaled, torch.zeros_like(x0), per.flip(-3), back, options)[::-1]
        moved = reverse[system.lag :] + [torch.zeros_like(x0)] * system.lag
        y = y + _read(system.C2, moved[:length])
    if system.state is not None:
        y = y.sum(-2, keepdim=True)
    out = y.transpose(-1, -2).flatten(-2)  # (..., L, O, S), channel-major
    if system.siso:
        skip = (system.D.reshape(-1, S) * u[..., None, :]).flatten(-2)
    else:
        skip = system.D * u if system.D.ndim == 1 else u @ system.D.mT
    return out + skip, final


def _read(C: Tensor, states: list[Tensor]) -> Tensor:
    """Return Re(C x) as (..., L, S, O)."""
    x = torch.stack(states, dim=-3)
    return torch.einsum("son,...sn->...so", C, x).real
