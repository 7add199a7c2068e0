# SPDX-License-Identifier: MIT
"""How the next token is drawn: pure functions on logits (..., V), and random numbers of a row.

Scores are logits that may be minus infinity where a token is excluded. Each filter keeps at least
the best token. Everything runs in float32 or wider, without synchronisation, so that it can be
captured in a CUDA graph.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lrnnx_core.ops.steps import argmax

# --------------------------------------------------------------------------------------- filters


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred less likely: positive scores over, negative ones times penalty.

    Args:
        scores: (..., V).
        seen: (..., V) bool, the tokens that occurred.
        penalty: 1 changes nothing, above 1 discourages, below 1 encourages.

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1, with the sign of the score
    taken into account, as in the released code.
    """
    penalized = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(seen, penalized, scores)


def scale(scores: Tensor, temperature: float) -> Tensor:
    """Return scores over temperature, shifted so that the best is 0: no temperature overflows."""
    smallest = torch.finfo(scores.dtype).tiny
    return (scores - scores.amax(-1, keepdim=True)) / max(temperature, smallest)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Exclude all but the k best tokens; what ties with the k-th stays.

    Source: Fan et al. 2018, arXiv:1805.04833, section 5.4.
    """
    last = scores.topk(k, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < last, -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Keep the smallest set of best tokens whose probabilities sum to p or more.

    Among equal scores the lower token stays.

    Source: Holtzman et al. 2020 (nucleus sampling), arXiv:1904.09751, section 3.1.
    """
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    probability = torch.softmax(ordered, dim=-1, dtype=_wide(scores))
    before = probability.cumsum(-1) - probability
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before < p)
    return scores.masked_fill(~keep, -math.inf)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """Exclude tokens less than p times as likely as the best one.

    Source: Nguyen et al. 2024 (min-p sampling), arXiv:2407.01082, section 3.
    """
    least = scores.amax(-1, keepdim=True) + math.log(p)
    return scores.masked_fill(scores < least, -math.inf)


# -------------------------------------------------------------------------------- random numbers

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 1 << 64


def _signed(word: int) -> int:
    """Return a 64-bit word as the int64 with the same bits."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word


def _mix(word: Tensor) -> Tensor:
    """Scramble int64 words, one to one; int64 arithmetic wraps around as the algorithm wants it.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators" (SplitMix64),
    with Stafford's variant 13 of the finalizer.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ _shifted(word, shift)) * _signed(factor)
    return word ^ _shifted(word, 31)


def _shifted(word: Tensor, shift: int) -> Tensor:
    """Shift right by so many bits and fill with zeros; ``>>`` alone would copy the sign."""
    return (word >> shift) & ((1 << (64 - shift)) - 1)


def row_keys(
    seed: int | Sequence[int] | Tensor | None,
    batch: Sequence[int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the key (...) of every row's stream of random numbers.

    Args:
        seed: an integer, from which row i of the flattened batch gets the i-th stream; or integers
            (...), one a row, so that a row can be drawn again alone; None for one from the
            operating system.
        batch: the batch shape (...).
        device: where the keys are needed.

    Raises:
        ValueError: seeds that are not integers, or not of the batch's shape.
    """
    batch = tuple(batch)
    if seed is None:
        seed = secrets.randbits(63)
    if isinstance(seed, int) and not isinstance(seed, bool):
        row = torch.arange(math.prod(batch), device=device).reshape(batch)
        return _mix(_signed(seed) + _GOLDEN_STEP * (row + 1))
    try:
        seeds = torch.as_tensor(seed, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"seed = {seed!r}, expected an integer or one a row") from error
    if seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool:
        raise ValueError(f"seed has dtype {seeds.dtype}, expected integers")
    if seeds.shape != batch:
        raise ValueError(f"seed {tuple(seeds.shape)}, expected an integer or {batch}, one a row")
    return _mix(seeds.long() + _GOLDEN_STEP)


def uniforms(keys: Tensor, drawn: Tensor, count: int) -> Tensor:
    """Return numbers (..., count) in the open interval from 0 to 1, of each row's own stream.

    They are a function of the arguments alone: of no global generator, no other row, no device.

    Args:
        keys: (...), from `row_keys`.
        drawn: (...) int64, how many times the row has drawn before.
        count: how many numbers a row takes each time.
    """
    start = _mix(keys + _GOLDEN_STEP * (drawn + 1)).unsqueeze(-1)
    words = _mix(start + _GOLDEN_STEP * torch.arange(1, count + 1, device=keys.device))
    wide = _wide(keys)
    bits = 52 if wide == torch.float64 else 23  # so that adding a half is exact
    return (_shifted(words, 64 - bits).to(wide) + 0.5) * 2.0**-bits


def _wide(like: Tensor) -> torch.dtype:
    """Return float64 where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


_GOLDEN_STEP = _signed(_GOLDEN)


def draw(scores: Tensor, numbers: Tensor) -> Tensor:
    """Draw a token (...) with probability softmax(scores), given uniform numbers (..., V).

    The token of the largest score plus Gumbel noise, -log(-log(number)), has that distribution.
    """
    return (scores - torch.log(-torch.log(numbers))).argmax(-1)


# --------------------------------------------------------------------------------------- options


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen, in the order of the attributes.

    Attributes:
        repetition_penalty: see `penalize_repetition`; 1 for none.
        temperature: what scores are divided by; 0 takes the best token (greedy), whatever the
            filters are.
        top_k: see `keep_top_k`; None for all.
        top_p: see `keep_top_p`; None or 1 for all.
        min_p: see `keep_min_p`; None or 0 for all.

    Raises:
        ValueError: a value out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        _number("repetition_penalty", self.repetition_penalty, "> 0", lambda x: x > 0)
        _number("temperature", self.temperature, ">= 0 (0 is greedy)", lambda x: x >= 0)
        k = self.top_k
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
            raise ValueError(f"top_k = {k!r}, expected an integer >= 1 or None")
        if self.top_p is not None:
            _number("top_p", self.top_p, "in (0, 1]", lambda x: 0 < x <= 1)
        if self.min_p is not None:
            _number("min_p", self.min_p, "in [0, 1]", lambda x: 0 <= x <= 1)

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken and nothing is drawn."""
        return self.temperature == 0

    def check(self, vocabulary: int) -> None:
        """Raise where an option does not go with that many tokens."""
        if self.top_k is not None and self.top_k > vocabulary:
            raise ValueError(f"top_k = {self.top_k}, but the vocabulary has {vocabulary} tokens")

    def scores(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Return the scores (..., V) whose softmax is what tokens are drawn from.

        Args:
            logits: (..., V) of any floating dtype.
            seen: (..., V) bool, the tokens that occurred.
        """
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.repetition_penalty != 1:
            scores = penalize_repetition(scores, seen, self.repetition_penalty)
        if self.greedy:
            return scores
        scores = scale(scores, self.temperature)
        if self.top_k is not None:
            scores = keep_top_k(scores, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            scores = keep_top_p(scores, self.top_p)
        if self.min_p is not None and self.min_p > 0:
            scores = keep_min_p(scores, self.min_p)
        return scores

    def choose(self, logits: Tensor, seen: Tensor, keys: Tensor, drawn: Tensor) -> Tensor:
        """Return the next token (...) of every row; arguments as in `scores` and `uniforms`."""
        if self.greedy and self.repetition_penalty == 1:
            return argmax(logits)
        scores = self.scores(logits, seen)
        if self.greedy:
            return argmax(scores)
        return draw(scores, uniforms(keys, drawn, scores.shape[-1]))


def _number(name: str, value: float, expected: str, holds: Callable[[float], bool]) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not (real and math.isfinite(value) and holds(value)):
        raise ValueError(f"{name} = {value!r}, expected a number {expected}")
