# SPDX-License-Identifier: MIT
"""The operator `s4d_bidirectional` against two runs of `s4d_scan`'s loop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from backends_both import both_backends
from test_s4d_scan import OPTIONS, arguments
from torch import Tensor
from torch.func import grad, jacfwd, vmap

from lrnnx_core.backends import cuda_s4d
from lrnnx_core.models import s4d
from lrnnx_core.ops import s4d_scan
from lrnnx_core.ops.s4d_bidirectional import _composite, s4d_bidirectional

pytestmark = pytest.mark.usefixtures(both_backends.__name__)
SHAPES = ((2, 70, 3), (1, 3), (2, 2, 3), (2, 0, 3), (67, 1))


def problem(*shape: int, **choices: Any) -> dict[str, Any]:
    """Draw arguments; what stands from ``lengths`` on is zero, and nothing starts there."""
    named = arguments(*shape, **choices)
    named["w"] = named["v"].flip(0) * 0.7
    if "lengths" in named:
        within = torch.arange(shape[-2]) < named["lengths"].unsqueeze(-1)
        named["u"] = torch.where(within.unsqueeze(-1), named["u"], 0)
        if "reset" in named:
            named["reset"] = named["reset"] & within
    return named


def both(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    w: Tensor,
    D: Any = None,
    lengths: Any = None,
    reset: Any = None,
) -> tuple[Tensor, Tensor]:
    """Run each document of each direction by itself, by the loop over steps."""
    y, last = s4d_scan(u, a, v, D, lengths=lengths, reset=reset, backend="reference")
    rows, flags = u.flatten(0, -3), None if reset is None else reset.flatten(0, -2)
    found = []
    for i, row in enumerate(rows):
        starts = [] if flags is None else flags[i].nonzero().flatten().tolist()
        bounds = [0, *(t for t in starts if t), len(row)]
        for first, after in itertools.pairwise(bounds):
            back = row[first:after].flip(0)
            if len(back):
                y2 = s4d_scan(back, a, w, backend="reference")[0].flip(0)
                found.append(torch.cat([y2[1:], torch.zeros_like(y2[:1])]))
    y = y + torch.cat(found).view(y.shape) if found else y
    if lengths is not None:
        y = torch.where((torch.arange(y.shape[-2]) < lengths.unsqueeze(-1)).unsqueeze(-1), y, 0)
    return y, last


@pytest.mark.parametrize("optional", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("complex_", [True, False], ids=["complex", "real"])
def test_values_and_gradients(optional: tuple[str, ...], complex_: bool) -> None:
    for shape in SHAPES:
        named = problem(*shape, optional=optional, complex_=complex_)
        if named["u"].ndim == 2:  # the loop's rows
            named = {n: t[None] if n in ("u", "lengths", "reset") else t for n, t in named.items()}
        inputs = [named[n].requires_grad_() for n in ("u", "a", "v", "w", "D") if n in named]
        found = []
        for call in (s4d_bidirectional, both):
            y, last = call(**named)
            loss = (y.sin() * torch.arange(1.0, 1 + y.shape[-2]).unsqueeze(-1)).sum()
            loss = loss + last.abs().sum()
            grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
            found.append((y, last, *grads))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("optional", OPTIONS[::3], ids=" ".join)
def test_second_derivatives_and_transforms(optional: tuple[str, ...]) -> None:
    named = problem(2, 5, 2, states=2, optional=optional)
    names = [n for n in ("u", "a", "v", "w", "D") if n in named]

    def call(*tensors: Tensor) -> Any:
        return s4d_bidirectional(**(named | dict(zip(names, tensors, strict=True))))

    inputs = tuple(named[n].requires_grad_() for n in names)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
    rows = {n: t.detach() for n, t in named.items()}
    batched = {n: t for n, t in rows.items() if n in ("u", "lengths", "reset")}

    def loss(w: Tensor, row: dict[str, Tensor]) -> Tensor:
        return s4d_bidirectional(**(rows | row | {"w": w}))[0].sin().sum()

    w, each = rows["w"].real.contiguous(), range(2)
    own = [{n: t[i] for n, t in batched.items()} for i in each]
    samples = torch.stack([grad(loss)(w, row) for row in own])
    torch.testing.assert_close(vmap(grad(loss), (None, 0))(w, batched), samples)
    stack = torch.stack([w, -2 * w])
    members = torch.stack([grad(loss)(m, batched) for m in stack])
    torch.testing.assert_close(vmap(grad(loss), (0, None))(stack, batched), members)
    torch.testing.assert_close(jacfwd(loss)(w, own[0]), samples[0])


def test_composite_is_the_operator() -> None:
    named = problem(2, 70, 3, optional=OPTIONS[-1])
    order = ("u", "a", "v", "w", "D", "lengths", "reset")
    named["lengths"] = None
    composed = _composite(*(named[n] for n in order))
    for got, want in zip(composed, s4d_bidirectional(**named), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
def test_holes_in_a_mask_are_the_recurrent_model(bidirectional: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    params = s4d.init(3, 8, bidirectional=bidirectional, generator=generator)
    params = {n: t.double() for n, t in params.items()}
    u = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 9, generator=generator) > 0.4
    reset = torch.rand(2, 9, generator=generator) > 0.6
    u = torch.where(mask.unsqueeze(-1), u, torch.nan)
    lengths = torch.tensor([9, 6])
    for more in ({}, {"reset": reset}, {"lengths": lengths, "reset": reset}):
        found = []
        for mode in ("scan", "recurrent"):
            y, last = s4d.scan(params, u, mask=mask, bidirectional=bidirectional, mode=mode, **more)
            found.append((y, last))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def test_nothing_is_kept_without_a_gradient_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(cuda_s4d, "keeps", lambda u, a: sizes.append(u.shape) or True)
    named = problem(2, 70, 3, optional=())
    with torch.no_grad():
        y, _ = s4d_bidirectional(**named)
    assert sizes == [(2, 70, 3)]
    torch.testing.assert_close(y, both(**named)[0])


@pytest.mark.compile
def test_compiled_as_one_graph() -> None:
    named = problem(2, 9, 3, optional=OPTIONS[-1])

    def loss(u: Tensor, w: Tensor) -> Tensor:
        return s4d_bidirectional(**(named | {"u": u, "w": w}))[0].sin().sum()

    inputs = (named["u"].requires_grad_(), named["w"].requires_grad_())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*inputs), inputs))
