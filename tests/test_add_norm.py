# SPDX-License-Identifier: MIT
"""The residual sum with its norm: one fused operator, which is the formula under any transform."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import transform_table as table
from torch import Tensor
from torch.nn import functional as F

from lrnnx_core.backends import norm_formulas
from lrnnx_core.ops.add_norm import _add_norm, add_norm

EPS = 1e-5
same = torch.testing.assert_close
Formula = Callable[..., tuple[Tensor, ...]]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(layer: bool, branch: bool = True) -> tuple[Tensor, ...]:
    """Return x, the branch, weight, and the bias of a LayerNorm."""
    sequences = [draw(2, 3, 5, seed=i) for i in range(1 + branch)]
    return (*sequences, *(1 + 0.3 * draw(5, seed=2 + i) for i in range(1 + layer)))


def reference(x: Tensor, *rest: Tensor, branch: bool = True) -> tuple[Tensor, ...]:
    total = x + rest[0] if branch else x
    weight, *bias = rest[branch:]
    mean = total.mean(-1, keepdim=True) if bias else 0
    y = (total - mean) / ((total - mean).square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return (total, y + bias[0]) if bias else (total, y)


def fused(x: Tensor, *rest: Tensor, branch: bool = True) -> tuple[Tensor, ...]:
    """Run what runs on a GPU, here over the leaf operators in plain PyTorch."""
    weight, *bias = rest[branch:]
    given = rest[0] if branch else None
    shift = bias[0] if bias else None
    total, y = _add_norm(x, given, weight, shift, EPS, shift is not None, x.dtype)
    return (total if branch else x), y


QUICK = [n for n in table.TRANSFORMS if "jacfwd(jacfwd" not in n and n != "jacfwd(hessian)"]
"""The others are derivatives of the formula itself."""


@pytest.mark.parametrize(
    ("name", "layer"), [(n, True) for n in QUICK] + [(n, False) for n in table.ESSENTIAL]
)
def test_it_is_the_formula_under_every_transform(name: str, layer: bool) -> None:
    transform = table.TRANSFORMS[name]
    table.assert_equal(transform(fused, inputs(layer)), transform(reference, inputs(layer)))


@pytest.mark.parametrize("name", ["backward", "double backward", "vmap(grad)", "jvp"])
def test_a_norm_without_a_branch(name: str) -> None:
    def run(f: Formula) -> Formula:
        return lambda *tensors: f(*tensors, branch=False)

    transform, given = table.TRANSFORMS[name], inputs(True, branch=False)
    table.assert_equal(transform(run(fused), given), transform(run(reference), given))


@pytest.mark.compile
def test_it_compiles_with_its_gradient() -> None:
    given = table.leaves(inputs(True))
    want = torch.autograd.grad(table.weigh(reference(*given)), given)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    same(torch.autograd.grad(table.weigh(compiled(*given)), given), want)


def test_one_of_two_results_is_enough() -> None:
    given = table.leaves(inputs(False))
    for i in range(2):
        got = torch.autograd.grad(fused(*given)[i].sin().sum(), given, materialize_grads=True)
        want = torch.autograd.grad(reference(*given)[i].sin().sum(), given, materialize_grads=True)
        same(got, want)


@pytest.mark.parametrize("layer", [False, True])
def test_dtypes_are_those_of_the_stream_and_of_the_reader(layer: bool) -> None:
    """The sum is rounded to the stream's dtype before it is normalized; gradients likewise."""
    kinds = (torch.float32, torch.bfloat16)
    for stream, branch, weight, out in product(kinds, repeat=4):
        x, b = (draw(4, 6, dtype=d).requires_grad_() for d in (stream, branch))
        w = draw(6, dtype=weight).requires_grad_()
        bias = draw(6, dtype=weight, seed=1).requires_grad_() if layer else None
        total, y = _add_norm(x, b, w, bias, EPS, layer, out)
        want = x + b.to(stream)
        wide, wide_w = want.float(), w.float()
        if bias is None:
            normed = F.rms_norm(wide, (6,), wide_w, EPS)
        else:
            normed = F.layer_norm(wide, (6,), wide_w, bias.float(), EPS)
        assert torch.equal(total, want)
        assert (total.dtype, y.dtype) == (stream, out)
        same(y, normed.to(out))
        leaves = [t for t in (x, b, w, bias) if t is not None]
        got = torch.autograd.grad(y.float().sin().sum() + total.float().sum(), leaves)
        exact = torch.autograd.grad(normed.sin().sum() + want.float().sum(), leaves)
        narrow = torch.bfloat16 in (stream, branch, weight, out)
        tolerance = {"rtol": 4e-2, "atol": 4e-2} if narrow else {}
        assert [g.dtype for g in got] == [t.dtype for t in leaves]
        same(got, exact, **tolerance)


def test_parameters_of_groups_and_no_parameters() -> None:
    """A mapped weight is one more leading dimension of the leaf."""
    x, weight = draw(2, 3, 5), draw(2, 5, seed=1)
    total, y, stats = norm_formulas.add_norm(x, None, weight, None, EPS, True, x.dtype)
    assert total.numel() == 0
    assert stats.shape == (2, 3, 2)
    for i in range(2):
        alone = norm_formulas.add_norm(x[i], None, weight[i], None, EPS, True, x.dtype)[1]
        same(y[i], alone)
    x.requires_grad_()
    got, want = (
        _add_norm(x, x, None, None, EPS, False, x.dtype)[1],
        F.rms_norm(2 * x, (5,), None, EPS),
    )
    same(got, want)
    same(torch.autograd.grad(got.sin().sum(), x), torch.autograd.grad(want.sin().sum(), x))


def test_without_a_branch_the_sum_is_the_stream_itself() -> None:
    x, weight = inputs(False, branch=False)
    total, y = add_norm(x, None, weight, None, EPS, layer=False, dtype=torch.float32)
    assert total is x
    same(y, F.rms_norm(x, (5,), weight, EPS).float())
