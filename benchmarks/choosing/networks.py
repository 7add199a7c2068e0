"""The network of the comparison: an encoder, residual blocks around any mixer, a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrnnx_core import registry
from lrnnx_nn.attention import Attention
from lrnnx_nn.blocks import Block
from lrnnx_nn.layers import LAYERS
from lrnnx_nn.recipes import model_defaults

D_MODEL, N_LAYER = 64, 2
OTHERS = {"attn": "attention", "lstm": "LSTM", "gru": "GRU"}
"""What stands beside the models of the library, with the name the table shows."""


class GatedRNN(nn.Module):
    """PyTorch's own LSTM or GRU, with the methods of a layer."""

    def __init__(self, d_model: int, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.d_model = self.d_output = d_model
        self.cell = cell(d_model, d_model, batch_first=True)

    def forward(self, u: Tensor, **_: Any) -> Tensor:
        return self.cell(u)[0]

    def init_state(self, batch_shape: tuple[int, ...] = ()) -> Any:
        (batch,) = batch_shape
        zero = next(self.parameters()).new_zeros(1, batch, self.d_model)
        return (zero, zero) if isinstance(self.cell, nn.LSTM) else zero

    def prefill(self, u: Tensor, state: Any = None, **_: Any) -> tuple[Tensor, Any]:
        return self.cell(u, state)

    def step(self, u_t: Tensor, state: Any, **_: Any) -> tuple[Tensor, Any]:
        y, state = self.cell(u_t.unsqueeze(1), state)
        return y.squeeze(1), state


def mixer(name: str, d_model: int = D_MODEL) -> Any:
    """Return the layer of that name with its default state size, or one of `OTHERS`."""
    if name == "attn":
        return Attention(d_model, n_heads=4)
    if name in OTHERS:
        return GatedRNN(d_model, nn.LSTM if name == "lstm" else nn.GRU)
    entry = registry.get(name)
    return LAYERS[entry.name](d_model, model_defaults(entry.name)["d_state"])


class Network(nn.Module):
    """Tokens (n, L) or signals (n, L, channels) to an answer at every position, or one in all.

    Args:
        name: of the mixer.
        vocabulary: number of tokens; 0 for signals of one channel.
        answers: width of an answer.
        pooled: one answer a sequence, from the mean over time.
    """

    def __init__(self, name: str, vocabulary: int, answers: int, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.encoder = nn.Embedding(vocabulary, D_MODEL) if vocabulary else nn.Linear(1, D_MODEL)
        self.blocks = nn.ModuleList(
            Block(D_MODEL, mixer(name), norm="layer", activation="glu", dropout=0.1)
            for _ in range(N_LAYER)
        )
        self.norm = nn.LayerNorm(D_MODEL)
        self.head = nn.Linear(D_MODEL, answers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(-2) if self.pooled else x)


def parameters(module: nn.Module) -> int:
    """Return how many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())


def state_bytes(state: Any) -> int:
    """Return the bytes of a state of any structure."""
    leaves = torch.utils._pytree.tree_leaves(state)
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))
