# SPDX-License-Identifier: MIT
"""Long ListOps from its grammar: accuracy of each model at one budget, and the curves.

python -m benchmarks.listops data FILE.npz [--jobs 4]           draw the data once, for many runs
python -m benchmarks.listops train MODEL OUT.json [--minutes 4] [--data FILE.npz] [--device cuda]
python -m benchmarks.listops render [OUT.json ...]              into docs/listops.md, with a figure
python -m benchmarks.listops draw OUT.json ... --figure F.png   the figure and the table alone
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.listops import page
from benchmarks.listops.data import parts_of
from benchmarks.listops.grammar import Task
from benchmarks.listops.recipe import MODELS, Recipe
from benchmarks.listops.train import train
from lrnnx_nn.files import read_json, write_json

DOCS = Path(__file__).resolve().parents[2] / "docs"


def main() -> None:
    """Run a command."""
    arguments = parser().parse_args()
    if arguments.command == "render":
        runs = page.keep(arguments.files, arguments.docs / "benchmarks" / "listops.json")
        page.render(
            arguments.docs / "listops.md", runs, arguments.docs / "benchmarks" / "listops.png"
        )
        return
    if arguments.command == "draw":
        runs = [read_json(file) for file in arguments.files]
        page.draw(runs, arguments.figure)
        print("\n".join([*page.table(runs), "", *page.remarks(runs)]))
        return
    given = vars(arguments)
    recipe = Recipe(**{f.name: given[f.name] for f in dataclasses.fields(Recipe)})
    task = Task(*(given[name] for name in Task._fields))
    parts = parts_of(recipe, task, arguments.jobs, arguments.data)
    if arguments.command == "data":
        return
    result = train(
        arguments.model, arguments.seed, recipe, task, parts=parts, device=arguments.device,
        minutes=arguments.minutes, save=lambda result: write_json(arguments.out, result),
    )  # fmt: skip
    print(f"{result['model']}: test {100 * result['test']:.2f} %, {result['seconds']} s")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    drawn = commands.add_parser("data", help="draw the data once")
    drawn.add_argument("data", type=Path, help="the .npz to write")
    run = commands.add_parser("train", help="one run")
    run.add_argument("model", choices=sorted(MODELS))
    run.add_argument("out", type=Path)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--minutes", type=float, default=4.0, help="of training; for --steps 0")
    run.add_argument("--device", default="cuda")
    run.add_argument("--data", type=Path, help="an .npz that keeps the data for further runs")
    for command in (drawn, run):
        command.add_argument("--jobs", type=int, default=4, help="processes that draw the data")
        for name, value in (dataclasses.asdict(Recipe()) | Task()._asdict()).items():
            kind: Any = _flag if isinstance(value, bool) else type(value)
            command.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    rendered = commands.add_parser("render", help="write docs/listops.md and its figure")
    rendered.add_argument("files", type=Path, nargs="*", help="runs to put into listops.json")
    rendered.add_argument("--docs", type=Path, default=DOCS)
    figure = commands.add_parser("draw", help="the figure and the table of runs")
    figure.add_argument("files", type=Path, nargs="+")
    figure.add_argument("--figure", type=Path, required=True)
    return parser


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected true or false")
    return text == "true"


if __name__ == "__main__":
    main()
