"""cauchy: against its definition, over lengths and layouts; precision and range.

Derivatives of higher order and every transform are the business of the transform table.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends_both import both_backends  # noqa: F401
from op_cases import draw
from torch import Tensor

from lrnnx_core.backends import blocked_sums
from lrnnx_core.ops import cauchy

pytestmark = pytest.mark.usefixtures("both_backends")

H, N = 3, 4
LENGTHS = (1, 2, 3, 4, 15, 16, 17, 256, 1001)


def problem(
    v: tuple[int, ...] = (),
    lam: tuple[int, ...] = (),
    a: tuple[int, ...] = (),
    *,
    states: int = N,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return v (*v, H, N), stable poles lam (*lam, H, N) and a (*a, H) > 0."""
    poles = draw(*lam, H, states, seed=2, complex_=True)
    poles = torch.complex(-poles.real.abs() - 0.3, 3 * poles.imag)
    return draw(*v, H, states, seed=1, complex_=True), poles, 0.5 + draw(*a, H, seed=3).abs()


def definition(v: Tensor, lam: Tensor, a: Tensor, length: int) -> Tensor:
    """Sum term by term, node by node, with the tangent where the cosine is not zero."""
    out = []
    for k in range(length // 2 + 1):
        s = math.sin(math.pi * k / length)
        c = 0.0 if 2 * k == length else math.cos(math.pi * k / length)
        x = 1j * a.unsqueeze(-1) * s
        out.append((v / (x - lam * c) + v.conj() / (x - lam.conj() * c)).sum(-1))
    return torch.stack(out, -2)


def with_gradients(function: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    parts = torch.view_as_real(y.resolve_conj())
    weights = torch.linspace(1, 2, max(1, parts.numel()), dtype=parts.dtype)[: parts.numel()]
    return y.detach(), *torch.autograd.grad((parts * weights.reshape(parts.shape)).sum(), leaves)


@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients_are_those_of_the_sum(length: int) -> None:
    tensors = problem()
    got = with_gradients(lambda *x: cauchy(*x, length), *tensors)
    assert got[0].shape == (length // 2 + 1, H)
    expected = with_gradients(lambda *x: definition(*x, length), *tensors)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    reference = cauchy(*tensors, length, backend="reference")
    torch.testing.assert_close(reference, expected[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("v", "lam", "a"),
    [
        ((5,), (), ()), ((), (5,), ()), ((), (), (5,)), ((2, 3), (3,), ()), ((2, 1), (3,), (2, 1)),
        ((3, 1), (3, 2), (2,)), ((1,), (1,), (1,)), ((0,), (), ()), ((2,), (0, 1), ()),
    ],
)  # fmt: skip
def test_leading_axes_broadcast(
    v: tuple[int, ...], lam: tuple[int, ...], a: tuple[int, ...]
) -> None:
    tensors = problem(v, lam, a)
    got = with_gradients(lambda *x: cauchy(*x, 21), *tensors)
    expected = with_gradients(lambda *x: cauchy(*x, 21, backend="reference"), *tensors)
    assert got[0].shape == (*torch.broadcast_shapes(v, lam, a), 11, H)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_real_numerators_and_poles_are_complex_ones_without_imaginary_part() -> None:
    v, lam, a = problem()
    v, lam = v.real, lam.real
    zero = torch.zeros_like(v)
    got = with_gradients(lambda *x: cauchy(*x, 10), v, lam, a)
    wide = with_gradients(
        lambda v, lam, a: cauchy(torch.complex(v, zero), torch.complex(lam, zero), a, 10), v, lam, a
    )
    torch.testing.assert_close(got, wide)


def test_a_pole_on_its_own_is_a_bilinear_decay() -> None:
    """exp(i theta) r transforms back to 2 Re(2 v / (a - lam) A_bar^t), periodized."""
    v, lam, a = problem(states=1)
    length = 400
    theta = math.pi * torch.arange(length // 2 + 1, dtype=torch.float64) / length
    r = cauchy(v, lam, a, length) * torch.exp(1j * theta).unsqueeze(-1)
    kernel = torch.fft.irfft(r, n=length, dim=-2)
    pole = (lam / a.unsqueeze(-1)).squeeze(-1)  # lam dt / 2
    A_bar, gain = (1 + pole) / (1 - pole), (2 / a / (1 - pole)) * v.squeeze(-1)
    t = torch.arange(length, dtype=torch.float64).unsqueeze(-1)
    expected = 2 * (gain * torch.exp(t * torch.log(A_bar)) / (1 - A_bar**length)).real
    torch.testing.assert_close(kernel, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tile", [1, 64, 1000])
def test_the_size_of_a_tile_changes_nothing_but_rounding(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shapes in (((3,), ()), ((3, 2), (2,)), ((2,), (2,))):
        tensors = problem(*shapes)
        whole = with_gradients(lambda *x: cauchy(*x, 100), *tensors)
        with monkeypatch.context() as patch:
            patch.setitem(blocked_sums.TILE, "cpu", tile)
            tiled = with_gradients(lambda *x: cauchy(*x, 100), *tensors)
        torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)


def test_repeated_calls_agree_to_the_bit() -> None:
    v, lam, a = problem((4,))
    tensors = v.to(torch.complex64), lam.to(torch.complex64), a.float()
    runs = [with_gradients(lambda *x: cauchy(*x, 333), *tensors) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_strides_of_inputs_and_upstream_do_not_matter() -> None:
    v, lam, a = problem((4,))
    expected = cauchy(v, lam, a, 50)
    strange = v.conj().mT.contiguous().mT.conj(), lam.mT.contiguous().mT, a.repeat(2)[:3]
    assert strange[0].is_conj()
    torch.testing.assert_close(cauchy(*strange, 50), expected)

    leaf = v.clone().requires_grad_()
    cauchy(leaf, lam, a, 50).real.sum().backward()  # its upstream is expanded, of stride 0
    dense = v.clone().requires_grad_()
    cauchy(dense, lam, a, 50).backward(torch.ones(4, 26, H, dtype=torch.complex128))
    torch.testing.assert_close(leaf.grad, dense.grad)


def test_no_states_sum_to_zero() -> None:
    _, _, a = problem()
    empty = torch.zeros(H, 0, dtype=torch.complex64)
    assert torch.equal(cauchy(empty, empty, a.float(), 7), torch.zeros(4, H, dtype=torch.complex64))


def test_dtypes_are_promoted_to_at_least_single_precision() -> None:
    v, lam, a = problem()
    assert cauchy(v.to(torch.complex64), lam, a.float(), 5).dtype == torch.complex128
    narrow = v.real.bfloat16(), lam.to(torch.complex64), a.bfloat16()
    assert cauchy(*narrow, 5).dtype == torch.complex64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        r = cauchy(v.to(torch.complex64), lam.to(torch.complex64), a.float(), 100)
    expected = cauchy(v, lam, a, 100)
    torch.testing.assert_close(r.to(torch.complex128), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1000, 4096, 4097])
def test_single_precision_of_a_kernel_of_s4(length: int) -> None:
    """Error of irfft(r), relative to its largest value; two divisions give the same (2e-6)."""
    states = 64
    dt = torch.logspace(-3, -1, H)
    lam = torch.complex(torch.full((H, states), -0.5), 100 * draw(H, states, seed=2).float())
    v = draw(H, states, seed=1, complex_=True).to(torch.complex64)
    tensors = v, lam, 2 / dt
    wide = v.to(torch.complex128), lam.to(torch.complex128), (2 / dt).double()
    bounds = (3e-5, 5e-5, 1e-4, 1e-4)
    single = with_gradients(lambda *x: cauchy(*x, length), *tensors)
    double = with_gradients(lambda *x: cauchy(*x, length, backend="reference"), *wide)
    for bound, x, y in zip(bounds, single, double, strict=True):
        assert (x - y).abs().max() / y.abs().max() < bound
    K, expected = (torch.fft.irfft(x[0], n=length, dim=-2) for x in (single, double))
    assert (K - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("dt", [1e-8, 1e-3, 1e3])
def test_single_precision_covers_steps_of_any_size(dt: float) -> None:
    v, lam, _ = problem()
    a = torch.full((H,), 2 / dt, dtype=torch.float64)
    single = cauchy(v.to(torch.complex64), lam.to(torch.complex64), a.float(), 64)
    torch.testing.assert_close(
        single.to(torch.complex128), cauchy(v, lam, a, 64), rtol=1e-4, atol=1e-6 * dt
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": torch.zeros(H, N + 1)}, "expected lam"),
        ({"v": torch.zeros(N)}, "expected v"),
        ({"a": torch.zeros(H + 1)}, "expected a"),
        ({"a": torch.zeros(())}, "expected a"),
        ({"v": torch.zeros(2, H, N), "a": torch.zeros(3, H)}, "do not broadcast"),
        ({"lam": torch.zeros(H, N, dtype=torch.int64)}, "dtype torch.int64"),
        ({"a": torch.zeros(H, dtype=torch.complex64)}, "dtype torch.complex64"),
        ({"a": torch.zeros(H, device="meta")}, "is on meta"),
        ({"length": 0}, "length = 0"),
        ({"backend": "fast"}, "backend 'fast'"),
    ],
)
def test_bad_input_raises(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "v": torch.zeros(H, N), "lam": torch.zeros(H, N), "a": torch.ones(H), "length": 4
    }  # fmt: skip
    with pytest.raises(ValueError, match=message) as error:
        cauchy(**(arguments | change))
    assert "cauchy" in str(error.value)
