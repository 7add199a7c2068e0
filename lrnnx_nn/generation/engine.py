# SPDX-License-Identifier: MIT
"""Repeating one step many times: a plain loop, a plan on a CPU, a graph on a CUDA device.

A step is a pure function from a carry to a carry, both states as in `lrnnx_nn.generation.state`.
A CUDA graph, or on a CPU a plan (`lrnnx_nn.generation._plan`), is recorded once for a model, the
options and the shapes, and kept. It reads memory at fixed addresses, and Python does not run when
it is replayed. So before a kept one is used, one step runs as usual, while the operators it calls
and the memory they read are written down; unless both are what they were when it was made (weights
moved, a value that a layer keeps made anew, a changed mode), a new one is made.

What was written down also tells which tensors of the carry a single operator reads, and nothing
later: those the captured step gives away (`lrnnx_core.backends.donation`), and a kernel that makes
the next state writes it there instead of having it copied. And it tells which memory nothing in the
step writes: a kernel may read weights there before the kernel before it has ended.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from lrnnx_core.backends import cpu
from lrnnx_core.backends.donation import donating, settling
from lrnnx_core.backends.transforms import (
    autocasting,
    dispatch_observed,
    hooked,
    transform_active,
)
from lrnnx_nn.generation._plan import Observe, Plan, planned
from lrnnx_nn.generation._trace import (
    NotCapturableError,
    Step,
    Trace,
    check_blind,
    check_static,
    place_of,
    record,
)
from lrnnx_nn.generation.state import map_state, tensors

ENGINES = ("auto", "loop", "graph", "replay")
KEPT_GRAPHS = 4
"""Graphs and plans that are kept for a model, the latest ones; a graph holds its own buffers."""
WORTHWHILE = 8
"""Steps from which on a graph is captured unasked; a capture takes as long as several of them."""
WORTHWHILE_ON_CPU = 32
"""The same of a plan. Where one is kept, `WORTHWHILE` steps are enough to compare it."""


class Graph:
    """A step captured in a CUDA graph, and its buffers.

    Args:
        step: the function.
        carry: one it can be applied to; the buffers get its shapes.
        trace: what the step did when it was recorded with such a carry.
        donate: let operators write new states where those old ones are that nothing else reads,
            which saves a copy of each.

    Raises:
        NotCapturableError: the device refuses to capture an operator.
    """

    def __init__(self, step: Step, carry: Any, trace: Trace, donate: bool = True) -> None:
        self.trace = trace
        self.lock = threading.Lock()
        self.device = next(tensors(carry)).device
        self.carry = map_state(lambda t: t.clone(memory_format=torch.contiguous_format), carry)
        buffers = list(tensors(self.carry))
        given = [buffers[i] for i in trace.spent] if donate else []
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up outside of the capture
                step(self.carry)
            torch.cuda.current_stream().wait_stream(side)
            stream = torch.cuda.current_stream()
            try:
                with (
                    torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
                    donating(given),
                    settling(trace.settled),  # a graph begins when all before it has ended
                ):
                    self._write(step(self.carry))
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own as the current
                said = str(error).strip().splitlines() or [type(error).__name__]
                raise NotCapturableError(f"the capture failed: {said[0]}") from error

    def _write(self, carry: Any) -> None:
        """Copy a carry into the buffers; parts of it may be views of other buffers."""
        buffers = {place_of(t) for t in tensors(self.carry)}

        def unchanged(buffer: Tensor, value: Tensor) -> bool:
            return (
                value.data_ptr() == buffer.data_ptr()
                and value.stride() == buffer.stride()
                and not (value.is_conj() or value.is_neg())
            )

        def apart(buffer: Tensor, value: Tensor) -> Tensor:
            away = place_of(value) in buffers and not unchanged(buffer, value)
            return value.clone() if away else value

        def write(buffer: Tensor, value: Tensor) -> Tensor:
            return buffer if unchanged(buffer, value) else buffer.copy_(value)

        values = map_state(apart, self.carry, carry)
        map_state(write, self.carry, values)

    def load(self, carry: Any) -> None:
        """Copy a carry into the buffers."""
        self._write(carry)

    def replay(self) -> None:
        """Take one step from what the buffers hold; they hold the carry after it then."""
        with torch.cuda.device(self.device):
            self.graph.replay()

    def snapshot(self) -> Any:
        """Return the carry in the buffers, in memory of its own."""
        return map_state(torch.clone, self.carry)


_graphs: weakref.WeakKeyDictionary[Any, dict[Hashable, Graph | Plan]] = weakref.WeakKeyDictionary()
_refused: weakref.WeakKeyDictionary[Any, set[Hashable]] = weakref.WeakKeyDictionary()
_preparing = threading.RLock()


def release_graphs(model: Any) -> None:
    """Free the CUDA graphs, their buffers and the plans that generation keeps for a model."""
    _graphs.pop(model, None)
    _refused.pop(model, None)


def prepared(model: Any, key: Hashable, step: Step, carry: Any, trace: Trace) -> Graph | Plan:
    """Return the graph or plan of a step: the one kept, if it still does the same, or a new one.

    A new one is compared with the step itself once.

    Args:
        model: what they are kept for; not kept alive.
        key: what the step depends on besides.
        step: the function.
        carry: the one to go on from.
        trace: of the step just taken.

    Raises:
        NotCapturableError: the state changes its shapes from step to step, the step looks at
            values, its capture fails, or the graph or plan does not give what the step gives.
    """
    with _preparing:
        kept = _graphs.setdefault(model, {})
        found = kept.get(key)
        if found is None or not found.trace.same(trace):
            on_cuda = _on_cuda(next(tensors(carry)).device)
            found = _captured(step, carry) if on_cuda else planned(step, carry)
        kept.pop(key, None)
        kept[key] = found  # the latest stands last
        for old in list(kept)[:-KEPT_GRAPHS]:
            del kept[old]
        return found


def _captured(step: Step, carry: Any) -> Graph:
    """Return a new graph, compared with the step itself."""
    # recorded again: the step before this one may have made values that layers keep from now on
    wanted, trace = record(step, carry)
    check_static(carry, wanted)
    check_blind(trace)
    for donate in (True, False) if trace.spent else (False,):
        graph = Graph(step, carry, trace, donate)
        graph.load(carry)
        graph.replay()
        if _agree(graph.carry, wanted):
            return graph
    raise NotCapturableError("replayed, the graph does not give what the step gives")


def _agree(got: Any, wanted: Any) -> bool:
    def near(a: Tensor, b: Tensor) -> bool:
        if not (a.is_floating_point() or a.is_complex()):
            return bool(torch.equal(a, b))
        tolerance = 1e-2 if a.dtype.itemsize < 4 else 1e-3
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)

    return all(near(a, b) for a, b in zip(tensors(got), tensors(wanted), strict=True))


def repeat(
    step: Step,
    carry: Any,
    count: int,
    observe: Observe,
    *,
    engine: str = "auto",
    model: Any = None,
    key: Hashable = None,
) -> Any:
    """Take up to ``count`` steps; return the carry after the last.

    Args:
        step: a pure function from a carry to a carry; it never writes to its argument.
        carry: the first.
        count: the largest number of steps.
        observe: called with the carry after every step; true ends the loop. It must copy what it
            keeps.
        engine: ``loop``, ``graph`` (a CUDA graph), ``replay`` (a plan, on a CPU), or ``auto``: a
            graph on a CUDA device, a plan on a CPU, each where the step can be captured, else the
            loop. On a CUDA device a warning says once for a model why not.
        model: what graphs and plans are kept for.
        key: what the step depends on besides the model and the shapes and dtypes of the carry.

    Raises:
        NotCapturableError: ``engine="graph"`` or ``"replay"`` for a step that cannot be captured.
    """
    device = next(tensors(carry)).device
    unfit = None if engine == "loop" else _unfit(engine, device, model)
    if unfit is not None and engine != "auto":
        raise NotCapturableError(unfit)
    if engine == "loop" or unfit is not None or count < 2:
        return _loop(step, carry, count, observe)
    key = _full_key(key, carry)
    if engine == "auto" and (
        count < _worthwhile(device, key in _graphs.get(model, ())) or key in _refused.get(model, ())
    ):
        return _loop(step, carry, count, observe)
    carry, trace = record(step, carry)
    if observe(carry):
        return carry
    try:
        found = prepared(model, key, step, carry, trace)
    except NotCapturableError as error:
        if engine != "auto":
            raise
        if model not in _refused and _on_cuda(device):
            warnings.warn(f"generation runs without a CUDA graph: {error}", stacklevel=3)
        _refused.setdefault(model, set()).add(key)
        return _loop(step, carry, count - 1, observe)
    if isinstance(found, Plan):
        return found.run(carry, count - 1, observe)
    return _replay(found, step, carry, count - 1, observe)


def _replay(graph: Graph, step: Step, carry: Any, count: int, observe: Observe) -> Any:
    if not graph.lock.acquire(blocking=False):  # in use by another thread, or by an observer
        return _loop(step, carry, count, observe)
    try:
        graph.load(carry)
        for _ in range(count):
            graph.replay()
            if observe(graph.carry):
                break
        return graph.snapshot()
    finally:
        graph.lock.release()


def _unfit(engine: str, device: torch.device, model: Any) -> str | None:
    """Return why steps cannot be captured, whatever they do, or None."""
    if _on_cuda(device):
        return 'engine = "replay" on cuda, expected a CPU' if engine == "replay" else None
    if engine == "graph":
        return f'engine = "graph" on {device}, expected a CUDA device'
    if device.type != "cpu":
        return f'engine = "{engine}" on {device}, expected a CPU'
    if not isinstance(model, nn.Module):
        return f"a {type(model).__name__} is no nn.Module, its steps may be any Python"
    if any(hooked(module) or "step" in vars(module) for module in model.modules()):
        return "the model has hooks, or a step of its own, which a replay would not call"
    if torch.is_grad_enabled() or autocasting(device) or transform_active() or dispatch_observed():
        return "gradients, autocast, a transform, a mode or a profiler look at each step"
    return None


def _full_key(key: Hashable, carry: Any) -> Hashable:
    """Return what a step depends on: the key, the carry's layout, and what PyTorch is set to."""
    kinds = ((tuple(t.shape), t.dtype, t.device) for t in tensors(carry))
    # buffers made in inference mode cannot be written to outside of it
    return (
        key, torch.is_inference_mode_enabled(), torch.get_default_dtype(), cpu.in_force(), *kinds,
    )  # fmt: skip


def _worthwhile(device: torch.device, kept: bool) -> int:
    if _on_cuda(device):
        return 0 if kept else WORTHWHILE
    return WORTHWHILE if kept else WORTHWHILE_ON_CPU


def _on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _loop(step: Step, carry: Any, count: int, observe: Observe) -> Any:
    for _ in range(count):
        carry = step(carry)
        if observe(carry):
            break
    return carry
