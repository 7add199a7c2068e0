"""The benchmark of decoding, at sizes where nothing takes long: sizes right, files whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decoding
from lrnnx_nn.generation.state import tensors

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
SMALL = ["--d-model", "8", "--n-layer", "1", "--tokens", "3", "--repeats", "1", "--threads", "1"]


def test_filled_caches_are_built_as_those_that_were_read() -> None:
    options = decoding.parser().parse_args(SMALL)
    for name, context in ((decoding.WINDOWED, 1500), ("attn", 20), (decoding.WINDOWED, 30)):
        model = decoding.model_of(name, options)
        ids = torch.randint(0, decoding.VOCABULARY, (1, context))
        with torch.no_grad():
            _, read = model.prefill(ids, model.init_state((1,), capacity=context + 5))
            empty = model.init_state((1,), capacity=context + 5)
        made = decoding.filled(empty, context)._replace(position=read.position)
        for a, b in zip(tensors(made), tensors(read), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if a.dtype == torch.int64:
                assert torch.equal(a, b)


@pytest.mark.parametrize("run", [("s5", "rglru", "attn"), (decoding.WINDOWED,)], ids=str)
def test_a_run_leaves_figures_and_a_picture(run: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--folder", str(tmp_path), "--contexts", "30", "10", *SMALL]
    decoding.main([*arguments, "--models", *run])
    report: dict[str, Any] = json.loads((tmp_path / "decoding.json").read_text())["cpu"]
    assert tuple(report["models"]) == run
    for name, rows in report["models"].items():
        assert [row["context"] for row in rows] == [10, 30]
        slots = (2 * 8 * 4 + 8) if name.startswith("attn") else 0  # keys, values, position
        assert rows[1]["bytes"] - rows[0]["bytes"] == 20 * slots
    assert (tmp_path / "decoding.png").read_bytes()[1:4] == b"PNG"
    decoding.main(["--folder", str(tmp_path), "--draw"])
    assert json.loads((tmp_path / "decoding.json").read_text())["cpu"] == report


def test_the_published_figures_are_those_of_every_model() -> None:
    runs = json.loads((DOCS / "decoding.json").read_text())
    assert (DOCS / "decoding.png").is_file()
    for run in runs.values():
        assert tuple(run["models"]) == decoding.NAMES
        for name, rows in run["models"].items():
            assert [row["context"] for row in rows] == [100, 1000, 10_000, 100_000]
            growth = rows[-1]["bytes"] / rows[0]["bytes"]
            assert growth == 1 if not name.startswith("attn") else growth > 9
