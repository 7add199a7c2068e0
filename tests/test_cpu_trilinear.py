# SPDX-License-Identifier: MIT
"""The compiled trilinear form on the CPU against its definition and the one in PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from lrnnx_core.backends import library
from lrnnx_core.backends.cpu import pool
from lrnnx_core.ops.trilinear import trilinear

pytest.importorskip("numba")
from lrnnx_core.backends.cpu import trilinear as compiled

SIZES = [(3, 4, 5), (5, 3, 4), (4, 5, 3), (1, 7, 9), (600, 3, 7), (3, 60, 70), (2, 8, 1), (2, 1, 8)]


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(
    sizes: tuple[int, int, int], *batch: int, order: tuple[int, ...] = (0, 1, 2)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return w, whose axes lie in memory in this order, and samples of all three axes."""
    w = draw(*(sizes[i] for i in order), seed=1).permute([order.index(i) for i in range(3)])
    assert w.shape == sizes
    g, p, q = (draw(*batch, n, seed=2 + i) for i, n in enumerate(sizes))
    return w, g, p, q


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_order_of_the_axes(sizes: tuple[int, int, int], order: tuple[int, ...]) -> None:
    for samples, chunk_size in itertools.product((0, 1, 5, 33), (4, 256)):
        w, g, p, q = problem(sizes, samples, order=order)
        got = compiled.trilinear(w, p, q, chunk_size)
        close(got, torch.einsum("ijk,tj,tk->ti", w, p, q))
        got = compiled.trilinear_outer(g, p, q, chunk_size)
        assert got.is_contiguous()
        close(got, torch.einsum("ti,tj,tk->ijk", g, p, q))


def test_any_strides_and_batches_of_weights() -> None:
    w, g, p, q = problem((3, 4, 5), 2, 7)
    wide = torch.stack([w, w], -1)
    for value in (wide[..., 0], w.flip(1).flip(1), w[:, :1].expand(-1, 4, -1)):
        close(
            compiled.trilinear(value, p[0], q[0], 3),
            torch.einsum("ijk,tj,tk->ti", value, p[0], q[0]),
        )
    both = torch.stack([w, 2 * w])
    want = torch.einsum("bijk,btj,btk->bti", both, p, q)
    close(compiled.trilinear(both, p, q, 3), want)
    shared = w.expand(2, -1, -1, -1)
    close(compiled.trilinear(shared, p, q, 3), torch.einsum("ijk,btj,btk->bti", w, p, q))
    views = (g.mT.contiguous().mT, p[:, :1].expand(-1, 7, -1), q.flip(-1).flip(-1))
    close(compiled.trilinear_outer(*views, 3), torch.einsum("bti,btj,btk->bijk", *views))


@pytest.mark.parametrize("sizes", [(16, 64, 64), (64, 16, 64)])
def test_errors_are_at_most_twice_those_of_pytorch(sizes: tuple[int, int, int]) -> None:
    exact = problem(sizes, 700)
    w, g, p, q = (t.float() for t in exact)
    for name, arguments in {"trilinear": (w, p, q), "trilinear_outer": (g, p, q)}.items():
        default = library.default(name)
        want = default(*(t.double() for t in arguments), 256)
        error, others = (
            (f(*arguments, 256) - want).norm() for f in (getattr(compiled, name), default)
        )
        assert error <= 2 * others + 1e-7 * want.norm()


def test_half_precision_runs_pytorch() -> None:
    w, g, p, q = (t.bfloat16() for t in problem((3, 4, 5), 9))
    assert torch.equal(compiled.trilinear(w, p, q, 4), library.default("trilinear")(w, p, q, 4))
    assert compiled.trilinear_outer(g, p, q, 4).dtype == torch.bfloat16


def test_an_autocast_region_changes_nothing() -> None:
    w, _, p, q = (t.float() for t in problem((3, 4, 5), 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            compiled.trilinear(w, p, q, 4), compiled.trilinear(w.clone(), p.clone(), q, 4)
        )
        assert compiled.trilinear(w.permute(2, 0, 1), p[:, :3], p, 4).dtype == torch.float32


def test_per_sample_gradients_are_right() -> None:
    w, _, p, q = problem((3, 4, 5), 6)

    def loss(w: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return trilinear(w, p, q).sin().sum()

    got = vmap(grad(loss, (0, 1, 2)), (None, 0, 0))(w, p, q)
    for i in range(6):
        want = grad(lambda *x: trilinear(*x, backend="reference").sin().sum(), (0, 1, 2))(
            w, p[i], q[i]
        )
        for a, b in zip(got, want, strict=True):
            close(a[i], b)


def test_results_do_not_depend_on_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    w, g, p, q = problem((16, 40, 40), 300)
    alone = compiled.trilinear(w, p, q, 256), compiled.trilinear_outer(g, p, q, 256)
    monkeypatch.setattr(pool, "workers", lambda items, nanoseconds: min(3, items))
    for _ in range(3):
        assert torch.equal(compiled.trilinear(w, p, q, 256), alone[0])
        assert torch.equal(compiled.trilinear_outer(g, p, q, 256), alone[1])
