# SPDX-License-Identifier: MIT
"""The launchers of the Vandermonde and Cauchy sums on CUDA, up to the launch; needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lrnnx_core import ops
from lrnnx_core.backends import cuda, cuda_cauchy, cuda_vandermonde, library

Launch = tuple[str, int, int, dict[str, str], tuple[Any, ...]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Let CPU tensors pass for CUDA ones, up to the launch."""
    seen: list[Launch] = []

    def launch(self: cuda.Kernel, device: int, *rest: Any) -> None:
        blocks, threads, _, *values = rest
        packed = self._struct.unpack(self._struct.pack(*values))
        choices = dict(o[2:].split("=") for o in self.options if o.startswith("-D"))
        seen.append((self.entry, blocks, threads, choices, packed))

    monkeypatch.setattr(cuda, "ready", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(cuda.Kernel, "launch", launch)
    return seen


@pytest.mark.parametrize("dtype", cuda_vandermonde.DTYPES, ids=str)
def test_tiles_cover_every_length_and_none_is_empty(dtype: torch.dtype) -> None:
    for length in (*range(1, 70), 1023, 1024, 1025, 2048, 2049, 8192, 8193, 16384, 16385, 10**6):
        for step in cuda_vandermonde.ENTRIES:
            x = cuda_vandermonde.choose(step, dtype, length, 64)
            number, lines = cuda_vandermonde.tiles(x, length)
            assert lines <= x.side
            assert (number - 1) * lines * x.side < length <= number * lines * x.side
            assert 16 <= x.threads <= 256


def test_a_moments_block_has_few_states_where_there_are_few() -> None:
    found = [cuda_vandermonde.choose("moments", torch.complex64, 100, n) for n in (1, 8, 9)]
    assert [x.states for x in found] == [8, 8, 32]
    kernels = {cuda_vandermonde.kernel(x) for x in found}
    assert len(kernels) == 2


def test_states_lie_on_a_power_of_two_of_threads() -> None:
    found = {n: cuda_cauchy.lanes(n) for n in (1, 2, 3, 5, 16, 17, 33, 64, 1000)}
    assert found == {1: 1, 2: 1, 3: 2, 5: 4, 16: 8, 17: 16, 33: 32, 64: 32, 1000: 32}
    assert [cuda_cauchy.together(n) for n in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 4, 4]


def test_launches_of_the_vandermonde_sums(launches: list[Launch]) -> None:
    v, z = (
        torch.zeros(2, 5, 3, 40, dtype=torch.complex64),
        torch.zeros(3, 40, dtype=torch.complex64),
    )
    K = cuda_vandermonde.vandermonde(v, z.expand(2, 3, 40), 20_000)
    W = cuda_vandermonde.vandermonde_moments(K, z.expand(2, 3, 40))
    assert K.shape == (2, 5, 3, 20_000)
    assert [w.shape for w in W] == [v.shape] * 2
    names = [name for name, *_ in launches]
    assert names == ["vandermonde", "vandermonde_moments", "sum_partials", "sum_partials"]
    (_, blocks, threads, choices, values), (_, more, *_, others), *_ = launches
    assert (blocks, threads, choices["SIDE"]) == (30 * 2, 256, "128")
    # the batch shares its nodes, so it joins the rows; two tiles of 79 lines
    assert values[3:] == (10, 3, 40, 20_000, 2, 79)
    assert values[1] == z.data_ptr()
    assert others[4:] == (10, 3, 40, 20_000, 2, 79, 2)
    assert more == 30 * 2 * 2


def test_launches_of_the_cauchy_sums(launches: list[Launch]) -> None:
    alpha, square, a = torch.zeros(2, 5, 3, 70), torch.zeros(2, 3, 70), torch.zeros(2, 3)
    rest = (alpha, alpha, square, square, a, 4000)
    r = cuda_cauchy.cauchy(*rest)
    found = cuda_cauchy.cauchy_backward(r, *rest)
    assert r.shape == (2, 5, 3, 2001, 2)
    assert [t.shape for t in found] == [t.shape for t in rest[:5]]  # type: ignore[union-attr]
    (_, blocks, _, _, values), (_, more, _, _, others), (_, last, *_) = launches
    assert values[6:] == (5, 3, 70, 4000, 2, 8, 1 / 8000)
    assert blocks == 6 * 2 * 8
    assert others[7:] == (5, 3, 70, 4000, 2, 2, 2, 32, 1 / 8000)
    assert (more, last) == (6 * 2 * 2 * 2, 6)


@pytest.mark.usefixtures("launches")
def test_an_expanded_or_conjugated_tensor_reaches_the_kernels_as_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []

    def kernel(v: Tensor, z: Tensor, length: int) -> Tensor:
        seen.extend((v, z))
        return cuda_vandermonde.vandermonde(v, z, length)

    handle = library.implement("vandermonde", "cpu", kernel)
    z = torch.ones(3, 4, dtype=torch.complex64).conj()
    assert ops.vandermonde(torch.ones(3, 1).expand(3, 4), z, 9).shape == (9, 3)
    assert len(seen) == 2
    assert not any(t.is_conj() for t in seen)
    del handle
