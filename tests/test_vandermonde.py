"""vandermonde: against its definition, over lengths, kinds and layouts; precision and memory.

Derivatives of higher order and every transform are the business of the transform table.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import draw
from torch import Tensor

from lrnnx_core.backends import blocked_sums
from lrnnx_core.ops import vandermonde

ROOT = Path(__file__).parent.parent
H, N = 3, 4
LENGTHS = (0, 1, 2, 3, 15, 16, 17, 64, 257, 1000)
KINDS = pytest.mark.parametrize("kinds", ["vz", "z", "v", ""], ids=lambda k: f"complex {k or '-'}")


def problem(
    v: tuple[int, ...] = (), z: tuple[int, ...] = (), kinds: str = "vz"
) -> tuple[Tensor, Tensor]:
    """Return v (*v, H, N) and z (*z, H, N), decaying; ``kinds`` names the complex ones."""
    nodes = 0.3 * draw(*z, H, N, seed=2, complex_="z" in kinds)
    decay = -nodes.real.abs()
    nodes = torch.complex(decay, 3 * nodes.imag) if nodes.is_complex() else decay
    return draw(*v, H, N, seed=1, complex_="v" in kinds), nodes


def loop(v: Tensor, z: Tensor, length: int) -> Tensor:
    """Run K_t = Re sum_n v_n a_n^t with a running product, no exponential of t."""
    a, x, steps = torch.exp(z), v + 0 * z, []
    for _ in range(length):
        steps.append(x.sum(-1).real if x.is_complex() else x.sum(-1))
        x = a * x
    return torch.stack(steps, -2)


def with_gradients(function: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    weights = torch.linspace(1, 2, max(1, y.numel()), dtype=y.dtype)[: y.numel()]
    return y.detach(), *torch.autograd.grad((y * weights.reshape(y.shape)).sum(), leaves)


@KINDS
@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients_are_those_of_a_running_product(length: int, kinds: str) -> None:
    v, z = problem(kinds=kinds)
    got = with_gradients(lambda v, z: vandermonde(v, z, length), v, z)
    assert got[0].shape == (length, H)
    if length:
        expected = with_gradients(lambda v, z: loop(v, z, length), v, z)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-10)
    else:
        assert not any(g.any() for g in got[1:])


@pytest.mark.parametrize(
    ("v", "z"),
    [
        ((5,), ()), ((), (5,)), ((2, 3), (3,)), ((3, 1), (3, 2)), ((2, 1, 4), (3, 1)), ((1,), (1,)),
        ((0,), ()), ((2,), (0, 1)),
    ],
)  # fmt: skip
def test_leading_axes_broadcast(v: tuple[int, ...], z: tuple[int, ...]) -> None:
    tensors = problem(v, z)
    got = with_gradients(lambda v, z: vandermonde(v, z, 37), *tensors)
    expected = with_gradients(lambda v, z: vandermonde(v, z, 37, backend="reference"), *tensors)
    assert got[0].shape == (*torch.broadcast_shapes(v, z), 37, H)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tile", [1, 64, 1000])
def test_the_size_of_a_tile_changes_nothing_but_rounding(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shapes in (((3,), ()), ((3, 2), (2,)), ((2,), (2,))):
        tensors = problem(*shapes)
        whole = with_gradients(lambda v, z: vandermonde(v, z, 100), *tensors)
        with monkeypatch.context() as patch:
            patch.setitem(blocked_sums.TILE, "cpu", tile)
            tiled = with_gradients(lambda v, z: vandermonde(v, z, 100), *tensors)
        torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)


def test_repeated_calls_agree_to_the_bit() -> None:
    tensors = [t.to(torch.complex64) for t in problem((4,))]
    runs = [with_gradients(lambda v, z: vandermonde(v, z, 333), *tensors) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_strides_of_inputs_and_upstream_do_not_matter() -> None:
    v, z = problem((4,))
    expected = vandermonde(v, z, 50)
    strange_v = torch.stack([v, v], -1).transpose(0, 1)[..., 0].transpose(0, 1)
    strange_z = z.conj().mT.contiguous().mT.conj()
    assert strange_z.is_conj()
    assert not strange_v.is_contiguous()
    torch.testing.assert_close(vandermonde(strange_v, strange_z, 50), expected)

    leaf = v.clone().requires_grad_()
    vandermonde(leaf, z, 50).sum().backward()  # its upstream is expanded, of stride 0
    dense = v.clone().requires_grad_()
    vandermonde(dense, z, 50).backward(torch.ones(4, 50, H, dtype=torch.float64))
    torch.testing.assert_close(leaf.grad, dense.grad)


def test_no_states_sum_to_zero() -> None:
    empty = torch.zeros(H, 0, dtype=torch.complex64)
    assert torch.equal(vandermonde(empty, empty, 7), torch.zeros(7, H))
    assert vandermonde(*(torch.zeros(0, N) for _ in range(2)), 7).shape == (7, 0)


def test_dtypes_are_promoted_to_at_least_single_precision() -> None:
    v, z = problem()
    for v_type, z_type, expected in [
        (torch.complex64, torch.complex128, torch.float64),
        (torch.float32, torch.complex64, torch.float32),
        (torch.bfloat16, torch.complex64, torch.float32),
        (torch.complex64, torch.bfloat16, torch.float32),
    ]:
        x = (v if v_type.is_complex else v.real).to(v_type)
        y = (z if z_type.is_complex else z.real).to(z_type)
        assert vandermonde(x, y, 5).dtype == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        K = vandermonde(v.to(torch.complex64), z.to(torch.complex64), 100)
    torch.testing.assert_close(K.double(), vandermonde(v, z, 100), rtol=1e-5, atol=1e-5)


def test_single_precision_keeps_phases_over_long_sequences() -> None:
    length, heads, states = 16384, 4, 64
    dt = torch.logspace(-3, -1, heads).unsqueeze(-1)
    z = torch.complex(-0.5 * dt.expand(-1, states), dt * math.pi * torch.arange(states))
    v = draw(heads, states, seed=1, complex_=True).to(torch.complex64)
    single = with_gradients(lambda v, z: vandermonde(v, z, length), v, z)
    double = with_gradients(
        lambda v, z: vandermonde(v, z, length), *(t.to(torch.complex128) for t in (v, z))
    )
    bounds = {"K": 1e-6, "dv": 1e-6, "dz": 1e-6}  # measured: 4e-7, 6e-8, 2e-7 (naive 2e-6)
    for (name, bound), x, y in zip(bounds.items(), single, double, strict=True):
        error = (x - y).abs().max() / y.abs().max()
        assert error < bound, f"{name}: {error}"


def test_oscillations_without_decay_stay_exact_for_a_million_steps() -> None:
    z = torch.tensor([[2.7j, -0.9j]], dtype=torch.complex64)
    v = torch.tensor([[1.0 + 0.5j, 0.25j]])
    K = vandermonde(v, z, 1_000_000)[-1000:].double()
    t = torch.arange(1_000_000 - 1000, 1_000_000, dtype=torch.float64).unsqueeze(-1)
    expected = (v * torch.exp(t * z.to(torch.complex128))).real.sum(-1, keepdim=True)
    torch.testing.assert_close(K, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(H, N + 1)}, "expected z"),
        ({"z": torch.zeros(N)}, "expected z"),
        ({"v": torch.zeros(N)}, "expected v"),
        ({"v": torch.zeros(2, H, N), "z": torch.zeros(3, H, N)}, "do not broadcast"),
        ({"v": torch.zeros(H, N, dtype=torch.int64)}, "dtype torch.int64"),
        ({"z": torch.zeros(H, N, device="meta")}, "is on meta"),
        ({"length": -1}, "length = -1"),
        ({"backend": "fast"}, "backend 'fast'"),
    ],
)
def test_bad_input_raises(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"v": torch.zeros(H, N), "z": torch.zeros(H, N), "length": 4}
    with pytest.raises(ValueError, match=message) as error:
        vandermonde(**(arguments | change))
    assert "vandermonde" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["vandermonde", "cauchy"])
@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
def test_memory_is_a_small_part_of_the_matrix(op: str, train: bool) -> None:
    """H = 512, N = 64, L = 16384: the matrix has 4 GiB (2 GiB for the half of the nodes)."""
    shape = ["--shape", "512", "64", "16384", "--threads", "1"]
    arguments = [sys.executable, "-m", "benchmarks.cpu.vandermonde_cauchy", "--peak", op, *shape]
    done = subprocess.run(
        [*arguments, *(["--train"] if train else [])], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert 1 < float(done.stdout) < 300
