# SPDX-License-Identifier: MIT
"""Make docs/benchmarks/cpu.md and its figures from the files cpu_NAME.json beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu.timing import OURS, PLAIN

TITLES = {
    "linear_scan": "Linear scan",
    "selective_scan": "Selective scan (Mamba)",
    "s5": "S5 and LRU layers",
    "s4d": "S4D layer",
    "gated": "RG-LRU, short convolution, S7",
    "decode": "Decoding",
}
HEAD = """# Benchmarks on a CPU

What the compiled kernels (`pip install lrnnx-core[cpu]`) take beside other libraries, and beside
what the machine allows. `make bench-cpu` measures all of it and writes this page; `python -m
benchmarks.cpu s5 --threads 1` runs a part.

- All implementations of a row group ran **in one process, in turns, on the same cores**; a time
  is the best of the rounds, each begun with a pause and a call that is not counted (threads of
  the library before it may still spin). Compare within a group only, and read the ratios:
  "x ours" is a time over lrnnx-core's.
- **The floor** is the time that the ceilings of the run leave: bytes moved at the speed of a
  copy, exponentials at that of `torch.exp`, products at that of a large matrix product, whichever
  is longest. The kernels' polynomial may be faster than `torch.exp`, so a time can be below it.
- "plain torch" is the same call of lrnnx-core without its compiled kernels
  (`LRNNX_CPU_BACKEND=torch`, or no numba).
- **Training** is forward and backward by all inputs and parameters.
- Peers get the same numbers in the layout they want, checked to give the same result first
  (s5-pytorch and lru-pytorch with their own initialisation, same sizes).
"""


def write(folder: Path, names: Sequence[str]) -> None:
    """Write the page and the figures for what has been measured."""
    parts = [HEAD]
    reports: dict[str, Any] = {}
    for name in names:
        path = folder / f"cpu_{name}.json"
        if not path.is_file():
            parts.append(f"## {TITLES[name]}\n\nNot measured yet; `make bench-cpu` does.\n")
            continue
        reports[name] = json.loads(path.read_text())
        parts.append(section(name, reports[name]))
        if any(run["curves"] for run in reports[name]["runs"]):
            draw(name, reports[name], folder / f"cpu_{name}.png")
    (folder / "cpu.md").write_text("\n".join(parts))


def section(name: str, report: dict[str, Any]) -> str:
    """Return what the page says of a benchmark."""
    machine = report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    lines = [f"## {TITLES[name]}", ""]
    lines += [
        f"{machine['cpu']}{', ' * bool(machine['vectors'])}{machine['vectors']}; {versions}.",
        "",
    ]
    for run in report["runs"]:
        top, n = run["ceilings"], run["threads"]
        ceilings = (
            f"Ceilings: copy {top['copy_GB_per_s']:.1f} GB/s, {top['exp_per_ns']:.2f} exponentials "
            f"a ns, matrix product {top['gemm_GFLOP_per_s']:.0f} GFLOP/s."
        )
        lines += [
            f"### {TITLES[name]}, {n} thread{'s' * (n > 1)}",
            "",
            ceilings,
            "",
        ]
        trained = any("train" in row for c in run["cases"].values() for row in c["rows"].values())
        floors = any(case["floor_ms"][0] for case in run["cases"].values())
        heads = ["case", "implementation", "forward ms", "x ours"]
        heads += ["floors"] * floors
        heads += (["training ms", "x ours"] + ["floors"] * floors) * trained
        lines += ["| " + " | ".join(heads) + " |", "|---|---" + "|---:" * (len(heads) - 2) + "|"]
        for case, found in run["cases"].items():
            ours = found["rows"].get(OURS, {})
            for who, row in found["rows"].items():
                cells = [case, f"**{who}**" if who == OURS else who]
                for index, kind in enumerate(("forward", "train")[: 1 + trained]):
                    floor = found["floor_ms"][index]
                    if kind not in row:
                        cells += [""] * (2 + floors)
                        continue
                    cells.append(f"{row[kind]:.3g}")
                    cells.append(f"{row[kind] / ours[kind]:.2g}" if kind in ours else "")
                    cells += [f"{row[kind] / floor:.2g}" if floor else ""] * floors
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        if run["skipped"]:
            said = "; ".join(f"{k} ({v})" for k, v in run["skipped"].items())
            lines += [f"Did not run: {said}.", ""]
    lines += threads(report)
    if any(run["curves"] for run in report["runs"]):
        lines += [f"![{TITLES[name]}: time and memory against length](cpu_{name}.png)", ""]
    return "\n".join(lines)


def threads(report: dict[str, Any]) -> list[str]:
    """Return a line on how much faster two threads are than one, case by case."""
    runs = {run["threads"]: run for run in report["runs"]}
    if not {1, 2} <= runs.keys():
        return []
    said = []
    for case, found in runs[1]["cases"].items():
        one, two = found["rows"].get(OURS), runs[2]["cases"][case]["rows"].get(OURS)
        if not one or not two or case.startswith("step"):
            continue
        gains = [f"{one[k] / two[k]:.2f}" for k in ("forward", "train") if k in one]
        said.append(f"{case} {' / '.join(gains)}")
    if not said:
        return []
    return [f"Two threads over one, lrnnx-core, forward / training: {'; '.join(said)}.", ""]


def draw(name: str, report: dict[str, Any], path: Path) -> None:
    """Draw time and memory against the length, with the floor, of the run with fewest threads."""
    from lrnnx_nn import viz
    from lrnnx_nn.viz._style import CYCLE, figure_of, finish

    run = next(r for r in report["runs"] if r["curves"])
    (title, lines), *_ = run["curves"].items()
    n = run["threads"]
    figure = figure_of(12.0, 4.2, f"{title}, {n} thread{'s' * (n > 1)}, {report['machine']['cpu']}")
    panels = figure.subplots(1, 3)
    columns = (("forward", "ms", 1), ("training", "ms", 2), ("memory of training", "MiB", 3))
    colours = {OURS: viz.BLUE, PLAIN: viz.ORANGE}
    others = iter(c for c in CYCLE if c not in colours.values())
    for who in lines:
        if who not in colours and who != "floor":
            colours[who] = next(others)
    for axes, (heading, unit, column) in zip(panels, columns, strict=True):
        for who, points in lines.items():
            kept = [p for p in points if len(p) > column and p[column] is not None]
            if column == 3:
                kept = [p for p in kept if p[3] >= 1]
            if not kept:
                continue
            x, y = [p[0] for p in kept], [p[column] for p in kept]
            if who == "floor":
                axes.plot(x, y, color=viz.BLACK, ls="--", lw=1, label="floor")
            else:
                axes.plot(x, y, color=colours[who], marker="o", ms=3, label=who)
        axes.set(xscale="log", yscale="log", xlabel="length L", ylabel=unit)
        axes.set_title(heading, fontsize=10)
        finish(axes, legend=False)
    labels: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(
        labels.values(), labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    viz.save_figure(figure, path)
