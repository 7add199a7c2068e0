"""Train small networks on synthetic tasks and print the table of docs/synthetic.md.

    python -m benchmarks.synthetic --task selective_copying --model mamba --seed 0 --json
    python -m benchmarks.synthetic --all RESULTS --jobs 14 --seed 0 1 2
    python -m benchmarks.synthetic table RESULTS

The first line trains here, one run after the other; the second runs every task with every model
(or those named) in processes of one thread each, one JSON file a run, and goes on where an earlier
call stopped. Needs the library alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from benchmarks.synthetic.tasks import TASKS
from benchmarks.synthetic.train import Recipe, recipe_for, train
from lrnnx_core import registry
from lrnnx_nn.files import read_json, write_atomically, write_json
from lrnnx_nn.layers import LAYERS

ROOT = Path(__file__).resolve().parents[2]


class Run(NamedTuple):
    """One network to train."""

    task: str
    model: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}-{self.model}-{self.seed}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, 1 if a run failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["table"]:
        return print_table(arguments[1:])
    options = parser().parse_args(arguments)
    # seeds outermost: what is cut short still has whole rows
    every = itertools.product(options.seed, options.task, options.model)
    runs = [Run(task, model, seed) for seed, task, model in every]
    if options.all is not None:
        return run_all(runs, options.all, options.jobs, options.limit, options.steps)
    torch.set_num_threads(options.threads)
    for run in runs:
        result = train(run.task, run.model, run.seed, recipe_of(run, options.steps))
        print(json.dumps(result) if options.json else line(run, result), flush=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of everything but ``table``."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    p.add_argument(
        "--model", nargs="+", type=lambda name: registry.get(name).name, default=list(LAYERS)
    )
    p.add_argument("--seed", nargs="+", type=int, default=[0])
    p.add_argument("--steps", type=int, help="instead of the recipe's, for a quick look")
    p.add_argument("--threads", type=int, default=1, help="of this process (default 1)")
    p.add_argument("--json", action="store_true", help="print one JSON object a run")
    p.add_argument("--all", type=Path, metavar="RESULTS", help="a process a run, files in RESULTS")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    p.add_argument("--limit", type=float, default=600, help="seconds a run (default 600)")
    return p


def recipe_of(run: Run, steps: int | None) -> Recipe:
    """Return the recipe of a run, with another number of steps if one is given."""
    recipe = recipe_for(run.task, run.model)
    return recipe if steps is None else dataclasses.replace(recipe, steps=steps)


def finished(run: Run, folder: Path, steps: int | None) -> bool:
    """Return whether the folder has the result of this run by this very recipe."""
    file = folder / f"{run}.json"
    recipe = dataclasses.asdict(recipe_of(run, steps))
    return file.is_file() and read_json(file)["recipe"] == recipe


def run_all(runs: list[Run], folder: Path, jobs: int, limit: float, steps: int | None) -> int:
    """Do the runs that have no result in ``folder``; a failed one leaves a .log and is retried."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if not finished(run, folder, steps)]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished", flush=True)

    def do(run: Run) -> bool:
        started = time.perf_counter()
        try:
            result = run_process(run, limit, steps)
        except RunFailedError as error:
            write_atomically(folder / f"{run}.log", f"{error}\n")
            print(f"{run}: failed after {time.perf_counter() - started:.0f} s", flush=True)
            return False
        write_json(folder / f"{run}.json", result)
        (folder / f"{run}.log").unlink(missing_ok=True)
        print(line(run, result), flush=True)
        return True

    with ThreadPoolExecutor(jobs) as pool:
        return 0 if all(list(pool.map(do, missing))) else 1


class RunFailedError(RuntimeError):
    """A process ran out of time or ended with an error; the message is what it said."""


def run_process(run: Run, limit: float, steps: int | None) -> dict[str, Any]:
    """Return the result of one run in a process of its own with one thread.

    Raises:
        RunFailedError: it took longer than ``limit`` seconds, or failed.
    """
    command = [
        sys.executable, "-m", "benchmarks.synthetic", "--task", run.task, "--model", run.model,
        "--seed", str(run.seed), "--threads", "1", "--json",
        *([] if steps is None else ["--steps", str(steps)]),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=limit, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        raise RunFailedError(f"no result after {limit:.0f} s") from None
    if done.returncode:
        raise RunFailedError(done.stderr)
    return json.loads(done.stdout)


def line(run: Run, result: dict[str, Any]) -> str:
    """Return one line about a run for people."""
    return f"{run}: accuracy {100 * result['accuracy']:.1f} %, {result['seconds']:.0f} s"


def print_table(arguments: list[str]) -> int:
    """Print the Markdown table of a folder of results."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.synthetic table")
    p.add_argument("results", type=Path)
    folder = p.parse_args(arguments).results
    results = [read_json(file) for file in sorted(folder.glob("*.json"))]
    if not results:
        p.error(f"{folder}: no results")
    print(table(results))
    return 0


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table: a row a model, for each task accuracy and seconds over the seeds."""
    tasks = [name for name in TASKS if any(r["task"] == name for r in results)]
    models = [name for name in LAYERS if any(r["model"] == name for r in results)]
    rows = [
        ["model", *(TASKS[t].title for t in tasks)],
        ["---"] * (1 + len(tasks)),
        ["*chance*", *(f"{100 * TASKS[t].chance:.1f}" for t in tasks)],
    ]
    for model in models:
        mine = [r for r in results if r["model"] == model]
        cells = [_cell([r for r in mine if r["task"] == t]) for t in tasks]
        rows.append([registry.get(model).title, *cells])
    note = (
        "Accuracy in % on the held-out sequences, the mean over seeds with the worst and the best, "
        f"and mean seconds of training. Seeds: {_each(results, 'seed')}; torch: "
        f"{_each(results, 'torch')}; threads: {_each(results, 'threads')}."
    )
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", note])


def _each(results: list[dict[str, Any]], key: str) -> str:
    return ", ".join(map(str, sorted({r[key] for r in results})))


def _cell(results: Iterable[dict[str, Any]]) -> str:
    results = list(results)
    if not results:
        return "–"
    percent = [100 * r["accuracy"] for r in results]
    spread = f" ({min(percent):.1f}–{max(percent):.1f})" if len(percent) > 1 else ""
    return f"{mean(percent):.1f}{spread}, {mean(r['seconds'] for r in results):.0f} s"


if __name__ == "__main__":
    sys.exit(main())
