"""The leaf operators of causal_conv1d: against its composite, and the launches of its kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import draw
from torch import Tensor
from torch.func import grad, vmap

from lrnnx_core.backends import blocked_conv1d, cuda, cuda_conv1d
from lrnnx_core.ops import causal_conv1d
from lrnnx_core.ops.causal_conv1d import _composite

H100 = cuda.Limits(132, 228 * 1024, 227 * 1024)
TAPS = pytest.mark.parametrize("taps", [1, 2, 4, 8])


def problem(
    *shape: int, taps: int, groups: tuple[int, ...] = (), optional: bool = True, reset: bool = True
) -> tuple[Tensor | None, ...]:
    """Return x, weight, bias, tail, reset; each group of the batch has its own weight."""
    *batch, length, channels = shape
    return (
        draw(*shape, seed=1),
        draw(*groups, channels, 1, taps, seed=2),
        draw(*groups, channels, seed=3) if optional else None,
        draw(*batch, taps - 1, channels, seed=4) if optional else None,
        draw(*batch, length, seed=5) > 0.8 if reset else None,
    )


def cotangents(x: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    return draw(*x.shape, seed=6), draw(*x.shape[:-2], taps - 1, x.shape[-1], seed=7)


def composed(*inputs: Tensor | None, silu: bool) -> tuple[Tensor, ...]:
    """Return both outputs and the gradients of the composite, by autograd."""
    x, weight, *_ = inputs
    leaves = [
        t if t is None or t.dtype == torch.bool else t.clone().requires_grad_() for t in inputs
    ]
    with torch.enable_grad():
        outputs = _composite(*leaves, silu)
    wanted = [t for t in leaves[:4] if t is not None]
    gradients = torch.autograd.grad(
        outputs, wanted, cotangents(x, weight.shape[-1]), allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    return *(y.detach() for y in outputs), *gradients


def called(backend: Any, *inputs: Tensor | None, silu: bool) -> tuple[Tensor, ...]:
    """Return the same of a backend's leaves, without gradients that stand for none."""
    x, weight, bias, tail, _ = inputs
    back = backend.causal_conv1d_backward(*cotangents(x, weight.shape[-1]), *inputs, silu)
    given = (x, weight, bias, tail)
    assert [g.shape for g in back] == [(0,) if t is None else t.shape for t in given]
    outputs = backend.causal_conv1d(*inputs, silu)
    assert all(t.is_contiguous() for t in (*outputs, *back))
    return *outputs, *(g for g, t in zip(back, given, strict=True) if t is not None)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@TAPS
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 20])
def test_the_default_leaves_are_the_composite_and_its_gradient(length: int, taps: int) -> None:
    for optional, reset, silu in itertools.product((True, False), repeat=3):
        inputs = problem(2, length, 3, taps=taps, optional=optional, reset=reset)
        close(called(blocked_conv1d, *inputs, silu=silu), composed(*inputs, silu=silu))


@pytest.mark.parametrize("length", [1, 6])
def test_groups_of_the_batch_have_weights_of_their_own(length: int) -> None:
    inputs = problem(2, 3, 4, length, 3, taps=4, groups=(2, 3))
    got = called(blocked_conv1d, *inputs, silu=True)
    for i, j in itertools.product(range(2), range(3)):
        part = [None if t is None else t[i, j] for t in inputs]
        g_y, g_last = (g[i, j] for g in cotangents(inputs[0], 4))
        alone = blocked_conv1d.causal_conv1d(*part, True)
        alone += blocked_conv1d.causal_conv1d_backward(g_y, g_last, *part, True)
        close([t[i, j] for t in got], list(alone))


def test_per_sample_gradients_reach_the_leaf_and_are_right() -> None:
    x, weight, bias, *_ = problem(5, 6, 3, taps=4, reset=False)

    def loss(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, activation="silu")[0].sin().sum()

    got = vmap(grad(loss, (0, 1)), (None, None, 0))(weight, bias, x)
    for i in range(5):
        close([g[i] for g in got], list(grad(loss, (0, 1))(weight, bias, x[i])))
    ensemble = vmap(causal_conv1d, (None, 0))(x, torch.stack([weight, 2 * weight]))
    close([y[1] for y in ensemble], list(causal_conv1d(x, 2 * weight)))


def test_without_gradients_the_numbers_are_the_same() -> None:
    x, weight, bias, tail, reset = problem(2, 9, 3, taps=4)
    arguments = {"activation": "silu", "reset": reset}
    want = causal_conv1d(x.requires_grad_(), weight, bias, tail, **arguments)
    assert want[0].requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = causal_conv1d(x, weight, bias, tail, **arguments)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_a_reset_hides_reaches_no_gradient() -> None:
    x, weight, bias, tail, _ = problem(2, 6, 3, taps=4)
    reset = torch.arange(6).expand(2, 6) == 0
    hidden = torch.full_like(tail, float("inf"))
    got = called(blocked_conv1d, x, weight, bias, hidden, reset, silu=True)
    want = called(blocked_conv1d, x, weight, bias, torch.zeros_like(tail), reset, silu=True)
    close(got, want)


# ---------------------------------------------------------------- launches, without a GPU


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Let CPU tensors pass for CUDA ones, up to the launch."""
    seen: list[tuple[Any, ...]] = []

    def launch(self: cuda.Kernel, device: int, *rest: Any) -> None:
        blocks, threads, _, *values = rest
        self._struct.pack(*values)
        seen.append((self, blocks, threads, values))

    monkeypatch.setattr(cuda, "ready", lambda: True)
    monkeypatch.setattr(cuda, "limits", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(cuda.Kernel, "launch", launch)
    cuda_conv1d._shape.cache_clear()
    yield seen
    cuda_conv1d._shape.cache_clear()


def pack_of(launch: tuple[Any, ...]) -> int:
    return next(int(o[7:]) for o in launch[0].options if o.startswith("-DPACK="))


@pytest.mark.parametrize("dtype", cuda_conv1d.NAMES, ids=str)
def test_every_launch_fits_its_layout_and_covers_every_sample(
    dtype: torch.dtype, launches: list[tuple[Any, ...]]
) -> None:
    shapes = ((300, 3), (2, 300, 64), (2, 3, 1, 5, 8), (1, 40_000, 32), (64, 1, 4096), (0, 5, 8))
    for shape, taps, optional in itertools.product(shapes, (1, 4, 8), (True, False)):
        inputs = problem(*shape, taps=taps, optional=optional, reset=optional)
        typed = [t if t is None or t.dtype == torch.bool else t.to(dtype) for t in inputs]
        g_y, g_last = (t.to(dtype) for t in cotangents(typed[0], taps))
        launches.clear()
        y, last = cuda_conv1d.causal_conv1d(*typed, True)
        back = cuda_conv1d.causal_conv1d_backward(g_y, g_last, *typed, True)
        assert (y.shape, last.shape) == (typed[0].shape, g_last.shape)
        assert [g.dtype for g in back] == [dtype] * 4
        entries = [kernel.entry for kernel, *_ in launches]
        walks = ["causal_conv1d", "causal_conv1d_backward", "causal_conv1d_sum"]
        assert entries == (walks if y.numel() else [])
        for call in launches[:2]:
            _, blocks, threads, values = call
            length, channels, rows, segment, segments, columns, column_blocks, items = values[
                -11:-3
            ]
            tiles, span = values[-3:-1]
            assert segment >= taps - 1
            assert segments == -(-length // segment)
            seats = threads // columns
            assert seats * columns == threads <= 256
            assert column_blocks * columns * pack_of(call) >= channels
            assert tiles * span * seats >= items == rows * segments
            assert blocks == column_blocks * tiles


def test_what_lies_side_by_side_is_read_as_it_lies(launches: list[tuple[Any, ...]]) -> None:
    _, weight, bias, tail, _ = (t.float() for t in problem(2, 9, 8, taps=4))
    wide = torch.zeros(2, 9, 24)
    for first, pack in ((8, 4), (6, 2), (3, 1)):
        x = wide[..., first : first + 8]
        cuda_conv1d.causal_conv1d(x, weight, bias, tail, None, False)
        assert launches[-1][-1][:4] == [x.data_ptr(), 0, 9 * 24, 24]
        cuda_conv1d.causal_conv1d_backward(x, tail, x, weight, bias, tail, None, False)
        assert launches[-2][-1][:4] == launches[-2][-1][8:12] == [x.data_ptr(), 0, 9 * 24, 24]
        assert pack_of(launches[-2]) == pack_of(launches[-3]) == pack
    x = torch.zeros(2, 8, 9).mT
    cuda_conv1d.causal_conv1d_backward(wide[..., :8], tail, x, weight, bias, tail, None, False)
    values = launches[-2][-1]
    assert values[0] == wide.data_ptr()
    assert values[8] != x.data_ptr()
    assert values[9:12] == [0, 72, 8]


def test_the_gradient_goes_where_it_is_asked_to(launches: list[tuple[Any, ...]]) -> None:
    x, weight, bias, tail, _ = (t.float() for t in problem(2, 9, 8, taps=4))
    for first, pack in ((8, 4), (6, 2), (3, 1)):
        to, more = (torch.zeros(2, 9, 24)[..., first : first + 8] for _ in range(2))
        for given in ({"dx": to}, {"dx": to, "more": more}):
            found, *_ = cuda_conv1d.causal_conv1d_backward(
                x, tail, x, weight, bias, tail, None, True, **given
            )
            assert found is to
            values = launches[-2][-1]
            assert values[30:34] == [to.data_ptr(), 0, 9 * 24, 24]
            assert values[4:8] == ([more.data_ptr(), 0, 9 * 24, 24] if "more" in given else [0] * 4)
            assert pack_of(launches[-2]) == pack


def test_a_row_of_the_batch_may_have_its_own_weight(launches: list[tuple[Any, ...]]) -> None:
    inputs = [t.float() for t in problem(3, 2, 9, 8, taps=4, groups=(3,), reset=False)[:4]]
    cuda_conv1d.causal_conv1d(*inputs, None, False)
    values = launches[-1][-1]
    assert values[:4] == [inputs[0].data_ptr(), 2 * 72, 72, 8]
    assert values[4:7] == [inputs[3].data_ptr(), 2 * 24, 24]
    assert values[7:11] == [inputs[1].data_ptr(), 32, inputs[2].data_ptr(), 8]
    shared = inputs[1][:1].expand(3, -1, -1, -1)
    cuda_conv1d.causal_conv1d(inputs[0], shared, *inputs[2:], None, False)
    assert launches[-1][-1][8] == 0


def test_other_widths_and_wider_weights_run_pytorch(launches: list[tuple[Any, ...]]) -> None:
    x, weight, *_ = problem(2, 20, 3, taps=9, reset=False)
    want = blocked_conv1d.causal_conv1d(x, weight, None, None, None, True)
    close(list(cuda_conv1d.causal_conv1d(x, weight, None, None, None, True)), list(want))
    x, weight = x.float(), weight[..., :4]  # a float64 weight of float32 samples
    want = blocked_conv1d.causal_conv1d(x, weight, None, None, None, True)
    close(list(cuda_conv1d.causal_conv1d(x, weight, None, None, None, True)), list(want))
    assert not launches


def test_no_other_device_and_no_other_dtype(launches: list[tuple[Any, ...]]) -> None:
    x, weight, bias, tail, _ = (t.float() for t in problem(2, 9, 8, taps=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "get_device", lambda self: -1 if self.shape == (2, 3, 8) else 0)
        with pytest.raises(ValueError, match="causal_conv1d: tail is on cpu and x on"):
            cuda_conv1d.causal_conv1d(x, weight, bias, tail, None, False)
    byte = x.to(torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"float8_e5m2 on CUDA, expected one of float32"):
        cuda_conv1d.causal_conv1d(byte, weight, bias, None, None, False)
    assert not launches
