"""A Mamba block between its projections at once, on a GPU.

Run with ``pytest -m cuda tests/test_cuda_mamba_inner.py`` on a machine that has a GPU and CuPy.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from op_cases import draw
from test_mamba_inner import (  # noqa: F401  # collected again here
    test_gradients_of_samples_and_of_an_ensemble,
    test_outputs_and_two_gradients_are_those_of_the_parts,
    test_the_leaf,
)
from torch import Tensor

from lrnnx_core.backends import cuda, cuda_selective_scan
from lrnnx_core.models import _selective
from lrnnx_nn import STREAM, Mamba

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]


def gradients(layer: Any, u: Tensor, **call: Any) -> list[Tensor]:
    u = u.detach().clone().requires_grad_()
    y = layer(u, **call)
    g = draw(*y.shape, seed=9).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [u, *layer.parameters()], g)]


def error(got: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize(
    ("kind", "dtype", "width"),
    [
        (Mamba, torch.float32, 48),
        (Mamba, torch.bfloat16, 48),
        (Mamba, torch.bfloat16, 128),  # its convolution makes the product with x_proj
        (STREAM, torch.bfloat16, 48),
        (STREAM, torch.bfloat16, 128),
    ],
    ids=str,
)
def test_no_less_exact_than_in_parts(
    dtype: torch.dtype, kind: Any, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = kind(width, 16).to(dtype)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    exact = copy.deepcopy(layer).to(wide)
    for length in (1, 65, 500):
        u = draw(3, length, width, seed=1).to(dtype)
        call = {}
        if kind is STREAM:
            call["integration_timesteps"] = draw(3, length, seed=2).exp().float()
        monkeypatch.undo()
        got, again = gradients(layer, u, **call), gradients(layer, u, **call)
        assert [torch.equal(a, b) for a, b in zip(got, again, strict=True)] == [True] * len(got)
        monkeypatch.setattr(_selective, "_plain", lambda *_: False)
        parts, want = gradients(layer, u, **call), gradients(exact, u.to(wide), **call)
        for a, p, w in zip(got, parts, want, strict=True):
            assert error(a, w) <= 1.5 * error(p, w) + 2 * torch.finfo(a.dtype).eps


@pytest.mark.parametrize("states", [16, 80], ids=["one launch", "several"])
@pytest.mark.parametrize("length", [1, 70])
def test_the_scan_writes_its_gradients_where_it_is_asked_to(length: int, states: int) -> None:
    width = 24
    xz = draw(2, length, 2 * width, seed=1).to(torch.bfloat16)
    x, z = xz.chunk(2, -1)
    dt, gy = (draw(2, length, width, seed=s).to(torch.bfloat16) for s in (2, 3))
    B, C = (draw(2, length, 1, states, seed=s).to(torch.bfloat16) for s in (4, 5))
    A, D, bias = -draw(width, states, seed=6).exp().float(), *draw(2, width, seed=7).float()
    arguments = (x, dt, A, B, C, D, z, bias, None, None, None, None, True, False, "mamba")
    _, last, kept = cuda_selective_scan.selective_scan(*arguments, True)
    given = (kept, gy, torch.zeros_like(last), *arguments)
    want = cuda_selective_scan.selective_scan_backward(*given)
    wide = torch.zeros(2, length, 3 * width, dtype=torch.bfloat16)
    of_dt, of_z, rest = wide.chunk(3, -1)
    got = cuda_selective_scan.selective_scan_backward(*given, into=(of_dt, of_z))
    for a, b in zip(got, want, strict=True):
        assert b is a is None or torch.equal(a, b)
    assert got[6].data_ptr() == of_z.data_ptr()
    assert not rest.any()


def test_the_convolution_makes_the_product_with_x_proj(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[cuda.Kernel] = []
    launch = cuda.Kernel.launch
    monkeypatch.setattr(
        cuda.Kernel, "launch", lambda self, *r: (launched.append(self), launch(self, *r))
    )
    layer = Mamba(128, 16).to(torch.bfloat16)
    gradients(layer, draw(2, 70, 128, seed=1).to(torch.bfloat16))
    (backward,) = (k for k in launched if k.entry == "causal_conv1d_backward")
    assert "-DINNER=64" in backward.options  # 8 + 2 * 16 in whole chunks of 32


def test_captured_in_a_graph_it_is_the_same() -> None:
    torch.manual_seed(0)
    layer = Mamba(32, 16).to(torch.bfloat16)
    u = draw(2, 100, 32, seed=1).to(torch.bfloat16)
    want = gradients(layer, u)
    static = u.clone().requires_grad_()
    g = draw(2, 100, 32, seed=9).to(torch.bfloat16)

    def run() -> tuple[Tensor, ...]:
        y = layer(static)
        return y.detach(), *torch.autograd.grad(y, [static, *layer.parameters()], g)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    assert all(map(torch.equal, got, want))


def test_a_training_step_takes_no_more_memory_than_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = Mamba(512, 16).to(torch.bfloat16)
    u = draw(4, 2048, 512, seed=1).to(torch.bfloat16)

    def peak() -> int:
        gradients(layer, u)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(layer, u)
        return torch.cuda.max_memory_allocated() - before

    at_once = peak()
    monkeypatch.setattr(_selective, "_plain", lambda *_: False)
    assert at_once <= 1.03 * peak()  # partial sums of the taps stand beside all else
