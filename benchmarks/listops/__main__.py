# SPDX-License-Identifier: MIT
"""Long ListOps from its grammar: accuracy of each model at one budget, and the curves.

python -m benchmarks.listops train MODEL OUT.json [--seed 0] [--minutes 5] [--device cuda]
python -m benchmarks.listops draw OUT.json ... --figure docs/figures/listops.png
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.listops.grammar import Task
from benchmarks.listops.train import STATES, Recipe, parts_of, train
from lrnnx_nn.files import read_json, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("train", help="one run")
    run.add_argument("model", choices=sorted(STATES))
    run.add_argument("out", type=Path)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--minutes", type=float, default=5.0, help="of training, at most")
    run.add_argument("--device", default="cuda")
    run.add_argument("--jobs", type=int, default=4, help="processes that draw the data")
    run.add_argument("--data", type=Path, help="an .npz that keeps the data for further runs")
    for group in (Recipe, Task):
        values = dataclasses.asdict(Recipe()) if group is Recipe else Task()._asdict()
        for name, value in values.items():
            kind: Any = _flag if isinstance(value, bool) else type(value)
            run.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    draw_ = commands.add_parser("draw", help="curves of runs, and a table")
    draw_.add_argument("files", type=Path, nargs="+")
    draw_.add_argument("--figure", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "draw":
        draw([read_json(file) for file in arguments.files], arguments.figure)
        return
    given = vars(arguments)
    recipe = Recipe(**{f.name: given[f.name] for f in dataclasses.fields(Recipe)})
    task = Task(*(given[name] for name in Task._fields))
    result = train(
        arguments.model, arguments.seed, recipe, task,
        parts=parts_of(recipe, task, arguments.jobs, arguments.data), device=arguments.device,
        minutes=arguments.minutes,
    )  # fmt: skip
    write_json(arguments.out, result)
    print(f"{result['model']}: test {100 * result['test']:.2f} %, {result['seconds']} s")


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected true or false")
    return text == "true"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw validation accuracy against steps and seconds, and print a table."""
    from lrnnx_nn import viz
    from lrnnx_nn.viz._style import CYCLE, figure_of, finish

    device = results[0]["device"]
    figure = figure_of(9.0, 3.6, f"ListOps, 500 to 2000 tokens, {device}")
    panels = figure.subplots(1, 2, sharey=True)
    for result, colour in zip(results, CYCLE, strict=False):
        rates = [100 * p["validation"] for p in result["curve"]]
        for axes, key in zip(panels, ("step", "seconds"), strict=True):
            axes.plot([p[key] for p in result["curve"]], rates, color=colour, label=result["model"])
    for axes, label in zip(panels, ("optimizer steps", "seconds of training"), strict=True):
        axes.axhline(60, color=viz.BLACK, ls="--", lw=1, label="published, about")
        axes.set(xlabel=label, ylabel="validation accuracy, %")
        finish(axes)
    viz.save_figure(figure, path)
    print("| model | parameters | steps | seconds | validation | test |\n|---|---|---|---|---|---|")
    for r in results:
        validation = 100 * r["curve"][-1]["validation"]
        cells = (
            f"{r['model']} | {r['parameters']:,} | {r['steps']:,} | {r['seconds']:.0f} | "
            f"{validation:.1f} | {100 * r['test']:.1f}"
        )
        print(f"| {cells} |")


if __name__ == "__main__":
    main()
