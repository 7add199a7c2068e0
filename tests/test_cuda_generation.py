"""Generation in CUDA graphs: token for token what the plain loop gives.

Run with ``pytest -m cuda tests/test_cuda_generation.py`` on a machine that has a GPU and CuPy.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrnnx_nn import LAYERS, LRNNLMHeadModel
from lrnnx_nn.generation import (
    NotCapturableError,
    engine,
    fork,
    generate,
    release_graphs,
    rollout,
    sampling,
    select,
)

pytestmark = pytest.mark.cuda
V = 37
MIXTURES = [*((name,) for name in LAYERS), ("attn",), ("rglru", "rglru", "attn"), ("s5", "mamba2")]
every_mixture = pytest.mark.parametrize("types", MIXTURES, ids="-".join)
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 3, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.01},
    {"seed": 4, "repetition_penalty": 1.2, "stop_tokens": [0, 1, 2]},
]


def model_of(*types: str, **options: Any) -> LRNNLMHeadModel:
    torch.manual_seed(1)
    options = {"d_intermediate": 32, "tie_embeddings": False, **options}
    model = LRNNLMHeadModel(32, 16, max(2, len(types)), V, types, device="cuda", **options)
    for table in (model.embedding, model.head):  # a fresh model hardly prefers any token
        nn.init.normal_(table.weight, std=0.4)
    return model.eval()


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def captured(model: Any) -> int:
    """Return how many graphs are kept for a model."""
    return len(engine._graphs.get(model, {}))


@every_mixture
@pytest.mark.parametrize("options", SAMPLING, ids=["greedy", "filters", "stop"])
def test_a_graph_is_the_loop_token_for_token(
    types: tuple[str, ...], options: dict[str, Any]
) -> None:
    model, prompt, lengths = model_of(*types), ids_of(3, 9), torch.tensor([9, 4, 6])
    want = generate(model, prompt, 40, lengths=lengths, engine="loop", **options)
    assert captured(model) == 0
    got = generate(model, prompt, 40, lengths=lengths, engine="graph", **options)
    assert captured(model) == 1
    assert got.tokens.tolist() == want.tokens.tolist()
    assert got.lengths.tolist() == want.lengths.tolist()
    torch.testing.assert_close(got.log_probabilities, want.log_probabilities, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.context, want.context, rtol=1e-3, atol=1e-4)


@every_mixture
def test_repeated_calls_are_independent(types: tuple[str, ...]) -> None:
    model = model_of(*types)
    prompts = [ids_of(2, 7, seed=s) for s in range(3)]
    want = [generate(model, p, 20, seed=5, engine="loop") for p in prompts]
    got = [generate(model, p, 20, seed=5, engine="graph") for p in prompts]
    again = generate(model, prompts[0], 20, seed=5, engine="graph")
    graph = next(iter(engine._graphs[model].values()))
    for a, b in zip(got, want, strict=True):  # later calls left the earlier results alone
        assert a.tokens.tolist() == b.tokens.tolist()
        torch.testing.assert_close(a.context, b.context, rtol=1e-3, atol=1e-4)
    assert again.tokens.tolist() == want[0].tokens.tolist()
    assert captured(model) == 1
    generate(model, prompts[1], 9 + 11, seed=6, engine="graph")
    assert next(iter(engine._graphs[model].values())) is graph  # captured once


def test_auto_takes_a_graph_and_no_warning() -> None:
    model = model_of("mamba", "attn")
    generate(model, ids_of(2, 5), 10)
    assert captured(model) == 1
    generate(model, ids_of(2, 5), 1)  # one token: nothing to repeat
    release_graphs(model)
    assert captured(model) == 0


def test_the_same_random_numbers_on_both_devices() -> None:
    keys = sampling.row_keys(5, (4,))
    drawn = torch.arange(4)
    on_cpu = sampling.uniforms(keys, drawn, 100)
    on_gpu = sampling.uniforms(sampling.row_keys(5, (4,), "cuda"), drawn.cuda(), 100)
    assert torch.equal(on_cpu, on_gpu.cpu())


def test_cpu_and_gpu_draw_the_same_tokens() -> None:
    model, prompt = model_of("s5", "rglru"), ids_of(4, 6)
    on_gpu = generate(model.double(), prompt, 30, seed=9)
    on_cpu = generate(model.cpu(), prompt, 30, seed=9)  # the prompt moves to the model
    assert on_gpu.tokens.tolist() == on_cpu.tokens.tolist()


@pytest.mark.parametrize("types", [("s5",), ("mamba", "attn")], ids="-".join)
def test_new_weights_are_seen(types: tuple[str, ...]) -> None:
    model, prompt = model_of(*types), ids_of(2, 5)
    generate(model, prompt, 10, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        model.train()
        loss = nn.functional.cross_entropy(model(ids_of(4, 20)).flatten(0, 1), ids_of(80, seed=2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.eval()
        want = generate(model, prompt, 10, seed=0, engine="loop")
        got = generate(model, prompt, 10, seed=0, engine="graph")
        assert got.tokens.tolist() == want.tokens.tolist()
        torch.testing.assert_close(
            got.log_probabilities, want.log_probabilities, rtol=1e-3, atol=1e-4
        )
    model.half()
    assert generate(model, prompt, 10, seed=0, engine="graph").tokens.shape == (2, 10)


def test_what_layers_kept_may_be_freed() -> None:
    model, prompt = model_of("s5", "s4d"), ids_of(2, 5)
    want = generate(model, prompt, 15, seed=0, engine="loop")
    for _ in range(3):
        got = generate(model, prompt, 15, seed=0, engine="graph")
        model.train()
        model.eval()
        torch.cuda.empty_cache()
        rubbish = [torch.full((2, n), torch.nan, device="cuda") for n in range(1, 400)]
        del rubbish
        assert got.tokens.tolist() == want.tokens.tolist()


def test_a_training_model_generates_in_evaluation() -> None:
    model, prompt = model_of("s5", "attn", dropout=0.5), ids_of(2, 5)
    want = generate(model, prompt, 12, seed=0, engine="loop")
    got = generate(model.train(), prompt, 12, seed=0, engine="graph")
    assert got.tokens.tolist() == want.tokens.tolist()
    assert model.training


def test_two_runs_are_one_and_forks_go_on() -> None:
    model, prompt = model_of("attn", "mamba"), ids_of(2, 5)
    whole = generate(model, prompt, 30, seed=1, repetition_penalty=1.1, engine="loop")
    first = generate(model, prompt, 12, seed=1, repetition_penalty=1.1, engine="graph")
    second = generate(
        model, None, 18, seed=1, repetition_penalty=1.1, state=first.context, engine="graph"
    )
    assert torch.cat([first.tokens, second.tokens], 1).tolist() == whole.tokens.tolist()
    start = fork(select(first.context, 0), 5)
    ways = generate(model, None, 20, seed=2, state=start, engine="graph")
    want = generate(model, None, 20, seed=2, state=start, engine="loop")
    assert ways.tokens.tolist() == want.tokens.tolist()
    assert len({tuple(row) for row in ways.tokens.tolist()}) == 5


def test_a_cache_that_grows_runs_in_the_loop_and_says_so() -> None:
    model, prompt = model_of("attn"), ids_of(2, 5)
    with torch.no_grad():
        _, grown = model.prefill(prompt)
    want = generate(model, prompt, 10, seed=0, state=grown, engine="loop")
    with pytest.warns(UserWarning, match="without a CUDA graph: the state changes from step"):
        got = generate(model, prompt, 10, seed=0, state=grown)
    assert got.tokens.tolist() == want.tokens.tolist()
    with pytest.raises(NotCapturableError, match="the state changes from step to step"):
        generate(model, prompt, 10, seed=0, state=grown, engine="graph", stop_tokens=[0])


class Looking(nn.Module):
    """A block that looks at values, of which a graph knows nothing."""

    def __init__(self, width: int, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def init_state(self, batch_shape: Any = ()) -> Any:
        return self.mixer.init_state(batch_shape)  # pyright: ignore[reportCallIssue]

    def reset_parameters(self) -> None:
        self.mixer.reset_parameters()  # pyright: ignore[reportCallIssue]

    def prefill(self, u: Tensor, state: Any = None, **options: Any) -> Any:
        return self.mixer.prefill(u, state, **options)  # pyright: ignore[reportCallIssue]

    def step(self, u_t: Tensor, state: Any, **options: Any) -> Any:
        self.look(u_t)
        return self.mixer.step(u_t, state, **options)  # pyright: ignore[reportCallIssue]

    def look(self, u_t: Tensor) -> None:
        if float(u_t.sum()) > 1e9:
            raise RuntimeError("large")


class Copying(Looking):
    """A block that fetches from the host's memory, which a capture refuses."""

    def look(self, u_t: Tensor) -> None:
        torch.zeros(u_t.shape[-1]).to(u_t.device)


@pytest.mark.parametrize(
    ("block", "why"), [(Looking, "the step looks at values"), (Copying, "the capture failed")]
)
def test_what_cannot_be_captured_runs_in_the_loop_and_says_so(block: Any, why: str) -> None:
    model = model_of("s5", block=block, d_intermediate=None)
    prompt = ids_of(2, 5)
    stream = torch.cuda.current_stream()
    want = generate(model, prompt, 10, seed=0, engine="loop")
    with pytest.warns(UserWarning, match=f"without a CUDA graph: {why}"):
        got = generate(model, prompt, 10, seed=0)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert generate(model, prompt, 10, seed=0).tokens.tolist() == want.tokens.tolist()
    assert torch.cuda.current_stream() == stream
    other = model_of("s5")  # the device is well afterwards
    good = generate(other, prompt, 10, seed=0, engine="graph")
    assert (
        good.tokens.tolist() == generate(other, prompt, 10, seed=0, engine="loop").tokens.tolist()
    )


def test_bfloat16_and_autocast() -> None:
    prompt = ids_of(3, 6)
    model = model_of("mamba", "attn").bfloat16()
    want = generate(model, prompt, 20, temperature=0, engine="loop")
    got = generate(model, prompt, 20, temperature=0, engine="graph")
    assert got.tokens.tolist() == want.tokens.tolist()
    model = model_of("rglru", "attn")
    with torch.autocast("cuda", torch.bfloat16):
        want = generate(model, prompt, 20, temperature=0, engine="loop")
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            got = generate(model, prompt, 20, temperature=0)
        assert got.tokens.tolist() == want.tokens.tolist()


def test_streaming_from_a_graph() -> None:
    model, prompt = model_of("mamba2"), ids_of(2, 4)
    heard: list[list[int]] = []
    found = generate(
        model, prompt, 25, seed=0, engine="graph", streamer=lambda t, a: heard.append(t.tolist())
    )
    assert torch.tensor(heard).T.tolist() == found.tokens.tolist()


def test_threads_share_a_model() -> None:
    model = model_of("s5", "attn")
    prompts = [ids_of(2, 5, seed=s) for s in range(4)]
    want = [generate(model, p, 30, seed=1, engine="loop").tokens.tolist() for p in prompts]
    generate(model, prompts[0], 30, seed=1)  # captured before the threads start
    got: dict[int, Any] = {}

    def work(i: int) -> None:
        got[i] = generate(model, prompts[i], 30, seed=1).tokens.tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(4)] == want


def test_all_rows_stopped_ends_early_with_exact_states() -> None:
    model, prompt = model_of("s5", "attn"), ids_of(4, 5)
    stop = list(range(0, V, 2))
    want = generate(model, prompt, 500, seed=0, stop_tokens=stop, engine="loop")
    got = generate(model, prompt, 500, seed=0, stop_tokens=stop, engine="graph")
    assert got.tokens.tolist() == want.tokens.tolist()
    assert got.tokens.shape[1] < 100
    torch.testing.assert_close(got.state.position, 5 + got.lengths)


@pytest.mark.parametrize("name", LAYERS)
def test_a_rollout_on_the_gpu_is_the_one_on_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](4, 8, dtype=torch.float64)
    u = torch.randn(2, 6, 4, dtype=torch.float64)
    want, _ = rollout(layer, u, 5, feedback=torch.tanh)
    got, _ = rollout(layer.cuda(), u.cuda(), 5, feedback=torch.tanh)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_a_rollout_in_a_graph_is_the_loop(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](8, 8).cuda().eval()
    gaps = torch.rand(2, 35, device="cuda") + 0.5
    with torch.no_grad():
        for seed in (0, 1, 2):
            u = 0.1 * torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(seed)).cuda()
            for some in (None, gaps):
                options: dict[str, Any] = {"integration_timesteps": some, "feedback": torch.tanh}
                want, end = rollout(layer, u, 30, engine="loop", **options)
                got, last = rollout(layer, u, 30, engine="graph", **options)
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(last, end, rtol=1e-3, atol=1e-4)
        assert captured(layer) == 2
        rollout(layer, u, 30)
    assert captured(layer) == 3
