"""Layers in CUDA graphs: captured, they give what they give eagerly, gradients included.

Run with ``pytest -m cuda tests/test_cuda_graphs.py`` on a machine that has a GPU and CuPy.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

from lrnnx_nn import LAYERS

pytestmark = pytest.mark.cuda
H, N, L = 8, 8, 100


def made(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return LAYERS[name](H, N).cuda()


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(2, L, H, generator=torch.Generator().manual_seed(seed)).cuda()


# torch warns of cuBLAS in a new thread, and of the stream on which gradients accumulate.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_training_in_a_graph_is_training(name: str) -> None:
    eager = made(name)
    graphed = copy.deepcopy(eager)
    sample = inputs(0).requires_grad_()
    graphed = torch.cuda.make_graphed_callables(graphed, (sample,))
    for seed in (1, 2):
        u = inputs(seed)
        found = []
        for layer in (eager, graphed):
            layer.zero_grad()
            x = u.clone().requires_grad_()
            y = layer(x)
            y.sin().sum().backward()
            found.append([y, x.grad, *(p.grad for p in layer.parameters())])
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_decoding_in_a_graph_is_decoding(name: str) -> None:
    layer, u = made(name).eval(), inputs(3)
    with torch.no_grad():
        want = layer(u)
        _, state = layer.prefill(u[:, :10])
        u_t = u[:, 10].clone()
        layer.step(u_t, state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y_t, new = layer.step(u_t, state)
            pairs = zip(pytree.tree_leaves(state), pytree.tree_leaves(new), strict=True)
            for old, fresh in pairs:
                old.copy_(fresh)
        for t in range(10, 20):
            u_t.copy_(u[:, t])
            graph.replay()
            torch.testing.assert_close(y_t, want[:, t], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.compile
def test_reduce_overhead_is_eager() -> None:
    pytest.importorskip("triton")
    layer, u = made("rglru"), inputs(4)
    compiled = torch.compile(layer, mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(compiled(u), layer(u), rtol=1e-4, atol=1e-5)
