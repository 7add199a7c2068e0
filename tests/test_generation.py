"""Generation: sampling against its definition, and continuations against the plain way to them."""

from __future__ import annotations

import gc
import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from eager_graph import EagerGraph, pretend
from torch import Tensor, nn

from lrnnx_nn import LAYERS, Attention, Block, Gated, LRNNLMHeadModel, Stack
from lrnnx_nn.generation import (
    Context,
    Generation,
    NotCapturableError,
    Sampling,
    TextStreamer,
    engine,
    fork,
    generate,
    join,
    sampling,
    select,
    state_bytes,
)
from lrnnx_nn.generation import state as states

V = 11
same = torch.testing.assert_close


def model_of(*types: str, dtype: torch.dtype = torch.float64, **options: Any) -> LRNNLMHeadModel:
    torch.manual_seed(1)
    options = {"tie_embeddings": False, **options}
    model = LRNNLMHeadModel(8, 4, len(types), V, types, dtype=dtype, **options)
    for p in model.parameters():  # a fresh model hardly prefers any token
        if p.ndim > 1:
            nn.init.normal_(p, std=0.5)
    return model.eval()


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


class Chain:
    """A Markov chain as a language model: the logits are a row of a table. It counts its calls."""

    vocab_size = V

    def __init__(self, table: Tensor) -> None:
        self.table, self.read = table, 0

    def init_state(self, batch_shape: Any = ()) -> Tensor:
        return torch.zeros(tuple(batch_shape), dtype=torch.int64)

    def prefill(
        self, ids: Tensor, state: Any = None, *, lengths: Tensor | None, last_only: bool
    ) -> tuple[Tensor, Tensor]:
        self.read += 1
        state = self.init_state(ids.shape[:-1]) if state is None else state
        n = torch.full(ids.shape[:-1], ids.shape[-1]) if lengths is None else lengths
        last = ids.gather(-1, (n - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return self.table[last], state + n

    def step(self, ids_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.read += 1
        return self.table[ids_t], state + 1


def table_of(seed: int = 3, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(V, V, generator=torch.Generator().manual_seed(seed)).double()


MIXTURES = [*((name,) for name in LAYERS), ("attn",), ("s5", "attn", "mamba")]
every_mixture = pytest.mark.parametrize("types", MIXTURES, ids="-".join)


# ------------------------------------------------------------------------------------- sampling


def test_top_k_keeps_the_k_best_and_ties() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 2.0, 1.0, 0.0]])
    kept = sampling.keep_top_k(scores, 2)
    off = -math.inf
    assert kept.tolist() == [[3.0, off, 2.0, off], [1.0, 2.0, 1.0, off]]
    same(sampling.keep_top_k(scores, 4), scores)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_holds_p(p: float) -> None:
    logits = torch.randn(50, V, generator=torch.Generator().manual_seed(4)).double()
    logits[7] = 0.0  # all alike: the first tokens stay
    kept = sampling.keep_top_p(logits, p)
    for row, got in zip(logits, kept, strict=True):
        order = sorted(range(V), key=lambda i: (-row[i].item(), i))
        probability = torch.softmax(row, -1)
        total, want = 0.0, set()
        for i in order:
            if total >= p:
                break
            want.add(i)
            total += probability[i].item()
        assert {i for i in range(V) if got[i] > -math.inf} == want
        same(got[got > -math.inf], row[got > -math.inf])


def test_min_p_compares_with_the_best() -> None:
    probability = torch.tensor([0.5, 0.24, 0.099, 0.06, 0.101]).double()
    kept = sampling.keep_min_p(probability.log(), 0.2) > -math.inf
    assert kept.tolist() == [True, True, False, False, True]
    assert (sampling.keep_min_p(probability.log(), 1.0) > -math.inf).sum() == 1


def test_the_penalty_moves_both_signs_down() -> None:
    scores = torch.tensor([2.0, -2.0, 3.0, -3.0])
    seen = torch.tensor([True, True, False, False])
    got = sampling.penalize_repetition(scores, seen, 2.0)
    assert got.tolist() == [1.0, -4.0, 3.0, -3.0]


def test_scores_take_the_options_in_order() -> None:
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(5)).double()
    seen = torch.rand(6, V, generator=torch.Generator().manual_seed(6)) < 0.3
    options = Sampling(1.3, 0.7, top_k=6, top_p=0.9, min_p=0.05)
    want = torch.where(seen, torch.where(logits > 0, logits / 1.3, logits * 1.3), logits) / 0.7
    want[want < want.sort(-1).values[:, -6:-5]] = -math.inf
    want = sampling.keep_min_p(sampling.keep_top_p(want, 0.9), 0.05)
    same(torch.softmax(options.scores(logits, seen), -1), torch.softmax(want, -1))


@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 1e30])
def test_no_temperature_overflows(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    scores = Sampling(temperature=temperature).scores(logits, torch.zeros(3, dtype=torch.bool))
    probability = torch.softmax(scores, -1)
    want = [1 / 3] * 3 if temperature > 1 else [0.0, 1.0, 0.0]
    same(probability, torch.tensor(want))


def far(count: Tensor, probability: Tensor) -> Tensor:
    """Return how many standard deviations each count is from what is expected."""
    n = count.sum()
    return (count - n * probability).abs() / (n * probability * (1 - probability)).sqrt().clamp(
        1e-9
    )


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str
)
def test_draws_have_the_distribution_of_the_scores(options: dict[str, Any]) -> None:
    rows = 40_000
    logits = table_of()[:1].expand(rows, V)
    seen = torch.zeros(rows, V, dtype=torch.bool)
    chosen = Sampling(**options)
    keys = sampling.row_keys(7, (rows,))
    probability = torch.softmax(chosen.scores(logits[:1], seen[:1]), -1)[0]
    for drawn in (0, 1):
        tokens = chosen.choose(logits, seen, keys, torch.full((rows,), drawn))
        count = torch.bincount(tokens, minlength=V).double()
        assert (count[probability == 0] == 0).all()
        assert far(count, probability)[probability > 0].max() < 4.5
    filtered = bool({"top_k", "top_p", "min_p"} & options.keys())
    assert filtered == bool((probability == 0).any())


def test_successive_draws_of_a_row_are_independent() -> None:
    count, probability = 30_000, torch.tensor([0.5, 0.3, 0.2]).double()
    keys = sampling.row_keys(1, ()).expand(count)
    tokens = sampling.draw(probability.log(), sampling.uniforms(keys, torch.arange(count), 3))
    pairs = torch.bincount(3 * tokens[:-1] + tokens[1:], minlength=9).double()
    assert far(pairs, torch.outer(probability, probability).flatten()).max() < 4.5


def test_random_numbers_are_uniform_and_inside_the_interval() -> None:
    keys = sampling.row_keys(0, (1000,))
    u = sampling.uniforms(keys, torch.zeros(1000, dtype=torch.int64), 100)
    assert u.min() > 0
    assert u.max() < 1
    ordered = u.flatten().sort().values
    uniform = torch.linspace(0, 1, len(ordered)).double()
    assert (ordered - uniform).abs().max() < 1.63 / math.sqrt(len(ordered))  # Kolmogorov, 1 %
    assert len(set(u.flatten().tolist())) == u.numel()
    bits = (u * 2**52).long()
    ones = torch.stack([((bits >> i) & 1).double().mean() for i in range(52)])
    assert (ones - 0.5).abs().max() < 4 * 0.5 / math.sqrt(u.numel())


def test_the_mixer_of_words_is_splitmix64() -> None:
    # the first outputs of SplitMix64 from the state 1234567, as published with its C code
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    golden = sampling._GOLDEN_STEP
    got = sampling._mix(1234567 + golden * torch.arange(1, 4))
    assert [int(word) % 2**64 for word in got] == want


def test_seeds_of_rows_are_streams_of_their_own() -> None:
    keys = sampling.row_keys([5, 6], (2,))
    same(keys[1], sampling.row_keys([6], (1,))[0])
    assert keys[0] != keys[1]
    assert len(set(sampling.row_keys(0, (50, 40)).flatten().tolist())) == 2000
    assert (sampling.row_keys(-1, (3,)) == sampling.row_keys(2**64 - 1, (3,))).all()
    assert (sampling.row_keys(None, (3,)) != sampling.row_keys(None, (3,))).all()


# ----------------------------------------------------------------------- against the plain way


def plainly(model: Any, ids: Tensor, count: int) -> Tensor:
    """Continue ids (L,) greedily, by a whole forward for every token."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[-1].argmax(-1, keepdim=True)])
    return ids[-count:]


@every_mixture
def test_greedy_is_the_argmax_of_the_whole_forward(types: tuple[str, ...]) -> None:
    model, prompt = model_of(*types, d_intermediate=8), ids_of(2, 5)
    found = generate(model, prompt, 6, temperature=0)
    with torch.no_grad():
        for row, got in zip(prompt, found.tokens, strict=True):
            assert got.tolist() == plainly(model, row, 6).tolist()
        whole = torch.log_softmax(model(torch.cat([prompt, found.tokens], 1)), -1)
    want = whole[:, 4:-1].gather(-1, found.tokens.unsqueeze(-1)).squeeze(-1)
    same(found.log_probabilities, want)
    same(found.context.logits.log_softmax(-1), whole[:, -1])


@pytest.mark.parametrize("types", [("s5", "mamba"), ("attn", "rglru")], ids="-".join)
def test_ragged_prompts_are_the_single_ones(types: tuple[str, ...]) -> None:
    model = model_of(*types)
    prompts = [ids_of(n, seed=n) for n in (5, 1, 8)]
    options: dict[str, Any] = {"top_p": 0.9, "repetition_penalty": 1.2}
    seeds = [3, 1, 4]
    found = generate(model, prompts, 7, seed=seeds, **options)
    padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=-100)
    also = generate(model, padded, 7, seed=seeds, lengths=torch.tensor([5, 1, 8]), **options)
    assert found.tokens.tolist() == also.tokens.tolist()
    for i, prompt in enumerate(prompts):
        alone = generate(model, prompt[None], 7, seed=seeds[i : i + 1], **options)
        assert alone.tokens[0].tolist() == found.tokens[i].tolist()
        same(alone.log_probabilities[0], found.log_probabilities[i])
        same(alone.context.logits[0], found.context.logits[i])
        flat = generate(model, prompt.tolist(), 7, seed=torch.tensor(seeds[i]), **options)
        assert flat.tokens.tolist() == alone.tokens[0].tolist()
        assert flat.lengths.shape == ()


@pytest.mark.parametrize("types", [("s4d",), ("attn", "s7")], ids="-".join)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_prompts_in_parts_are_the_prompt(types: tuple[str, ...], chunk: int) -> None:
    model, lengths = model_of(*types), torch.tensor([8, 2, 5])
    prompt = ids_of(3, 8)
    for ragged in (None, lengths):
        want = generate(model, prompt, 4, seed=0, lengths=ragged)
        got = generate(model, prompt, 4, seed=0, lengths=ragged, prefill_chunk=chunk)
        assert got.tokens.tolist() == want.tokens.tolist()
        same(got.context, want.context)


class Longest(Chain):
    """Remembers the longest part of a prompt that it was given."""

    longest = 0

    def prefill(self, ids: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
        self.longest = max(self.longest, ids.shape[-1])
        return super().prefill(ids, state, **options)


def test_prefill_chunk_bounds_what_is_read_at_once() -> None:
    model = Longest(table_of())
    generate(model, ids_of(2, 50), 2, prefill_chunk=7)
    assert (model.longest, model.read) == (7, 8 + 2)


# -------------------------------------------------------------------------------------- streams


def test_equal_seeds_repeat_and_others_differ() -> None:
    model, prompt = Chain(table_of()), ids_of(3, 4)
    first = generate(model, prompt, 20, seed=5)
    assert generate(model, prompt, 20, seed=5).tokens.tolist() == first.tokens.tolist()
    assert generate(model, prompt, 20, seed=6).tokens.tolist() != first.tokens.tolist()
    assert (
        generate(model, prompt, 20).tokens.tolist() != generate(model, prompt, 20).tokens.tolist()
    )
    same_prompt = prompt[:1].expand(3, -1)
    rows = generate(model, same_prompt, 20, seed=5).tokens.tolist()
    assert len({tuple(row) for row in rows}) == 3


def test_a_row_does_not_depend_on_the_others() -> None:
    model, prompt = Chain(table_of()), ids_of(4, 6)
    want = generate(model, prompt, 15, seed=2).tokens
    other = torch.cat([prompt[:2], ids_of(5, 6, seed=9)])
    got = generate(model, other, 15, seed=2, lengths=torch.tensor([6, 6, 1, 2, 3, 4, 5])).tokens
    assert got[:2].tolist() == want[:2].tolist()


def test_no_other_generator_is_used_or_changed() -> None:
    model, prompt = Chain(table_of()), ids_of(2, 3)
    torch.manual_seed(0)
    random.seed(0)
    before = (torch.get_rng_state(), random.getstate())
    first = generate(model, prompt, 10, seed=1).tokens
    generate(model, prompt, 10)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(99)
    assert generate(model, prompt, 10, seed=1).tokens.tolist() == first.tolist()


def test_a_chain_visits_what_its_table_says() -> None:
    table = table_of(scale=0.5)
    transitions = torch.softmax(table, -1)
    tokens = generate(Chain(table), ids_of(64, 1), 500, seed=0).tokens
    pairs = torch.bincount((V * tokens[:, :-1] + tokens[:, 1:]).flatten(), minlength=V * V)
    for row, count in zip(transitions, pairs.reshape(V, V).double(), strict=True):
        assert far(count, row).max() < 4.5


def test_the_repetition_penalty_knows_prompt_and_continuation() -> None:
    model, prompt = Chain(torch.zeros(V, V).double() + 1), torch.tensor([4, 2])
    found = generate(model, prompt, V - 2, temperature=0, repetition_penalty=1.5)
    assert sorted([*prompt.tolist(), *found.tokens.tolist()]) == list(range(V))


# -------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("types", [("s5", "mamba"), ("attn", "lru")], ids="-".join)
def test_rows_that_stopped_stay_where_they_are(types: tuple[str, ...]) -> None:
    model, prompt = model_of(*types), ids_of(6, 4)
    free = generate(model, prompt, 12, seed=3)
    stop = sorted(set(free.tokens[0, 2:5].tolist()))
    found = generate(model, prompt, 12, seed=3, stop_tokens=stop, pad_token=V - 1)
    assert len(set(found.lengths.tolist())) > 1
    for i, n in enumerate(found.lengths.tolist()):
        row = free.tokens[i].tolist()
        want = next((t + 1 for t, token in enumerate(row) if token in stop), 12)
        assert n == want
        assert found.tokens[i].tolist() == row[:n] + [V - 1] * (found.tokens.shape[1] - n)
        assert found.log_probabilities[i, n:].eq(0).all()
        _, state = model.prefill(torch.cat([prompt[i], found.tokens[i, :n]]))
        logits, _ = model.prefill(torch.cat([prompt[i], found.tokens[i, :n]]), last_only=True)
        same(found.context.logits[i], logits.detach())
        position = select(found.state, i).position
        assert position == state.position == 4 + n
    assert [len(row) for row in found.rows()] == found.lengths.tolist()


def test_all_rows_stopped_ends_the_work() -> None:
    table = torch.full((V, V), -50.0).double()
    table[torch.arange(V), (torch.arange(V) + 1) % V] = 50.0  # counts up
    model = Chain(table)
    found = generate(model, torch.tensor([[0], [3]]), 1000, stop_tokens=5, seed=0)
    assert [row.tolist() for row in found.rows()] == [[1, 2, 3, 4, 5], [4, 5]]
    assert found.tokens.shape == (2, 5)
    assert model.read == 1 + 5
    assert found.state.tolist() == [1 + 5, 1 + 2]
    assert found.context.drawn.tolist() == [5, 2]


def test_a_growing_cache_with_stopped_rows_goes_on_alone() -> None:
    model, prompt = model_of("attn", "s5"), ids_of(4, 5)
    with torch.no_grad():
        _, grown = model.prefill(prompt[:, :3])  # without a capacity: the cache grows
    want = generate(model, prompt, 9, seed=1, stop_tokens=[0, 1, 2])
    got = generate(model, prompt[:, 3:], 9, seed=1, stop_tokens=[0, 1, 2], state=grown)
    assert len(set(want.lengths.tolist())) > 1
    assert got.tokens.tolist() == want.tokens.tolist()
    same(got.context.logits, want.context.logits)


# ---------------------------------------------------------------------------- contexts and states


@pytest.mark.parametrize("types", [("s5", "rglru"), ("attn", "mamba2")], ids="-".join)
def test_two_runs_are_one(types: tuple[str, ...]) -> None:
    model = model_of(*types)
    options: dict[str, Any] = {"seed": 8, "repetition_penalty": 1.3, "top_k": 8}
    prompt, lengths = ids_of(3, 5), torch.tensor([5, 2, 4])
    whole = generate(model, prompt, 12, lengths=lengths, **options)
    first = generate(model, prompt, 5, lengths=lengths, **options)
    second = generate(model, None, 7, state=first.context, **options)
    assert torch.cat([first.tokens, second.tokens], 1).tolist() == whole.tokens.tolist()
    same(second.context.logits, whole.context.logits)
    same(second.context.seen, whole.context.seen)
    nothing = generate(model, None, 0, state=first.context, **options)
    same(nothing.context.logits, first.context.logits)
    assert nothing.tokens.shape == (3, 0)


def test_a_windowed_cache_goes_on_too() -> None:
    model = model_of("attn", mixer_kwargs={"attn": {"window": 6}})
    prompt = ids_of(2, 3)
    whole = generate(model, prompt, 15, seed=0)
    context: Any = None
    tokens = []
    for part in (2, 3, 10):
        found = generate(model, prompt if context is None else None, part, seed=0, state=context)
        context = found.context
        tokens.append(found.tokens)
    assert torch.cat(tokens, 1).tolist() == whole.tokens.tolist()
    assert context.state.blocks[0].k.shape[-3] == 6


def test_a_second_prompt_follows_the_first_answer() -> None:
    model, prompt, more = model_of("s5", "attn"), ids_of(2, 5), ids_of(3, seed=4)
    first = generate(model, prompt, 4, temperature=0)
    second = generate(model, more, 5, temperature=0, state=first.context)
    read = torch.cat([prompt, first.tokens, more.expand(2, -1)], 1)
    want = generate(model, read, 5, temperature=0)
    assert second.tokens.tolist() == want.tokens.tolist()
    assert torch.equal(second.context.seen, want.context.seen)


def test_a_fork_continues_several_ways() -> None:
    model, prompt = model_of("s5", "attn"), ids_of(5)
    start = generate(model, prompt, 3, temperature=0).context
    ways = generate(model, None, 10, state=fork(start, 4), seed=0)
    assert ways.tokens.shape == (4, 10)
    assert len({tuple(row) for row in ways.tokens.tolist()}) == 4
    alike = generate(model, None, 10, state=fork(start, 2), temperature=0)
    once = generate(model, None, 10, state=start, temperature=0)
    assert alike.tokens.tolist() == [once.tokens.tolist()] * 2
    ahead = generate(model, [[1, 2], [3]], 4, temperature=0, state=fork(start, 2))
    assert ahead.tokens[1].tolist() == generate(
        model, [3], 4, temperature=0, state=start
    ).tokens.tolist()  # fmt: skip


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    kinds: dict[str, nn.Module] = {name: LAYERS[name](4, 4) for name in LAYERS}
    kinds["attn"] = Attention(4, n_heads=2)
    kinds["block"] = Block(4, LAYERS["mamba"](4, 4))
    kinds["gated"] = Gated(4, "s4d", 4)
    kinds["stack"] = Stack([Block(4, LAYERS["rglru"](4)), LAYERS["s5"](4, 4)])
    return kinds


@pytest.mark.parametrize("name", parts())
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_fork_select_and_join_of_every_state(name: str, batch: tuple[int, ...]) -> None:
    part: Any = parts()[name].eval()
    u, then = torch.randn(*batch, 5, 4), torch.randn(3, *batch, 4)
    with torch.no_grad():
        _, state = part.prefill(u)
        forked = fork(state, 3)
        y, after = part.step(then, forked)
        apart = [part.step(then[i], state) for i in range(3)]
        for i, (want, end) in enumerate(apart):
            same(y[i], want)
            same(select(after, i), end)
        joined = join([end for _, end in apart])
        same(joined, after)
        assert type(joined) is type(state)
        turned = select(after, [2, 0])
        same(part.step(then[[2, 0]], turned)[0], part.step(then, after)[0][[2, 0]])
        same(select(after, torch.tensor([True, False, True])), select(after, slice(0, 3, 2)))
    assert state_bytes(after) == 3 * state_bytes(apart[0][1])
    assert state_bytes(fork(state, 0)) == 0


class Named(NamedTuple):
    a: Tensor
    b: Any


def test_states_of_any_build() -> None:
    state = {"x": Named(torch.ones(2, 3), None), "y": [torch.zeros(2, dtype=torch.bool), 5]}
    forked = fork(state, 2)
    assert isinstance(forked["x"], Named)
    assert forked["x"].b is None
    assert forked["y"][1] == 5
    assert forked["y"][0].dtype == torch.bool
    assert state_bytes(state) == 4 * 6 + 2


def test_bad_states() -> None:
    with pytest.raises(ValueError, match="n = -1, expected an integer >= 0"):
        fork(torch.ones(2), -1)
    with pytest.raises(ValueError, match="no batch axis"):
        select((torch.ones(2, 3), torch.tensor(1)), 0)
    with pytest.raises(ValueError, match=r"rows 5 of a state of 2 rows"):
        select(torch.ones(2, 3), 5)
    with pytest.raises(ValueError, match="no states"):
        join([])
    with pytest.raises(ValueError, match=r"state 1 has shapes \[\(3,\)\]"):
        join([torch.ones(2), torch.ones(3)])
    with pytest.raises(ValueError, match="not built alike: tuple of 1, tuple of 2"):
        states.map_state(torch.add, (torch.ones(1),), (torch.ones(1), torch.ones(1)))


# ------------------------------------------------------------------------------------- streaming


def test_the_streamer_gets_every_token_as_it_comes() -> None:
    model, prompt = Chain(table_of()), ids_of(3, 2)
    heard: list[tuple[list[int], list[bool], int]] = []

    def streamer(tokens: Tensor, active: Tensor) -> None:
        heard.append((tokens.tolist(), active.tolist(), model.read))

    found = generate(model, prompt, 30, seed=4, stop_tokens=[0, 1], streamer=streamer)
    rows = [[t[i] for t, active, _ in heard if active[i]] for i in range(3)]
    assert rows == [row.tolist() for row in found.rows()]
    assert [read for *_, read in heard] == list(range(2, 2 + len(heard)))


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def test_text_is_never_broken_inside_a_character() -> None:
    text = "aé€🙂\n𝔾z"
    pieces: list[str] = []
    streamer = TextStreamer(decode, pieces.append)
    for byte in text.encode():
        streamer.put(byte)
    streamer.finish()
    assert pieces == list(text)


def test_broken_bytes_are_shown_as_such_in_the_end() -> None:
    pieces: list[str] = []
    streamer = TextStreamer(decode, pieces.append)
    for byte in b"a\xff\xe2\x82b\xe2\x82":
        streamer.put(byte)
    assert pieces == ["a", "\ufffd\ufffdb"]
    streamer.finish()
    assert "".join(pieces) == decode(list(b"a\xff\xe2\x82b\xe2\x82"))


def test_words_that_a_decoder_joins_by_their_neighbours() -> None:
    words = ["the", "lamb", "is", "mild"]
    pieces: list[str] = []
    streamer = TextStreamer(lambda ids: " ".join(words[i] for i in ids), pieces.append)
    for token in (0, 1, 2, 3):
        streamer.put(token)
    streamer.finish()
    assert "".join(pieces) == "the lamb is mild"
    assert len(pieces) == 4


def test_a_text_streamer_ends_with_generation_also_by_an_error() -> None:
    pieces: list[str] = []
    table = torch.full((V, V), -50.0).double()
    table[:, 3] = 50.0
    text = lambda ids: "".join("ab\ufffdd"[i] if i < 3 else "\ufffd" for i in ids)  # noqa: E731
    generate(Chain(table), [0], 2, streamer=TextStreamer(text, pieces.append))
    assert pieces == ["\ufffd\ufffd"]
    table[3] = math.nan
    with pytest.raises(ValueError, match="logits for new token 1 are not finite"):
        generate(Chain(table), [0], 5, streamer=TextStreamer(text, pieces.append))
    assert pieces == ["\ufffd\ufffd", "\ufffd"]
    with pytest.raises(ValueError, match=r"tokens \(2,\), expected one sequence"):
        generate(Chain(table_of()), [[1], [2]], 2, streamer=TextStreamer(text, pieces.append))
    shown: list[str] = []
    streamer = TextStreamer(lambda ids: "".join(map(str, ids)), shown.append, hidden=(7,))
    for token in (1, 7, 2):
        streamer.put(token)
    assert "".join(shown) == "12"


# ---------------------------------------------------------------------------------- modes, errors


def test_the_mode_of_the_model_is_restored() -> None:
    model = model_of("s5", "mamba", dropout=0.5)
    want = generate(model, ids_of(2, 4), 8, seed=0)
    model.train()
    model.layers[1].eval()
    got = generate(model, ids_of(2, 4), 8, seed=0)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert model.training
    assert model.layers[0].training
    assert not any(m.training for m in model.layers[1].modules())
    assert not got.log_probabilities.requires_grad


def test_shapes_at_the_edges() -> None:
    model = model_of("s5")
    for batch in ((), (2,), (2, 3), (0,)):
        found = generate(model, ids_of(*batch, 4), 5, seed=0)
        assert isinstance(found, Generation)
        steps = 5 if math.prod(batch) else 0
        assert found.tokens.shape == found.log_probabilities.shape == (*batch, steps)
        assert found.lengths.shape == batch
        assert len(found.rows()) == math.prod(batch)
    nothing = generate(model, ids_of(2, 4), 0)
    assert nothing.tokens.shape == (2, 0)
    same(nothing.context.logits, model.prefill(ids_of(2, 4), last_only=True)[0].detach())


def test_half_precision_logits() -> None:
    model = model_of("mamba", "attn", dtype=torch.bfloat16)
    found = generate(model, ids_of(2, 4), 6, seed=0, top_p=0.9)
    assert found.log_probabilities.dtype == torch.float32
    again = generate(model, None, 2, seed=0, state=found.context)
    assert again.tokens.shape == (2, 2)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt_ids": []}, "an empty prompt, expected at least one token"),
    ({"prompt_ids": [[1], []]}, r"prompt \(1,\) is empty"),
    ({"prompt_ids": None}, "no prompt, expected token ids, or a context"),
    ({"prompt_ids": "text"}, "prompt_ids is a str, expected integers"),
    ({"prompt_ids": torch.ones(3)}, "dtype torch.float32, expected an integer one"),
    ({"prompt_ids": torch.tensor(1)}, r"a scalar, expected \(\.\.\., L\)"),
    ({"prompt_ids": [1, V]}, rf"token {V} at \(1,\) of the prompt, expected 0 \.\.\. {V - 1}"),
    ({"prompt_ids": [[1], [2, -1]]}, r"token -1 at \(1, 1\) of the prompt"),
    ({"prompt_ids": [[1], [[2]]]}, r"prompt 1 has shape \(1, 1\)"),
    ({"prompt_ids": [[1], ["a"]]}, "prompt 1 holds no integers"),
    ({"prompt_ids": [[1]], "lengths": torch.tensor([1])}, "lengths with a list of prompts"),
    ({"lengths": torch.tensor([1, 2])}, r"lengths \(2,\), expected \(\)"),
    ({"lengths": torch.tensor(4)}, r"lengths between 4 and 4, expected 0 \.\.\. 3"),
    ({"lengths": torch.tensor(1.0)}, "lengths has dtype torch.float32"),
    ({"lengths": torch.tensor(0)}, r"prompt \(\) is empty"),
    ({"max_new_tokens": -1}, "max_new_tokens = -1, expected >= 0"),
    ({"max_new_tokens": 1.5}, "max_new_tokens = 1.5, expected an integer"),
    ({"max_new_tokens": True}, "max_new_tokens = True, expected an integer"),
    ({"temperature": -0.1}, r"temperature = -0.1, expected a number >= 0"),
    ({"temperature": math.nan}, "temperature = nan"),
    ({"top_k": 0}, "top_k = 0, expected an integer >= 1"),
    ({"top_k": V + 1}, f"top_k = {V + 1}, but the vocabulary has {V} tokens"),
    ({"top_p": 0.0}, r"top_p = 0.0, expected a number in \(0, 1\]"),
    ({"top_p": 1.1}, "top_p = 1.1"),
    ({"min_p": -0.1}, r"min_p = -0.1, expected a number in \[0, 1\]"),
    ({"repetition_penalty": 0}, "repetition_penalty = 0, expected a number > 0"),
    ({"stop_tokens": V}, rf"stop_tokens has {V}, expected 0 \.\.\. {V - 1}"),
    ({"stop_tokens": ["."]}, r"stop_tokens has '\.'"),
    ({"pad_token": -1}, "pad_token has -1"),
    ({"seed": 1.5}, "seed has dtype torch.float32, expected integers"),
    ({"seed": [1, 2]}, r"seed \(2,\), expected an integer or \(\), one a row"),
    ({"prefill_chunk": 0}, "prefill_chunk = 0, expected an integer >= 1"),
    ({"engine": "fast"}, "engine = 'fast', expected one of"),
    ({"model": "a name"}, "str has no method prefill"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[str(list(w.items())) for w, _ in BAD])
def test_bad_input_is_refused_before_any_work(wrong: dict[str, Any], message: str) -> None:
    model = Chain(table_of())
    call: dict[str, Any] = {"model": model, "prompt_ids": torch.tensor([1, 2, 3])}
    with pytest.raises(ValueError, match=message):
        generate(**{**call, "max_new_tokens": 3, **wrong})
    assert model.read == 0


def test_a_bare_state_has_no_logits_and_a_context_has_its_batch() -> None:
    model = model_of("s5")
    found = generate(model, ids_of(2, 3), 2, seed=0)
    with pytest.raises(ValueError, match="a bare state has no logits, pass a result's context"):
        generate(model, ids_of(2, 0), 2, state=found.state)
    with pytest.raises(ValueError, match=r"prompts of batch \(3,\) and a context of batch \(2,\)"):
        generate(model, ids_of(3, 2), 2, state=found.context)
    assert isinstance(found.context, Context)
    larger = LRNNLMHeadModel(8, 4, 1, V + 1, ["s5"]).double()
    for prompt in (None, ids_of(2, 1)):
        with pytest.raises(ValueError, match=f"a context of {V} tokens, and the model has {V + 1}"):
            generate(larger, prompt, 2, state=found.context)
    mixed = generate(model_of("attn", "s5"), ids_of(2, 3), 2, seed=0)
    with pytest.raises(ValueError, match="a state with an AttentionRing where the model has a"):
        generate(model_of("s5", "attn"), None, 2, state=mixed.context)
    bare = generate(model, ids_of(2, 3, seed=2), 4, seed=0, state=found.state)
    assert bare.tokens.shape == (2, 4)


def test_a_table_of_positions_ends() -> None:
    model = model_of("s5", max_positions=8)
    found = generate(model, ids_of(2, 4), 4, seed=0)
    with pytest.raises(ValueError, match="9 tokens with the new ones, but the model has positions"):
        generate(model, ids_of(2, 4), 5)
    with pytest.raises(ValueError, match="positions for 8"):
        generate(model, None, 1, state=found.context)


# ---------------------------------------------------------------------------- the engine, on a CPU


def test_a_graph_needs_a_cuda_device() -> None:
    with pytest.raises(NotCapturableError, match='engine = "graph" on cpu, expected a CUDA device'):
        generate(Chain(table_of()), [1], 3, engine="graph")


def test_a_state_that_grows_cannot_be_captured() -> None:
    model = model_of("attn", "s5")
    with torch.no_grad():
        _, before = model.prefill(ids_of(2, 3))
        _, after = model.step(ids_of(2), before)
        fixed = model.init_state((2,), capacity=5)
        engine.check_static(fixed, model.step(ids_of(2), fixed)[1])
    with pytest.raises(NotCapturableError, match=r"of \(2, 3, 1, 8\) becomes .* of \(2, 4, 1, 8\)"):
        engine.check_static(before, after)


def test_a_step_that_looks_at_values_on_the_device_is_found() -> None:
    _, trace = engine.record(lambda t: t + float(t.sum()), torch.ones(3))
    engine.check_blind(trace)  # on the host it is known
    moved = [
        [torch.device("cuda", 0) if isinstance(x, torch.device) else x for x in call]
        for call in trace.calls
    ]
    with pytest.raises(NotCapturableError, match=r"looks at values \(aten::_local_scalar_dense\)"):
        engine.check_blind(engine.Trace(moved, []))  # pyright: ignore[reportArgumentType]


def trace_of(model: Any, carry: Any) -> engine.Trace:
    with torch.no_grad():
        _, trace = engine.record(lambda c: model.step(*c), carry)
    return trace


@every_mixture
def test_a_step_does_the_same_every_time(types: tuple[str, ...]) -> None:
    """What tells whether a captured graph is still the step: quiet where nothing changed."""
    model = model_of(*types)
    carry = (ids_of(2), model.init_state((2,), capacity=4))
    trace_of(model, carry)  # layers make what they keep
    first = trace_of(model, carry)
    assert first.same(trace_of(model, (ids_of(2, seed=1), carry[1])))
    held = {t.untyped_storage().data_ptr() for t in first.read}
    for read in (model.embedding.weight, model.norm.weight):
        assert read.untyped_storage().data_ptr() in held


CHANGES: dict[str, Any] = {
    "a step of an optimizer": lambda m: m.layers[0].mixer.log_dt.add_(0.1),
    "a parameter replaced": lambda m: setattr(m.norm, "weight", nn.Parameter(torch.ones(8))),
    "a cast": lambda m: m.float(),
    "what layers keep made anew": lambda m: m.train().eval(),
    "an option": lambda m: setattr(m.norm, "eps", 0.1),
    "another activation": lambda m: setattr(m.layers[0].mlp, "activation", "geglu"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_step_shows(change: str) -> None:
    model = model_of("s5", dtype=torch.float32, d_intermediate=8)
    carry = (ids_of(2), model.init_state((2,)))
    trace_of(model, carry)
    before = trace_of(model, carry)
    with torch.no_grad():
        CHANGES[change](model)
    assert not before.same(trace_of(model, carry))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> type[EagerGraph]:
    return pretend(monkeypatch)


@every_mixture
def test_with_buffers_as_without(device: type[EagerGraph], types: tuple[str, ...]) -> None:
    model, prompt = model_of(*types), ids_of(3, 4)
    options: dict[str, Any] = {"seed": 1, "stop_tokens": [0], "repetition_penalty": 1.1}
    for _ in range(2):
        want = generate(model, prompt, 9, engine="loop", **options)
        got = generate(model, prompt, 9, engine="graph", **options)
        assert got.tokens.tolist() == want.tokens.tolist()
        same(got.context, want.context)
        other = generate(model, prompt.flip(0), 9, engine="graph", **options)
        assert got.context.state is not other.context.state
        same(got.context, want.context)  # the next call leaves the result alone
    assert device.made == 1
    forked = generate(model, None, 8, state=fork(select(got.context, 0), 3), seed=2)
    assert device.made == 2
    assert forked.tokens.shape[0] == 3


def test_a_graph_is_captured_anew_where_the_model_changed(device: type[EagerGraph]) -> None:
    model, prompt = model_of("s5"), ids_of(3, 4)
    generate(model, prompt, 8, seed=0)
    generate(model, prompt, 9, seed=1)
    assert device.made == 1
    with torch.no_grad():
        model.layers[0].mixer.log_dt.add_(0.5)
    want = generate(model, prompt, 8, seed=0, engine="loop")
    got = generate(model, prompt, 8, seed=0)
    assert device.made == 2
    same(got.log_probabilities, want.log_probabilities)
    generate(model, prompt, 8, seed=0, temperature=0.5)
    assert device.made == 3
    generate(model, prompt, 8, seed=0)
    assert device.made == 3
    generate(model, prompt[:2], 7, seed=0)  # too few to capture, and enough where one is kept
    assert device.made == 3
    generate(model, prompt, 3, seed=0)
    assert device.made == 3
    engine.release_graphs(model)
    generate(model, prompt, 8, seed=0)
    assert device.made == 4


def test_inference_mode_has_graphs_of_its_own(device: type[EagerGraph]) -> None:
    model, prompt = model_of("s5", "attn"), ids_of(2, 4)
    want = generate(model, prompt, 8, seed=0, engine="loop").tokens.tolist()
    for _ in range(2):
        with torch.inference_mode():
            inside = generate(model, prompt, 8, seed=0)
        outside = generate(model, prompt, 8, seed=0)
        assert inside.tokens.tolist() == outside.tokens.tolist() == want
    assert device.made == 2


def test_graphs_go_with_their_model_and_are_few(device: type[EagerGraph]) -> None:
    model = model_of("s5")
    for rows in range(1, 8):
        generate(model, ids_of(rows, 4), 8, seed=0)
    assert len(engine._graphs[model]) == engine.KEPT_GRAPHS
    gc.collect()  # models of other tests, which only a cycle holds, go now and not below
    count = len(engine._graphs)
    for graph in engine._graphs[model].values():
        graph.step = None  # a real graph does not hold it
    del model, graph
    gc.collect()
    assert len(engine._graphs) == count - 1


def test_what_cannot_be_captured_runs_and_says_so_once(device: type[EagerGraph]) -> None:
    model, prompt = model_of("attn"), ids_of(3, 4)
    with torch.no_grad():
        _, grown = model.prefill(prompt)
    want = generate(model, prompt, 9, seed=0, state=grown, engine="loop")
    with pytest.warns(UserWarning, match="without a CUDA graph: the state changes from step"):
        got = generate(model, prompt, 9, seed=0, state=grown)
    assert got.tokens.tolist() == want.tokens.tolist()
    again = generate(model, prompt, 9, seed=0, state=grown)
    assert again.tokens.tolist() == want.tokens.tolist()
    with pytest.raises(NotCapturableError, match="the state changes from step to step"):
        generate(model, prompt, 9, seed=0, state=grown, engine="graph")


def test_a_graph_that_gives_something_else_is_not_used(device: type[EagerGraph]) -> None:
    model, prompt = model_of("s5"), ids_of(3, 4)
    want = generate(model, prompt, 9, seed=0, engine="loop")
    device.factor = 2
    with pytest.warns(UserWarning, match="the graph does not give what the step gives"):
        got = generate(model, prompt, 9, seed=0)
    assert got.tokens.tolist() == want.tokens.tolist()


def test_a_graph_in_use_is_left_alone(device: type[EagerGraph]) -> None:
    model, prompt = model_of("s5", "attn"), ids_of(2, 4)
    want = generate(model, prompt, 8, seed=0, engine="loop")
    inner = []

    def streamer(tokens: Tensor, active: Tensor) -> None:
        if len(inner) < 4:
            inner.append(generate(model, prompt, 8, seed=0).tokens.tolist())

    got = generate(model, prompt, 8, seed=0, streamer=streamer)
    assert [got.tokens.tolist(), *inner] == [want.tokens.tolist()] * 5


def test_buffers_take_a_carry_that_is_views_of_them() -> None:
    class Shifted(NamedTuple):
        a: Tensor
        b: Tensor
        c: Tensor

    graph = object.__new__(engine.Graph)
    graph.carry = Shifted(torch.zeros(3), torch.ones(3), torch.arange(3.0))
    old = graph.carry
    graph._write(Shifted(old.b, old.a, torch.cat([old.c[1:], old.c[:1]])))
    same(graph.carry.a, torch.ones(3))
    same(graph.carry.b, torch.zeros(3))
    graph._write(graph.carry._replace(c=graph.carry.c.flip(0)[:].as_strided((3,), (1,))))
    graph._write(graph.carry._replace(c=graph.carry.a))
    same(graph.carry.c, torch.ones(3))
