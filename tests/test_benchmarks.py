# SPDX-License-Identifier: MIT
"""The benchmarks of the CUDA kernels, as far as they go without a GPU, and what is made of them."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import families
from benchmarks.choosing import __main__ as choosing
from benchmarks.choosing.networks import Network, mixer
from benchmarks.cuda import __main__ as runner
from benchmarks.cuda import timing

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def figures() -> Any:
    pytest.importorskip("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS.parent / "scripts"))
        yield importlib.import_module("benchmark_figures")


@pytest.fixture
def session() -> timing.Session:
    return timing.Session(quick=True, tiny=True)


@pytest.mark.parametrize("name", runner.NAMES)
def test_every_case_runs_at_a_small_size_and_is_right(
    name: str, session: timing.Session, figures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRNNX_CPU_BACKEND", "torch")  # it is not those kernels that are timed
    module: ModuleType = importlib.import_module(f"benchmarks.cuda.{name}")
    module.measure(session)
    cases = session.report["cases"]
    assert cases
    assert not session.report["skipped"]
    for case, rows in cases.items():
        assert all(math.isfinite(f) and f > 0 for f in rows["floor_ms"])
        row = rows["lrnnx-core"]
        assert row["forward"] > 0
        single = 1e-4 if "cauchy" in case else 1e-6  # lightly damped poles
        assert row["error"] < (1e-2 if "bf16" in case or "shape" in case else single)
    assert next(c for c, *_ in figures.rows(session.report)) in cases
    text = figures.table(name, json.loads(json.dumps(session.report)))
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    figures.draw(session.report, figures.FAMILIES[name])


def test_every_benchmark_has_its_place_on_the_page(figures: Any) -> None:
    assert tuple(figures.FAMILIES) == runner.NAMES


def test_the_page_shows_what_the_files_hold(figures: Any) -> None:
    page = (DOCS / "benchmarks.md").read_text()
    reports = figures.load(DOCS / "benchmarks")
    assert figures.fill(page, reports) == page, "run python scripts/benchmark_figures.py"
    for name, report in reports.items():
        assert (DOCS / "benchmarks" / f"cuda_{name}.png").is_file() == (report is not None)


def test_a_page_without_a_benchmarks_marks_is_refused(figures: Any) -> None:
    page = (DOCS / "benchmarks.md").read_text()
    with pytest.raises(ValueError, match="0 places for decode"):
        figures.fill(re.sub(r"<!-- end decode -->", "", page), {"decode": None})


def test_figures_are_written_beside_the_files(figures: Any, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    name = "cuda_linear_scan"
    source = DOCS / "benchmarks" / f"{name}.json"
    (tmp_path / "benchmarks" / f"{name}.json").write_text(source.read_text())
    (tmp_path / "benchmarks.md").write_text((DOCS / "benchmarks.md").read_text())
    figures.main(tmp_path)
    assert (tmp_path / "benchmarks" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Not measured yet" in (tmp_path / "benchmarks.md").read_text()


def test_a_peer_that_fails_is_named_and_ours_that_fails_is_an_error(
    session: timing.Session, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> timing.Row:
        raise ModuleNotFoundError("No module named 'peer'")

    session.quick = False
    session.case("a case", [1.0], lambda: {"forward": 2.0}, {"peer": absent})
    assert session.report["skipped"]["peer, a case"].endswith("No module named 'peer'")
    assert "skipped: ModuleNotFoundError" in capsys.readouterr().out
    assert session.report["cases"]["a case"] == {
        "floor_ms": [1.0], "lrnnx-core": {"forward": 2.0}
    }  # fmt: skip
    with pytest.raises(ModuleNotFoundError):
        session.case("another", [1.0], absent)


def test_a_floor_is_the_longer_of_bytes_and_exponentials(session: timing.Session) -> None:
    session.report["ceilings_TB_per_s"] = {"copy": 2.0, "add": 4.0}
    session.report["ex2_per_ns"] = 1000.0
    assert session.floor_ms(4e9) == pytest.approx(1.0)
    assert session.floor_ms(4e9, 5e9) == pytest.approx(5.0)


def test_tiny_runs_write_nothing_and_unknown_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, "--folder", str(tmp_path)])
        return runner.main()

    assert run("conv1d", "--tiny", "--quick") == 0
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(timing, "run", lambda *_: {"cases": {}})
        patch.setattr(timing, "ROOT", tmp_path)
        patch.setattr(sys, "argv", ["benchmarks", "conv1d", "--quick"])
        assert runner.main() == 0
        assert not list(tmp_path.iterdir())  # times of others are not lost
        patch.setattr(sys, "argv", ["benchmarks", "conv1d"])
        assert runner.main() == 0
        assert (tmp_path / "docs" / "benchmarks" / "cuda_conv1d.json").exists()
    shutil.rmtree(tmp_path / "docs")
    with pytest.raises(SystemExit):
        run("no_such")
    assert "no benchmark 'no_such'" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.cuda.conv1d.measure", lambda session: 1 / 0)
        assert run("conv1d", "--tiny") == 1
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a CUDA device and CuPy: pip install"):
            run("conv1d")


def test_the_comparisons_on_the_guides_pages_are_those_of_their_files() -> None:
    record = json.loads((DOCS / "benchmarks" / "choosing.json").read_text())
    assert choosing.table(record) in (DOCS / "choosing.md").read_text()
    runs = {(r["task"], r["name"], r["seed"]) for r in record["runs"]}
    seeds = {seed for *_, seed in runs}
    assert runs == {(t, n, s) for t in choosing.TASKS for n in choosing.NAMES for s in seeds}
    page = (DOCS / "linear-rnns.md").read_text()
    records = json.loads((DOCS / "benchmarks" / "families.json").read_text())
    for runs_of_a_device in families.by_device(records).values():
        assert families.table(runs_of_a_device) in page


@pytest.mark.parametrize("name", choosing.NAMES)
def test_every_mixer_of_the_comparison_answers_and_steps(name: str) -> None:
    tokens = torch.randint(5, (2, 9))
    assert Network(name, 5, 3, pooled=False)(tokens).shape == (2, 9, 3)
    assert Network(name, 0, 3, pooled=True)(torch.randn(2, 9, 1)).shape == (2, 3)
    layer, u = mixer(name, 8).eval(), torch.randn(1, 6, 8)
    with torch.no_grad():
        whole, _ = layer.prefill(u)
        _, state = layer.prefill(u[:, :5])
        last, _ = layer.step(u[:, 5], state)
    torch.testing.assert_close(last, whole[:, 5], rtol=1e-4, atol=1e-5)
