"""Four tasks of memory, selection, recall and a sense of time, as functions of a generator.

A task draws sequences of tokens and the labels of their last M positions; `event_timing` also the
time elapsed before each event. Fresh sequences can be drawn for ever, so that nothing is learned by
heart, and the same generator state always draws the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Sequences and what is asked of them."""

    tokens: Tensor
    """(n, L), integers below the task's vocabulary."""
    labels: Tensor
    """(n, M), the right answers at the last M positions, integers below the task's n_classes."""
    gaps: Tensor | None = None
    """(n, L), time elapsed before each event; None where time plays no part."""


class Task(NamedTuple):
    """A generator with what a network must know about it."""

    draw: Callable[[int, torch.Generator], Batch]
    vocabulary: int
    n_classes: int
    chance: float
    """The best accuracy of an answer that does not look at the sequence."""
    title: str
    timesteps: bool = False
    """Whether the network is given `Batch.gaps`."""
    bits: int = 0
    """If not 0, tokens are numbers of so many bits (higher ones are signals), read bit by bit, and
    the answer at each of the last positions is as many labels, one a bit."""


PATTERN_BITS = 7
WAIT, RECALL = 2**PATTERN_BITS, 2**PATTERN_BITS + 1
COPY_VOCABULARY, INDUCTION_VOCABULARY = 10, 16
NOISE, MARKER = 0, COPY_VOCABULARY - 1
TRIGGER = INDUCTION_VOCABULARY - 1
EVENTS, MARK = 4, 3
SHORTEST, RATIO, RHYTHMS = 1.0, 4.0, 4


def copying(n: int, generator: torch.Generator, *, length: int = 20, wait: int = 8) -> Batch:
    """Return random patterns of bits, a pause, and as many signals: repeat the patterns in order.

    Args:
        n: sequences.
        generator: source of the random numbers.
        length: patterns to repeat.
        wait: positions of the pause.

    Source: the copy task of Graves et al. 2014, arXiv:1410.5401, section 4.1.
    """
    patterns = torch.randint(0, WAIT, (n, length), generator=generator)
    pause, recall = torch.full((n, wait), WAIT), torch.full((n, length), RECALL)
    return Batch(torch.cat([patterns, pause, recall], -1), bits_of(patterns).flatten(1))


def bits_of(tokens: Tensor, bits: int = PATTERN_BITS) -> Tensor:
    """Return the lowest bits of each token, (..., bits) integers, the least significant first."""
    return (tokens.unsqueeze(-1) >> torch.arange(bits)) & 1


def selective_copying(
    n: int, generator: torch.Generator, *, length: int = 64, copied: int = 4
) -> Batch:
    """Return noise with tokens strewn in, then one marker for each: repeat the tokens in order.

    The gaps between the tokens differ from sequence to sequence, so a fixed convolution cannot
    pick them out.

    Args:
        n: sequences.
        generator: source of the random numbers.
        length: positions before the markers, all noise but ``copied``.
        copied: tokens to repeat, at most ``length``.

    Source: Gu & Dao 2023, arXiv:2312.00752, section 4.1.1; smaller here.
    """
    what = torch.randint(1, MARKER, (n, copied), generator=generator)
    order = torch.rand(n, length, generator=generator).argsort(-1)
    where = order[:, :copied].sort(-1).values
    body = torch.full((n, length), NOISE).scatter(-1, where, what)
    return Batch(torch.cat([body, torch.full((n, copied), MARKER)], -1), what)


def induction_heads(n: int, generator: torch.Generator, *, length: int = 64) -> Batch:
    """Return random tokens with one trigger, and a trigger at the end: what followed the first?

    Args:
        n: sequences.
        generator: source of the random numbers.
        length: tokens, both triggers included; at least 3.

    Source: Gu & Dao 2023, arXiv:2312.00752, section 4.1.2; smaller here.
    """
    tokens = torch.randint(0, TRIGGER, (n, length), generator=generator)
    where = torch.randint(0, length - 2, (n, 1), generator=generator)
    tokens = tokens.scatter(-1, where, TRIGGER)
    tokens[:, -1] = TRIGGER
    return Batch(tokens, tokens.gather(-1, where + 1))


def event_timing(n: int, generator: torch.Generator, *, length: int = 32) -> Batch:
    """Return a stream of events of which one is marked: how long before the last did it happen?

    The answer k is drawn first, and the elapsed time log-uniform between SHORTEST RATIO^k and
    twice that, so the answers are a factor RATIO / 2 apart. This time is then split at random over
    the gaps after the mark. Tokens and the place of the mark are drawn without regard to k: they
    hold nothing about it, and without the gaps no answer is right more often than by chance.

    Args:
        n: sequences.
        generator: source of the random numbers.
        length: events, at least 2.
    """
    answer = torch.randint(0, RHYTHMS, (n, 1), generator=generator)
    tokens = torch.randint(0, MARK, (n, length), generator=generator)
    where = torch.randint(0, length - 1, (n, 1), generator=generator)
    tokens = tokens.scatter(-1, where, MARK)
    elapsed = SHORTEST * RATIO**answer * 2 ** torch.rand(n, 1, generator=generator)
    after = torch.arange(length) > where
    share = torch.empty(n, length).exponential_(generator=generator) * after
    before = SHORTEST * RATIO ** (RHYTHMS * torch.rand(n, length, generator=generator)) / length
    gaps = torch.where(after, elapsed * share / share.sum(-1, keepdim=True), before)
    return Batch(tokens, answer, gaps)


TASKS: dict[str, Task] = {
    "copying": Task(copying, RECALL + 1, 2, 0.5, "copying", bits=PATTERN_BITS),
    "selective_copying": Task(
        selective_copying, COPY_VOCABULARY, MARKER, 1 / (MARKER - 1), "selective copying"
    ),
    "induction_heads": Task(
        induction_heads, INDUCTION_VOCABULARY, TRIGGER, 1 / TRIGGER, "induction heads"
    ),
    "event_timing": Task(event_timing, EVENTS, RHYTHMS, 1 / RHYTHMS, "event timing", True),
    "event_timing_blind": Task(
        event_timing, EVENTS, RHYTHMS, 1 / RHYTHMS, "event timing without timesteps"
    ),
}
"""Every task by name; the last two differ only in what the network is given."""
