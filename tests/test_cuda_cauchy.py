# SPDX-License-Identifier: MIT
"""The CUDA kernels of the Cauchy sums and of their gradients.

Run with ``pytest -m cuda tests/test_cuda_cauchy.py`` on a machine that has a GPU and CuPy. The
operator's cases under PyTorch's transforms run on a GPU in ``test_cuda.py``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lrnnx_core import ops
from lrnnx_core.backends import blocked_sums, cuda, cuda_cauchy

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]
F32, F64 = torch.float32, torch.float64
EVERY_DTYPE = pytest.mark.parametrize("dtype", cuda_cauchy.DTYPES, ids=str)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64)


def problem(
    *shape: int, states: int, dtype: torch.dtype = F32, nodes: tuple[int, ...] | None = None
) -> Inputs:
    """Return the leaf's arguments for S4's poles, with steps from 1e-3 to 1e-1."""
    *batch, rows, heads = shape
    lead = tuple(batch) if nodes is None else nodes
    a = (2 / torch.logspace(-3, -1, heads, dtype=F64)).expand(*lead, heads)
    re = -0.5 - 0.1 * draw(*lead, heads, states, seed=1).abs()
    im = math.pi * torch.arange(states) + 0 * re
    v = torch.complex(*(draw(*batch, rows, heads, states, seed=s) for s in (2, 3)))
    alpha = (v * torch.complex(re, -im).unsqueeze(-3)).real
    own = (re.square() + im.square(), re, a)
    square, rho, a = (t.to(dtype).expand(*batch, *t.shape[len(lead) :]) for t in own)
    return alpha.to(dtype), v.real.to(dtype), square, rho, a


def upstream(inputs: Inputs, length: int) -> Tensor:
    alpha = inputs[0]
    return draw(*alpha.shape[:-1], length // 2 + 1, 2, seed=4).to(alpha.dtype)


def run(backend: Any, inputs: Inputs, length: int, grad: Tensor | None = None) -> list[Tensor]:
    """Return the sums, then the gradients for a cotangent that the shape determines."""
    grad = upstream(inputs, length) if grad is None else grad
    return [backend.cauchy(*inputs, length), *backend.cauchy_backward(grad, *inputs, length)]


def ours(inputs: Inputs, length: int, grad: Tensor | None = None) -> list[Tensor]:
    return run(cuda_cauchy, inputs, length, grad)


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.to(want.dtype) - want).norm() / want.norm().clamp(min=1e-30))


def check(inputs: Inputs, length: int, what: object = "") -> None:
    """Compare with PyTorch in the same dtype, both against float64.

    Float64 has nothing wider: there the measure is what float32 loses on the same problem.
    """
    grad, single = upstream(inputs, length).to(F32), tuple(t.to(F32) for t in inputs)
    dtype = inputs[0].dtype
    exact = tuple(t.to(dtype).double() for t in single)
    got = ours(tuple(t.to(dtype) for t in single), length, grad.to(dtype))  # type: ignore[arg-type]
    plain = run(blocked_sums, single, length, grad)  # type: ignore[arg-type]
    want = run(blocked_sums, exact, length, grad.double())  # type: ignore[arg-type]
    scale = torch.finfo(dtype).eps / torch.finfo(F32).eps
    slack = 1 if dtype == F32 else 4
    for i, (x, p, w) in enumerate(zip(got, plain, want, strict=True)):
        assert (x.dtype, x.shape) == (dtype, p.shape), (what, i)
        allowed = scale * slack * ((3 if i else 2) * error(p, w) + 4 * torch.finfo(F32).eps)
        assert error(x, w) <= allowed, (what, i, error(x, w), error(p, w))


def test_the_kernels_are_in_force() -> None:
    assert cuda.ready()
    launched: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.Kernel, "launch", lambda self, *rest: launched.append(self.entry))
        v = torch.ones(2, 3, dtype=torch.complex64, requires_grad=True)
        ops.cauchy(v, -v, torch.ones(2), 9).real.sum().backward()
    assert launched == ["cauchy", "cauchy_backward", "cauchy_sums"]


@EVERY_DTYPE
def test_error_is_at_most_twice_that_of_pytorch(dtype: torch.dtype) -> None:
    """Gradients three times; the error of a whole array, against float64."""
    for shape, states, length in (
        ((1, 16), 64, 1), ((2, 16), 3, 2), ((4, 16), 1, 33), ((2, 3, 8), 17, 1000),
        ((1, 64), 64, 1024), ((2, 2, 1, 8), 5, 1500), ((5, 16), 70, 2049), ((4, 32), 32, 16384),
        ((1, 16), 256, 4999),
    ):  # fmt: skip
        check(problem(*shape, states=states, dtype=dtype), length, (shape, states, length))


@EVERY_DTYPE
def test_lengths_around_a_tile(dtype: torch.dtype) -> None:
    lengths = {1, 2, 3, 4, 5}
    for edge in (256, 512, 1024, 2048, 4096):  # twice the frequencies of a tile, or of a round
        lengths |= {edge - 3, edge - 2, edge - 1, edge, edge + 1}
    for rows in (1, 4):
        inputs = problem(rows, 32, states=6, dtype=dtype)
        for length in sorted(lengths):
            check(inputs, length, (rows, length))


def test_numbers_of_states_and_rows() -> None:
    for states in (1, 2, 3, 5, 16, 33, 64, 65, 128, 200):
        for rows in (1, 2, 3, 4, 5, 8, 9):
            check(problem(rows, 32, states=states), 300, (rows, states))


def test_both_ends_of_the_spectrum_are_exact() -> None:
    """At k = 0 only alpha and |lam|^2 count, at L / 2 only beta and a."""
    alpha, beta, square, rho, a = problem(2, 3, states=4)
    r = cuda_cauchy.cauchy(alpha, beta, square, rho, a, 64)
    want = (-2 * alpha.double() / square.double()).sum(-1)
    torch.testing.assert_close(r[..., 0, 0].double(), want, rtol=1e-6, atol=1e-6)
    assert not r[..., 0, 1].any()
    want = (-2 * beta.double()).sum(-1) / a.double()
    torch.testing.assert_close(r[..., -1, 1].double(), want, rtol=1e-6, atol=1e-9)
    assert not r[..., -1, 0].any()


def test_strides_and_expanded_inputs() -> None:
    inputs = problem(2, 3, 4, states=6)
    want = ours(inputs, 300)
    spread = [torch.stack([t, t], -1)[..., 0] for t in inputs]
    spread[0] = spread[0].mT.contiguous().mT
    assert same(ours(tuple(spread), 300), want)  # type: ignore[arg-type]
    shared = problem(2, 3, 4, states=6, nodes=())
    assert shared[2].stride(0) == 0
    compact = tuple(t.contiguous() for t in shared)
    assert same(ours(shared, 300), ours(compact, 300))  # type: ignore[arg-type]
    one = torch.ones((), dtype=F32)
    full = one.expand(upstream(inputs, 300).shape)
    assert same(ours(inputs, 300, full), ours(inputs, 300, full.contiguous()))


def test_a_rows_result_does_not_depend_on_the_batch() -> None:
    alpha, beta, square, rho, a = problem(5, 3, 4, states=34)
    r, *grads = ours((alpha, beta, square, rho, a), 5000)
    alone = tuple(t[3:4] for t in (alpha, beta, square, rho, a))
    grad = upstream((alpha, beta, square, rho, a), 5000)[3:4]
    found = ours(alone, 5000, grad)  # type: ignore[arg-type]
    assert same(found, [t[3:4] for t in (r, *grads)])
    one = cuda_cauchy.cauchy(alpha[:, 1:2], beta[:, 1:2], square, rho, a, 5000)
    assert torch.equal(one, r[:, 1:2])


def test_twenty_runs_give_the_same_bits() -> None:
    inputs = problem(4, 40, states=64)
    first, noise = ours(inputs, 9000), torch.randn(1024, 1024)
    side = torch.cuda.Stream()
    for i in range(20):
        with torch.cuda.stream(side):
            for _ in range(i):
                noise = torch.tanh(noise @ noise)
        assert same(ours(inputs, 9000), first)


def test_nothing_to_sum() -> None:
    for shape, states in (((2, 3), 0), ((0, 3), 4), ((2, 0), 4), ((0, 2, 3), 4)):
        inputs = problem(*shape, states=states)
        r, *grads = ours(inputs, 7)
        assert r.shape == (*shape, 4, 2)
        assert not r.any()
        assert [g.shape for g in grads] == [t.shape for t in inputs]
        assert not any(g.any() for g in grads)


def test_gradients_of_the_operator_are_those_of_the_whole_matrix() -> None:
    v = torch.complex(*(draw(2, 3, 4, 6, seed=s) for s in (1, 2)))
    lam = torch.complex(-0.5 - draw(3, 4, 6, seed=3).abs(), 3 * draw(3, 4, 6, seed=4))
    a = 1 + draw(4, seed=5).abs()
    found = []
    for backend in ("auto", "reference"):
        own = [t.detach().clone().requires_grad_() for t in (v, lam, a)]
        r = ops.cauchy(*own, 50, backend=backend)
        found.append((r.detach(), *torch.autograd.grad(r.abs().square().sum(), own)))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_memory_of_sums_and_gradients() -> None:
    """Beside the inputs: r, its gradient in two forms, and a little for the sums of tiles."""
    inputs = tuple(t.requires_grad_() for t in problem(1, 64, states=64))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    r = ops.cauchy(torch.complex(*inputs[:2])[0], torch.complex(*inputs[2:4]), inputs[4], 16384)
    torch.autograd.grad(torch.view_as_real(r), inputs, torch.view_as_real(r.detach()))
    assert torch.cuda.max_memory_allocated() - before < 3.25 * r.nbytes


def test_capture_in_a_graph() -> None:
    """Forward and backward, cold kernels included; replayed on other numbers."""
    inputs = problem(2, 3, states=20)
    grad = upstream(inputs, 5000)
    cuda_cauchy.kernel.cache_clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ours(inputs, 5000, grad)
    inputs[0].mul_(-0.5)
    graph.replay()
    assert same(found, ours(inputs, 5000, grad))


def test_what_cannot_run_is_refused_before_a_launch() -> None:
    alpha, beta, square, rho, a = problem(1, 2, states=3)
    with pytest.raises(ValueError, match=r"cauchy: tensors are on cuda.* and cpu"):
        cuda_cauchy.cauchy(alpha, beta, square, rho, a.cpu(), 5)
    with pytest.raises(ValueError, match=r"tensors are torch\.float32 and torch\.float64"):
        cuda_cauchy.cauchy(alpha, beta, square.double(), rho, a, 5)
    half = [t.half() for t in (alpha, beta, square, rho, a)]
    with pytest.raises(ValueError, match=r"dtype torch\.float16 on CUDA, expected float32 or"):
        cuda_cauchy.cauchy(*half, 5)
