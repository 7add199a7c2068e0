"""The CUDA kernels of the linear scan: the operator's whole test suite on a GPU, and more.

Run with ``pytest -m cuda tests/test_cuda_linear_scan.py`` on a machine that has a GPU and CuPy.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import test_linear_scan
import torch
from test_linear_scan import *  # noqa: F403  # every test of the operator, collected again here
from test_linear_scan import DTYPES, decay, exact, random, resets
from torch import Tensor

from lrnnx_core.backends import blocked, cuda, cuda_linear_scan, cuda_tiles
from lrnnx_core.ops import linear_scan

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]
ROOT = Path(__file__).parent.parent

# These are about the CPU, or about no device.
for _name in (
    "test_a_compiled_backend_is_used_wherever_the_operator_is",
    "test_the_reference_backend_reaches_no_compiled_one",
    "test_the_environment_switches_back_to_pytorch_and_on_again",
    "test_another_word_in_the_environment_is_no_backend",
    "test_dropping_the_handle_brings_back_what_was_there",
    "test_a_backend_gets_a_constant_coefficient_unexpanded",
    "test_implement_refuses_unknown_names_and_devices",
    "test_serial_and_two_level_forms_agree_at_every_length",
    "test_autocast_changes_nothing",
    "test_bad_arguments_are_named",
    "test_meta_tensors_give_shapes_and_dtypes_forward_and_backward",
):
    if getattr(test_linear_scan, _name, None) is None:
        raise RuntimeError(f"{_name} is gone from test_linear_scan.py")
    globals().pop(_name, None)


def leaves(*inputs: Tensor | None, reverse: bool = False) -> tuple[Tensor, ...]:
    """Return (h, h_last, da, db, dh0) of the CUDA kernels, with random cotangents."""
    return run(cuda_linear_scan, *inputs, reverse=reverse)


def run(
    backend: object, a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, ...]:
    h, last = backend.linear_scan(a, b, h0, reset, reverse)
    g, g_last = random(*h.shape, dtype=h.dtype, seed=7), random(*last.shape, dtype=last.dtype)
    return h, last, *backend.linear_scan_backward(a, h, h0, reset, g, g_last, reverse)


def tile(dtype: torch.dtype) -> int:
    """Return the steps of one tile of the forward kernel."""
    shared = cuda.limits(0).shared_per_block
    warps, _, _ = cuda_linear_scan._tile("forward", dtype, True, 1, shared)
    return warps * cuda_linear_scan.PLANS[dtype].steps


def problem(
    *shape: int, dtype: torch.dtype, constant: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *batch, length, channels = shape
    state = torch.promote_types(dtype, torch.float32)
    return (
        decay(*batch, 1 if constant else length, channels, dtype=dtype, seed=1),
        random(*shape, dtype=dtype, seed=2),
        random(*batch, channels, dtype=state, seed=3),
        resets(*batch, length),
    )


def error(got: Tensor, expected: Tensor) -> float:
    return float((exact(got) - expected).norm() / expected.norm().clamp(min=1e-30))


def test_the_kernels_are_in_force() -> None:
    assert cuda.ready()
    a, b, _, _ = problem(2, 9, 4, dtype=torch.float32)
    kernel = cuda_linear_scan.kernel(
        "forward", torch.float32, True, 1, cuda.limits(0).shared_per_block
    )
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(kernel), "launch", lambda self, *rest: launched.append(self.entry))
        x, y = a.requires_grad_(), b.requires_grad_()
        linear_scan(x, y)[0].sum().backward()
    assert launched == ["linear_scan", "linear_scan_backward"]


@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(dtype: torch.dtype, constant: bool) -> None:
    """Gradients three times; the error of a whole array, against float64."""
    for length, reverse in itertools.product((7, 129, 1000, 4097), (False, True)):
        a, b, h0, reset = problem(2, length, 65, dtype=dtype, constant=constant)
        if dtype == torch.float16 and constant:
            b = b / 64  # the sum over time of da must not overflow
        for flags in (None, reset):
            want = run(blocked, *map(exact, (a, b, h0)), flags, reverse)
            plain = run(blocked, a, b, h0, flags, reverse)
            ours = run(cuda_linear_scan, a, b, h0, flags, reverse)
            for i, (x, p, w) in enumerate(zip(ours, plain, want, strict=True)):
                assert (x.dtype, x.shape) == (p.dtype, p.shape)
                # Two roundings of the dtype: what an exact result may differ by. In float64
                # PyTorch's result is the standard itself.
                floor = (50 if w.dtype == x.dtype else 1) * torch.finfo(x.dtype).eps
                assert error(x, w) <= (2 if i < 2 else 3) * error(p, w) + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_around_a_tile(dtype: torch.dtype) -> None:
    steps = cuda_linear_scan.PLANS[dtype].steps
    t = tile(dtype)
    lengths = {1, steps - 1, steps, steps + 1, t - 1, t, t + 1, 2 * t, 2 * t + 1, 33 * t + 5}
    for length, constant in itertools.product(sorted(lengths), (False, True)):
        a, b, h0, reset = problem(length, 3, dtype=dtype, constant=constant)
        if dtype == torch.float16:
            b = b / 64
        want = run(blocked, *map(exact, (a, b, h0)), reset, False)
        for x, w in zip(leaves(a, b, h0, reset), want, strict=True):
            assert error(x, w) <= 3 * test_linear_scan.TOLERANCE[dtype], (length, constant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_twenty_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    """With other work on the chip, so that blocks meet each other in another order."""
    for shape, constant in (((2, 40_000, 96), False), ((64, 700, 64), True)):
        a, b, h0, reset = problem(*shape, dtype=dtype, constant=constant)
        first, noise = leaves(a, b, h0, reset), torch.randn(1024, 1024)
        side = torch.cuda.Stream()
        for i in range(20):
            with torch.cuda.stream(side):
                for _ in range(i):
                    noise = torch.tanh(noise @ noise)
            assert all(
                torch.equal(x, y) for x, y in zip(first, leaves(a, b, h0, reset), strict=True)
            )


def test_a_million_steps() -> None:
    length = 2**20 + 1
    a, b, h0, _ = problem(length, 2, dtype=torch.float32)
    a = 1 - 1e-3 * a.abs()
    ours, want = leaves(a, b, h0, None), run(blocked, *map(exact, (a, b, h0)), None, False)
    for x, w in zip(ours, want, strict=True):
        assert error(x, w) < 1e-5


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets beyond 32 bits, in rows and in time; 13 GB in bfloat16."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of GPU memory")
    for shape in ((3, 1100, 700_001), (2**31 // 64 + 100, 64)):
        b = torch.ones(shape, dtype=torch.bfloat16)
        a = torch.full((*shape[:-2], 1, shape[-1]), 0.5, dtype=torch.bfloat16)
        h, last = cuda_linear_scan.linear_scan(a, b, None, None, False)
        torch.testing.assert_close(last, torch.full_like(last, 2.0))
        del b
        assert bool((h[..., 0, :] == 1).all())
        assert bool((h[..., -100:, :] == 2).all())
        del h


def test_strides_of_zero_and_misaligned_storage() -> None:
    for dtype in DTYPES:
        a, b, h0, reset = problem(3, 200, 8, dtype=dtype)
        want = leaves(a, b, h0, reset)
        for offset in (1, 3):
            moved = [
                torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)
                for x in (a, b, h0)
            ]
            got = leaves(*moved, reset)
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        one = torch.ones((), dtype=dtype)
        h = want[0]
        zeros = torch.zeros_like(want[1])
        spread = cuda_linear_scan.linear_scan_backward(
            a, h, h0, reset, one.expand(h.shape), zeros[0, 0].expand(zeros.shape), False
        )
        compact = cuda_linear_scan.linear_scan_backward(
            a, h, h0, reset, torch.ones_like(h), zeros, False
        )
        assert all(torch.equal(x, y) for x, y in zip(spread, compact, strict=True))


def test_batch_dimensions_that_do_not_merge_are_copied() -> None:
    a, b, h0, _ = problem(2, 3, 4, 50, 6, dtype=torch.float32)
    a, h0 = a[:, :1, :, :], h0[:1, :, :1]
    got = linear_scan(a, b, h0)
    want = linear_scan(a.double(), b.double(), h0.double(), backend="reference")
    for x, w in zip(got, want, strict=True):
        assert error(x, w) < 1e-6


def test_side_streams_and_threads() -> None:
    a, b, h0, reset = problem(4, 3000, 64, dtype=torch.float32)
    want, failures = leaves(a, b, h0, reset), []

    def work() -> None:
        torch.set_default_device("cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                got = leaves(a, b, h0, reset)
                stream.synchronize()
                if not all(torch.equal(x, y) for x, y in zip(got, want, strict=True)):
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
    for dtype, length in ((torch.float32, 5000), (torch.float64, 9)):
        a, b, _, _ = problem(2, length, 24, dtype=dtype)
        cuda_linear_scan.kernel.cache_clear()
        cuda_linear_scan._shape.cache_clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            h, last = cuda_linear_scan.linear_scan(a, b, None, None, False)
            back = cuda_linear_scan.linear_scan_backward(a, h, None, None, b, last, True)
        for seed in (11, 12):
            b.copy_(random(2, length, 24, dtype=dtype, seed=seed))
            graph.replay()
            expected = cuda_linear_scan.linear_scan(a, b, None, None, False)
            assert torch.equal(h, expected[0])
            assert torch.equal(last, expected[1])
            again = cuda_linear_scan.linear_scan_backward(a, h, None, None, b, last, True)
            assert all(torch.equal(x, y) for x, y in zip(back, again, strict=True))


def test_a_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    inputs = problem(2, 300, 24, dtype=torch.float32)
    want = leaves(*inputs)
    moved = [x.to("cuda:1") for x in inputs]
    h, last = cuda_linear_scan.linear_scan(*moved, False)
    assert h.device == last.device == torch.device("cuda", 1)
    assert torch.equal(h.to("cuda:0"), want[0])
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_sums_of_many_rows_have_the_bits_of_those_of_few(dtype: torch.dtype) -> None:
    rows = 1024 * (cuda_tiles.MANY + 1)
    state = torch.promote_types(dtype, torch.float32)
    for tiles in (1, 8, 37):
        partial = torch.randn(tiles, rows, dtype=state)
        many, few = torch.empty(rows, dtype=dtype), torch.empty(100, dtype=dtype)
        cuda_tiles.add_up(0, partial, many, tiles)
        for first in (0, rows - 100):
            part = slice(first, first + 100)
            cuda_tiles.add_up(0, partial[:, part].contiguous(), few, tiles)
            assert torch.equal(many[part], few)
        exact = partial.to(torch.promote_types(state, torch.float64)).sum(0)
        assert (many - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_what_cannot_run_is_refused_before_a_launch() -> None:
    a, b, h0, _ = problem(2, 9, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="a is on cpu and b on cuda"):
        linear_scan(a.cpu(), b)
    with pytest.raises(ValueError, match="h0 is on cpu, the other tensors on cuda"):
        cuda_linear_scan.linear_scan(a, b, h0.cpu(), None, False)
    byte = torch.zeros(2, 9, 4, dtype=torch.float8_e5m2)
    with pytest.raises(
        ValueError, match=r"dtype torch\.float8_e5m2 on CUDA, expected one of float32"
    ):
        cuda_linear_scan.linear_scan(byte, byte, None, None, False)
    kernel = cuda_tiles.sum_kernel(torch.float32)
    with pytest.raises(Exception, match="integer"):
        kernel.launch(0, 1, 32, 0, 1.5, 0, 0, 0)
    with pytest.raises(ValueError, match="CUDA allows"):
        kernel.launch(0, 2**31, 32, 0, 0, 0, 0, 0)


def test_without_cupy_pytorch_runs_and_says_so_once() -> None:
    program = """
import sys, warnings, torch
sys.modules["cupy"] = None
from lrnnx_core.ops import linear_scan
a = torch.rand(2, 40, 3, device="cuda")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        h, _ = linear_scan(a, a)
assert [str(w.message) for w in caught if "lrnnx-core[cuda" in str(w.message)].__len__() == 1
torch.testing.assert_close(h.cpu(), linear_scan(a.cpu(), a.cpu())[0])
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_an_unwritable_cache_names_the_cure(tmp_path: Path) -> None:
    blocked_folder = tmp_path / "a file"
    blocked_folder.write_text("")
    program = """
import torch
from lrnnx_core.backends import cuda
from lrnnx_core.ops import linear_scan
a = torch.rand(2, 40, 3, device="cuda")
try:
    linear_scan(a, a)
except cuda.CudaBackendError as error:
    assert "CUPY_CACHE_DIR" in str(error), error
else:
    raise SystemExit("no error")
"""
    environment = {**os.environ, "CUPY_CACHE_DIR": str(blocked_folder / "below")}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)


def test_the_tuning_of_a_launch_changes_no_bit() -> None:
    """A row alone, in a crowd, and in either width of copies: the same operations."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16):
            a, b, h0, reset = problem(40, 777, 34, dtype=dtype)
            together = leaves(a, b, h0, reset)
            h, last = cuda_linear_scan.linear_scan(a[7], b[7], h0[7], reset[7], False)
            assert torch.equal(h, together[0][7])
            assert torch.equal(last, together[1][7])
            column = cuda_linear_scan.linear_scan(
                a[..., 5:6], b[..., 5:6], h0[..., 5:6], reset, False
            )
            assert torch.equal(column[0], together[0][..., 5:6])
