# SPDX-License-Identifier: MIT
"""Names for the shapes and choices that appear in every signature.

Letters: B batch, L length, H = d_model, N = d_state, P the state of S5, Ch channels, K width of a
convolution. Sequences are channels-last, ``(..., L, H)``; leading batch dimensions are free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""A flat dict of real tensors; its keys are the ``state_dict`` keys of the Module."""

Number: TypeAlias = float | Tensor
"""A number that may be differentiated and mapped over: a float or a 0-d tensor."""

Discrete: TypeAlias = tuple[Tensor, Tensor]
"""``(A_bar, B_bar)``, or ``(A_bar, gamma)`` where a scheme is meant."""

Scheme: TypeAlias = Callable[[Tensor, Tensor, Tensor], Discrete]
"""A discretization: ``(A, dt_decay, dt_input) -> (A_bar, gamma)``, pure."""

SchemeName: TypeAlias = Literal[
    "zoh", "bilinear", "gbt", "euler", "dirac", "mamba", "none", "async"
]
Discretization: TypeAlias = SchemeName | Scheme
TimestepMode: TypeAlias = Literal["both", "state_only"]
Mode: TypeAlias = Literal["auto", "conv", "scan", "recurrent"]
Backend: TypeAlias = Literal["auto", "reference"]
