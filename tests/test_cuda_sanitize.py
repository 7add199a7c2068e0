"""The sanitizer's suite as far as it goes without a GPU: launches, planted faults, verdicts."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cuda import sanitize
from lrnnx_core.backends import (
    cuda,
    cuda_conv1d,
    cuda_diagonal,
    cuda_linear_scan,
    cuda_linear_step,
    cuda_mamba_step,
    cuda_rg_lru,
    cuda_selective_step,
)

H100 = cuda.Limits(132, 228 * 1024, 227 * 1024)
ENTRIES = {k.entry for kernels in cuda.KERNELS.values() for k in kernels(H100)}


@pytest.fixture
def cpu_for_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let CPU tensors pass for CUDA ones, up to the launch."""
    modules = (
        cuda_linear_scan, cuda_rg_lru, cuda_diagonal, cuda_conv1d, cuda_selective_step,
        cuda_linear_step, cuda_mamba_step,
    )  # fmt: skip
    monkeypatch.setattr(cuda, "ready", lambda: True)
    monkeypatch.setattr(cuda, "limits", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(Tensor, "get_device", lambda self: 0)
    for module in modules:
        module._shape.cache_clear()
    yield
    for module in modules:
        module._shape.cache_clear()


@pytest.mark.usefixtures("cpu_for_cuda")
@pytest.mark.parametrize("planted", [False, True])
def test_the_suite_launches_every_kernel_there_is(planted: bool) -> None:
    found: list[cuda.Kernel] = []
    with sanitize.recorded(found):
        for half in sanitize.HALVES if planted else (None,):
            sanitize.launch_all("cpu", planted, half)
    assert {k.entry for k in found} == ENTRIES
    if not planted:
        schemes = {o for k in found for o in k.options if o.startswith("-DSCHEME")}
        assert len(schemes) >= 3
        states = {o for k in found for o in k.options if o.startswith("-DSTATE=")}
        assert states == {f"-DSTATE={n}" for n in ("float32", "float64", "complex64", "complex128")}


def test_faults_are_planted_in_every_kernel_and_only_once() -> None:
    for tool, faults in sanitize.FAULTS.items():
        source = sanitize.planted_sources(tool, cuda.source)
        for fault in faults:
            text = source(fault.file)
            assert fault.planted in text
            assert text != cuda.source(fault.file)
            for kernel in fault.kernels:
                assert re.search(rf"\b{kernel}\(const __grid_constant__", text)
        reported = [k for fault in faults for k in fault.kernels]
        assert len(set(reported)) == len(reported)
        # these have no shared memory, so no hazard on it
        alone = {
            "selective_step", "mamba_step", "causal_conv1d", "s4d_starts", "diagonal_drive",
            "diagonal_read", "siso_step", "griffin_taps", "griffin_close", "discretize",
            "discretize_backward",
        }  # fmt: skip
        alone = alone if tool == "racecheck" else set()
        assert set(reported) == ENTRIES - alone
    assert all(any(part in name for part in sanitize.FILTERS) for name in ENTRIES)


def test_a_fault_that_no_longer_fits_the_source_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sum\.cu: 0 times 'p\.out\[row\] ='"):
        sanitize.planted_sources("memcheck", lambda name: "nothing here")("sum.cu")


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at {0}+0x160
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f6510c00400 is out of bounds
"""
RACECHECK = """========= Error: Race reported between Write access at {0}()+0x90 in {0}.cu:41
=========     and Read access at {0}()+0x100 in {0}.cu:51 [508 hazards]
"""
SUMMARY = {
    "memcheck": "========= ERROR SUMMARY: {} errors\n",
    "racecheck": "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n",
}


@pytest.mark.parametrize(("tool", "line"), [("memcheck", MEMCHECK), ("racecheck", RACECHECK)])
def test_a_hazard_or_a_fault_that_is_not_reported_is_a_failure(tool: str, line: str) -> None:
    names = [k for fault in sanitize.FAULTS[tool] for k in fault.kernels]
    none = SUMMARY[tool].format(0, 0)
    everything = "".join(line.format(n) for n in names) + SUMMARY[tool].format(len(names), 9)
    assert sanitize.judge(tool, False, 0, none) == []
    assert sanitize.judge(tool, True, 7, everything) == []
    assert names[0] in sanitize.judge(tool, False, 7, everything)[0]
    assert sanitize.judge(tool, False, 1, none)  # the program itself failed
    assert sanitize.judge(tool, False, 0, "killed")
    last = line.format(names[0]) + SUMMARY[tool].format(1, 1)
    (missing,) = sanitize.judge(tool, True, 7, last)
    assert all(n in missing for n in names[1:])


def test_the_command_line_asks_for_its_own_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--fault" not in sanitize.command("compute-sanitizer", "racecheck", None)
    assert any(w.startswith("--padding=") for w in sanitize.command("", "memcheck", None))
    command = sanitize.command("compute-sanitizer", "racecheck", 1)
    assert command[:2] == ["compute-sanitizer", "--tool=racecheck"]
    own = ["--suite", "--fault", "racecheck", "--half", "1"]
    assert command[-7:] == ["-m", "benchmarks.cuda.sanitize", *own]
    monkeypatch.setattr(sanitize.sys, "argv", ["sanitize", *own])
    seen: list[Any] = []
    monkeypatch.setattr(sanitize, "suite", lambda *arguments: seen.append(arguments))
    assert importlib.import_module("benchmarks.cuda.sanitize").main() == 0
    assert seen == [("racecheck", 1)]
