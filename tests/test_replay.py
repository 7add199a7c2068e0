# SPDX-License-Identifier: MIT
"""Steps replayed from a plan on a CPU: bit for bit what the loop gives, or refused."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lrnnx_nn import LAYERS, LRNNLMHeadModel
from lrnnx_nn.generation import (
    Context,
    NotCapturableError,
    engine,
    fork,
    generate,
    release_graphs,
    rollout,
    select,
)
from lrnnx_nn.generation import state as states
from lrnnx_nn.generation._plan import Plan, planned

VOCABULARY = 20
COUNT = engine.WORTHWHILE_ON_CPU


def model_of(*types: str, dtype: torch.dtype = torch.float32, **options: Any) -> LRNNLMHeadModel:
    torch.manual_seed(0)
    given: dict[str, Any] = {"centaurus": {"sub_state_dim": 2}}
    mixers = {name: given[name] for name in types if name in given}
    return LRNNLMHeadModel(
        8, 4, len(types), VOCABULARY, types, mixers, dtype=dtype, **options
    ).eval()  # fmt: skip


def ids_of(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, shape, generator=generator)


def identical(got: Any, wanted: Any) -> None:
    for a, b in zip(states.tensors(got), states.tensors(wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def plans(model: Any) -> list[Any]:
    return list(engine._graphs.get(model, {}).values())


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that plans were asked to take."""
    taken: list[int] = []
    run = Plan.run

    def counting(self: Plan, carry: Any, count: int, observe: Any) -> Any:
        taken.append(count)
        return run(self, carry, count, observe)

    monkeypatch.setattr(Plan, "run", counting)
    return taken


SAMPLERS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2},
]

# ------------------------------------------------------------------------------ what it must equal


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_gives_what_its_loop_gives(name: str) -> None:
    model = model_of(name)
    for batch, options in zip(((), (2,)), SAMPLERS, strict=True):
        options = options | {"seed": 1}
        want = generate(model, ids_of(*batch, 3), 8, engine="loop", **options)
        got = generate(model, ids_of(*batch, 3), 8, engine="replay", **options)
        identical(got, want)
    assert len(plans(model)) == 2


def test_a_mixture_with_mlps_positions_and_stop_tokens() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = model_of(
            "s5", "mamba", dtype=dtype, d_intermediate=8, max_positions=64, residual_in_fp32=True
        )
        options: dict[str, Any] = {"seed": 3, "stop_tokens": [0, 5], "top_k": 12}
        want = generate(model, ids_of(4, 3), 20, engine="loop", **options)
        identical(generate(model, ids_of(4, 3), 20, engine="replay", **options), want)
        assert len(set(want.lengths.tolist())) > 1


@pytest.mark.parametrize("inference", [False, True])
def test_auto_goes_on_and_forks_and_streams(steps: list[int], inference: bool) -> None:
    model, prompt = model_of("rglru", "s4d"), ids_of(2, 3)
    heard: list[Tensor] = []
    with torch.inference_mode(inference):
        want = generate(model, prompt, COUNT + 9, seed=2, engine="loop")
        first = generate(model, prompt, COUNT, seed=2)
        kept = [t.clone() for t in states.tensors(first)]
        more = generate(
            model, None, 9, seed=2, state=first.context, streamer=lambda t, _: heard.append(t)
        )
        ways = fork(select(first.context, 1), 2)
        other = generate(model, None, 9, seed=5, state=ways)
        identical(other, generate(model, None, 9, seed=5, state=ways, engine="loop"))
    identical(list(states.tensors(first)), kept)  # later calls leave the result alone
    assert steps[1:] == [COUNT - 1, 8, 8]  # the first compared it
    assert torch.cat([first.tokens, more.tokens], -1).tolist() == want.tokens.tolist()
    assert torch.stack(heard, -1).tolist() == more.tokens.tolist()
    identical(more.context, want.context)
    assert len(plans(model)) == 1


def test_rollouts_of_a_layer(steps: list[int]) -> None:
    torch.manual_seed(0)
    layer, u = LAYERS["lru"](6, 4).eval(), torch.randn(2, 5, 6)
    with torch.no_grad():
        identical(rollout(layer, u, COUNT + 1), rollout(layer, u, COUNT + 1, engine="loop"))
        assert steps == [2, COUNT - 1]
        gaps = torch.rand(5 + COUNT)
        options: dict[str, Any] = {"integration_timesteps": gaps}
        rollout(layer, u, COUNT + 1, **options)  # gaps are looked at: the loop
        with pytest.raises(NotCapturableError, match="looks at values"):
            rollout(layer, u, COUNT + 1, engine="replay", **options)
    assert len(steps) == 2
    with pytest.raises(ValueError, match='engine = "replay" with gradients or a transform'):
        rollout(layer, u, 9, engine="replay")


def test_plans_in_two_threads_and_within_each_other() -> None:
    model, prompt = model_of("s5"), ids_of(2, 3)
    want = generate(model, prompt, COUNT, seed=0, engine="loop").tokens.tolist()
    found: list[Any] = []

    def work(_: Any = None, __: Any = None) -> None:
        if len(found) < 3:
            found.append(generate(model, prompt, COUNT, seed=0).tokens.tolist())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outer = generate(model, prompt, COUNT, seed=0, streamer=work)
    assert [outer.tokens.tolist(), *found] == [want] * 4


# ------------------------------------------------------------------------------ changes to a model


class LowRank(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.a = nn.Parameter(torch.randn(2, inner.in_features))
        self.b = nn.Parameter(torch.randn(inner.out_features, 2))

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.a.T @ self.b.T


def lower(m: Any) -> None:
    m.layers[0].mixer.in_proj = LowRank(m.layers[0].mixer.in_proj)


CHANGES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "a weight in place": (lambda m: m.layers[0].mixer.in_proj.weight.mul_(-1), 0),
    "the memory of a weight": (
        lambda m: setattr(m.norm.weight, "data", torch.randn(8)),
        1,
    ),
    "a parameter replaced": (lambda m: setattr(m.norm, "weight", nn.Parameter(torch.randn(8))), 1),
    "what layers keep": (lambda m: m.layers[0].mixer.A_log.add_(0.5), 1),
    "a cast": (lambda m: m.double(), 1),
    "training and back": (lambda m: m.train().eval(), 1),
    "a low-rank adapter": (lower, 1),
    "an option": (lambda m: setattr(m.norm, "eps", 0.1), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_followed(change: str) -> None:
    torch.manual_seed(0)
    model, prompt = model_of("mamba", pad_vocab_size_multiple=1), ids_of(3)
    generate(model, prompt, 8, seed=0, engine="replay")
    (before,) = plans(model)
    with torch.no_grad():
        CHANGES[change][0](model)
    want = generate(model, prompt, 8, seed=0, engine="loop")
    identical(generate(model, prompt, 8, seed=0, engine="replay"), want)
    assert (plans(model)[-1] is not before) == CHANGES[change][1]


def test_plans_are_few_and_go_with_their_model() -> None:
    model = model_of("s5")
    for rows in range(1, 7):
        generate(model, ids_of(rows, 1), 2, engine="replay")
    assert len(plans(model)) == engine.KEPT_GRAPHS
    release_graphs(model)
    assert not plans(model)
    generate(model, ids_of(1), 2, engine="replay")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------------------ what is not planned


def test_attention_that_looks_at_its_ring_runs_in_the_loop(steps: list[int]) -> None:
    model = model_of("s5", "attn")
    want = generate(model, ids_of(3), COUNT, seed=0, engine="loop")
    for _ in range(2):
        identical(generate(model, ids_of(3), COUNT, seed=0), want)
    assert not steps
    with pytest.raises(NotCapturableError, match="looks at values"):
        generate(model, ids_of(3), COUNT, engine="replay")


class LoggingMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_hooks_modes_autocast_and_what_is_no_module_run_in_the_loop(steps: list[int]) -> None:
    model, prompt = model_of("mamba"), ids_of(3)

    def check(message: str, subject: Any = model) -> None:
        generate(subject, prompt, COUNT)
        assert not steps
        with pytest.raises(NotCapturableError, match=message):
            generate(subject, prompt, COUNT, engine="replay")

    called: list[Any] = []
    handle = model.layers[0].norm1.register_forward_hook(lambda *_: called.append(0))
    check("has hooks")
    assert len(called) > COUNT
    handle.remove()
    with FlopCounterMode(display=False) as counter:
        check("hooks")  # for all modules
    assert counter.get_total_flops() > 0
    with LoggingMode():
        check("a mode")
    with torch.autocast("cpu"):
        check("autocast")

    class Wrapped:
        def __init__(self) -> None:
            self.prefill, self.step, self.init_state = model.prefill, model.step, model.init_state

    check("is no nn.Module", Wrapped())


def test_short_calls_and_growing_states_run_in_the_loop(steps: list[int]) -> None:
    model = model_of("s5")
    generate(model, ids_of(3), COUNT - 1)
    assert not steps
    with pytest.raises(NotCapturableError, match="the state changes from step to step"):
        planned(lambda c: torch.cat([c, c]), torch.zeros(1))


# ------------------------------------------------------------------------------- steps of all kinds


class Pair(NamedTuple):
    x: Tensor
    rest: dict[str, Any]


WEIGHT = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))


def in_place(c: Tensor) -> Tensor:
    y = torch.zeros(3, 3)
    y[1] += c
    part = y.t()[:2]
    part.mul_(2).sub_(WEIGHT[:2])
    return y.sum(0) / 10


def unused(c: Tensor) -> Tensor:
    (c * 5).exp_()
    return c + 1


def lists(c: Pair) -> Pair:
    a, b = torch.stack([c.x, c.rest["k"][0]]).unbind(0)
    x = torch.addmm(input=WEIGHT, mat1=torch.cat([a, b, a]).view(3, 3), mat2=WEIGHT.mT)
    return Pair((x.sum(0) / 9).softmax(-1), {"k": (b.flip(0), None, 3), "l": [c.x.expand(2, 3).T]})


def constants(c: Tensor) -> Tensor:
    grown = torch.arange(3).to(c) * 2
    grown[:1].fill_(7)  # what is written to is made anew in each step
    return (c + grown + torch.full((3,), 0.5)).cos() @ WEIGHT.mT.diagonal().diag()


PURE: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "in place": (in_place, torch.ones(3)),
    "without effect": (unused, torch.ones(3)),
    "containers": (
        lists,
        Pair(torch.ones(3), {"k": (torch.arange(3.0), None, 3), "l": [torch.ones(3, 2)]}),
    ),
    "constants": (constants, torch.ones(3)),
    "unchanged": (lambda c: (c[1], c[0]), (torch.ones(3), torch.zeros(3))),
    "complex": (lambda c: (c * 1j).conj().resolve_conj(), torch.ones(2, dtype=torch.complex64)),
}


@pytest.mark.parametrize("name", PURE)
def test_a_plan_does_what_its_step_does(name: str) -> None:
    step, carry = PURE[name]
    plan, seen = planned(step, carry), []
    wanted = [carry := step(carry) for _ in range(5)]
    plan.run(PURE[name][1], 5, lambda c: bool(seen.append(c)))
    identical(seen, wanted)
    assert str(seen[-1]) == str(wanted[-1])  # containers of the same kinds
    ended: list[Any] = []
    last = plan.run(PURE[name][1], 5, lambda c: bool(ended.append(c)) or len(ended) == 2)
    identical([last, len(ended)], [wanted[1], 2])


def test_only_what_matters_is_called_again() -> None:
    def calls(step: Any) -> int:
        return len(planned(step, torch.ones(3))._calls)

    assert calls(unused) == 1
    assert calls(lambda c: WEIGHT.mT[:, :3].T.exp().mv(c)) == 2  # a value of a weight is none
    assert calls(lambda c: WEIGHT.mT[:, :3].mv(c)) == 1


def test_a_constant_in_the_state_is_each_result_s_own() -> None:
    plan = planned(lambda c: (c[0] + 1, torch.zeros(2)), (torch.ones(3), torch.zeros(2)))
    for _ in range(2):
        result = plan.run((torch.ones(3), torch.zeros(2)), 2, lambda c: False)
        identical(result[1], torch.zeros(2))
        result[1].add_(1)


BUFFER = torch.zeros(3)
numbers = iter(range(1000))


def hidden(c: Tensor) -> Tensor:
    return torch.from_numpy((c * 2).numpy()) + 1


IMPURE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a value": (lambda c: c * float(c.sum()), "looks at values .aten::_local_scalar_dense"),
    "a shape of values": (lambda c: c[c > -1], "looks at values"),
    "equality": (lambda c: c + torch.equal(c, c), "looks at values"),
    "random numbers": (torch.rand_like, "draws random numbers"),
    "writing to the carry": (lambda c: c.add_(1), "writes to what was there before it"),
    "writing elsewhere": (lambda c: c + BUFFER.add_(1), "writes to what was there before it"),
    "counting": (lambda c: c + next(numbers), "does not do the same every time"),
    "new memory": (lambda c: c + torch.tensor([1.0, 2.0, 3.0]), "not do the same every time"),
    "numpy": (lambda c: c + torch.from_numpy(c.numpy() * 2), "not do the same every time"),
    "a hidden alias": (
        lambda c: torch.from_numpy((c * 2).numpy()).add(1),
        "a view that no operator made",
    ),
    "a number in the state": (lambda c: (c[0], c[1] + 1), "from step to step, 0 to 1"),
}


@pytest.mark.parametrize("name", IMPURE)
def test_what_a_replay_would_not_repeat_is_refused(name: str) -> None:
    step, message = IMPURE[name]
    carry = (torch.ones(3), 0) if name == "a number in the state" else torch.ones(3)
    with pytest.raises(NotCapturableError, match=message):
        planned(step, carry)


def test_a_plan_that_gives_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "run", lambda self, carry, count, observe: observe(carry))
    with pytest.raises(NotCapturableError, match="does not give what it gives"):
        planned(lambda c: c + 1, torch.ones(3))


def test_a_token_is_checked_where_a_user_gives_it() -> None:
    model = model_of("s5")
    got = generate(model, ids_of(3), COUNT, seed=0)

    def streamer(tokens: Tensor, active: Tensor) -> None:
        with pytest.raises(ValueError, match=r"id 20, expected 0 \.\.\. 19"):
            model.step(tokens + 20 - tokens, got.context.state)

    generate(model, ids_of(3), 2, seed=0, streamer=streamer)
    assert isinstance(got.context, Context)
