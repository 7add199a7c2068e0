# SPDX-License-Identifier: MIT
"""Continue token sequences with a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lrnnx_nn.architectures._tokens import trusted
from lrnnx_nn.generation import engine as engines
from lrnnx_nn.generation._context import Context
from lrnnx_nn.generation._prompt import Prompt, prompt_of
from lrnnx_nn.generation._start import start
from lrnnx_nn.generation.sampling import Sampling, row_keys
from lrnnx_nn.generation.state import keep_rows, same_layout
from lrnnx_nn.generation.streamer import FinishingStreamer, Streamer

LOOKS = 16
"""Tokens after which it is looked whether rows on a GPU go on."""


class LanguageModel(Protocol):
    """What `generate` needs: `LRNNLMHeadModel` is one. Ids are int64, states values.

    ``init_state`` may take ``capacity``, the tokens that caches make room for. A vocabulary size as
    ``model.vocab_size`` or ``model.config.vocab_size`` lets bad ids be found before any work.
    """

    def prefill(
        self, ids: Tensor, state: Any = None, *, lengths: Tensor | None, last_only: bool
    ) -> tuple[Tensor, Any]:
        """Read ids (..., L); return the logits (..., V) of the last valid token and the state."""
        ...

    def step(self, ids_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one token (...) of every row; return its logits (..., V) and the state."""
        ...

    def init_state(self, batch_shape: Sequence[int] = ()) -> Any:
        """Return the state before any token."""
        ...


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: (..., T) int64, the new tokens; T is the most of any row. A stop token is the last
            of its row; ``pad_token`` follows.
        lengths: (...) int64, new tokens of each row.
        log_probabilities: (..., T), log of the probability that the model itself gave each token,
            before temperature, penalty and filters; 0 behind the end of a row.
        context: where each row stands, to go on from: pass it as ``state``. Every token of the
            prompt and every new one has been read.
    """

    tokens: Tensor
    lengths: Tensor
    log_probabilities: Tensor
    context: Context

    @property
    def state(self) -> Any:
        """The model's state after every token."""
        return self.context.state

    def rows(self) -> list[Tensor]:
        """Return the new tokens of each row, (n,) each, rows in flattened order."""
        tokens = self.tokens.flatten(0, -2) if self.tokens.ndim > 1 else self.tokens.unsqueeze(0)
        return [row[:n] for row, n in zip(tokens, self.lengths.flatten().tolist(), strict=True)]


class _Carry(NamedTuple):
    """What one token needs of the one before."""

    context: Context
    keys: Tensor
    stop: Tensor
    active: Tensor
    """Rows that go on."""
    had: Tensor
    """Rows that went on before the last token, and so have it."""
    token: Tensor
    log_probability: Tensor


def generate(
    model: Any,
    prompt_ids: Tensor | Sequence[int] | Sequence[Tensor] | Sequence[Sequence[int]] | None,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] | int = (),
    seed: int | Sequence[int] | Tensor | None = None,
    streamer: Streamer | None = None,
    lengths: Tensor | None = None,
    state: Any = None,
    prefill_chunk: int | None = None,
    pad_token: int = 0,
    engine: str = "auto",
) -> Generation:
    """Continue prompts with tokens drawn from a language model.

    The model runs in evaluation mode and without gradients; its mode is restored. Prompts move to
    its device.

    Args:
        model: a `LanguageModel`, such as `LRNNLMHeadModel`.
        prompt_ids: (..., L) integers, or a list of 1-d prompts of any lengths. With a ``state`` it
            is what comes after it, and may be empty or None if that is a `Context`; a 1-d prompt
            then goes to every row.
        max_new_tokens: tokens to draw, at least 0.
        temperature: what logits are divided by; 0 takes the most likely token.
        top_k: draw from the k most likely tokens; None for all.
        top_p: draw from the smallest set of likely tokens whose probabilities sum to this; None for
            all.
        min_p: leave out tokens less than this times as likely as the best; None for none.
        repetition_penalty: above 1, makes tokens of prompt and continuation less likely; see
            `lrnnx_nn.generation.sampling`, which has the order of all these.
        stop_tokens: a row that draws one of them is complete: nothing is drawn for it any more, and
            its state stays as it is after that token.
        seed: of the random numbers: an integer, or one a row. None takes one from the operating
            system. PyTorch's generators are neither used nor changed. What a row draws depends on
            its place in the batch (or its own seed), and on no other row.
        streamer: called with every token as it comes; see `Streamer`.
        lengths: (...), tokens of each prompt in a right-padded batch.
        state: go on from here: the ``context`` of an earlier result, or a state of the model. A
            bare state does not tell which tokens came before, for ``repetition_penalty``.
        prefill_chunk: read prompts in parts of this many tokens, so that memory does not grow with
            their length; None for at once.
        pad_token: stands behind the end of rows.
        engine: ``auto`` captures the step in a CUDA graph on a CUDA device, and in a plan (the
            operators that it calls, without the Python around them) on a CPU where there are
            enough tokens, and repeats it in a plain loop elsewhere, or where it cannot be captured;
            on a CUDA device a warning says why, once. ``loop``, ``graph`` and ``replay`` insist.

    Raises:
        ValueError: an empty prompt without a context, ids outside the vocabulary, an option out of
            its range, shapes that do not fit; before any work. The model's logits are not finite.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool):
        raise ValueError(f"generate: max_new_tokens = {max_new_tokens!r}, expected an integer")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens = {max_new_tokens}, expected >= 0")
    if engine not in engines.ENGINES:
        raise ValueError(f"generate: engine = {engine!r}, expected one of {engines.ENGINES}")
    prompt = prompt_of(model, prompt_ids, lengths, state, prefill_chunk)
    stop = _stop_tokens(stop_tokens, prompt)
    _check_ids("pad_token", [pad_token], prompt.vocabulary)
    if prompt.vocabulary is not None:
        sampling.check(prompt.vocabulary)
    keys = row_keys(seed, prompt.batch, prompt.ids.device)
    with torch.no_grad(), _evaluating(model):
        context = start(model, prompt, max_new_tokens)
        sampling.check(context.logits.shape[-1])
        try:
            return _continue(
                model, context, keys, stop, sampling, max_new_tokens, streamer, pad_token, engine
            )
        finally:
            if isinstance(streamer, FinishingStreamer):
                streamer.finish()


def _continue(
    model: Any,
    context: Context,
    keys: Tensor,
    stop: Tensor,
    sampling: Sampling,
    count: int,
    streamer: Streamer | None,
    pad_token: int,
    engine: str,
) -> Generation:
    batch, device = keys.shape, keys.device
    tokens = torch.full((count, *batch), pad_token, device=device)
    chosen = torch.zeros(count, *batch, device=device, dtype=_wide(context.logits))
    lengths = torch.zeros(batch, dtype=torch.int64, device=device)
    every = torch.ones(batch, dtype=torch.bool, device=device)
    carry = _Carry(
        context, keys, stop, every, every, torch.zeros_like(keys), torch.zeros(batch).to(chosen)
    )
    token_rows, chosen_rows = tokens.unbind(0), chosen.unbind(0)
    taken = 0
    interval = 1
    if streamer is None:  # looking at values makes the host wait
        on_cpu = device.type == "cpu"
        interval = (1 if on_cpu else LOOKS) if len(stop) else LOOKS if on_cpu else count

    def step(carry: _Carry) -> _Carry:
        return _next(model, sampling, pad_token, carry)

    def observe(carry: _Carry) -> bool:
        nonlocal taken
        token_rows[taken].copy_(carry.token)
        chosen_rows[taken].copy_(carry.log_probability)
        if len(stop):
            lengths.add_(carry.had)
        taken += 1
        if taken % interval and taken < count:
            return False
        _check_finite(chosen, max(taken - interval, 0), taken)
        if streamer is not None:
            streamer(carry.token.clone(), carry.had.clone())
        return bool(len(stop)) and not bool(carry.active.any())

    if count and carry.token.numel():
        key = (sampling, pad_token)
        carry = engines.repeat(step, carry, count, observe, engine=engine, model=model, key=key)
    if not len(stop):
        lengths.fill_(taken)
    longest = int(lengths.max()) if lengths.numel() else 0
    tokens, chosen = tokens[:longest].movedim(0, -1), chosen[:longest].movedim(0, -1)
    return Generation(tokens.contiguous(), lengths, chosen.contiguous(), carry.context)


def _next(model: Any, sampling: Sampling, pad_token: int, carry: _Carry) -> _Carry:
    """Draw a token for every row that goes on, and let the model read it."""
    before, active = carry.context, carry.active
    token = sampling.choose(before.logits, before.seen, carry.keys, before.drawn)
    wide = before.logits.to(_wide(before.logits))
    chosen = torch.log_softmax(wide, -1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    if not len(carry.stop):
        with trusted:
            logits, state = model.step(token, before.state)
        seen = before.seen.scatter(-1, token.unsqueeze(-1), True)
        after = Context(state, logits, seen, before.drawn + 1)
        return carry._replace(context=after, token=token, log_probability=chosen)
    token = token.masked_fill(~active, pad_token)
    chosen = chosen.masked_fill(~active, 0.0)
    logits, state = _read(model, token, before, active)
    seen = before.seen.scatter(-1, token.unsqueeze(-1), True)
    seen, logits = keep_rows(active, (seen, logits), (before.seen, before.logits))
    stops = (token.unsqueeze(-1) == carry.stop).any(-1)
    after = Context(state, logits, seen, before.drawn + active)
    return carry._replace(
        context=after, active=active & ~stops, had=active, token=token, log_probability=chosen
    )


def _read(model: Any, token: Tensor, before: Context, active: Tensor) -> tuple[Tensor, Any]:
    """Let the model read a token in the rows that go on; the others' states stay."""
    with trusted:
        logits, state = model.step(token, before.state)
    if same_layout(state, before.state):
        return logits, keep_rows(active, state, before.state)
    if bool(active.all()):
        return logits, state
    # a cache that grows does so in all rows: where a row must not read, its token is padding
    return model.prefill(
        token.unsqueeze(-1), before.state, lengths=active.to(torch.int64), last_only=True
    )


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _check_finite(chosen: Tensor, start: int, stop: int) -> None:
    bad = ~torch.isfinite(chosen[start:stop]).reshape(stop - start, -1).all(-1)
    if bool(bad.any()):
        first = start + int(bad.nonzero()[0])
        raise ValueError(f"generate: the model's logits for new token {first} are not finite")


def _stop_tokens(stop_tokens: Sequence[int] | int, prompt: Prompt) -> Tensor:
    given = stop_tokens.tolist() if isinstance(stop_tokens, Tensor) else stop_tokens
    ids = [given] if isinstance(given, int) else list(given)
    _check_ids("stop_tokens", ids, prompt.vocabulary)
    return torch.tensor(ids, dtype=torch.int64, device=prompt.ids.device)


def _check_ids(name: str, ids: Sequence[Any], vocabulary: int | None) -> None:
    for token in ids:
        fits = isinstance(token, int) and not isinstance(token, bool) and token >= 0
        if not fits or (vocabulary is not None and token >= vocabulary):
            expected = "integers >= 0" if vocabulary is None else f"0 ... {vocabulary - 1}"
            raise ValueError(f"generate: {name} has {token!r}, expected {expected}")


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put a module into evaluation mode meanwhile; one that is in it is not touched."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
