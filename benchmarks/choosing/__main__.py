"""Train every model on three small tasks and print the tables of docs/choosing.md.

    python -m benchmarks.choosing train RESULTS --text FILE [--tasks digits text] [--jobs 14]
    python -m benchmarks.choosing decode RESULTS
    python -m benchmarks.choosing gather RESULTS docs/benchmarks/choosing.json
    python -m benchmarks.choosing table docs/benchmarks/choosing.json

``train`` runs a process of one thread a network and skips runs whose result stands in RESULTS;
``decode`` times one step of each mixer, alone and on one thread; ``gather`` puts all into one file;
``table`` prints its Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from benchmarks.choosing import tasks
from benchmarks.choosing.networks import D_MODEL, OTHERS, Network, mixer, parameters, state_bytes
from lrnnx_core import registry
from lrnnx_nn.files import read_json, write_json
from lrnnx_nn.optimizer_groups import param_groups

TASKS = ("digits", "selective_copying", "text")
NAMES = [*registry.MODELS, *OTHERS]
LR, SSM_LR, WEIGHT_DECAY = 5e-3, 2e-3, 0.01
SLOW = ("mamba", "stream", "mamba2", "s7")
"""On a CPU in plain PyTorch; begun first, so that no run is left alone at the end."""


def make(task: str, options: argparse.Namespace) -> tasks.Task:
    """Return the task of that name."""
    if task == "digits":
        return tasks.digits(options.digits)
    return tasks.selective_copying() if task == "selective_copying" else tasks.text(options.text)


def train(task: tasks.Task, name: str, seed: int, steps: int | None) -> dict[str, Any]:
    """Train one network; return its score on what is held out, read once, and the seconds."""
    torch.manual_seed(seed)
    model = Network(name, task.vocabulary, task.answers, task.pooled)
    optimizer = torch.optim.AdamW(param_groups(model, LR, SSM_LR, WEIGHT_DECAY))
    total = steps or task.steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], total_steps=max(total, 2),
        pct_start=0.1, cycle_momentum=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    for _ in range(total):
        batch = task.draw(task.batch_size, generator)
        loss = task.loss(model(batch.x), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(x) for x in task.held_out.x.split(128)])
    return {
        "score": task.score(logits, task.held_out.labels),
        "seconds": round(seconds, 1),
        "steps": total,
        "parameters": parameters(model),
        "torch": torch.__version__,
    }


def run_all(options: argparse.Namespace) -> None:
    """Train what has no result yet, ``--jobs`` processes at a time."""
    options.results.mkdir(parents=True, exist_ok=True)

    def one(task: str, name: str, seed: int) -> None:
        file = options.results / f"{task}-{name}-{seed}.json"
        if file.is_file():
            return
        command = [sys.executable, "-m", "benchmarks.choosing", "one", task, name, str(seed)]
        command += ["--digits", options.digits]
        command += [] if options.text is None else ["--text", str(options.text)]
        command += [] if options.steps is None else ["--steps", str(options.steps)]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            print(f"{file.stem}: failed\n{done.stderr[-600:]}", flush=True)
            return
        result = json.loads(done.stdout.splitlines()[-1])
        write_json(file, {"task": task, "name": name, "seed": seed, **result})
        print(f"{file.stem}: {result['score']:.2f}, {result['seconds']:.0f} s", flush=True)

    slowest_first = sorted(options.names, key=lambda name: name not in SLOW)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [
            pool.submit(one, task, name, seed)
            for name in slowest_first for seed in options.seeds for task in options.tasks
        ]  # fmt: skip
        for run in runs:
            run.result()


@torch.no_grad()
def decode(options: argparse.Namespace) -> None:
    """Time a step of each mixer after 64 samples, alone; the median of 5 times 200 steps."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in options.names:
        torch.manual_seed(0)
        layer = mixer(name).eval()
        u = torch.randn(1, 64, D_MODEL)
        _, state = layer.prefill(u)
        times = []
        for _ in range(5):
            started, now = time.perf_counter(), state
            for t in range(200):
                _, now = layer.step(u[:, t % 64], now)
            times.append((time.perf_counter() - started) / 200)
        found[name] = {
            "microseconds": 1e6 * median(times),
            "parameters": parameters(layer),
            "state_bytes": state_bytes(state),
        }
        print(f"{name}: {found[name]['microseconds']:.0f} us a step", flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    write_json(options.results / "decode.json", {"torch": torch.__version__, **found})


def gather(results: Path) -> dict[str, Any]:
    """Return every result of a folder: ``runs`` (a list) and ``decode`` (by name)."""
    runs = [read_json(f) for f in sorted(results.glob("*-*-*.json"))]
    order = {name: i for i, name in enumerate(NAMES)}
    runs.sort(key=lambda r: (TASKS.index(r["task"]), order[r["name"]], r["seed"]))
    return {"runs": runs, "decode": read_json(results / "decode.json")}


def table(record: dict[str, Any]) -> str:
    """Return the Markdown table of what `gather` returns."""
    heads = [
        "model", "digits, %", "s", "selective copying, %", "s", "text, bits a character", "s",
        "parameters of a layer", "state, bytes", "step, µs",
    ]  # fmt: skip
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in NAMES:
        cells = [OTHERS.get(name) or registry.get(name).title]
        for task in TASKS:
            found = [r for r in record["runs"] if (r["task"], r["name"]) == (task, name)]
            scores = [r["score"] for r in found]
            places = 2 if task == "text" else 1
            cells.append(
                f"{mean(scores):.{places}f} ({min(scores):.{places}f}–{max(scores):.{places}f})"
            )
            cells.append(f"{mean(r['seconds'] for r in found):.0f}")
        own = record["decode"][name]
        cells += [f"{own['parameters']:,}", f"{own['state_bytes']:,}"]
        cells.append(f"{own['microseconds']:.0f}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    single = commands.add_parser("one", help="one run, printed as JSON")
    single.add_argument("task", choices=TASKS)
    single.add_argument("name", choices=NAMES)
    single.add_argument("seed", type=int)
    several = commands.add_parser("train", help="all runs")
    several.add_argument("results", type=Path)
    several.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    several.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    several.add_argument("--jobs", type=int, default=os.cpu_count())
    timing = commands.add_parser("decode", help="time a step of each mixer")
    timing.add_argument("results", type=Path)
    for p in (several, timing):
        p.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    for p in (single, several):
        p.add_argument("--digits", default="digits", help="or a .npz file with the same data")
        p.add_argument("--text", type=Path, help="a UTF-8 text file, for the task text")
        p.add_argument("--steps", type=int, help="instead of the task's, for a quick look")
    gathering = commands.add_parser("gather", help="one file of all results")
    gathering.add_argument("results", type=Path)
    gathering.add_argument("file", type=Path)
    commands.add_parser("table", help="print the table").add_argument("file", type=Path)
    options = parser.parse_args()
    asked = [getattr(options, "task", None), *getattr(options, "tasks", ())]
    if "text" in asked and options.text is None:
        parser.error("the task text needs --text FILE")
    if options.command == "one":
        torch.set_num_threads(1)
        found = train(make(options.task, options), options.name, options.seed, options.steps)
        print(json.dumps(found))
    elif options.command == "train":
        run_all(options)
    elif options.command == "decode":
        decode(options)
    elif options.command == "gather":
        write_json(options.file, gather(options.results))
    else:
        print(table(read_json(options.file)))


if __name__ == "__main__":
    main()
