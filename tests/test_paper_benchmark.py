# SPDX-License-Identifier: MIT
"""The published sweeps: every way computes the same, and the runner goes through its cells."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.paper import __main__ as paper
from benchmarks.paper.measure import MODELS, Protocol, Size, inference, layer_of, milliseconds

SIZE = Size(7, 8, 3)


@pytest.mark.parametrize("model", MODELS)
def test_jax_computes_what_the_layer_computes(model: str) -> None:
    pytest.importorskip("jax")
    from benchmarks.paper import jax_layers

    layer = layer_of(model, SIZE, "cpu").eval()
    u = torch.randn(SIZE.batch, SIZE.length, SIZE.width, requires_grad=True)
    want = layer(u)
    steps = inference(model, "eager", SIZE, "cpu")
    torch.manual_seed(0)
    layer_of(model, SIZE, "cpu")
    assert steps().shape == (SIZE.length, SIZE.batch, SIZE.width)
    theirs = jax_layers.inference(model, layer, u.detach().transpose(0, 1).contiguous())()
    torch.testing.assert_close(
        torch.tensor(theirs.tolist()).transpose(0, 1), want.detach(), rtol=1e-4, atol=1e-5
    )
    _, grad = jax_layers.training(model, layer, u)()
    (mine,) = torch.autograd.grad(want.sum(), u)
    torch.testing.assert_close(torch.tensor(grad.tolist()), mine, rtol=1e-4, atol=1e-5)


def test_a_cell_says_how_often_it_ran() -> None:
    calls: list[int] = []
    found = milliseconds(lambda: calls.append(0), Protocol(2, 3, 4, 10.0), "cpu")
    assert found["runs"] == 3
    assert len(calls) == 2 + 2 + 3 * 4
    assert found["mean_ms"] >= 0


def test_the_runner_measures_every_cell_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    options = argparse.Namespace(
        models=["LRU"], ways=["eager"], kinds=["training", "inference"], sweeps=list(paper.SWEEPS),
        tiny=True, seconds=0.1,
    )  # fmt: skip
    report: dict[str, Any] = paper.sweep(options)
    assert len(report["cells"]) == 2 * len(paper.TINY["length"])
    assert not report["skipped"]
    report["base"] = {"length": 4, "width": 8, "batch": 2}
    jax = [{**c, "way": "jax", "mean_ms": 2 * c["mean_ms"]} for c in report["cells"]]
    jax[0]["mean_ms"] = 0.0
    report["cells"] += jax
    paper.draw(report, tmp_path / "paper.png")
    assert (tmp_path / "paper.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert "behind jax: LRU training 4 8 2" in said
    assert "ahead of jax in 3 of 4 cells" in said
