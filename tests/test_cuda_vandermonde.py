# SPDX-License-Identifier: MIT
"""The CUDA kernels of the Vandermonde sums and of their moments.

Run with ``pytest -m cuda tests/test_cuda_vandermonde.py`` on a machine that has a GPU and CuPy. The
operator's cases under PyTorch's transforms run on a GPU in ``test_cuda.py``.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lrnnx_core import ops
from lrnnx_core.backends import blocked_sums, cuda, cuda_vandermonde

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]
DTYPES = cuda_vandermonde.DTYPES
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
C64 = torch.complex64


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(*shape, generator=generator, dtype=wide).to(dtype)


def problem(
    *shape: int, states: int, dtype: torch.dtype = C64, nodes: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Return v (*batch, R, H, N) and S4D's z (*batch, H, N), with steps from 1e-3 to 1e-1."""
    *batch, _, heads = shape
    lead = tuple(batch) if nodes is None else nodes
    step = torch.logspace(-3, -1, heads, dtype=torch.float64).unsqueeze(-1)
    rate = -step * (0.5 + draw(*lead, heads, states, dtype=torch.float64, seed=1).abs())
    z = torch.complex(rate, step * math.pi * torch.arange(states) + 0 * rate)
    z = z.to(dtype) if dtype.is_complex else rate.to(dtype)
    return draw(*shape, states, dtype=dtype, seed=2), z.expand(*batch, *z.shape[-2:])


def upstream(v: Tensor, length: int) -> Tensor:
    return draw(*v.shape[:-1], length, dtype=v.dtype.to_real(), seed=3)


def leaves(v: Tensor, z: Tensor, length: int) -> tuple[Tensor, ...]:
    """Return the sums and both moments, of a cotangent that the shape determines."""
    return (
        cuda_vandermonde.vandermonde(v, z, length),
        *cuda_vandermonde.vandermonde_moments(upstream(v, length), z),
    )


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.to(want.dtype) - want).norm() / want.norm().clamp(min=1e-30))


def check(v: Tensor, z: Tensor, length: int, what: object = "") -> None:
    """Compare with PyTorch in the same dtype, both against float64."""
    g = upstream(v, length)
    wide = torch.complex128 if v.is_complex() else torch.float64
    x, y, h = v.to(wide), z.to(wide), g.double()
    found = [
        (b.vandermonde(*args, length), *b.vandermonde_moments(cotangent, args[1]))
        for b, args, cotangent in (
            (cuda_vandermonde, (v, z), g), (blocked_sums, (v, z), g), (blocked_sums, (x, y), h)
        )
    ]  # fmt: skip
    eps = torch.finfo(v.dtype).eps
    for i, (got, plain, want) in enumerate(zip(*found, strict=True)):
        assert (got.dtype, got.shape) == (plain.dtype, plain.shape), (what, i)
        assert got.is_contiguous()
        if eps < 1e-10:  # nothing wider to compare with: PyTorch's own phases round as much
            allowed = 4 * eps * (16 + float(z.abs().max()) * length)
        else:
            allowed = (3 if i else 2) * error(plain, want) + 2 * eps
        assert error(got, want) <= allowed, (what, i, error(got, want), error(plain, want))


def test_the_kernels_are_in_force() -> None:
    assert cuda.ready()
    launched: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.Kernel, "launch", lambda self, *rest: launched.append(self.entry))
        for length in (40, 20_000):
            v, z = (t.requires_grad_() for t in problem(1, 2, states=3))
            ops.vandermonde(v[0], z, length).sum().backward()
    short = ["vandermonde", "vandermonde_moments"]
    assert launched == [*short, *short, "sum_partials", "sum_partials"]


@EVERY_DTYPE
def test_error_is_at_most_twice_that_of_pytorch(dtype: torch.dtype) -> None:
    """Moments three times; the error of a whole array, against float64."""
    for shape, states, length in (
        ((1, 3), 64, 1), ((1, 2), 3, 5), ((2, 2), 1, 33), ((2, 3, 2), 17, 1000),
        ((1, 8), 64, 1024), ((2, 2, 2, 1), 5, 1500), ((1, 2), 256, 2049), ((3, 4), 32, 16384),
    ):  # fmt: skip
        check(*problem(*shape, states=states, dtype=dtype), length, (shape, states, length))


@EVERY_DTYPE
def test_lengths_around_a_tile(dtype: torch.dtype) -> None:
    lengths = {1, 2, 3}
    for edge in (32, 64, 128, 1024, 2048, 4096, 8192, 16384, 32768):
        lengths |= {edge - 1, edge, edge + 1}
    v, z = problem(1, 2, states=5, dtype=dtype)
    for length in sorted(lengths):
        check(v, z, length, length)


@EVERY_DTYPE
def test_numbers_of_states(dtype: torch.dtype) -> None:
    """Around the chunks of forward and moments."""
    for states in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 256):
        for length in (100, 3001):
            check(*problem(2, 3, states=states, dtype=dtype), length, (states, length))


def test_growing_exponentials_do_not_overflow_beyond_the_length() -> None:
    for dtype, rate in ((C64, 8.0 + 1j), (torch.float32, 8.0)):
        z = torch.full((2, 3), rate, dtype=dtype)
        check(torch.ones(1, 2, 3, dtype=dtype), z, 10, dtype)
        z = torch.full((2, 3), rate / 2000, dtype=dtype)
        check(torch.ones(1, 2, 3, dtype=dtype), z, 17_000, dtype)


def test_a_million_steps_without_decay() -> None:
    z = torch.tensor([[2.7j, -0.9j]], dtype=C64)
    v = torch.tensor([[[1.0 + 0.5j, 0.25j]]], dtype=C64)
    t = torch.arange(1_000_000 - 1000, 1_000_000, dtype=torch.float64).unsqueeze(-1)
    want = (v[0] * torch.exp(t * z.to(torch.complex128))).real.sum(-1)
    got = cuda_vandermonde.vandermonde(v, z, 1_000_000)[0, 0, -1000:].double()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    check(v, z, 1_000_000)


def test_what_is_not_a_number_stays_so() -> None:
    for spoilt in (complex(math.nan, 1), complex(-1, math.nan), complex(-1, math.inf)):
        v, z = problem(1, 2, states=40)
        z = z.clone()
        z[1, 33] = spoilt
        K, *moments = leaves(v, z, 100)
        assert not K[0, 0].isnan().any()
        assert K[0, 1, 1:].isnan().all()
        for W in moments:
            assert W[0, 1, 33].isnan()
            assert W.isnan().sum() == 1


def test_strides_and_expanded_inputs() -> None:
    v, z = problem(2, 3, 4, states=6)
    want = leaves(v, z, 300)
    spread = [torch.stack([t, t], -1)[..., 0] for t in (v, z)]
    assert same(leaves(spread[0], spread[1].mT.contiguous().mT, 300), want)
    shared = problem(2, 3, 4, states=6, nodes=())
    assert shared[1].stride(0) == 0
    assert same(leaves(*shared, 300), leaves(shared[0], shared[1].contiguous(), 300))
    g = torch.ones((), dtype=torch.float32)
    expanded = cuda_vandermonde.vandermonde_moments(g.expand(2, 3, 4, 300), z)
    assert same(expanded, cuda_vandermonde.vandermonde_moments(torch.ones(2, 3, 4, 300), z))


def test_a_rows_result_does_not_depend_on_the_batch() -> None:
    for length in (777, 5000, 20_000):
        v, z = problem(5, 2, 3, states=34)
        K, first, second = leaves(v, z, length)
        g = upstream(v, length)
        alone = cuda_vandermonde.vandermonde(v[3:4, 1:, 2:], z[3:4, 2:], length)
        moments = cuda_vandermonde.vandermonde_moments(g[3:4, 1:, 2:], z[3:4, 2:])
        want = (t[3:4, 1:, 2:] for t in (K, first, second))
        assert same((alone, *moments), tuple(want))


def test_twenty_runs_give_the_same_bits() -> None:
    v, z = problem(2, 40, states=64)
    first, noise = leaves(v, z, 20_000), torch.randn(1024, 1024)
    side = torch.cuda.Stream()
    for i in range(20):
        with torch.cuda.stream(side):
            for _ in range(i):
                noise = torch.tanh(noise @ noise)
        assert same(leaves(v, z, 20_000), first)


def test_nothing_to_sum() -> None:
    v, z = problem(2, 3, states=4)
    K, first, second = leaves(v, z, 0)
    assert K.shape == (2, 3, 0)
    assert not first.any()
    assert not second.any()
    none, empty = problem(2, 3, states=0)
    K, first, _ = leaves(none, empty, 7)
    assert not K.any()
    assert first.shape == (2, 3, 0)


def test_gradients_of_the_operator_are_those_of_the_whole_matrix() -> None:
    v, z = problem(2, 3, 4, states=6, dtype=torch.complex128)
    found = []
    for backend in ("auto", "reference"):
        own = [t.detach().clone().requires_grad_() for t in (v, z.unsqueeze(-3))]
        K = ops.vandermonde(*own, 50, backend=backend)
        found.append((K.detach(), *torch.autograd.grad(K.square().sum(), own)))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_memory_of_sums_and_gradients() -> None:
    """Beside the inputs: K, its gradient, and little more."""
    v, z = (t.requires_grad_() for t in problem(1, 64, states=64))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    K = ops.vandermonde(v[0], z, 16384)
    torch.autograd.grad(K, (v, z), K.detach())
    assert torch.cuda.max_memory_allocated() - before < 2.2 * K.nbytes


def test_capture_in_a_graph() -> None:
    """Forward and moments, cold kernels included; replayed on other numbers."""
    v, z = problem(2, 3, states=20)
    g = upstream(v, 20_000)
    cuda_vandermonde.kernel.cache_clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = (
            cuda_vandermonde.vandermonde(v, z, 20_000),
            *cuda_vandermonde.vandermonde_moments(g, z),
        )
    v.mul_(-0.5)
    graph.replay()
    assert same(found, leaves(v, z, 20_000))


def test_what_cannot_run_is_refused_before_a_launch() -> None:
    v, z = problem(1, 2, states=3)
    with pytest.raises(ValueError, match="vandermonde: z is on cpu, the other tensor on cuda"):
        cuda_vandermonde.vandermonde(v, z.cpu(), 5)
    with pytest.raises(ValueError, match=r"torch\.complex64 and z torch\.complex128, which"):
        cuda_vandermonde.vandermonde(v, z.to(torch.complex128), 5)
    with pytest.raises(ValueError, match=r"torch\.float64 and z torch\.complex64, which"):
        cuda_vandermonde.vandermonde_moments(upstream(v, 5).double(), z)
    half = z.real.half()
    with pytest.raises(ValueError, match=r"z has dtype torch\.float16 on CUDA, expected one of"):
        cuda_vandermonde.vandermonde(half.unsqueeze(0), half, 5)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets beyond 32 bits; 9 GB of K."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    heads, length = 2304, 2**20 + 1
    z = torch.full((heads, 1), -1.0)
    K = cuda_vandermonde.vandermonde(torch.ones(1, heads, 1), z, length)
    torch.testing.assert_close(K[0, -1, :3], torch.exp(-torch.arange(3.0)))
    assert not K[0, -1, 1000:].any()
    first, _ = cuda_vandermonde.vandermonde_moments(K, z)
    torch.testing.assert_close(first, torch.full_like(first, 1 / (1 - math.exp(-2))))
