"""A stack of any mixers is a mixer: its state is theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrnnx_core import registry
from lrnnx_core.ops.add_norm import add_norm
from lrnnx_nn import (
    LAYERS,
    S4D,
    S5,
    Block,
    Gated,
    LRNNLMHeadModel,
    Mamba,
    Mixer,
    Stack,
    residual_stream,
)

same = torch.testing.assert_close


def mixed(checkpoint: bool = False) -> Stack:
    torch.manual_seed(0)
    parts = [
        S5(4, 8, dtype=torch.float64),
        Block(4, Mamba(4, 4)).double(),
        Gated(4, "s4d", 8, gate=1, bottleneck=2).double(),
        Stack([S4D(4, 8, dtype=torch.float64)]),
    ]
    return Stack(parts, checkpoint=checkpoint)


def test_every_layer_block_and_stack_is_a_mixer() -> None:
    for name, layer in LAYERS.items():
        assert isinstance(layer(4, 8), Mixer), name
    assert all(isinstance(part, Mixer) for part in (*mixed(), mixed()))
    assert not isinstance(nn.Linear(4, 4), Mixer)


def test_every_split_is_the_whole() -> None:
    stack, u = mixed().eval(), torch.randn(2, 9, 4, dtype=torch.float64)
    whole, last = stack.prefill(u)
    same(stack(u), whole)
    assert len(last) == len(stack) == 4
    for k in range(10):
        first, state = stack.prefill(u[:, :k])
        parts = [first]
        for t in range(k, 9):
            y, state = stack.step(u[:, t], state)
            parts.append(y.unsqueeze(1))
        same(torch.cat(parts, 1), whole)
        for got, want in zip(tree_leaves(state), tree_leaves(last), strict=True):
            same(got, want)


def test_the_zero_state_is_no_state() -> None:
    stack, u = mixed().eval(), torch.randn(3, 5, 4, dtype=torch.float64)
    same(stack.prefill(u, stack.init_state((3,)))[0], stack(u))


def test_sequence_arguments_reach_every_block() -> None:
    stack, u = mixed().eval(), torch.randn(2, 8, 4, dtype=torch.float64)
    lengths, gaps = torch.tensor([8, 5]), torch.rand(2, 8, dtype=torch.float64) + 0.5
    y, state = stack.prefill(u, lengths=lengths, integration_timesteps=gaps, dt_scale=2.0)
    alone, own = stack.prefill(u[1, :5], integration_timesteps=gaps[1, :5], dt_scale=2.0)
    same(y[1, :5], alone)
    assert not y[1, 5:].any()
    for got, want in zip(tree_leaves(state), tree_leaves(own), strict=True):
        same(got[1], want)
    reset = torch.zeros(2, 8, dtype=torch.bool)
    reset[:, 3] = True
    same(stack(u, reset=reset)[:, 3:], stack(u[:, 3:]))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, :2] = False
    same(stack(u, mask=mask)[:, 2:], stack(u[:, 2:]))
    _, state = stack.prefill(u[:, :4], integration_timesteps=gaps[:, :4])
    y_t, _ = stack.step(u[:, 4], state, integration_timestep=gaps[:, 4])
    same(y_t, stack(u, integration_timesteps=gaps)[:, 4])


def test_checkpointing_changes_no_gradient_and_keeps_less() -> None:
    u = torch.randn(2, 40, 4, dtype=torch.float64)
    found = []
    for checkpoint in (False, True):
        stack, kept = mixed(checkpoint).train(), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: (kept.append(x.numel()), x)[1], lambda x: x
        ):
            loss = stack(u).square().sum()
        loss.backward()
        found.append(([p.grad for p in stack.parameters()], sum(kept)))
    for plain, recomputed in zip(found[0][0], found[1][0], strict=True):
        assert plain is not None
        assert torch.equal(plain, recomputed)
    assert found[1][1] < 0.25 * found[0][1]


def test_reset_parameters_draws_every_block_again() -> None:
    stack = mixed()
    before = {k: v.clone() for k, v in stack.state_dict().items()}
    torch.manual_seed(1)
    stack.reset_parameters()
    changed = {k for k, v in stack.state_dict().items() if not torch.equal(v, before[k])}
    assert {k.split(".")[1] for k in changed} == {"0", "1", "2", "3"}
    torch.manual_seed(1)
    stack.reset_parameters()
    again = {k: v.clone() for k, v in stack.state_dict().items()}
    torch.manual_seed(1)
    stack.reset_parameters()
    assert all(torch.equal(v, again[k]) for k, v in stack.state_dict().items())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no blocks"):
        Stack([])
    stack, u = mixed(), torch.randn(2, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="a state of 1 blocks, expected 4"):
        stack.prefill(u, (None,))
    with pytest.raises(ValueError, match="a state of 5 blocks, expected 4"):
        stack.step(u[:, 0], (None,) * 5)
    both = Stack([S5(4, 8), S5(4, 8, bidirectional=True)])
    with pytest.raises(ValueError, match="bidirectional"):
        both.prefill(u.float())
    assert registry.get("s5").name == both[0].name


def language_model(**options: Any) -> LRNNLMHeadModel:
    return LRNNLMHeadModel(4, 4, 3, 11, ("s5", "mamba"), d_intermediate=6, **options)


def network(name: str) -> nn.Module:
    """Return a model whose sums and norms a GPU makes in one pass, in float64."""
    torch.manual_seed(0)
    if name == "language model":
        return language_model().double()
    if name == "parallel":
        return language_model(block="parallel", norm="layer", gradient_checkpointing=True).double()
    norms = ("rms", "layer", "batch", "rms")
    blocks = [Block(4, S5(4, 4), norm=n, prenorm=n != "layer") for n in norms]
    return Stack([*blocks, S5(4, 4), Stack([Block(4, S5(4, 4))]), *blocks[:1]]).double()


def everything(model: nn.Module, u: Tensor) -> list[Tensor]:
    """Return outputs, states and gradients of all methods."""
    values = dict(model.named_parameters())
    y = model.train()(u)
    found = [y, *torch.autograd.grad(y.sin().sum(), list(values.values()))]
    model.eval()
    found += tree_leaves(model.prefill(u, lengths=torch.tensor([5, 3])))  # pyright: ignore[reportCallIssue]
    y, state = model.prefill(u[:, :4])  # pyright: ignore[reportCallIssue]
    found += [y, *tree_leaves(model.step(u[:, 4], state))]  # pyright: ignore[reportCallIssue]
    call = torch.func.functional_call
    gradients = torch.func.grad(lambda p: call(model, p, (u,)).sin().sum())(values)
    return [*found, *gradients.values()]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let the next norm add a waiting branch; return a list of whether each had one."""
    waited: list[bool] = []

    def recorded(x: Tensor, branch: Tensor | None, *rest: Any, **options: Any) -> Any:
        waited.append(branch is not None)
        return add_norm(x, branch, *rest, **options)

    monkeypatch.setattr(residual_stream, "_on_gpu", lambda x: True)
    monkeypatch.setattr(residual_stream, "add_norm", recorded)
    return waited


@pytest.mark.parametrize("name", ["language model", "parallel", "stack"])
def test_sums_made_by_the_next_norm_change_nothing(
    name: str, request: pytest.FixtureRequest
) -> None:
    u = (
        torch.randn(2, 5, 4, dtype=torch.float64)
        if name == "stack"
        else torch.arange(10).view(2, 5)
    )
    want = everything(network(name), u)
    waited = request.getfixturevalue("as_on_a_gpu")
    got = everything(network(name), u)
    assert set(waited) == {True, False}
    for a, b in zip(got, want, strict=True):
        same(a, b, rtol=1e-10, atol=1e-11)


def test_hooks_and_other_norms_see_the_sum(as_on_a_gpu: list[bool]) -> None:
    model, ids = network("language model").eval(), torch.arange(5)
    with torch.no_grad():
        want, plain = model(ids), list(as_on_a_gpu)
    assert plain == [False, *[True] * 6]
    first, second, _ = model.layers  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
    heard: dict[str, Tensor] = {}
    first.register_forward_hook(lambda m, i, o: heard.update(first=o))
    second.register_forward_pre_hook(lambda m, i: heard.update(second=i[0]))
    model.norm.register_forward_pre_hook(lambda m, i: heard.update(norm=i[0]))  # pyright: ignore[reportCallIssue, reportArgumentType]
    as_on_a_gpu.clear()
    with torch.no_grad():
        same(model(ids), want)
    assert heard["first"] is heard["second"]
    assert as_on_a_gpu == [False, True] * 3
    with torch.no_grad():
        same(heard["norm"], model.layers(model.embedding(ids)))  # pyright: ignore[reportCallIssue]
    second.norm1 = nn.Sequential(second.norm1)
    as_on_a_gpu.clear()
    with torch.no_grad():
        same(model(ids), want)
    assert as_on_a_gpu == [False, True, True, False, True]


@pytest.mark.compile
def test_a_stack_of_streams_compiles(as_on_a_gpu: list[bool]) -> None:
    torch.manual_seed(0)
    stack = Stack([Block(4, S5(4, 4), norm="rms") for _ in range(2)])
    u = torch.randn(2, 5, 4)
    want = stack(u)
    as_on_a_gpu.clear()
    compiled = torch.compile(stack, backend="aot_eager")
    same(compiled(u), want)
