"""The compiled CPU backend: its threads, its cache on disk, and when it is in force."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lrnnx_nn
from lrnnx_core.backends import cpu, library
from lrnnx_core.backends.cpu import pool
from lrnnx_core.ops import linear_scan
from lrnnx_nn.cli.main import main

pytest.importorskip("numba")
from lrnnx_core.backends.cpu import arrays, compiling

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRNNX_CPU_BACKEND", raising=False)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---------------------------------------------------------------- the pool


@pytest.fixture(params=["torch's threads", "Python's"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test run on each kind of threads."""
    if request.param == "Python's":
        monkeypatch.setattr(pool, "_threads", pool._Threads())
    elif isinstance(pool._threads, pool._Threads):
        pytest.skip("torch has no OpenMP here, or none that can be reached")


@pytest.mark.skipif(sys.platform != "linux", reason="GOMP_parallel is Linux's")
def test_kernels_run_on_the_threads_of_torch() -> None:
    """Others share a core with those, which spin for milliseconds after each of its operators."""
    assert torch.backends.openmp.is_available()
    assert isinstance(pool._threads, pool._Team)
    code = """
        import os, threading, torch
        from lrnnx_core.backends.cpu import pool
        torch.set_num_threads(2)
        torch.ones(2**20).add_(1)
        before = len(os.listdir("/proc/self/task"))
        barrier, seen = threading.Barrier(2, timeout=20), set()
        def kernel(begin, end, worker):
            seen.add(threading.get_native_id())
            barrier.wait()
        pool.run(kernel, 2, 2)
        print(len(seen), len(os.listdir("/proc/self/task")) - before)
    """
    assert run_python(code).split() == ["2", "0"]


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_shares_are_contiguous_ordered_and_complete(workers: int) -> None:
    seen: dict[int, tuple[int, int]] = {}
    pool.run(lambda begin, end, worker, x: seen.update({worker: (begin, end + x)}), workers, 17, 0)
    assert sorted(seen) == list(range(workers))
    bounds = [seen[i] for i in range(workers)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 17
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))


@pytest.mark.usefixtures("either")
def test_shares_run_at_the_same_time_and_one_in_the_caller() -> None:
    barrier, names = threading.Barrier(3, timeout=20), []

    def kernel(begin: int, end: int, worker: int) -> None:
        names.append(threading.get_ident())
        barrier.wait()

    pool.run(kernel, 3, 3)
    assert threading.get_ident() in names
    assert len(set(names)) == 3


@pytest.mark.usefixtures("either")
def test_the_first_workers_exception_arrives_after_all_have_ended() -> None:
    ended: list[int] = []

    def kernel(begin: int, end: int, worker: int) -> None:
        time.sleep(0.02 * worker)
        ended.append(worker)
        if worker in (1, 2):
            raise KeyError(worker)

    with pytest.raises(KeyError, match="1"):
        pool.run(kernel, 4, 4)
    assert sorted(ended) == [0, 1, 2, 3]
    ended.clear()
    pool.run(lambda begin, end, worker: ended.append(worker), 4, 4)  # and the pool goes on
    assert sorted(ended) == [0, 1, 2, 3]


@pytest.mark.usefixtures("either")
def test_runs_inside_runs_and_from_many_threads_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "MOST", 1)  # one thread for all: queued shares fall to the callers
    done: list[int] = []

    def inner(begin: int, end: int, worker: int) -> None:
        done.append(worker)

    def outer(begin: int, end: int, worker: int) -> None:
        pool.run(inner, 3, 3)

    callers = [threading.Thread(target=pool.run, args=(outer, 4, 4), daemon=True) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert len(done) == 8 * 4 * 3


def test_workers_follow_torch_the_items_and_the_work(threads: Callable[[int], None]) -> None:
    threads(4)
    assert pool.workers(100, 1e9) == 4
    assert pool.workers(3, 1e9) == 3
    assert pool.workers(100, 2 * pool.WORTH - 1) == 1
    assert pool.workers(100, 2 * pool.WORTH) == 2
    assert pool.workers(0, 1e9) == 1
    threads(1)
    assert pool.workers(100, 1e9) == 1


def test_a_thread_that_cannot_be_had_costs_nothing_but_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*given: Any) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    threads = pool._Threads()
    threads.executor = ThreadPoolExecutor(1)
    monkeypatch.setattr(threads.executor, "submit", refuse)
    monkeypatch.setattr(pool, "_threads", threads)
    seen: list[int] = []
    pool.run(lambda begin, end, worker: seen.append(worker), 3, 3)
    assert sorted(seen) == [0, 1, 2]


# ---------------------------------------------------------------- kernels on the pool

LENGTH, CHANNELS = 700, 256  # enough for two workers forward and backward


def inputs(seed: int = 0, batch: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(batch, LENGTH, CHANNELS, generator=generator)
    b = torch.randn(batch, LENGTH, CHANNELS, generator=generator)
    return [a.requires_grad_(), b.requires_grad_()]


def value_and_gradient(a: Tensor, b: Tensor) -> list[Tensor]:
    h, last = linear_scan(a, b)
    return [h.detach(), *torch.autograd.grad(h.square().sum() + last.sum(), (a, b))]


def test_any_number_of_threads_gives_the_same_scan(threads: Callable[[int], None]) -> None:
    threads(1)
    expected = value_and_gradient(*inputs())
    for count in (2, 3, 4, 2):
        threads(count)
        for x, y in zip(value_and_gradient(*inputs()), expected, strict=True):
            assert torch.equal(x, y)


def test_eight_python_threads_at_once_give_what_one_gives(threads: Callable[[int], None]) -> None:
    threads(2)
    expected = [value_and_gradient(*inputs(seed, 3)) for seed in range(8)]
    with ThreadPoolExecutor(8) as executor:
        for _ in range(2):
            got = list(executor.map(lambda seed: value_and_gradient(*inputs(seed, 3)), range(8)))
            for mine, other in zip(got, expected, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))


def test_inference_mode(threads: Callable[[int], None]) -> None:
    threads(2)
    a, b = inputs()
    expected = linear_scan(a, b)[0].detach()
    with torch.inference_mode():
        assert torch.equal(linear_scan(a, b)[0], expected)
        assert torch.equal(linear_scan(a + 0, b + 0)[0], expected)  # inference tensors come in


class _States(torch.utils.data.Dataset):
    """Runs a model and a scan that is worth threads in the worker process."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        a, b = inputs(index)
        # PyTorch's own threads do not outlive a fork (its workers have one); ours must.
        torch.set_num_threads(2)
        with torch.no_grad():
            h = linear_scan(a, b)[0]
        torch.set_num_threads(1)
        y = self.model(torch.ones(1, 40, 4) * index)
        y.square().sum().backward()
        return torch.cat([h.flatten(), y.detach().flatten()])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_data_loader_worker_runs_a_model(threads: Callable[[int], None]) -> None:
    threads(2)
    states = _States(lrnnx_nn.LRU(4, 8))
    expected = [states[0], states[1]]  # the pool has threads now, that a fork does not copy
    loader = torch.utils.data.DataLoader(
        states, num_workers=1, batch_size=None, multiprocessing_context="fork", timeout=60
    )
    with warnings.catch_warnings():  # Python 3.12 and later warn of fork in a process with threads
        warnings.simplefilter("ignore", DeprecationWarning)
        got = list(loader)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


# ---------------------------------------------------------------- in force or not


def test_numba_is_imported_neither_with_the_library_nor_where_the_environment_says_torch() -> None:
    code = """
        import sys, torch, lrnnx_core, lrnnx_nn
        assert "numba" not in sys.modules
        from lrnnx_core.ops import linear_scan
        linear_scan(torch.ones(4, 2), torch.ones(4, 2))
        print("numba" in sys.modules)
    """
    assert run_python(code, LRNNX_CPU_BACKEND="torch").strip() == "False"


@pytest.mark.slow
def test_a_numba_that_cannot_be_imported_is_told_once_and_done_without(tmp_path: Path) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('needs another NumPy')")
    code = """
        import warnings, torch
        from lrnnx_core.ops import linear_scan
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            x = torch.full((4, 2), 0.5, requires_grad=True)
            for _ in range(2):
                h, _ = linear_scan(x, x)
                h.sum().backward()
        print(h[-1, 0].item(), *[w.message for w in told if "numba" in str(w.message)])
    """
    told = run_python(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert told.startswith("0.9375 lrnnx-core: numba cannot be imported (needs another NumPy)")
    assert told.count("numba cannot be imported") == 1


def test_without_numba_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_INSTALLED", False)
    assert not cpu.installed()
    assert not cpu.in_force()
    assert cpu.implement("linear_scan", "linear_scan") is None


def test_every_registered_module_can_be_warmed_and_has_its_operators() -> None:
    assert "linear_scan" in cpu.modules()
    for name in cpu.modules():
        module = importlib.import_module(f"lrnnx_core.backends.cpu.{name}")
        assert callable(module.warm), name


def test_the_newest_living_implementation_is_in_force() -> None:
    x = torch.ones(3, 2)
    plain = library.default("linear_scan")
    calls: list[str] = []

    def stand_in(name: str) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            calls.append(name)
            return plain(*arguments)

        return kernel

    first = library.implement("linear_scan", "cpu", stand_in("first"))
    second = library.implement("linear_scan", "cpu", stand_in("second"))
    linear_scan(x, x)
    del first
    linear_scan(x, x)
    del second
    linear_scan(x, x)
    assert calls == ["second", "second"]


# ---------------------------------------------------------------- the cache on disk


def _twice(x: int) -> int:
    return 2 * x


def twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a kernel as another process would, that keeps its code in this folder."""
    monkeypatch.setattr(compiling, "_bases", lambda: [folder])
    monkeypatch.setattr(compiling, "_kernels", [])
    return compiling.jit(_twice)


def test_what_was_compiled_once_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert twice(tmp_path, monkeypatch)(2) == 4
    assert (compiling.count(), compiling.compiled()) == (1, 1)
    assert twice(tmp_path, monkeypatch)(2) == 4
    assert (compiling.count(), compiling.compiled()) == (1, 0)
    for kind, cut in (("nbc", 100), ("nbc", 0), ("nbi", 40), ("nbi", 0)):
        for kept in tmp_path.rglob(f"*.{kind}"):
            kept.write_bytes(kept.read_bytes()[:cut])  # damaged: compiled again
        assert twice(tmp_path, monkeypatch)(2) == 4
        assert compiling.compiled() == 1
        assert twice(tmp_path, monkeypatch)(2) == 4
        assert compiling.compiled() == 0


def test_a_folder_that_others_filled_is_read_where_none_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert twice(tmp_path, monkeypatch)(2) == 4
    monkeypatch.setattr(compiling, "_writable", lambda folder: False)
    kernel = twice(tmp_path, monkeypatch)
    assert kernel(2) == 4
    assert compiling.compiled() == 0


def test_a_process_that_can_write_nowhere_computes_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = twice(Path("/dev/null/nowhere"), monkeypatch)
    assert compiling.cache_folder() is None
    assert kernel(2) == 4
    assert compiling.count() == 1


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    code = """
        import torch
        from lrnnx_core.ops import linear_scan
        h, _ = linear_scan(torch.full((4, 2), 0.5), torch.ones(4, 2))
        from lrnnx_core.backends.cpu import compiling
        print(h[-1, 0].item(), compiling.count(), compiling.compiled(), compiling.cache_folder())
    """
    first = run_python(code, NUMBA_CACHE_DIR=str(tmp_path)).split()
    assert first[:3] == ["1.875", "1", "1"]
    assert Path(first[3]).parent == tmp_path
    assert run_python(code, NUMBA_CACHE_DIR=str(tmp_path)).split()[:3] == ["1.875", "1", "0"]


def test_a_full_disk_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = twice(tmp_path, monkeypatch)
    assert kernel._cache is not None

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel._cache._cache_file, "save", full)
    assert kernel(2) == 4


def test_the_cache_knows_every_file_a_kernel_can_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "lrnnx_core.backends.cpu.linear_scan"
    sources = {path.name for path in compiling._sources(module)}
    assert {"linear_scan.py", "pointers.py", "compiling.py", "pool.py", "reference.py"} <= sources
    assert "cuda_linear_scan.py" not in sources
    # A change in a file that kernels only call into makes their code on disk stale.
    copies = {path: tmp_path / path.name for path in compiling._sources(module)}
    for path, copy in copies.items():
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(compiling, "_sources", lambda name: frozenset(copies.values()))
    before = compiling.fingerprint.__wrapped__(module)
    assert compiling.fingerprint.__wrapped__(module) == before
    with (tmp_path / "pointers.py").open("a") as file:
        file.write("# another line\n")
    assert compiling.fingerprint.__wrapped__(module) != before


def test_what_old_versions_left_is_deleted_after_a_day(tmp_path: Path) -> None:
    for name in ("scan-old", "scan-young", "scan_other-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kernel.nbi").touch()
    for name in ("scan-old", "scan_other-old"):
        os.utime(tmp_path / name, (0, 0))
    compiling._drop_old(tmp_path / "scan-new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan-young", "scan_other-old"]


# ---------------------------------------------------------------- views of tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16])
def test_rows_show_any_tensor_without_needless_copies(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 8).to(dtype)
    shown = {
        "whole": (x, True),
        "slice": (x[..., 2:6], True),
        "transposed": (x.transpose(-1, -2), False),
        "steps": (x[:, :, ::2], True),
        "batch": (x[:1, :1].expand(4, 2, 5, 8), True),
        "swapped": (x.transpose(0, 1), False),
        "scalar": (x[0, 0, 0, 0].expand(2, 3, 5, 8), False),
        "column": (x[..., 3:4], True),
        "bare": (x[0, 0], True),
        "empty": (x[:0], False),
    }
    low = dtype == torch.bfloat16
    for name, (y, in_place) in shown.items():
        data, strides = arrays.rows(y)
        if name == "empty":
            assert data.size == 1
            continue
        wide = y.to(torch.float32) if low else y.resolve_conj()
        wide = torch.view_as_real(wide).flatten(-2) if wide.is_complex() else wide
        expected = wide.reshape(-1, *wide.shape[-2:])
        got = torch.as_strided(torch.from_numpy(data), expected.shape, (*strides, 1))
        assert torch.equal(got, expected), name
        mine = y.untyped_storage().data_ptr()
        inside = mine <= data.ctypes.data < mine + y.untyped_storage().nbytes()
        assert inside == (in_place and not low), name
    conjugate = x.conj()
    data, strides = arrays.rows(conjugate)
    assert data[1] == (-x.imag if x.is_complex() else x).flatten()[0 if x.is_complex() else 1]


# ---------------------------------------------------------------- the console script


def test_doctor_says_whether_kernels_are_in_force_and_where_they_are_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "compiled, by numba" in text
    assert str(compiling.cache_folder()) in text
    monkeypatch.setattr(compiling, "_bases", lambda: [Path("/dev/null/nowhere")])
    assert main(["doctor"]) == 0
    assert "no folder can be written  ->  set NUMBA_CACHE_DIR" in capsys.readouterr().out
    monkeypatch.setenv("LRNNX_CPU_BACKEND", "torch")
    assert main(["doctor"]) == 0
    assert "plain PyTorch (LRNNX_CPU_BACKEND=torch)" in capsys.readouterr().out
    monkeypatch.setenv("LRNNX_CPU_BACKEND", "Numba")
    assert main(["doctor"]) == 0
    assert "LRNNX_CPU_BACKEND = 'Numba' in the environment" in capsys.readouterr().out


def test_warmup_compiles_every_module_and_says_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[str] = []
    for name in cpu.modules():
        module = importlib.import_module(f"lrnnx_core.backends.cpu.{name}")
        monkeypatch.setattr(module, "warm", lambda n=name: warmed.append(n), raising=False)
    assert main(["warmup", "--device", "cpu"]) == 0
    assert sorted(warmed) == sorted(cpu.modules())
    text = capsys.readouterr().out
    assert f"{compiling.count()} kernels ready in " in text
    assert f"kept in {compiling.cache_folder()}" in text
