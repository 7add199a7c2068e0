# SPDX-License-Identifier: MIT
"""The CUDA kernels of add_norm, and the models that use them, against plain PyTorch on a GPU.

Run with ``pytest -m cuda tests/test_cuda_add_norm.py`` on a machine that has a GPU and CuPy.
"""

from __future__ import annotations

from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
import transform_table as table
from test_add_norm import EPS, fused, inputs, reference
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lrnnx_core.backends import cuda, cuda_add_norm, norm_formulas
from lrnnx_nn import LRNNLMHeadModel, residual_stream

pytestmark = pytest.mark.cuda

WIDE, NARROW, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
KINDS = (  # stream, branch, normalized, weight
    (WIDE, WIDE, WIDE, WIDE), (WIDE, NARROW, NARROW, NARROW), (WIDE, NARROW, NARROW, WIDE),
    (NARROW, NARROW, NARROW, NARROW), (NARROW, WIDE, WIDE, WIDE), (HALF, HALF, HALF, HALF),
    (DOUBLE, DOUBLE, DOUBLE, DOUBLE), (DOUBLE, WIDE, WIDE, WIDE),
)  # fmt: skip
Inputs = tuple[Tensor | None, ...]


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def problem(
    shape: tuple[int, ...],
    kinds: tuple[torch.dtype, ...],
    affine: int,
    groups: tuple[int, ...] = (),
) -> Inputs:
    """Return x, branch, weight, bias, and gradients of the sum and of what is normalized."""
    stream, branch, out, weight = kinds
    own = [1 + 0.3 * draw(*groups, shape[-1], dtype=WIDE, seed=i) for i in range(affine)]
    own = [*(t.to(weight) for t in own), None, None][:2]
    kinds = (stream, branch, stream, out)
    x, y, g_sum, g_out = (draw(*shape, dtype=d, seed=5 + i) for i, d in enumerate(kinds))
    return x, y, *own, g_sum, g_out


def run(
    backend: ModuleType, given: Inputs, layer: bool, dtype: torch.dtype, summed: bool = True
) -> tuple[Tensor, ...]:
    """Return everything that both leaves give."""
    x, branch, weight, bias, g_sum, g_out = given
    total, y, stats = backend.add_norm(x, branch, weight, bias, EPS, layer, dtype)
    assert x is not None
    kept = x if branch is None else total
    kind = x.dtype if branch is None else branch.dtype
    gradients = backend.add_norm_backward(
        g_sum if summed else None, g_out, kept, stats, weight, bias, layer, kind
    )
    return total, y, stats, *gradients


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach(), expected.detach()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("layer", [False, True])
def test_error_is_at_most_twice_that_of_pytorch(
    layer: bool, kinds: tuple[torch.dtype, ...]
) -> None:
    """Gradients three times; the error of a whole array, against float64."""
    sizes = ((3, 1), (7, 2), (96, 0), (129, 1), (768, 2), (1024, 1), (2560, 2), (4100, 1))
    for (width, affine), with_branch in product(sizes, (True, False)):
        x, branch, *rest = problem((3, 11, width), kinds, affine)
        given = (x, branch if with_branch else None, *rest)
        wide = tuple(t if t is None else t.double() for t in given)
        want = run(norm_formulas, wide, layer, DOUBLE)
        plain, got = (run(b, given, layer, kinds[2]) for b in (norm_formulas, cuda_add_norm))
        for i, (a, p, w) in enumerate(zip(got, plain, want, strict=True)):
            assert (a.dtype, a.shape) == (p.dtype, p.shape), i
            if a.numel():
                exact = w if w.numel() else want[3]  # in float64 the branch's gradient is dx itself
                bound = (2 if i < 3 else 3) * error(p, exact) + 2 * torch.finfo(a.dtype).eps
                assert error(a, exact) <= bound, (i, width, with_branch)


def test_the_kernels_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    launch = cuda.Kernel.launch

    def recorded(self: cuda.Kernel, *rest: Any) -> None:
        launched.append(self.entry)
        launch(self, *rest)

    monkeypatch.setattr(cuda.Kernel, "launch", recorded)
    run(cuda_add_norm, problem((2, 64), KINDS[1], 1), False, NARROW)
    assert launched == ["add_norm", "add_norm_backward", "sum_partials"]


def test_results_are_the_same_bits_every_time_in_any_batch_and_alignment() -> None:
    for kinds, layer in product((KINDS[0], KINDS[1], KINDS[3]), (False, True)):
        x, branch, weight, bias, *grads = problem((700, 1024), kinds, 2)
        given = (x, branch, weight, bias if layer else None, *grads)
        first = run(cuda_add_norm, given, layer, kinds[2])
        again = run(cuda_add_norm, given, layer, kinds[2])
        assert [torch.equal(a, b) for a, b in zip(first, again, strict=True)] == [True] * 7
        rows = tuple(t[40:41] if t is not None and t.ndim == 2 else t for t in given)
        alone = run(cuda_add_norm, rows, layer, kinds[2])
        for i in range(5):
            assert torch.equal(alone[i], first[i][40:41] if first[i].numel() else first[i]), i

        def shifted(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            room = torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")
            return room[1:].view(t.shape).copy_(t)

        moved = run(cuda_add_norm, tuple(map(shifted, given)), layer, kinds[2])
        assert [torch.equal(a, b) for a, b in zip(first, moved, strict=True)] == [True] * 7


def test_groups_of_parameters_no_rows_and_long_rows() -> None:
    for shape, groups in (
        ((3, 50, 96), (3,)),
        ((2, 2, 5, 33), (2, 2)),
        ((0, 8), ()),
        ((2, 40000), ()),
    ):
        given = problem(shape, KINDS[0], 2, groups)
        got, want = (run(b, given, True, WIDE) for b in (cuda_add_norm, norm_formulas))
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


def test_strided_inputs_and_no_gradient_of_the_sum() -> None:
    x, branch, *rest = problem((6, 5, 64), KINDS[1], 1)
    assert x is not None
    assert branch is not None
    strided = (x.mT.contiguous().mT, torch.cat([branch, branch], -1)[..., :64], *rest)
    for summed in (True, False):
        got = run(cuda_add_norm, strided, False, NARROW, summed)
        want = run(cuda_add_norm, (x, branch, *rest), False, NARROW, summed)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", table.ESSENTIAL)
def test_transforms(name: str) -> None:
    given = tuple(t.cuda() for t in inputs(True))
    transform = table.TRANSFORMS[name]
    with torch.device("cuda"):
        table.assert_equal(transform(fused, given), transform(reference, given))


def test_a_tensor_on_another_device_is_refused() -> None:
    x, branch, weight, *_ = problem((2, 8), KINDS[0], 1)
    assert weight is not None
    with pytest.raises(ValueError, match="add_norm: tensors on cuda:0 and on cpu"):
        cuda_add_norm.add_norm(x, branch, weight.cpu(), None, EPS, False, WIDE)


@pytest.mark.parametrize("dtype", [WIDE, NARROW], ids=str)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_language_model_is_the_same_without_them(
    norm: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = LRNNLMHeadModel(
        64, 16, 3, 100, ("mamba",), d_intermediate=96, norm=norm, device="cuda", dtype=dtype
    )
    ids = torch.randint(0, 100, (2, 40), device="cuda")

    def everything() -> list[Tensor]:
        y = model(ids)
        grads = torch.autograd.grad(y.float().square().mean(), list(model.parameters()))
        with torch.no_grad():
            y_1, state = model.prefill(ids[:, :30])
            y_2, state = model.step(ids[:, 30], state)
        return [y, y_1, y_2, *tree_leaves(state), *grads]

    got = everything()
    monkeypatch.setattr(residual_stream, "_on_gpu", lambda x: False)
    tolerance = 1e-4 if dtype == WIDE else 5e-2
    for a, b in zip(got, everything(), strict=True):
        assert error(a, b.double()) <= tolerance


def test_one_graph_of_a_stack() -> None:
    model = LRNNLMHeadModel(64, 16, 2, 100, ("mamba",), device="cuda").eval()
    ids = torch.randint(0, 100, (2, 40), device="cuda")
    with torch.no_grad():
        want = model(ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(ids)
        graph.replay()
    assert torch.equal(got, want)
