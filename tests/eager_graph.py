"""A stand-in for a CUDA graph, so that all around it is tested without a device."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from torch import Tensor

from lrnnx_nn.generation import engine
from lrnnx_nn.generation import state as states


class EagerGraph:
    """What `engine.Graph` does, without a device: buffers, and a step that works on them."""

    made = 0
    factor = 1

    def __init__(self, step: Any, carry: Any, trace: engine.Trace) -> None:
        type(self).made += 1
        self.trace, self.step, self.lock = trace, step, threading.Lock()
        self.carry = states.map_state(Tensor.clone, carry)

    load = engine.Graph.load
    _write = engine.Graph._write
    snapshot = engine.Graph.snapshot

    def replay(self) -> None:
        self._write(states.map_state(lambda t: t * self.factor, self.step(self.carry)))


def pretend(monkeypatch: pytest.MonkeyPatch) -> type[EagerGraph]:
    """Let `engine.repeat` run as on a CUDA device, with a graph that needs none."""
    kind = type("Graph", (EagerGraph,), {"made": 0})
    monkeypatch.setattr(engine, "_on_cuda", lambda device: True)
    monkeypatch.setattr(engine, "Graph", kind)
    return kind
