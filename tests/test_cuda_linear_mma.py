"""Linear maps of some dozens of rows on tensor cores.

Run with ``pytest -m cuda tests/test_cuda_linear_mma.py`` on a machine with a GPU and CuPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from lrnnx_core.backends import cuda, cuda_linear_mma, cuda_linear_step
from lrnnx_core.backends.cuda_linear_mma import MOST_ROWS
from lrnnx_core.backends.cuda_linear_step import FEW_ROWS, linear_step
from lrnnx_core.backends.donation import settling
from lrnnx_nn import LRNNLMHeadModel
from lrnnx_nn.generation import generate

pytestmark = pytest.mark.cuda

EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SIZES = [
    (768, 3072), (1536, 768), (1024, 4096), (4096, 2048),
    (8, 1), (8, 5), (40, 7), (200, 333), (1032, 97), (4104, 130), (1544, 770), (16, 4096),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def every_size(new_tensors_are_on_the_gpu: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_linear_mma, "MOST_READ", 1e12)  # also where cuBLAS is faster
        cuda_linear_step._shape.cache_clear()
        yield
    cuda_linear_step._shape.cache_clear()


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x.double(), weight.double(), None if bias is None else bias.double())


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def takes(
    rows: int,
    inputs: int,
    outputs: int,
    weight_row: int,
    dtypes: tuple[torch.dtype, ...],
    alignment: int,
) -> bool:
    """Return whether `linear_step` launches this kernel: of x, the weight and perhaps a bias."""
    call = cuda_linear_step._shape(
        rows, inputs, outputs, (weight_row, 1), dtypes, alignment & 15, 0, False, False
    )
    return call is not None and call.kernel.entry == "linear_mma"


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the map of the kernel, which must take it and be as close as cuBLAS."""
    dtypes = tuple(t.dtype for t in (x, weight, bias) if t is not None)
    rows, alignment = x.numel() // x.shape[-1], x.data_ptr() | weight.data_ptr()
    assert takes(rows, *weight.mT.shape, weight.stride(0), dtypes, alignment)
    got, want = linear_step(x, weight, bias), exact(x, weight, bias)
    assert (got.shape, got.dtype) == (want.shape, x.dtype)
    assert error(got, want) <= 1.1 * error(linear(x, weight, bias), want)
    return got


@EVERY_DTYPE
@pytest.mark.parametrize(("inputs", "outputs"), SIZES, ids=str)
def test_any_size(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight, bias = normal(outputs, inputs, dtype=dtype), normal(outputs, dtype=dtype, seed=1)
    whole = normal(MOST_ROWS, inputs, dtype=dtype, seed=2)
    for b in (None, bias):
        want = check(whole, weight, b)
        assert torch.equal(linear_step(whole, weight, b), want)
        for rows in (FEW_ROWS + 1, 8, 16, 17, 31, 64, 65, 100):  # alone or among others
            assert torch.equal(check(whole[:rows].clone(), weight, b), want[:rows])
        order = torch.arange(49, -1, -1)
        assert torch.equal(linear_step(whole[order], weight, b), want[order])


@EVERY_DTYPE
def test_every_number_of_rows(dtype: torch.dtype) -> None:
    weight, bias = normal(77, 136, dtype=dtype), normal(77, dtype=dtype, seed=1)
    whole = normal(MOST_ROWS + 2, 136, dtype=dtype, seed=2)
    want = linear_step(whole[:MOST_ROWS], weight, bias)
    for rows in range(FEW_ROWS + 1, MOST_ROWS + 1):
        assert torch.equal(linear_step(whole[:rows], weight, bias), want[:rows])
    for rows in (0, 1, FEW_ROWS, MOST_ROWS + 1, MOST_ROWS + 2):
        assert not takes(rows, 136, 77, 136, (dtype, dtype), 0)
    for rows in (0, MOST_ROWS + 1, MOST_ROWS + 2):
        got = linear_step(whole[:rows], weight, bias)
        torch.testing.assert_close(got, linear(whole[:rows], weight, bias))


def test_where_tensors_lie() -> None:
    x, weight, bias = normal(2, 3, 4, 64), normal(40, 64, seed=1), normal(40, seed=2)
    want = check(x, weight, bias)
    assert want.shape == (2, 3, 4, 40)
    apart = torch.full((40, 72), torch.nan, dtype=torch.bfloat16)
    apart[:, 8:] = weight
    wider = torch.full((2, 3, 4, 131), torch.nan, dtype=torch.bfloat16)
    wider[..., 1:65] = x
    longer = torch.full((81,), torch.nan, dtype=torch.bfloat16)
    longer[1::2] = bias
    assert torch.equal(check(x, apart[:, 8:], bias), want)
    assert torch.equal(linear_step(wider[..., 1:65], weight, longer[1::2]), want)
    assert torch.equal(check(x, weight, longer[1::2]), want)
    one = check(x, weight[:1].expand(5, 64))
    assert torch.equal(one, one[..., :1].expand(2, 3, 4, 5))


def test_what_it_leaves_to_cublas() -> None:
    bf, fp = torch.bfloat16, torch.float32
    assert takes(64, 64, 40, 64, (bf, bf), 0)
    for case in (
        (64, 60, 40, 64, (bf, bf), 0), (64, 64, 40, 65, (bf, bf), 0), (64, 64, 40, 64, (bf, bf), 8),
        (64, 64, 40, 64, (fp, fp), 0), (64, 64, 40, 64, (bf, fp), 0), (64, 0, 40, 64, (bf, bf), 0),
        (64, 64, 40, 64, (bf, bf, fp), 0), (64, 64, 0, 64, (bf, bf), 0),
    ):  # fmt: skip
        assert not takes(*case)
    x, weight = normal(64, 72), normal(72, 40, seed=1)
    torch.testing.assert_close(linear_step(x, weight.mT, None), linear(x, weight.mT))
    misplaced = normal(64, 72 * 40 + 1)[0, 1:].view(40, 72)
    torch.testing.assert_close(linear_step(x, misplaced, None), linear(x, misplaced))
    with pytest.raises(ValueError, match="weight is on cpu, x on cuda"):
        linear_step(x, weight.mT.cpu(), None)


@EVERY_DTYPE
def test_what_is_no_number_stays_in_its_row(dtype: torch.dtype) -> None:
    for inputs, outputs in ((768, 3072), (104, 50)):
        x, weight = normal(64, inputs, dtype=dtype), normal(outputs, inputs, dtype=dtype, seed=1)
        want = linear_step(x, weight, None)
        x[5, 3], x[9, inputs - 1], x[63, 0] = torch.nan, torch.inf, -torch.inf
        got = linear_step(x, weight, None)
        others = [r for r in range(64) if r not in (5, 9, 63)]
        assert torch.equal(got[others], want[others])
        assert got[5].isnan().all()
        assert torch.equal(got[[9, 63]], linear(x[[9, 63]].float(), weight.float()).to(dtype))


def test_the_order_of_sums_is_that_of_the_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def clear() -> None:
        for function in (cuda_linear_step._shape, cuda_linear_mma.kernel):
            function.cache_clear()

    x, weight, bias = normal(100, 768), normal(3072, 768, seed=1), normal(3072, seed=2)
    want = linear_step(x, weight, bias)
    for name, value in (
        ("HEIGHTS", (16,)), ("HEIGHTS", (32,)), ("HEIGHTS", (64,)), ("OUTPUTS", (8,)),
        ("OUTPUTS", (48,)), ("AHEAD", 16), ("LOW_WEIGHT", 0),
    ):  # fmt: skip
        monkeypatch.setattr(cuda_linear_mma, name, value)
        clear()
        assert torch.equal(linear_step(x, weight, bias), want), (name, value)
        monkeypatch.undo()
    assert torch.equal(linear_step(x, weight[:100], bias[:100]), want[:, :100])
    clear()


@pytest.mark.parametrize("overlap", [True, False])
def test_in_a_graph_behind_kernels_that_write_what_it_reads(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "OVERLAP", overlap)
    for rows in (8, 64, 128):
        weights = [normal(n, k, seed=n) / k**0.5 for k, n in ((768, 3072), (3072, 768)) * 3]
        x = normal(rows, 768)

        def chain(x: Tensor, weights: list[Tensor] = weights) -> Tensor:
            for weight in weights:
                x = linear_step(x, weight, None)
            return x

        want = chain(x)
        plain = x
        for weight in weights:
            plain = linear(plain.double(), weight.double()).to(x.dtype)
        assert error(want, plain.double()) < 2e-2
        for promised in ([], weights):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph), settling(promised):
                got = chain(x)
            for seed in (3, 4):
                x.copy_(normal(rows, 768, seed=seed))
                graph.replay()
                assert torch.equal(got, chain(x))
            x.copy_(normal(rows, 768))


def test_a_weight_that_was_just_written() -> None:
    """Without the promise the weight is read after all kernels before have ended."""
    x, weight, other = normal(64, 768), normal(768, 768, seed=1), normal(768, 768, seed=2)
    large = torch.zeros(1 << 26)
    want, small = linear_step(x, other, None), normal(64, 768, seed=3)
    for _ in range(10):
        weight.zero_()
        large.add_(1)
        weight.copy_(other)
        linear_step(small, other, None)  # lets the next one begin
        assert torch.equal(linear_step(x, weight, None), want)


def test_a_captured_step_promises_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LRNNLMHeadModel(64, 16, 2, 300, ["mamba"]).bfloat16().eval()
    prompt = torch.arange(8)[:, None].expand(8, 3) * 7 % 300
    with torch.no_grad():
        want = generate(model, prompt, 20, engine="loop", temperature=0.0).tokens
        promised: list[int] = []
        launch = cuda.Kernel.launch

        def note(self: Any, *arguments: Any) -> None:
            if self.entry == "linear_mma":
                promised.append(int(arguments[-1]))
            launch(self, *arguments)

        monkeypatch.setattr(cuda.Kernel, "launch", note)
        got = generate(model, prompt, 20, engine="graph", temperature=0.0).tokens
        assert torch.equal(got, want)
        assert {0, 1} == set(promised)  # the steps before the capture, and those in it
        model.embedding.weight.mul_(-1)
        want = generate(model, prompt, 20, engine="loop", temperature=0.0).tokens
        got = generate(model, prompt, 20, engine="graph", temperature=0.0).tokens
        assert torch.equal(got, want)


def test_on_another_stream_and_through_views() -> None:
    x, weight = normal(64, 768), normal(3072, 768, seed=1)
    want = linear_step(x, weight, None)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = linear_step(x, weight, None)
    stream.synchronize()
    assert torch.equal(got, want)
    with settling([weight]):
        assert torch.equal(linear_step(x, weight[:100], None), want[:, :100])


def test_listed_kernels_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Any] = cuda_linear_mma.kernels(cuda.limits(0))
    ran: list[Any] = []
    launch = cuda.Kernel.launch
    monkeypatch.setattr(
        cuda.Kernel, "launch", lambda self, *a: (ran.append(self), launch(self, *a))[1]
    )
    for inputs, outputs in ((768, 3072), (1536, 768)):
        linear_step(normal(64, inputs), normal(outputs, inputs, seed=1), None)
    assert set(ran) <= set(listed)
