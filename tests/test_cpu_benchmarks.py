# SPDX-License-Identifier: MIT
"""The benchmarks of the CPU kernels at small sizes, and the page that is made of them."""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path

import pytest
import torch

from benchmarks.cpu import page, timing
from benchmarks.cpu.__main__ import NAMES, main

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"


@pytest.mark.parametrize("name", NAMES)
def test_every_case_runs_at_a_small_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(timing.SWITCH, "torch")  # compiling float32 kernels would take a minute
    session = timing.Session(1, tiny=True, peers=False)
    importlib.import_module(f"benchmarks.cpu.{name}").measure(session)
    report = json.loads(json.dumps(session.report()))
    assert report["cases"]
    assert not report["skipped"]
    for found in report["cases"].values():
        for row in found["rows"].values():
            assert all(math.isfinite(ms) and ms > 0 for ms in row.values())
    for lines in report["curves"].values():
        assert len(lines[timing.OURS]) == len(lines["floor"]) == 2
    text = page.section(name, {"machine": timing.machine(), "runs": [report]})
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_the_page_shows_what_the_files_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in DOCS.glob("cpu_*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setattr(page, "draw", lambda *_: None)
    page.write(tmp_path, NAMES)
    assert (tmp_path / "cpu.md").read_text() == (DOCS / "cpu.md").read_text(), (
        "run python -m benchmarks.cpu --render"
    )


def test_a_figure_has_a_line_for_everybody(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = {
        timing.OURS: [[256, 1.0, 2.0, 3.0], [512, 2.0, 4.0, 6.0]],
        "another": [[256, 5.0, None, None]],
        "floor": [[256, 0.5, 1.0], [512, 1.0, 2.0]],
    }
    report = {"machine": timing.machine(), "runs": [{"threads": 1, "curves": {"case": lines}}]}
    page.draw("s5", report, tmp_path / "cpu_s5.png")
    assert (tmp_path / "cpu_s5.png").stat().st_size > 5000


@pytest.mark.parametrize("option", ["--threads", "--rounds"])
def test_none_of_them_is_no_number(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "s5", option, "0"])
    with pytest.raises(SystemExit):
        main()
    assert f"{option} 0, expected >= 1" in capsys.readouterr().err


def test_a_wrong_result_is_no_time() -> None:
    session = timing.Session(1, tiny=True)
    x = torch.ones(4)
    ways = {
        timing.OURS: lambda: timing.torch_way(lambda x: 2 * x, x),
        "another": lambda: timing.torch_way(lambda x: 3 * x, x),
    }
    with pytest.raises(ValueError, match="another computes something else"):
        session.case("case", (0.0, 0.0), ways)


def test_a_package_that_is_missing_is_named() -> None:
    session = timing.Session(1, tiny=True)

    def missing() -> timing.Way:
        raise ImportError("no such package")

    x = torch.ones(4)
    session.case(
        "case", (0.0, 0.0),
        {timing.OURS: lambda: timing.torch_way(lambda x: 2 * x, x), "another": missing},
    )  # fmt: skip
    assert session.skipped == {"another, case": "ImportError: no such package"}
    assert list(session.cases["case"]["rows"]) == [timing.OURS]


def test_plain_torch_is_for_one_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(timing.SWITCH, raising=False)
    seen: list[str | None] = []
    way = timing.in_plain_torch(timing.Way(lambda: seen.append(os.environ.get(timing.SWITCH))))
    way.forward()
    assert seen == ["torch"]
    assert timing.SWITCH not in os.environ


def test_memory_of_a_call_is_seen() -> None:
    grown = timing.growth_mib(lambda: torch.ones(2**24).sum())
    if grown is None:
        pytest.skip("no /proc here")
    assert 48 < grown < 128
