# SPDX-License-Identifier: MIT
"""One step of each kind of recurrence, fused; `lrnnx_core.ops._step_formulas` says what.

Arguments are positional and already of matching shapes: models check them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrnnx_core.ops import _step_formulas as formulas
from lrnnx_core.ops._step import step_operator


def _diagonal_fake(
    u: Tensor, state: Tensor, a: Tensor, gain: Any, B: Any, C_re: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return u.new_empty((*u.shape[:-1], C_re.shape[0])), a.new_empty(state.shape)


diagonal_step = step_operator(
    "diagonal_step(Tensor u, Tensor state, Tensor a, Tensor? gain, Tensor B, Tensor C_re, "
    "Tensor C_im, Tensor D, float scale) -> (Tensor, Tensor)",
    "step_diagonal",
    formulas.diagonal_step,
    _diagonal_fake,
)


def _siso_fake(
    u: Tensor, state: Tensor, a: Tensor, B: Any, U: Any, V: Any, C_re: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    channels = C_re.shape[0] if C_re.ndim > 2 else 1
    return u.new_empty((*u.shape[:-1], channels * u.shape[-1])), a.new_empty(state.shape)


siso_step = step_operator(
    "siso_step(Tensor u, Tensor state, Tensor a, Tensor B, Tensor? U, Tensor? V, Tensor C_re, "
    "Tensor? C_im, Tensor? D, float scale) -> (Tensor, Tensor)",
    "step_siso",
    formulas.siso_step,
    _siso_fake,
)


def _mamba_fake(xz: Tensor, conv: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    A = rest[5]
    y = xz.new_empty((*xz.shape[:-1], A.shape[0]))
    return y, xz.new_empty(conv.shape), A.new_empty(h.shape)


mamba_step = step_operator(
    "mamba_step(Tensor xz, Tensor conv, Tensor h, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor x_proj, Tensor dt_proj, Tensor dt_bias, Tensor A, Tensor D, Tensor? decay_dt, "
    "Tensor? timesteps, Tensor? dt_norm, Tensor? B_norm, Tensor? C_norm, float dt_scale, "
    "bool normalized, bool state_only, str scheme) -> (Tensor, Tensor, Tensor)",
    "step_mamba",
    formulas.mamba_step,
    _mamba_fake,
)


def _flow_fake(
    u: Tensor, state: Tensor, A: Tensor, dt: Any, timesteps: Any, B: Any, C_re: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return u.new_empty((*u.shape[:-1], C_re.shape[0])), A.new_empty(state.shape)


flow_step = step_operator(
    "flow_step(Tensor u, Tensor state, Tensor A, Tensor dt, Tensor? timesteps, Tensor B, "
    "Tensor C_re, Tensor C_im, Tensor D, float scale, bool state_only, str scheme) "
    "-> (Tensor, Tensor)",
    "step_diagonal",
    formulas.flow_step,
    _flow_fake,
)


def _griffin_fake(
    x: Tensor, gate: Any, conv: Tensor, h: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(conv.shape), rest[7].new_empty(h.shape)


griffin_step = step_operator(
    "griffin_step(Tensor x, Tensor gate, Tensor conv, Tensor h, Tensor started, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor input_weight, Tensor input_bias, "
    "Tensor recurrent_weight, Tensor recurrent_bias, Tensor rate, Tensor? timesteps, "
    "bool state_only, bool start_rule, bool tanh) -> (Tensor, Tensor, Tensor)",
    "step_griffin",
    formulas.griffin_step,
    _griffin_fake,
)


def _ssd_fake(parts: Tensor, conv: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = parts.new_empty((*parts.shape[:-1], h.shape[-3] * h.shape[-2]))
    return y, parts.new_empty(conv.shape), rest[3].new_empty(h.shape)


ssd_step = step_operator(
    "ssd_step(Tensor parts, Tensor conv, Tensor h, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor dt_bias, Tensor A, Tensor D, Tensor? norm_weight, Tensor? timesteps, int n_groups, "
    "float low, float high, float dt_scale, bool state_only, bool norm_before_gate) "
    "-> (Tensor, Tensor, Tensor)",
    "step_ssd",
    formulas.ssd_step,
    _ssd_fake,
)


def _s7_fake(v: Tensor, h: Tensor, weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    return base.new_empty(v.shape), base.new_empty(h.shape)


s7_step = step_operator(
    "s7_step(Tensor v, Tensor h, Tensor weight, Tensor base) -> (Tensor, Tensor)",
    "step_s7",
    formulas.s7_step,
    _s7_fake,
)


def _norm_fake(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


rms_norm = step_operator(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    "step_norm",
    formulas.rms_norm,
    _norm_fake,
)
