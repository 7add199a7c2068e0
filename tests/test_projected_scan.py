"""The operator `projected_scan` against its pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, vmap

from lrnnx_core.ops.projected_scan import Backwards, _composite, projected_scan

F64 = torch.float64
SCHEMES = ("none", "dirac", "mamba", "zoh", "bilinear")
BOTH = ("C2", "later", "ends")  # of the direction against time


def arguments(
    scheme: str,
    *batch: int,
    length: int = 9,
    size: int = 3,
    width: int = 4,
    dtype: torch.dtype = F64,
) -> dict[str, Tensor]:
    """Draw everything there is, on the default device."""
    generator, width = torch.Generator().manual_seed(0), 4

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=F64, device="cpu")
        return x.to(dtype).to(torch.get_default_device())

    found = {
        "u": draw(*batch, length, width),
        "B": draw(2 * size, width),
        "C": draw(width, 2 * size),
        "C2": draw(width, 2 * size),
        "D": draw(width),
        "A": torch.complex(-0.05 - draw(size).abs(), draw(size)),
        "h0": torch.complex(draw(*batch, size), draw(*batch, size)),
        "reset": draw(*batch, length) > 1,
        "mask": draw(*batch, length) > -1,
        "ends": draw(*batch, length) > 1,
    }
    if scheme == "none":
        return found | {"A": torch.exp(found["A"])}
    found["integration_timesteps"] = draw(*batch, length).abs()
    found["later"] = draw(*batch, length).abs()
    return found | {"dt": 0.1 + draw(size).abs()}


def run(scheme: str = "none", **named: Any) -> tuple[Tensor, Tensor]:
    own = [named.pop(n, None) for n in BOTH]
    backwards = None if own[0] is None else Backwards(*own)
    return projected_scan(**named, discretization=scheme, backwards=backwards)


def plain(scheme: str, **named: Tensor) -> tuple[Tensor, Tensor]:
    names = (
        "u", "B", "C", "C2", "D", "A", "steps", "dt", "h0", "integration_timesteps", "later",
        "reset", "ends", "mask",
    )  # fmt: skip
    steps = named.get("dt")
    given: dict[str, Any] = {**named, "steps": steps, "dt": None}
    return _composite(*(given.get(n) for n in names), False, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_and_gradients_are_those_of_the_pieces(scheme: str) -> None:
    for leave_out in ((), ("D", "h0"), ("reset", "mask", "integration_timesteps", *BOTH)):
        named = {n: t for n, t in arguments(scheme, 2, 3).items() if n not in leave_out}
        inputs = [t.requires_grad_() for t in named.values() if t.dtype != torch.bool]
        if "D" in leave_out:
            named["D"] = None
        found = []
        for y, last in (run(scheme, **named), plain(scheme, **named)):
            grads = torch.autograd.grad(y.sin().sum() + last.abs().sum(), inputs)
            found.append((y, last, *grads))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_other_direction_is_the_flipped_sequence(scheme: str) -> None:
    named = arguments(scheme, 2)
    named |= {"D": None, "h0": None}
    y, last = run(scheme, **named)
    C2, later, ends = (named.pop(n, None) for n in BOTH)
    forward, end = run(scheme, **named)
    own = {"C": C2, "reset": ends} | ({} if later is None else {"integration_timesteps": later})
    flipped = {n: (named | own)[n].flip(1) for n in ("u", "mask", "reset")}
    if later is not None:
        flipped["integration_timesteps"] = later.flip(1)
    backward, _ = run(scheme, **(named | own | flipped))
    torch.testing.assert_close(y, forward + backward.flip(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, end)


@pytest.mark.parametrize("scheme", ["none", "zoh"])
def test_second_derivatives(scheme: str) -> None:
    named = arguments(scheme, 2, length=5, size=2)
    names = [n for n in named if named[n].dtype != torch.bool]

    def call(*tensors: Tensor) -> Any:
        return run(scheme, **(named | dict(zip(names, tensors, strict=True))))

    inputs = tuple(named[n].requires_grad_() for n in names)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("scheme", ["none", "zoh"])
def test_transforms(scheme: str) -> None:
    named = arguments(scheme, 3)
    rest = {n: named[n] for n in ("C", "C2", "D", "A", "dt") if n in named}

    def loss(B: Tensor, u: Tensor) -> Tensor:
        return run(scheme, u=u, B=B, **rest)[0].sin().sum()

    B, u = named["B"], named["u"]
    samples = torch.stack([grad(loss)(B, x) for x in u])
    torch.testing.assert_close(vmap(grad(loss), (None, 0))(B, u), samples)
    stack = torch.stack([B, 2 * B, -B])
    members = torch.stack([grad(loss)(b, u) for b in stack])
    torch.testing.assert_close(vmap(grad(loss), (0, None))(stack, u), members)
    torch.testing.assert_close(jacfwd(loss)(B, u), grad(loss)(B, u))


def test_no_steps_and_float32() -> None:
    named = arguments("none", 2, length=0)
    y, last = run(**named)
    assert y.shape == (2, 0, 4)
    torch.testing.assert_close(last, named["h0"])
    inputs = [named[n].requires_grad_() for n in ("u", "B", "C", "C2", "D", "A", "h0")]
    y, last = run(**named)
    grads = torch.autograd.grad(y.sum() + last.real.sum(), inputs, allow_unused=True)
    assert all(g is None or g.shape == x.shape for g, x in zip(grads, inputs, strict=True))
    y, last = run("zoh", **arguments("zoh", 2, dtype=torch.float32))
    assert (y.dtype, last.dtype) == (torch.float32, torch.complex64)


@pytest.mark.compile
def test_compiled_as_one_graph() -> None:
    named = arguments("zoh", 2)

    def loss(u: Tensor, B: Tensor) -> Tensor:
        return run("zoh", **(named | {"u": u, "B": B}))[0].sin().sum()

    inputs = (named["u"].requires_grad_(), named["B"].requires_grad_())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*inputs), inputs))
