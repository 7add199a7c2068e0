# SPDX-License-Identifier: MIT
"""Run every CUDA kernel on small problems under compute-sanitizer: memcheck and racecheck.

    python -m benchmarks.cuda.sanitize

Each tool must report nothing on the kernels as they are, and every kernel with a planted fault: a
store past the end of an output (memcheck), a missing barrier (racecheck). Exit code 1 otherwise.
compute-sanitizer comes with the CUDA toolkit, or by `pip install nvidia-cuda-sanitizer-api`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
FILTERS = (
    "linear_scan", "selective_", "causal_conv1d", "rg_lru", "sum_partials", "diagonal_", "s4d_",
    "feedthrough_", "add_norm", "linear_step", "linear_tile", "linear_mma", "mamba_step",
    "vandermonde", "cauchy",
    "siso_step", "griffin_", "ssd_", "s7_step", "rms_norm", "argmax", "discretize",
    "trilinear_",
)  # fmt: skip
"""Parts of the names of all kernels: torch's own are not checked, which would take minutes."""


class Fault(NamedTuple):
    """What is planted in a source.

    Attributes:
        file: the source, its headers included.
        text: occurs in it once.
        planted: stands in its place.
        kernels: what must be reported.
    """

    file: str
    text: str
    planted: str
    kernels: tuple[str, ...]


BARRIER = "__syncthreads();"
AFTER_MAPS = "const Tile& at, const Initial& h0, const Row& row) {\n    __syncthreads();"
AFTER_SUMS = "sums[warp][lane] = total;\n    __syncthreads();"
AFTER_WARPS = "partial[threadIdx.x / 32] = one[0];\n    __syncthreads();"
WIDENED = "        if (WIDEN && (B_VARIES || C_VARIES))\n            __syncthreads();"
WIDENED_B = "        if (WIDEN && B_VARIES)\n            __syncthreads();"


def missing_barrier(file: str, text: str, *kernels: str) -> Fault:
    """Return a fault: the text without its barrier."""
    return Fault(file, text, text.replace(BARRIER, ""), kernels)


FAULTS = {
    "memcheck": (
        Fault("linear_scan.cu", "p.last[part.row + v] =", "p.last[part.row + v + 1] =",
              ("linear_scan",)),
        Fault("linear_scan.cu", "p.dh0[part.row + v] =", "p.dh0[part.row + v + 1] =",
              ("linear_scan_backward",)),
        Fault("rg_lru.cu", "p.last[part.row + v] =", "p.last[part.row + v + 1] =", ("rg_lru",)),
        Fault("rg_lru.cu", "p.dh0[part.row + v] =", "p.dh0[part.row + v + 1] =",
              ("rg_lru_backward",)),
        Fault("sum.cu", "p.out[row] =", "p.out[row + 1] =", ("sum_partials",)),
        Fault("diagonal_scan.cu", "p.last[part.row] =", "p.last[part.row + 1] =",
              ("diagonal_scan",)),
        Fault("diagonal_scan.cu", "p.dh0[part.row] =", "p.dh0[part.row + 1] =",
              ("diagonal_scan_backward",)),
        Fault("diagonal_sums.cu", "p.dA[index] =", "p.dA[index + 1] =", ("diagonal_sums",)),
        Fault("feedthrough.cu", "dx.store(p.dx + at);", "dx.store(p.dx + at + p.channels);",
              ("feedthrough_backward",)),
        Fault("causal_conv1d.cu", "sample.store(last + i *", "sample.store(last + (i + 1) *",
              ("causal_conv1d",)),
        Fault("causal_conv1d.cu", "partial[k * size.channels + v] =",
              "partial[(k + 1) * size.channels + v] =", ("causal_conv1d_backward",)),
        Fault("causal_conv1d.cu", "p.dweight[channel * TAPS + k] =",
              "p.dweight[channel * TAPS + k + 1] =", ("causal_conv1d_sum",)),
        Fault("selective_scan.cu", "store_states(p.last +", "store_states(p.last + size.pitch +",
              ("selective_scan",)),
        Fault("selective_scan_backward.cu", "to[channel + v] =", "to[channel + v + 1] =",
              ("selective_scan_backward",)),
        Fault("selective_ends.cu", "store_states(p.end +", "store_states(p.end + size.pitch +",
              ("selective_ends",)),
        Fault("selective_step.cu", "p.y[my_row * p.channels + channel] =",
              "p.y[my_row * p.channels + channel + 1] =", ("selective_step",)),
        Fault("step_diagonal.cu", "p.next[row * p.states + state] =",
              "p.next[row * p.states + state + 1] =", ("diagonal_drive",)),
        Fault("step_diagonal.cu", "p.y[row * p.outputs + output] =",
              "p.y[row * p.outputs + output + 1] =", ("diagonal_read",)),
        Fault("step_siso.cu", "p.y[row * p.channels * p.width + spot] =",
              "p.y[row * p.channels * p.width + spot + 1] =", ("siso_step",)),
        Fault("step_griffin.cu", "p.v[place] =", "p.v[place + 1] =", ("griffin_taps",)),
        Fault("step_griffin.cu", "p.next[place] =", "p.next[place + 1] =",
              ("griffin_gates", "griffin_close")),
        Fault("step_ssd.cu", "p.made[row * width + first + channel] =",
              "p.made[row * width + first + channel + 1] =", ("ssd_update",)),
        Fault("step_ssd.cu", "y[e] = stored(gated", "y[e + 1] = stored(gated", ("ssd_close",)),
        Fault("step_s7.cu", "p.y[row * H + i] =", "p.y[row * H + i + 1] =", ("s7_step",)),
        Fault("step_norm.cu", "numbers.store(y + k)", "numbers.store(y + k + p.width)",
              ("rms_norm",)),
        Fault("argmax.cu", "p.index[blockIdx.x]", "p.index[blockIdx.x + 1]", ("argmax",)),
        Fault("linear_step.cu", "p.y[r * p.outputs + first + o] =",
              "p.y[r * p.outputs + first + o + 1] =", ("linear_step",)),
        Fault("linear_tile.cu", "p.y[(row + r) * p.outputs + output + o] =",
              "p.y[(row + r) * p.outputs + output + o + 1] =", ("linear_tile",)),
        Fault("linear_mma.cu", "to[k] = y.item[k];", "to[k + 1] = y.item[k];", ("linear_mma",)),
        Fault("mamba_step.cu", "p.y[row * channels + mine * channels + channel] =",
              "p.y[row * channels + mine * channels + channel + 1] =", ("mamba_step",)),
        Fault("mamba_step_mixed.cu", "p.mixed[(row + r) * p.pitch + column(p, n)] =",
              "p.mixed[(row + r + 1) * p.pitch + column(p, n)] =", ("mamba_step_mixed",)),
        Fault("mamba_step_many.cu", "p.mixed[(row + r) * p.pitch + column(p, n)] =",
              "p.mixed[(row + r + 1) * p.pitch + column(p, n)] =", ("mamba_step_many",)),
        Fault("s4d_scan.cu", "at.write(p.last, s, size, at.row);",
              "at.write(p.last, s, size, at.row + 1);", ("s4d_scan",)),
        Fault("s4d_scan_backward.cu", "at.write(p.da, body.da, size, index);",
              "at.write(p.da, body.da, size, index + 1);", ("s4d_scan_backward",)),
        Fault("s4d_scan_free.cu", "at.write(p.da, before, size, index);",
              "at.write(p.da, before, size, index + 1);", ("s4d_scan_free",)),
        Fault("s4d_chunks.cu", "last[block.at.pair(i)] = s[i];",
              "last[block.at.pair(i) + 1] = s[i];", ("s4d_chunks",)),
        Fault("s4d_chunks_backward.cu", "p.dv[to + pair] =", "p.dv[to + pair + 1] =",
              ("s4d_chunks_backward",)),
        Fault("s4d_ends.cu", "at.write(p.ends, body.m, size, index);",
              "at.write(p.ends, body.m, size, index + 1);", ("s4d_ends",)),
        Fault("add_norm.cu", "write(p.out + at + c,", "write(p.out + at + p.channels + c,",
              ("add_norm",)),
        Fault("add_norm.cu", "p.partial[to] = dw", "p.partial[to + p.channels] = dw",
              ("add_norm_backward",)),
        Fault("s4d_starts.cu", "narrow_to(p.starts[at], m);", "narrow_to(p.starts[at + 1], m);",
              ("s4d_starts",)),
        Fault("vandermonde.cu", "out[t + b] = sums", "out[t + b + 1] = sums", ("vandermonde",)),
        Fault("vandermonde.cu", "(m ? p.second : p.first)[to] =",
              "(m ? p.second : p.first)[to + 1] =", ("vandermonde_moments",)),
        Fault("discretize.cu", "p.gain[to] =", "p.gain[to + 1] =", ("discretize",)),
        Fault("discretize.cu", "p.dA_im, to * p.dA_apart", "p.dA_im, (to + 1) * p.dA_apart",
              ("discretize_backward",)),
        Fault("cauchy.cu", "* count + k) * 2);\n        }", "* count + k + 1) * 2);\n        }",
              ("cauchy",)),
        Fault("cauchy.cu", "partial[f * p.states + first + i] =",
              "partial[(f + 1) * p.states + first + i] =", ("cauchy_backward",)),
        Fault("cauchy.cu", "p.dsquare[to] =", "p.dsquare[to + 1] =", ("cauchy_sums",)),
        Fault("trilinear.cu", "before[i][k].store(out + row * pitch",
              "before[i][k].store(out + (row + 1) * pitch", ("trilinear_wide",)),
        Fault("trilinear.cu", "out[(t0 + i) * p.N + done.n] =",
              "out[(t0 + i) * p.N + done.n + 1] =", ("trilinear_narrow",)),
        Fault("trilinear.cu", "float* out = p.out + run * p.size",
              "float* out = p.out + (run + 1) * p.size", ("trilinear_outer",)),
    ),
    "racecheck": (
        missing_barrier("step_griffin.cu", "start + k];\n        }\n        __syncthreads();",
                        "griffin_gates"),
        missing_barrier("step_ssd.cu", "p.D[head];\n    __syncthreads();", "ssd_update"),
        missing_barrier("step_ssd.cu", AFTER_WARPS, "ssd_close"),
        missing_barrier("step_norm.cu", AFTER_WARPS, "rms_norm"),
        missing_barrier("step_s7.cu", "half /= 2) {\n            __syncthreads();", "s7_step"),
        missing_barrier("argmax.cu", "= best.index;\n    __syncthreads();", "argmax"),
        missing_barrier("linear_step.cu", "sum[o][r];\n        }\n        __syncthreads();",
                        "linear_step"),
        missing_barrier("linear_tile.cu", "[e % LANE_OUTPUTS];\n        __syncthreads();",
                        "linear_tile"),
        missing_barrier("linear_mma.cu", "= out.word;\n        }\n    __syncthreads();",
                        "linear_mma"),
        missing_barrier("mamba_step_mixed.cu", "lane / SHARE] = sum[0];\n    __syncthreads();",
                        "mamba_step_mixed"),
        missing_barrier("mamba_step_many.cu", "+ eighth] = sum[m][i];\n    __syncthreads();",
                        "mamba_step_many"),
        missing_barrier("add_norm.cu", "mine[warp][i][lane] = x[i];\n        __syncthreads();",
                        "add_norm", "add_norm_backward"),
        missing_barrier("linear_scan.cu", AFTER_MAPS, "linear_scan", "linear_scan_backward"),
        missing_barrier("rg_lru.cu", AFTER_MAPS, "rg_lru", "rg_lru_backward"),
        missing_barrier("diagonal_scan.cu", AFTER_MAPS, "diagonal_scan", "diagonal_scan_backward"),
        missing_barrier("diagonal_sums.cu", "half /= 2) {\n        __syncthreads();",
                        "diagonal_sums"),
        missing_barrier("feedthrough.cu", "sum[v];\n        __syncthreads();",
                        "feedthrough_backward"),
        missing_barrier("sum.cu", AFTER_SUMS, "sum_partials"),
        missing_barrier("causal_conv1d.cu", AFTER_SUMS, "causal_conv1d_sum"),
        missing_barrier("causal_conv1d.cu",
                        "            __syncthreads();\n            if (seat.row + half < n) {",
                        "causal_conv1d_backward"),
        Fault("selective_scan.cu", WIDENED, WIDENED.replace(BARRIER, "__syncwarp();"),
              ("selective_scan",)),
        Fault("selective_ends.cu", WIDENED_B, WIDENED_B.replace(BARRIER, "__syncwarp();"),
              ("selective_ends",)),
        missing_barrier("selective_scan_backward.cu",
                        "__syncthreads();\n        if (chunk > 0)",
                        "selective_scan_backward"),
        *(Fault(f"{name}.cu", "__syncwarp();  // the tile is", "// the tile is", (name,))
          for name in ("s4d_scan", "s4d_scan_backward", "s4d_scan_free", "s4d_ends")),
        missing_barrier("s4d_chunks.cu", "__syncthreads();  // the tile is there", "s4d_chunks"),
        missing_barrier("s4d_chunks_backward.cu", "__syncthreads();  // the tile is there",
                        "s4d_chunks_backward"),
        missing_barrier("vandermonde.cu", "__syncthreads();  // the exponentials are there",
                        "vandermonde"),
        missing_barrier("vandermonde.cu", "__syncthreads();  // the sums of every thread",
                        "vandermonde_moments"),
        missing_barrier("cauchy.cu", "__syncthreads();  // the numbers are there", "cauchy"),
        missing_barrier("cauchy.cu", "__syncthreads();  // the frequencies are there",
                        "cauchy_backward"),
        missing_barrier("cauchy.cu", "half /= 2) {\n        __syncthreads();", "cauchy_sums"),
        missing_barrier("trilinear.cu", "__syncthreads();  // this stage is there",
                        "trilinear_wide", "trilinear_narrow"),
        missing_barrier("trilinear.cu", "__syncthreads();  // these samples are there",
                        "trilinear_outer"),
    ),
}  # fmt: skip


def planted_sources(tool: str, original: Callable[[str], str]) -> Callable[[str], str]:
    """Return `cuda.source` with the tool's faults in it.

    Raises:
        ValueError: a text to plant a fault at is not there, or not once.
    """

    def source(name: str) -> str:
        text = original(name)
        for fault in FAULTS[tool]:
            if fault.file == name:
                if text.count(fault.text) != 1:
                    raise ValueError(f"{name}: {text.count(fault.text)} times {fault.text!r}")
                text = text.replace(fault.text, fault.planted)
        return text

    return source


# --------------------------------------------------------------------------------- the launches


class Numbers:
    """Random tensors on a device."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._device = torch, device
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: Any = None, low: float = 0.0) -> Any:
        """Uniform in [low, 1)."""
        like = {"device": self._device, "generator": self._generator}
        x = low + (1 - low) * self._torch.rand(*shape, **like)
        if dtype is not None and dtype.is_complex:
            x = self._torch.complex(x, x.flip(-1)) * 0.5
        return x if dtype is None else x.to(dtype)

    def flags(self, *shape: int) -> Any:
        """True one time in ten."""
        return self(*shape) > 0.9


def linear_scan(number: Numbers, planted: bool) -> None:
    """All sizes of numbers; constant coefficients are summed over tiles by `sum_partials`."""
    import torch

    from lrnnx_core.backends import cuda_linear_scan as kernels

    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128)
    for dtype, constant in itertools.product(dtypes[: 1 if planted else None], (False, True)):
        state = torch.promote_types(dtype, torch.float32)
        # a block that a fault ends must have nobody wait for it: one tile
        for batch, length, channels, rich in ((2, 301, 66, True), (1, 130, 33, False)):
            length = 100 if planted else length
            a = number(batch, 1 if constant else length, channels, dtype=dtype)
            b = number(batch, length, channels, dtype=dtype)
            h0 = number(batch, channels, dtype=state) if rich else None
            reset = number.flags(batch, length) if rich else None
            h, last = kernels.linear_scan(a, b, h0, reset, rich)
            kernels.linear_scan_backward(a, h, h0, reset, b, last, rich)


def causal_conv1d(number: Numbers, planted: bool) -> None:
    """Four taps with SiLU, tail and reset at odd sizes; two taps without; a single sample."""
    import torch

    from lrnnx_core.backends import cuda_conv1d as kernels

    for dtype in (torch.float32, torch.bfloat16)[: 1 if planted else None]:
        for length, channels, taps, rich in (
            (301, 66, 4, True),
            (45, 33, 2, False),
            (1, 64, 4, True),
        ):
            x = number(2, length, channels, dtype=dtype)
            weight = number(channels, 1, taps, low=-1.0)
            bias = number(channels) if rich else None
            tail = number(2, taps - 1, channels, dtype=dtype) if rich else None
            reset = number.flags(2, length) if rich else None
            y, last = kernels.causal_conv1d(x, weight, bias, tail, reset, rich)
            inputs = (y, last, x, weight, bias, tail, reset, rich)
            kernels.causal_conv1d_backward(*inputs)
            wide = number(2, length, 2 * channels, dtype=dtype)
            kernels.causal_conv1d_backward(*inputs, y, wide[..., channels:])
    for length, channels, inner in ((67, 132, 40), (1, 64, 96))[: 1 if planted else None]:
        x = number(2, length, channels, dtype=torch.bfloat16)
        product = (
            number(2, length, inner, dtype=torch.bfloat16),
            number(inner, channels, dtype=torch.bfloat16),
        )
        weight, last = number(channels, 1, 4, low=-1.0), x[:, :1].expand(2, 3, channels)
        kernels.causal_conv1d_backward(
            x, last, x, weight, None, None, number.flags(2, length), True, product=product
        )


def rg_lru_scan(number: Numbers, planted: bool) -> None:
    """With everything there is, and with nothing that can be left out."""
    import torch

    from lrnnx_core.backends import cuda_rg_lru as kernels

    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    for dtype, rich in itertools.product(dtypes[: 1 if planted else None], (True, False)):
        state = torch.promote_types(dtype, torch.float32)
        batch, length, width = (2, 301, 66) if rich else (1, 130, 33)
        length = 60 if planted else length
        sequences = [number(batch, length, width, dtype=dtype, low=-1.0) for _ in range(3)]
        rows: list[Any] = [number(width, dtype=state) for _ in range(3)]
        optional: list[Any] = [None] * 4
        if rich:
            optional = [
                number(batch, width, dtype=state), number(batch, length, dtype=state),
                number.flags(batch, length), ~number.flags(batch, length),
            ]  # fmt: skip
        else:
            rows[1] = rows[2] = None
        rest: tuple[Any, ...] = (*sequences, *rows, *optional, False, rich)
        h, last = kernels.rg_lru_scan(*rest)
        kernels.rg_lru_scan_backward(h, sequences[0], last, *rest)


def diagonal_scan(number: Numbers, planted: bool) -> None:
    """Decays constant and varying in time, with everything there is, and with nothing else."""
    import torch

    from lrnnx_core.backends import cuda_diagonal as kernels

    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    for dtype, rich in itertools.product(dtypes[: 1 if planted else None], (True, False)):
        real = torch.promote_types(dtype, torch.float32)
        state = torch.promote_types(dtype, torch.complex64)
        batch, length, size = (2, 301, 35) if rich else (3, 130, 16)
        length = 60 if planted else length
        x = number(batch, length, 2 * size, dtype=dtype, low=-1.0)
        rest: list[Any] = [-number(size, dtype=state), *(None,) * 6, False, "none"]
        if rich:
            rest[2:] = [
                number(batch, length, size, dtype=real), number(batch, size, dtype=state),
                number(batch, length, dtype=real), number.flags(batch, length),
                ~number.flags(batch, length), True, "zoh",
            ]  # fmt: skip
        rest.append(dtype != torch.float32)  # reverse
        h, last = kernels.diagonal_scan(x, *rest)
        kernels.diagonal_scan_backward(h, x, last, x, *rest)


def s4d_scan(number: Numbers, planted: bool) -> None:
    """Both forms, with everything there is and with nothing; whole and in segments."""
    import torch

    from lrnnx_core.backends import cuda_s4d as kernels
    from lrnnx_core.backends import cuda_s4d_chunks as chunks

    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    with (
        mock.patch.multiple(kernels, LONG=256, LONG_IF_NARROW=256, SHORTEST=64),
        mock.patch.multiple(chunks, SHORTEST=1, FILLED=0),
    ):
        for cache in (kernels.launch, kernels.segments):
            cache.cache_clear()
        kinds = ("everything", "real states", "no reset")
        for dtype, kind in itertools.product(dtypes[: 1 if planted else None], kinds):
            real, rich = torch.promote_types(dtype, torch.float32), kind != "real states"
            state = torch.promote_types(dtype, torch.complex64) if rich else real
            for batch, length, channels, states in ((2, 75, 35, 11), (1, 700, 5, 32)):
                u = number(batch, length, channels, dtype=dtype, low=-1.0)
                a, v = (number(channels, states, dtype=state) for _ in range(2))
                lengths = torch.full((batch,), length - 9, device=u.device) if rich else None
                reset = number.flags(batch, length) if kind == "everything" else None
                D = number(channels, dtype=real) if rich else None
                rest = (u, a, v, D, lengths, reset)
                reverse = not rich and dtype != torch.float32
                keep = kind == "everything"
                y, last, kept = kernels.s4d_scan(*rest, keep, reverse)
                kernels.s4d_scan_backward(kept, y, last, *rest, reverse)
        for cache in (kernels.launch, kernels.segments):
            cache.cache_clear()


def projected_scan(number: Numbers, planted: bool) -> None:
    """The gradient of the direct path; the scan has its own."""
    import torch

    from lrnnx_core.backends import cuda_feedthrough as kernels

    for dtype, width in ((torch.float32, 128), (torch.float32, 33), (torch.float64, 70)):
        x, g, dx = (number(2, 601, width, dtype=dtype, low=-1.0) for _ in range(3))
        kernels.add_gradients(dx, g, x, number(width, dtype=dtype))
        if planted:
            return


def vandermonde(number: Numbers, planted: bool) -> None:
    """Every size of a tile, one and several of them, few states and many, complex and real."""
    import torch

    from lrnnx_core.backends import cuda_vandermonde as kernels

    dtypes = (torch.complex64, torch.complex128, torch.float32)
    for dtype in dtypes[: 1 if planted else None]:
        sizes = ((301, 35), (2501, 35), (2501, 3), (17_001, 35))
        for length, states in sizes[: 1 if planted else None]:
            z = -number(2, 3, states, dtype=dtype)
            v = number(2, 2, 3, states, dtype=dtype, low=-1.0)
            K = kernels.vandermonde(v, z, length)
            kernels.vandermonde_moments(K, z)


def cauchy(number: Numbers, planted: bool) -> None:
    """Rows that fill a group and that do not, few states and many, several tiles."""
    import torch

    from lrnnx_core.backends import cuda_cauchy as kernels

    for dtype in (torch.float32, torch.float64)[: 1 if planted else None]:
        for rows, length, states in ((5, 301, 35), (1, 2501, 70), (2, 33, 3)):
            alpha, beta = (number(2, rows, 3, states, dtype=dtype, low=-1.0) for _ in range(2))
            square, rho = (0.1 + number(2, 3, states, dtype=dtype) for _ in range(2))
            rest = (alpha, beta, square, rho, 1 + number(2, 3, dtype=dtype), length)
            kernels.cauchy_backward(kernels.cauchy(*rest), *rest)


def discretize_diagonal(number: Numbers, planted: bool) -> None:
    """Complex, in parts and real; steps that all states share, also in time, and their own."""
    import torch

    from lrnnx_core.backends import cuda_discretize as kernels

    for dtype in (torch.complex64, torch.float64)[: 1 if planted else None]:
        real = dtype.to_real()
        for rows, states, times in ((5, 35, 1), (3, 7, 37)):
            A, dt = -number(1, rows, states, dtype=dtype), number(times, rows, 1, dtype=real)
            B, im = (number(1, rows, states, dtype=real) for _ in range(2))
            parts = (B, im) if dtype.is_complex else (B, None)
            for scheme in ("zoh", "gbt", "dirac"):
                rest: tuple[Any, ...] = (A, None, dt, None, *parts, scheme, 0.5)
                kernels.discretize_backward(*kernels.discretize(*rest), *rest)


class Selective(NamedTuple):
    """A case of the selective scan; its fields are those of `problem`, then the choices."""

    shape: tuple[int, int, int, int]
    dtype: str = "float32"
    state: str = "float32"
    scheme: str = "mamba"
    optional: tuple[str, ...] = ("D", "z", "dt_bias", "h0")
    groups: int = 1
    constant: bool = False
    softplus: bool = True
    state_only: bool = False


SELECTIVE = (  # (batch, L, E, N): several blocks and tiles, tails in every dimension
    Selective((2, 75, 72, 16)),
    Selective((2, 75, 72, 16), "bfloat16"),
    Selective((2, 75, 72, 16), state="complex64", scheme="zoh", softplus=False),
    Selective((1, 45, 37, 5), optional=("D", "reset", "timesteps", "decay_dt"), groups=1),
    Selective((1, 45, 38, 16), optional=("h0", "timesteps", "own_decay_dt"), groups=2,
              state_only=True),
    Selective((1, 45, 37, 9), optional=("D",), constant=True),
    Selective((1, 40, 33, 70), "float64", "float64", "bilinear"),
    Selective((1, 700, 40, 16), optional=("D", "h0", "reset")),
    Selective((1, 700, 40, 16), "bfloat16"),
)  # fmt: skip


def selective_arguments(number: Numbers, case: Selective) -> list[Any]:
    """Return the tensors of the leaf operator."""
    import torch

    batch, length, width, states = case.shape
    dtype, state = getattr(torch, case.dtype), getattr(torch, case.state)
    real = state.to_real()

    def sequence() -> Any:  # a slice of a wider projection, as Mamba's are
        return number(batch, length, 2 * width + 8, dtype=dtype, low=-1.0)[..., :width]

    def matrix() -> Any:
        shape = (1, width, states) if case.constant else (length, case.groups, states)
        return number(batch, *shape, dtype=state if state.is_complex else dtype, low=-1.0)

    found = {
        "D": number(width, dtype=real),
        "z": sequence(),
        "dt_bias": number(width, dtype=real),
        "h0": number(batch, width, states, dtype=state),
        "decay_dt": number(batch, length, width, dtype=dtype),
        "own_decay_dt": number(batch, 1, width, dtype=real),
        "timesteps": number(batch, length, dtype=real),
        "reset": number.flags(batch, length),
    }
    has = {name: found[name] if name in case.optional else None for name in found}
    decay = has["decay_dt"] if has["own_decay_dt"] is None else has["own_decay_dt"]
    step = number(batch, length, width, dtype=dtype)
    return [
        sequence(), step, -number(width, states, dtype=state), matrix(), matrix(),
        has["D"], has["z"], has["dt_bias"], has["h0"], decay, has["timesteps"], has["reset"],
        case.softplus, case.state_only, case.scheme,
    ]  # fmt: skip


def selective_scan(number: Numbers, planted: bool) -> None:
    """Every path of the selective scan, with gradients; long ones in segments."""
    from lrnnx_core.backends import cuda_selective
    from lrnnx_core.backends import cuda_selective_scan as kernels

    with mock.patch.multiple(cuda_selective, LONG=512, SHORTEST=128):
        for case in (*SELECTIVE[:2], *SELECTIVE[-2:]) if planted else SELECTIVE:
            u, *rest = selective_arguments(number, case)
            y, last, kept = kernels.selective_scan(u, *rest, True)
            kernels.selective_scan_backward(kept, y, last, u, *rest)


def selective_step(number: Numbers, planted: bool) -> None:
    """One step without gradients: a kernel of its own."""
    from lrnnx_core.backends import cuda_selective_scan as kernels

    for case in SELECTIVE[:1] if planted else SELECTIVE:
        batch, _, width, states = case.shape
        u, *rest = selective_arguments(number, case._replace(shape=(batch + 3, 1, width, states)))
        kernels.selective_scan(u, *rest, False)


def argmax(number: Numbers, planted: bool) -> None:
    """Rows of whole pieces and of single numbers, several rounds and a part of one."""
    import torch

    from lrnnx_core.backends import cuda_argmax as kernels

    for dtype in (torch.bfloat16, torch.float64)[: 1 if planted else None]:
        for count in (4096, 70_001)[: 1 if planted else None]:
            kernels.argmax(number(3, count, dtype=dtype))


def linear_step(number: Numbers, planted: bool) -> None:
    """Groups of a part of a warp, of one and of several; tails of rows, outputs and pieces."""
    import torch

    from lrnnx_core.backends import cuda_linear_step as kernels

    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    for dtype in dtypes[: 1 if planted else None]:
        for rows, inputs, outputs in ((3, 1544, 37), (1, 40, 301), (4, 31, 5))[
            : 1 if planted else None
        ]:
            x, weight = number(rows, inputs, dtype=dtype), number(outputs, inputs, dtype=dtype)
            kernels.linear_step(x, weight, number(outputs, dtype=dtype))


def linear_tile(number: Numbers, planted: bool) -> None:
    """Tails of rows, inputs and outputs, small tiles and large ones, copies of single numbers."""
    import torch

    from lrnnx_core.backends import cuda_linear_step as kernels

    for dtype in (torch.float32, torch.float64)[: 1 if planted else None]:
        for rows, inputs, outputs in ((9, 1544, 37), (40, 31, 301), (130, 260, 1030))[
            : 1 if planted else None
        ]:
            x, weight = number(rows, inputs, dtype=dtype), number(outputs, inputs, dtype=dtype)
            kernels.linear_step(x, weight, number(outputs, dtype=dtype))


def linear_mma(number: Numbers, planted: bool) -> None:
    """Tails of rows, inputs and outputs, one tile and several, more inputs than are under way."""
    import torch

    from lrnnx_core.backends import cuda_linear_step as kernels

    sizes = ((9, 32, 51), (70, 1544, 37), (17, 264, 602), (33, 24, 900))
    for rows, inputs, outputs in sizes[: 1 if planted else None]:
        x, weight = (number(n, inputs, dtype=torch.bfloat16) for n in (rows, outputs))
        kernels.linear_step(x, weight, number(outputs, dtype=torch.bfloat16))


def mamba_step(number: Numbers, planted: bool) -> None:
    """One row, several and many, odd sizes, many states, with everything there is and nothing."""
    import torch

    from lrnnx_core.backends import cuda_mamba_step as kernels

    dtypes = (torch.float32, torch.bfloat16, torch.float64)[: 1 if planted else None]
    sizes = ((5, 72, 16, 4), (1, 37, 5, 3), (3, 264, 70, 8))
    cases = [(*case, *size) for case in itertools.product(dtypes, (True, False)) for size in sizes]
    cases += [(torch.bfloat16, True, 19, 72, 16, 5), (torch.bfloat16, False, 16, 264, 70, 8)]
    for dtype, rich, batch, E, N, R in cases:
        wide = torch.promote_types(dtype, torch.float32)
        least = 0 if batch > 1 else kernels.ROWS_BLOCKS  # several rows a thread
        with mock.patch.multiple(kernels, ROWS_BLOCKS=least):
            kernels.mamba_step(
                number(batch, 2 * E, dtype=dtype, low=-1.0), number(batch, 3, E, dtype=dtype),
                number(batch, E, N, dtype=wide), number(E, 1, 4, dtype=dtype),
                number(E, dtype=dtype) if rich else None, number(R + 2 * N, E, dtype=dtype),
                number(E, R, dtype=dtype), number(E, dtype=wide), -number(E, N, dtype=wide),
                number(E, dtype=wide), number(E, dtype=wide) if rich else None,
                number(batch, dtype=wide) if rich else None, None, None, None, 1.0, False, rich,
                "zoh" if rich else "mamba",
            )  # fmt: skip


def single_steps(number: Numbers, planted: bool) -> None:
    """One row, several and many, odd sizes, with what is optional and without."""
    import torch

    from lrnnx_core.backends import (
        cuda_steps_diagonal,
        cuda_steps_griffin,
        cuda_steps_norm,
        cuda_steps_s7,
        cuda_steps_siso,
        cuda_steps_ssd,
    )

    cases = ((torch.float32, 9), (torch.float32, 1), (torch.bfloat16, 5), (torch.float64, 3))
    for dtype, rows in cases[: 1 if planted else None]:
        real = torch.promote_types(dtype, torch.float32)
        kind = torch.promote_types(real, torch.complex64)

        def low(*shape: int, dtype: torch.dtype = dtype) -> Any:
            return number(*shape, dtype=dtype, low=-1.0)

        def r(*shape: int, real: torch.dtype = real) -> Any:
            return number(*shape, dtype=real, low=-1.0)

        def c(*shape: int, kind: torch.dtype = kind) -> Any:
            return number(*shape, dtype=kind, low=-1.0)

        def flags(count: int) -> Any:
            return number(count, dtype=torch.float32, low=-1.0) > 0

        for H, P in ((37, 21), (64, 40)):
            read = (r(H, P), r(H, P), r(H), 2.0)
            cuda_steps_diagonal.diagonal_step(low(rows, H), c(rows, P), c(P), c(P), c(P, H), *read)
            cuda_steps_diagonal.flow_step(
                low(rows, H), c(rows, P), -c(P), r(P), r(rows), c(P, H), *read, True, "zoh"
            )
        for M, U in ((21, c(1, 13, 21)), (32, None)):
            cuda_steps_siso.siso_step(
                low(rows, 13), c(rows, 13, M), c(13, M), c(13, M), U, U, r(2, 13, M), r(2, 13, M),
                r(2, 13), 2.0,
            )  # fmt: skip
        for count in (rows, 300):
            cuda_steps_griffin.griffin_step(
                low(count, 66), low(count, 66), low(count, 3, 66), r(count, 66), flags(count),
                low(66, 1, 4), low(66), low(2, 33, 33), low(66), low(2, 33, 33), low(66), r(66),
                r(count), False, True, True,
            )  # fmt: skip
        for N, norm in ((17, low(48)), (128, low(48))):
            mixed = 48 + 4 * N
            cuda_steps_ssd.ssd_step(
                low(rows, 48 + mixed + 4), low(rows, 3, mixed), r(rows, 4, 12, N),
                low(mixed, 1, 4), low(mixed), r(4), r(4), r(4), norm, r(rows), 2, 0.0, 2.0, 1.0,
                False, False,
            )  # fmt: skip
        cuda_steps_s7.s7_step(r(rows, 37), r(rows, 5), r(10 + 11 * 37, 37), r(5))
        for H in (37, 2048):
            cuda_steps_norm.rms_norm(low(rows, H), low(H), 1e-6)


def trilinear(number: Numbers, planted: bool) -> None:
    """Few samples, divided over blocks, and many; weights along either axis; one tile and two."""
    from lrnnx_core.backends import cuda_trilinear as kernels

    for samples in (301,) if planted else (301, 9001):
        w = number(132, 5, 20, low=-1.0)
        h, v, g = (number(samples, n, low=-1.0) for n in (5, 20, 132))
        kernels.trilinear(w, h, v, 1)
        kernels.trilinear(w.transpose(0, 1), g, v, 1)
        kernels.trilinear(w.permute(2, 0, 1), g, h, 1)
        kernels.trilinear_outer(g, h, v, 1)


def add_norm(number: Numbers, planted: bool) -> None:
    """Rows of a warp and of several, with tails and without, and every optional part."""
    import torch

    from lrnnx_core.backends import cuda_add_norm as kernels

    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    for dtype, layer in itertools.product(dtypes[: 1 if planted else None], (True, False)):
        narrow = torch.bfloat16 if dtype == torch.float32 and layer else dtype
        for width in (301, 1024):
            x = number(5, 7, width, dtype=dtype, low=-1.0)
            branch = number(5, 7, width, dtype=narrow, low=-1.0) if layer else None
            weight, bias = number(width, dtype=dtype), number(width, dtype=dtype) if layer else None
            total, y, stats = kernels.add_norm(x, branch, weight, bias, 1e-5, layer, narrow)
            total = x if branch is None else total
            kernels.add_norm_backward(
                total if layer else None, y, total, stats, weight, bias, layer, narrow
            )


OPERATORS = (
    add_norm, argmax, linear_step, linear_tile, linear_mma, mamba_step, single_steps,
    linear_scan, causal_conv1d, rg_lru_scan, diagonal_scan, projected_scan, s4d_scan,
    selective_scan, selective_step, vandermonde, cauchy, discretize_diagonal, trilinear,
)  # fmt: skip


def launch_all(device: str, planted: bool, half: int | None = None) -> None:
    """Launch everything once, or a half; with planted faults as little as meets each of them."""
    for operator in OPERATORS if half is None else OPERATORS[half::2]:
        operator(Numbers(device), planted)


@contextmanager
def recorded(found: list[Any]) -> Generator[None]:
    """Record kernels instead of launching them."""
    from lrnnx_core.backends import cuda

    launch = cuda.Kernel.launch
    cuda.Kernel.launch = lambda kernel, *_: found.append(kernel)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        cuda.Kernel.launch = launch


def suite(fault: str | None, half: int | None = None) -> None:
    """Compile what will be launched, many kernels at a time, and launch it."""
    import torch

    from lrnnx_core.backends import cuda

    if not cuda.ready():
        sys.exit(f"sanitize: no CuPy, so no kernel would run: {cuda.pip_line()}")
    if fault is not None:
        cuda.source = planted_sources(fault, cuda.source)
    kernels: list[Any] = []
    with recorded(kernels):
        launch_all("cuda", fault is not None, half)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(min(os.cpu_count() or 1, cuda.MOST_COMPILERS)) as pool:
        list(pool.map(lambda kernel: kernel.compile(0), dict.fromkeys(kernels)))
    launch_all("cuda", fault is not None, half)
    torch.cuda.synchronize()


# ------------------------------------------------------------------------------------ the tools


def find_sanitizer() -> str:
    """Return the program: from the PATH, the toolkit's usual place, or the wheel."""
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    found = shutil.which("compute-sanitizer") or (str(usual) if usual.exists() else None)
    if found is not None:
        return found
    try:
        files = metadata.files("nvidia-cuda-sanitizer-api") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "compute-sanitizer":
            return str(file.locate())
    sys.exit("sanitize: no compute-sanitizer: pip install nvidia-cuda-sanitizer-api")


LIMIT = 100  # seconds of a run


HALVES = (0, 1)
# A store past the end of one tensor is to meet nothing of the next: more than a row of any of them.
PADDING = 1 << 16


def command(sanitizer: str, tool: str, half: int | None) -> list[str]:
    """Return the command line of one run, with a half of the faults or without any.

    A reported store ends its kernel, not the process.
    """
    found = [sanitizer, f"--tool={tool}", "--error-exitcode=7", "--print-limit=100000"]
    found += ["--show-backtrace=no", "--destroy-on-device-error=kernel"]
    if tool == "memcheck":
        found.append(f"--padding={PADDING}")
    for name in FILTERS:
        found += ["--kernel-name", f"kernel_substring={name}"]
    found += [sys.executable, "-m", "benchmarks.cuda.sanitize", "--suite"]
    return found if half is None else [*found, "--fault", tool, "--half", str(half)]


def run(line: list[str]) -> tuple[int, str]:
    """Return the exit code and the output of one run."""
    # Every tensor in memory of its own: one past its end is past the end of what was allocated.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\nended after {LIMIT} s"
    return process.returncode, output


def reported(output: str) -> set[str]:
    """Return the kernels that a tool's output names in its errors."""
    return set(re.findall(r" at (?:0x[0-9a-f]+ in )?([A-Za-z_]\w*)", output))


def judge(tool: str, fault: bool, code: int, output: str) -> list[str]:
    """Return what is wrong with the outcome of a run."""
    summary = re.search(r"SUMMARY: (\d+) (?:errors?|hazards?)", output)
    if summary is None:
        return ["the tool gives no summary"]
    if not fault:
        clean = code == 0 and summary[1] == "0"
        return [] if clean else [f"exit code {code}, {', '.join(sorted(reported(output)))}"]
    expected = {kernel for planted in FAULTS[tool] for kernel in planted.kernels}
    missing = sorted(expected - reported(output))
    return [f"not reported: {', '.join(missing)}"] if missing else []


def main() -> int:
    """Run both tools with and without their faults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", action="store_true", help="only launch, no sanitizer")
    parser.add_argument("--fault", choices=FAULTS, help="with --suite: plant a tool's faults")
    parser.add_argument("--half", type=int, choices=HALVES, help="with --suite: launch a half")
    arguments = parser.parse_args()
    if arguments.suite:
        suite(arguments.fault, arguments.half)
        return 0
    sanitizer = find_sanitizer()
    wrong = 0
    for fault, tool in itertools.product((False, True), FAULTS):
        start = time.monotonic()
        # In halves: of 36 faulty kernels in one process racecheck reported nothing of the last.
        runs = [run(command(sanitizer, tool, half)) for half in (HALVES if fault else (None,))]
        output = "\n".join(text for _, text in runs)
        faults = judge(tool, fault, max(code for code, _ in runs), output)
        wrong += bool(faults)
        summary = [x.strip("= ") for x in output.splitlines() if "SUMMARY" in x]
        kind = f"{len(FAULTS[tool])} planted" if fault else "as they are"
        verdict = "; ".join(faults) or "as expected"
        print(f"{tool:<10} {kind:<12} {time.monotonic() - start:5.0f} s  ", end="")
        print(f"{'; '.join(summary) or 'no summary'}  {verdict}", flush=True)
        if faults:
            print(output[:3000], output[-3000:], sep="\n...\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
