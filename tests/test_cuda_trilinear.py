# SPDX-License-Identifier: MIT
"""The CUDA kernels of the trilinear form and of the gradient of its weight.

Run with ``pytest -m cuda tests/test_cuda_trilinear.py`` on a machine that has a GPU and CuPy. The
operator's cases under PyTorch's transforms run on a GPU in ``test_cuda.py``.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from lrnnx_core import s7
from lrnnx_core.backends import cuda, cuda_trilinear, library
from lrnnx_core.ops.trilinear import trilinear

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]
ORDERS = list(itertools.permutations(range(3)))


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def problem(
    sizes: tuple[int, int, int],
    samples: int,
    order: tuple[int, ...] = (0, 1, 2),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return w, whose axes lie in memory in this order, and samples of all three axes."""
    w = draw(*(sizes[i] for i in order), seed=1, dtype=dtype)
    w = w.permute([order.index(i) for i in range(3)])
    g, p, q = (draw(samples, n, seed=2 + i, dtype=dtype) for i, n in enumerate(sizes))
    return w, g, p, q


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check(w: Tensor, g: Tensor, p: Tensor, q: Tensor, what: object = "") -> None:
    """Compare both operators with PyTorch in the same dtype, all against float64."""
    for name, x, more in (("trilinear", (w, p, q), 2), ("trilinear_outer", (g, p, q), 3)):
        default = library.default(name)
        got = getattr(cuda_trilinear, name)(*x, 256)
        plain, want = default(*x, 256), default(*(t.double() for t in x), 256)
        assert (got.dtype, got.shape) == (plain.dtype, plain.shape), (name, what)
        assert got.is_contiguous()
        few = got.numel() < 1000  # chance decides
        allowed = more * error(plain, want) + (8 if few else 1) * torch.finfo(got.dtype).eps
        assert error(got, want) <= allowed, (name, what, error(got, want), error(plain, want))


def launched(run: object) -> list[str]:
    """Return the kernels that a call launches."""
    seen: list[str] = []
    real = cuda.Kernel.launch

    def launch(self: cuda.Kernel, *arguments: object) -> None:
        seen.append(self.entry)
        real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.Kernel, "launch", launch)
        run()
    return seen


def test_the_kernels_are_in_force() -> None:
    assert cuda.ready()
    w, _, p, q = (t.requires_grad_() for t in problem((64, 8, 64), 300))
    found = launched(lambda: trilinear(w, p, q).sum().backward())
    wide = ["trilinear_wide", "sum_partials"]
    assert found == [*wide, "trilinear_narrow", *wide, "trilinear_outer"]
    square = launched(lambda: trilinear(w.transpose(0, 1), q, q).sum().backward())
    assert square == ["trilinear_narrow", *wide, "trilinear_outer"]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(order: tuple[int, ...]) -> None:
    """Of the weight's gradient three times; every role of the shortest axis."""
    for sizes in ((16, 128, 128), (64, 4, 96), (36, 20, 3), (1, 8, 132), (260, 8, 8), (5, 64, 64)):
        for samples in (1, 63, 300):
            check(*problem(sizes, samples, order), (sizes, samples, order))


def test_long_sums() -> None:
    for sizes in ((128, 16, 128), (16, 256, 256)):
        check(*problem(sizes, 20_000), sizes)


def test_sums_of_one_sign_do_not_drift() -> None:
    """Tensor cores cut off what they add: sums that only grow show it."""
    for sizes in ((128, 16, 128), (16, 128, 128)):
        w, g, p, q = (t.abs() for t in problem(sizes, 2000))
        check(w, g, p, q, sizes)


def test_axes_that_are_no_multiple_of_four_and_other_dtypes() -> None:
    for sizes in ((30, 5, 31), (3, 10, 14)):
        check(*problem(sizes, 200), sizes)
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            check(*problem(sizes, 200, dtype=dtype), (sizes, dtype))
    check(*problem((16, 32, 32), 200, dtype=torch.float64), "float64")


def test_strides_and_expanded_inputs() -> None:
    w, g, p, q = problem((32, 4, 64), 150)
    want = cuda_trilinear.trilinear(w, p, q, 1), cuda_trilinear.trilinear_outer(g, p, q, 1)
    spread = [torch.stack([t, t], -1)[..., 0] for t in (w, g, p, q)]
    turned = [w.mT.contiguous().mT, *(t.mT.contiguous().mT for t in (g, p, q))]
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in (w, g, p, q)]
    sliced = [w, *(torch.cat([t, t, t], -1)[:, t.shape[1] : 2 * t.shape[1]] for t in (g, p, q))]
    for v, c, x, y in (spread, turned, shifted, sliced):
        assert torch.equal(cuda_trilinear.trilinear(v, x, y, 1), want[0])
        assert torch.equal(cuda_trilinear.trilinear_outer(c, x, y, 1), want[1])
    one = torch.ones(1, 4).expand(150, 4)
    check(w, g, one, q[:1].expand(150, 64), "expanded")


def test_a_samples_result_does_not_depend_on_the_others() -> None:
    """Few samples are divided over blocks by groups of the shortest axis, many are not."""
    for sizes in ((16, 64, 64), (64, 16, 64), (64, 64, 5)):
        w, _, p, q = problem(sizes, 20_000)
        whole = cuda_trilinear.trilinear(w, p, q, 1)
        for part in (slice(3, 4), slice(100, 331), slice(19_999, None)):
            assert torch.equal(cuda_trilinear.trilinear(w, p[part], q[part], 1), whole[part])


def test_twenty_runs_give_the_same_bits() -> None:
    x = problem((64, 8, 64), 5000)
    first = cuda_trilinear.trilinear(x[0], *x[2:], 1), cuda_trilinear.trilinear_outer(*x[1:], 1)
    for _ in range(20):
        assert torch.equal(cuda_trilinear.trilinear(x[0], *x[2:], 1), first[0])
        assert torch.equal(cuda_trilinear.trilinear_outer(*x[1:], 1), first[1])


def test_tf32_where_it_is_allowed() -> None:
    w, g, p, q = problem((64, 16, 64), 3000)
    want = torch.einsum("ijk,tj,tk->ti", *(t.double() for t in (w, p, q)))
    torch.set_float32_matmul_precision("high")
    try:
        coarse = cuda_trilinear.trilinear(w, p, q, 1)
        outer = cuda_trilinear.trilinear_outer(g, p, q, 1)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert 1e-5 < error(coarse, want) < 1e-3
    want = torch.einsum("ti,tj,tk->ijk", *(t.double() for t in (g, p, q)))
    assert 1e-5 < error(outer, want) < 1e-3


def test_what_is_not_a_number_stays_with_its_sample() -> None:
    w, _, p, q = problem((16, 64, 64), 200)
    p[77, 3] = math.nan
    out = cuda_trilinear.trilinear(w, p, q, 1)
    assert out[77].isnan().all()
    assert out.isnan().sum() == 16


def test_no_samples_and_mixed_devices() -> None:
    w, g, p, q = problem((16, 64, 64), 0)
    assert cuda_trilinear.trilinear(w, p, q, 1).shape == (0, 16)
    assert not cuda_trilinear.trilinear_outer(g, p, q, 1).any()
    w, g, p, q = problem((16, 64, 64), 4)
    with pytest.raises(ValueError, match="expected one device"):
        cuda_trilinear.trilinear(w, p.cpu(), q, 1)
    with pytest.raises(ValueError, match="expected one device"):
        cuda_trilinear.trilinear_outer(g, p, q.cpu(), 1)


def test_gradients_and_transforms() -> None:
    w, _, p, q = problem((16, 32, 32), 40)

    def loss(*x: Tensor) -> Tensor:
        return trilinear(*x).sin().sum()

    def plain(*x: Tensor) -> Tensor:
        return trilinear(*x, backend="reference").sin().sum()

    def square(w: Tensor, p: Tensor) -> Tensor:
        return trilinear(w, p, p).sin().sum()

    def plain_square(w: Tensor, p: Tensor) -> Tensor:
        return trilinear(w, p, p, backend="reference").sin().sum()

    wide = tuple(t.double() for t in (w, p, q))
    for f, g, x, y in (
        (loss, plain, (w / 16, p, q), (wide[0] / 16, *wide[1:])),
        (square, plain_square, (w / 16, p), (wide[0] / 16, wide[1])),
    ):
        places = tuple(range(len(x)))
        got, want = grad(f, places)(*x), grad(g, places)(*y)
        hvp = jvp(grad(f, places), x, x)[1], jvp(grad(g, places), y, y)[1]
        each = (None, *(0,) * (len(x) - 1))
        per_sample = vmap(grad(f, places), each)(*x), vmap(grad(g, places), each)(*y)
        found, expected = (*got, *hvp[0], *per_sample[0]), (*want, *hvp[1], *per_sample[1])
        for a, b in zip(found, expected, strict=True):
            assert error(a, b) < 1e-5


@pytest.mark.parametrize("choices", [{}, {"bidirectional": True}], ids=str)
def test_the_model_agrees_with_float64(choices: dict[str, bool]) -> None:
    params = s7.init(64, 16, variant="full", **choices)
    u = draw(3, 200, 64, seed=3)
    wide = {k: v.double() for k, v in params.items()}
    h0 = draw(3, 16, seed=4)
    more = {"lengths": torch.tensor([200, 3, 77]), "reset": draw(3, 200, seed=5) > 2}
    h0 = None if choices else h0
    y, h = s7.scan(params, u, h0, variant="full", **choices, **more)
    want = s7.scan(
        wide, u.double(), None if h0 is None else h0.double(), variant="full", **choices, **more
    )
    assert error(y, want[0]) < 1e-5
    assert error(h, want[1]) < 1e-5
    low, _ = s7.scan(params, u.bfloat16(), h0, variant="full", **choices, **more)
    assert low.dtype == torch.bfloat16
    assert error(low, want[0]) < 3e-2


def test_capture_into_a_graph() -> None:
    params = {k: v.requires_grad_() for k, v in s7.init(64, 16, variant="full").items()}
    u = draw(4, 100, 64, seed=3)

    def run() -> list[Tensor]:
        y, _ = s7.scan(params, u, variant="full")
        return [y, *torch.autograd.grad(y.square().sum(), list(params.values()))]

    want = [t.detach().clone() for t in run()]  # no graph of the default stream is kept
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    assert all(map(torch.equal, got, want))


def test_compile() -> None:
    params = {k: v.requires_grad_() for k, v in s7.init(32, 8, variant="full").items()}
    u = draw(2, 50, 32, seed=3)

    def run(u: Tensor) -> Tensor:
        return s7.scan(params, u, variant="full")[0]

    torch.set_default_device(None)  # PyTorch 2.11 does not trace `unflatten` under one
    try:
        want = torch.autograd.grad(run(u).square().sum(), list(params.values()))
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(u)
        got = torch.autograd.grad(got.square().sum(), list(params.values()))
    finally:
        torch.set_default_device("cuda")
    for a, b in zip(got, want, strict=True):
        assert error(a, b.double()) < 1e-5
