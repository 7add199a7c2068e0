"""The operator `rg_lru_scan` against a loop over single steps, and what its arguments may be.

Derivatives under every transform are the business of `test_transform_table.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_both import both_backends  # noqa: F401
from torch import Tensor

from lrnnx_core.backends import blocked_rg_lru
from lrnnx_core.ops import rg_lru_scan

pytestmark = pytest.mark.usefixtures("both_backends")

F32, F64 = torch.float32, torch.float64
FLAGS = ("reset", "mask")
OPTIONS = ("input_bias", "recurrent_bias", "h0", "integration_timesteps", *FLAGS)


def arguments(
    *shape: int, optional: tuple[str, ...] = OPTIONS, dtype: torch.dtype = F64, seed: int = 0
) -> dict[str, Tensor]:
    """Draw arguments for x of ``shape``, (..., L, W), on the default device."""
    generator = torch.Generator().manual_seed(seed)
    *batch, length, width = shape
    state = torch.promote_types(dtype, F32)

    def draw(*size: int, kind: torch.dtype = state) -> Tensor:
        x = torch.randn(*size, generator=generator, dtype=F64, device="cpu")
        return x.to(kind).to(torch.get_default_device())

    found = {n: draw(*shape, kind=dtype) for n in ("x", "input_gate", "recurrent_gate")}
    found["rate"] = 0.01 + draw(width).abs()
    extra: dict[str, Callable[[], Tensor]] = {
        "input_bias": lambda: draw(width),
        "recurrent_bias": lambda: draw(width),
        "h0": lambda: draw(*batch, width),
        "integration_timesteps": lambda: draw(*batch, length).abs(),
        "reset": lambda: draw(*batch, length) > 1.2,
        "mask": lambda: draw(*batch, length) > -1,
    }
    return found | {n: extra[n]() for n in optional}


def loop(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    rate: Tensor,
    *,
    input_bias: Tensor | None = None,
    recurrent_bias: Tensor | None = None,
    h0: Tensor | None = None,
    integration_timesteps: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    timestep_mode: str = "both",
    start_rule: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute every number of x (L, W) by itself."""
    length, width = x.shape
    h, hs = torch.zeros(width, dtype=x.dtype) if h0 is None else h0.clone(), []
    for t in range(length):
        opening = (reset is not None and bool(reset[t])) or (t == 0 and h0 is None)
        h = torch.zeros_like(h) if reset is not None and bool(reset[t]) else h.clone()
        if mask is None or bool(mask[t]):
            for d in range(width):
                to_i = input_gate[t, d] + (0 if input_bias is None else input_bias[d])
                to_r = recurrent_gate[t, d] + (0 if recurrent_bias is None else recurrent_bias[d])
                a = torch.exp(-rate[d] / (1 + torch.exp(-to_r)))
                tau = 1 if integration_timesteps is None else integration_timesteps[t]
                decay = a**tau
                m = torch.sqrt(1 - (decay if timestep_mode == "both" else a) ** 2)
                m = torch.ones_like(m) if opening and start_rule else m
                h[d] = decay * h[d] + m * x[t, d] / (1 + torch.exp(-to_i))
        hs.append(h)
    return torch.stack(hs), h


def subsets() -> list[tuple[str, ...]]:
    return [(), *((n,) for n in OPTIONS), FLAGS, ("h0", *FLAGS), OPTIONS]


@pytest.mark.parametrize("optional", subsets(), ids=" ".join)
@pytest.mark.parametrize("start_rule", [False, True])
@pytest.mark.parametrize("timestep_mode", ["both", "state_only"])
def test_every_backend_is_the_loop(
    timestep_mode: Any, start_rule: bool, optional: tuple[str, ...]
) -> None:
    named = arguments(2, 9, 3, optional=optional)
    choices = {"timestep_mode": timestep_mode, "start_rule": start_rule}
    for backend in ("auto", "reference"):
        h, last = rg_lru_scan(**named, **choices, backend=backend)
        for row in range(2):
            own = {n: t[row] if t.ndim > 1 else t for n, t in named.items()}
            want, end = loop(**own, **choices)
            torch.testing.assert_close(h[row], want, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(last[row], end, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("optional", subsets(), ids=" ".join)
@pytest.mark.parametrize("start_rule", [False, True])
@pytest.mark.parametrize("timestep_mode", ["both", "state_only"])
def test_the_fused_gradients_are_those_of_the_loop(
    timestep_mode: Any, start_rule: bool, optional: tuple[str, ...]
) -> None:
    named = arguments(2, 40, 3, optional=optional)
    inputs = [t.requires_grad_() for t in named.values() if t.dtype == F64]
    found = []
    for backend in ("auto", "reference"):
        h, last = rg_lru_scan(
            **named, timestep_mode=timestep_mode, start_rule=start_rule, backend=backend
        )
        found.append(torch.autograd.grad(h.sin().sum() + last.cos().sum(), inputs))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradcheck_of_everything_at_once() -> None:
    for timestep_mode, start_rule in itertools.product(("both", "state_only"), (False, True)):
        named = arguments(2, 5, 2)
        names = [n for n in named if n not in FLAGS]

        def run(
            *tensors: Tensor,
            named: Any = named,
            names: Any = names,
            mode: Any = timestep_mode,
            rule: bool = start_rule,
        ) -> Any:
            given = named | dict(zip(names, tensors, strict=True))
            return rg_lru_scan(**given, timestep_mode=mode, start_rule=rule)

        inputs = tuple(named[n].requires_grad_() for n in names)
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_the_roots_slope_is_clipped() -> None:
    """Where a is 1 the gradient through the root is that of slope 1000: none, as a = 1 - m^2."""
    named = arguments(1, 4, 3, optional=("h0",))
    for rate in (0.0, 1e-16, 1e-8):
        named["rate"] = torch.full((3,), rate, dtype=F64)
        gradients = []
        for backend in ("auto", "reference"):
            x = named["rate"].clone().requires_grad_()
            h, _ = rg_lru_scan(**(named | {"rate": x}), backend=backend)
            gradients.append(torch.autograd.grad(h.sum(), x)[0])
        assert gradients[0].isfinite().all()
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)


def test_any_split_is_the_whole() -> None:
    named = arguments(3, 11, 4, optional=tuple(n for n in OPTIONS if n != "h0"))
    whole, last = rg_lru_scan(**named, start_rule=True)
    timed = {"x": -2, "input_gate": -2, "recurrent_gate": -2}
    timed |= dict.fromkeys(("integration_timesteps", *FLAGS), -1)
    for k in range(12):
        cut = [
            {n: t.tensor_split([k], timed[n])[i] if n in timed else t for n, t in named.items()}
            for i in range(2)
        ]
        h, state = rg_lru_scan(**cut[0], start_rule=True)
        if k == 0:  # nothing has started yet: no state to go on with
            again, end = rg_lru_scan(**cut[1], start_rule=True)
        else:
            again, end = rg_lru_scan(**cut[1], h0=state, start_rule=True)
        torch.testing.assert_close(torch.cat([h, again], 1), whole, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, F64])
def test_dtypes_and_batch_axes(dtype: torch.dtype) -> None:
    named = arguments(2, 3, 30, 4, dtype=dtype)
    named["h0"] = named["h0"][:1]
    named["integration_timesteps"] = named["integration_timesteps"][0, 0]
    h, last = rg_lru_scan(**named)
    assert (h.shape, h.dtype) == ((2, 3, 30, 4), dtype)
    assert (last.shape, last.dtype) == ((2, 3, 4), torch.promote_types(dtype, F32))
    wide = {n: t if t.dtype == torch.bool else t.double() for n, t in named.items()}
    tolerance = 4 * torch.finfo(dtype).eps
    want, end = rg_lru_scan(**wide, backend="reference")
    assert (h.double() - want).norm() <= tolerance * want.norm()
    assert (last.double() - end).norm() <= 1e-6 * end.norm()


def test_dtypes_may_differ() -> None:
    named = arguments(5, 3, dtype=torch.bfloat16)
    named["input_gate"] = named["input_gate"].float()
    h, last = rg_lru_scan(**named)
    assert (h.dtype, last.dtype) == (torch.bfloat16, F32)
    h, last = rg_lru_scan(**(named | {"rate": named["rate"].double()}))
    assert (h.dtype, last.dtype) == (torch.bfloat16, F64)


def test_no_steps_and_no_channels() -> None:
    named = arguments(2, 0, 3)
    inputs = [t.requires_grad_() for t in named.values() if t.dtype == F64]
    h, last = rg_lru_scan(**named)
    assert h.shape == (2, 0, 3)
    torch.testing.assert_close(last, named["h0"])
    gradients = torch.autograd.grad(last.sum(), inputs, allow_unused=True)
    assert all(g is None or g.shape == x.shape for g, x in zip(gradients, inputs, strict=True))
    assert rg_lru_scan(**arguments(2, 3, 0))[0].shape == (2, 3, 0)
    assert rg_lru_scan(**arguments(0, 3, 2))[1].shape == (0, 2)


def test_autocast_changes_nothing() -> None:
    named = {n: t if n in FLAGS else t.float() for n, t in arguments(2, 9, 3).items()}
    want = rg_lru_scan(**named)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = rg_lru_scan(**named)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == F32
        assert torch.equal(x, y)


def test_one_leaf_of_each_kind_is_called() -> None:
    """The fused path is in force: a plain call makes no gate outside of the leaf operator."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    named = {n: t if n in FLAGS else t.requires_grad_() for n, t in arguments(2, 9, 3).items()}
    with Names():
        rg_lru_scan(**named)[0].sum().backward()
    assert seen.count("lrnnx_core::rg_lru_scan") == 1
    assert seen.count("lrnnx_core::rg_lru_scan_backward") == 1
    assert not {"aten::sigmoid", "aten::exp", "aten::expm1"}.intersection(seen)


def test_bad_arguments_are_named() -> None:
    named = arguments(2, 9, 3)

    def refuse(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            rg_lru_scan(**(named | changes))

    refuse(r"input_gate \(2, 9, 4\), expected \(..., 9, 3\)", input_gate=torch.zeros(2, 9, 4))
    refuse(r"rate \(2, 3\), expected \(3,\)", rate=torch.zeros(2, 3))
    refuse(r"h0 \(2, 4\), expected \(..., 3\)", h0=torch.zeros(2, 4))
    refuse(r"mask \(2, 8\), expected \(..., 9\)", mask=torch.ones(2, 8, dtype=torch.bool))
    refuse(r"reset has dtype torch.float32, expected bool", reset=torch.zeros(2, 9))
    refuse(r"x has dtype torch.complex64", x=torch.zeros(2, 9, 3, dtype=torch.complex64))
    refuse(r"batch axes do not broadcast: .* h0 \(5,\)", h0=torch.zeros(5, 3))
    refuse(r"h0 is on meta and x on cpu", h0=torch.zeros(2, 3, device="meta"))
    refuse(r"x \(3,\), expected \(..., L, W\)", x=torch.zeros(3))
    refuse(r"backend 'fast', expected 'auto' or 'reference'", backend="fast")
    refuse(r"timestep_mode 'none', expected 'both' or 'state_only'", timestep_mode="none")


def test_inputs_are_left_alone() -> None:
    named = arguments(2, 9, 3)
    before = {n: t.clone() for n, t in named.items()}
    ordered = [named[n] for n in FIELDS]
    h, last = blocked_rg_lru.rg_lru_scan(*ordered, False, True)
    kept = h.clone()
    blocked_rg_lru.rg_lru_scan_backward(h, h, last, *ordered, False, True)
    assert torch.equal(h, kept)
    assert all(torch.equal(named[n], before[n]) for n in named)


FIELDS = (
    "x", "input_gate", "recurrent_gate", "rate", "input_bias", "recurrent_bias", "h0",
    "integration_timesteps", "reset", "mask",
)  # fmt: skip
