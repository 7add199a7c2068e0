# SPDX-License-Identifier: MIT
"""Make docs/benchmarks/paper.md and its figure from paper.json beside it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.paper.measure import WAYS

SWEPT = ("length", "width", "batch")
COLUMN = {"eager": "eager", "compiled": "torch.compile", "graph": "CUDA graph", "jax": "JAX"}
Cell = dict[str, Any]

HEAD = """# The published sweeps

One layer of LRU, S5 and Mamba at the sizes of the paper of the published lrnnx: lengths 8 to 2048
at batch 32 and width 128, widths 16 to 256 and batches 8 to 128 at length 512, d_state 16, float32.
`make bench-paper` measures all of it and writes this page.

- **Training** is one forward and backward pass by the input and all parameters. **Inference** is as
  many steps as the sequence is long, one after the other, each on a new input and the state of the
  one before.
- "eager" is the layer as it is; "torch.compile" the layer or its step compiled with the defaults;
  "CUDA graph" the whole call captured once and replayed, as
  [generation](../generation.md) does by itself. "JAX" is the same model with the same numbers,
  checked to give the same results: an associative scan for training, the step in `lax.scan` for
  inference, in one `jit`. Its matrix products have JAX's default precision, TF32 on this kind of
  GPU; the others are in full float32.
- Compiled by itself a step discretizes again at every call, which eager evaluation keeps: decode
  with a graph instead.
- Times are those of the clock on the wall, the host's work included: mean of {repeats} repeats of
  up to {runs} runs after up to {warm} warm-ups; a cell makes fewer where they would take longer
  than {seconds} s, and the file says how many it made.
"""


def key(cell: Cell) -> tuple[Any, ...]:
    """Return what tells a cell from the others."""
    return tuple(cell[name] for name in ("model", "kind", "way", *SWEPT))


def groups(cells: list[Cell]) -> dict[tuple[Any, ...], dict[str, Cell]]:
    """Return way -> cell for every (model, kind, length, width, batch)."""
    found: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for c in cells:
        found.setdefault(tuple(c[n] for n in ("model", "kind", *SWEPT)), {})[c["way"]] = c
    return found


def write(report: dict[str, Any], folder: Path) -> None:
    """Write the page and the figure, and print where a peer is ahead."""
    cells = report["cells"]
    versions = f"{report['device']}, torch {report['torch']}."
    parts = [
        HEAD.format(**report["protocol"]),
        versions + "\n",
        "![time against size](paper.png)\n",
    ]
    parts.append("## Beside JAX\n")
    parts.append(
        "| model, pass | ahead | best of ours / JAX: median | best | worst |\n|---|---|---|---|---|"
    )
    behind: list[str] = []
    by_pass: dict[tuple[str, str], list[float]] = {}
    for (model, kind, *size), ways in groups(cells).items():
        ours = [c["mean_ms"] for way, c in ways.items() if way != "jax"]
        if "jax" not in ways or not ours:
            continue
        ratio = min(ours) / ways["jax"]["mean_ms"]
        by_pass.setdefault((model, kind), []).append(ratio)
        if ratio > 1:
            behind.append(
                f"{model} {kind}, length {size[0]}, width {size[1]}, batch {size[2]}: "
                f"{min(ours):.3f} ms, JAX {ways['jax']['mean_ms']:.3f} ms"
            )
    for (model, kind), ratios in by_pass.items():
        ahead = sum(r <= 1 for r in ratios)
        parts.append(
            f"| {model}, {kind} | {ahead} of {len(ratios)} | {statistics.median(ratios):.2f} | "
            f"{min(ratios):.2f} | {max(ratios):.2f} |"
        )
    parts.append("")
    if behind:
        parts.append("Where JAX is ahead:\n")
        parts += [f"- {line}" for line in behind] + [""]
    for line in behind:
        print("behind jax:", line)
    count = sum(map(len, by_pass.values()))
    print(f"ahead of jax in {count - len(behind)} of {count} cells")
    parts += tables(cells)
    if report["skipped"]:
        parts.append("## Did not run\n")
        parts += [f"- {what}: {why}" for what, why in report["skipped"].items()]
    (folder / "paper.md").write_text("\n".join(parts).rstrip() + "\n")
    draw(report, folder / "paper.png")


def tables(cells: list[Cell]) -> list[str]:
    """Return a table a model and pass, in ms, mean and deviation."""
    lines: list[str] = []
    found = groups(cells)
    for model, kind in dict.fromkeys((m, k) for m, k, *_ in found):
        lines += [f"## {model}, {kind}\n", "Milliseconds.\n"]
        lines.append("| length | width | batch | " + " | ".join(COLUMN.values()) + " |")
        lines.append("|---" * (3 + len(COLUMN)) + "|")
        for (m, k, *size), ways in sorted(found.items()):
            if (m, k) == (model, kind):
                shown = [
                    f"{ways[w]['mean_ms']:.3f} ± {ways[w]['deviation_ms']:.3f}" if w in ways else ""
                    for w in COLUMN
                ]
                lines.append("| " + " | ".join([*map(str, size), *shown]) + " |")
        lines.append("")
    return lines


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw time against each size, a row a model and pass."""
    from lrnnx_nn import viz
    from lrnnx_nn.viz._style import figure_of, finish

    cells, base = report["cells"], report["base"]
    rows = list(dict.fromkeys((c["kind"], c["model"]) for c in cells))
    rows.sort(key=lambda row: row[0] != "training")
    figure = figure_of(11.0, 2.5 * len(rows), f"One layer, d_state 16, {report['device']}")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    colours = dict(zip(WAYS, (viz.BLUE, viz.ORANGE, viz.GREEN, viz.BLACK), strict=True))
    for (kind, model), panels in zip(rows, grid, strict=True):
        for sweep, axes in zip(SWEPT, panels, strict=True):
            fixed = [k for k in base if k != sweep]
            for way in WAYS:
                points = sorted(
                    (c[sweep], c["mean_ms"], c["deviation_ms"])
                    for c in cells
                    if (c["model"], c["kind"], c["way"]) == (model, kind, way)
                    and all(c[k] == base[k] for k in fixed)
                )
                if points:
                    x, y, error = zip(*points, strict=True)
                    axes.errorbar(
                        x, y, error, color=colours[way], marker="o", ms=3, label=COLUMN[way]
                    )
            axes.set(xscale="log", yscale="log", xlabel=sweep, ylabel=f"{model}, {kind}, ms")
            sizes = sorted({c[sweep] for c in cells if all(c[k] == base[k] for k in fixed)})
            axes.set_xticks(sizes[:: -(-len(sizes) // 5)], sizes[:: -(-len(sizes) // 5)])
            axes.minorticks_off()
            finish(axes, legend=False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    viz.save_figure(figure, path)
