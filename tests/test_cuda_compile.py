# SPDX-License-Identifier: MIT
"""torch.compile of every layer on a GPU, whole graphs: what eager gives, in training and steps.

Run with ``pytest -m cuda tests/test_cuda_compile.py`` on a machine with a GPU, CuPy and Triton.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrnnx_nn import LAYERS, Classifier, ClassifierConfig, LRNNLMHeadModel, UNet, UNetConfig

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
H, N, L = 32, 16, 300
MODES = pytest.mark.parametrize("mode", ["default", "reduce-overhead"])


def made(name: str) -> torch.nn.Module:
    pytest.importorskip("triton")
    torch.manual_seed(0)
    return LAYERS[name](H, N).cuda()


def inputs(seed: int) -> Tensor:
    return torch.randn(2, L, H, generator=torch.Generator().manual_seed(seed)).cuda()


def assert_near(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        scale = float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance * max(scale, 1.0))


@MODES
@pytest.mark.parametrize("name", LAYERS)
def test_training_compiled_is_training(name: str, mode: str) -> None:
    eager = made(name)
    whole = copy.deepcopy(eager)
    compiled = torch.compile(whole, fullgraph=True, mode=mode)
    for seed in (1, 2, 3):  # reduce-overhead warms up, records, replays
        found = []
        torch.compiler.cudagraph_mark_step_begin()
        for call, layer in ((eager, eager), (compiled, whole)):
            layer.zero_grad()
            x = inputs(seed).requires_grad_()
            y = call(x)
            y.sin().sum().backward()
            grads = [p.grad for p in layer.parameters()]
            found.append(pytree.tree_map(lambda t: t.detach().clone(), [y, x.grad, *grads]))
        assert_near(found[1], found[0])


@MODES
@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_and_steps_compiled_are_eager(name: str, mode: str) -> None:
    layer = made(name).eval()
    forward = torch.compile(layer, fullgraph=True, mode=mode)
    step = torch.compile(layer.step, fullgraph=True, mode=mode)
    with torch.no_grad():
        for seed in (1, 2, 3):
            torch.compiler.cudagraph_mark_step_begin()
            u = inputs(seed)
            assert_near(forward(u).clone(), layer(u))
        _, state = layer.prefill(u[:, :10])
        mine = theirs = state
        for t in range(10, 14):
            torch.compiler.cudagraph_mark_step_begin()
            got = pytree.tree_map(torch.clone, step(u[:, t], theirs))
            want = layer.step(u[:, t], mine)
            assert_near(got, want)
            mine, theirs = want[1], got[1]


NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "language model, Mamba": lambda: LRNNLMHeadModel(H, N, 2, 50, ["mamba"]),
    "language model, Griffin": lambda: LRNNLMHeadModel(
        H, N, 3, 50, ["rglru", "rglru", "attn"], mixer_kwargs={"attn": {"n_heads": 2}}
    ),
    "classifier": lambda: Classifier(
        ClassifierConfig(
            d_input=H, n_classes=5, layer="s4d", d_model=H, d_state=N, n_layer=2, dropout=0.0
        )
    ),
    "U-Net": lambda: UNet(UNetConfig(d_input=H, channels=(12, 8), factors=(3, 2), d_state=N)),
}


@MODES
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks_compiled_train_as_they_do(name: str, mode: str) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(0)
    eager = NETWORKS[name]().cuda()
    whole = copy.deepcopy(eager)
    compiled = torch.compile(whole, fullgraph=True, mode=mode)
    for seed in (1, 2, 3):
        x = inputs(seed)
        if name.startswith("language"):
            x = (10 * x[..., 0]).abs().long().clamp(max=49)
        found = []
        torch.compiler.cudagraph_mark_step_begin()
        for call, model in ((eager, eager), (compiled, whole)):
            model.zero_grad()
            y = pytree.tree_leaves(call(x))[0]
            y.sin().sum().backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            found.append([t.detach().clone() for t in (y, *grads)])
        assert_near(found[1], found[0], 1e-4)
