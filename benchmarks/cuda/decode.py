# SPDX-License-Identifier: MIT
"""Time decoding on a GPU: the state update of one layer, and a step of a whole model.

    python -m benchmarks.cuda.decode [--json FILE]

All times are those of a step inside a CUDA graph. The state update is one call of the selective
scan with L = 1, with bfloat16 activations and a float32 state. Calls take turns among eight states,
more than the L2 cache holds; "recurrence" feeds the state back, so that a part of it may still be
in the cache. "torch.mul" reads and writes the same states and does nothing else. The floor is the
state read and written, and what a channel brings. The model has the shape of Mamba-130m (24
layers, width 768, 50280 tokens, random weights in bfloat16): it is the library's
`LRNNLMHeadModel` in the CUDA graph of `lrnnx_nn.generation`, with the choice of the next token,
and as "generate" a greedy token of `generate`, by the clock on the wall. Its floor is the weights
read once and the states read and written once.
"""

from __future__ import annotations

import copy
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda import timing
from benchmarks.cuda.timing import Row, Session, relative_error
from lrnnx_core.backends import blocked_selective
from lrnnx_core.ops import selective_scan
from lrnnx_nn import LRNNLMHeadModel
from lrnnx_nn.generation import engine, generate
from lrnnx_nn.generation.state import state_bytes

BF16 = torch.bfloat16
UPDATES = {"B64 E4096 N16": (64, 4096, 16), "B1 E1536 N16": (1, 1536, 16)}
BATCHES = (1, 64)
POOL = 8
leaf = torch.ops.lrnnx_core.selective_scan.default


# ------------------------------------------------------------------------------ one layer's state


class Update:
    """One state update, as a Mamba block calls it."""

    def __init__(self, session: Session, batch: int, width: int, states: int) -> None:
        draw = partial(session.random, dtype=BF16)
        xz, BC = draw(batch, 1, 2 * width, seed=1), draw(batch, 1, 2 * states, seed=2)
        self.u, self.z = xz.chunk(2, dim=-1)
        self.B, self.C = BC.chunk(2, dim=-1)
        self.dt = draw(batch, 1, width, seed=3)
        self.A = -session.random(width, states, seed=4).exp()
        self.D, self.bias = session.random(width, seed=5), session.random(width, seed=6)
        self.states = [session.random(batch, width, states, seed=7 + i) for i in range(POOL)]

    def call(self, h: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return selective_scan(
                self.u, self.dt, self.A, self.B, self.C, self.D, self.z, self.bias, h,
                softplus=True,
            )  # fmt: skip

    def call_leaf(self, h: Tensor) -> tuple[Tensor, Tensor]:
        B, C = self.B.unsqueeze(-2), self.C.unsqueeze(-2)
        rest = (self.D, self.z, self.bias, h, None, None, None, True, False, "mamba", False)
        return leaf(self.u, self.dt, self.A, B, C, *rest)[:2]

    def error(self) -> float:
        B, C = self.B.unsqueeze(-2).double(), self.C.unsqueeze(-2).double()
        tensors = (self.u, self.dt, self.A, B, C, self.D, self.z, self.bias, self.states[0])
        exact = [t.double() for t in tensors]
        choices = (None, None, None, True, False, "mamba", False)
        want = blocked_selective.selective_scan(*exact, *choices)[1]
        return relative_error(self.call(self.states[0])[1], want)

    def bytes(self) -> int:
        return 2 * self.states[0].nbytes + 4 * self.u.nbytes + self.A.nbytes


def from_memory(session: Session, x: Update, f: Callable[[Tensor], Any]) -> Row:
    """Time calls that take turns among states which the cache does not hold together."""
    states = itertools.cycle(x.states)
    return {"forward": session.graph_ms(lambda: f(next(states)), 3 * POOL), "error": x.error()}


def multiplied(session: Session, x: Update) -> Row:
    """Time torch's multiplication of a state by a number, with the same states in turn."""
    states = itertools.cycle(x.states)
    return {"forward": session.graph_ms(lambda: torch.mul(next(states), 0.5), 3 * POOL)}


def recurrence(session: Session, x: Update) -> Row:
    """Time calls that take the state which the one before left."""
    steps = 3 * POOL

    def run() -> None:
        h = x.states[0]
        for _ in range(steps):
            h = x.call(h)[1]

    return {"forward": session.graph_ms(run) / steps}


# ------------------------------------------------------------------------------ a whole model


def model_of(tokens: int, d_model: int, layers: int, device: str) -> LRNNLMHeadModel:
    """Return the library's language model of Mamba layers, in bfloat16, for decoding."""
    torch.manual_seed(0)
    model = LRNNLMHeadModel(d_model, 16, layers, tokens, ["mamba"], device=device)
    return model.bfloat16().eval()


def decoded(session: Session, model: LRNNLMHeadModel, batch: int) -> Row:
    """Time a step of the model and the choice of the next tokens in the engine's graph."""
    tokens = torch.arange(batch, device=session.device)

    def step(carry: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, state = model.step(*carry)
        return logits.argmax(-1), state

    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        want, _ = exact.step(tokens, exact.init_state((batch,)))
        carry = (tokens, model.init_state((batch,)))
        error = relative_error(model.step(*carry)[0], want)
        del exact
        if session.device == "cpu":
            ms = session.median_ms(lambda: step(carry))
        else:
            carry, trace = engine.record(step, carry)
            ms = session.median_ms(engine.prepared(model, batch, step, carry, trace).replay)
            engine.release_graphs(model)
    return {"forward": ms, "error": error, "tokens a second": batch / ms * 1e3}


def generated(session: Session, model: LRNNLMHeadModel, batch: int) -> Row:
    """Time a greedy token of `generate`, the host's part included: many tokens less a few."""
    prompt = torch.zeros(batch, 4, dtype=torch.int64, device=session.device)

    def seconds(count: int) -> float:
        session.synchronize()
        start = time.perf_counter()
        generate(model, prompt, count, temperature=0)
        session.synchronize()
        return time.perf_counter() - start

    few, many = (2, 4) if session.tiny else (20, 276)
    seconds(few)  # compiled and captured
    ms = min((seconds(many) - seconds(few)) / (many - few) * 1e3 for _ in range(3))
    engine.release_graphs(model)
    return {"forward": ms, "tokens a second": batch / ms * 1e3}


def measure(session: Session) -> None:
    """Measure both."""
    for name, shape in UPDATES.items():
        x = Update(session, *((2, 12, 16) if session.tiny else shape))
        session.case(
            f"update {name}",
            [session.floor_ms(x.bytes())],
            partial(from_memory, session, x, x.call),
            others={
                "leaf": partial(from_memory, session, x, x.call_leaf),
                "recurrence": partial(recurrence, session, x),
                "torch.mul": partial(multiplied, session, x),
            },
        )
        calls = {"public": partial(x.call, x.states[0]), "leaf": partial(x.call_leaf, x.states[0])}
        session.note(f"host_us, update {name}", {k: session.host_us(f) for k, f in calls.items()})
        del x, calls
    shape = (100, 32, 2) if session.tiny else (50280, 768, 24)
    model = model_of(*shape, device=session.device)
    weights = sum(p.nbytes for p in model.parameters())
    for batch in BATCHES:
        states = state_bytes(model.init_state((batch,)))
        name = f"Mamba-130m shape, B{batch}"
        try:
            session.case(
                name, [session.floor_ms(weights + 2 * states)],
                partial(decoded, session, model, batch),
                others={"generate": partial(generated, session, model, batch)},
            )  # fmt: skip
        except RuntimeError as error:  # the state updates above are worth having without it
            session.report["skipped"][name] = str(error).splitlines()[0]
            print(f"{name} does not run: {error}")


if __name__ == "__main__":
    sys.exit(timing.main(__doc__, measure))
