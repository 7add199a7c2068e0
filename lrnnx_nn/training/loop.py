# SPDX-License-Identifier: MIT
"""Training and evaluation of a classifier by epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrnnx_nn.architectures.classifier import Classifier
from lrnnx_nn.data.dataset import Sequences
from lrnnx_nn.recipes import FitConfig, TrainingConfig
from lrnnx_nn.training import engine
from lrnnx_nn.training.engine import BaseTask

EVALUATION_BATCH = 256


class Evaluation(NamedTuple):
    """Accuracy (share of right answers), mean cross entropy in nats, and the answers (n,)."""

    accuracy: float
    loss: float
    predictions: Tensor


class Epoch(NamedTuple):
    """One line of metrics.jsonl; the validation fields are None where nothing is held out."""

    phase: str
    epoch: int
    loss: float
    lr: float
    validation_accuracy: float | None
    validation_loss: float | None
    seconds: float


class Fit(NamedTuple):
    """How a fit ended. ``state`` is the best `state_dict`, None if interrupted before the first."""

    state: dict[str, Tensor] | None
    best: Epoch | None
    epochs: list[Epoch]
    interrupted: bool
    diverged: bool


@torch.no_grad()
def evaluate(model: Classifier, data: Sequences) -> Evaluation:
    """Classify every sequence of ``data``, in evaluation mode; the model's mode is put back."""
    training = model.training
    model.eval()
    device = model.input_mean.device
    logits: list[Tensor] = []
    for index in torch.arange(len(data)).split(EVALUATION_BATCH):
        batch = data.take(index).to(device)
        logits.append(model(batch.x, lengths=batch.lengths).cpu())
    model.train(training)
    z, y = torch.cat(logits), data.y.cpu()
    answers = z.argmax(-1)
    accuracy = (answers == y).double().mean()
    return Evaluation(float(accuracy), float(F.cross_entropy(z.double(), y)), answers)


def fit(
    model: Classifier,
    train: Sequences,
    config: TrainingConfig,
    *,
    epochs: int,
    validation: Sequences | None = None,
    phase: str = "search",
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_best: Callable[[Classifier], None] = lambda model: None,
    state: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
) -> Fit:
    """Train with AdamW, a warm-up and a half cosine over ``epochs``: `engine.fit` by epochs.

    Args:
        model: on the device to train on; holds the last epoch's weights afterwards.
        train: the sequences to learn from.
        config: rates, noise and patience.
        epochs: number of passes; with ``validation`` fewer if `TrainingConfig.patience` runs out.
        validation: sequences to judge each epoch by: the best has the highest accuracy, and of
            several the lowest loss. Without them the last epoch is the best.
        phase: a name for the records.
        on_epoch: called after each epoch.
        on_best: called when the model is the best so far.
        state: what ``save`` was given by an earlier fit: go on from there.
        save: called with a state at the start, after each epoch and on Ctrl-C.

    Returns:
        The best weights and the record. A KeyboardInterrupt ends the loop and is noted, nothing
        else is lost; so does a loss that is not finite.

    Raises:
        ValueError: a state of another config or model.
    """
    per_epoch = math.ceil(len(train) / config.batch_size)
    task = ClassifierTask(train, config, validation)
    how = FitConfig(
        steps=epochs * per_epoch, evaluate_every=per_epoch, batch_size=config.batch_size,
        accumulate=config.accumulate, precision=config.precision, lr=config.lr,
        ssm_lr=config.ssm_lr, weight_decay=config.weight_decay, warmup=config.warmup,
        clip=config.clip, patience=config.patience if validation is not None else 0,
        seed=config.seed,
    )  # fmt: skip

    def epoch_of(record: engine.Record) -> Epoch:
        judged = record.figures
        return Epoch(
            phase, record.step // per_epoch, record.loss, record.lr,
            judged.get("validation_accuracy"), judged.get("validation_loss"), record.seconds,
        )  # fmt: skip

    outcome = engine.fit(
        model, task.on(model), how, state=state, save=save, on_best=on_best,
        on_record=lambda record: on_epoch(epoch_of(record)),
    )  # fmt: skip
    return Fit(
        outcome.weights,
        None if outcome.best is None else epoch_of(outcome.best),
        [epoch_of(record) for record in outcome.records],
        outcome.interrupted,
        outcome.diverged,
    )


class ClassifierTask(BaseTask):
    """Passes in random order over labelled sequences; the best has the highest accuracy.

    Args:
        train: the sequences to learn from.
        config: batch size, noise, cropping and label smoothing.
        validation: sequences to judge by, if any.
    """

    metric, maximize = "validation_accuracy", True

    def __init__(
        self, train: Sequences, config: TrainingConfig, validation: Sequences | None = None
    ) -> None:
        self.train, self.config, self.validation = train, config, validation
        self.order, self.position = torch.empty(0, dtype=torch.int64), 0
        self.std = torch.ones(train.x.shape[-1])

    def on(self, model: Classifier) -> ClassifierTask:
        """Take the device and the unit of the noise from a model."""
        self.std = model.input_std
        return self

    def batch(self, generator: torch.Generator) -> Sequences:
        """Return the next sequences of the pass, with noise and cropped."""
        if self.position >= len(self.order):
            self.order, self.position = torch.randperm(len(self.train), generator=generator), 0
        index = self.order[self.position : self.position + self.config.batch_size]
        self.position += self.config.batch_size
        batch = self.train.take(index).to(self.std.device)
        return augment(batch, self.std, self.config, generator)

    def loss(self, model: Classifier, batch: Sequences) -> Tensor:
        """Return the cross entropy in nats, with smoothed labels."""
        logits = model(batch.x, lengths=batch.lengths)
        return F.cross_entropy(logits, batch.y, label_smoothing=self.config.label_smoothing)

    def evaluate(self, model: Classifier) -> dict[str, float]:
        """Judge by the validation sequences."""
        if self.validation is None:
            return {}
        judged = evaluate(model, self.validation)
        return {"validation_accuracy": judged.accuracy, "validation_loss": judged.loss}

    def score(self, figures: Mapping[str, float]) -> tuple[float, ...]:
        """Return accuracy, then loss."""
        if not figures:
            return ()
        return (figures["validation_accuracy"], -figures["validation_loss"])

    def state_dict(self) -> dict[str, Any]:
        """Return the order of this pass, and how much of it is done."""
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on within a pass."""
        self.order, self.position = state["order"], state["position"]


def augment(
    batch: Sequences, std: Tensor, config: TrainingConfig, generator: torch.Generator
) -> Sequences:
    """Return the batch cut to random stretches and with noise, as the config asks.

    Args:
        batch: on any device.
        std: (channels,), the unit of the noise.
        config: ``crop`` and ``noise``.
        generator: on the CPU, so that every device sees the same draws.
    """
    x, lengths, y = batch.x, batch.lengths, batch.y
    if config.crop:
        kept = lengths * (1 - config.crop * _uniform(len(y), generator, x.device))
        kept = kept.ceil().long().clamp(min=1)
        start = ((lengths - kept + 1) * _uniform(len(y), generator, x.device)).long()
        source = start.unsqueeze(-1) + torch.arange(x.shape[1], device=x.device)
        source = source.clamp(max=x.shape[1] - 1)
        x, lengths = x.gather(1, source.unsqueeze(-1).expand_as(x)), kept
        x = x[:, : int(lengths.max())]
    if config.noise:
        x = x + config.noise * std * torch.randn(x.shape, generator=generator).to(x)
    return Sequences(x, lengths, y)


def _uniform(n: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(n, generator=generator).to(device)
