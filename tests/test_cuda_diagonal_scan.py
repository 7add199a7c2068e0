"""The CUDA kernels of the diagonal scan: the operator's test suite on a GPU, and more.

Run with ``pytest -m cuda tests/test_cuda_diagonal_scan.py`` on a machine that has a GPU and CuPy.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_diagonal_scan
import torch
from test_diagonal_scan import *  # noqa: F403  # every test of the operator, collected again here
from test_diagonal_scan import FLAGS, NAMES, OPTIONS, arguments
from torch import Tensor

from lrnnx_core.backends import blocked_diagonal, cuda, cuda_diagonal
from lrnnx_core.models import event_ssm, s5

DTYPES = tuple(cuda_diagonal.PLANS)
FIELDS = ("x", "A", "steps", "dt", "h0", "integration_timesteps", "reset", "mask")
SEQUENCES = ("x", "dt", "integration_timesteps", *FLAGS)
RESULTS = ("h", "last", "dx", "dA", "dsteps", "ddt", "dh0", "dtimesteps")

# These are about the CPU, or about no device; the loop over numbers would take minutes on a GPU.
for _name in (
    "test_every_backend_is_the_loop",
    "test_autocast_changes_nothing",
    "test_bad_arguments_are_named",
):
    if getattr(test_diagonal_scan, _name, None) is None:
        raise RuntimeError(f"{_name} is gone from test_diagonal_scan.py")
    globals().pop(_name, None)

# The operator's suite runs with and without the compiled CPU backend, which does not matter here.
pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]


Problem = list[Tensor | None]
Choices = tuple[Any, ...]  # state_only, scheme, reverse if it is


def problem(
    *shape: int, dtype: torch.dtype, optional: tuple[str, ...] = OPTIONS, scheme: str = "zoh"
) -> Problem:
    """Return the leaf's arguments; those of ``none`` have a decay for A."""
    if scheme == "none":
        optional = tuple(n for n in optional if n in ("h0", *FLAGS))
    named = arguments(*shape, dtype=dtype, optional=optional)
    if scheme == "none":
        named["A"] = torch.exp(0.3 * named["A"])
    return [named.get(n) for n in FIELDS]


def exact(x: Tensor | None) -> Tensor | None:
    if x is None or x.dtype == torch.bool:
        return x
    return x.to(torch.complex128) if x.is_complex() else x.double()


def cotangents(inputs: Problem) -> tuple[Tensor, Tensor]:
    x, A = inputs[0], inputs[1]
    *batch, length, _ = x.shape
    named = arguments(*batch, length, A.shape[-1], dtype=torch.float64, optional=("h0",), seed=9)
    return named["x"].to(x.dtype), named["h0"].to(A.dtype)


def backward(
    backend: Any, h: Tensor, g: tuple[Tensor, Tensor], inputs: Problem, choices: Choices
) -> tuple[Tensor, ...]:
    run = getattr(backend, "gradients", None) or backend.diagonal_scan_backward
    return run(h, *g, *inputs, *choices)


def leaves(inputs: Problem, choices: Choices = (False, "zoh")) -> tuple[Tensor, ...]:
    """Return h, h_last and the gradients, with cotangents that the shape determines."""
    h, last = cuda_diagonal.diagonal_scan(*inputs, *choices)
    return h, last, *backward(cuda_diagonal, h, cotangents(inputs), inputs, choices)


def error(got: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    return float((exact(got) - expected).norm() / expected.norm().clamp(min=1e-30))


def check(inputs: Problem, choices: Choices, what: object) -> None:
    """Compare with PyTorch in the same dtype, both against float64, from one h."""
    h, last = cuda_diagonal.diagonal_scan(*inputs, *choices)
    plain = blocked_diagonal.diagonal_scan(*inputs, *choices)
    g = cotangents(inputs)
    wide: Problem = [exact(t) for t in inputs]
    want = blocked_diagonal.diagonal_scan(*wide, *choices)
    ours = (h, last, *backward(cuda_diagonal, plain[0], g, inputs, choices))
    exact_h, *exact_g = (exact(t) for t in (plain[0], *g))
    want = (*want, *backward(blocked_diagonal, exact_h, tuple(exact_g), wide, choices))
    plain = (*plain, *backward(blocked_diagonal, plain[0], g, inputs, choices))
    for i, (x, p, w) in enumerate(zip(ours, plain, want, strict=True)):
        assert (x.dtype, x.shape) == (p.dtype, p.shape), (what, RESULTS[i])
        # what an exact result may differ by; float64 has nothing wider to be compared with
        floor = (32 if w.dtype == x.dtype else 2 if i < 2 else 4) * torch.finfo(x.dtype).eps
        allowed = (2 if i < 2 else 3) * error(p, w) + floor
        assert error(x, w) <= allowed, (what, RESULTS[i], error(x, w), error(p, w))


def lengths_around_a_tile(dtype: torch.dtype, scheme: str) -> set[int]:
    choice = cuda_diagonal.Choice(dtype, scheme, scheme != "none", False)
    found: set[int] = {1}
    for step in ("forward", "backward"):
        steps = cuda_diagonal.plan_of(step, choice).steps
        warps, _, _ = cuda_diagonal._tile(step, choice, True, cuda.limits(0).shared_per_block)
        t = warps * steps
        found |= {steps - 1, steps, steps + 1, t - 1, t, t + 1, 2 * t, 2 * t + 1, 35 * t + 5}
    return found


SETS = [
    (),
    ("h0", *FLAGS),
    ("steps", "h0"),
    ("dt", "mask"),
    ("steps", *OPTIONS),
    ("dt", *OPTIONS),
    ("integration_timesteps",),
]


def test_the_kernels_are_in_force() -> None:
    assert cuda.ready()
    launched: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.Kernel, "launch", lambda self, *rest: launched.append(self.entry))
        named = arguments(2, 9, 4, dtype=torch.float32, optional=("steps",))
        x = named["x"].requires_grad_()
        test_diagonal_scan.run(named | {"x": x}, "zoh")[0].sum().backward()
    assert launched == ["diagonal_scan", "diagonal_scan_backward", "diagonal_sums"]


@pytest.mark.parametrize("optional", SETS, ids=" ".join)
@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(
    dtype: torch.dtype, scheme: str, optional: tuple[str, ...]
) -> None:
    """Gradients three times; the error of a whole array, against float64."""
    if scheme == "none" and set(optional) - {"h0", *FLAGS}:
        return
    for length, size in ((9, 65), (130, 64), (1000, 12)):
        inputs = problem(3, length, size, dtype=dtype, optional=optional, scheme=scheme)
        for state_only in (False, True) if "integration_timesteps" in optional else (False,):
            check(inputs, (state_only, scheme), (length, size, state_only))
        check(inputs, (False, scheme, True), (length, size, "reverse"))


@pytest.mark.parametrize("scheme", ["none", "zoh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_around_a_tile(dtype: torch.dtype, scheme: str) -> None:
    for length in sorted(lengths_around_a_tile(dtype, scheme)):
        for reverse in (False, True):
            inputs = problem(length, 3, dtype=dtype, scheme=scheme)
            check(inputs, (False, scheme, reverse), (length, reverse))


@pytest.mark.parametrize("size", [1, 2, 5, 16, 31, 32, 33, 48, 70])
def test_widths_and_the_gradient_of_timesteps(size: int) -> None:
    """Groups of 32 rows meet the borders of batch elements in every way."""
    for batch in (1, 2, 7):
        inputs = problem(batch, 70, size, dtype=torch.float32, optional=("dt", *OPTIONS))
        check(inputs, (True, "zoh"), (batch, size))
        check(inputs, (False, "dirac"), (batch, size))
        check(inputs, (False, "zoh", True), (batch, size, "reverse"))


def test_decays_of_any_kind() -> None:
    for radius in (0.0, 0.5, 0.9999, 1.0, 1.001):
        inputs = problem(2, 3000, 32, dtype=torch.float32, optional=("h0",), scheme="none")
        phase = torch.linspace(0, 6.3, 32)
        inputs[1] = radius * torch.complex(phase.cos(), phase.sin())
        check(inputs, (False, "none"), radius)
    for step in (1e-6, 1e-3, 30.0):
        inputs = problem(2, 3000, 32, dtype=torch.float32, optional=("h0", "steps"))
        inputs[2] = torch.full((32,), step)
        for scheme in ("zoh", "bilinear", "mamba"):
            check(inputs, (False, scheme), (step, scheme))


def test_an_eigenvalue_of_zero() -> None:
    for optional in (("steps",), ("dt", "integration_timesteps")):
        inputs = problem(2, 100, 8, dtype=torch.float32, optional=optional)
        inputs[1] = torch.zeros_like(inputs[1])
        for scheme in ("zoh", "bilinear"):
            check(inputs, (False, scheme), (optional, scheme))


@pytest.mark.parametrize("scheme", ["none", "zoh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twenty_runs_give_the_same_bits(dtype: torch.dtype, scheme: str) -> None:
    """With other work on the chip, so that blocks meet each other in another order."""
    inputs = problem(3, 20_000, 48, dtype=dtype, scheme=scheme)
    choices = (False, scheme)
    first, noise = leaves(inputs, choices), torch.randn(1024, 1024)
    side = torch.cuda.Stream()
    for i in range(20):
        with torch.cuda.stream(side):
            for _ in range(i):
                noise = torch.tanh(noise @ noise)
        assert all(torch.equal(x, y) for x, y in zip(first, leaves(inputs, choices), strict=True))


def test_a_million_steps() -> None:
    inputs = problem(2**20 + 1, 2, dtype=torch.float32, optional=("h0", "steps"))
    check(inputs, (False, "zoh"), "a million")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_strides_of_zero_and_misaligned_storage(dtype: torch.dtype) -> None:
    inputs = problem(3, 200, 8, dtype=dtype, optional=("dt", *OPTIONS))
    want = leaves(inputs)

    def same(**changed: Tensor) -> None:
        got = leaves([changed.get(n, t) for n, t in zip(FIELDS, inputs, strict=True)])
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))

    x, dt = inputs[0], inputs[3]
    same(x=torch.cat([x, x], -1)[..., 16:])
    same(x=torch.stack([x, x], -1)[..., 0])
    same(dt=torch.cat([dt, dt], -1)[..., 8:])
    for offset in (1, 3):
        same(x=torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape))
        same(dt=torch.cat([dt.new_zeros(offset), dt.flatten()])[offset:].view(dt.shape))
    same(x=x.mT.contiguous().mT)
    same(**{n: t.transpose(0, 1).contiguous().transpose(0, 1)
            for n, t in zip(FIELDS, inputs, strict=True) if n in SEQUENCES[2:]})  # fmt: skip
    h, last = want[:2]
    one, zeros = torch.ones((), dtype=dtype), torch.zeros_like(last)
    found = [
        backward(cuda_diagonal, h, (g, z), inputs, (False, "zoh"))
        for g, z in (
            (one.expand(h.shape), zeros[0, 0].expand(zeros.shape)),
            (torch.ones_like(h), zeros),
        )
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reverse_is_the_flipped_sequence_to_the_bit(dtype: torch.dtype) -> None:
    inputs = problem(3, 333, 40, dtype=dtype, optional=("dt", *OPTIONS))
    flipped = [t.flip(1) if n in SEQUENCES else t for n, t in zip(FIELDS, inputs, strict=True)]
    g, g_last = cotangents(inputs)
    h, last = cuda_diagonal.diagonal_scan(*inputs, False, "zoh", True)
    found = backward(cuda_diagonal, h, (g, g_last), inputs, (False, "zoh", True))
    want_h, want_last = cuda_diagonal.diagonal_scan(*flipped, False, "zoh")
    want = backward(cuda_diagonal, want_h, (g.flip(1), g_last), flipped, (False, "zoh"))
    assert torch.equal(h, want_h.flip(1))
    assert torch.equal(last, want_last)
    for name, got, other in zip(RESULTS[2:], found, want, strict=True):
        assert torch.equal(got, other.flip(1) if name in ("dx", "ddt", "dtimesteps") else other)


def test_batch_dimensions_that_do_not_merge_are_copied() -> None:
    inputs = problem(2, 3, 4, 50, 6, dtype=torch.float32)
    want = leaves(inputs)
    permuted = [t if t is None or t.ndim < 4 else t.transpose(0, 2).contiguous().transpose(0, 2)
                for t in inputs]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(leaves(permuted), want, strict=True))


@pytest.mark.parametrize("optional", [("steps",), ("steps", *OPTIONS)], ids=" ".join)
def test_parameters_with_axes_of_a_vmap(optional: tuple[str, ...]) -> None:
    inputs = problem(3, 2, 50, 6, dtype=torch.float32, optional=optional)
    stacked = [torch.stack([t, 2 * t, 3 * t]) if i in (1, 2) else t for i, t in enumerate(inputs)]
    check(stacked, (False, "zoh"), "stacked")
    shared = [t.expand(3, 6) if i in (1, 2) else t for i, t in enumerate(inputs)]
    check(shared, (True, "mamba"), "expanded")


@pytest.mark.parametrize("scheme", ["none", "zoh"])
def test_a_rows_result_does_not_depend_on_the_batch(scheme: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = problem(40, 777, 34, dtype=dtype, scheme=scheme)
        h, last = cuda_diagonal.diagonal_scan(*inputs, False, scheme)
        row = [t if i in (1, 2) or t is None else t[7] for i, t in enumerate(inputs)]
        alone = cuda_diagonal.diagonal_scan(*row, False, scheme)
        assert torch.equal(alone[0], h[7])
        assert torch.equal(alone[1], last[7])
        x, A, h0 = inputs[0], inputs[1], inputs[4]
        column: Problem = [x[..., [5, 39]], A[5:6], None, None, h0[..., 5:6], *inputs[5:]]
        alone = cuda_diagonal.diagonal_scan(*column, False, scheme)
        assert torch.equal(alone[0], h[..., [5, 39]])


def test_training_can_be_captured() -> None:
    inputs = problem(2, 700, 48, dtype=torch.float32, optional=("steps", "h0"))
    cuda_diagonal._shape.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h, last = cuda_diagonal.diagonal_scan(*inputs, False, "zoh")
        found = backward(cuda_diagonal, h, (inputs[0], last), inputs, (False, "zoh"))
    inputs[0].mul_(-0.5)
    graph.replay()
    again, end = cuda_diagonal.diagonal_scan(*inputs, False, "zoh")
    assert torch.equal(h, again)
    want = backward(cuda_diagonal, again, (inputs[0], end), inputs, (False, "zoh"))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("model", [s5, event_ssm], ids=["s5", "event_ssm"])
def test_a_model_on_the_gpu_is_the_model_on_the_cpu(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    params = model.init(16, 24, generator=generator, device="cpu")
    u = torch.randn(2, 300, 16, generator=generator, device="cpu")
    elapsed = torch.rand(2, 300, generator=generator, device="cpu")
    reset = torch.zeros(2, 300, dtype=torch.bool, device="cpu")
    reset[:, 100] = True
    for timesteps in (None, elapsed):
        found = []
        for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
            own = {k: v.to(device, dtype).requires_grad_() for k, v in params.items()}
            y, state = model.scan(
                own, u.to(device, dtype), mode="scan", reset=reset.to(device),
                integration_timesteps=None if timesteps is None else timesteps.to(device, dtype),
            )  # fmt: skip
            loss = y.square().sum() + state.abs().square().sum()
            grads = torch.autograd.grad(loss, list(own.values()))
            found.append([exact(t.detach().cpu()) for t in (y, state, *grads)])
        for want, got in zip(*found, strict=True):
            assert error(got, want) < 4e-5  # three times what plain torch has: log_dt cancels


def test_what_cannot_run_is_refused_before_a_launch() -> None:
    inputs = problem(2, 9, 4, dtype=torch.float32)
    wrong = list(inputs)
    wrong[4] = inputs[4].cpu()
    with pytest.raises(ValueError, match="a tensor is on cpu, x on cuda"):
        cuda_diagonal.diagonal_scan(*wrong, False, "zoh")
    wrong[4] = inputs[4].to(torch.complex128)
    with pytest.raises(ValueError, match=r"is torch\.complex128, expected torch\.complex64"):
        cuda_diagonal.diagonal_scan(*wrong, False, "zoh")
    byte = inputs[0].to(torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"float8_e5m2 on CUDA, expected one of float32"):
        cuda_diagonal.diagonal_scan(byte, *inputs[1:], False, "zoh")
