"""What the CUDA backend does before it needs a GPU: sources, argument layouts, errors, launches."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import struct
import sys
import threading
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lrnnx_core.backends import cuda, cuda_diagonal, cuda_linear_scan, cuda_rg_lru

H100 = cuda.Limits(132, 228 * 1024, 227 * 1024)


def test_sources_hold_their_headers_once_and_include_nothing_else() -> None:
    text = cuda.source("linear_scan.cu")
    assert not re.search(r"^\s*#include", text, re.MULTILINE)
    assert text.count("struct StateOf<float16>") == text.count("struct Pack {") == 1
    with pytest.raises(FileNotFoundError):
        cuda.source("no_such.cu")


def test_arguments_are_packed_by_their_declared_types() -> None:
    kernel = cuda.Kernel("f.cu", "f", {"DTYPE": "float32"}, "Pqfi")
    assert "-DARGUMENT_BYTES=24" in kernel.options
    assert "-DDTYPE=float32" in kernel.options
    packed = kernel._struct.pack(16, -3, 2, 7)
    assert packed[16:20] == struct.pack("f", 2.0)  # an int becomes a float and not its bits
    for wrong in ((1.5, 0, 0.0, 0), (0, 0.5, 0.0, 0), (0, 0, "x", 0), (0, 0, 0.0)):
        with pytest.raises(struct.error):
            kernel._struct.pack(*wrong)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Let CPU tensors pass for CUDA ones, up to the launch."""
    seen: list[tuple[Any, ...]] = []

    def launch(self: cuda.Kernel, device: int, *rest: Any) -> None:
        blocks, threads, shared, *values = rest
        self._struct.pack(*values)
        seen.append((self, blocks, threads, shared, values))

    monkeypatch.setattr(cuda, "ready", lambda: True)
    monkeypatch.setattr(cuda, "limits", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(cuda.Kernel, "launch", launch)
    for module in (cuda_linear_scan, cuda_rg_lru, cuda_diagonal):
        module._shape.cache_clear()
    yield seen
    for module in (cuda_linear_scan, cuda_rg_lru, cuda_diagonal):
        module._shape.cache_clear()


@pytest.mark.parametrize("dtype", cuda_linear_scan.PLANS, ids=str)
def test_every_launch_fits_its_layout_and_the_device(
    dtype: torch.dtype, launches: list[tuple[Any, ...]]
) -> None:
    shapes = ((300, 3), (2, 300, 64), (2, 3, 1, 5, 7), (1, 40_000, 32))
    for shape, constant, reverse in itertools.product(shapes, (False, True), (False, True)):
        length, channels = shape[-2:]
        state = cuda_linear_scan.PLANS[dtype].state
        a = torch.zeros(*shape[:-2], 1 if constant else length, channels, dtype=dtype)
        b = torch.zeros(shape, dtype=dtype)
        h0 = torch.zeros(*shape[:-2], channels, dtype=state)
        reset = torch.zeros(shape[:-1], dtype=torch.bool)
        for x, flags in itertools.product((None, h0), (None, reset)):
            cuda_linear_scan.linear_scan(a, b, x, flags, reverse)
            cuda_linear_scan.linear_scan_backward(a, b, x, flags, b, h0, reverse)
    assert len({kernel.entry for kernel, *_ in launches}) == 3
    for kernel, blocks, threads, shared, _ in launches:
        assert 1 <= blocks <= 132 * 16 or kernel.entry == "sum_partials"
        assert threads in (32, 64, 96, 128, 160, 192, 224, 256)
        assert shared <= kernel.shared <= H100.shared_per_block


def test_pointers_start_at_the_first_step_in_the_order_of_running(
    launches: list[tuple[Any, ...]],
) -> None:
    a, b = torch.zeros(2, 9, 4), torch.zeros(2, 9, 4)
    for reverse in (False, True):
        cuda_linear_scan.linear_scan(a, b, None, None, reverse)
        values = launches[-1][-1]
        step = -4 if reverse else 4
        assert values[0] == a.data_ptr() + (8 * 16 if reverse else 0)
        assert values[1:5] == [0, 36, step, 1]
        assert values[5] == b.data_ptr() + (8 * 16 if reverse else 0)
        assert values[19] == step


def test_only_a_layout_that_does_not_merge_is_copied(launches: list[tuple[Any, ...]]) -> None:
    b = torch.zeros(2, 3, 4, 9, 5)
    expanded = torch.zeros(2, 1, 4, 9, 5).expand(b.shape)
    cuda_linear_scan.linear_scan(expanded[:, :, 0], b[:, :, 0], None, None, False)
    assert launches[-1][-1][0] == expanded.data_ptr()  # two strides are enough
    cuda_linear_scan.linear_scan(expanded, b, None, None, False)
    assert launches[-1][-1][0] != expanded.data_ptr()


def test_a_rows_operations_do_not_depend_on_the_batch() -> None:
    """The order of operations is fixed by the warps of a tile and the steps of a warp."""
    for step, dtype in itertools.product(("forward", "backward"), cuda_linear_scan.PLANS):
        for length in (5, 4096, 2**20):
            tiles = set()
            for batch in (1, 7, 512):
                shape = torch.Size((batch, length, 6))
                strides = ((length * 6, 6, 1),) * (2 if step == "forward" else 3)
                call = cuda_linear_scan._shape.__wrapped__
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(cuda, "limits", lambda device: H100)
                    found = call(step, dtype, shape, True, strides, (), None, False, 0, 0)
                tiles.add((found.threads, found.tiles))
            assert len(tiles) == 1


@pytest.mark.parametrize("dtype", cuda_rg_lru.PLANS, ids=str)
def test_launches_of_the_rg_lru_fit_too(
    dtype: torch.dtype, launches: list[tuple[Any, ...]]
) -> None:
    state = cuda_rg_lru.PLANS[dtype].state
    for shape in ((1, 3), (300, 3), (2, 300, 64), (2, 3, 1, 5, 7), (1, 40_000, 32)):
        *batch, length, width = shape
        x, h0 = torch.zeros(shape, dtype=dtype), torch.zeros(*batch, width, dtype=state)
        rate, tau = torch.zeros(width, dtype=state), torch.zeros(*batch, length, dtype=state)
        flags = torch.zeros(*batch, length, dtype=torch.bool)
        for full, choices in itertools.product((False, True), ((False, True), (True, False))):
            rest = (rate, rate, h0, tau, flags, flags) if full else (None,) * 6
            before = len(launches)
            cuda_rg_lru.rg_lru_scan(x, x, x, rate, *rest, *choices)
            assert len(launches) == before + 1
            values = launches[-1][-1]
            assert values[0] == x.data_ptr()
            assert values[39:41] == list(map(int, choices))
            cuda_rg_lru.rg_lru_scan_backward(x, x, h0, x, x, x, rate, *rest, *choices)
            values = launches[before + 1][-1]
            step = (length - 1) * width * x.itemsize  # the last step is the first one run
            assert values[:5] == [x.data_ptr() + step, *values[1:3], -width, 1]
            assert values[25] == rate.data_ptr()
            assert values[37] == (tau.data_ptr() + (length - 1) * tau.itemsize if full else 0)
    for kernel, blocks, threads, shared, _ in launches:
        assert 1 <= blocks <= 132 * 16 or kernel.entry == "sum_partials"
        assert threads in range(32, 257, 32)
        assert shared <= kernel.shared <= H100.shared_per_block or kernel.entry == "sum_partials"


@pytest.mark.parametrize("dtype", cuda_diagonal.PLANS, ids=str)
def test_launches_of_the_diagonal_scan_fit_too(
    dtype: torch.dtype, launches: list[tuple[Any, ...]]
) -> None:
    state = cuda_diagonal.PLANS[dtype].state
    real = torch.promote_types(dtype, torch.float32)
    for shape in ((1, 3), (300, 3), (2, 300, 64), (2, 3, 1, 5, 7), (1, 40_000, 32)):
        *batch, length, size = shape
        x, h0 = torch.zeros(*batch, length, 2 * size, dtype=dtype), torch.zeros(*batch, size)
        A, h0 = torch.zeros(size, dtype=state), h0.to(state)
        steps, dt = torch.zeros(size, dtype=real), torch.zeros(shape, dtype=real)
        tau, flags = torch.zeros(*batch, length, dtype=real), torch.zeros(shape[:-1]) > 0
        for rest, scheme in (
            ((None,) * 6, "none"),
            ((steps, None, h0, None, flags, flags), "bilinear"),
            ((steps, None, h0, tau, None, flags), "dirac"),
            ((None, dt, h0, tau, flags, None), "zoh"),
        ):
            before = len(launches)
            cuda_diagonal.diagonal_scan(x, A, *rest, True, scheme)
            assert len(launches) == before + 1
            values = launches[-1][-1]
            assert values[0] == x.data_ptr()
            assert values[3:6] == [2 * size, 1, size]
            cuda_diagonal.diagonal_scan_backward(x, x, h0, x, A, *rest, True, scheme)
            values = launches[before + 1][-1]
            step = (length - 1) * 2 * size * x.itemsize  # the last step is the first one run
            assert values[:6] == [x.data_ptr() + step, *values[1:3], -2 * size, 1, size]
            if rest[1] is not None:
                assert values[26] == dt.data_ptr() + (length - 1) * size * dt.itemsize
            assert launches[before + 2][0].entry == "diagonal_sums"
            assert launches[before + 2][1] == size
    for kernel, blocks, threads, shared, _ in launches:
        assert 1 <= blocks <= 132 * 16
        assert threads in range(32, 257, 32)
        assert shared <= kernel.shared <= H100.shared_per_block


def test_no_other_device_and_no_other_dtype(launches: list[tuple[Any, ...]]) -> None:
    b = torch.zeros(2, 9, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "get_device", lambda self: -1 if self.ndim == 2 else 0)
        with pytest.raises(ValueError, match="h0 is on cpu, the other tensors on"):
            cuda_linear_scan.linear_scan(b, b, b[:, 0], None, False)
    byte = b.to(torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"float8_e5m2 on CUDA, expected one of float32"):
        cuda_linear_scan.linear_scan(byte, byte, None, None, False)
    assert not launches


@pytest.fixture
def forget_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.cupy_module.cache_clear()
    cuda.ready.cache_clear()
    yield
    cuda.cupy_module.cache_clear()
    cuda.ready.cache_clear()


@pytest.mark.usefixtures("forget_cupy")
def test_without_cupy_pytorch_runs_and_one_warning_names_the_pip_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            h, _ = cuda_linear_scan.linear_scan(*torch.ones(2, 5, 3), None, None, False)
    assert h[-1, 0] == 5
    assert len(caught) == 1
    assert re.search(r'pip install "lrnnx-core\[cuda1[23]\]"', str(caught[0].message))


def fake_cupy(driver: int, nvrtc: Any, error: Exception | None = None) -> Any:
    """Return what the loader asks of CuPy."""

    class CompileException(Exception):
        pass

    class CUDADriverError(RuntimeError):
        pass

    def module(**options: Any) -> Any:
        raise error or CUDADriverError("CUDA_ERROR_NO_BINARY_FOR_GPU")

    cupy = types.SimpleNamespace(RawModule=module)
    cupy.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(driverGetVersion=lambda: driver),
        driver=types.SimpleNamespace(CUDADriverError=CUDADriverError),
        nvrtc=types.SimpleNamespace(getVersion=nvrtc),
    )
    compiler = types.SimpleNamespace(CompileException=CompileException)
    return cupy, {"cupy": cupy, "cupy.cuda": cupy.cuda, "cupy.cuda.compiler": compiler}


def no_nvrtc() -> tuple[int, int]:
    raise RuntimeError("libnvrtc.so.13 is not there\nand more lines")


@pytest.mark.usefixtures("forget_cupy")
@pytest.mark.parametrize(
    ("driver", "nvrtc", "error", "message"),
    [
        (12040, lambda: (13, 0), None, r"supports CUDA 12\.4 .* 13: update the driver.*cuda12"),
        (13000, no_nvrtc, None, r"no NVRTC.*\(libnvrtc.* not there\): pip install .*\[ctk\]"),
        (13000, lambda: (13, 0), PermissionError("read-only"), r"read-only.*CUPY_CACHE_DIR"),
        (13000, lambda: (13, 0), None, r"refused a compiled kernel \(CUDA_ERROR_NO_BINARY"),
        (13000, lambda: (13, 0), RuntimeError("odd"), r"cannot load a kernel: odd"),
    ],
    ids=["old driver", "no NVRTC", "unwritable cache", "no such architecture", "other"],
)
def test_what_stops_a_kernel_is_said_with_its_cure(
    driver: int,
    nvrtc: Any,
    error: Exception | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, modules = fake_cupy(driver, nvrtc, error)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "device", lambda index: warnings.catch_warnings())
    kernel = cuda.Kernel("sum.cu", "sum_partials", {"DTYPE": "float32"}, "2P2q")
    with pytest.raises(cuda.CudaBackendError, match=message):
        kernel.launch(0, 1, 32, 0, 0, 0, 0, 0)


@pytest.mark.usefixtures("forget_cupy")
def test_a_cache_folder_that_cannot_be_made_names_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_folder(name: str) -> None:
        raise NotADirectoryError("Not a directory: 'x'")

    monkeypatch.setattr(cuda.importlib, "import_module", no_folder)
    with pytest.raises(cuda.CudaBackendError, match="CUPY_CACHE_DIR to a writable folder"):
        cuda.ready()


@pytest.mark.usefixtures("forget_cupy")
def test_warm_up_without_cupy_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(cuda, "limits", lambda device: H100)
    with pytest.warns(UserWarning, match="CuPy is missing"):
        assert not cuda.ready()
    with pytest.raises(cuda.CudaBackendError, match="CuPy is missing"):
        cuda.warm_up(0)


def test_the_kernels_of_every_operator_are_listed() -> None:
    found = [k for kernels in cuda.KERNELS.values() for k in kernels(H100)]
    assert len({(k.file, k.entry, k.options) for k in found}) == len(found) >= 38
    assert all(k.shared <= H100.shared_per_block for k in found)


@pytest.mark.usefixtures("forget_cupy")
def test_warm_up_compiles_different_kernels_at_the_same_time_and_each_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cupy, modules = fake_cupy(13000, lambda: (13, 0))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    both = threading.Barrier(2, timeout=20)
    compiled: list[Any] = []

    def module(code: str, options: tuple[str, ...]) -> Any:
        both.wait()  # alone a thread would wait here until the barrier breaks
        compiled.append(options)
        function = types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=len(compiled)))
        return types.SimpleNamespace(get_function=lambda entry: function)

    kernels = [
        cuda.Kernel("sum.cu", "sum_partials", {"DTYPE": name}, "2P2q")
        for name in ("float32", "float64", "complex64", "complex128")
    ]
    cupy.RawModule = module
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "limits", lambda device: H100)
    monkeypatch.setattr(cuda, "KERNELS", {"a": lambda limits: kernels, "b": lambda limits: kernels})
    assert cuda.warm_up(0) == len(cuda.listed(0)) == 4
    assert cuda.warm_up(0) == 4
    assert sorted(compiled) == sorted(k.options for k in kernels)
    assert {k._functions[0] for k in kernels} == {1, 2, 3, 4}


@pytest.mark.usefixtures("forget_cupy")
def test_one_kernel_that_cannot_be_compiled_ends_the_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cupy, modules = fake_cupy(13000, lambda: (13, 0))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    tried: list[Any] = []

    def refuse(code: str, options: tuple[str, ...]) -> Any:
        tried.append(options)
        raise modules["cupy.cuda.compiler"].CompileException("error: no")

    cupy.RawModule = refuse
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "limits", lambda device: H100)
    with pytest.raises(cuda.CudaBackendError, match=r"NVRTC refused a kernel .* error: no"):
        cuda.warm_up(0)
    assert len(tried) < len(cuda.listed(0))


# ------------------------------------------------------------------------------ overlapping


def test_launch_structures_are_laid_out_as_the_driver_reads_them() -> None:
    config, attribute = cuda._Config, cuda._Attribute
    assert (ctypes.sizeof(config), ctypes.sizeof(attribute)) == (56, 72)
    places = [getattr(config, name).offset for name, _ in config._fields_]
    assert places == [0, 4, 8, 12, 16, 20, 24, 32, 40, 48]
    assert attribute.value.offset == 8


@pytest.mark.parametrize("on", [True, False])
def test_a_kernel_that_overlaps_says_so_to_the_driver(
    on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = cuda.Kernel("f.cu", "f", {}, "qd", overlaps=True)
    kernel._functions[0] = 1234
    kernel._overlapping.add(0)
    kernel._local.devices.add(0)
    ordinary: list[tuple[int, ...]] = []
    seen: list[tuple[Any, ...]] = []

    def launch(config: int, function: int, parameters: int, extra: None) -> int:
        c = cuda._Config.from_address(config)
        packed = ctypes.c_void_p.from_address(parameters).value
        assert packed is not None
        seen.append((
            (c.blocks, c.blocks_y, c.blocks_z, c.threads, c.threads_y, c.threads_z, c.shared),
            c.stream, c.count, c.attributes[0].id, c.attributes[0].value[0] & 0xFFFFFFFF, function,
            struct.unpack("qd", ctypes.string_at(packed, 16)),
        ))  # fmt: skip
        return 0

    monkeypatch.setattr(cuda, "OVERLAP", on)
    monkeypatch.setattr(cuda, "_driver", lambda: launch)
    monkeypatch.setattr(cuda, "_launch_kernel", lambda *given: ordinary.append(given))
    monkeypatch.setattr(cuda, "current_stream_handle", lambda device: 77)
    for blocks in (9, 5):
        kernel.launch(0, blocks, 64, 32, blocks, 2.5)
    assert len(ordinary) == (0 if on else 2)
    assert seen == [
        ((blocks, 1, 1, 64, 1, 1, 32), 77, 1, 6, 1, 1234, (blocks, 2.5))
        for blocks in ((9, 5) if on else ())
    ]
    with pytest.raises(ValueError, match="CUDA allows"):
        kernel.launch(0, 2**31, 64, 32, 1, 2.5)


def test_every_kernel_that_overlaps_waits_and_no_other_does() -> None:
    def waits(file: str) -> set[str]:
        """Return the entry points in which something waits for the kernel before."""
        text = (cuda.source_dir() / file).read_text()
        heads = list(re.finditer(r"(\w+)\(const __grid_constant__ Arguments p\) \{", text))
        ends = [head.start() for head in heads[1:]] + [len(text)]
        wait = re.compile(r"^    (overlap|await)_previous\(\);$", re.MULTILINE)
        return {h[1] for h, end in zip(heads, ends, strict=True) if wait.search(text, h.end(), end)}

    kernels = {k for found in cuda.KERNELS.values() for k in found(H100)}
    assert {k.entry for k in kernels if k.overlaps} >= {"linear_step", "mamba_step", "add_norm"}
    for kernel in kernels:
        assert kernel.overlaps == (kernel.entry in waits(kernel.file)), kernel
