# SPDX-License-Identifier: MIT
"""The operator that discretizes a diagonal against the formulas of `lrnnx_core.discretize`."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from lrnnx_core import discretize
from lrnnx_core.backends import library
from lrnnx_core.ops import discretize_diagonal as operator
from lrnnx_core.ops.discretize_diagonal import Parts, apply_scheme, discretize_diagonal, joined

F64 = torch.float64
SCHEMES = {"zoh": None, "mamba": None, "dirac": None, "bilinear": None, "euler": None, "gbt": 0.3}
Shape = tuple[int, ...]


class Case(NamedTuple):
    """Shapes; ``kind`` of A and B is "pair", "complex" or "real"."""

    kind: str
    A: Shape
    dt: Shape
    B: Shape | None = None
    dt_input: Shape | None = None

    def tensors(self, dtype: torch.dtype = F64, scale: float = 1.0) -> list[Tensor]:
        """Return real tensors: parts of A, dt, dt_input, parts of B, as far as there are any."""
        generator = torch.Generator().manual_seed(len(self.A) + sum(self.dt))

        def draw(shape: Shape) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=F64, device="cpu")
            return x.to(torch.get_default_device())

        found = [-draw(self.A).exp()]
        found += [] if self.kind == "real" else [10 * scale * draw(self.A)]
        found += [(draw(s) - 2).exp() for s in (self.dt, self.dt_input) if s is not None]
        if self.B is not None:
            found += [draw(self.B) for _ in range(1 if self.kind == "real" else 2)]
        return [t.to(dtype) for t in found]

    def bind(self, tensors: tuple[Tensor, ...]) -> tuple[Parts, Tensor, Tensor | None, Any]:
        """Return A, dt, dt_input and B of `tensors`."""
        rest = list(tensors)

        def number() -> Parts:
            re = rest.pop(0)
            if self.kind == "real":
                return re
            im = rest.pop(0)
            return (re, im) if self.kind == "pair" else torch.complex(re, im)

        A, dt = number(), rest.pop(0)
        drive = None if self.dt_input is None else rest.pop(0)
        return A, dt, drive, None if self.B is None else number()

    def run(self, scheme: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the results of the operator, in real numbers."""
        got = apply_scheme(*self.bind(tensors), scheme=scheme, alpha=SCHEMES[scheme])
        return real(got[0]), real(got[1])

    def expected(self, scheme: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of the formulas."""
        A, dt, drive, B = self.bind(tensors)
        rule = discretize.resolve(scheme, alpha=SCHEMES[scheme])[0]  # type: ignore[arg-type]
        A_bar, gamma = rule(joined(A), dt, dt if drive is None else drive)
        return real(A_bar), real(gamma if B is None else gamma * joined(B))


def real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


CASES = {
    "channels": Case("pair", (5, 3), (5, 1), (5, 3)),
    "copies": Case("pair", (2, 3), (20, 2, 1), (2, 3)),
    "varying": Case("pair", (5, 3), (2, 7, 5, 1), (5, 3)),
    "split": Case("pair", (5, 3), (2, 7, 5, 1), (5, 3), (5, 1)),
    "shared": Case("complex", (9,), (9,)),
    "shared varying": Case("complex", (9,), (2, 20, 9)),
    "wide": Case("complex", (4, 1), (4, 1), (4, 7)),
    "untied": Case("real", (5, 3), (5, 3), (5, 3)),
    "many": Case("real", (3, 70), (3, 1)),
    "mixed": Case("pair", (3, 1, 4), (2, 3, 2, 1), (1, 2, 4)),
}


@pytest.fixture(autouse=True)
def every_scheme_is_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the formulas run where they are quick enough."""
    monkeypatch.setattr(operator, "_compiled", lambda *_: True)


EVERY = list(itertools.product(CASES, SCHEMES))
FEW = [("channels", "zoh"), ("split", "zoh"), ("shared varying", "bilinear"), ("many", "mamba")]


def gradients(function: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a fixed combination of the results."""
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    results = function(*inputs)
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros(())
    for r in results:
        weight = torch.randn(r.shape, generator=generator, dtype=F64, device="cpu")
        total = total + (r * weight.to(r)).sum()
    return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)


def close(got: Any, want: Any, rtol: float = 1e-11) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("name", "scheme"), EVERY)
def test_results_and_gradients_are_those_of_the_formulas(name: str, scheme: str) -> None:
    case = CASES[name]
    tensors = case.tensors()
    run, expected = partial(case.run, scheme), partial(case.expected, scheme)
    close(run(*tensors), expected(*tensors))
    close(gradients(run, tensors), gradients(expected, tensors))


@pytest.mark.parametrize(("name", "scheme"), FEW)
def test_every_transform_is_that_of_the_formulas(name: str, scheme: str) -> None:
    case = CASES[name]
    tensors = case.tensors()
    run, expected = partial(case.run, scheme), partial(case.expected, scheme)

    def loss(function: Any) -> Any:
        return lambda *x: sum(r.sin().sum() for r in function(*x))

    tangents = tuple(t.cos() for t in tensors)
    close(jvp(run, tuple(tensors), tangents)[1], jvp(expected, tuple(tensors), tangents)[1])
    for i in dict.fromkeys((0, min(2, len(tensors) - 1))):  # Re A, then a step
        stacked = list(tensors)
        stacked[i] = torch.stack([tensors[i], 0.5 * tensors[i]])
        dims = tuple(0 if j == i else None for j in range(len(tensors)))
        for f in (lambda f: f, lambda f: grad(loss(f), argnums=tuple(range(len(tensors))))):
            close(vmap(f(run), dims)(*stacked), vmap(f(expected), dims)(*stacked))
    if name in ("channels", "many"):
        some = [t[:2] for t in tensors]
        close([hessian(loss(run))(*some)], [hessian(loss(expected))(*some)])
    few = [t[:1].clone().requires_grad_() for t in tensors]

    def twice(function: Any) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss(function)(*few), few, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), few)  # type: ignore[arg-type]

    close(twice(run), twice(expected))


def test_steps_near_zero_and_poles_at_zero_keep_their_derivatives() -> None:
    re = torch.tensor([0.0, -1e-9, -1e-3, -0.2, -0.4, -30.0], dtype=F64)
    im = torch.tensor([0.0, 1e-9, 1e-3, 0.25, -0.4, 700.0], dtype=F64)
    dt = torch.tensor([1.0, 0.0, 1e-6, 1.0, 1.0, 0.1], dtype=F64)
    for scheme in SCHEMES:
        case = Case("pair", (6,), (6,))
        run, expected = partial(case.run, scheme), partial(case.expected, scheme)
        close(run(re, im, dt), expected(re, im, dt))
        close(gradients(run, [re, im, dt]), gradients(expected, [re, im, dt]))


@pytest.mark.parametrize(("dtype", "rtol"), [(F64, 1e-11), (torch.float32, 2e-5)])
def test_plain_pytorch_and_the_kernel_in_force_agree(dtype: torch.dtype, rtol: float) -> None:
    case = CASES["varying"]
    tensors = case.tensors(dtype, scale=0.1)
    run = partial(case.run, "zoh")
    got = *run(*tensors), *gradients(run, tensors)
    names, device = ("discretize_diagonal", "discretize_diagonal_backward"), tensors[0].device.type
    kept = [library.implement(name, device, library.default(name)) for name in names]
    want = *run(*tensors), *gradients(run, tensors)
    del kept
    close(got, want, rtol)


def test_choices_outside_of_the_operator_are_those_of_the_formulas() -> None:
    case = CASES["channels"]
    A, dt, _, B = case.bind(tuple(case.tensors()))
    gaps = torch.tensor([0.5, 2.0], dtype=F64)

    def own(A: Tensor, decay: Tensor, drive: Tensor) -> tuple[Tensor, Tensor]:
        return 1 + decay * A, drive * torch.ones_like(A)

    for choice, options in (
        (own, {}), ("none", {}), ("gbt", {"alpha": torch.tensor(0.3, dtype=F64)}), ("async", {}),
        ("zoh", {}),
    ):  # fmt: skip
        timed = {} if choice == "none" else {"integration_timesteps": gaps}
        got = discretize_diagonal(A, dt, B, discretization=choice, **options, **timed)  # type: ignore[arg-type]
        want = discretize.discretize(joined(A), dt, discretization=choice, **options, **timed)  # type: ignore[arg-type]
        close(got, (want[0], want[1] * joined(B)))
    with pytest.raises(ValueError, match="needs alpha"):
        discretize_diagonal(A, dt, discretization="gbt")
