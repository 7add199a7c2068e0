"""Train a classifier on the sequential digits with every time-invariant model: docs/digits.md.

    python -m benchmarks.digits RESULTS [--models s4d s5] [--seeds 0 1 2] [--jobs 2]
    python -m benchmarks.digits RESULTS --table

Each run is `lrnnx train --dataset digits --layer MODEL --seed SEED` with the options in RECIPE, in
a process of one thread. Runs that have a result are not done again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from lrnnx_core import registry
from lrnnx_nn.files import read_json

RECIPE = ("--noise", "0.1", "--activation", "glu")
"""What differs from the defaults of `lrnnx train`; chosen by the validation accuracy of S4."""
INVARIANT = [m.name for m in registry.MODELS.values() if m.kind == "lti"]


def train(folder: Path, dataset: str, model: str, seed: int, extra: list[str]) -> None:
    """Train one network into ``folder``, unless its result is there."""
    if (folder / "result.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut short
    command = [
        sys.executable, "-m", "lrnnx_nn.cli.main", "train", "--dataset", dataset, "--layer", model,
        "--seed", str(seed), "--threads", "1", "--device", "cpu", "--out", str(folder),
        *RECIPE, *extra,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{model}, seed {seed}:\n{done.stderr}")
    result = read_json(folder / "result.json")
    print(
        f"{model}, seed {seed}: {100 * result['test_accuracy']:.2f} %, {result['seconds']:.0f} s",
        flush=True,
    )


def table(results: Path) -> str:
    """Return the Markdown table of a folder of runs."""
    rows = [
        "| model | parameters | test accuracy, mean (worst–best) | seconds |",
        "|---|---|---|---|",
    ]
    for name in INVARIANT:
        found: list[dict[str, Any]] = [
            read_json(file) for file in sorted(results.glob(f"{name}-*/result.json"))
        ]
        if not found:
            continue
        accuracy = [100 * r["test_accuracy"] for r in found]
        rows.append(
            f"| {registry.get(name).title} | {found[0]['parameters']:,} | {mean(accuracy):.2f} "
            f"({min(accuracy):.2f}–{max(accuracy):.2f}) | {mean(r['seconds'] for r in found):.0f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--dataset", default="digits", help="or a .npz file with the same data")
    parser.add_argument("--models", nargs="+", default=INVARIANT)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--epochs", help="instead of the recipe's, for a quick look")
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    options = parser.parse_args()
    if not options.table:
        extra = [] if options.epochs is None else ["--epochs", options.epochs]
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = [
                pool.submit(
                    train, options.results / f"{registry.get(model).name}-{seed}",
                    options.dataset, model, seed, extra,
                )
                for seed in options.seeds
                for model in options.models
            ]  # fmt: skip
            for run in runs:
                run.result()
    print(table(options.results))


if __name__ == "__main__":
    main()
