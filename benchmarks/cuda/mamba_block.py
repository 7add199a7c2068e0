# SPDX-License-Identifier: MIT
"""Time a Mamba block on a GPU: the layer, the residual block around it, and their parts.

    python -m benchmarks.cuda.mamba_block [--json FILE] [--quick]

The layer is `lrnnx_nn.Mamba`, two projections and what is between them, with gradients of u and of
all parameters: captured in a CUDA graph, and `eager ...`. The residual block adds the sum and the
norm; two of them in a stack show what a block costs inside a network. Launches are counted by the
profiler. Parts are run alone, on contiguous inputs of their own. The floor is the bytes of input
and output, and backward of the input and both gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cuda import timing
from benchmarks.cuda.timing import Row, Session, relative_error
from lrnnx_core.ops import causal_conv1d, selective_scan
from lrnnx_core.ops.add_norm import add_norm
from lrnnx_nn import Mamba, ResidualBlock, Stack

BATCH, LENGTH, WIDTH = 8, 4096, 1024
STATES = 16


def launches(session: Session, f: Callable[[], Any]) -> float:
    """Return how many kernels, copies and fills a call puts on the GPU; NaN without one."""
    if session.device == "cpu":
        return float("nan")
    f()
    session.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        f()
        session.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return float(sum(event.device_type == on_gpu for event in profile.events() or ()))


def whole(session: Session, module: nn.Module, u: Tensor) -> Row:
    """Time a Module with gradients of its input and all parameters, and count its launches."""
    parameters = list(module.parameters())
    x = u.detach().clone().requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return module(u)

    g = session.random(*forward().shape, dtype=forward().dtype, seed=1)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x), [x, *parameters], g)

    found = {"error": relative_error(forward()[:1], exact(module, u[:1]))}
    found["forward"], found["both"] = session.graph_ms(forward), session.graph_ms(both)
    found["eager forward"] = session.median_ms(forward)
    found["eager both"] = session.median_ms(both)
    found["launches forward"] = launches(session, forward)
    found["launches both"] = launches(session, both)
    return found | {"peak_mib": session.peak_mib(both)}


def exact(module: nn.Module, u: Tensor) -> Tensor:
    """Return a Module's output in float64."""
    values = {k: v.detach().double() for k, v in module.state_dict().items()}
    with torch.no_grad():
        return torch.func.functional_call(module, values, (u.double(),))


def part(
    session: Session, f: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> Row:
    """Time one operator on inputs of its own, with gradients of all of them."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]

    def outputs(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found = f(*tensors)
        return (found,) if isinstance(found, Tensor) else found

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return outputs(inputs)

    first = forward()
    g = [session.random(*y.shape, dtype=y.dtype, seed=i) for i, y in enumerate(first)]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs(leaves), leaves, g)

    with torch.no_grad():
        want = outputs([t.double() for t in inputs])[-1]
    return {
        "forward": session.graph_ms(forward),
        "both": session.graph_ms(both),
        "error": relative_error(first[-1], want),
    }


def measure(session: Session) -> None:
    """Measure every case."""
    batch, length, width = (2, 40, 16) if session.tiny else (BATCH, LENGTH, WIDTH)
    place: dict[str, Any] = {"device": session.device, "dtype": torch.bfloat16}
    shape = f"d_model {width} B{batch} L{length} bf16"
    torch.manual_seed(0)
    u = session.random(batch, length, width, dtype=torch.bfloat16)
    stream = u.float()

    def floors(*tensors: Tensor) -> list[float]:
        return [session.floor_ms(n * sum(t.nbytes for t in tensors)) for n in (1, 2.5)]

    def mixer() -> Mamba:  # cast as users cast a model: A, D and the bias of dt stay float32
        return Mamba(width, STATES, device=session.device).to(torch.bfloat16)

    layer = mixer()
    session.case(f"layer {shape}", floors(u, u), partial(whole, session, layer, u))
    blocks = [ResidualBlock(width, mixer(), **place) for _ in range(2)]
    for name, module in (("block", blocks[0]), ("two blocks", Stack(blocks))):
        session.case(
            f"{name} {shape}", floors(stream, stream), partial(whole, session, module, stream)
        )

    inner, rank = 2 * width, dict(layer.named_parameters())["dt_proj.weight"].shape[1]

    def number(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
        return session.random(*shape, dtype=dtype, seed=seed)

    v, z = (number(batch, length, inner, seed=i) for i in range(2))
    parts = number(batch, length, rank + 2 * STATES, seed=3)
    weights = {
        "in_proj": (u, number(2 * inner, width) / width**0.5),
        "x_proj": (v, number(rank + 2 * STATES, inner) / inner**0.5),
        "dt_proj": (parts[..., :rank], number(inner, rank) / rank**0.5),
        "out_proj": (v, number(width, inner) / inner**0.5),
    }
    for name, (x, weight) in weights.items():
        y = x.new_empty(*x.shape[:-1], weight.shape[0], device="meta")
        session.case(f"{name} {shape}", floors(x, y), partial(part, session, F.linear, (x, weight)))

    def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, activation="silu")[0]

    taps = (v, number(inner, 1, 4) / 2, number(inner, seed=2) / 2)
    session.case(f"convolution {shape}", floors(v, v), partial(part, session, conv, taps))

    def scan(v: Tensor, dt: Tensor, A: Tensor, *rest: Tensor) -> Tensor:
        return selective_scan(v, dt, -A.exp(), *rest, softplus=True)[0]

    single = torch.float32
    arguments = (
        v, number(batch, length, inner, seed=4), number(inner, STATES, dtype=single) / 4,
        *parts[..., rank:].split(STATES, -1), number(inner, dtype=single), z,
        number(inner, dtype=single, seed=5) - 4,
    )  # fmt: skip
    session.case(f"scan {shape}", floors(v, v, v, v), partial(part, session, scan, arguments))

    def norm(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(x, branch, weight, None, 1e-6, layer=False, dtype=branch.dtype)

    session.case(
        f"sum and norm {shape}", floors(stream, stream, u, u),
        partial(part, session, norm, (stream, u, number(width, seed=6))),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(timing.main(__doc__, measure))
