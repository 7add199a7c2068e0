"""The scan of S4D on tensor cores, against float64; what the other form does too is tested with it.

Run with ``pytest -m cuda tests/test_cuda_s4d_chunks.py`` on a machine that has a GPU and CuPy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from test_cuda_s4d_scan import (
    check,
    cotangents,
    error,
    everything_in_chunks,
    problem,
    same,
    short_segments,
    wide,
)

from lrnnx_core.backends import blocked_s4d, cuda_s4d, cuda_s4d_chunks

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]
DTYPES = pytest.mark.parametrize("dtype", cuda_s4d_chunks.DTYPES, ids=str)


@pytest.fixture(autouse=True)
def everything_runs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    everything_in_chunks(monkeypatch)
    caches = (cuda_s4d.launch, cuda_s4d.segments, cuda_s4d_chunks.choose)
    yield
    for cache in caches:  # `choose` as it was: a test may have put another in its place
        cache.cache_clear()


def test_every_shape_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for states in (3, 8, 16, 20, 32, 64):
        x = problem(11, 300, 20, states=states, lengths=True)
        u, a, v, D, lengths, _ = x
        found = []
        for shape in cuda_s4d_chunks.shapes("forward", states):
            monkeypatch.setattr(cuda_s4d_chunks, "choose", lambda *rest, shape=shape: shape)
            found.append(cuda_s4d.s4d_scan(u, a, v, D, lengths, None, False)[:2])
        assert all(same(found[0], other) for other in found)
        for shape in cuda_s4d_chunks.shapes("backward", states):
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
def test_rows_that_end_at_different_steps(dtype: torch.dtype) -> None:
    for rows, length, channels in ((3, 65, 9), (17, 500, 32), (9, 4000, 16)):
        check(problem(rows, length, channels, dtype=dtype, lengths=True), (rows, length))


@DTYPES
def test_segments(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    short_segments(monkeypatch)
    for length, lengths in itertools.product((1100, 2048), (False, True)):
        x = problem(3, length, 5, states=8, dtype=dtype, lengths=lengths)
        assert cuda_s4d.segments(cuda_s4d._inputs(x[:1], *x[1:3], *x[4:])[1])[1] > 8
        check(x, (length, lengths))
