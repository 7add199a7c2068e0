"""Rollouts: a loop over whole forwards is what they are measured against."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eager_graph import EagerGraph, pretend
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from lrnnx_nn import LAYERS, S5, Attention, Block, Gated, LRNNLMHeadModel, Stack
from lrnnx_nn.generation import fork, generate, rollout

H = 4
same = torch.testing.assert_close
TIMELESS = {"attn"}


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    wide: dict[str, Any] = {"dtype": torch.float64}
    kinds: dict[str, nn.Module] = {name: LAYERS[name](H, 6, **wide) for name in LAYERS}
    kinds["attn"] = Attention(H, n_heads=2, **wide)
    kinds["block"] = Block(H, LAYERS["mamba"](H, 4)).double()
    kinds["gated"] = Gated(H, "s4d", 4, bottleneck=2, **wide)
    kinds["stack"] = Stack(
        [Block(H, LAYERS["rglru"](H)), LAYERS["s5"](H, 4), Attention(H, n_heads=1)]
    ).double()
    return kinds


PARTS = parts()
every_part = pytest.mark.parametrize("name", PARTS)
every_layer = pytest.mark.parametrize("name", LAYERS)


def squash(y: Tensor) -> Tensor:
    return torch.tanh(y) + 0.1


def plainly(model: Any, u: Tensor, steps: int, gaps: Tensor | None) -> Tensor:
    """Return the outputs, by a whole forward over everything read so far for each of them."""
    outputs = []
    for _ in range(steps):
        some = {} if gaps is None else {"integration_timesteps": gaps[..., : u.shape[-2]]}
        outputs.append(model(u, **some)[..., -1, :])
        u = torch.cat([u, squash(outputs[-1]).unsqueeze(-2)], -2)
    return torch.stack(outputs, -2)


@every_part
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_a_rollout_is_the_loop_of_whole_forwards(name: str, batch: tuple[int, ...]) -> None:
    part = PARTS[name].eval()
    u = torch.randn(*batch, 5, H, dtype=torch.float64)
    gaps = torch.rand(*batch, 10, dtype=torch.float64) + 0.5
    for some in (None, gaps):
        got, state = rollout(part, u, 6, integration_timesteps=some, feedback=squash)
        want = plainly(part, u, 6, some)
        same(got, want)
        y, _ = part.step(  # the state has read everything but the last output
            squash(got[..., -1, :]), state
        )
        once_more, _ = rollout(part, squash(got[..., -1:, :]), 1, state, feedback=squash)
        same(once_more[..., 0, :], y)
    uniform = rollout(part, u, 6, feedback=squash)[0]
    assert (name in TIMELESS) == torch.equal(uniform, got)


@every_part
def test_two_rollouts_are_one(name: str) -> None:
    part = PARTS[name].eval()
    u, gaps = torch.randn(2, 3, H).double(), torch.rand(2, 11).double() + 0.5
    with torch.no_grad():
        want, end = rollout(part, u, 9, integration_timesteps=gaps, feedback=squash)
        first, state = rollout(part, u, 4, integration_timesteps=gaps[:, :6], feedback=squash)
        fed = squash(first[:, -1:])
        second, last = rollout(
            part, fed, 5, state, integration_timesteps=gaps[:, 6:], feedback=squash
        )
    same(torch.cat([first, second], 1), want)
    same(last, end)


@every_layer
def test_gradients_flow_through_a_rollout(name: str) -> None:
    layer: Any = PARTS[name]
    u = torch.randn(3, H).double().requires_grad_()
    parameters = tuple(layer.parameters())
    found = []
    for run in (
        lambda: rollout(layer, u, 4, feedback=squash)[0],
        lambda: plainly(layer, u, 4, None),
    ):
        found.append(torch.autograd.grad(run().square().sum(), (u, *parameters), allow_unused=True))
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            same(got, want)
    assert found[0][0].abs().max() > 0
    assert torch.autograd.gradcheck(lambda x: rollout(layer, x, 3, feedback=squash)[0], u)


@every_layer
def test_rollouts_under_vmap(name: str) -> None:
    layer = PARTS[name]
    u, gaps = torch.randn(3, 4, H).double(), torch.rand(3, 6).double() + 0.5

    def run(x: Tensor, gap: Tensor) -> Tensor:
        return rollout(layer, x, 3, integration_timesteps=gap, feedback=squash)[0]

    same(vmap(run)(u, gaps), run(u, gaps))
    same(
        vmap(lambda x: rollout(layer, x, 2, feedback=squash)[0])(u), run(u, torch.ones(3, 6))[:, :2]
    )


def test_per_sample_gradients_ensembles_and_tangents() -> None:
    layers = [S5(H, 6, dtype=torch.float64) for _ in range(3)]
    u = torch.randn(2, 4, H).double()
    parameters, _ = stack_module_state(layers)  # pyright: ignore[reportArgumentType]

    class Rolled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return rollout(self.layer, x, 3, feedback=squash)[0]

    rolled = Rolled(layers[0])
    stacked = {f"layer.{k}": v for k, v in parameters.items()}
    many = vmap(lambda p: functional_call(rolled, p, (u,)))(stacked)
    for got, layer in zip(many, layers, strict=True):
        same(got, rollout(layer, u, 3, feedback=squash)[0])
    one = {f"layer.{k}": v.detach() for k, v in layers[0].named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(rolled, p, (x,)).square().sum()

    samples = vmap(grad(loss), (None, 0))(one, u)
    for i in range(2):
        same({k: v[i] for k, v in samples.items()}, grad(loss)(one, u[i]))
    tangent = {k: torch.randn_like(v) for k, v in one.items()}
    _, along = jvp(lambda p: loss(p, u), (one,), (tangent,))
    whole = grad(loss)(one, u)
    same(along, sum((whole[k] * tangent[k]).sum() for k in one))


def test_the_default_feeds_the_output_back() -> None:
    layer, u = PARTS["s5"], torch.randn(2, 5, H).double()
    same(rollout(layer, u, 4, feedback=lambda y: y)[0], rollout(layer, u, 4)[0], rtol=0, atol=0)


def test_a_fork_rolls_out_samples() -> None:
    layer, u = PARTS["s5"].eval(), torch.randn(5, H).double()
    with torch.no_grad():
        y, state = rollout(layer, u, 1)
        start = y.expand(6, 1, H) + torch.randn(6, 1, H, generator=torch.Generator()).double()
        paths, _ = rollout(layer, start, 4, fork(state, 6))
    assert paths.shape == (6, 4, H)
    same(paths[2], rollout(layer, start[2], 4, state)[0].detach())


def test_outputs_of_another_width() -> None:
    class Forecaster(nn.Module):
        """Gives a mean and a deviation for the first of two channels."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = S5(2, 4), nn.Linear(2, 3)

        def prefill(self, u: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
            y, state = self.layer.prefill(u, state, **options)
            return self.head(y), state

        def step(self, u_t: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
            y, state = self.layer.step(u_t, state, **options)
            return self.head(y), state

    model, u = Forecaster(), torch.randn(2, 6, 2)
    y, _ = rollout(model, u, 5, feedback=lambda y: y[..., :2])
    assert y.shape == (2, 5, 3)
    with pytest.raises(ValueError, match="outputs of 3 channels and inputs of 2"):
        rollout(model, u, 5)
    with pytest.raises(ValueError, match=r"feedback returned \(2, 3\), expected \(2, 2\)"):
        rollout(model, u, 5, feedback=lambda y: y)
    with pytest.raises(ValueError, match=r"feedback returned tuple, expected \(2, 2\)"):
        rollout(model, u, 5, feedback=lambda y: (y, y))  # pyright: ignore[reportArgumentType]
    wide = LAYERS["s4d"](2, 4, channels=2)
    with pytest.raises(ValueError, match="outputs of 4 channels and inputs of 2"):
        rollout(wide, u, 1)


def test_a_rollout_of_tokens_is_greedy_generation() -> None:
    torch.manual_seed(0)
    model = LRNNLMHeadModel(8, 4, 2, 11, ["s5", "attn"], dtype=torch.float64).eval()
    ids = torch.randint(0, 11, (2, 5))
    with torch.no_grad():
        logits, _ = rollout(model, ids, 6, feedback=lambda y: y.argmax(-1))
    assert logits.argmax(-1).tolist() == generate(model, ids, 6, temperature=0).tokens.tolist()
    with pytest.raises(ValueError, match="tokens need a feedback"):
        rollout(model, ids, 6)


@pytest.mark.parametrize("steps", [0, 1])
def test_few_steps(steps: int) -> None:
    layer, u, gaps = PARTS["s5"], torch.randn(2, 5, H).double(), torch.ones(2, 5)
    y, state = rollout(layer, u, steps, integration_timesteps=gaps)
    want, end = layer.prefill(u)  # pyright: ignore[reportCallIssue]
    same(y, want[:, 5 - steps :])
    same(state, end)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> type[EagerGraph]:
    return pretend(monkeypatch)


@pytest.mark.parametrize("name", [*LAYERS, "block", "gated"])
def test_with_buffers_as_without(device: type[EagerGraph], name: str) -> None:
    part = PARTS[name].eval()
    u, gaps = torch.randn(2, 3, H).double(), torch.rand(2, 12).double() + 0.5
    with torch.no_grad():
        for some in (None, gaps):
            scale = 1 / rollout(part, u, 1)[0].abs().amax().clamp(1)  # outputs that do not explode
            want, end = rollout(part, scale * u, 10, integration_timesteps=some, engine="loop")
            got, last = rollout(part, scale * u, 10, integration_timesteps=some)
            other, _ = rollout(part, -u, 10, integration_timesteps=some)
            assert not torch.equal(other, got)
            same(got, want)
            same(last, end)
    assert device.made == 2
    fed = rollout(part, u, 10, feedback=squash)[0].detach()
    assert device.made == 2  # gradients, and a feedback that may be anything
    with torch.no_grad():
        same(rollout(part, u, 10, feedback=squash, engine="graph")[0], fed)
    assert device.made == 3


def test_a_graph_is_for_tensors_alone(device: type[EagerGraph]) -> None:
    layer, u = S5(H, 4, dtype=torch.float64), torch.randn(2, 3, H).double()
    with torch.no_grad():
        rollout(layer, u, 10)  # in training mode
        known = iter(torch.randn(20, 2, H).double())
        rollout(layer.eval(), u, 10, feedback=lambda y: next(known))
    rollout(layer, u, 10)
    assert device.made == 0
    with pytest.raises(ValueError, match='engine = "graph" with gradients or a transform'):
        rollout(layer, u, 10, engine="graph")
    with torch.no_grad(), pytest.raises(ValueError, match="with gradients or a transform"):
        vmap(lambda x: rollout(layer, x, 10, engine="graph")[0])(u)


def test_a_graph_needs_a_cuda_device() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="expected a CUDA device"):
        rollout(PARTS["s5"].eval(), torch.randn(2, 3, H).double(), 10, engine="graph")


class Silent:
    """Raises if it is run."""

    d_model = H

    def prefill(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("work before the check")

    step = prefill


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": nn.Identity()}, "Identity has no method prefill"),
    ({"engine": "fast"}, "engine = 'fast', expected one of"),
    ({"steps": -1}, "steps = -1, expected an integer >= 0"),
    ({"steps": 2.0}, "steps = 2.0, expected an integer"),
    ({"prompt": torch.randn(2, 3, 5)}, r"prompt \(2, 3, 5\), expected \(\.\.\., L, H\) with H = 4"),
    ({"prompt": torch.randn(4)}, r"prompt \(4,\), expected"),
    ({"prompt": torch.randn(2, 0, 4)}, "an empty prompt, expected at least one sample"),
    ({"prompt": torch.ones(2, 3, 4, dtype=torch.bool)}, "dtype torch.bool"),
    (
        {"integration_timesteps": torch.ones(2, 3)},
        r"integration_timesteps \(2, 3\), expected \(\.\.\., 5\): a gap before each of 3 samples",
    ),
    ({"integration_timesteps": torch.tensor(1.0)}, r"integration_timesteps \(\), expected"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[str(list(w)) for w, _ in BAD])
def test_bad_input_is_refused_before_any_work(wrong: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"model": Silent(), "prompt": torch.randn(2, 3, H), "steps": 3}
    with pytest.raises(ValueError, match=message):
        rollout(**{**call, **wrong})
