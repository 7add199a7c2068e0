# SPDX-License-Identifier: MIT
"""How S4 and S4D keep steps positive and real parts negative: the maps, and their inverses.

Source: the released code of S4 (Gu et al. 2022), whose options these are; `softplus` of A also in
Centaurus.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lrnnx_core.initialize import MIN_DECAY
from lrnnx_core.models._common import check_choice

StepTransform = Literal["exp", "softplus"]
RealTransform = Literal["exp", "softplus", "relu", "clip", "none"]


def check_transforms(where: str, dt_transform: str, A_transform: str) -> None:
    """Raise with the list of choices unless both exist."""
    check_choice(where, "dt_transform", dt_transform, get_args(StepTransform))
    check_choice(where, "A_transform", A_transform, get_args(RealTransform))


def step_size(raw: Tensor, transform: StepTransform) -> Tensor:
    """Return dt > 0 from the stored number."""
    return torch.exp(raw) if transform == "exp" else F.softplus(raw)


def raw_step_size(log_dt: Tensor, transform: StepTransform) -> Tensor:
    """Return the number to store for a given log dt."""
    return log_dt if transform == "exp" else _inverse_softplus(torch.exp(log_dt))


def real_part(raw: Tensor, transform: RealTransform) -> Tensor:
    """Return Re A from the stored number; below zero, but for ``none``.

    ``exp`` is -exp(raw), ``softplus`` -log(1 + exp(raw)), ``relu`` -max(raw, 0) - 1e-4, ``clip``
    min(raw, -1e-4), ``none`` raw.
    """
    if transform == "exp":
        return -torch.exp(raw)
    if transform == "softplus":
        return -F.softplus(raw)
    if transform == "relu":
        return -torch.relu(raw) - MIN_DECAY
    return torch.clamp(raw, max=-MIN_DECAY) if transform == "clip" else raw


def raw_real_part(decay: Tensor, transform: RealTransform) -> Tensor:
    """Return the number to store for a given -Re A, which is at least 1e-4 afterwards."""
    decay = decay.clamp(min=MIN_DECAY)
    if transform == "exp":
        return torch.log(decay)
    if transform == "softplus":
        return _inverse_softplus(decay)
    return decay - MIN_DECAY if transform == "relu" else -decay


def _inverse_softplus(x: Tensor) -> Tensor:
    """Return log(exp(x) - 1), for x > 0 without cancellation or overflow."""
    return x + torch.log(-torch.expm1(-x))
