"""The scan of S4D on tensor cores, against float64 and against the other form.

Run with ``pytest -m cuda tests/test_cuda_s4d_chunks.py`` on a machine that has a GPU and CuPy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from test_cuda_s4d_scan import (
    Inputs,
    check,
    cotangents,
    error,
    new_tensors_are_on_the_gpu,  # noqa: F401
    ours,
    problem,
    run,
    same,
    wide,
)

from lrnnx_core.backends import blocked_s4d, cuda_s4d, cuda_s4d_chunks

pytestmark = pytest.mark.cuda
DTYPES = pytest.mark.parametrize("dtype", cuda_s4d_chunks.DTYPES, ids=str)


@pytest.fixture(autouse=True)
def everything_runs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda_s4d_chunks, "SHORTEST", 1)
    monkeypatch.setattr(cuda_s4d_chunks, "FILLED", 0)
    yield
    for cache in (cuda_s4d.launch, cuda_s4d.segments, cuda_s4d_chunks.choose):
        cache.cache_clear()


def test_every_shape_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for states in (3, 8, 16, 20, 32, 64):
        x = problem(11, 300, 20, states=states, lengths=True)
        u, a, v, D, lengths, _ = x
        found = []
        for shape, _ in cuda_s4d_chunks.shapes("forward", states):
            monkeypatch.setattr(cuda_s4d_chunks, "choose", lambda *rest, shape=shape: shape)
            found.append(cuda_s4d.s4d_scan(u, a, v, D, lengths, None, False)[:2])
        assert all(same(found[0], other) for other in found)
        for shape, _ in cuda_s4d_chunks.shapes("backward", states):
            monkeypatch.setattr(cuda_s4d_chunks, "choose", lambda *rest, shape=shape: shape)
            g, g_last = cotangents(x)
            kept = found[0][1].new_empty(0)
            got = cuda_s4d.s4d_scan_backward(kept, g, g_last, u, a, v, D, lengths, None)
            wanted = wide((u, a, v, D, lengths, None))
            plain = blocked_s4d.s4d_scan(*wanted, True)
            want = blocked_s4d.s4d_scan_backward(plain[2], *wide((g, g_last)), *wanted)
            for p, q in zip(got, want, strict=True):
                assert error(p, q) < 1e-6, (states, shape)


@DTYPES
def test_lengths_and_numbers_of_states(dtype: torch.dtype) -> None:
    for length in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 127, 128, 129, 1000):
        check(problem(2, length, 5, states=4, dtype=dtype), length)
    for states in (1, 2, 3, 4, 6, 8, 11, 16, 24, 32, 33, 64):
        check(problem(2, 40, 7, states=states, dtype=dtype), states)


@DTYPES
def test_rows_that_end_at_different_steps(dtype: torch.dtype) -> None:
    for rows, length, channels in ((3, 65, 9), (17, 500, 32), (9, 4000, 16)):
        check(problem(rows, length, channels, dtype=dtype, lengths=True), (rows, length))


@DTYPES
def test_segments(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_s4d, "LONG", 256)
    monkeypatch.setattr(cuda_s4d, "LONG_IF_NARROW", 256)
    monkeypatch.setattr(cuda_s4d, "SHORTEST", 64)
    for length, lengths in itertools.product((1100, 2048), (False, True)):
        x = problem(3, length, 5, states=8, dtype=dtype, lengths=lengths)
        cuda_s4d.segments.cache_clear()
        assert cuda_s4d.segments(cuda_s4d._inputs(x[:1], *x[1:3], *x[4:])[1])[1] > 8
        check(x, (length, lengths))


@DTYPES
def test_slices_and_misaligned_storage(dtype: torch.dtype) -> None:
    u, *rest = problem(3, 200, 16, dtype=dtype)
    x: Inputs = (u, *rest)
    want = ours(x)
    together = torch.cat([u, u + 1, u], -1)
    shifted = [torch.cat([u.new_zeros(n), u.flatten()])[n:].view(u.shape) for n in (1, 3)]
    permuted = u.mT.contiguous().mT
    for moved in (*together.chunk(3, -1)[::2], *shifted, permuted):
        assert same(ours((moved, *rest)), want)
    g, g_last = torch.ones((), dtype=dtype), torch.zeros((), dtype=want[1].dtype)
    spread = (g.expand(u.shape), g_last.expand(want[1].shape))
    assert same(run(cuda_s4d, x, spread), run(cuda_s4d, x, tuple(t.contiguous() for t in spread)))


def test_parameters_with_axes_of_a_vmap() -> None:
    check(problem(3, 2, 50, 6, shared=(3,)))
    check(problem(3, 2, 4, 50, 6, shared=(3, 2), lengths=True))
    check(problem(2, 11, 50, 6, shared=(2,)))


def test_a_rows_result_does_not_depend_on_the_batch() -> None:
    for dtype, length in ((torch.float32, 777), (torch.bfloat16, 777), (torch.float32, 33_000)):
        u, a, v, D, lengths, _ = problem(40, length, 34, dtype=dtype, lengths=True)
        assert lengths is not None
        y, last, *_ = cuda_s4d.s4d_scan(u, a, v, D, lengths, None, False)
        alone = cuda_s4d.s4d_scan(u[7:8], a, v, D, lengths[7:8], None, False)
        assert torch.equal(alone[0], y[7:8])
        assert torch.equal(alone[1], last[7:8])


def test_what_lies_beyond_the_lengths_is_not_read() -> None:
    u, a, v, D, *_ = problem(4, 100, 6)
    lengths = torch.tensor([0, 1, 50, 100])
    want = ours((u, a, v, D, lengths, None))
    beyond = torch.arange(100) >= lengths.unsqueeze(-1)
    spoilt = u.masked_fill(beyond.unsqueeze(-1), math.nan)
    assert same(ours((spoilt, a, v, D, lengths, None)), want)
    for t in (want[0], want[2]):
        assert not t[beyond].any()


def test_a_gradient_of_the_last_state_alone() -> None:
    x = problem(3, 150, 9, lengths=True)
    g, g_last = cotangents(x)
    for pair in ((torch.zeros_like(g), g_last), (g, torch.zeros_like(g_last))):
        check(x, g=pair)
    few = torch.zeros_like(g_last)
    few[1, 3, 17] = 1.0
    check(x, g=(g, few))


def test_twenty_runs_give_the_same_bits() -> None:
    for x in (problem(8, 3000, 96), problem(1, 40_000, 24)):
        first, noise = ours(x), torch.randn(1024, 1024)
        side = torch.cuda.Stream()
        for i in range(10):
            with torch.cuda.stream(side):
                for _ in range(i):
                    noise = torch.tanh(noise @ noise)
            assert same(first, ours(x))


@DTYPES
def test_reverse_is_the_flipped_sequence_to_the_bit(dtype: torch.dtype) -> None:
    for channels in (5, 16):
        x = problem(3, 1101, channels, states=8, dtype=dtype)
        u, a, v, D, *_ = x
        g, g_last = cotangents(x)
        longer = torch.cat([u, u], 1)[:, 1101:]
        y, last, kept = cuda_s4d.s4d_scan(longer, a, v, D, None, None, False, True)
        du, *more = cuda_s4d.s4d_scan_backward(kept, g, g_last, longer, a, v, D, None, None, True)
        want = run(cuda_s4d, (u.flip(1), a, v, D, None, None), (g.flip(1), g_last))
        assert same((y.flip(1), last, du.flip(1), *more), want)
