# SPDX-License-Identifier: MIT
"""Tokens as they come, and as text that is never broken inside a character."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Streamer(Protocol):
    """What `generate` calls after every token; any callable of two arguments is one."""

    def __call__(self, tokens: Tensor, active: Tensor) -> None:
        """Take the next token of every row.

        Args:
            tokens: (...) int64.
            active: (...) bool, the rows that have this token; the others stopped before.
        """
        ...


@runtime_checkable
class FinishingStreamer(Protocol):
    """A streamer that is told of the end, also where generation ends by an error."""

    def finish(self) -> None:
        """Show what is still held back."""
        ...


class TextStreamer:
    """Pass the text of one sequence on, piece by piece.

    A piece ends where a character does: bytes or tokens that are only a part of one wait for the
    rest.

    Args:
        decode: text of token numbers, such as a vocabulary's ``decode``; what is no character must
            become U+FFFD.
        write: what pieces are handed to, such as ``sys.stdout.write``.
        hidden: tokens that are not shown, such as one that stands for the end.

    Raises:
        ValueError: on a call, tokens of more than one sequence.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        write: Callable[[str], object],
        *,
        hidden: tuple[int, ...] = (),
    ) -> None:
        self.decode, self.write = decode, write
        self.hidden = frozenset(hidden)
        # Tokens since the last piece but one: some vocabularies join or blank tokens by what stands
        # before, so a piece is what the next tokens add to the text of the last one.
        self._context: list[int] = []
        self._fresh: list[int] = []

    def __call__(self, tokens: Tensor, active: Tensor) -> None:
        """Take the next token; see `Streamer`."""
        if tokens.numel() != 1:
            raise ValueError(f"TextStreamer: tokens {tuple(tokens.shape)}, expected one sequence")
        if bool(active.all()):
            self.put(int(tokens))

    def put(self, token: int) -> None:
        """Take a token; write the text that is complete with it."""
        if token in self.hidden:
            return
        self._fresh.append(token)
        piece = self._piece()
        if piece and not piece.endswith(REPLACEMENT):
            self._emit(piece)

    def finish(self) -> None:
        """Write what waits for a rest that does not come, U+FFFD for a broken character."""
        piece = self._piece()
        self._emit(piece)
        self._context = []

    def _piece(self) -> str:
        before = self.decode(self._context)
        return self.decode(self._context + self._fresh)[len(before) :]

    def _emit(self, piece: str) -> None:
        if piece:
            self.write(piece)
        self._context, self._fresh = self._fresh, []
