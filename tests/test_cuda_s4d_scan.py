"""The CUDA kernels of S4D's scan; what holds in both forms, step by step and in chunks, in both.

Run with ``pytest -m cuda tests/test_cuda_s4d_scan.py`` on a machine that has a GPU and CuPy. The
operator's cases under PyTorch's transforms run on a GPU in ``test_cuda.py``.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lrnnx_core import ops
from lrnnx_core.backends import blocked_s4d, cuda, cuda_s4d, cuda_s4d_chunks
from lrnnx_core.backends.reference import state_dtype
from lrnnx_core.models import s4d

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]
DTYPES = cuda_s4d.DTYPES
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_FORM = pytest.mark.parametrize(
    ("dtype", "chunks"),
    [(d, False) for d in DTYPES] + [(d, True) for d in cuda_s4d_chunks.DTYPES],
    indirect=["chunks"], ids=str,
)  # fmt: skip
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


@pytest.fixture(autouse=True)
def choices_are_made_anew() -> Iterator[None]:
    yield
    cuda_s4d.launch.cache_clear()
    cuda_s4d.segments.cache_clear()


def everything_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the form on tensor cores take short sequences and small batches too."""
    monkeypatch.setattr(cuda_s4d_chunks, "SHORTEST", 1)
    monkeypatch.setattr(cuda_s4d_chunks, "FILLED", 0)


@pytest.fixture(params=[False, True], ids=str)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether everything runs in chunks on tensor cores: where that is possible, without reset."""
    if request.param:
        everything_in_chunks(monkeypatch)
    return request.param


def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut time into segments from 256 steps on."""
    monkeypatch.setattr(cuda_s4d, "LONG", 256)
    monkeypatch.setattr(cuda_s4d, "LONG_IF_NARROW", 256)
    monkeypatch.setattr(cuda_s4d, "SHORTEST", 64)
    cuda_s4d.segments.cache_clear()


def problem(
    *shape: int,
    states: int = 32,
    dtype: torch.dtype = torch.float32,
    real: bool = False,
    shared: tuple[int, ...] = (),
    lengths: bool = False,
    reset: float = 0.0,
    direct: bool = True,
    seed: int = 0,
) -> Inputs:
    """Return the leaf's arguments: poles of S4D, steps from 1e-3 to 1e-1."""
    generator = torch.Generator("cuda").manual_seed(seed)
    like: Any = {"generator": generator, "dtype": torch.float64}
    *batch, length, channels = shape
    wide = state = state_dtype(dtype)
    steps = torch.logspace(-3, -1, channels, dtype=torch.float64).unsqueeze(-1)
    decay = 0.5 + torch.rand(*shared, channels, states, **like)
    v = torch.randn(*shared, channels, states, **like)
    if real:
        a = torch.exp(-steps * decay * (1 + torch.arange(states)))
    else:
        turns = math.pi * torch.arange(states, dtype=torch.float64).expand_as(decay)
        a = torch.polar(torch.exp(-steps * decay), steps * turns)
        v = torch.complex(v, torch.randn(v.shape, **like))
        state = torch.promote_types(state, torch.complex64)
    flags = torch.rand(*batch, length, generator=generator) < reset if reset else None
    given = torch.randint(length + 1, batch, generator=generator) if lengths else None
    D = torch.randn(*shared, channels, **like).to(wide) if direct else None
    return torch.randn(shape, **like).to(dtype), a.to(state), v.to(state), D, given, flags


def cotangents(x: Inputs, seed: int = 9) -> tuple[Tensor, Tensor]:
    u, a, *_, lengths, _ = x
    generator = torch.Generator("cuda").manual_seed(seed)
    g = torch.randn(u.shape, generator=generator).to(u.dtype)
    if lengths is not None:
        beyond = torch.arange(u.shape[-2]) >= lengths.unsqueeze(-1)
        g = g.masked_fill(beyond.unsqueeze(-1), 0)
    shape = (*u.shape[:-2], *a.shape[-2:])
    parts = torch.randn(2, *shape, generator=generator).to(a.real.dtype)
    return g, torch.complex(*parts) if a.is_complex() else parts[0]


def run(
    backend: Any, x: Inputs, g: tuple[Tensor, Tensor], keep: bool | None = None
) -> tuple[Tensor, ...]:
    """Return y, the last state, and the gradients."""
    needed = backend is blocked_s4d or cuda_s4d.keeps(x[0], x[1]) if keep is None else keep
    y, last, kept = backend.s4d_scan(*x, needed)
    return y, last, *backend.s4d_scan_backward(kept, *g, *x)


def ours(x: Inputs) -> tuple[Tensor, ...]:
    return run(cuda_s4d, x, cotangents(x))


def wide(x: Any) -> Any:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(
        t if t is None else t.double() if t.dtype in kinds
        else t.to(torch.complex128) if t.is_complex() else t for t in x
    )  # fmt: skip


def error(got: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    return float((got.to(expected.dtype) - expected).norm() / expected.norm().clamp(min=1e-30))


def check(x: Inputs, what: object = None, g: tuple[Tensor, Tensor] | None = None) -> None:
    """Compare with PyTorch in the same dtype, both against float64."""
    g = cotangents(x) if g is None else g
    results = zip(
        run(cuda_s4d, x, g), run(blocked_s4d, x, g), run(blocked_s4d, wide(x), wide(g)), strict=True
    )
    for i, (got, plain, want) in enumerate(results):
        assert (got.dtype, got.shape) == (plain.dtype, plain.shape), (what, i)
        # what an exact result may differ by; float64 has nothing wider to be compared with
        floor = (256 if got.real.dtype == torch.float64 else 4) * torch.finfo(got.dtype).eps
        limit = (2 if i < 2 else 3) * error(plain, want) + floor
        assert error(got, want) <= limit, (what, i, error(got, want), error(plain, want))


def same(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


def test_the_kernels_are_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences run in chunks where nothing is reset, and backward if they fill the chip."""
    launched: list[str] = []
    monkeypatch.setattr(cuda.Kernel, "launch", lambda self, *rest: launched.append(self.entry))
    chunks = ["s4d_chunks_backward", "s4d_scan_free"]
    for length, channels, flags, want in (
        (9, 4, False, ["s4d_scan", "s4d_scan_backward"]),
        (512, 4, False, ["s4d_chunks", "s4d_scan_backward"]),
        (512, 2048, False, ["s4d_chunks", *chunks]),
        (512, 2048, True, ["s4d_scan", "s4d_scan_backward"]),
    ):
        u, a, v, D, _, reset = problem(2, length, channels, reset=0.5 if flags else 0.0)
        ops.s4d_scan(u.requires_grad_(), a, v, D, reset=reset)[0].sum().backward()
        assert launched == [*want, *["sum_partials"] * 3]
        launched.clear()


@EVERY_DTYPE
@pytest.mark.parametrize("real", [False, True])
def test_error_is_at_most_twice_that_of_pytorch(dtype: torch.dtype, real: bool) -> None:
    """Gradients three times; the error of a whole array, against float64."""
    flags = itertools.product((False, True), (0.0, 0.02))
    for (length, channels, states), (lengths, reset) in itertools.product(
        ((65, 9, 5), (500, 33, 32), (4000, 16, 64)), flags
    ):
        x = problem(
            3, length, channels, states=states, dtype=dtype, real=real, lengths=lengths,
            reset=reset, direct=not lengths,
        )  # fmt: skip
        check(x, (length, states, lengths, reset))


@EVERY_FORM
def test_lengths_and_numbers_of_states(dtype: torch.dtype, chunks: bool) -> None:
    for length in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 127, 128, 129, 1000):
        check(problem(2, length, 5, states=4, dtype=dtype), length)
    many, reset = ((32, 64), 0.0) if chunks else ((100, 128, 256), 0.05)
    for states in (1, 2, 3, 4, 6, 8, 11, 16, 24, 33, *many):
        check(problem(2, 40, 7, states=states, dtype=dtype, reset=reset), states)


def test_nothing_to_do() -> None:
    for shape, states in (((2, 0, 3), 4), ((0, 5, 3), 4), ((2, 5, 0), 4), ((2, 5, 3), 0)):
        x = problem(*shape, states=states)
        u, a, v, D, *_ = x
        last = torch.empty((*u.shape[:-2], *a.shape), dtype=a.dtype)
        found = ours(x)
        for got, like in zip(found, (u, last, u, a, v, D), strict=True):
            assert (got.shape, got.dtype) == (like.shape, like.dtype)
        assert torch.equal(found[0], D * u)
        assert not any(found[i].any() for i in (1, 3, 4))


def test_more_states_than_a_warp_holds() -> None:
    assert not cuda_s4d._fits("backward", problem(1, 4, 2, states=257)[1])
    check(problem(2, 40, 3, states=600))


def test_every_way_to_lay_states_on_lanes_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for states in (16, 32, 64):
        x = problem(2, 300, 20, states=states, reset=0.01, lengths=True)
        found = []
        for held in (16, 8, 4):

            def lay(y: cuda_s4d.Choice, n: int, *rest: int, held: int = held) -> cuda_s4d.Choice:
                return y._replace(per_lane=min(held, n), lanes=n // min(held, n))

            monkeypatch.setattr(cuda_s4d, "choose", lay)
            cuda_s4d.launch.cache_clear()
            found.append(ours(x))
        assert same(found[0], found[1])
        assert same(found[0], found[2])


@EVERY_DTYPE
@pytest.mark.parametrize("real", [False, True])
def test_segments(dtype: torch.dtype, real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    short_segments(monkeypatch)
    for length, lengths, reset in itertools.product((1100, 2048), (False, True), (0.0, 0.002)):
        x = problem(3, length, 5, states=8, dtype=dtype, real=real, lengths=lengths, reset=reset)
        assert cuda_s4d.segments(cuda_s4d._inputs(x[:1], *x[1:3], *x[4:])[1])[1] > 8
        check(x, (length, lengths, reset))


def test_twenty_runs_give_the_same_bits(chunks: bool) -> None:
    """With other work on the chip, and in segments."""
    for x in (problem(8, 3000, 96), problem(1, 40_000, 24, reset=0.0 if chunks else 1e-3)):
        first, noise = ours(x), torch.randn(1024, 1024)
        side = torch.cuda.Stream()
        for i in range(10):
            with torch.cuda.stream(side):
                for _ in range(i):
                    noise = torch.tanh(noise @ noise)
            assert same(first, ours(x))


@EVERY_FORM
def test_slices_strides_of_zero_and_misaligned_storage(dtype: torch.dtype, chunks: bool) -> None:
    u, *rest = problem(3, 200, 16, dtype=dtype, reset=0.0 if chunks else 0.01)
    x: Inputs = (u, *rest)
    want = ours(x)
    together = torch.cat([u, u + 1, u], -1)  # as a projection gives them
    shifted = [torch.cat([u.new_zeros(n), u.flatten()])[n:].view(u.shape) for n in (1, 3)]
    permuted = u.mT.contiguous().mT
    for moved in (*together.chunk(3, -1)[::2], *shifted, permuted):
        assert same(ours((moved, *rest)), want)
    flags = rest[-1]
    assert (flags is None) == chunks
    if flags is not None:
        assert same(ours((u, *rest[:-1], flags.mT.contiguous().mT)), want)
    g, g_last = torch.ones((), dtype=dtype), torch.zeros((), dtype=want[1].dtype)
    spread = (g.expand(u.shape), g_last.expand(want[1].shape))
    assert same(run(cuda_s4d, x, spread), run(cuda_s4d, x, tuple(t.contiguous() for t in spread)))


def test_batch_dimensions_that_do_not_merge_are_copied() -> None:
    u, a, v, D, lengths, reset = problem(2, 3, 4, 50, 6, lengths=True, reset=0.05)
    want = ours((u, a, v, D, lengths, reset))
    moved = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (u, lengths, reset)]
    assert same(ours((moved[0], a, v, D, *moved[1:])), want)


@pytest.mark.usefixtures("chunks")
def test_parameters_with_axes_of_a_vmap() -> None:
    check(problem(3, 2, 50, 6, shared=(3,)))
    check(problem(3, 2, 4, 50, 6, shared=(3, 2), lengths=True))
    check(problem(2, 11, 50, 6, shared=(2,)))


def test_a_rows_result_does_not_depend_on_the_batch(chunks: bool) -> None:
    rate = 0.0 if chunks else 0.01
    for dtype, length in ((torch.float32, 777), (torch.bfloat16, 777), (torch.float32, 33_000)):
        u, a, v, D, lengths, reset = problem(40, length, 34, dtype=dtype, reset=rate, lengths=True)
        assert lengths is not None
        y, last, *_ = cuda_s4d.s4d_scan(u, a, v, D, lengths, reset, False)
        own = None if reset is None else reset[7:8]
        alone = cuda_s4d.s4d_scan(u[7:8], a, v, D, lengths[7:8], own, False)
        assert torch.equal(alone[0], y[7:8])
        assert torch.equal(alone[1], last[7:8])


def test_states_that_are_kept() -> None:
    x = problem(2, 300, 5, states=8, lengths=True, reset=0.01)
    every = blocked_s4d.chunk_length(8)
    _, last, kept = cuda_s4d.s4d_scan(*x, True)
    kept = kept.unflatten(-1, (-1, *last.shape[-2:]))
    u, a, v, D, lengths, reset = x
    assert lengths is not None
    assert reset is not None
    for i in range(kept.shape[1]):
        t = i * every
        part = (u[:, :t], a, v, D, lengths.clamp(max=t), reset[:, :t])
        torch.testing.assert_close(kept[:, i], blocked_s4d.s4d_scan(*part, False)[1])
    want = ours(x)
    assert same(run(cuda_s4d, x, cotangents(x), keep=True), want)


def test_what_lies_beyond_the_lengths_is_not_read(chunks: bool) -> None:
    u, a, v, D, _, reset = problem(4, 100, 6, reset=0.0 if chunks else 0.02)
    lengths = torch.tensor([0, 1, 50, 100])
    want = ours((u, a, v, D, lengths, reset))
    beyond = torch.arange(100) >= lengths.unsqueeze(-1)
    spoilt = u.masked_fill(beyond.unsqueeze(-1), math.nan)
    assert same(ours((spoilt, a, v, D, lengths, reset)), want)
    for t in (want[0], want[2]):
        assert not t[beyond].any()


@pytest.mark.usefixtures("chunks")
def test_a_gradient_of_the_last_state_alone() -> None:
    x = problem(3, 150, 9, lengths=True)
    g, g_last = cotangents(x)
    for pair in ((torch.zeros_like(g), g_last), (g, torch.zeros_like(g_last))):
        check(x, g=pair)
    few = torch.zeros_like(g_last)
    few[1, 3, 17] = 1.0
    check(x, g=(g, few))


def test_memory_of_a_training_step() -> None:
    """Beside the inputs: y, its gradient, that of u, and little more."""
    u, a, v, D, *_ = problem(4, 4096, 256)
    leaves = [t.requires_grad_() for t in (u, a, v, D)]
    torch.autograd.grad(ops.s4d_scan(*leaves)[0].sum(), leaves)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y, _ = ops.s4d_scan(*leaves)
    torch.autograd.grad(y, leaves, y.detach())
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2.2 * u.nbytes


def test_capture_in_a_graph() -> None:
    """Forward and backward, cold kernels included; replayed on other numbers."""
    x = problem(2, 300, 20, lengths=True, reset=0.01)
    cuda_s4d.kernel.cache_clear()
    cuda_s4d.launch.cache_clear()
    g = cotangents(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(cuda_s4d, x, g)
    for seed in (11, 12):
        x[0].copy_(problem(2, 300, 20, seed=seed)[0])
        graph.replay()
        assert same(found, run(cuda_s4d, x, g))


def test_threads_and_streams() -> None:
    x = problem(4, 500, 40)
    want, wrong = ours(x), []

    def work() -> None:
        torch.set_default_device("cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(5):
                got = ours(x)
                stream.synchronize()
                if not same(got, want):
                    wrong.append(1)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_the_model_on_the_gpu_is_the_model_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    params = s4d.init(16, 64, generator=generator, device="cpu")
    u = torch.randn(2, 300, 16, generator=generator, device="cpu")
    lengths = torch.tensor([300, 211], device="cpu")
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        own = {k: t.to(device, dtype).requires_grad_() for k, t in params.items()}
        y, state = s4d.scan(own, u.to(device, dtype), lengths=lengths.to(device), mode="scan")
        loss = y.square().sum() + state.abs().square().sum()
        grads = torch.autograd.grad(loss, list(own.values()))
        found.append([t.detach().cpu() for t in (y, state, *grads)])
    for want, got in zip(*found, strict=True):
        assert error(got, want) < 1e-5


def test_what_cannot_run_is_refused_before_a_launch() -> None:
    u, a, v, *_ = problem(2, 9, 4)
    with pytest.raises(ValueError, match="a tensor is on cpu, u on cuda"):
        cuda_s4d.s4d_scan(u, a.cpu(), v, None, None, None, False)
    with pytest.raises(ValueError, match=r"is torch\.complex128, expected torch\.complex64"):
        cuda_s4d.s4d_scan(u, a, v.to(torch.complex128), None, None, None, False)
    byte = u.to(torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"float8_e5m2 on CUDA, expected one of float32"):
        cuda_s4d.s4d_scan(byte, a, v, None, None, None, False)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets beyond 32 bits; 9 GB in bfloat16."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    length, width = 2**20 + 1, 2304
    u = torch.ones((1, length, width), dtype=torch.bfloat16)
    a, v = torch.full((width, 4), 0.5), torch.ones(width, 4)
    with torch.no_grad():
        y, last = ops.s4d_scan(u, a, v)
    assert bool((last == 2).all())
    assert bool((y[:, -1000:] == 8).all())
    zero = torch.zeros_like(last)
    found = cuda_s4d.s4d_scan_backward(last[..., 0], u, zero, u, a, v, None, None, None)
    du, da = found[:2]
    assert bool((du[:, :1000] == 8).all())
    # the sum over the steps of r = dm / da, 4 in the middle
    torch.testing.assert_close(da, torch.full_like(da, 4.0 * length), rtol=1e-4, atol=0)


def check_reverse(dtype: torch.dtype, resets: tuple[float, float]) -> None:
    """Compare a run against time with that of the flipped sequence: the same bits."""
    for channels, reset in zip((5, 16), resets, strict=True):
        x = problem(3, 1101, channels, states=8, dtype=dtype, reset=reset)
        u, a, v, D, _, flags = x
        g, g_last = cotangents(x)
        # as it lies within a longer sequence, so that no copy is made
        longer = torch.cat([u, u], 1)[:, 1101:]
        y, last, kept = cuda_s4d.s4d_scan(longer, a, v, D, None, flags, False, True)
        du, *more = cuda_s4d.s4d_scan_backward(kept, g, g_last, longer, a, v, D, None, flags, True)
        turned = (u.flip(1), a, v, D, None, None if flags is None else flags.flip(1))
        want = run(cuda_s4d, turned, (g.flip(1), g_last))
        assert same((y.flip(1), last, du.flip(1), *more), want)


@EVERY_FORM
def test_reverse_is_the_flipped_sequence_to_the_bit(dtype: torch.dtype, chunks: bool) -> None:
    check_reverse(dtype, (0.0, 0.0 if chunks else 0.01))


@EVERY_DTYPE
def test_reverse_in_segments_is_the_flipped_sequence_to_the_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_segments(monkeypatch)
    check_reverse(dtype, (0.0, 0.01))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_layer_with_padding_on_the_gpu_is_the_recurrent_one(bidirectional: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    params = s4d.init(20, 64, bidirectional=bidirectional, generator=generator, device="cuda")
    u = torch.randn(3, 300, 20, generator=generator)
    lengths = torch.tensor([300, 170, 0])
    mask = torch.rand(3, 300, generator=generator) > 0.3
    reset = torch.rand(3, 300, generator=generator) > 0.98
    for more in ({"lengths": lengths}, {"mask": mask, "reset": reset}, {"reset": reset}):
        found = []
        for dtype, mode in ((torch.float64, "recurrent"), (torch.float32, "auto")):
            own = {k: t.detach().to(dtype).requires_grad_() for k, t in params.items()}
            x = u.to(dtype).requires_grad_()
            y, last = s4d.scan(own, x, mode=mode, bidirectional=bidirectional, **more)
            loss = y.square().sum() + last.abs().square().sum()
            grads = torch.autograd.grad(loss, [x, *own.values()])
            found.append((y.detach(), last.detach(), *grads))
        for want, got in zip(*found, strict=True):
            assert error(got, want) < 4e-5
