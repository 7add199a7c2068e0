# SPDX-License-Identifier: MIT
"""What a caller gave as prompt, checked and made one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrnnx_nn.generation._context import Context


class Prompt(NamedTuple):
    """Tokens to read before the first new one.

    Attributes:
        ids: (..., L) int64, 0 at padding.
        lengths: (...) int64, or None if every row has L.
        before: a `Context`, a model's state, or None.
        chunk: tokens to read at once.
        vocabulary: number of tokens, or None if the model does not say.
    """

    ids: Tensor
    lengths: Tensor | None
    before: Any
    chunk: int
    vocabulary: int | None

    @property
    def batch(self) -> torch.Size:
        """Leading dimensions."""
        return self.ids.shape[:-1]

    def valid(self) -> Tensor:
        """Return (..., L) bool, what is no padding."""
        if self.lengths is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return torch.arange(self.ids.shape[-1]).to(self.lengths) < self.lengths.unsqueeze(-1)


def prompt_of(
    model: Any, prompt_ids: Any, lengths: Tensor | None, state: Any, chunk: int | None
) -> Prompt:
    """Check the arguments of `generate` that make up a prompt.

    Raises:
        ValueError: see `generate`.
    """
    for method in ("prefill", "step", "init_state"):
        if not callable(getattr(model, method, None)):
            raise ValueError(f"generate: {type(model).__name__} has no method {method}")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"generate: prefill_chunk = {chunk!r}, expected an integer >= 1 or None")
    device = _device(model)
    ids, lengths = _batch(prompt_ids, lengths, device, state)
    vocabulary = vocabulary_of(model)
    if isinstance(state, Context):
        ids, lengths = _fitted(ids, lengths, state)
        if vocabulary is not None and state.logits.shape[-1] != vocabulary:
            raise ValueError(
                f"generate: a context of {state.logits.shape[-1]} tokens, and the model has "
                f"{vocabulary}; expected a result of the same model"
            )
    prompt = Prompt(ids, lengths, state, chunk or max(ids.shape[-1], 1), vocabulary)
    _check_empty(prompt)
    return prompt._replace(ids=_checked_ids(prompt))


def vocabulary_of(model: Any) -> int | None:
    """Return how many tokens a model has, if it says."""
    for holder in (model, getattr(model, "config", None)):
        size = getattr(holder, "vocab_size", None)
        if isinstance(size, int):
            return size
    return None


def _device(model: Any) -> torch.device | None:
    if not isinstance(model, nn.Module):
        return None
    first = next(iter(model.parameters()), None)
    return None if first is None else first.device


def _batch(
    prompt_ids: Any, lengths: Tensor | None, device: torch.device | None, state: Any
) -> tuple[Tensor, Tensor | None]:
    """Return ids (..., L) and lengths on the device."""
    if prompt_ids is None:
        if not isinstance(state, Context):
            raise ValueError("generate: no prompt, expected token ids, or a context to go on from")
        prompt_ids = state.drawn.new_zeros(*state.drawn.shape, 0)
    if isinstance(prompt_ids, Tensor):
        return _tensor(prompt_ids, device), _lengths(lengths, prompt_ids, device)
    if not isinstance(prompt_ids, Sequence) or isinstance(prompt_ids, str | bytes):
        raise ValueError(
            f"generate: prompt_ids is a {type(prompt_ids).__name__}, expected integers: a tensor "
            "(..., L) or a list (a vocabulary's encode makes them of a text)"
        )
    if all(isinstance(token, int) for token in prompt_ids):
        ids = torch.tensor(list(prompt_ids), dtype=torch.int64)
        return ids.to(device), _lengths(lengths, ids, device)
    if lengths is not None:
        raise ValueError("generate: lengths with a list of prompts, which have their own")
    rows = [_row(row, i) for i, row in enumerate(prompt_ids)]
    sizes = torch.tensor([len(row) for row in rows], device=device)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), sizes


def _row(row: Any, index: int) -> Tensor:
    try:
        ids = torch.as_tensor(row, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"generate: prompt {index} holds no integers ({error})") from error
    if ids.ndim != 1:
        raise ValueError(f"generate: prompt {index} has shape {tuple(ids.shape)}, expected (L,)")
    return _tensor(ids if ids.numel() else ids.long(), None)


def _tensor(ids: Tensor, device: torch.device | None) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"generate: prompt_ids has dtype {ids.dtype}, expected an integer one")
    if ids.ndim < 1:
        raise ValueError("generate: prompt_ids is a scalar, expected (..., L)")
    return ids.to(device=device, dtype=torch.int64)


def _lengths(lengths: Tensor | None, ids: Tensor, device: torch.device | None) -> Tensor | None:
    if lengths is None:
        return None
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"generate: lengths has dtype {lengths.dtype}, expected an integer one")
    if lengths.shape != ids.shape[:-1]:
        raise ValueError(
            f"generate: lengths {tuple(lengths.shape)}, expected {tuple(ids.shape[:-1])}"
        )
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= ids.shape[-1]:
        raise ValueError(
            f"generate: lengths between {int(lengths.min())} and {int(lengths.max())}, "
            f"expected 0 ... {ids.shape[-1]}"
        )
    return lengths.to(device=device or ids.device, dtype=torch.int64)


def _fitted(ids: Tensor, lengths: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
    """Give a prompt of one row to every row of a context."""
    batch = context.drawn.shape
    if ids.shape[:-1] == batch:
        return ids, lengths
    if ids.ndim > 1:
        raise ValueError(
            f"generate: prompts of batch {tuple(ids.shape[:-1])} and a context of batch "
            f"{tuple(batch)}"
        )
    return ids.expand(*batch, -1), None if lengths is None else lengths.expand(batch)


def _check_empty(prompt: Prompt) -> None:
    if isinstance(prompt.before, Context):
        return
    hint = "" if prompt.before is None else "; a bare state has no logits, pass a result's context"
    if not prompt.ids.shape[-1]:
        raise ValueError(f"generate: an empty prompt, expected at least one token{hint}")
    if prompt.lengths is not None and bool((prompt.lengths == 0).any()):
        row = tuple((prompt.lengths == 0).nonzero()[0].tolist())
        raise ValueError(f"generate: prompt {row} is empty, expected at least one token{hint}")


def _checked_ids(prompt: Prompt) -> Tensor:
    valid = prompt.valid()
    outside = prompt.ids < 0
    if prompt.vocabulary is not None:
        outside = outside | (prompt.ids >= prompt.vocabulary)
    outside = outside & valid
    if bool(outside.any()):
        place = tuple(outside.nonzero()[0].tolist())
        top = "" if prompt.vocabulary is None else f" ... {prompt.vocabulary - 1}"
        raise ValueError(
            f"generate: token {int(prompt.ids[place])} at {place} of the prompt, expected 0{top}"
        )
    return torch.where(valid, prompt.ids, 0)
