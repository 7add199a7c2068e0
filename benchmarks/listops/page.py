# SPDX-License-Identifier: MIT
"""What docs/listops.md says of the runs in docs/benchmarks/listops.json, and the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrnnx_core import registry
from lrnnx_nn.files import read_json, write_atomically, write_json

BEGIN = "<!-- begin: written by `python -m benchmarks.listops render` -->"
END = "<!-- end -->"
ORDER = ("s5", "s4d", "s4", "lru", "mamba")
PUBLISHED = {"s5": "62.15", "s4d": "60.47", "s4": "59.60", "lru": "about 60"}
ABOUT = 60
"""Where the figure draws a line."""

Run = dict[str, Any]


def keep(files: list[Path], path: Path) -> list[Run]:
    """Put runs into the file ``path``, each for the one of its model and seed, and return all."""
    runs: list[Run] = read_json(path)["runs"] if path.is_file() else []
    for new in map(read_json, files):
        same = (new["model"], new["seed"])
        runs = [run for run in runs if (run["model"], run["seed"]) != same] + [new]
    runs.sort(key=lambda run: (ORDER.index(run["model"]), run["seed"]))
    if files:
        write_json(path, {"runs": runs})
    return runs


def render(page: Path, runs: list[Run], figure: Path) -> None:
    """Write what stands between the two marks of the page, and the figure beside it.

    Raises:
        ValueError: the page has no marks.
    """
    text = page.read_text()
    if text.count(BEGIN) != 1 or END not in text.split(BEGIN)[1]:
        raise ValueError(f"{page}: expected one {BEGIN} ... {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END, 1)[1]
    lines = ["Not measured yet."]
    if runs:
        draw(runs, figure)
        place = figure.relative_to(page.parent).as_posix()
        lines = [*table(runs), "", *remarks(runs), ""]
        lines += [f"![Validation accuracy against epochs and seconds]({place})"]
    write_atomically(page, before + "\n".join([BEGIN, "", *lines, "", END]) + after)


def table(runs: list[Run]) -> list[str]:
    """Return the table, a row for each run."""
    heads = ["model", "parameters", "steps", "epochs", "seconds", "validation", "test", "published"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for run in runs:
        last = run["curve"][-1] if run["curve"] else None
        cells = [
            registry.get(run["model"]).title,
            f"{run['parameters']:,}",
            f"{run['steps']:,}",
            f"{last['epoch']:.1f}" if last else "–",
            f"{run['seconds']:.0f}",
            percent(last["validation"]) if last else "–",
            "–" if run["test"] is None else f"**{percent(run['test'])}**",
            PUBLISHED.get(run["model"], "–"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def remarks(runs: list[Run]) -> list[str]:
    """Return what the table's numbers need to be read."""
    recipe, seeds = runs[0]["recipe"], sorted({run["seed"] for run in runs})
    error = 100 * (0.25 / recipe["held_out"]) ** 0.5
    devices = ", ".join(sorted({f"{run['device']} (torch {run['torch']})" for run in runs}))
    lr = "; ".join(
        f"{registry.get(run['model']).title} {run['lr'][0]:g} and {run['lr'][1]:g}" for run in runs
    )
    commonest = percent(runs[0]["commonest"])
    figures = (
        f"Accuracy in %, on {recipe['held_out']:,} sequences each (standard error at most "
        f"{error:.1f}); the commonest value alone gets {commonest}. Seed "
        f"{', '.join(map(str, seeds))}. {devices}. Seconds are of training with its evaluations, "
        "the warm-up and the capture of the graphs included."
    )
    network = (
        f"Blocks: {recipe['n_layer']} of width {recipe['d_model']}, {recipe['norm']} norm, "
        f"`{recipe['activation']}`; batches of {recipe['batch_size']}; matrix products in "
        f"{'TF32' if recipe['precision'] == 'float32' else 'bfloat16'}. Peak learning rates, "
        f"general and of state-space parameters: {lr}."
    )
    lines = [figures, "", network]
    unlike = [run for run in runs if run["recipe"] | {"steps": 0} != recipe | {"steps": 0}]
    if unlike:
        names = ", ".join(registry.get(run["model"]).title for run in unlike)
        lines += ["", f"By another recipe than the first row's: {names} (see the JSON file)."]
    if cut := [registry.get(run["model"]).title for run in runs if run["test"] is None]:
        lines += ["", f"Cut off before the test part was read: {', '.join(cut)}."]
    return lines


def percent(share: float) -> str:
    """Return a share in percent, one decimal."""
    return f"{100 * share:.1f}"


def draw(runs: list[Run], path: Path) -> None:
    """Draw validation accuracy against epochs and against seconds."""
    from lrnnx_nn import viz
    from lrnnx_nn.viz._style import CYCLE, figure_of, finish

    task = runs[0]["task"]
    title = f"ListOps, {task['shortest']} to {task['longest']} tokens, {runs[0]['device']}"
    figure = figure_of(9.0, 3.6, title)
    panels = figure.subplots(1, 2, sharey=True)
    colours = dict(zip(ORDER, CYCLE, strict=False))
    several = len({run["seed"] for run in runs}) > 1
    for run in runs:
        points = run["curve"]
        label = registry.get(run["model"]).title + f", seed {run['seed']}" * several
        for axes, key in zip(panels, ("epoch", "seconds"), strict=True):
            axes.plot(
                [p[key] for p in points], [100 * p["validation"] for p in points],
                color=colours[run["model"]], marker="o", ms=2.5, label=label,
            )  # fmt: skip
    for axes, label in zip(panels, ("epochs", "seconds of training"), strict=True):
        axes.axhline(ABOUT, color=viz.BLACK, ls="--", lw=1, label="published, about")
        axes.axhline(100 * runs[0]["commonest"], color=viz.BLACK, ls=":", lw=1, label="a constant")
        axes.set_xlabel(label)
        finish(axes, legend=axes is panels[0])
    panels[0].set_ylabel("validation accuracy, %")
    viz.save_figure(figure, path)
