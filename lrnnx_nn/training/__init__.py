# SPDX-License-Identifier: MIT
"""Training: the engine, a loop for classifiers, and the folder a run leaves behind."""

from lrnnx_nn.recipes import TrainingConfig
from lrnnx_nn.training.loop import Epoch, Evaluation, Fit, evaluate, fit
from lrnnx_nn.training.run import RunResult, evaluate_run, resume_run, train_run

__all__ = [
    "Epoch",
    "Evaluation",
    "Fit",
    "RunResult",
    "TrainingConfig",
    "evaluate",
    "evaluate_run",
    "fit",
    "resume_run",
    "train_run",
]
