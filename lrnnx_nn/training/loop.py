# SPDX-License-Identifier: MIT
"""Training and evaluation of a classifier: the loop one would write by hand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrnnx_nn.architectures.classifier import Classifier
from lrnnx_nn.data.dataset import Sequences
from lrnnx_nn.optimizer_groups import param_groups
from lrnnx_nn.recipes import TrainingConfig

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
) -> Fit:
    """Train with AdamW, a warm-up and a half cosine over ``epochs``.

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

    Returns:
        The best weights and the record. A KeyboardInterrupt ends the loop and is noted, nothing
        else is lost; so does a loss that is not finite.
    """
    schedule = _Schedule(model, config, steps=epochs * math.ceil(len(train) / config.batch_size))
    generator = torch.Generator().manual_seed(config.seed)
    record: list[Epoch] = []
    state: dict[str, Tensor] | None = None
    best: Epoch | None = None
    interrupted = diverged = False
    try:
        for number in range(1, epochs + 1):
            started = time.perf_counter()
            loss = _train_epoch(model, train, config, schedule, generator)
            if not math.isfinite(loss):
                diverged = True
                break
            judged = None if validation is None else evaluate(model, validation)
            epoch = Epoch(
                phase, number, loss, schedule.rate,
                None if judged is None else judged.accuracy,
                None if judged is None else judged.loss,
                time.perf_counter() - started,
            )  # fmt: skip
            record.append(epoch)
            if _better(epoch, best):
                state, best = _copy(model), epoch
                on_best(model)
            on_epoch(epoch)
            waited = 0 if best is None else number - best.epoch
            if validation is not None and config.patience and waited >= config.patience:
                break
    except KeyboardInterrupt:
        interrupted = True
    return Fit(state, best, record, interrupted, diverged)


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


def _train_epoch(
    model: Classifier,
    train: Sequences,
    config: TrainingConfig,
    schedule: _Schedule,
    generator: torch.Generator,
) -> float:
    """Take one pass in random order; return the mean loss."""
    model.train()
    total = 0.0
    device = model.input_mean.device
    order = torch.randperm(len(train), generator=generator)
    for index in order.split(config.batch_size):
        batch = augment(train.take(index).to(device), model.input_std, config, generator)
        logits = model(batch.x, lengths=batch.lengths)
        loss = F.cross_entropy(logits, batch.y, label_smoothing=config.label_smoothing)
        schedule.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        schedule.step()
        total += float(loss.detach()) * len(index)
    return total / len(train)


class _Schedule:
    """AdamW, with every group's rate following one warm-up and half cosine."""

    def __init__(self, model: Classifier, config: TrainingConfig, steps: int) -> None:
        groups = param_groups(model, config.lr, config.ssm_lr, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups)
        self.peak = config.lr
        self.warm, self.steps, self.taken = config.warmup * steps, steps, 0
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._set()

    @property
    def factor(self) -> float:
        """Share of the peak rate at the next step."""
        if self.taken < self.warm:
            return (self.taken + 1) / (self.warm + 1)
        done = (self.taken - self.warm) / max(self.steps - self.warm, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    @property
    def rate(self) -> float:
        """Rate of the ordinary parameters at the next step."""
        return self.peak * self.factor

    def step(self) -> None:
        """Step the optimizer and move on."""
        self.optimizer.step()
        self.taken += 1
        self._set()

    def _set(self) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor


def _better(epoch: Epoch, best: Epoch | None) -> bool:
    if best is None or epoch.validation_accuracy is None:
        return True

    def key(e: Epoch) -> tuple[Any, ...]:
        return (e.validation_accuracy, -(e.validation_loss or 0.0))

    return key(epoch) > key(best)


def _copy(model: Classifier) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}
