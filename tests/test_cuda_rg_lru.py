"""The CUDA kernels of the RG-LRU: the operator's test suite on a GPU, and more.

Run with ``pytest -m cuda tests/test_cuda_rg_lru.py`` on a machine that has a GPU and CuPy.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import test_rg_lru_scan
import torch
from test_rg_lru_scan import *  # noqa: F403  # every test of the operator, collected again here
from test_rg_lru_scan import FIELDS, FLAGS, OPTIONS, arguments
from torch import Tensor

from lrnnx_core.backends import blocked_rg_lru, cuda, cuda_rg_lru
from lrnnx_core.models import rglru

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]
DTYPES = tuple(cuda_rg_lru.PLANS)
GRADIENTS = FIELDS[:8]

# These are about the CPU, or about no device; the loop over numbers would take minutes on a GPU.
for _name in (
    "test_every_backend_is_the_loop",
    "test_autocast_changes_nothing",
    "test_bad_arguments_are_named",
):
    if getattr(test_rg_lru_scan, _name, None) is None:
        raise RuntimeError(f"{_name} is gone from test_rg_lru_scan.py")
    globals().pop(_name, None)


def problem(
    *shape: int, dtype: torch.dtype, optional: tuple[str, ...] = OPTIONS
) -> list[Tensor | None]:
    """Return the leaf's arguments."""
    named = arguments(*shape, dtype=dtype, optional=optional)
    return [named.get(n) for n in FIELDS]


def exact(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.bool else x.double()


def cotangents(x: Tensor, state: torch.dtype) -> tuple[Tensor, Tensor]:
    named = arguments(*x.shape, dtype=torch.float64, seed=9)
    return named["x"].to(x.dtype), named["h0"].to(state)


def forward(backend: Any, inputs: list[Tensor | None], choices: tuple[bool, bool]) -> Any:
    return backend.rg_lru_scan(*inputs, *choices)


def backward(
    backend: Any,
    h: Tensor,
    g: tuple[Tensor, Tensor],
    inputs: list[Tensor | None],
    choices: tuple[bool, bool],
) -> tuple[Tensor, ...]:
    run = getattr(backend, "gradients", None) or backend.rg_lru_scan_backward
    return run(h, *g, *inputs, *choices)


def leaves(
    inputs: list[Tensor | None], choices: tuple[bool, bool] = (False, True)
) -> tuple[Tensor, ...]:
    """Return h, h_last and the gradients, with cotangents that the shape determines."""
    h, last = forward(cuda_rg_lru, inputs, choices)
    return h, last, *backward(cuda_rg_lru, h, cotangents(h, last.dtype), inputs, choices)


def error(got: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def check(inputs: list[Tensor | None], choices: tuple[bool, bool], what: object) -> None:
    """Compare with PyTorch in the same dtype, both against float64, from one h."""
    h, last = forward(cuda_rg_lru, inputs, choices)
    plain = forward(blocked_rg_lru, inputs, choices)
    g = cotangents(h, last.dtype)
    wide = [exact(t) for t in inputs]
    want = forward(blocked_rg_lru, wide, choices)
    ours = (h, last, *backward(cuda_rg_lru, plain[0], g, inputs, choices))
    plain = (*plain, *backward(blocked_rg_lru, plain[0], g, inputs, choices))
    exact_h, *exact_g = (t.double() for t in (plain[0], *g))
    want = (*want, *backward(blocked_rg_lru, exact_h, tuple(exact_g), wide, choices))
    for i, (x, p, w) in enumerate(zip(ours, plain, want, strict=True)):
        assert (x.dtype, x.shape) == (p.dtype, p.shape), (what, i)
        # what an exact result may differ by; float64 has nothing wider to be compared with
        floor = (16 if x.dtype == torch.float64 else 2) * torch.finfo(x.dtype).eps
        assert error(x, w) <= (2 if i < 2 else 3) * error(p, w) + floor, (what, i, error(x, w))


def steps_of_a_tile(dtype: torch.dtype) -> int:
    warps, _, _ = cuda_rg_lru._tile("backward", dtype, 1, cuda.limits(0).shared_per_block)
    return warps * cuda_rg_lru.PLANS[dtype].steps


CHOICES = list(itertools.product((False, True), (False, True)))
SETS = [(), ("input_bias", "recurrent_bias", "h0"), FLAGS, OPTIONS[:4], OPTIONS]


def test_the_kernels_are_in_force() -> None:
    assert cuda.ready()
    launched: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.Kernel, "launch", lambda self, *rest: launched.append(self.entry))
        named = arguments(2, 9, 4, dtype=torch.float32)
        x = named.pop("x").requires_grad_()
        test_rg_lru_scan.rg_lru_scan(x, **named)[0].sum().backward()
    assert launched == ["rg_lru", "rg_lru_backward"]


@pytest.mark.parametrize("optional", SETS, ids=" ".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(
    dtype: torch.dtype, optional: tuple[str, ...]
) -> None:
    """Gradients three times; the error of a whole array, against float64."""
    sizes = ((9, 65), (130, 64), (1000, 34))
    for (length, width), choices in itertools.product(sizes, CHOICES):
        inputs = problem(2, length, width, dtype=dtype, optional=optional)
        check(inputs, choices, (length, width, choices))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_around_a_tile(dtype: torch.dtype) -> None:
    steps, t = cuda_rg_lru.PLANS[dtype].steps, steps_of_a_tile(dtype)
    lengths = {1, steps - 1, steps, steps + 1, t - 1, t, t + 1, 2 * t, 2 * t + 1, 35 * t + 5}
    for length in sorted(lengths):
        check(problem(length, 3, dtype=dtype), (False, True), length)


def test_decays_near_one_and_far_from_it() -> None:
    for rate in (1e-7, 1e-4, 0.3, 3.0, 60.0):
        inputs = problem(2, 3000, 32, dtype=torch.float32, optional=("h0",))
        inputs[FIELDS.index("rate")] = torch.full((32,), rate)
        check(inputs, (False, False), rate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twenty_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    """With other work on the chip, so that blocks meet each other in another order."""
    inputs = problem(2, 20_000, 96, dtype=dtype)
    first, noise = leaves(inputs), torch.randn(1024, 1024)
    side = torch.cuda.Stream()
    for i in range(20):
        with torch.cuda.stream(side):
            for _ in range(i):
                noise = torch.tanh(noise @ noise)
        assert all(torch.equal(x, y) for x, y in zip(first, leaves(inputs), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_strides_of_zero_and_misaligned_storage(dtype: torch.dtype) -> None:
    inputs = problem(3, 200, 8, dtype=dtype)
    want = leaves(inputs)

    def same(changed: list[Tensor | None], expected: tuple[Tensor, ...] = want) -> None:
        got = leaves(changed)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))

    x, input_gate, recurrent_gate, *rest = inputs
    together = torch.cat([x, input_gate, recurrent_gate], -1)  # as a projection gives them
    same([*together.chunk(3, -1), *rest])
    for offset in (1, 3):
        moved = torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)
        same([moved, input_gate, recurrent_gate, *rest])
    same([x.mT.contiguous().mT, input_gate, recurrent_gate, *rest])
    h, last = want[:2]
    one, zeros = torch.ones((), dtype=dtype), torch.zeros_like(last)
    found = [
        backward(cuda_rg_lru, h, (g, z), inputs, (False, True))
        for g, z in (
            (one.expand(h.shape), zeros[0, 0].expand(zeros.shape)),
            (torch.ones_like(h), zeros),
        )
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_batch_dimensions_that_do_not_merge_are_copied() -> None:
    inputs = problem(2, 3, 4, 50, 6, dtype=torch.float32)
    want = leaves(inputs)
    permuted = [t if t is None or t.ndim < 4 else t.transpose(0, 2).contiguous().transpose(0, 2)
                for t in inputs]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(leaves(permuted), want, strict=True))


def test_parameters_with_axes_of_a_vmap() -> None:
    inputs = problem(3, 2, 50, 6, dtype=torch.float32)
    stacked = [t if i not in (3, 4, 5) else torch.stack([t, 2 * t, 3 * t])
               for i, t in enumerate(inputs)]  # fmt: skip
    check(stacked, (False, True), "stacked")


def test_a_rows_result_does_not_depend_on_the_batch() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = problem(40, 777, 34, dtype=dtype)
        h, last = forward(cuda_rg_lru, inputs, (False, True))
        row = [t if i in (3, 4, 5) else t[7] for i, t in enumerate(inputs)]
        alone = forward(cuda_rg_lru, row, (False, True))
        assert torch.equal(alone[0], h[7])
        assert torch.equal(alone[1], last[7])
        column = [t if t.shape[-1] != 34 else t[..., 5:6] for t in inputs]
        alone = forward(cuda_rg_lru, column, (False, True))
        assert torch.equal(alone[0], h[..., 5:6])


def test_a_decode_step_is_one_launch_and_can_be_captured() -> None:
    inputs = problem(64, 1, 256, dtype=torch.bfloat16, optional=OPTIONS[:3])
    cuda_rg_lru.kernel.cache_clear()
    cuda_rg_lru._shape.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h, last = forward(cuda_rg_lru, inputs, (False, False))
    for seed in (11, 12):
        inputs[0].copy_(arguments(64, 1, 256, dtype=torch.bfloat16, seed=seed)["x"])
        graph.replay()
        want = forward(cuda_rg_lru, inputs, (False, False))
        assert torch.equal(h, want[0])
        assert torch.equal(last, want[1])
    launches: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.Kernel, "launch", lambda self, *rest: launches.append(self.entry))
        forward(cuda_rg_lru, inputs, (False, False))
    assert launches == ["rg_lru"]


def test_training_can_be_captured() -> None:
    inputs = problem(2, 700, 48, dtype=torch.float32)
    leaves(inputs)
    graph = torch.cuda.CUDAGraph()
    h, last = forward(cuda_rg_lru, inputs, (False, True))
    g = cotangents(h, last.dtype)
    with torch.cuda.graph(graph):
        h, last = forward(cuda_rg_lru, inputs, (False, True))
        found = backward(cuda_rg_lru, h, g, inputs, (False, True))
    inputs[0].mul_(-0.5)
    graph.replay()
    again = forward(cuda_rg_lru, inputs, (False, True))[0]
    assert torch.equal(h, again)
    want = backward(cuda_rg_lru, again, g, inputs, (False, True))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_the_model_on_the_gpu_is_the_model_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    params = rglru.init(16, 24, heads=3, generator=generator, device="cpu")
    u = torch.randn(2, 300, 16, generator=generator, device="cpu")
    reset = torch.zeros(2, 300, dtype=torch.bool, device="cpu")
    reset[:, 100] = True
    lengths = torch.tensor([300, 211], device="cpu")
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        own = {k: v.to(device, dtype).requires_grad_() for k, v in params.items()}
        y, state = rglru.scan(
            own, u.to(device, dtype), lengths=lengths.to(device), reset=reset.to(device)
        )
        loss = y.square().sum() + state.h.sum()
        grads = torch.autograd.grad(loss, list(own.values()))
        found.append([t.detach().cpu().double() for t in (y, state.h, *grads)])
    for want, got in zip(*found, strict=True):
        assert error(got, want) < 1e-5


def test_what_cannot_run_is_refused_before_a_launch() -> None:
    inputs = problem(2, 9, 4, dtype=torch.float32)
    wrong = list(inputs)
    wrong[6] = inputs[6].cpu()
    with pytest.raises(ValueError, match="a tensor is on cpu, x on cuda"):
        forward(cuda_rg_lru, wrong, (False, True))
    wrong[6] = inputs[6].double()
    with pytest.raises(ValueError, match=r"is torch\.float64, expected torch\.float32"):
        forward(cuda_rg_lru, wrong, (False, True))
    byte = inputs[0].to(torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"float8_e5m2 on CUDA, expected one of float32"):
        forward(cuda_rg_lru, [byte, *inputs[1:]], (False, True))
