"""Elementary functions of the compiled CPU backend, against wider arithmetic."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import mpmath  # comes with torch
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba")
import llvmlite.binding as llvm
import numba

from lrnnx_core.backends.cpu import mathematics
from lrnnx_core.backends.cpu.compiling import FASTMATH

LARGEST = {np.float32: 2e-7, np.float64: 1e-15}
NAMES = ("exp", "expm1", "phi1", "sigmoid", "silu", "softplus")
INF = np.inf


@functools.cache
def looped(name: str) -> Callable[..., Any]:
    """Return the function over arrays, compiled as kernels are."""
    function = getattr(mathematics, name)
    options = {"nogil": True, "error_model": "numpy", "fastmath": FASTMATH}
    if name == "sincos":

        @numba.njit(**options)
        def run(x, y, z):
            for i in range(x.size):
                y[i], z[i] = function(x[i])
    else:

        @numba.njit(**options)
        def run(x, y):
            for i in range(x.size):
                y[i] = function(x[i])

    return run


def apply(name: str, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    looped(name)(x, y)
    return y


def sincos(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s, c = np.empty_like(x), np.empty_like(x)
    looped("sincos")(x, s, c)
    return s, c


def exact(name: str, x: Any) -> Any:
    """Return the function of a number of mpmath, which is finite."""
    if name == "exp":
        return mpmath.exp(x)
    if name == "expm1":
        return mpmath.expm1(x)
    if name == "phi1":
        return mpmath.expm1(x) / x if x else mpmath.mpf(1)
    if name == "sigmoid":
        return 1 / (1 + mpmath.exp(-x))
    if name == "silu":
        return x / (1 + mpmath.exp(-x))
    return x if x > 20 else mpmath.log1p(mpmath.exp(x))


def of_many(name: str, x: np.ndarray) -> np.ndarray:
    """Return the same in NumPy's widest type, for float32 or many arguments."""
    x = x.astype(np.longdouble)
    with np.errstate(all="ignore"):
        if name == "exp":
            return np.exp(x)
        if name == "expm1":
            return np.expm1(x)
        if name == "phi1":
            return np.where(x == 0, 1, np.expm1(x) / np.where(x == 0, 1, x))
        if name == "sigmoid":
            return 1 / (1 + np.exp(-x))
        if name == "silu":
            return x / (1 + np.exp(-x))
        return np.where(x > 20, x, np.log1p(np.exp(x)))


def check(name: str, x: np.ndarray, y: np.ndarray, expected: np.ndarray) -> None:
    info = np.finfo(x.dtype)
    with np.errstate(all="ignore"):
        size, error = np.abs(expected), np.abs(y.astype(np.longdouble) - expected)
        normal = (size >= info.tiny) & (size <= info.max)
        relative = error[normal] / size[normal]
    worst = relative.argmax() if relative.size else None
    if worst is not None:
        assert relative[worst] <= LARGEST[x.dtype.type], (name, x[normal][worst])
    small = size < info.tiny
    assert (error[small] <= 1.5 * info.smallest_subnormal).all(), name
    # within the bound of the largest number both infinity and that number are right
    beyond = size > np.longdouble(info.max) * (1 + LARGEST[x.dtype.type])
    assert np.isinf(y[beyond]).all(), name


def arguments(dtype: Any) -> np.ndarray:
    """Return numbers of every exponent and both signs, and many where the functions bend."""
    info, generator = np.finfo(dtype), np.random.default_rng(0)
    exponents = np.arange(info.minexp - info.nmant, info.maxexp)
    mantissas = 1 + generator.random((exponents.size, 40))
    with np.errstate(all="ignore"):
        every = np.ldexp(mantissas.astype(np.longdouble), exponents[:, None]).ravel()
    end = -np.log(np.longdouble(info.smallest_subnormal)) + 2
    bend = generator.uniform(-end, end, 60_000)
    near = generator.normal(size=20_000) * 3
    steps = np.arange(-160, 160) * (np.log(2) / 2)  # where the reduction changes over
    x = np.concatenate([every, -every, bend, near, steps, np.nextafter(steps, 0)]).astype(dtype)
    return x[np.isfinite(x)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_error_over_all_exponents(name: str, dtype: Any) -> None:
    if dtype == np.float64 and np.finfo(np.longdouble).nmant < 60:
        pytest.skip("no wider type here")
    x = arguments(dtype)
    check(name, x, apply(name, x), of_many(name, x))


@pytest.mark.parametrize("name", NAMES)
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=12))
def test_any_float64(name: str, values: list[float]) -> None:
    x = np.array([v for v in values if abs(v) < 1e300])
    with mpmath.workdps(40):
        clipped = [exact(name, mpmath.mpf(max(min(v, 1e4), -1e4))) for v in x]
        linear = name in ("silu", "softplus")
        expected = [
            np.longdouble(v) if linear and v > 1e4 else np.longdouble(mpmath.nstr(e, 25))
            for v, e in zip(x, clipped, strict=True)
        ]
    if name == "phi1":  # -1/x below the range in which the quotient was taken
        expected = [
            -1 / np.longdouble(v) if v < -1e4 else e for v, e in zip(x, expected, strict=True)
        ]
    check(name, x, apply(name, x), np.array(expected, dtype=np.longdouble))


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=200))
def test_any_float32(values: list[float]) -> None:
    x = np.array(values, dtype=np.float32)
    for name in NAMES:
        check(name, x, apply(name, x), of_many(name, x))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits(dtype: Any) -> None:
    x = np.array([-INF, INF, np.nan, 0.0, -0.0], dtype=dtype)
    expected = {
        "exp": (0, INF, 1),
        "expm1": (-1, INF, 0),
        "phi1": (0, INF, 1),
        "sigmoid": (0, 1, 0.5),
        "softplus": (0, INF, np.log(dtype(2))),
        "softplus_slope": (0, 1, 0.5),
    }
    for name, (low, high, zero) in expected.items():
        y = apply(name, x)
        np.testing.assert_array_equal(y[:2], np.array([low, high], dtype), err_msg=name)
        assert np.isnan(y[2]), name
        np.testing.assert_allclose(y[3:], zero, rtol=LARGEST[dtype], err_msg=name)
    y = apply("silu", x)
    np.testing.assert_array_equal(y, torch.nn.functional.silu(torch.from_numpy(x)).numpy())
    largest = np.array([-np.finfo(dtype).max, np.finfo(dtype).max], dtype)
    np.testing.assert_array_equal(apply("silu", largest), [0, largest[1]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softplus_and_its_slope_are_pytorchs_around_its_threshold(dtype: Any) -> None:
    x = np.nextafter(np.full(3, 20, dtype), np.array([0, 20, 99], dtype))
    t = torch.from_numpy(x).requires_grad_()
    y = torch.nn.functional.softplus(t)
    (slope,) = torch.autograd.grad(y.sum(), t)
    np.testing.assert_allclose(apply("softplus", x), y.detach(), rtol=LARGEST[dtype])
    np.testing.assert_allclose(apply("softplus_slope", x), slope, rtol=LARGEST[dtype])
    assert apply("softplus", x)[2] == x[2]
    assert apply("softplus_slope", x)[2] == 1


# ---------------------------------------------------------------- sine and cosine


def angles(dtype: Any) -> np.ndarray:
    generator = np.random.default_rng(1)
    largest = mathematics.SINCOS_RANGE
    every = generator.uniform(-1, 1, 6000) * 2.0 ** generator.uniform(-160, 27, 6000)
    quarters = np.round(generator.uniform(-1, 1, 4000) * 2.0 ** generator.uniform(0, 26, 4000))
    near = quarters * (np.pi / 2)  # where nearly all digits cancel
    between = (quarters + 0.5) * (np.pi / 2)  # where the reduction changes over
    x = np.concatenate([every, near, between, [largest, -largest, 0.0]])
    return x[np.abs(x) <= largest].astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sine_and_cosine_up_to_large_angles(dtype: Any) -> None:
    x = angles(dtype)
    s, c = sincos(x)
    with mpmath.workdps(45):
        true_s = np.array([float(mpmath.sin(mpmath.mpf(float(v)))) for v in x])
        true_c = np.array([float(mpmath.cos(mpmath.mpf(float(v)))) for v in x])
    for got, true in ((s, true_s), (c, true_c)):
        normal = np.abs(true) >= np.finfo(dtype).tiny
        relative = np.abs(got[normal].astype(np.float64) / true[normal] - 1)
        assert relative.max() <= LARGEST[dtype], x[normal][relative.argmax()]
        assert np.abs(got[~normal] - true[~normal]).max(initial=0) < np.finfo(dtype).tiny
    assert np.abs(np.hypot(s.astype(np.float64), c) - 1).max() < LARGEST[dtype]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_beyond_the_range_sine_and_cosine_are_nan_and_never_wrong(dtype: Any) -> None:
    above = np.nextafter(dtype(mathematics.SINCOS_RANGE), dtype(INF))
    x = np.array([above, -above, 1e30, INF, -INF, np.nan], dtype)
    for y in sincos(x):
        assert np.isnan(y).all()


# ---------------------------------------------------------------- speed


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", [*NAMES, "softplus_slope", "sincos"])
def test_loops_vectorise(name: str, dtype: Any) -> None:
    """A loop that does not is ten times slower: its body has no packed arithmetic."""
    x = np.ones(4, dtype)
    sincos(x) if name == "sincos" else apply(name, x)
    variants = looped(name).inspect_asm().items()
    (assembly,) = [asm for types, asm in variants if types[0].dtype.name == dtype.__name__]
    calls = [line.split()[-1] for line in assembly.splitlines() if "call" in line]
    assert not any(word in call for call in calls for word in ("exp", "log", "sin", "cos"))
    if llvm.get_process_triple().startswith("x86_64"):
        packed = "ps" if dtype == np.float32 else "pd"
        assert re.search(rf"v?(mul|fmadd\d+){packed}\s", assembly)
