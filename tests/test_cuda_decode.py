"""Decoding on CUDA: steps of Mamba, linear maps of few rows, states overwritten in a graph.

Run with ``pytest -m cuda tests/test_cuda_decode.py`` on a machine with a GPU and CuPy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrnnx_core.backends import cuda, cuda_add_norm, cuda_argmax, cuda_linear_step, cuda_mamba_step
from lrnnx_core.backends.cuda_argmax import argmax
from lrnnx_core.backends.cuda_linear_step import FEW_ROWS, linear_step
from lrnnx_core.backends.cuda_mamba_step import mamba_step
from lrnnx_core.backends.donation import donating
from lrnnx_core.ops import _step_formulas as formulas
from lrnnx_core.ops import steps
from lrnnx_nn import LRNNLMHeadModel, Mamba
from lrnnx_nn.generation import engine, generate, rollout
from lrnnx_nn.generation.state import tensors

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def rounding(dtype: torch.dtype) -> float:
    """Return what may be lost beside plain operators, which in float64 are the reference."""
    return torch.finfo(dtype).eps * (16 if dtype is torch.float64 else 1)


def counted(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[Any]:
    """Return a list to which every launch of a module's kernels is added."""
    found: list[Any] = []
    launch = module.cuda.Kernel.launch

    def note(self: Any, *arguments: Any) -> None:
        found.append(self)
        launch(self, *arguments)

    monkeypatch.setattr(module.cuda.Kernel, "launch", note)
    return found


# ------------------------------------------------------------------------------ linear maps

SIZES = [(768, 3072), (1536, 768), (768, 50280), (1, 1), (7, 5), (20, 37), (1032, 9), (4104, 3)]


@EVERY_DTYPE
@pytest.mark.parametrize(("inputs", "outputs"), SIZES, ids=str)
def test_a_linear_map_of_few_rows(
    inputs: int, outputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = counted(monkeypatch, cuda_linear_step)
    weight, bias = normal(outputs, inputs, dtype=dtype, seed=1), normal(outputs, dtype=dtype)
    for rows in (1, 2, 3, FEW_ROWS, FEW_ROWS + 1):
        x = normal(rows, inputs, dtype=dtype, seed=2)
        for b in (None, bias):
            got = linear_step(x, weight, b)
            assert (got.shape, got.dtype) == ((rows, outputs), dtype)
            exact = None if b is None else b.double()
            want = nn.functional.linear(x.double(), weight.double(), exact)
            plain = nn.functional.linear(x, weight, b)
            assert error(got, want) <= max(2 * error(plain, want), rounding(dtype) / 2)
            assert torch.equal(got, linear_step(x, weight, b))
            if rows <= FEW_ROWS:
                assert torch.equal(got[-1], linear_step(x[-1], weight, b))
    assert sum(kernel.entry == "linear_step" for kernel in launches) == 4 * 2 * 3


@EVERY_DTYPE
def test_a_linear_map_of_slices(dtype: torch.dtype) -> None:
    weight, x = normal(40, 64, dtype=dtype), normal(2, 3, 64, dtype=dtype, seed=1)
    want = linear_step(x, weight, None)
    assert want.shape == (2, 3, 40)
    moved = torch.zeros(40, 65, dtype=dtype)
    moved[:, 1:] = weight
    wider = torch.zeros(2, 3, 131, dtype=dtype)
    wider[..., 1:65] = x
    assert torch.equal(linear_step(wider[..., 1:65], moved[:, 1:], None), want)
    turned = weight.mT.contiguous().mT  # cuBLAS
    torch.testing.assert_close(linear_step(x, turned, None), want, rtol=2e-2, atol=5e-2)
    assert linear_step(x[:0], weight, None).shape == (0, 3, 40)


def test_a_linear_map_refuses_two_devices() -> None:
    with pytest.raises(ValueError, match="weight is on cpu, x on cuda"):
        linear_step(normal(1, 8), normal(3, 8).cpu(), None)


def test_projections_run_it_where_nothing_stands_between(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = counted(monkeypatch, cuda_linear_step)
    layer = Mamba(32, 8).eval()
    u, state = normal(2, 32, dtype=torch.float32), layer.init_state((2,))

    def count() -> int:
        del launches[:]
        layer.step(u, state)
        return sum(kernel.entry == "linear_step" for kernel in launches)

    with torch.no_grad():
        assert count() == 2
        hook = layer.in_proj.register_forward_hook(lambda m, x, y: 2 * y)
        assert count() == 1
        hook.remove()
        torch.nn.utils.parametrizations.weight_norm(layer.out_proj)
        assert count() == 1
        with torch.autocast("cuda", torch.bfloat16):
            assert count() == 0
    assert count() == 0  # gradients


# ------------------------------------------------------------------------------ a step of Mamba


def problem(
    scheme: str = "mamba",
    batch: tuple[int, ...] = (3,),
    width: int = 24,
    states: int = 16,
    rank: int = 4,
    taps: int = 4,
    dtype: torch.dtype = torch.float32,
    *,
    timed: bool = True,
    state_only: bool = False,
    faded: bool = False,
) -> list[Any]:
    wide, seeds = torch.promote_types(dtype, torch.float32), iter(range(99))

    def narrow(*shape: int) -> Tensor:
        return normal(*shape, dtype=dtype, seed=next(seeds))

    def state(*shape: int) -> Tensor:
        return normal(*shape, dtype=wide, seed=next(seeds))

    E, N = width, states
    return [
        narrow(*batch, 2 * E), narrow(*batch, taps - 1, E), state(*batch, E, N), narrow(E, 1, taps),
        narrow(E) if timed else None, narrow(rank + 2 * N, E) / E**0.5, narrow(E, rank), state(E),
        -state(E, N).abs(), state(E), state(E).abs() if faded else None,
        state(*batch).abs() if timed else None, None, None, None, 0.7 if timed else 1.0, False,
        state_only, scheme,
    ]  # fmt: skip


def exact(arguments: list[Any]) -> tuple[Tensor, ...]:
    with pytest.MonkeyPatch.context() as patch:
        # torch's takes the argument itself above 20: what it leaves out is 10^-10 of the result
        patch.setattr(formulas, "softplus", lambda x: torch.logaddexp(x, torch.zeros_like(x)))
        return formulas.mamba_step(*(t.double() if isinstance(t, Tensor) else t for t in arguments))


def check(arguments: list[Any]) -> tuple[Tensor, ...]:
    got, plain, want = mamba_step(*arguments), formulas.mamba_step(*arguments), exact(arguments)
    for a, b, c in zip(got, plain, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert error(a, c) <= 2 * error(b, c) + rounding(a.dtype)
    return got


@EVERY_DTYPE
@pytest.mark.parametrize("scheme", ["mamba", "dirac", "zoh", "bilinear"])
@pytest.mark.parametrize("batch", [(), (1,), (64,), (3, 2)], ids=str)
def test_a_step_computes_its_formulas(
    batch: tuple[int, ...], scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = counted(monkeypatch, cuda_mamba_step)
    cases: list[dict[str, Any]] = [
        {"timed": False}, {}, {"state_only": True}, {"faded": True, "state_only": True},
    ]  # fmt: skip
    for choice in cases:
        check(problem(scheme, batch, dtype=dtype, **choice))
    many = dtype is torch.bfloat16 and batch == (64,)
    first = "mamba_step_many" if many else "mamba_step_mixed"
    assert [kernel.entry for kernel in launches] == 4 * [first, "mamba_step"]


@EVERY_DTYPE
@pytest.mark.parametrize("states", [1, 3, 16, 64, 200])
@pytest.mark.parametrize(("width", "rank", "taps"), [(1, 1, 1), (7, 5, 2), (1040, 48, 4)], ids=str)
def test_any_size(width: int, rank: int, taps: int, states: int, dtype: torch.dtype) -> None:
    arguments = problem("zoh", (5,), width, states, rank, taps, dtype)
    many = check(arguments)
    for row in (0, 4):  # a row does not depend on the rows around it
        one = [t[row] if i in (0, 1, 2, 11) else t for i, t in enumerate(arguments)]
        for alone, together in zip(mamba_step(*one), many, strict=True):
            assert torch.equal(alone, together[row])


@EVERY_DTYPE
@pytest.mark.parametrize("states", [16, 200])
def test_how_rows_are_shared_changes_no_bit(
    states: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch, width in ((1, 24), (7, 1040), (64, 24)):
        arguments = problem("zoh", (batch,), width, states, 48, dtype=dtype)
        want, launches = check(arguments), counted(monkeypatch, cuda_mamba_step)
        for most, least in ((4, 0), (2, 0), (1, 8)):
            monkeypatch.setattr(cuda_mamba_step, "ROWS", (most, most))
            monkeypatch.setattr(cuda_mamba_step, "ROWS_BLOCKS", least)
            monkeypatch.setattr(cuda_mamba_step, "MIXED_OUTPUTS", 4 * most)
            monkeypatch.setattr(cuda_mamba_step, "MIXED_ROWS", 2 if most < 4 else 1)
            cuda_mamba_step._shape.cache_clear()
            assert all(map(torch.equal, mamba_step(*arguments), want))
        monkeypatch.undo()
        cuda_mamba_step._shape.cache_clear()
        assert len({k for k in launches if k.entry == "mamba_step"}) == 3


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("batch", [16, 17, 64, 100])
def test_many_rows(batch: int, dtype: torch.dtype) -> None:
    for width, states, rank, taps in (
        (1536, 16, 48, 4), (24, 5, 3, 2), (3208, 16, 200, 4), (8, 1, 1, 1), (20, 16, 4, 4),
    ):  # fmt: skip
        arguments = problem("mamba", (batch,), width, states, rank, taps, dtype)
        arguments[6] = arguments[6] / rank**0.5
        together = check(arguments)
        assert all(map(torch.equal, mamba_step(*arguments), together))
        order = torch.arange(batch - 1, -1, -1)[:16]  # among other rows, in other places
        moved = [t[order] if i in (0, 1, 2, 11) else t for i, t in enumerate(arguments)]
        for a, b in zip(mamba_step(*moved), together, strict=True):
            assert torch.equal(a, b[order])


@pytest.mark.parametrize("size", [(8, 1, 1), (1544, 16, 48), (5128, 16, 160)], ids=str)
def test_rows_and_tiles_on_tensor_cores_change_no_bit(
    size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_mamba_step, "MANY", 1)
    width, states, rank = size
    for batch, timed in ((1, True), (7, False), (64, True)):
        cuda_mamba_step._shape.cache_clear()
        arguments = problem(
            "mamba", (batch,), width, states, rank, dtype=torch.bfloat16, timed=timed
        )
        arguments[6] = arguments[6] / rank**0.5
        want, launches = check(arguments), counted(monkeypatch, cuda_mamba_step)
        rows = (0, 1, 2, *((11,) if timed else ()))
        one = [t[-1] if i in rows else t for i, t in enumerate(arguments)]
        for alone, together in zip(mamba_step(*one), want, strict=True):
            assert torch.equal(alone, together[-1])
        for tiles, least in ((1, 0), (6, 0), (6, 1e9)):
            with monkeypatch.context() as patch:
                patch.setattr(cuda_mamba_step, "MANY_TILES", tiles)
                patch.setattr(cuda_mamba_step, "MANY_BLOCKS", least)
                cuda_mamba_step._shape.cache_clear()
                assert all(map(torch.equal, mamba_step(*arguments), want))
        assert {k.entry for k in launches} == {"mamba_step_many", "mamba_step"}
    monkeypatch.undo()
    cuda_mamba_step._shape.cache_clear()


def test_infinite_inputs_of_many_rows() -> None:
    arguments = problem("mamba", (64,), 64, dtype=torch.bfloat16, timed=False)
    arguments[0][5, 3] = torch.inf
    arguments[0][9, 7] = torch.nan
    got, plain = mamba_step(*arguments), formulas.mamba_step(*arguments)
    for a, b in zip(got, plain, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert torch.equal(a[10:].isfinite().all(), torch.tensor(True))


def test_the_size_of_a_small_language_model() -> None:
    for batch in (1, 64):
        for dtype in (torch.bfloat16, torch.float32):
            arguments = problem("mamba", (batch,), 1536, 16, 48, 4, dtype, timed=False)
            arguments[6] = arguments[6] / 7
            check(arguments)


def test_where_tensors_lie_changes_nothing() -> None:
    arguments = problem("mamba", (2, 3), dtype=torch.bfloat16)
    want = mamba_step(*arguments)
    for i, t in enumerate(arguments):
        if isinstance(t, Tensor) and t.ndim:
            wider = torch.zeros(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype)
            wider[..., 1:-2] = t
            moved = [*arguments[:i], wider[..., 1:-2], *arguments[i + 1 :]]
            for a, b in zip(mamba_step(*moved), want, strict=True):
                assert torch.equal(a, b)


def test_what_has_no_kernel_runs_in_pytorch() -> None:
    normed, mixed = problem(), problem(dtype=torch.bfloat16)
    normed[12], normed[16] = normal(4, dtype=torch.float32), True
    mixed[5] = mixed[5].float()
    for arguments in (normed, mixed, problem(taps=9), problem(batch=(0,))):
        for a, b in zip(mamba_step(*arguments), formulas.mamba_step(*arguments), strict=True):
            torch.testing.assert_close(a, b)
    arguments = problem()
    with pytest.raises(ValueError, match="A is on cpu, xz on cuda"):
        mamba_step(*arguments[:8], arguments[8].cpu(), *arguments[9:])


def test_through_the_dispatcher_and_by_itself() -> None:
    arguments = problem("zoh")
    with torch.no_grad():
        want = mamba_step(*arguments)
        for f in (steps.mamba_step, torch.ops.lrnnx_core.mamba_step.default):
            assert all(map(torch.equal, f(*arguments), want))
    arguments[0].requires_grad_()
    y, _, _ = steps.mamba_step(*arguments)
    y.sum().backward()
    assert arguments[0].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_given_away_are_overwritten(dtype: torch.dtype) -> None:
    for batch, states in (((1,), 16), ((64,), 16), ((5,), 200)):
        arguments = problem("mamba", batch, 40, states, dtype=dtype)
        want = mamba_step(*arguments)
        kept = [t.clone() for t in arguments[1:3]]
        with donating(arguments[2:3]):
            _, conv, h = mamba_step(*arguments)
        assert h is arguments[2]
        assert conv is not arguments[1]
        assert torch.equal(h, want[2])
        assert torch.equal(arguments[1], kept[0])
        arguments[2].copy_(kept[1])
        with donating(arguments[1:3]):
            y, conv, h = mamba_step(*arguments)
        assert (conv is arguments[1], h is arguments[2]) == (True, True)
        assert all(map(torch.equal, (y, conv, h), want))
        assert mamba_step(*arguments)[2] is not h


# ------------------------------------------------------------------------------ the best token


@EVERY_DTYPE
@pytest.mark.parametrize("count", [4096, 50257, 50280, 131072])
def test_the_first_of_the_largest(
    count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = counted(monkeypatch, cuda_argmax)
    x = normal(4, 3, count, dtype=dtype)
    rows = x.view(12, count)
    rows[1], rows[2], rows[3] = -torch.inf, torch.inf, torch.nan
    rows[4] = torch.where(torch.arange(count) % 1000 == 999, 9.0, 0.0)
    rows[5, [count - 1, 3000, 77]] = torch.nan
    rows[6], rows[6, 9] = 0.0, -0.0
    rows[7, count - 1] = 100.0
    assert torch.equal(argmax(x), x.argmax(-1))
    assert torch.equal(argmax(x[0, 0]), x[0, 0].argmax(-1))
    assert torch.equal(argmax(x[..., 1:]), x[..., 1:].argmax(-1))
    assert len(launches) == (3 if count > 4096 else 2)


def test_few_numbers_and_integers_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = counted(monkeypatch, cuda_argmax)
    few, integers = normal(3, 100), torch.arange(9000).view(1, -1)
    for x in (few, integers, normal(0, 5000)):
        assert torch.equal(steps.argmax(x), x.argmax(-1))
    assert not launches
    x = normal(2, 5000)
    assert torch.equal(torch.ops.lrnnx_core.argmax.default(x), x.argmax(-1))
    assert torch.equal(torch.func.vmap(steps.argmax)(x), x.argmax(-1))
    assert launches


# ------------------------------------------------------------------------------ overlapping


def overlapping(on: bool) -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(cuda, "OVERLAP", on)
    return patch


def in_a_graph(f: Any) -> Any:
    """Return a function that replays f, and has run it twice before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_overlapping_kernels_see_what_the_ones_before_wrote(
    rows: int, others: bool, graphed: bool
) -> None:
    """Each reads the last one's output, and writes where an earlier one may still read.

    Grids are of one block and of hundreds; memory that is freed is written by the next kernel. With
    others, kernels that do not overlap and copies stand between.
    """
    wide, small, scale = 6000, 64, torch.ones(64, dtype=torch.bfloat16)
    up = normal(wide, small, dtype=torch.bfloat16, seed=1)
    down = normal(small, wide, dtype=torch.bfloat16, seed=2)
    start = normal(rows, small, dtype=torch.float32, seed=3)
    stream, arguments = start.clone(), problem("mamba", (rows,), 32, dtype=torch.bfloat16)
    before = [t.clone() for t in arguments[1:3]]

    def chain() -> None:
        x = stream.clone() if others else stream
        for _ in range(50):
            _, y, _ = cuda_add_norm.add_norm(x, None, scale, None, 1e-6, False, torch.bfloat16)
            y = linear_step(linear_step(y, up, None), down, None)
            with donating(arguments[1:3]):  # written where they are read
                z, _, _ = cuda_mamba_step.mamba_step(y, *arguments[1:])
            y = torch.cat([y[:, :32], z.clamp(-9, 9)], -1).clone() if others else y
            x, _, _ = cuda_add_norm.add_norm(x, y, scale, None, 1e-6, False, torch.bfloat16)
        stream.copy_(x / x.norm())

    results = []
    for on in (False, True, True, True):
        patch = overlapping(on)
        run = in_a_graph(chain) if graphed else chain
        stream.copy_(start)
        for t, kept in zip(arguments[1:3], before, strict=True):
            t.copy_(kept)
        for _ in range(10):
            run()
        patch.undo()
        results.append([stream.clone(), *(t.clone() for t in arguments[1:3])])
    assert results[0][0].isfinite().all()
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_model_that_overlaps_has_the_same_bits(batch: int) -> None:
    torch.manual_seed(2)
    model = LRNNLMHeadModel(256, 16, 4, 5000, ["mamba"], device="cuda").bfloat16().eval()

    def run(on: bool, graphed: bool) -> list[Tensor]:
        token, state, patch = torch.arange(batch), model.init_state((batch,)), overlapping(on)
        old, seen = list(tensors(state)), []

        def step() -> None:
            with donating(old):
                logits, new = model.step(token, state)
            for a, b in zip(old, tensors(new), strict=True):
                if a is not b:
                    a.copy_(b)
            token.copy_(steps.argmax(logits))

        with torch.no_grad():
            advance = in_a_graph(step) if graphed else step
            token.copy_(torch.arange(batch))
            for t in old:
                t.zero_()
            for _ in range(30):
                advance()
                seen.append(token.clone())
        patch.undo()
        return [*seen, *(t.clone() for t in old)]

    want = run(on=False, graphed=False)
    for graphed in (False, True):
        assert all(map(torch.equal, want, run(on=True, graphed=graphed)))


def test_it_overlaps_where_the_device_can() -> None:
    kernel = cuda_linear_step.kernel(torch.float32, 4, 16, 1, 1, True)
    kernel.compile(0)
    assert bool(kernel._overlapping) == (torch.cuda.get_device_capability(0) >= (9, 0))


@pytest.mark.parametrize("layer", [False, True])
def test_few_rows_are_normed_as_many_are(layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for channels in (5, 100, 768, 1024, 1030):
        x = normal(700, channels, dtype=torch.float32)
        branch, weight = x.bfloat16(), normal(channels, dtype=torch.bfloat16, seed=1)
        bias = weight if layer else None

        def norm(rows: int) -> tuple[Tensor, ...]:
            given = (x[:rows], branch[:rows], weight, bias)  # noqa: B023
            return cuda_add_norm.add_norm(*given, 1e-6, layer, torch.bfloat16)

        launches = counted(monkeypatch, cuda_add_norm)
        many = norm(700)
        for rows in (1, 64):
            for few, all_rows in zip(norm(rows), many, strict=True):
                assert torch.equal(few, all_rows[:rows])
        assert len(set(launches)) == (2 if channels in (768, 1024) else 1)


# ------------------------------------------------------------------------------ in a graph


def model_of(**options: Any) -> LRNNLMHeadModel:
    torch.manual_seed(1)
    model = LRNNLMHeadModel(64, 16, 2, 37, ["mamba"], device="cuda", **options)
    nn.init.normal_(model.embedding.weight, std=0.4)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_generation_in_a_graph_is_the_loop(batch: int, dtype: torch.dtype) -> None:
    model = model_of().to(dtype)
    prompt = torch.randint(0, 37, (batch, 6))
    for stop in ([], [0, 1, 2]):
        options: dict[str, Any] = {"stop_tokens": stop, "seed": 0}
        want = generate(model, prompt, 40, engine="loop", **options)
        got = generate(model, prompt, 40, engine="graph", **options)
        assert got.tokens.tolist() == want.tokens.tolist()
        torch.testing.assert_close(got.context, want.context, rtol=1e-3, atol=1e-4)
        graph = list(engine._graphs[model].values())[-1]
        # two states in each of two layers, unless rows that have ended keep theirs
        states = {id(t) for block in graph.carry.context.state.blocks for t in block}
        given = [list(engine.tensors(graph.carry))[i] for i in graph.trace.spent]
        assert len(states & {id(t) for t in given}) == (0 if stop else 4)


class Twice(nn.Module):
    """A layer that uses its state twice: what a step leaves may not stand where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mamba(16, 16, device="cuda")

    def init_state(self, batch_shape: Any = ()) -> Any:
        return self.mixer.init_state(batch_shape)

    def prefill(self, u: Tensor, state: Any = None, **options: Any) -> Any:
        return self.mixer.prefill(u, state)

    def step(self, u_t: Tensor, state: Any, **options: Any) -> Any:
        first, new = self.mixer.step(u_t, state)
        second, _ = self.mixer.step(first.tanh(), state)
        return torch.tanh(first + second), new


def test_a_state_that_is_used_twice_is_not_given_away() -> None:
    model = Twice().eval()
    u = normal(2, 5, 16, dtype=torch.float32)
    with torch.no_grad():
        want, end = rollout(model, u, 20, engine="loop")
        got, last = rollout(model, u, 20, engine="graph")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(last, end, rtol=1e-3, atol=1e-4)
