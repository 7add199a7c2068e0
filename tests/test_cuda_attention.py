"""Attention on a GPU: what it is on a CPU, without waiting for the device, and in a CUDA graph.

Run with ``pytest -m cuda tests/test_cuda_attention.py`` on a machine that has a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrnnx_nn import Attention

pytestmark = pytest.mark.cuda
H, L, CAPACITY = 32, 40, 64
WINDOWS = [None, 8]
every_window = pytest.mark.parametrize("window", WINDOWS)


def pair(window: int | None, **options: Any) -> tuple[Attention, Attention]:
    """Return the same attention on the CPU in float64, and on the GPU in float32."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_heads": 8, "n_kv_heads": 2, "head_dim": 8, "rotary": 0.5}
    here = Attention(H, **sizes, window=window, bias=True, dtype=torch.float64, **options).eval()
    there = Attention(H, **sizes, window=window, bias=True, device="cuda", **options).eval()
    there.load_state_dict(here.state_dict())
    return here, there


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got.double().cpu(), want.double().cpu(), rtol=0, atol=tolerance)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make every synchronisation with the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# torch says that its watch over synchronisation is a prototype
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@every_window
@pytest.mark.parametrize("capacity", [None, CAPACITY])
def test_the_gpu_gives_what_the_cpu_gives_and_never_waits(
    window: int | None, capacity: int | None
) -> None:
    here, there = pair(window)
    u = normal(3, L, H)
    lengths = torch.tensor([L, 0, 7])
    mask = normal(3, L, seed=3) > -0.5
    reset = normal(3, L, seed=4) > 1.0
    sequences: list[dict[str, Tensor]] = [
        {}, {"lengths": lengths}, {"mask": mask, "reset": reset},
        {"lengths": lengths, "reset": reset},
    ]  # fmt: skip
    for given in sequences:
        on_device, x = {k: v.cuda() for k, v in given.items()}, u.cuda()
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 5e-2)):
            module = there.to(dtype)
            with torch.no_grad(), no_waiting():
                whole = module(x, **on_device)
                state = module.init_state((3,), capacity=capacity)
                y, state = module.prefill(x, state, **on_device)
                last, state = module.step(x[:, 0], state)
            begun = here.init_state((3,), capacity=capacity)
            want, after = here.prefill(u.double(), begun, **given)
            close(whole, want, tolerance)
            close(y, want, tolerance)
            close(last, here.step(u[:, 0].double(), after)[0], tolerance)
        there.float().load_state_dict(here.state_dict())


@every_window
def test_gradients_are_those_of_the_cpu(window: int | None) -> None:
    here, there = pair(window)
    u, mask = normal(2, L, H), normal(2, L, seed=3) > -0.5
    found = []
    for net, x in ((here, u.double()), (there, u.cuda())):
        x = x.requires_grad_()
        y = net(x, mask=mask.to(x.device)).sin().sum() + net(x).sum()
        found.append(torch.autograd.grad(y, (x, *net.parameters())))
    for want, got in zip(*found, strict=True):
        close(got, want, 1e-5 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_window
def test_deterministic_algorithms_give_the_same_gradients(
    window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    net = Attention(128, n_heads=4, n_kv_heads=2, window=window, device="cuda", dtype=dtype)
    u = normal(2, 700, 128).cuda().requires_grad_()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        first, *more = (
            torch.autograd.grad(net(u).square().sum(), (u, *net.parameters())) for _ in range(4)
        )
    finally:
        torch.use_deterministic_algorithms(before)
    for other in more:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of cuBLAS in a new thread
@every_window
def test_decoding_in_a_graph_is_decoding(window: int | None) -> None:
    _, net = pair(window)
    u = normal(2, L, H).cuda()
    with torch.no_grad():
        want = net(u)
        _, state = net.prefill(u[:, :10], net.init_state((2,), capacity=CAPACITY))
        u_t = u[:, 10].clone()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            net.step(u_t, state)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y_t, new = net.step(u_t, state)
        for t in range(10, L):
            u_t.copy_(u[:, t])
            graph.replay()
            close(y_t, want[:, t])
            pytree.tree_map(lambda old, n: old.copy_(n), state, new)


def test_past_its_capacity_a_ring_is_a_window() -> None:
    _, plain = pair(None)
    _, windowed = pair(8)
    u = normal(2, L, H).cuda()
    with torch.no_grad():
        want = windowed(u)
        for k in (0, 5, 20):
            y, state = plain.prefill(u[:, :k], plain.init_state((2,), capacity=8))
            rest, state = plain.prefill(u[:, k:-3], state)
            ys = [y, rest]
            for t in range(L - 3, L):
                y, state = plain.step(u[:, t], state)
                ys.append(y[:, None])
            close(torch.cat(ys, 1), want)
