# SPDX-License-Identifier: MIT
"""States as values: continue one several ways, take rows of it, measure it.

A state is a tensor, or tuples, named tuples, lists and dicts of states. The batch axes of its
tensors come first, as in everything that `init_state`, `prefill` and `step` return. Nothing here
writes to a state, so that keeping a reference to one is a snapshot of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lrnnx_nn.kv_cache import AttentionRing


def map_state(f: Callable[..., Any], state: Any, *others: Any) -> Any:
    """Return the state whose tensors are ``f`` of those of the given states, which are built alike.

    What is neither a tensor nor a container, such as None or an int, is kept as in the first.

    Raises:
        ValueError: states that are not built alike.
    """
    if isinstance(state, Tensor):
        if not all(isinstance(other, Tensor) for other in others):
            raise ValueError(f"states are not built alike: {_kinds(state, *others)}")
        return f(state, *others)
    if isinstance(state, dict):
        if not all(isinstance(o, dict) and o.keys() == state.keys() for o in others):
            raise ValueError(f"states are not built alike: {_kinds(state, *others)}")
        return {k: map_state(f, v, *(o[k] for o in others)) for k, v in state.items()}
    if isinstance(state, tuple | list):
        if not all(type(o) is type(state) and len(o) == len(state) for o in others):
            raise ValueError(f"states are not built alike: {_kinds(state, *others)}")
        parts = [map_state(f, *row) for row in zip(state, *others, strict=True)]
        kind = type(state)
        return kind(*parts) if hasattr(state, "_fields") else kind(parts)
    return state


def _kinds(*states: Any) -> str:
    return ", ".join(
        f"{type(s).__name__} of {len(s)}"
        if isinstance(s, tuple | list | dict)
        else type(s).__name__
        for s in states
    )


def tensors(state: Any) -> Iterator[Tensor]:
    """Yield the tensors of a state, in order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)
    elif isinstance(state, tuple | list):
        for value in state:
            yield from tensors(value)


def fork(state: Any, n: int) -> Any:
    """Return a state of ``n`` rows that all equal ``state``, to continue it n ways.

    Args:
        state: of batch shape (...); anything that `prefill` or `step` returns, or a
            `lrnnx_nn.generation.Context`.
        n: number of rows, at least 0.

    Returns:
        The same, of batch shape (n, ...). The rows share memory with ``state`` until a step makes
        new ones.

    Raises:
        ValueError: n is not an integer >= 0.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise ValueError(f"fork: n = {n!r}, expected an integer >= 0")
    return map_state(lambda t: t.unsqueeze(0).expand(n, *t.shape), state)


def select(state: Any, index: int | slice | list[int] | Tensor) -> Any:
    """Return rows of a state along its first batch axis.

    Args:
        state: of batch shape (B, ...).
        index: an integer, which drops the axis; a slice, integers (possibly repeated), or a
            boolean mask (B,).

    Raises:
        ValueError: a state without a batch axis, or rows that it does not have.
    """
    sizes = {t.shape[0] if t.ndim else None for t in tensors(state)}
    if None in sizes or len(sizes) > 1:
        raise ValueError(
            "select: the state has no batch axis, its tensors are "
            + ", ".join(str(tuple(t.shape)) for t in tensors(state))
        )
    try:
        return map_state(lambda t: t[index], state)
    except IndexError as error:
        raise ValueError(f"select: rows {index!r} of a state of {sizes.pop()} rows") from error


def join(states: list[Any] | tuple[Any, ...]) -> Any:
    """Return one state whose rows are ``states``, the inverse of `select` with integers.

    Args:
        states: at least one, of one batch shape (...) and equal shapes.

    Returns:
        A state of batch shape (len(states), ...).

    Raises:
        ValueError: no states, or states that are not alike; caches that have grown to different
            lengths are not.
    """
    if not states:
        raise ValueError("join: no states, expected at least one")
    shapes = [[tuple(t.shape) for t in tensors(s)] for s in states]
    for row, found in enumerate(shapes):
        if found != shapes[0]:
            raise ValueError(f"join: state {row} has shapes {found}, state 0 has {shapes[0]}")
    return map_state(lambda *rows: torch.stack(rows), *states)


def state_bytes(state: Any) -> int:
    """Return the bytes that the tensors of a state hold."""
    return sum(t.numel() * t.element_size() for t in tensors(state))


def same_layout(a: Any, b: Any) -> bool:
    """Return whether two states have the same tensors but for their values."""
    kinds = [[(t.shape, t.dtype, t.device) for t in tensors(s)] for s in (a, b)]
    return kinds[0] == kinds[1]


def keep_rows(active: Tensor, new: Any, old: Any) -> Any:
    """Return ``new`` in the rows where ``active`` (...) is true, and ``old`` in the others."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(active.reshape(active.shape + (1,) * (a.ndim - active.ndim)), a, b)

    return map_state(choose, new, old)


def rings(state: Any) -> Iterator[AttentionRing]:
    """Yield the attention caches of fixed size in a state."""
    if isinstance(state, AttentionRing):
        yield state
    elif isinstance(state, dict | tuple | list):
        for part in state.values() if isinstance(state, dict) else state:
            yield from rings(part)


def with_room(state: Any, larger: Any) -> Any:
    """Return a state whose attention rings have at least the slots of those in ``larger``.

    A ring that has fewer slots than its window holds position p in slot p, so that further slots go
    behind.

    Args:
        state: a model's state.
        larger: a state of the same model and batch before any sample, of a larger capacity.
    """
    if isinstance(state, AttentionRing):
        if not isinstance(larger, AttentionRing):
            raise ValueError(
                f"a state with an AttentionRing where the model has a {type(larger).__name__}, "
                "expected a state of the same model"
            )
        missing = larger.position.shape[-1] - state.position.shape[-1]
        if missing <= 0:
            return state
        behind = [part[..., -missing:, :, :].to(state.k) for part in (larger.k, larger.v)]
        return AttentionRing(
            torch.cat([state.k, behind[0]], -3),
            torch.cat([state.v, behind[1]], -3),
            torch.cat([state.position, larger.position[..., -missing:]], -1),
            state.next,
        )
    if isinstance(state, dict):
        return {k: with_room(v, larger[k]) for k, v in state.items()}
    if isinstance(state, tuple | list):
        parts = [with_room(a, b) for a, b in zip(state, larger, strict=True)]
        kind = type(state)
        return kind(*parts) if hasattr(state, "_fields") else kind(parts)
    return state
