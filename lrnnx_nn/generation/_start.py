# SPDX-License-Identifier: MIT
"""From a prompt to where generation starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_nn.generation._context import Context
from lrnnx_nn.generation._prompt import Prompt
from lrnnx_nn.generation.state import rings, with_room
from lrnnx_nn.residual import takes_capacity


def start(model: Any, prompt: Prompt, more: int) -> Context:
    """Read the prompt; return where every row stands, with room for ``more`` tokens in caches."""
    before = prompt.before
    known = before if isinstance(before, Context) else None
    state = known.state if known is not None else before
    _check_positions(model, prompt, state, more)
    state = _roomy(model, prompt, state, more)
    logits = None if known is None else known.logits
    for begin in range(0, prompt.ids.shape[-1], prompt.chunk):
        logits, state = _read(model, prompt, begin, state, logits)
    if logits is None:
        raise ValueError("generate: an empty prompt")
    drawn = prompt.ids.new_zeros(prompt.batch) if known is None else known.drawn
    seen = _occurring(prompt, logits)
    return Context(state, logits, seen if known is None else seen | known.seen, drawn)


def _read(
    model: Any, prompt: Prompt, begin: int, state: Any, logits: Tensor | None
) -> tuple[Tensor, Any]:
    """Read a part of the prompt; rows that have ended keep their logits."""
    part = prompt.ids[..., begin : begin + prompt.chunk]
    if prompt.lengths is None and part.shape[-1] == 1 and state is not None:
        return model.step(part.squeeze(-1), state)
    if prompt.lengths is None:
        return model.prefill(part, state, lengths=None, last_only=True)
    lengths = (prompt.lengths - begin).clamp(0, part.shape[-1])
    new, state = model.prefill(part, state, lengths=lengths, last_only=True)
    if logits is not None:
        new = torch.where((lengths > 0).unsqueeze(-1), new, logits)
    return new, state


def _occurring(prompt: Prompt, logits: Tensor) -> Tensor:
    """Return (..., V) bool, the tokens of the prompt."""
    count = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    return count.scatter_add(-1, prompt.ids, prompt.valid().to(torch.int32)) > 0


def _check_positions(model: Any, prompt: Prompt, state: Any, more: int) -> None:
    """Raise where a model with a table of positions would run past its end."""
    limit = getattr(getattr(model, "config", None), "max_positions", None)
    if not isinstance(limit, int) or not prompt.batch.numel():
        return
    read = torch.as_tensor(prompt.ids.shape[-1] if prompt.lengths is None else prompt.lengths)
    position = getattr(state, "position", None)
    if isinstance(position, Tensor):
        read = read + position
    last = int(read.max()) + more
    if last > limit:
        raise ValueError(
            f"generate: {last} tokens with the new ones, but the model has positions for {limit}"
        )


def _roomy(model: Any, prompt: Prompt, state: Any, more: int) -> Any:
    """Return the state to start from, with caches of a fixed size for all that comes."""
    if not takes_capacity(model):
        return state
    length = prompt.ids.shape[-1] + more
    if state is None:
        return model.init_state(prompt.batch, capacity=max(length, 1))
    filled = [int(ring.next.max()) for ring in rings(state) if ring.next.numel()]
    if not filled:
        return state
    return with_room(state, model.init_state(prompt.batch, capacity=max(max(filled) + length, 1)))
