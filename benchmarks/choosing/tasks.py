"""Three small tasks, each a real or published one: pixels, text, and recall by content."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.synthetic.tasks import TASKS
from lrnnx_nn.data import load_dataset, statistics

HELD_OUT_SEED = 2**41


class Batch(NamedTuple):
    """Inputs (n, L) or (n, L, 1), and labels (n,) or (n, M) for the last M positions."""

    x: Tensor
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: how batches are drawn, what is held out, and how the answer is judged."""

    name: str
    unit: str
    vocabulary: int
    answers: int
    pooled: bool
    steps: int
    batch_size: int
    draw: Callable[[int, torch.Generator], Batch]
    held_out: Batch

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy in nats."""
        if not self.pooled:
            logits = logits[:, -labels.shape[-1] :]
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def score(self, logits: Tensor, labels: Tensor) -> float:
        """Return per cent of right answers, or bits a character."""
        if self.unit == "bits":
            return float(self.loss(logits.double(), labels)) / torch.tensor(2.0).log().item()
        if not self.pooled:
            logits = logits[:, -labels.shape[-1] :]
        return 100 * float((logits.argmax(-1) == labels).double().mean())


def digits(source: str) -> Task:
    """Tell ten handwritten digits apart, read pixel by pixel: 64 samples of one channel."""
    dataset = load_dataset(source, seed=0)
    mean, std = statistics(dataset.train)
    train = Batch((dataset.train.x - mean) / std, dataset.train.y)
    test = Batch((dataset.test.x - mean) / std, dataset.test.y)

    def draw(n: int, generator: torch.Generator) -> Batch:
        rows = torch.randint(len(train.x), (n,), generator=generator)
        noise = 0.1 * torch.randn(n, *train.x.shape[1:], generator=generator)
        return Batch(train.x[rows] + noise, train.labels[rows])

    return Task("digits", "accuracy", 0, 10, True, 1000, 32, draw, test)


def selective_copying() -> Task:
    """Repeat four tokens scattered in 64 positions of noise (see docs/synthetic.md)."""
    task = TASKS["selective_copying"]

    def draw(n: int, generator: torch.Generator) -> Batch:
        batch = task.draw(n, generator)
        return Batch(batch.tokens, batch.labels)

    held_out = draw(2048, torch.Generator().manual_seed(HELD_OUT_SEED))
    return Task(
        "selective copying", "accuracy", task.vocabulary, task.n_classes, False, 1000, 32, draw,
        held_out,
    )  # fmt: skip


def text(path: Path, context: int = 128, held_out: int = 65536) -> Task:
    """Predict the next character of a text; its last characters are held out."""
    content = path.read_text(encoding="utf-8")
    known = sorted(set(content))
    number = {c: i for i, c in enumerate(known)}
    ids = torch.tensor([number[c] for c in content])
    train, test = ids[:-held_out], ids[-held_out:]

    def draw(n: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(train) - context, (n, 1), generator=generator)
        window = train[starts + torch.arange(context + 1)]
        return Batch(window[:, :-1], window[:, 1:])

    rows = test[: (held_out - 1) // context * context + 1]
    shape = (-1, context)
    return Task(
        "text", "bits", len(known), len(known), False, 400, 32, draw,
        Batch(rows[:-1].reshape(shape), rows[1:].reshape(shape)),
    )  # fmt: skip
