"""A linear map of some rows on CUDA: tiles of the result.

Run with ``pytest -m cuda tests/test_cuda_linear_tile.py`` on a machine with a GPU and CuPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrnnx_core.backends import cuda, cuda_linear_step, cuda_linear_tile
from lrnnx_core.backends.cuda_linear_step import FEW_ROWS, linear_step
from lrnnx_core.backends.donation import settling
from lrnnx_nn import Mamba

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]

DTYPES = tuple(cuda_linear_tile.MOST_PRODUCTS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = [
    (16, 64), (32, 16), (128, 512), (256, 128), (768, 300), (1536, 70), (1, 1), (7, 5), (20, 37),
    (1034, 9), (4100, 33),
]  # fmt: skip


@pytest.fixture(autouse=True)
def every_size_has_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda_linear_tile, "MOST_PRODUCTS", dict.fromkeys(DTYPES, 2**60))
    cuda_linear_step._shape.cache_clear()
    yield
    cuda_linear_step._shape.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[cuda.Kernel]:
    """Return the list to which every launch adds its kernel."""
    found: list[cuda.Kernel] = []
    launch = cuda.Kernel.launch

    def note(self: cuda.Kernel, *arguments: Any) -> None:
        found.append(self)
        launch(self, *arguments)

    monkeypatch.setattr(cuda.Kernel, "launch", note)
    return found


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@EVERY_DTYPE
@pytest.mark.parametrize(("inputs", "outputs"), SIZES, ids=str)
def test_a_linear_map_of_some_rows(
    inputs: int, outputs: int, dtype: torch.dtype, launches: list[cuda.Kernel]
) -> None:
    weight, bias = normal(outputs, inputs, dtype=dtype, seed=1), normal(outputs, dtype=dtype)
    every = normal(256, inputs, dtype=dtype, seed=2)
    most = linear_step(every, weight, bias)
    rounding = 2**-24 if dtype is torch.float32 else 2**-49
    for rows in (FEW_ROWS + 1, 8, 31, 64, 130, 256):
        x = every[:rows]
        for b in (None, bias):
            got = linear_step(x, weight, b)
            assert (got.shape, got.dtype) == ((rows, outputs), dtype)
            exact = None if b is None else b.double()
            want = nn.functional.linear(x.double(), weight.double(), exact)
            plain = nn.functional.linear(x, weight, b)
            assert error(got, want) <= max(2 * error(plain, want), rounding)
            assert torch.equal(got, linear_step(x, weight, b))
        assert torch.equal(got, most[:rows])  # whatever the rows around a row
    assert {k.entry for k in launches} == {"linear_tile"}


@EVERY_DTYPE
@pytest.mark.parametrize("sizes", [(9, 24, 31), (70, 200, 70), (40, 1030, 65)], ids=str)
def test_how_the_result_is_tiled_changes_no_bit(
    sizes: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
    launches: list[cuda.Kernel],
) -> None:  # fmt: skip
    rows, inputs, outputs = sizes
    x, weight = normal(rows, inputs, dtype=dtype), normal(outputs, inputs, dtype=dtype, seed=1)
    want = linear_step(x, weight, None)
    _, slices, _ = cuda_linear_tile.partition(inputs, dtype)
    room = cuda.limits(0).shared_per_block // slices
    tiles = [t for t in cuda_linear_tile.TILES if cuda_linear_tile._region(dtype, t, 1) <= room]
    for tile in tiles:
        for stages in (1, 3):
            monkeypatch.setattr(cuda_linear_tile, "_tile", lambda *a, tile=tile: tile)
            monkeypatch.setattr(cuda_linear_tile, "STAGES", stages)
            cuda_linear_step._shape.cache_clear()
            assert torch.equal(linear_step(x, weight, None), want)
    assert len(set(launches)) >= len(tiles)


@EVERY_DTYPE
def test_where_it_lies_changes_no_bit(dtype: torch.dtype) -> None:
    weight, x = normal(40, 64, dtype=dtype), normal(2, 3, 64, dtype=dtype, seed=1)
    want = linear_step(x, weight, None)
    assert want.shape == (2, 3, 40)
    for pad in (1, 2, 3):
        moved = torch.full((40, 64 + pad), torch.nan, dtype=dtype)
        moved[:, pad:] = weight
        wider = torch.full((2, 3, 131), torch.nan, dtype=dtype)
        wider[..., 1:65] = x
        assert torch.equal(linear_step(wider[..., 1:65], moved[:, pad:], None), want)
    bias = normal(80, dtype=dtype)[::2]
    assert torch.equal(linear_step(x, weight, bias), want + bias)


def test_what_is_not_finite_stays_in_its_row_and_output() -> None:
    x, weight = normal(21, 150), normal(45, 150, seed=1)
    clean = linear_step(x, weight, None)
    x[3, 149], weight[7, 0] = torch.inf, torch.nan
    got = linear_step(x, weight, None)
    assert got[:, 7].isnan().all()
    assert not got[3].isfinite().any()
    kept = torch.ones_like(got, dtype=torch.bool)
    kept[:, 7], kept[3] = False, False
    assert torch.equal(got[kept], clean[kept])


@pytest.mark.parametrize("rows", [1, 4, 5, 40])
@pytest.mark.parametrize("graphed", [False, True])
def test_it_sees_what_the_ones_before_wrote(
    rows: int, graphed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, down = normal(1500, 64, seed=1) / 8, normal(64, 1500, seed=2) / 40
    start = normal(rows, 64, seed=3)
    results: list[Tensor] = []
    for overlap, promised in ((False, []), (True, []), (True, [up, down]), (True, [up])):
        monkeypatch.setattr(cuda, "OVERLAP", overlap)
        torch.cuda.synchronize()
        stream = start.clone()

        def chain(stream: Tensor = stream) -> None:
            y = stream
            with settling(promised):  # noqa: B023
                for _ in range(40):
                    y = linear_step(linear_step(y, up, None), down, None)
            stream.copy_(y / y.norm())

        if graphed:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                chain()
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain()
            stream.copy_(start)
        for _ in range(5):
            graph.replay() if graphed else chain()
        results.append(stream)
    assert results[0].isfinite().all()
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_step_of_mamba_runs_it(launches: list[cuda.Kernel]) -> None:
    layer = Mamba(32, 8).eval()
    with torch.no_grad():
        u = normal(9, 32)
        y, _ = layer.step(u, layer.init_state((9,)))
        assert sum(kernel.entry == "linear_tile" for kernel in launches) == 2
        few, _ = layer.step(u[:3], layer.init_state((3,)))
    torch.testing.assert_close(few, y[:3])
