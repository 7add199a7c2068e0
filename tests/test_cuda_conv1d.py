"""The CUDA kernels of causal_conv1d: the operator's whole test suite on a GPU, and more.

Run with ``pytest -m cuda tests/test_cuda_conv1d.py`` on a machine that has a GPU and CuPy.
"""

from __future__ import annotations

import itertools
import threading
from types import ModuleType

import pytest
import test_causal_conv1d
import test_causal_conv1d_leaf
import torch
from op_cases import draw
from test_causal_conv1d import *  # noqa: F403  # every test of the operator, collected again here
from torch import Tensor

from lrnnx_core.backends import blocked_conv1d, cuda, cuda_conv1d
from lrnnx_core.ops import causal_conv1d

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]

# This is about the CPU and no device.
if getattr(test_causal_conv1d, "test_bad_arguments_are_named", None) is None:
    raise RuntimeError("test_bad_arguments_are_named is gone from test_causal_conv1d.py")
globals().pop("test_bad_arguments_are_named", None)

DTYPES = tuple(cuda_conv1d.NAMES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Inputs = tuple[Tensor | None, ...]
Factors = tuple[Tensor, Tensor]


def problem(
    *shape: int,
    taps: int = 4,
    dtype: torch.dtype = torch.float32,
    weight: torch.dtype | None = None,
    groups: tuple[int, ...] = (),
    optional: bool = True,
    reset: bool = True,
) -> Inputs:
    """Return x, weight, bias, tail, reset."""
    x, w, bias, tail, flags = test_causal_conv1d_leaf.problem(
        *shape, taps=taps, groups=groups, optional=optional, reset=reset
    )
    kind = dtype if weight is None else weight
    return (
        x.to(dtype),
        w.to(kind),
        None if bias is None else bias.to(kind),
        None if tail is None else tail.to(dtype),
        flags,
    )


def run(backend: ModuleType, inputs: Inputs, silu: bool = True) -> tuple[Tensor, ...]:
    """Return y, the new tail, dx, dweight, dbias, dtail of a backend, for fixed cotangents."""
    x, weight, *_ = inputs
    g_y, g_last = test_causal_conv1d_leaf.cotangents(x, weight.shape[-1])
    back = backend.causal_conv1d_backward(g_y.to(x.dtype), g_last.to(x.dtype), *inputs, silu)
    return *backend.causal_conv1d(*inputs, silu), *back


def ours(inputs: Inputs, silu: bool = True) -> tuple[Tensor, ...]:
    return run(cuda_conv1d, inputs, silu)


def exact(inputs: Inputs) -> Inputs:
    return tuple(t if t is None or t.dtype == torch.bool else t.double() for t in inputs)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert [torch.equal(a, b) for a, b in zip(got, want, strict=True)] == [True] * len(want)


def test_the_kernels_are_in_force() -> None:
    assert cuda.ready()
    x, weight, bias, tail, _ = problem(2, 9, 8)
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.Kernel, "launch", lambda self, *rest: launched.append(self.entry))
        y, _ = causal_conv1d(x.requires_grad_(), weight, bias, tail)
        y.sum().backward()
    assert launched == ["causal_conv1d", "causal_conv1d_backward", "causal_conv1d_sum"]


@pytest.mark.parametrize("taps", range(1, 9))
@EVERY_DTYPE
def test_error_is_at_most_twice_that_of_pytorch(dtype: torch.dtype, taps: int) -> None:
    """Gradients three times; the error of a whole array, against float64."""
    state = torch.promote_types(dtype, torch.float32)
    lengths = {0, 1, 2, taps - 1, taps, 1000}
    if taps == 4:
        lengths.add(4097)
    weights = dict.fromkeys((dtype, state) if taps == 4 else (dtype,))
    for length, weight in itertools.product(sorted(lengths), weights):
        for channels, given, silu in ((24, True, True), (5, True, False), (64, False, True)):
            inputs = problem(
                3, length, channels, taps=taps, dtype=dtype, weight=weight, optional=given,
                reset=given,
            )  # fmt: skip
            want = run(blocked_conv1d, exact(inputs), silu)
            plain = run(blocked_conv1d, inputs, silu)
            for i, (a, p, w) in enumerate(zip(ours(inputs, silu), plain, want, strict=True)):
                assert (a.dtype, a.shape) == (p.dtype, p.shape)
                # two roundings of the dtype: what an exact result may differ by; for float64 both
                # are rounded, in orders of their own
                floor = torch.finfo(a.dtype).eps * (100 if dtype == torch.float64 else 1)
                assert error(a, w) <= (2 if i < 2 else 3) * error(p, w) + floor, (length, i)
            assert torch.equal(ours(inputs, silu)[1], plain[1])


@pytest.mark.parametrize("shape", [(1, 65_536, 64), (2, 3, 4, 50, 6), (300, 1, 1), (700, 3)])
def test_shapes_from_few_channels_to_few_steps(shape: tuple[int, ...]) -> None:
    for taps in (4, 7):
        inputs = problem(*shape, taps=taps)
        want = run(blocked_conv1d, exact(inputs))
        for a, w in zip(ours(inputs), want, strict=True):
            assert error(a, w) < 3e-6


@pytest.mark.parametrize("length", [1, 70])
def test_groups_of_the_batch_have_weights_of_their_own(length: int) -> None:
    inputs = problem(3, 5, length, 24, groups=(3,))
    want = run(blocked_conv1d, exact(inputs))
    for a, w in zip(ours(inputs), want, strict=True):
        assert error(a, w) < 1e-6
    x, weight, *rest = inputs
    weight = weight[:1].expand_as(weight)
    want = run(blocked_conv1d, exact((x, weight, *rest)))
    for a, w in zip(ours((x, weight, *rest)), want, strict=True):
        assert error(a, w) < 1e-6


@EVERY_DTYPE
def test_slices_misaligned_and_expanded_inputs(dtype: torch.dtype) -> None:
    _, weight, bias, tail, reset = problem(2, 90, 16, dtype=dtype)
    wide = draw(2, 90, 48, seed=1).to(dtype)
    for first in (0, 16, 8, 6, 3):
        x = wide[..., first : first + 16]
        strided = ours((x, weight, bias, tail, reset))
        assert_same_bits(strided[:3], ours((x.clone(), weight, bias, tail, reset))[:3])
        want = run(blocked_conv1d, exact((x, weight, bias, tail, reset)))
        bound = 8 * torch.finfo(dtype).eps
        assert all(error(a, w) < bound for a, w in zip(strided, want, strict=True))
    x = wide[..., :16]
    moved = [
        torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, weight, bias, tail)
    ]
    assert_same_bits(ours((*moved, reset))[:3], ours((x, weight, bias, tail, reset))[:3])
    turned = x.mT.contiguous().mT
    assert_same_bits(
        ours((turned, weight, bias, tail, reset)), ours((x, weight, bias, tail, reset))
    )
    spread = x[:1].expand(4, 2, 90, 16)
    rows = ours((spread, weight, bias, None, reset[:1].expand(4, 2, 90)))
    assert torch.equal(rows[0][3, 1:], ours((x[:1], weight, bias, None, reset[:1]))[0])


@EVERY_DTYPE
@pytest.mark.parametrize("taps", [1, 2, 4, 8])
def test_the_gradient_goes_where_it_is_asked_to(dtype: torch.dtype, taps: int) -> None:
    for length, first in ((1, 0), (3, 16), (300, 16), (301, 6), (90, 3)):
        inputs = problem(2, length, 16, taps=taps, dtype=dtype)
        g_y, g_last = test_causal_conv1d_leaf.cotangents(inputs[0], taps)
        arguments = (g_y.to(dtype), g_last.to(dtype), *inputs, True)
        wide = torch.zeros(2, length, 48, dtype=dtype)
        to = wide[..., first : first + 16]
        want = cuda_conv1d.causal_conv1d_backward(*arguments)
        got = cuda_conv1d.causal_conv1d_backward(*arguments, dx=to)
        assert got[0] is to
        assert_same_bits((got[0], got[3]), (want[0], want[3]))
        halves = 2 * wide.new_ones(2, length, 48)[..., first : first + 16] * arguments[0]
        both = cuda_conv1d.causal_conv1d_backward(-arguments[0], *arguments[1:], more=halves)
        assert_same_bits((both[0], both[3]), (want[0], want[3]))
        bound = 8 * torch.finfo(dtype).eps  # another width of access, another order of the sums
        assert all(error(a, w.double()) < bound for a, w in zip(got[1:3], want[1:3], strict=True))
        assert not wide[..., :first].any()
        assert not wide[..., first + 16 :].any()


def products(*shape: int, inner: int, dtype: torch.dtype, groups: tuple[int, ...] = ()) -> Factors:
    """Return two factors whose product is like x."""
    *rows, width = shape
    left = draw(*rows, inner, seed=31).to(dtype)
    return left, (draw(*groups, inner, width, seed=32) / inner**0.5).to(dtype)


def asked_for(inputs: Inputs, taps: int) -> Inputs:
    """Return the arguments of the backward, but for the activation."""
    x = inputs[0]
    g_y, g_last = test_causal_conv1d_leaf.cotangents(x, taps)
    return g_y.to(x.dtype), g_last.to(x.dtype), *inputs


def inner_of(launched: list[cuda.Kernel]) -> list[str]:
    return [o.split("=")[1] for k in launched for o in k.options if o.startswith("-DINNER=")]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[cuda.Kernel]:
    """Return a list that grows by every kernel that is launched."""
    found: list[cuda.Kernel] = []
    launch = cuda.Kernel.launch
    monkeypatch.setattr(
        cuda.Kernel, "launch", lambda self, *r: (found.append(self), launch(self, *r))
    )
    return found


@pytest.mark.parametrize(
    ("shape", "inner", "taps", "groups", "padded"),
    [
        ((2, 1, 128), 96, 4, (), "96"),
        ((3, 5, 64), 40, 4, (), "64"),
        ((2, 127, 256), 96, 4, (), "96"),
        ((1, 4099, 132), 80, 4, (), "96"),
        ((2, 3, 50, 96), 256, 3, (), "256"),
        ((3, 2, 67, 36), 8, 2, (3,), "32"),
        ((2, 33, 128), 96, 1, (), "96"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_is_added_no_less_exactly_than_as_it_stands_in_memory(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    inner: int,
    taps: int,
    groups: tuple[int, ...],
    padded: str,
    launched: list[cuda.Kernel],
) -> None:
    for given in (False, True):
        inputs = problem(*shape, taps=taps, dtype=dtype, groups=groups, optional=given, reset=given)
        arguments = asked_for(inputs, taps)
        factors = products(*shape, inner=inner, dtype=dtype, groups=groups)
        launched.clear()
        got = cuda_conv1d.causal_conv1d_backward(*arguments, True, product=factors)
        assert inner_of(launched) == [padded]
        again = cuda_conv1d.causal_conv1d_backward(*arguments, True, product=factors)
        assert_same_bits(got, again)
        more = cuda_conv1d.multiply(*factors)
        parts = cuda_conv1d.causal_conv1d_backward(*arguments, True, more=more)
        g, *rest = exact(arguments)
        g = g + cuda_conv1d.multiply(*exact(factors))
        want = blocked_conv1d.causal_conv1d_backward(g, *rest, True)
        for a, p, w in zip(got, parts, want, strict=True):
            assert (a.dtype, a.shape) == (p.dtype, p.shape)
            assert error(a, w) <= 1.2 * error(p, w) + 0.2 * torch.finfo(dtype).eps


def test_a_product_of_slices_goes_where_it_is_asked_to(launched: list[cuda.Kernel]) -> None:
    dtype, first = torch.bfloat16, 16
    inputs = problem(2, 300, 160, dtype=dtype)
    arguments = asked_for(inputs, 4)
    factors = products(2, 300, 160, inner=96, dtype=dtype)
    want = cuda_conv1d.causal_conv1d_backward(*arguments, True, product=factors)
    sliced = [torch.cat([t, t, t], -1)[..., t.shape[-1] : -t.shape[-1]] for t in factors]
    wide = torch.zeros(2, 300, 320, dtype=dtype)
    to = wide[..., first : first + 160]
    launched.clear()
    got = cuda_conv1d.causal_conv1d_backward(*arguments, True, product=tuple(sliced), dx=to)
    assert inner_of(launched) == ["96"]
    assert_same_bits(got, want)
    assert got[0] is to
    assert not wide[..., :first].any()
    assert not wide[..., first + 160 :].any()


def test_a_row_of_a_product_does_not_depend_on_the_rows_and_channels_around_it() -> None:
    dtype = torch.bfloat16
    arguments = asked_for(problem(9, 200, 260, dtype=dtype), 4)
    left, right = products(9, 200, 260, inner=96, dtype=dtype)
    together = cuda_conv1d.causal_conv1d_backward(*arguments, True, product=(left, right))
    g_y, g_last, x, weight, bias, tail, reset = arguments
    some = slice(128, 192)
    alone = cuda_conv1d.causal_conv1d_backward(
        g_y[7, :, some], g_last[7, :, some], x[7, :, some], weight[some], bias[some],
        tail[7, :, some], reset[7], True, product=(left[7], right[:, some]),
    )  # fmt: skip
    assert_same_bits((alone[0], alone[3]), (together[0][7, :, some], together[3][7, :, some]))


@pytest.mark.parametrize(
    ("dtype", "channels", "inner", "taps"),
    [
        (torch.float32, 128, 96, 4),
        (torch.bfloat16, 126, 96, 4),
        (torch.bfloat16, 128, 35, 4),
        (torch.bfloat16, 128, 264, 4),
        (torch.bfloat16, 128, 96, 5),
    ],
    ids=str,
)
def test_a_product_that_the_kernel_does_not_make_is_made_before_it(
    dtype: torch.dtype, channels: int, inner: int, taps: int, launched: list[cuda.Kernel]
) -> None:
    arguments = asked_for(problem(2, 70, channels, taps=taps, dtype=dtype), taps)
    factors = products(2, 70, channels, inner=inner, dtype=dtype)
    got = cuda_conv1d.causal_conv1d_backward(*arguments, True, product=factors)
    assert inner_of(launched) == ["0"]
    more = cuda_conv1d.multiply(*factors)
    assert_same_bits(got, cuda_conv1d.causal_conv1d_backward(*arguments, True, more=more))


@EVERY_DTYPE
def test_gradients_of_stride_zero(dtype: torch.dtype) -> None:
    inputs = problem(2, 90, 16, dtype=dtype, reset=False)[:4]
    results = []
    for compact in (False, True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, last = causal_conv1d(*leaves, activation="silu")
        g = torch.ones_like(y) if compact else torch.ones((), dtype=dtype).expand_as(y)
        torch.autograd.backward((y, last), (g, torch.zeros_like(last)))
        results.append(tuple(t.grad for t in leaves))
    assert_same_bits(*results)


def test_twenty_runs_give_the_same_bits() -> None:
    """With other work on the chip, so that blocks run in another order."""
    for dtype, shape in ((torch.float32, (3, 5000, 96)), (torch.bfloat16, (64, 70, 64))):
        inputs = problem(*shape, dtype=dtype)
        first, noise = ours(inputs), torch.randn(1024, 1024)
        side = torch.cuda.Stream()
        for i in range(20):
            with torch.cuda.stream(side):
                for _ in range(i):
                    noise = torch.tanh(noise @ noise)
            assert_same_bits(ours(inputs), first)


def test_a_row_does_not_depend_on_the_rows_and_channels_around_it() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias, tail, reset = problem(40, 777, 34, dtype=dtype)
        together = ours((x, weight, bias, tail, reset))
        alone = cuda_conv1d.causal_conv1d(x[7], weight, bias, tail[7], reset[7], True)
        assert_same_bits(alone, (together[0][7], together[1][7]))
        five = slice(5, 6)
        column = cuda_conv1d.causal_conv1d(
            x[..., five], weight[five], bias[five], tail[..., five], reset, True
        )
        assert_same_bits(column, (together[0][..., five], together[1][..., five]))
        split = cuda_conv1d.causal_conv1d(x[:, :300], weight, bias, tail, reset[:, :300], True)
        rest = cuda_conv1d.causal_conv1d(x[:, 300:], weight, bias, split[1], reset[:, 300:], True)
        assert_same_bits((torch.cat([split[0], rest[0]], 1), rest[1]), together[:2])


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets beyond 32 bits; 9 GB in bfloat16."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of GPU memory")
    weight = torch.full((64, 1, 4), 0.25, dtype=torch.bfloat16)
    x = torch.ones(2**31 // 64 + 100, 64, dtype=torch.bfloat16)
    y, last = cuda_conv1d.causal_conv1d(x, weight, None, None, None, False)
    assert bool((y[3:1000] == 1).all())
    assert bool((y[-1000:] == 1).all())
    assert bool((last == 1).all())


def test_side_streams_and_threads() -> None:
    inputs = problem(4, 3000, 64)
    want, failures = ours(inputs), []

    def work() -> None:
        torch.set_default_device("cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                got = ours(inputs)
                stream.synchronize()
                if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
                    failures.append(threading.get_ident())

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_capture_in_a_graph() -> None:
    """Forward and backward, a cold kernel included; replayed on other numbers."""
    for dtype, length, taps in (
        (torch.float32, 500, 4),
        (torch.bfloat16, 1, 4),
        (torch.float64, 9, 3),
    ):
        x, weight, bias, tail, _ = problem(2, length, 24, taps=taps, dtype=dtype, reset=False)
        inputs = (x, weight, bias, tail, None)
        cuda_conv1d.kernel.cache_clear()
        cuda_conv1d._shape.cache_clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, last = cuda_conv1d.causal_conv1d(*inputs, True)
            back = cuda_conv1d.causal_conv1d_backward(y, last, *inputs, True)
        for seed in (11, 12):
            x.copy_(draw(2, length, 24, seed=seed))
            graph.replay()
            want = cuda_conv1d.causal_conv1d(*inputs, True)
            assert_same_bits((y, last), want)
            assert_same_bits(back, cuda_conv1d.causal_conv1d_backward(*want, *inputs, True))


def test_decoding_in_a_graph_is_one_launch_a_step_and_equals_the_sequence() -> None:
    x, weight, bias, tail, _ = problem(64, 20, 256, dtype=torch.bfloat16, reset=False)
    want = cuda_conv1d.causal_conv1d(x, weight, bias, tail, None, True)
    current, state = x[:, :1].clone(), tail.clone()
    launched = []
    launch = cuda.Kernel.launch
    graph = torch.cuda.CUDAGraph()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), torch.cuda.graph(graph):
        patch.setattr(
            cuda.Kernel, "launch", lambda self, *r: (launched.append(self), launch(self, *r))
        )
        y, after = causal_conv1d(current, weight, bias, state, activation="silu")
        state.copy_(after)
    assert len(launched) == 1
    steps = []
    for t in range(20):
        current.copy_(x[:, t : t + 1])
        graph.replay()
        steps.append(y.clone())
    assert_same_bits((torch.cat(steps, 1), state), want)


def test_a_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    inputs = problem(2, 300, 24)
    moved = tuple(t.to("cuda:1") for t in inputs)
    y, last = cuda_conv1d.causal_conv1d(*moved, True)
    assert y.device == last.device == torch.device("cuda", 1)
    assert torch.equal(y.to("cuda:0"), ours(inputs)[0])
    assert torch.cuda.current_device() == 0


def test_what_cannot_run_is_refused_before_a_launch() -> None:
    x, weight, bias, tail, _ = problem(2, 9, 8)
    with pytest.raises(ValueError, match="weight is on cpu and x on cuda"):
        causal_conv1d(x, weight.cpu(), bias, tail)
    with pytest.raises(ValueError, match="tail is on cpu and x on cuda"):
        cuda_conv1d.causal_conv1d(x, weight, bias, tail.cpu(), None, False)
    byte = x.to(torch.float8_e5m2)
    inputs = asked_for((x, weight, bias, tail, None), 4)
    factors = products(2, 9, 8, inner=8, dtype=x.dtype)
    with pytest.raises(ValueError, match="more and product are given"):
        cuda_conv1d.causal_conv1d_backward(*inputs, False, more=x, product=factors)
    with pytest.raises(ValueError, match=r"float8_e5m2 on CUDA, expected one of float32"):
        cuda_conv1d.causal_conv1d(byte, weight, bias, None, None, False)


def test_wider_kernels_and_weights_run_pytorch() -> None:
    for taps, kind in ((9, torch.float32), (4, torch.float64)):
        x, weight, bias, tail, reset = problem(2, 90, 8, taps=taps, weight=kind)
        want = run(blocked_conv1d, (x, weight, bias, tail, reset))
        assert_same_bits(ours((x, weight, bias, tail, reset)), want)
