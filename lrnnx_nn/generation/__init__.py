# SPDX-License-Identifier: MIT
"""Continuing sequences: tokens that are drawn, values that are fed back, states that are forked."""

from lrnnx_nn.generation._context import Context
from lrnnx_nn.generation._generate import Generation, LanguageModel, generate
from lrnnx_nn.generation._rollout import rollout
from lrnnx_nn.generation.engine import NotCapturableError, release_graphs
from lrnnx_nn.generation.sampling import Sampling
from lrnnx_nn.generation.state import fork, join, select, state_bytes
from lrnnx_nn.generation.streamer import Streamer, TextStreamer

__all__ = [
    "Context", "Generation", "LanguageModel", "NotCapturableError", "Sampling", "Streamer",
    "TextStreamer", "fork", "generate", "join", "release_graphs", "rollout", "select",
    "state_bytes",
]  # fmt: skip
