# SPDX-License-Identifier: MIT
"""Learning a text token by token, and how many bits a text costs a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrnnx_nn.data.text import Vocabulary
from lrnnx_nn.generation.state import map_state, tensors
from lrnnx_nn.recipes import FitConfig
from lrnnx_nn.training.engine import BaseTask, to_device

WINDOWS = ("random", "stream")
CHUNK = 1024
"""Tokens that are read at once when a text is judged; the bits do not depend on it."""


class TextScore(NamedTuple):
    """What a text costs: total bits, and what it is measured by."""

    bits: float
    tokens: int
    characters: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of the text in UTF-8."""
        return self.bits / self.bytes

    @property
    def bits_per_character(self) -> float:
        """Bits for each Unicode character."""
        return self.bits / self.characters

    def figures(self, part: str) -> dict[str, float]:
        """Return both under names that begin with the part's."""
        return {
            f"{part}_bits_per_byte": self.bits_per_byte,
            f"{part}_bits_per_character": self.bits_per_character,
        }


def score_text(model: Any, vocabulary: Vocabulary, text: str, *, chunk: int = CHUNK) -> TextScore:
    """Return how many bits a model needs for a whole text.

    The text is read once from its start, in chunks, with the state carried from each to the next:
    every token is predicted from all those before it. The first one has none and costs log2 of
    the vocabulary's size; a character that is unknown costs the bits to spell it out besides.

    Args:
        model: with `prefill`, in evaluation mode.
        vocabulary: of the model.
        text: at least one character.
        chunk: tokens read at once.

    Raises:
        ValueError: an empty text, or one with characters that the vocabulary lacks.
    """
    if not text:
        raise ValueError("an empty text has no bits per byte")
    ids = vocabulary.encode(text)
    bits = math.log2(vocabulary.size) + token_bits(model, ids, chunk=chunk)
    bits += vocabulary.unknown_bits(ids)
    return TextScore(bits, len(ids), len(text), len(text.encode()))


@torch.no_grad()
def token_bits(model: Any, ids: Tensor, *, chunk: int = CHUNK) -> float:
    """Return the bits of all tokens (n,) but the first, each predicted from those before it."""
    ids = ids.to(next(model.parameters()).device)
    nats, state = 0.0, None
    for start in range(0, len(ids) - 1, chunk):
        stop = min(start + chunk, len(ids) - 1)
        logits, state = model.prefill(ids[start:stop], state)
        found = F.cross_entropy(logits.float(), ids[start + 1 : stop + 1], reduction="none")
        nats += float(found.double().sum())
    return nats / math.log(2)


class Windows(NamedTuple):
    """A batch: ids (B, context + 1), and the number (B,) of the stream each row belongs to."""

    ids: Tensor
    row: Tensor


class LanguageTask(BaseTask):
    """Predict each token of windows of a text.

    Args:
        model: the model that is trained, for the shape of its state.
        train: (n,) int64, the tokens to learn from.
        config: batch size and accumulation.
        context: tokens that are predicted in each window.
        windows: ``random``: windows anywhere, each from the zero state. ``stream``: the text is cut
            in ``batch_size`` streams, each step takes the next window of every one, and the state
            is carried on; the gradient ends at the window (truncated backpropagation through time).
            Each pass starts at another place, with zero states.
        vocabulary: of the tokens.
        validation: text to judge by; "" for none.

    Raises:
        ValueError: a text that is shorter than a window.
    """

    metric = "validation_bits_per_byte"

    def __init__(
        self,
        model: Any,
        train: Tensor,
        config: FitConfig,
        *,
        context: int,
        vocabulary: Vocabulary,
        windows: str = "random",
        validation: str = "",
    ) -> None:
        if windows not in WINDOWS:
            raise ValueError(f"windows = {windows!r}, expected one of {', '.join(WINDOWS)}")
        if context < 1:
            raise ValueError(f"context = {context}, expected an integer >= 1")
        self.model, self.train, self.config = model, train, config
        self.context, self.windows, self.vocabulary = context, windows, vocabulary
        self.validation = validation
        self.length = len(train) // config.batch_size  # of a stream
        needed = context + 1
        if len(train) < needed or (windows == "stream" and self.length < needed):
            each = f" in {config.batch_size} streams" if windows == "stream" else ""
            raise ValueError(
                f"the text to learn from has {len(train)} tokens{each}, a window of context = "
                f"{context} needs {needed}; take a longer text, a smaller --context or --batch-size"
            )
        self.device = next(model.parameters()).device
        self.position = self.length  # in each stream: a new pass begins
        self.states: dict[int, Any] = {}  # by the first stream of each part of a batch

    def batch(self, generator: torch.Generator) -> Windows:
        """Return windows at random places, or the next ones of every stream."""
        size, span = self.config.batch_size, torch.arange(self.context + 1)
        row = torch.arange(size)
        if self.windows == "random":
            last = len(self.train) - self.context
            starts = torch.randint(last, (size,), generator=generator)
        else:
            if self.position + self.context + 1 > self.length:
                spare = min(self.context, self.length - self.context)
                self.position = int(torch.randint(spare, (), generator=generator))
                self.states = {}
            starts = row * self.length + self.position
            self.position += self.context
        ids = self.train[starts.unsqueeze(-1) + span]
        return to_device(Windows(ids, row), self.device)

    def weight(self, batch: Windows) -> float:
        """Return the number of tokens that are predicted."""
        return float(batch.ids.shape[0] * self.context)

    def loss(self, model: Any, batch: Windows) -> Tensor:
        """Return the cross entropy of a token in nats."""
        read, target = batch.ids[:, :-1], batch.ids[:, 1:]
        if self.windows == "random":
            logits = model(read)
        else:
            key = int(batch.row[0])
            logits, state = model.prefill(read, self.states.get(key))
            self.states[key] = map_state(lambda x: x.detach(), state)
        return F.cross_entropy(logits.float().flatten(0, -2), target.flatten())

    def evaluate(self, model: Any) -> Mapping[str, float]:
        """Return bits per byte and per character of the validation text."""
        if not self.validation:
            return {}
        return score_text(model, self.vocabulary, self.validation).figures("validation")

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the streams, and their states."""
        states = {str(key): list(tensors(state)) for key, state in self.states.items()}
        return {"position": self.position, "states": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at such a place."""
        self.position = state["position"]
        self.states = {}
        for key, saved in state["states"].items():
            values = iter([x.to(self.device) for x in saved])
            like = self.model.init_state((1,))
            self.states[int(key)] = map_state(lambda _, values=values: next(values), like)
