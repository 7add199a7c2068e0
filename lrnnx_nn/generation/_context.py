# SPDX-License-Identifier: MIT
"""Where generation stands after some tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Context(NamedTuple):
    """Where each row stands: all that further tokens depend on. A value, as states are.

    `fork`, `select` and `join` work on it as on a state.

    Attributes:
        state: the model's, after every token so far.
        logits: (..., V), of the next token.
        seen: (..., V) bool, the tokens so far, for the repetition penalty.
        drawn: (...) int64, tokens drawn so far: how far each row's random numbers are used up.
    """

    state: Any
    logits: Tensor
    seen: Tensor
    drawn: Tensor
