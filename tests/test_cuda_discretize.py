# SPDX-License-Identifier: MIT
"""The discretization's kernels on CUDA: the operator's test suite on a GPU, and more.

Run with ``pytest -m cuda tests/test_cuda_discretize.py`` on a machine with a GPU and CuPy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_discretize_diagonal import *  # noqa: F403  # every test of the operator, collected again
from test_discretize_diagonal import SCHEMES, Case, gradients
from torch import Tensor

from lrnnx_core.backends import library
from lrnnx_core.models import s4d

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]
LAYERS = {
    "layer": Case("pair", (64, 32), (64, 1), (64, 32)),
    "layer in time": Case("pair", (16, 32), (300, 16, 1), (16, 32)),
    "real layer": Case("real", (64, 100), (64, 1), (64, 100)),
}


def errors(got: Any, exact: Any) -> list[float]:
    pairs = zip(got, exact, strict=True)
    return [float((g.double() - e).norm() / e.norm().clamp(min=1e-30)) for g, e in pairs]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", LAYERS)
def test_float32_errs_no_more_than_plain_pytorch(
    name: str, scheme: str, entries_launched: list[str]
) -> None:
    case = LAYERS[name]
    single = case.tensors(torch.float32)
    exact = [t.double() for t in single]
    want = case.expected(scheme, *exact), gradients(lambda *x: case.expected(scheme, *x), exact)

    def both(f: Any) -> tuple[Any, Any]:
        return f(scheme, *single), gradients(lambda *x: f(scheme, *x), single)

    plain = both(case.expected)
    entries_launched.clear()
    got = both(case.run)
    assert {"discretize", "discretize_backward"} <= set(entries_launched)
    for place, factor in ((0, 2), (1, 3)):
        for mine, theirs in zip(
            errors(got[place], want[place]), errors(plain[place], want[place]), strict=True
        ):
            assert mine <= factor * theirs + 2e-7, (place, mine, theirs)


def test_results_are_the_same_bits_from_run_to_run_and_alone() -> None:
    for case in LAYERS.values():
        single = case.tensors(torch.float32)
        runs = [gradients(lambda *x: case.run("zoh", *x), single) for _ in range(2)]  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    case = LAYERS["layer"]
    whole = case.run("zoh", *case.tensors(torch.float32))
    alone = case.run("zoh", *(t[3:4] for t in case.tensors(torch.float32)))
    assert all(torch.equal(a[3:4], b) for a, b in zip(whole, alone, strict=True))


def test_any_strides_and_no_elements() -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A = torch.complex(-draw(6, 4).abs(), draw(6, 4)).mT.conj()[::2]  # (2, 6), conjugated
    dt = draw(6).abs().expand(3, 2, 5, 2, 6)[:, :, 1:4]
    B = torch.complex(draw(2, 1), draw(2, 1)).expand(2, 6)
    got = library.kernel("discretize_diagonal", "cuda")
    assert got is not None
    lead = (1, 1, 1)
    arguments = (A.view(lead + A.shape), None, dt, None, B.view(lead + B.shape), None, "zoh", 0.0)
    want = library.default("discretize_diagonal")(*arguments)
    for g, w in zip(got(*arguments), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)
    grads = tuple(torch.randn_like(w).mT.clone().mT for w in want)
    backward = library.kernel("discretize_diagonal_backward", "cuda")
    assert backward is not None
    for g, w in zip(
        backward(*grads, *arguments),
        library.default("discretize_diagonal_backward")(*grads, *arguments),
        strict=True,
    ):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)
    for scheme in SCHEMES:
        empty = Case("pair", (0, 3), (0, 1), (0, 3))
        assert all(r.numel() == 0 for r in empty.run(scheme, *empty.tensors()))


def test_a_mix_of_devices_or_dtypes_is_refused() -> None:
    A, dt = torch.rand(3, dtype=torch.complex64), torch.rand(3)
    leaf = torch.ops.lrnnx_core.discretize_diagonal.default
    with pytest.raises((ValueError, RuntimeError)):
        leaf(A, None, dt.cpu(), None, None, None, "zoh", 0.0)
    with pytest.raises(ValueError, match="float64"):
        leaf(A, None, dt.double(), None, None, None, "zoh", 0.0)


def test_a_layer_launches_few_kernels() -> None:
    params = s4d.init(64, 64)
    u = torch.randn(2, 300, 64)
    inputs = [t.requires_grad_() for t in (u, *params.values())]

    def forward() -> Tensor:
        with torch.no_grad():
            return s4d.scan(params, u, mode="scan")[0]

    def both() -> Any:
        return torch.autograd.grad(s4d.scan(params, u, mode="scan")[0].sum(), inputs)

    for f, most in ((forward, 10), (both, 40)):
        f()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
        ) as profile:
            f()
            torch.cuda.synchronize()
        device = torch.autograd.DeviceType.CUDA
        assert sum(e.device_type == device for e in profile.events()) <= most


def test_captured_in_a_graph_it_follows_its_inputs() -> None:
    case = LAYERS["layer"]
    tensors = case.tensors(torch.float32)
    case.run("zoh", *tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.run("zoh", *tensors)
    tensors[2].mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, case.run("zoh", *tensors), strict=True))
