# SPDX-License-Identifier: MIT
"""One step of every layer, and a token of a small Mamba language model, on the CPU.

    python -m benchmarks.cpu decode

"its matrix products" are those of the language model alone, on one row. `generate` replays the
step's operators; "in a plain loop" is the same call with ``engine="loop"``.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cpu.timing import OURS, PLAIN, Session, Way, in_plain_torch
from lrnnx_nn import LRNNLMHeadModel
from lrnnx_nn.generation import generate
from lrnnx_nn.layers import LAYERS

WIDTH, LAYERS_OF_MODEL, VOCABULARY, STATES = 256, 4, 1024, 16


def layer_step(layer: Any, width: int, batch: int) -> Way:
    """Return steps that go on from one another."""
    layer.eval()
    u = torch.randn(batch, width)
    state = layer.init_state((batch,))

    def run() -> None:
        nonlocal state
        with torch.inference_mode():
            _, state = layer.step(u, state)

    return Way(run)


def cell_step(kind: Any, width: int, batch: int) -> Way:
    cell, u = kind(width, width), torch.randn(batch, width)
    state: Any = None

    def run() -> None:
        nonlocal state
        with torch.inference_mode():
            state = cell(u, state)

    return Way(run)


def ours(batch: int, tokens: int, engine: str = "auto") -> Way:
    torch.manual_seed(0)
    model = LRNNLMHeadModel(
        WIDTH, STATES, LAYERS_OF_MODEL, VOCABULARY, ["mamba"], {}, 0, pad_vocab_size_multiple=1
    ).eval()
    ids = torch.zeros(batch, 1, dtype=torch.int64)
    return Way(lambda: generate(model, ids, tokens, temperature=0.0, engine=engine))


def transformers(batch: int, tokens: int) -> Way:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, state_size=STATES,
            num_hidden_layers=LAYERS_OF_MODEL, eos_token_id=None, pad_token_id=0, bos_token_id=1,
        )
    ).eval()  # fmt: skip
    ids = torch.zeros(batch, 1, dtype=torch.int64)
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)

    def run() -> None:
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, **options)

    return Way(run)


def products(batch: int, tokens: int) -> Way:
    inner, rank = 2 * WIDTH, -(-WIDTH // 16)
    shapes = [(WIDTH, 2 * inner), (inner, rank + 2 * STATES), (rank, inner), (inner, WIDTH)]
    pairs = [
        (torch.randn(batch, i), torch.randn(o, i))
        for _ in range(LAYERS_OF_MODEL)
        for i, o in shapes
    ]
    pairs.append((torch.randn(batch, WIDTH), torch.randn(VOCABULARY, WIDTH)))

    def run() -> None:
        with torch.inference_mode():
            for _ in range(tokens):
                for x, w in pairs:
                    torch.nn.functional.linear(x, w)

    return Way(run)


def measure(session: Session) -> None:
    width, tokens, batches = (8, 2, (1,)) if session.tiny else (64, 32, (1, 32))
    for batch in batches:
        for name, kind in LAYERS.items():
            torch.manual_seed(0)
            options = {"sub_state_dim": 8} if name == "centaurus" else {}
            layer = kind(width, None if name == "rglru" else 16, **options)
            session.case(
                f"step, {kind.__name__}, width {width}, batch {batch}",
                (0.0, None),
                {
                    OURS: lambda layer=layer, n=batch: layer_step(layer, width, n),
                    PLAIN: lambda layer=layer, n=batch: in_plain_torch(layer_step(layer, width, n)),
                },
            )
        session.case(
            f"step, recurrent cells, width {width}, batch {batch}",
            (0.0, None),
            {
                "torch LSTMCell": lambda n=batch: cell_step(torch.nn.LSTMCell, width, n),
                "torch GRUCell": lambda n=batch: cell_step(torch.nn.GRUCell, width, n),
            },
        )
        session.case(
            f"{tokens} tokens, Mamba {LAYERS_OF_MODEL} x {WIDTH}, batch {batch}",
            (0.0, None),
            {
                OURS: lambda n=batch: ours(n, tokens),
                "in a plain loop": lambda n=batch: ours(n, tokens, "loop"),
                PLAIN: lambda n=batch: in_plain_torch(ours(n, tokens)),
                "its matrix products": lambda n=batch: products(n, tokens),
                "transformers generate": lambda n=batch: transformers(n, tokens),
            },
        )
