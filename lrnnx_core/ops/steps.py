# SPDX-License-Identifier: MIT
"""One step of each kind of recurrence, fused; `lrnnx_core.ops._step_formulas` says what.

Arguments are positional and already of matching shapes: models check them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends.cuda_argmax import argmax as argmax_on_cuda
from lrnnx_core.backends.cuda_linear_step import linear_step as linear_on_cuda
from lrnnx_core.backends.cuda_mamba_step import mamba_step as mamba_on_cuda
from lrnnx_core.backends.cuda_steps_diagonal import diagonal_step as diagonal_on_cuda
from lrnnx_core.backends.cuda_steps_diagonal import flow_step as flow_on_cuda
from lrnnx_core.backends.cuda_steps_griffin import griffin_step as griffin_on_cuda
from lrnnx_core.backends.cuda_steps_norm import rms_norm as norm_on_cuda
from lrnnx_core.backends.cuda_steps_s7 import s7_step as s7_on_cuda
from lrnnx_core.backends.cuda_steps_siso import siso_step as siso_on_cuda
from lrnnx_core.backends.cuda_steps_ssd import ssd_step as ssd_on_cuda
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
    cuda=diagonal_on_cuda,
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
    cuda=siso_on_cuda,
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
    cuda=mamba_on_cuda,
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
    cuda=flow_on_cuda,
)


def _griffin_fake(
    x: Tensor, gate: Any, conv: Tensor, h: Tensor, started: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = rest[6].new_empty(h.shape)
    return x.new_empty(x.shape), x.new_empty(conv.shape), new, started.new_empty(started.shape)


griffin_step = step_operator(
    "griffin_step(Tensor x, Tensor gate, Tensor conv, Tensor h, Tensor started, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor input_weight, Tensor input_bias, "
    "Tensor recurrent_weight, Tensor recurrent_bias, Tensor rate, Tensor? timesteps, "
    "bool state_only, bool start_rule, bool tanh) -> (Tensor, Tensor, Tensor, Tensor)",
    "step_griffin",
    formulas.griffin_step,
    _griffin_fake,
    cuda=griffin_on_cuda,
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
    cuda=ssd_on_cuda,
)


def _s7_fake(v: Tensor, h: Tensor, weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    return base.new_empty(v.shape), base.new_empty(h.shape)


s7_step = step_operator(
    "s7_step(Tensor v, Tensor h, Tensor weight, Tensor base) -> (Tensor, Tensor)",
    "step_s7",
    formulas.s7_step,
    _s7_fake,
    cuda=s7_on_cuda,
)


def _norm_fake(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


rms_norm = step_operator(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    "step_norm",
    formulas.rms_norm,
    _norm_fake,
    cuda=norm_on_cuda,
)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


linear_step = step_operator(
    "linear_step(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    None,
    formulas.linear_step,
    _linear_fake,
    cuda=linear_on_cuda,
)


def _argmax_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


argmax = step_operator(
    "argmax(Tensor x) -> Tensor", None, formulas.argmax, _argmax_fake, cuda=argmax_on_cuda
)
