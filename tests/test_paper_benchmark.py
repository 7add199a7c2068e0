# SPDX-License-Identifier: MIT
"""The published sweeps: every way computes the same, and the runner goes through its cells."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.paper import __main__ as paper
from benchmarks.paper import page
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
    jax[0]["mean_ms"] = 1e-9
    report["cells"] += jax
    report["skipped"] = {"LRU, training, graph": "no GPU"}
    page.write(report, tmp_path)
    assert (tmp_path / "paper.png").stat().st_size > 5000
    text = (tmp_path / "paper.md").read_text()
    assert "| LRU, training | 1 of 2 |" in text
    assert "- LRU training, length 4, width 8, batch 2:" in text
    assert "- LRU, training, graph: no GPU" in text
    assert text.count("±") == 2 * len(jax)
    assert "ahead of jax in 3 of 4 cells" in capsys.readouterr().out


def test_a_second_run_keeps_the_cells_of_the_first(tmp_path: Path) -> None:
    about = {"device": "x", "torch": "2", "d_state": 16, "protocol": {"runs": 90}}
    file = tmp_path / "paper.json"
    assert paper.kept(file, about) == []
    file.write_text(json.dumps({**about, "cells": [{"model": "S5"}]}))
    assert paper.kept(file, about) == [{"model": "S5"}]
    assert paper.kept(file, {**about, "device": "y"}) == []


def test_figures_of_another_device_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "paper.json").write_text(json.dumps({"device": "x", "cells": []}))
    monkeypatch.setattr("sys.argv", ["paper", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        paper.main()
    assert "holds figures of x, name another --folder" in capsys.readouterr().err
    (tmp_path / "paper.json").write_text(json.dumps({"device": paper.device_name()}))
    assert paper.measured_elsewhere(tmp_path / "paper.json") is None
