# SPDX-License-Identifier: MIT
"""Draw docs/benchmarks/cuda_*.json and write their tables into docs/benchmarks.md; needs no GPU.

    python scripts/benchmark_figures.py [FOLDER]

FOLDER, docs by default, holds benchmarks.md and benchmarks/*.json; the figures go beside these.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lrnnx_nn import viz
from lrnnx_nn.viz._style import figure_of, finish

LONGEST = 10.0  # floors that a bar spans at most; a longer one is cut and says its length
PASSES = (("forward", "forward", 0), ("both", "forward + backward", 1))


class Family(NamedTuple):
    """One benchmark: the title of its figure, and what a call is named in the table."""

    title: str
    forward: str = "forward"
    both: str = "forward + backward"


FAMILIES = {
    "linear_scan": Family("Linear scan"),
    "selective_scan": Family("Selective scan"),
    "conv1d": Family("Short convolution with SiLU"),
    "rg_lru": Family("RG-LRU"),
    "s5": Family("S5 layer"),
    "s7": Family("S7 layer"),
    "s4d": Family("S4D layer"),
    "sums": Family("Vandermonde and Cauchy sums"),
    "mamba_block": Family("Mamba block"),
    "decode": Family("Decoding", "one step"),
}
COLOURS = {
    "lrnnx-core": viz.BLUE,
    "leaves": viz.PURPLE,
    "leaf": viz.PURPLE,
    "mode scan": viz.GREEN,
    "mode conv": viz.ORANGE,
    "recurrence": viz.GREEN,
    "torch.mul": viz.ORANGE,
    "linear_scan": viz.GREEN,
    "torch.compile": viz.ORANGE,
    "torch, in blocks": viz.GREEN,
    "torch, whole matrix": viz.ORANGE,
    "torch conv1d (B,C,L)": viz.ORANGE,
    "accelerated-scan (B,D,L)": viz.RED,
    "FLA chunk_hgrn": viz.PURPLE,
    "jax associative_scan": viz.BLACK,
    "TF32": viz.GREEN,
    "cuBLAS": viz.ORANGE,
    "JAX": viz.RED,
    "JAX, TF32": viz.ORANGE,
}


def rows(report: dict[str, Any]) -> Iterable[tuple[str, str, list[float], dict[str, float]]]:
    """Yield (case, who, floors in ms, row) in the order of measuring."""
    for case, found in report["cases"].items():
        for who, row in found.items():
            if who != "floor_ms":
                yield case, who, found["floor_ms"], row


def milliseconds(ms: float) -> str:
    """Return a time with three significant digits and its unit."""
    if ms < 0.1:
        return f"{1e3 * ms:.3g} µs"
    return f"{ms:#.3g} ms".replace(". ", " ")


def figures(x: float) -> str:
    """Return a number of any unit."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def draw(report: dict[str, Any], family: Family) -> Any:
    """Return a figure: for each case and implementation the time as a multiple of the floor."""
    entries = list(rows(report))
    measured = [p for p in PASSES if any(p[0] in row for *_, row in entries)]
    cases = list(report["cases"])
    height = 1.1 + 0.21 * len(entries) + 0.22 * len(cases)
    figure = figure_of(4.6 + 3.4 * len(measured), height, f"{family.title}, {report['device']}")
    panels = figure.subplots(1, len(measured), squeeze=False, sharey=True)[0]
    places: dict[str, list[float]] = {}
    for axes, (key, heading, index) in zip(panels, measured, strict=True):
        at, named = 0.0, set[str]()
        for i, (case, who, floors, row) in enumerate(entries):
            if i and case != entries[i - 1][0]:
                at += 0.9
            at += 1
            places.setdefault(case, []).append(at)
            if key not in row:
                continue
            multiple = row[key] / floors[index]
            axes.barh(
                at, min(multiple, LONGEST), height=0.85, color=COLOURS.get(who, "0.6"),
                label=None if who in named else who,
            )  # fmt: skip
            named.add(who)
            far = f", {multiple:.0f} floors" if multiple > LONGEST else ""
            axes.annotate(
                milliseconds(row[key]) + far, (min(multiple, LONGEST), at), (3, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        axes.axvline(1, color=viz.BLACK, lw=1, ls="--", label="floor")
        right = max(b.get_width() for b in axes.patches) if axes.patches else 1.0
        axes.set(xlim=(0, 1.45 * right), xlabel="time / floor")
        axes.set_title(family.forward if key == "forward" else heading, fontsize=10)
        finish(axes, legend=False)
        axes.grid(visible=False, axis="y")
    first = panels[0]
    first.set_yticks([sum(p) / len(p) for p in places.values()], places)
    first.set_ylim(at + 0.8, 0.2)
    labels: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(
        labels.values(), labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    return figure


def table(name: str, report: dict[str, Any] | None) -> str:
    """Return what docs/benchmarks.md says of a benchmark."""
    if report is None:
        return f"Not measured yet; `python -m benchmarks.cuda {name}` does."
    family = FAMILIES[name]
    top, rate = report["ceilings_TB_per_s"], report.get("ex2_per_ns")
    lines = [
        f"{report['device']}, torch {report['torch']}. Ceilings of the run: copy "
        f"{top['copy']:.2f} TB/s, addition {top['add']:.2f} TB/s"
        + (f", {rate / 1e3:.2f} × 10¹² exponentials a second." if rate else "."),
        "",
    ]
    entries = list(rows(report))
    both = any("both" in row for *_, row in entries)
    extra = [k for k in dict.fromkeys(k for *_, r in entries for k in r) if k not in KNOWN]
    heads = ["case", "implementation", family.forward, "floor"]
    heads += [family.both, "floor"] if both else []
    heads += ["error"]
    heads += ["MiB allocated"] if any("peak_mib" in row for *_, row in entries) else []
    lines += ["| " + " | ".join([*heads, *extra]) + " |", "|---" * (len(heads) + len(extra)) + "|"]
    for case, who, floors, row in entries:
        cells = [case, who]
        for key, _, index in PASSES[: 1 + both]:
            cells.append(milliseconds(row[key]) if key in row else "")
            cells.append(milliseconds(floors[index]) if len(floors) > index else "")
        cells.append(f"{row['error']:.1e}" if "error" in row else "")
        if "MiB allocated" in heads:
            cells.append(f"{row['peak_mib']:.0f}" if "peak_mib" in row else "")
        cells += [figures(row[k]) if k in row else "" for k in extra]
        lines.append("| " + " | ".join(cells) + " |")
    for key, values in report.items():
        if key.startswith("host_us"):
            what = "Time of the host, in microseconds" + key.removeprefix("host_us")
            said = ", ".join(f"{k.replace('_', ' ')} {v:.0f}" for k, v in values.items())
            lines += ["", f"{what}: {said}."]
    if report.get("skipped"):
        said = "; ".join(f"{k} ({v})" for k, v in report["skipped"].items())
        lines += ["", f"Did not run: {said}."]
    lines += ["", f"![{family.title}](benchmarks/cuda_{name}.png)"]
    return "\n".join(lines)


KNOWN = ("forward", "both", "error", "peak_mib")


def fill(page: str, reports: dict[str, dict[str, Any] | None]) -> str:
    """Return the page with the part between every benchmark's two marks written anew.

    Raises:
        ValueError: a benchmark has no marks on the page.
    """
    for name, report in reports.items():
        marks = rf"(<!-- begin {name}[^\n]*-->\n).*?(\n<!-- end {name} -->)"
        parts = re.split(marks, page, flags=re.DOTALL)
        if len(parts) != 4:
            raise ValueError(f"benchmarks.md has {len(parts) // 3} places for {name}, expected one")
        page = "".join((parts[0], parts[1], "\n", table(name, report), "\n", parts[2], parts[3]))
    return page


def load(folder: Path) -> dict[str, dict[str, Any] | None]:
    """Return every benchmark's report, None where there is no file."""
    paths = {name: folder / f"cuda_{name}.json" for name in FAMILIES}
    return {n: json.loads(p.read_text()) if p.is_file() else None for n, p in paths.items()}


def main(folder: Path) -> None:
    """Write the figures and the tables."""
    reports = load(folder / "benchmarks")
    for name, report in reports.items():
        if report is not None:
            viz.save_figure(
                draw(report, FAMILIES[name]), folder / "benchmarks" / f"cuda_{name}.png"
            )
    page = folder / "benchmarks.md"
    page.write_text(fill(page.read_text(), reports))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
