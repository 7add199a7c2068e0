"""The operator `diagonal_scan` against a loop over single numbers, and what it takes.

Derivatives under every transform are the business of `test_transform_table.py`.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_both import both_backends  # noqa: F401
from torch import Tensor

from lrnnx_core.backends import blocked_diagonal
from lrnnx_core.ops import diagonal_scan
from lrnnx_core.ops.diagonal_scan import NAMES

pytestmark = pytest.mark.usefixtures("both_backends")
F32, F64, C64, C128 = torch.float32, torch.float64, torch.complex64, torch.complex128
FLAGS = ("reset", "mask")
STEPS = ("steps", "dt")
OPTIONS = ("h0", "integration_timesteps", *FLAGS)


def arguments(
    *shape: int, optional: tuple[str, ...] = OPTIONS, dtype: torch.dtype = F64, seed: int = 0
) -> dict[str, Tensor]:
    """Draw arguments for a drive of ``shape``, (..., L, S) complex, on the default device."""
    generator = torch.Generator().manual_seed(seed)
    *batch, length, size = shape
    state = torch.promote_types(dtype, F32)

    def draw(*size: int, kind: torch.dtype = state) -> Tensor:
        x = torch.randn(*size, generator=generator, dtype=F64, device="cpu")
        return x.to(kind).to(torch.get_default_device())

    extra: dict[str, Callable[[], Tensor]] = {
        "steps": lambda: 0.01 + draw(size).abs(),
        "dt": lambda: 0.01 + draw(*batch, length, size).abs(),
        "h0": lambda: torch.complex(draw(*batch, size), draw(*batch, size)),
        "integration_timesteps": lambda: draw(*batch, length).abs(),
        "reset": lambda: draw(*batch, length) > 1.2,
        "mask": lambda: draw(*batch, length) > -1,
    }
    found = {
        "x": draw(*batch, length, 2 * size, kind=dtype),
        "A": torch.complex(-0.05 - 0.4 * draw(size).abs(), draw(size)),
    }
    return found | {n: extra[n]() for n in optional}


def run(named: dict[str, Tensor], scheme: str, **choices: Any) -> tuple[Tensor, Tensor]:
    """Call the operator with ``steps`` in the place of dt where given."""
    named = dict(named)
    if "steps" in named:
        named["dt"] = named.pop("steps")
    return diagonal_scan(**named, discretization=scheme, **choices)


def coefficients(scheme: str, A: complex, dd: float, di: float) -> tuple[complex, complex]:
    if scheme == "none":
        return A, 1
    if scheme == "bilinear":
        return (1 + dd * A / 2) / (1 - dd * A / 2), di / (1 - di * A / 2)
    gain = {"dirac": 1, "mamba": di, "zoh": (cmath.exp(di * A) - 1) / A}[scheme]
    return cmath.exp(dd * A), gain


def loop(
    x: Tensor,
    A: Tensor,
    *,
    scheme: str,
    timestep_mode: str,
    steps: Tensor | None = None,
    dt: Tensor | None = None,
    h0: Tensor | None = None,
    integration_timesteps: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute every number of x (L, 2S) by itself."""
    length, size = x.shape[0], A.shape[0]
    hs, last = torch.empty_like(x), torch.empty(size, dtype=A.dtype)
    for s in range(size):
        h = 0 if h0 is None else complex(h0[s])
        for t in range(length):
            if reset is not None and bool(reset[t]):
                h = 0
            if mask is None or bool(mask[t]):
                d = 1.0 if steps is None else float(steps[s])
                d = d if dt is None else float(dt[t, s])
                tau = 1.0 if integration_timesteps is None else float(integration_timesteps[t])
                di = d if timestep_mode == "state_only" else tau * d
                a, gamma = coefficients(scheme, complex(A[s]), tau * d, di)
                h = a * h + gamma * complex(float(x[t, s]), float(x[t, size + s]))
            hs[t, s], hs[t, size + s] = complex(h).real, complex(h).imag
        last[s] = h
    return hs, last


def subsets(scheme: str) -> list[tuple[str, ...]]:
    found = [(), ("h0",), ("reset",), ("mask",), ("h0", *FLAGS)]
    if scheme == "none":
        return found
    timed = [("integration_timesteps",), OPTIONS]
    steps = [(s, *rest) for s in STEPS for rest in (("h0",), *timed, ("mask",))]
    return [*found[:1], *timed, *steps]


def every(call: Callable[..., None]) -> Any:
    cases = [
        pytest.param(scheme, mode, optional, id=f"{scheme} {mode} {' '.join(optional)}")
        for scheme in NAMES
        for mode in ("both", "state_only")
        for optional in subsets(scheme)
        if mode == "both" or "integration_timesteps" in optional
    ]
    return pytest.mark.parametrize(("scheme", "mode", "optional"), cases)(call)


@every
def test_every_backend_is_the_loop(scheme: str, mode: Any, optional: tuple[str, ...]) -> None:
    named = arguments(2, 9, 3, optional=optional)
    for backend in ("auto", "reference"):
        h, last = run(named, scheme, timestep_mode=mode, backend=backend)
        for row in range(2):
            own = {n: t[row] if t.ndim > 1 else t for n, t in named.items()}
            want, end = loop(**own, scheme=scheme, timestep_mode=mode)
            torch.testing.assert_close(h[row], want, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(last[row], end, rtol=1e-12, atol=1e-13)


@every
def test_the_fused_gradients_are_those_of_the_loop(
    scheme: str, mode: Any, optional: tuple[str, ...]
) -> None:
    named = arguments(2, 40, 3, optional=optional)
    inputs = [t.requires_grad_() for t in named.values() if t.dtype != torch.bool]
    found = []
    for backend in ("auto", "reference"):
        h, last = run(named, scheme, timestep_mode=mode, backend=backend)
        loss = h.sin().sum() + last.real.cos().sum() + last.imag.square().sum()
        found.append(torch.autograd.grad(loss, inputs))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scheme", NAMES)
def test_reverse_is_the_flipped_sequence(scheme: str) -> None:
    steady = ("h0", *FLAGS)
    for optional in (steady,) if scheme == "none" else (steady, OPTIONS, ("dt", *OPTIONS)):
        named = arguments(2, 9, 3, optional=optional)
        inputs = [t.requires_grad_() for t in named.values() if t.dtype != torch.bool]
        flipped = {n: t.flip(1) if t.ndim > 1 and n != "h0" else t for n, t in named.items()}
        found = []
        for given, reverse in ((named, True), (flipped, False)):
            for backend in ("auto", "reference"):
                h, last = run(given, scheme, reverse=reverse, backend=backend)
                h = h if reverse else h.flip(1)
                loss = (h.sin() * torch.arange(9).unsqueeze(-1)).sum() + last.abs().sum()
                found.append((h, last, *torch.autograd.grad(loss, inputs, retain_graph=True)))
        for other in found[1:]:
            for got, want in zip(other, found[0], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scheme", NAMES)
def test_gradcheck_of_everything_at_once(scheme: str) -> None:
    for steps in ((), ("steps",), ("dt",)) if scheme != "none" else ((),):
        chosen = (*OPTIONS, *steps) if scheme != "none" else ("h0", *FLAGS)
        named = arguments(2, 5, 2, optional=chosen)
        names = [n for n in named if n not in FLAGS]

        def call(*tensors: Tensor, named: Any = named, names: Any = names) -> Any:
            return run(named | dict(zip(names, tensors, strict=True)), scheme)

        inputs = tuple(named[n].requires_grad_() for n in names)
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 257])
@pytest.mark.parametrize("size", [1, 5, 64])
def test_lengths_and_widths(length: int, size: int) -> None:
    named = arguments(3, length, size, optional=("steps", *OPTIONS))
    for scheme in ("none", "zoh"):
        used = named
        if scheme == "none":
            used = {n: named[n] for n in ("x", "h0", *FLAGS)}
            used["A"] = torch.exp(named["A"].detach())
        inputs = [t.requires_grad_() for t in used.values() if t.dtype != torch.bool]
        found = []
        for backend in ("auto", "reference"):
            h, last = run(used, scheme, backend=backend)
            grads = torch.autograd.grad(h.sin().sum() + last.abs().sum(), inputs)
            found.append((h, last, *grads))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def test_any_split_is_the_whole() -> None:
    named = arguments(3, 11, 4, optional=("dt", *OPTIONS))
    whole, last = run(named, "zoh")
    timed = {"x": -2, "dt": -2} | dict.fromkeys(("integration_timesteps", *FLAGS), -1)
    for k in range(12):
        cut = [
            {n: t.tensor_split([k], timed[n])[i] if n in timed else t for n, t in named.items()}
            for i in range(2)
        ]
        h, state = run(cut[0], "zoh")
        again, end = run(cut[1] | {"h0": state}, "zoh")
        torch.testing.assert_close(torch.cat([h, again], 1), whole, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, F64])
def test_dtypes_and_batch_axes(dtype: torch.dtype) -> None:
    named = arguments(2, 3, 30, 4, optional=("steps", *OPTIONS), dtype=dtype)
    named["h0"] = named["h0"][:1]
    named["integration_timesteps"] = named["integration_timesteps"][0, 0]
    h, last = run(named, "zoh")
    assert (h.shape, h.dtype) == ((2, 3, 30, 8), dtype)
    assert (last.shape, last.dtype) == ((2, 3, 4), torch.promote_types(dtype, C64))
    wide = {n: _widened(t) for n, t in named.items()}
    want, end = run(wide, "zoh", backend="reference")
    assert (h.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()
    assert (last.to(C128) - end).norm() <= 1e-6 * end.norm()
    inputs = [t.requires_grad_() for t in named.values() if t.dtype != torch.bool]
    h, last = run(named, "zoh")
    gradients = torch.autograd.grad(h.sum() + last.real.sum(), inputs)
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]


def _widened(t: Tensor) -> Tensor:
    return t.to(C128) if t.is_complex() else t if t.dtype == torch.bool else t.double()


def test_dtypes_may_differ() -> None:
    named = arguments(5, 3, optional=("steps", *OPTIONS), dtype=torch.bfloat16)
    h, last = run(named | {"A": named["A"].to(C128)}, "zoh")
    assert (h.dtype, last.dtype) == (torch.bfloat16, C128)
    h, last = run(named | {"h0": named["h0"].real}, "zoh")
    assert (h.dtype, last.dtype) == (torch.bfloat16, C64)


def test_no_steps_and_no_channels() -> None:
    named = arguments(2, 0, 3, optional=("steps", *OPTIONS))
    inputs = [t.requires_grad_() for t in named.values() if t.dtype != torch.bool]
    h, last = run(named, "zoh")
    assert h.shape == (2, 0, 6)
    torch.testing.assert_close(last, named["h0"])
    gradients = torch.autograd.grad(last.real.sum(), inputs, allow_unused=True)
    assert all(g is None or g.shape == x.shape for g, x in zip(gradients, inputs, strict=True))
    assert run(arguments(2, 3, 0), "zoh")[0].shape == (2, 3, 0)
    assert run(arguments(0, 3, 2), "zoh")[1].shape == (0, 2)


def test_gradients_that_are_views() -> None:
    """Upstream gradients without strides (a sum's) or with odd ones are met as they are."""
    named = arguments(2, 70, 5, optional=("steps", *OPTIONS))
    wide = torch.randn(2, 70, 20, dtype=F64)
    x = wide[..., 3:13].requires_grad_()
    h, last = run(named | {"x": x}, "mamba")
    for g in (torch.ones((), dtype=F64).expand_as(h), wide[..., ::2], wide.flip(1)[..., 7:17]):
        g_last = torch.ones((), dtype=C128).expand_as(last)
        got = torch.autograd.grad((h, last), (x,), (g, g_last), retain_graph=True)
        want = torch.autograd.grad(
            (h, last), (x,), (g.clone(), g_last.contiguous()), retain_graph=True
        )
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("given", [(), OPTIONS], ids=["least", "every"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("scheme", NAMES[1:])
def test_gradients_are_contiguous(scheme: str, step: str, given: tuple[str, ...]) -> None:
    """As their fake implementation says: what compiled code relies on."""
    named, optional = arguments(2, 9, 3, optional=(step, *given)), (*STEPS, *OPTIONS)
    rest = (named["A"], *(named.get(n) for n in optional), False, scheme, False)
    leaves = torch.ops.lrnnx_core
    h, last = leaves.diagonal_scan.default(named["x"], *rest)
    found = leaves.diagonal_scan_backward.default(h, h, last, named["x"], *rest)
    assert all(g.is_contiguous() for g in found)


def test_padding_may_hold_anything() -> None:
    named = arguments(2, 12, 3, optional=("dt", *OPTIONS))
    hole = ~named["mask"]
    dirty = named | {
        n: named[n].masked_fill(hole if named[n].ndim == 2 else hole.unsqueeze(-1), float("nan"))
        for n in ("x", "dt", "integration_timesteps")
    }
    results = []
    for given in (named, dirty):
        inputs = [given[n].requires_grad_() for n in given if n not in FLAGS]
        for backend in ("auto", "reference"):
            h, last = run(given, "zoh", backend=backend)
            grads = torch.autograd.grad(h.sin().sum() + last.real.sum(), inputs)
            results.append((h, last, *grads))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_a_reset_stops_what_is_not_finite() -> None:
    named = arguments(1, 9, 2, optional=("h0", "reset"))
    named["reset"] = torch.zeros(1, 9, dtype=torch.bool)
    named["reset"][0, 4] = True
    named["x"][0, 2] = float("inf")
    for backend in ("auto", "reference"):
        h, last = run(named, "none", backend=backend)
        assert not h[0, 2:4].isfinite().any()
        assert h[0, 4:].isfinite().all()
        assert last.isfinite().all()


def test_autocast_changes_nothing() -> None:
    named = arguments(2, 9, 3, optional=("steps", *OPTIONS), dtype=F32)
    want = run(named, "zoh")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(named, "zoh")
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_bad_arguments_are_named() -> None:
    named = arguments(2, 9, 3)

    def refuse(message: str, scheme: str = "zoh", **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            diagonal_scan(**(named | {"discretization": scheme} | changes))

    refuse(r"x \(2, 9, 5\) and A \(3,\), expected \(..., L, 2S\)", x=torch.zeros(2, 9, 5))
    refuse(r"x \(6,\) and A", x=torch.zeros(6))
    refuse(r"dt \(4,\), expected \(3,\)", dt=torch.ones(4))
    refuse(r"dt \(2, 8, 3\), expected \(..., 9, 3\)", dt=torch.ones(2, 8, 3))
    refuse(r"h0 \(2, 4\), expected \(..., 3\)", h0=torch.zeros(2, 4))
    refuse(r"mask \(2, 8\), expected \(..., 9\)", mask=torch.ones(2, 8, dtype=torch.bool))
    refuse(r"reset has dtype torch.float32, expected bool", reset=torch.zeros(2, 9))
    refuse(r"x has dtype torch.complex64", x=torch.zeros(2, 9, 6, dtype=C64))
    refuse(r"A has dtype torch.float32, expected a complex one", A=torch.zeros(3))
    refuse(r"batch axes do not broadcast: .* h0 \(5,\)", h0=torch.zeros(5, 3, dtype=C64))
    refuse(r"h0 is on meta and x on cpu", h0=torch.zeros(2, 3, device="meta"))
    refuse(r"backend 'fast', expected 'auto' or 'reference'", backend="fast")
    refuse(r"timestep_mode 'none', expected 'both' or 'state_only'", timestep_mode="none")
    refuse(r"discretization 'gbt', expected one of \('none', 'mamba'", "gbt")
    refuse(r"'none' has no use for dt or timesteps", "none")


def test_inputs_are_left_alone() -> None:
    named = arguments(2, 9, 3, optional=("steps", *OPTIONS))
    before = {n: t.clone() for n, t in named.items()}
    fields = ("x", "A", "steps", "dt", "h0", "integration_timesteps", "reset", "mask")
    ordered = [named.get(n) for n in fields]
    leaf, leaf_backward = (
        torch.ops.lrnnx_core.diagonal_scan, torch.ops.lrnnx_core.diagonal_scan_backward
    )  # fmt: skip
    for forward, backward in (
        (leaf, leaf_backward),
        (blocked_diagonal.diagonal_scan, blocked_diagonal.diagonal_scan_backward),
    ):
        h, last = forward(*ordered, False, "zoh")
        kept = h.clone()
        backward(h, h, last, *ordered, False, "zoh")
        assert torch.equal(h, kept)
        assert all(torch.equal(named[n], before[n]) for n in named)
