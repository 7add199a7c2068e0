# SPDX-License-Identifier: MIT
"""One ListOps run: data from the grammar, one recipe for every model, a curve of accuracies."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.listops.grammar import N_TOKENS, Task, sequences
from lrnnx_core import registry
from lrnnx_nn import Classifier, ClassifierConfig, param_groups

SHARD = 500  # sequences of one seed, so that the data do not depend on the number of processes
SEEDS = {"train": 0, "validation": 10**6, "test": 2 * 10**6}
STATES = {"mamba": 16, "s4d": 64, "s4": 64, "s5": 128, "lru": 128}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How every model is trained."""

    sequences: int = 96_000
    steps: int = 6_000
    batch_size: int = 64
    lr: float = 3e-3
    ssm_lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    d_model: int = 128
    n_layer: int = 4
    dropout: float = 0.0
    pooling: str = "mean"
    activation: str = "half_glu1"
    norm: str = "layer"
    bidirectional: bool = True
    evaluations: int = 20
    held_out: int = 2_000


class Part(NamedTuple):
    """Sequences of a part of the data."""

    tokens: Tensor
    lengths: Tensor
    values: Tensor


def _shard(arguments: tuple[int, int, Task]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return sequences(*arguments)


def data(part: str, count: int, task: Task, jobs: int) -> Part:
    """Draw a part; its sequences are ordered by nothing."""
    plan = [
        (min(SHARD, count - start), SEEDS[part] + start // SHARD, task)
        for start in range(0, count, SHARD)
    ]
    if jobs == 1:
        found = [_shard(p) for p in plan]
    else:
        with ProcessPoolExecutor(jobs) as pool:
            found = list(pool.map(_shard, plan))
    return Part(*(torch.from_numpy(np.concatenate(column)) for column in zip(*found, strict=True)))


def parts_of(recipe: Recipe, task: Task, jobs: int, file: Path | None) -> dict[str, Part]:
    """Draw all parts, or read them from a file that an earlier run has kept.

    Raises:
        ValueError: the file holds other sizes.
    """
    counts = {p: recipe.sequences if p == "train" else recipe.held_out for p in SEEDS}
    about = np.array([*counts.values(), *task])
    if file is not None and file.is_file():
        with np.load(file) as kept:
            if not np.array_equal(kept["about"], about):
                raise ValueError(f"listops: {file} holds other sizes, {kept['about'].tolist()}")
            return {
                p: Part(*(torch.from_numpy(kept[f"{p}_{f}"]) for f in Part._fields)) for p in SEEDS
            }
    parts = {p: data(p, count, task, jobs) for p, count in counts.items()}
    if file is not None:
        arrays = {f"{p}_{f}": t.numpy() for p in SEEDS for f, t in parts[p]._asdict().items()}
        np.savez(file, about=about, **arrays)
    return parts


def network(model: str, recipe: Recipe) -> Classifier:
    name = registry.get(model).name
    options = {"bidirectional": True} if recipe.bidirectional else {}
    return Classifier(
        ClassifierConfig(
            d_input=1, n_classes=10, layer=name, d_model=recipe.d_model, d_state=STATES[name],
            n_layer=recipe.n_layer, layer_options=options, norm=recipe.norm,
            activation=recipe.activation, dropout=recipe.dropout, n_tokens=N_TOKENS,
            pooling=recipe.pooling,
        )
    )  # fmt: skip


def logits(model: Classifier, part: Part, index: Tensor) -> Tensor:
    lengths = part.lengths[index]
    longest = int(lengths.max())  # on the CPU: nothing waits for the GPU
    device = next(model.parameters()).device
    tokens = part.tokens[index, :longest].to(device, torch.int64, non_blocking=True)
    return model(tokens, lengths=lengths.to(device))


@torch.no_grad()
def accuracy(model: Classifier, part: Part, size: int = 250) -> float:
    model.eval()
    right = 0
    for index in torch.arange(len(part.values)).split(size):
        found = logits(model, part, index).argmax(-1).cpu()
        right += int((found == part.values[index]).sum())
    model.train()
    return right / len(part.values)


def train(
    name: str,
    seed: int,
    recipe: Recipe,
    task: Task,
    *,
    parts: dict[str, Part],
    device: str,
    minutes: float,
) -> dict[str, Any]:
    """Train a fresh network; stop early after ``minutes``, and say so in the result.

    The test part is read once, at the end, by the last weights.
    """
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model = network(name, recipe).to(device)
    groups = param_groups(model, recipe.lr, recipe.ssm_lr, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in groups], total_steps=max(recipe.steps, 2),
        pct_start=recipe.warmup, cycle_momentum=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    every = max(recipe.steps // recipe.evaluations, 1)
    curve: list[dict[str, float]] = []
    order = torch.empty(0, dtype=torch.int64)
    total, counted, done = torch.zeros((), device=device), 0, 0
    started = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        if len(order) < recipe.batch_size:
            order = torch.randperm(recipe.sequences, generator=generator)
        index, order = order[: recipe.batch_size], order[recipe.batch_size :]
        loss = F.cross_entropy(
            logits(model, parts["train"], index), parts["train"].values[index].to(device)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        total, counted, done = total + loss.detach(), counted + 1, step
        if step % every == 0 or step == recipe.steps:
            seconds = time.perf_counter() - started
            curve.append(
                {
                    "step": step,
                    "seconds": round(seconds, 1),
                    "loss": round(float(total) / counted, 4),
                    "validation": accuracy(model, parts["validation"]),
                }
            )
            print(f"{name} {curve[-1]}", flush=True)
            total, counted = torch.zeros((), device=device), 0
            if seconds > 60 * minutes:
                break
    return {
        "model": registry.get(name).name,
        "seed": seed,
        "test": accuracy(model, parts["test"]),
        "curve": curve,
        "steps": done,
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": dataclasses.asdict(recipe),
        "task": task._asdict(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
    }
