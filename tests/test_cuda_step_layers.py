# SPDX-License-Identifier: MIT
"""Every layer's step on CUDA: in a graph as in a loop, and with kernels as with their formulas.

Run with ``pytest -m cuda tests/test_cuda_step_layers.py`` on a machine with a GPU and CuPy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import (
    Case,
    assert_agree,
    error,
    every_causal_case,
    every_timed_causal_case,
    first_case,
    gaps,
    normal,
    widen,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lrnnx_core.backends import cuda
from lrnnx_nn.generation import engine
from lrnnx_nn.layers import LAYERS

pytestmark = pytest.mark.cuda


def layer_of(case: Case, width: int, dtype: torch.dtype) -> Any:
    d_state = max(8, 2 * case.choices.get("blocks", 1))
    generator = torch.Generator().manual_seed(0)
    layer = LAYERS[case.entry.name](width, d_state, generator=generator, **case.choices)
    return layer.to("cuda").to(dtype).eval()


def begin(layer: Any, width: int, dtype: torch.dtype, batch: int) -> tuple[Tensor, Any, Tensor]:
    """Return an input, a zero state, and an output."""
    u, state = normal(batch, width, dtype=dtype).cuda(), layer.init_state((batch,))
    return u, state, layer.step(u, state)[0]


def advance(layer: Any, elapsed: Tensor | None = None) -> Any:
    def step(carry: Any) -> Any:
        u, state, _ = carry
        options = {} if elapsed is None else {"integration_timestep": elapsed}
        y, new = layer.step(u, state, **options)
        return torch.roll(u, 1, -1), new, y

    return step


def graph_and_loop(layer: Any, step: Any, batch: int) -> None:
    carry = begin(layer, 3, torch.float32, batch)
    want = engine.repeat(step, carry, 12, lambda c: False, engine="loop")
    got = engine.repeat(step, carry, 12, lambda c: False, engine="graph", model=layer, key=batch)
    engine.release_graphs(layer)
    assert_agree(tuple(tree_leaves(got)), tuple(tree_leaves(want)), 1e-4)


@every_causal_case
@pytest.mark.parametrize("batch", [1, 5])
def test_a_layer_in_a_graph_is_the_loop(case: Case, batch: int) -> None:
    with torch.no_grad():
        layer = layer_of(case, 3, torch.float32)
        graph_and_loop(layer, advance(layer), batch)


@every_timed_causal_case
def test_at_elapsed_times_too(case: Case) -> None:
    with torch.no_grad():
        layer = layer_of(case, 3, torch.float32)
        elapsed = gaps(5, dtype=torch.float32).cuda()
        graph_and_loop(layer, advance(layer, elapsed), 5)


@first_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 70])
def test_a_wide_layer_steps_like_its_formulas(
    case: Case, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        layer = layer_of(case, 64, dtype)
        wide = layer_of(case, 64, dtype).double()
        got = want = carry = begin(layer, 64, dtype, batch)
        exact = tree_map(widen, carry)
        for _ in range(6):
            got, exact = advance(layer)(got), advance(wide)(exact)
        monkeypatch.setattr(cuda, "ready", lambda: False)
        for _ in range(6):
            want = advance(layer)(want)
    slack = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for g, p, w in zip(*(tree_leaves(c) for c in (got, want, exact)), strict=True):
        assert (g.shape, g.dtype) == (p.shape, p.dtype)
        assert error(g, w) <= 2 * error(p, w) + slack


@first_case
def test_what_steps_keep_goes_with_the_parameters(case: Case) -> None:
    with torch.no_grad():
        layer = layer_of(case, 8, torch.float32)
        elapsed = gaps(2, dtype=torch.float32).cuda() + 0.5 if case.timed else None
        for factor in (1.0, 1.1, 0.9):
            for value in layer.parameters():
                value.mul_(factor)
            carry = begin(layer, 8, torch.float32, 2)
            kept = advance(layer, elapsed)(advance(layer, elapsed)(carry))
            fresh = layer_of(case, 8, torch.float32)
            fresh.load_state_dict(layer.state_dict())
            again = advance(fresh, elapsed)(advance(fresh, elapsed)(carry))
            assert_agree(tuple(tree_leaves(kept)), tuple(tree_leaves(again)), 1e-6)
