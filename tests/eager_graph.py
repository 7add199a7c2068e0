"""A stand-in for a CUDA graph, so that all around it is tested without a device."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from torch import Tensor

from lrnnx_core.backends.donation import donating
from lrnnx_nn.generation import engine
from lrnnx_nn.generation import state as states


class EagerGraph:
    """What `engine.Graph` does, without a device: buffers, and a step that works on them."""

    made = 0
    factor = 1

    def __init__(self, step: Any, carry: Any, trace: engine.Trace, donate: bool = True) -> None:
        type(self).made += 1
        self.trace, self.step, self.lock = trace, step, threading.Lock()
        self.carry = states.map_state(Tensor.clone, carry)
        buffers = list(states.tensors(self.carry))
        self.given = [buffers[i] for i in trace.spent] if donate else []

    load = engine.Graph.load
    _write = engine.Graph._write
    snapshot = engine.Graph.snapshot

    def replay(self) -> None:
        with donating(self.given):
            after = self.step(self.carry)
        self._write(after if self.factor == 1 else states.map_state(self._wrong, after))

    def _wrong(self, t: Tensor) -> Tensor:
        return t * self.factor


def pretend(monkeypatch: pytest.MonkeyPatch) -> type[EagerGraph]:
    """Let `engine.repeat` run as on a CUDA device, with a graph that needs none."""
    kind = type("Graph", (EagerGraph,), {"made": 0})
    monkeypatch.setattr(engine, "_on_cuda", lambda device: True)
    monkeypatch.setattr(engine, "Graph", kind)
    return kind
