"""linear_scan: against the loop, against a dense L x L operator, and the edges of what it takes."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from backends_both import both_backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import draw
from torch import Tensor
from torch.func import grad, vmap

from lrnnx_core.backends import blocked, library
from lrnnx_core.ops import linear_scan

both = pytest.mark.usefixtures(both_backends.__name__)
# The fixture stands for all examples of a test: it chooses the backend.
fixture_is_meant = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex128,
    torch.complex64,
)
# Relative error of h against float64, per dtype of the result.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
LENGTHS = (0, 1, 2, 7, blocked.SERIAL_LENGTH - 1, blocked.SERIAL_LENGTH, 17, 64, 257, 4097)


def exact(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed, complex_=dtype.is_complex).to(dtype)


def decay(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return coefficients of modulus at most 1, real ones of both signs."""
    x = random(*shape, dtype=torch.complex128 if dtype.is_complex else torch.float64, seed=seed)
    return (x / (1 + x.abs()) if dtype.is_complex else torch.tanh(x)).to(dtype)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(
        exact(got), exact(expected), rtol=0, atol=tolerance * max(scale, 1.0), check_dtype=False
    )


def dense(
    a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool = False, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Apply h = M b + m h0, M_ij = a_{j+1} ... a_i; shares no code and no order of summation."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    dtype = dtype if h0 is None else torch.promote_types(dtype, h0.dtype)
    length = b.shape[-2]
    if reset is not None:
        a = torch.where(reset.unsqueeze(-1), torch.zeros_like(a), a)
    size = torch.broadcast_shapes(a.shape[-1:], b.shape[-1:])
    a = a.expand(*a.shape[:-2], length, *size).to(dtype)
    b = b.to(dtype)
    if reverse:
        a, b = a.flip(-2), b.flip(-2)
    k = torch.arange(length)
    between = (k > k[None, :, None]) & (k <= k[:, None, None])  # (i, j, k): j < k <= i
    factors = torch.where(between[..., None], a[..., None, None, :, :], torch.ones((), dtype=dtype))
    M = factors.prod(-2) * (k[:, None] >= k)[..., None]
    h = torch.einsum("...ijs,...js->...is", M, b.expand(*b.shape[:-1], *size))
    if h0 is not None:
        upto = torch.where((k <= k[:, None])[..., None], a[..., None, :, :], torch.ones_like(a[:1]))
        h = h + upto.prod(-2) * h0.to(dtype).unsqueeze(-2)
    last = h[..., -1, :]
    return (h.flip(-2) if reverse else h), last


def resets(*shape: int) -> Tensor:
    return draw(*shape, seed=9) > 0.8


def outputs_and_gradients(f: Any, inputs: list[Tensor | None], seed: int = 50) -> list[Tensor]:
    """Return f's outputs and the gradients of a random weighting of both of them."""
    x = [v if v is None else v.detach().requires_grad_() for v in inputs]
    h, last = f(*x)
    weights = [random(*y.shape, dtype=y.dtype, seed=seed + i) for i, y in enumerate((h, last))]
    wanted = [v for v in x if v is not None]
    grads = torch.autograd.grad((h, last), wanted, weights)
    return [h.detach(), last.detach(), *grads]


# ---------------------------------------------------------------- right numbers


@both
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
def test_equals_the_loop_in_value_and_gradient(
    constant: bool, reverse: bool, with_reset: bool, length: int
) -> None:
    options = {"reverse": reverse, "reset": resets(2, length) if with_reset else None}
    dtypes = (torch.float64, torch.complex128) if length < 1000 else (torch.float64,)
    for dtype, given_h0 in itertools.product(dtypes, (False, True)):
        inputs = [
            decay(2, 1 if constant else length, 3, dtype=dtype, seed=1),
            random(2, length, 3, dtype=dtype, seed=2),
            random(2, 3, dtype=dtype, seed=3) if given_h0 else None,
        ]
        if length == 0:  # nothing to differentiate in the loop; the gradients have their own test
            for backend in ("auto", "reference"):
                h, last = linear_scan(*inputs, **options, backend=backend)
                assert h.shape == (2, 0, 3)
                assert torch.equal(last, torch.zeros_like(last) if inputs[2] is None else inputs[2])
            continue
        got = outputs_and_gradients(lambda *x, o=options: linear_scan(*x, **o), inputs)
        expected = outputs_and_gradients(
            lambda *x, o=options: linear_scan(*x, **o, backend="reference"), inputs
        )
        for y, z in zip(got, expected, strict=True):
            assert y.dtype == z.dtype
            close(y, z, 1e-12)


@both
@pytest.mark.parametrize("length", [1, 2, 7, 17, 64])
@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_equals_the_dense_operator(
    dtype: torch.dtype, reverse: bool, with_reset: bool, length: int
) -> None:
    reset = resets(2, length) if with_reset else None
    for steps, given_h0 in itertools.product((1, length), (False, True)):
        a, b = decay(2, steps, 2, dtype=dtype, seed=1), random(2, length, 2, dtype=dtype, seed=2)
        h0 = random(2, 2, dtype=dtype, seed=3) if given_h0 else None
        got = linear_scan(a, b, h0, reverse=reverse, reset=reset)
        for y, z in zip(got, dense(a, b, h0, reverse, reset), strict=True):
            close(y, z, 1e-13)


@both
@pytest.mark.parametrize("b_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a_dtype", DTYPES, ids=str)
def test_every_pair_of_dtypes(a_dtype: torch.dtype, b_dtype: torch.dtype) -> None:
    dtype = torch.promote_types(a_dtype, b_dtype)
    state = torch.promote_types(dtype, torch.float32)
    for length, steps in ((7, 7), (7, 1), (64, 64), (64, 1)):
        a, b = decay(steps, 3, dtype=a_dtype, seed=1), random(length, 3, dtype=b_dtype, seed=2)
        h0 = random(3, dtype=state, seed=3)
        inputs = [a, b, h0]
        h, last, *grads = outputs_and_gradients(linear_scan, inputs)
        assert h.dtype == dtype
        assert last.dtype == state
        assert [g.dtype for g in grads] == [x.dtype for x in inputs]
        for y, z in zip((h, last), dense(exact(a), exact(b), exact(h0)), strict=True):
            close(y, z, TOLERANCE[dtype])
        # the state itself is never rounded to the dtype of h
        close(last, dense(exact(a), exact(b), exact(h0))[1], TOLERANCE[state])


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex64])
@pytest.mark.parametrize("length", [7, 257])
def test_low_precision_gradients_are_near_those_of_float64(dtype: torch.dtype, length: int) -> None:
    for steps in (1, length):
        state = torch.promote_types(dtype, torch.float32)
        inputs = [
            decay(2, steps, 3, dtype=dtype, seed=1),
            random(2, length, 3, dtype=dtype, seed=2),
            random(2, 3, dtype=state, seed=3),
        ]

        def f(*x: Tensor, state: torch.dtype = state) -> tuple[Tensor, Tensor]:
            h, last = linear_scan(*x)
            return h.to(state), last

        got = outputs_and_gradients(f, inputs)
        expected = outputs_and_gradients(linear_scan, [exact(x) for x in inputs])
        tolerance = 3 * TOLERANCE[dtype]
        for y, z in zip(got, expected, strict=True):
            close(y, z, tolerance)


@both
@pytest.mark.parametrize("h0_dtype", DTYPES, ids=str)
def test_initial_state_of_any_dtype(h0_dtype: torch.dtype) -> None:
    a, b = decay(5, 2, dtype=torch.float32, seed=1), random(5, 2, dtype=torch.float32, seed=2)
    h0 = random(2, dtype=h0_dtype, seed=3)
    h, last = linear_scan(a, b, h0)
    expected = torch.complex64 if h0_dtype.is_complex else torch.float32
    assert h.dtype == last.dtype == expected
    close(h, dense(exact(a), exact(b), exact(h0))[0], 1e-5)


SHAPES = {
    "a": [(7, 3), (7, 1), (1, 3), (2, 7, 3), (4, 1, 1, 3), (4, 2, 7, 3)],
    "b": [(7, 3), (7, 1), (2, 7, 3), (4, 1, 7, 3)],
    "h0": [None, (3,), (1,), (2, 3), (4, 1, 3)],
    "reset": [None, (7,), (2, 7), (4, 1, 7)],
}


@both
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_every_argument_broadcasts(reverse: bool) -> None:
    for a_shape, b_shape, h0_shape, reset_shape in itertools.product(*SHAPES.values()):
        a, b = decay(*a_shape, seed=1), random(*b_shape, seed=2)
        h0 = None if h0_shape is None else random(*h0_shape, seed=3)
        reset = None if reset_shape is None else resets(*reset_shape)
        ends = [a_shape[:-2], b_shape[:-2], (h0_shape or (1,))[:-1], (reset_shape or (1,))[:-1]]
        batch = torch.broadcast_shapes(*ends)
        size = torch.broadcast_shapes(a_shape[-1:], b_shape[-1:], (h0_shape or (1,))[-1:])
        got = outputs_and_gradients(
            lambda *x, r=reset: linear_scan(*x, reverse=reverse, reset=r), [a, b, h0]
        )
        expected = outputs_and_gradients(
            lambda *x, r=reset: linear_scan(*x, reverse=reverse, reset=r, backend="reference"),
            [a, b, h0],
        )
        assert got[0].shape == (*batch, 7, *size)
        assert got[1].shape == (*batch, *size)
        for y, z in zip(got, expected, strict=True):
            assert y.shape == z.shape
            close(y, z, 1e-12)


@both
@pytest.mark.parametrize("shape", [(0, 7, 3), (2, 7, 0), (2, 0, 3), (0, 0, 0)], ids=str)
def test_empty_axes(shape: tuple[int, ...]) -> None:
    inputs = [random(*shape), random(*shape), random(*shape[:-2], shape[-1])]
    h, last, *grads = outputs_and_gradients(linear_scan, inputs)
    assert h.shape == shape
    assert last.shape == shape[:-2] + shape[-1:]
    assert [g.shape for g in grads] == [x.shape for x in inputs]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("steps", [0, 1])
def test_length_zero_returns_the_initial_state_and_its_gradient(
    steps: int, dtype: torch.dtype
) -> None:
    h0 = random(2, 3, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    a = torch.zeros(2, steps, 3, dtype=dtype, requires_grad=True)
    h, last = linear_scan(a, torch.zeros(2, 0, 3, dtype=dtype), h0)
    assert h.shape == (2, 0, 3)
    assert torch.equal(last, h0)
    weight = random(2, 3, dtype=last.dtype, seed=4)
    got_h0, got_a = torch.autograd.grad(last, (h0, a), weight)
    assert torch.equal(got_h0, weight)
    assert not got_a.any()


@both
@pytest.mark.parametrize("length", [9, 80])
@pytest.mark.parametrize("value", [0.0, -1.0, -0.5, complex(0, 0), 1j, -0.6 + 0.8j], ids=str)
def test_zero_negative_and_complex_coefficients_are_exact(value: complex, length: int) -> None:
    dtype = torch.complex128 if isinstance(value, complex) else torch.float64
    b, h0 = random(length, 2, dtype=dtype, seed=2), random(2, dtype=dtype, seed=3)
    some_zero = decay(length, 2, dtype=dtype, seed=1)
    some_zero[::3] = value
    for a in (torch.full((length, 2), value, dtype=dtype), some_zero):
        got = outputs_and_gradients(linear_scan, [a, b, h0])
        expected = outputs_and_gradients(
            lambda *x: linear_scan(*x, backend="reference"), [a, b, h0]
        )
        for y, z in zip(got, expected, strict=True):
            close(y, z, 1e-12)


@both
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("length", [7, 64])
def test_a_reset_keeps_even_infinite_states_out(length: int, reverse: bool) -> None:
    a, b = decay(length, 2, seed=1), random(length, 2, seed=2)
    middle = length // 2
    reset = torch.zeros(length, dtype=torch.bool)
    reset[middle] = True
    earlier = slice(middle + 1, None) if reverse else slice(None, middle)
    later = slice(None, middle + 1) if reverse else slice(middle, None)
    b[earlier] = torch.inf
    h, last = linear_scan(a, b, reverse=reverse, reset=reset)
    alone, alone_last = linear_scan(a[later], b[later], reverse=reverse)
    close(h[later], alone, 1e-13)
    close(last, alone_last, 1e-13)


@both
def test_float32_is_as_exact_as_the_float32_loop() -> None:
    for constant, seed in itertools.product((False, True), range(3)):
        a64 = torch.sigmoid(3 + draw(4, 1 if constant else 4097, 8, seed=seed))
        a, b = a64.float(), draw(4, 4097, 8, seed=seed + 10).float()
        expected = linear_scan(a.double(), b.double(), backend="reference")[0]
        ours = (linear_scan(a, b)[0] - expected).abs().max()
        loop = (linear_scan(a, b, backend="reference")[0] - expected).abs().max()
        assert ours <= 2 * loop


@both
def test_a_hundred_thousand_steps() -> None:
    a = torch.full((1, 4), 1 - 1e-4)
    b = draw(100_000, 4, seed=1).float()
    expected = linear_scan(a.double(), b.double())[0]
    close(linear_scan(a, b)[0], expected, 1e-5)
    geometric = (1 - 0.999**100_000) / (1 - 0.999)
    a = torch.full((1, 1), 0.999, dtype=torch.float64)
    last = linear_scan(a, torch.ones(100_000, 1, dtype=torch.float64))[1]
    torch.testing.assert_close(last.item(), geometric, rtol=1e-11, atol=0)


# ---------------------------------------------------------------- one contract


@both
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
def test_any_split_continues_through_the_state(constant: bool, reverse: bool) -> None:
    length = 40
    a, b = decay(2, 1 if constant else length, 3, seed=1), random(2, length, 3, seed=2)
    h0, reset = random(2, 3, seed=3), resets(2, length)
    h, last = linear_scan(a, b, h0, reverse=reverse, reset=reset)
    for k in range(length + 1):
        pieces = [slice(0, k), slice(k, None)]
        state, parts = h0, []
        for piece in reversed(pieces) if reverse else pieces:
            a_piece = a if constant else a[:, piece]
            part, state = linear_scan(
                a_piece, b[:, piece], state, reverse=reverse, reset=reset[:, piece]
            )
            parts.append(part)
        close(torch.cat(parts[::-1] if reverse else parts, 1), h, 1e-13)
        close(state, last, 1e-13)


@both
@fixture_is_meant
@given(
    length=st.integers(0, 70),
    cuts=st.lists(st.integers(0, 70), max_size=4),
    constant=st.booleans(),
    reverse=st.booleans(),
    is_complex=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_scans_compose_at_any_cuts(
    length: int, cuts: list[int], constant: bool, reverse: bool, is_complex: bool, seed: int
) -> None:
    dtype = torch.complex128 if is_complex else torch.float64
    a = decay(1 if constant else length, 2, dtype=dtype, seed=seed)
    b = random(length, 2, dtype=dtype, seed=seed + 1)
    h0 = random(2, dtype=dtype, seed=seed + 2)
    reset = resets(length)
    bounds = [0, *sorted(min(c, length) for c in cuts), length]
    pieces = [slice(i, j) for i, j in itertools.pairwise(bounds)]
    state, parts = h0, []
    for piece in reversed(pieces) if reverse else pieces:
        part, state = linear_scan(
            a if constant else a[piece], b[piece], state, reverse=reverse, reset=reset[piece]
        )
        parts.append(part)
    h, last = linear_scan(a, b, h0, reverse=reverse, reset=reset, backend="reference")
    close(torch.cat(parts[::-1] if reverse else parts), h, 1e-12)
    close(state, last, 1e-12)


@both
@fixture_is_meant
@given(seed=st.integers(0, 10_000), length=st.integers(1, 40))
def test_the_scan_is_linear_in_b_and_h0(seed: int, length: int) -> None:
    a = decay(length, 2, seed=seed)
    b, c = random(length, 2, seed=seed + 1), random(length, 2, seed=seed + 2)
    h0, g0 = random(2, seed=seed + 3), random(2, seed=seed + 4)
    together = linear_scan(a, 2 * b - c, 2 * h0 - g0)
    for y, one, other in zip(together, linear_scan(a, b, h0), linear_scan(a, c, g0), strict=True):
        close(y, 2 * one - other, 1e-12)


@both
def test_reverse_is_a_flip_of_time() -> None:
    for length in (1, 9, 50):
        a, b, h0 = decay(length, 2, seed=1), random(length, 2, seed=2), random(2, seed=3)
        reset = resets(length)
        h, last = linear_scan(a, b, h0, reverse=True, reset=reset)
        flipped, flipped_last = linear_scan(a.flip(0), b.flip(0), h0, reset=reset.flip(0))
        assert torch.equal(h, flipped.flip(0))
        assert torch.equal(last, flipped_last)


# ---------------------------------------------------------------- both implementations inside


@contextmanager
def switched(channels: int, length: int) -> Iterator[None]:
    """Move the switch between the serial and the two-level form of the plain PyTorch operator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRNNX_CPU_BACKEND", "torch")
        patch.setattr(blocked, "SERIAL_CHANNELS", channels)
        patch.setattr(blocked, "SERIAL_LENGTH", length)
        yield


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
def test_serial_and_two_level_forms_agree_at_every_length(constant: bool, reverse: bool) -> None:
    for length in range(1, 60):
        inputs = [
            decay(2, 1 if constant else length, 2, dtype=torch.complex128, seed=1),
            random(2, length, 2, dtype=torch.complex128, seed=2),
            random(2, 2, dtype=torch.complex128, seed=3),
        ]
        reset = resets(2, length)
        results = []
        for limits in ((1, 1), (10**9, 0)):
            with switched(*limits):
                results.append(
                    outputs_and_gradients(
                        lambda *x, r=reset: linear_scan(*x, reverse=reverse, reset=r), inputs
                    )
                )
        for y, z in zip(*results, strict=True):
            close(y, z, 1e-12)


@pytest.mark.parametrize("channels", [blocked.SERIAL_CHANNELS - 1, blocked.SERIAL_CHANNELS])
def test_both_sides_of_the_switch_by_channels(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRNNX_CPU_BACKEND", "torch")
    a, b = decay(1, channels, seed=1), random(40, channels, seed=2)
    got = outputs_and_gradients(linear_scan, [a, b, None])
    expected = outputs_and_gradients(lambda *x: linear_scan(*x, backend="reference"), [a, b, None])
    for y, z in zip(got, expected, strict=True):
        close(y, z, 1e-12)


# ---------------------------------------------------------------- memory layouts

LAYOUTS = {
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
    "storage offset": lambda x: torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(
        x.shape
    ),
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded channels": lambda x: x[..., :1].expand(x.shape),
    "lazily conjugated": lambda x: x.conj(),
}


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("length", [7, 40])
def test_any_memory_layout(layout: str, dtype: torch.dtype, length: int) -> None:
    rearranged = LAYOUTS[layout]
    a, b = decay(2, length, 3, dtype=dtype, seed=1), random(2, length, 3, dtype=dtype, seed=2)
    h0 = random(2, 3, dtype=dtype, seed=3)
    for chosen in itertools.product((False, True), repeat=3):
        inputs = [rearranged(x) if c else x for x, c in zip((a, b, h0), chosen, strict=True)]
        compact = [x.resolve_conj().clone(memory_format=torch.contiguous_format) for x in inputs]
        got = outputs_and_gradients(linear_scan, inputs)
        expected = outputs_and_gradients(linear_scan, compact)
        for y, z in zip(got, expected, strict=True):
            close(y, z, 1e-14)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16])
@pytest.mark.parametrize("length", [7, 40])
def test_stride_zero_and_strided_upstream_gradients(dtype: torch.dtype, length: int) -> None:
    a = decay(2, length, 3, dtype=dtype, seed=1).requires_grad_()
    b = random(2, length, 3, dtype=dtype, seed=2).requires_grad_()
    h, last = linear_scan(a, b)
    one = torch.ones((), dtype=dtype)
    upstream = [
        (one.expand(h.shape), torch.ones(h.shape, dtype=dtype)),
        *((f(v := random(*h.shape, dtype=dtype, seed=5)), f(v).clone()) for f in LAYOUTS.values()),
    ]
    for g, compact in upstream:
        compact = compact.resolve_conj().contiguous()
        got = torch.autograd.grad(h, (a, b), g, retain_graph=True)
        expected = torch.autograd.grad(h, (a, b), compact, retain_graph=True)
        for y, z in zip(got, expected, strict=True):
            close(y, z, TOLERANCE[dtype] / 10)
    if not dtype.is_complex:
        got = torch.autograd.grad(h.sum() + last.sum(), (a, b), retain_graph=True)
        expected = torch.autograd.grad(
            (h, last), (a, b), (torch.ones_like(h), torch.ones_like(last))
        )
        assert all(torch.equal(y, z) for y, z in zip(got, expected, strict=True))


@both
@pytest.mark.parametrize("used", ["h", "h_last"])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_one_output_alone_has_gradients(used: str, length: int) -> None:
    inputs = [decay(2, length, 3, seed=1), random(2, length, 3, seed=2), random(2, 3, seed=3)]
    x = [v.requires_grad_() for v in inputs]
    position = 0 if used == "h" else 1
    got = torch.autograd.grad(linear_scan(*x)[position].sin().sum(), x)
    expected = torch.autograd.grad(linear_scan(*x, backend="reference")[position].sin().sum(), x)
    for y, z in zip(got, expected, strict=True):
        close(y, z, 1e-12)


@both
def test_only_the_wanted_gradients_are_returned() -> None:
    a, b, h0 = decay(7, 2, seed=1), random(7, 2, seed=2), random(2, seed=3)
    for wanted in itertools.product((False, True), repeat=3):
        x = [v.detach().requires_grad_(w) for v, w in zip((a, b, h0), wanted, strict=True)]
        h, last = linear_scan(*x)
        assert h.requires_grad == last.requires_grad == any(wanted)
        if any(wanted):
            (h.sum() + last.sum()).backward()
        assert [v.grad is not None for v in x] == list(wanted)


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@both
@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 7, 16, 41, 64])
def test_no_uninitialized_memory_reaches_a_result(dtype: torch.dtype, length: int) -> None:
    assert torch.empty(3).isnan().all()
    for reverse, steps, given_h0 in itertools.product((False, True), {1, length}, (False, True)):
        inputs = [
            decay(2, steps, 3, dtype=dtype, seed=1),
            random(2, length, 3, dtype=dtype, seed=2),
            random(2, 3, dtype=torch.promote_types(dtype, torch.float32)) if given_h0 else None,
        ]
        for reset in (None, resets(2, length)):
            results = outputs_and_gradients(
                lambda *x, o=(reverse, reset): linear_scan(*x, reverse=o[0], reset=o[1]), inputs
            )
            assert not any(y.isnan().any() for y in results)


@both
@pytest.mark.parametrize("length", [0, 1, 7, 40])
@pytest.mark.parametrize("steps", ["varying", "constant"])
def test_inputs_are_never_mutated_nor_returned(length: int, steps: str) -> None:
    a = decay(2, length if steps == "varying" else 1, 3, seed=1)
    inputs = [a, random(2, length, 3, seed=2), random(2, 3, seed=3), resets(2, length)]
    before = [(x._version, x.clone()) for x in inputs]
    outputs = outputs_and_gradients(lambda *x: linear_scan(*x, reset=inputs[3]), inputs[:3])
    for x, (version, copy) in zip(inputs, before, strict=True):
        assert x._version == version
        assert torch.equal(x, copy)
    storages = {x.untyped_storage().data_ptr() for x in inputs if x.numel()}
    assert not storages & {y.untyped_storage().data_ptr() for y in outputs[:2] if y.numel()}
    outputs[1].add_(1)  # a state one may update in place
    assert torch.equal(inputs[2], before[2][1])


# ---------------------------------------------------------------- reproducibility


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("length", [7, 257])
def test_bitwise_reproducible(dtype: torch.dtype, length: int) -> None:
    for steps in (1, length):
        a, b = decay(3, steps, 5, dtype=dtype, seed=1), random(3, length, 5, dtype=dtype, seed=2)
        inputs: list[Tensor | None] = [a, b]
        first = outputs_and_gradients(lambda a, b: linear_scan(a, b), inputs)
        for _ in range(3):
            again = outputs_and_gradients(lambda a, b: linear_scan(a, b), inputs)
            assert all(torch.equal(y, z) for y, z in zip(first, again, strict=True))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("length", [7, 257])
@pytest.mark.parametrize("channels", [3, 16, 1500])
def test_a_row_is_independent_of_the_batch_around_it(
    channels: int, length: int, dtype: torch.dtype
) -> None:
    """Bitwise if real. PyTorch rounds complex products otherwise in a vector than in its tail."""
    for steps in (1, length):
        a = decay(4, steps, channels, dtype=dtype, seed=1)
        b = random(4, length, channels, dtype=dtype, seed=2)
        h0 = random(4, channels, dtype=torch.promote_types(dtype, torch.float32), seed=3)
        together = [y.unbind(0) for y in outputs_with_fixed_weights(a, b, h0)]
        for row in range(4):
            alone = outputs_with_fixed_weights(a[row], b[row], h0[row])
            for y, z in zip(alone, together, strict=True):
                if dtype.is_complex:
                    close(y, z[row], 1e-6)
                else:
                    assert torch.equal(y, z[row])


def outputs_with_fixed_weights(*inputs: Tensor) -> list[Tensor]:
    x = [v.detach().requires_grad_() for v in inputs]
    h, last = linear_scan(*x)
    weights = [torch.cos(y.detach()) for y in (h, last)]
    return [h.detach(), last.detach(), *torch.autograd.grad((h, last), x, weights)]


# ---------------------------------------------------------------- autocast, devices


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    inputs = [decay(2, 40, 3, dtype=dtype, seed=1), random(2, 40, 3, dtype=dtype, seed=2)]
    plain = outputs_and_gradients(lambda a, b: linear_scan(a, b), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = outputs_and_gradients(lambda a, b: linear_scan(a, b), inputs)
    for y, z in zip(plain, cast, strict=True):
        assert y.dtype == z.dtype
        assert torch.equal(y, z)


def test_meta_tensors_give_shapes_and_dtypes_forward_and_backward() -> None:
    for dtype, reverse in itertools.product(DTYPES, (False, True)):
        a = torch.empty(3, 1, 4, dtype=dtype, device="meta", requires_grad=True)
        b = torch.empty(2, 1, 9, 4, dtype=dtype, device="meta", requires_grad=True)
        h0 = torch.empty(4, device="meta", requires_grad=True)
        h, last = linear_scan(a, b, h0, reverse=reverse)
        assert (h.shape, h.dtype, h.device.type) == ((2, 3, 9, 4), dtype, "meta")
        assert (last.shape, last.dtype) == ((2, 3, 4), torch.promote_types(dtype, torch.float32))
        grads = torch.autograd.grad((h, last), (a, b, h0), (h.detach(), last.detach()))
        assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in (a, b, h0)]


# ---------------------------------------------------------------- errors

X = torch.zeros(7, 3)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (X, X, {"backend": "cuda"}, r"backend 'cuda', expected 'auto' or 'reference'"),
        (X[0], X, {}, r"a \(3,\) needs at least 2 dimension"),
        (X, X[0], {}, r"b \(3,\) needs at least 2 dimension"),
        (X, X, {"h0": X[0, 0]}, r"h0 \(\) needs at least 1 dimension"),
        (X, X, {"reset": torch.tensor(True)}, r"reset \(\) needs at least 1 dimension"),
        (X.to("meta"), X, {}, r"a is on meta and b on cpu"),
        (X, X, {"h0": X[0].to("meta")}, r"h0 is on meta and b on cpu"),
        (X, X, {"reset": torch.zeros(7, device="meta") > 0}, r"reset is on meta and b on cpu"),
        (X, X, {"reset": torch.zeros(7)}, r"reset has dtype torch\.float32, expected bool"),
        (X.long(), X, {}, r"a has dtype torch\.int64, expected a floating or complex one"),
        (X, X.bool(), {}, r"b has dtype torch\.bool, expected a floating or complex one"),
        (X, X, {"h0": X[0].int()}, r"h0 has dtype torch\.int32, expected a floating"),
        (X[:4], X, {}, r"a \(4, 3\) and b \(7, 3\) .*axis -2 \(time\): a needs size 1 or 7"),
        (X, X[:1], {}, r"a \(7, 3\) and b \(1, 3\) do not broadcast at axis -2"),
        (X, X, {"reset": torch.zeros(1, dtype=torch.bool)}, r"reset \(1,\) has 1 steps, b has 7"),
        (X[:, :2], X, {}, r"a \(7, 2\) and b \(7, 3\) do not broadcast at axis -1 \(channels\)"),
        (X, X, {"h0": X[0, :2]}, r"b \(7, 3\) and h0 \(2,\) do not broadcast at axis -1"),
        (X.expand(2, 7, 3), X.expand(5, 7, 3), {}, r"do not broadcast at the batch axes"),
        (X, X.expand(2, 7, 3), {"h0": X[:5]}, r"h0 \(5, 3\) do not broadcast at the batch axes"),
        (
            X,
            X.expand(2, 7, 3),
            {"reset": torch.zeros(5, 7, dtype=torch.bool)},
            r"reset \(5, 7\) do not broadcast at the batch axes",
        ),
    ],
)
def test_bad_arguments_are_named(
    a: Tensor, b: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="linear_scan: .*" + message):
        linear_scan(a, b, **options)
    if options.get("backend") is None:
        with pytest.raises(ValueError, match="linear_scan: .*" + message):
            linear_scan(a, b, **options, backend="reference")


# ---------------------------------------------------------------- the seam for compiled backends


class StandIn:
    """Compiled kernels, for the dispatcher's sake: counts its calls and what it was given."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []
        self.calls: list[str] = []
        self.handles: list[library.Implementation] = []

    def forward(self, a: Tensor, *rest: Any) -> Any:
        assert type(a) is Tensor
        assert not torch.is_grad_enabled()
        self.calls.append("forward")
        self.shapes.append(a.shape)
        return blocked.linear_scan(a, *rest)

    def backward(self, a: Tensor, *rest: Any) -> Any:
        assert not torch.is_grad_enabled()
        self.calls.append("backward")
        return blocked.linear_scan_backward(a, *rest)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.delenv("LRNNX_CPU_BACKEND", raising=False)
    kernels = StandIn()
    kernels.handles = [
        library.implement("linear_scan", "cpu", kernels.forward),
        library.implement("linear_scan_backward", "cpu", kernels.backward),
    ]
    yield kernels
    kernels.handles.clear()
    gc.collect()


def scan_loss(a: Tensor, b: Tensor) -> Tensor:
    h, last = linear_scan(a, b)
    return h.sin().sum() + last.sum()


def test_a_compiled_backend_is_used_wherever_the_operator_is(stand_in: StandIn) -> None:
    a, b = decay(1, 2, seed=1), random(7, 2, seed=2)
    linear_scan(a, b)
    assert stand_in.calls == ["forward"]
    stand_in.calls.clear()
    outputs_and_gradients(lambda *x: linear_scan(*x), [a, b])
    assert stand_in.calls == ["forward", "backward"]
    stand_in.calls.clear()
    vmap(grad(scan_loss), (None, 0))(a, torch.stack([b, b]))
    assert stand_in.calls == ["forward", "backward"]
    stand_in.calls.clear()
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    compiled = torch.compile(scan_loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, y), (x, y))
    assert stand_in.calls == ["forward", "backward"]
    expected = torch.autograd.grad(scan_loss(x, y), (x, y))
    for u, v in zip(got, expected, strict=True):
        close(u, v, 1e-12)


def test_the_reference_backend_reaches_no_compiled_one(stand_in: StandIn) -> None:
    linear_scan(decay(7, 2), random(7, 2), backend="reference")
    assert not stand_in.calls


def test_the_environment_switches_back_to_pytorch_and_on_again(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = decay(7, 2, seed=1), random(7, 2, seed=2)
    monkeypatch.setenv("LRNNX_CPU_BACKEND", "torch")
    h, _ = linear_scan(a, b)
    assert not stand_in.calls
    close(h, dense(a, b, None)[0], 1e-13)
    monkeypatch.delenv("LRNNX_CPU_BACKEND")
    linear_scan(a, b)
    assert stand_in.calls == ["forward"]


def test_another_word_in_the_environment_is_no_backend(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRNNX_CPU_BACKEND", "Torch")
    with pytest.raises(ValueError, match="LRNNX_CPU_BACKEND = 'Torch' in the environment"):
        linear_scan(decay(7, 2), random(7, 2))
    monkeypatch.setenv("LRNNX_CPU_BACKEND", "")
    linear_scan(decay(7, 2), random(7, 2))
    assert stand_in.calls == ["forward"]


def test_dropping_the_handle_brings_back_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRNNX_CPU_BACKEND", raising=False)
    a, b = decay(7, 2, seed=1), random(7, 2, seed=2)
    for _ in range(2):
        kernels = StandIn()
        handle = library.implement("linear_scan", "cpu", kernels.forward)
        linear_scan(a, b)
        assert kernels.calls == ["forward"]
        del handle
        gc.collect()
        h, _ = linear_scan(a, b)
        assert kernels.calls == ["forward"]
        close(h, dense(a, b, None)[0], 1e-13)


def test_a_backend_gets_a_constant_coefficient_unexpanded(stand_in: StandIn) -> None:
    outputs_and_gradients(
        lambda *x: linear_scan(*x), [decay(1, 3, seed=1), random(2, 40, 3, seed=2)]
    )
    vmap(linear_scan, (0, None))(decay(5, 1, 3), random(40, 3))
    assert all(shape[-2] == 1 for shape in stand_in.shapes)
    assert stand_in.shapes


def test_implement_refuses_unknown_names_and_devices() -> None:
    with pytest.raises(ValueError, match=r"no operator 'scan'; defined are \[.*'linear_scan'"):
        library.implement("scan", "cpu", blocked.linear_scan)
    with pytest.raises(ValueError, match="device 'tpu', expected 'cpu' or 'cuda'"):
        library.implement("linear_scan", "tpu", blocked.linear_scan)


# ---------------------------------------------------------------- memory


def saved_bytes(f: Any) -> int:
    """Return the bytes of distinct storage that autograd keeps for the backward pass."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = f()
    assert result is not None
    return sum(storages.values())


@both
@pytest.mark.parametrize("steps", ["varying", "constant"])
def test_autograd_keeps_the_coefficients_and_the_states_and_no_more(steps: str) -> None:
    length, channels = 1000, 4
    rows = length if steps == "varying" else 1
    a = decay(rows, channels, seed=1).requires_grad_()
    b = random(length, channels, seed=2).requires_grad_()
    assert saved_bytes(lambda: linear_scan(a, b)) <= 8 * channels * (length + rows) + 1024


@both
def test_allocations_are_linear_in_the_length() -> None:
    def allocated(length: int) -> int:
        a = decay(1, 4, seed=1).requires_grad_()
        b = random(length, 4, seed=2).requires_grad_()
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            h, last = linear_scan(a, b)
            torch.autograd.grad(h.sum() + last.sum(), (a, b))
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())

    small, large = allocated(1024), allocated(16 * 1024)
    assert large <= 20 * small
