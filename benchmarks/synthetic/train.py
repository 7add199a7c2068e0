"""One training run: a small network with any layer of the library on one task."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.synthetic.tasks import TASKS, Batch, Task, bits_of
from lrnnx_core import registry
from lrnnx_nn.blocks import Block
from lrnnx_nn.layers import LAYERS
from lrnnx_nn.optimizer_groups import param_groups
from lrnnx_nn.recipes import model_defaults

HELD_OUT, HELD_OUT_SEED, TRAINING_SEED = 2048, 2**41, 2**20
"""Held-out sequences, the same for every run, and the seeds of their generator and of training."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How every model is trained on a task.

    Attributes:
        steps: of the optimizer, each on fresh sequences.
        batch_size: sequences a step.
        lr: peak learning rate: it rises over the first tenth of the steps, then falls to zero as a
            half cosine.
        ssm_lr: the same for the state-space parameters (`lrnnx_nn.param_groups`).
        weight_decay: of AdamW, on what is neither a state-space parameter nor a norm nor a bias.
        clip: largest norm of the gradient.
        d_model: width.
        n_layer: number of blocks.
        activation: of the blocks.
        states: times the d_state of `lrnnx_nn.recipes.model_defaults`.
    """

    steps: int
    batch_size: int = 32
    lr: float = 5e-3
    ssm_lr: float = 5e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    d_model: int = 32
    n_layer: int = 2
    activation: str = "half_glu1"
    states: int = 1


RECIPES: Mapping[str, Recipe] = {
    "copying": Recipe(steps=2000, states=4),
    "selective_copying": Recipe(steps=1500),
    "induction_heads": Recipe(steps=2000),
    "event_timing": Recipe(steps=600),
    "event_timing_blind": Recipe(steps=600),
}

LEARNING_RATES: Mapping[tuple[str, str], float] = {}
"""By task and model, where the recipe's rate does not do, another of the grid 1e-3, 2e-3, 5e-3."""


def recipe_for(task_name: str, layer: str) -> Recipe:
    """Return the task's recipe with the model's learning rate."""
    recipe = RECIPES[task_name]
    lr = LEARNING_RATES.get((task_name, registry.get(layer).name), recipe.lr)
    return dataclasses.replace(recipe, lr=lr, ssm_lr=lr)


class BitEmbedding(nn.Module):
    """A linear map of a token's bits; tokens too large for them are signals with a row each."""

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        self.bits = task.bits
        self.linear = nn.Linear(task.bits, width)
        self.signal = nn.Embedding(task.vocabulary - 2**task.bits, width)

    def forward(self, tokens: Tensor) -> Tensor:
        number = tokens < 2**self.bits
        pattern = self.linear(2.0 * bits_of(tokens, self.bits) - 1)
        signal = self.signal((tokens - 2**self.bits).clamp(min=0))
        return torch.where(number.unsqueeze(-1), pattern, signal)


class Network(nn.Module):
    """Embedding, residual blocks, norm, and a head that answers at the last positions.

    Args:
        task: gives vocabulary and number of classes.
        layer: a model's name, looked up in the registry.
        recipe: width, depth, states and activation.
    """

    def __init__(self, task: Task, layer: str, recipe: Recipe) -> None:
        super().__init__()
        name, width = registry.get(layer).name, recipe.d_model
        d_state = recipe.states * model_defaults(name)["d_state"]
        self.embedding = (
            BitEmbedding(task, width) if task.bits else nn.Embedding(task.vocabulary, width)
        )
        self.blocks = nn.ModuleList(
            Block(width, LAYERS[name](width, d_state), norm="layer", activation=recipe.activation)
            for _ in range(recipe.n_layer)
        )
        self.norm = nn.LayerNorm(width)
        self.per_answer = max(task.bits, 1)
        self.head = nn.Linear(width, self.per_answer * task.n_classes)

    def forward(self, tokens: Tensor, answers: int, gaps: Tensor | None = None) -> Tensor:
        """Return the logits (n, answers, n_classes) at the last positions of tokens (n, L).

        Args:
            tokens: (n, L), integers.
            answers: number of labels M, one for each of the last positions (or for each of their
                bits).
            gaps: (n, L), the layers' integration_timesteps.
        """
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, integration_timesteps=gaps)
        logits = self.head(self.norm(x[:, -(answers // self.per_answer) :]))
        return logits.reshape(len(tokens), answers, -1)


def train(
    task_name: str, layer: str, seed: int = 0, recipe: Recipe | None = None
) -> dict[str, Any]:
    """Train a fresh network and test it once, after the last step, on the held-out sequences.

    Args:
        task_name: a key of `TASKS`.
        layer: a model's name.
        seed: of the initial values and of the training sequences.
        recipe: `recipe_for` if None.

    Returns:
        What a row of the table is made of, as JSON can hold it: ``accuracy`` (share of right
        answers, per token), ``loss`` (nats), ``seconds`` of training, ``curve`` (the mean training
        loss of each twentieth of the steps), the settings and versions.
    """
    task = TASKS[task_name]
    recipe = recipe_for(task_name, layer) if recipe is None else recipe
    torch.manual_seed(seed)
    model = Network(task, layer, recipe)
    groups = param_groups(model, recipe.lr, recipe.ssm_lr, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in groups], total_steps=max(recipe.steps, 2), pct_start=0.1,
        cycle_momentum=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(TRAINING_SEED + seed)
    losses = torch.empty(recipe.steps)
    started = time.perf_counter()
    for i in range(recipe.steps):
        loss = _loss(model, task, task.draw(recipe.batch_size, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        losses[i] = loss.detach()
    seconds = time.perf_counter() - started
    accuracy, held_out_loss = evaluate(model, task)
    return {
        "task": task_name,
        "model": registry.get(layer).name,
        "seed": seed,
        "accuracy": accuracy,
        "chance": task.chance,
        "loss": held_out_loss,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": [round(float(part.mean()), 4) for part in losses.tensor_split(20) if len(part)],
        "recipe": dataclasses.asdict(recipe),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


@torch.no_grad()
def evaluate(model: Network, task: Task) -> tuple[float, float]:
    """Return accuracy and mean cross entropy (nats) on the held-out sequences of a task."""
    model.eval()
    batch = task.draw(HELD_OUT, torch.Generator().manual_seed(HELD_OUT_SEED))
    logits = torch.cat([_logits(model, task, _take(batch, i)) for i in _parts(HELD_OUT)])
    right = logits.argmax(-1) == batch.labels
    return float(right.double().mean()), float(_cross_entropy(logits.double(), batch.labels))


def _logits(model: Network, task: Task, batch: Batch) -> Tensor:
    return model(batch.tokens, batch.labels.shape[-1], batch.gaps if task.timesteps else None)


def _loss(model: Network, task: Task, batch: Batch) -> Tensor:
    return _cross_entropy(_logits(model, task, batch), batch.labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def _parts(n: int, size: int = 256) -> tuple[Tensor, ...]:
    return torch.arange(n).split(size)


def _take(batch: Batch, index: Tensor) -> Batch:
    return Batch(*(None if t is None else t[index] for t in batch))
