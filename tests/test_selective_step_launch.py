# SPDX-License-Identifier: MIT
"""The launcher of the selective scan's decode step, up to the launch; needs no GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lrnnx_core.backends import cuda, cuda_selective_step
from lrnnx_core.backends.cuda_selective_step import partition, selective_step

H100 = cuda.Limits(132, 228 * 1024, 227 * 1024)
Launch = tuple[cuda.Kernel, int, int, dict[str, str], list[int]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Let CPU tensors pass for CUDA ones, up to the launch."""
    seen: list[Launch] = []

    def launch(self: cuda.Kernel, device: int, *rest: Any) -> None:
        blocks, threads, _, *values = rest
        self._struct.pack(*values)
        choices = dict(o[2:].split("=") for o in self.options if o.startswith("-D"))
        seen.append((self, blocks, threads, choices, values))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(cuda.Kernel, "launch", launch)
    yield seen
    cuda_selective_step._shape.cache_clear()


def mamba(
    batch: tuple[int, ...] = (8,), width: int = 64, states: int = 16, offset: int = 48,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Any]:  # fmt: skip
    """Return the arguments as a Mamba block's decode step has them: slices of projections."""
    xz = torch.zeros(*batch, 1, 2 * width, dtype=dtype)
    rBC = torch.zeros(*batch, 1, offset + 2 * states, dtype=dtype)
    B, C = (rBC[..., offset:].unsqueeze(-2)[..., i * states :][..., :states] for i in range(2))
    state = torch.promote_types(dtype, torch.float32)
    real = {"dtype": state}
    return [
        xz[..., :width], torch.zeros(*batch, 1, width, dtype=dtype),
        torch.zeros(width, states, **real), B, C, torch.zeros(width, **real), xz[..., width:],
        torch.zeros(width, **real), torch.zeros(*batch, width, states, **real), None, None, None,
        True, False, "mamba",
    ]  # fmt: skip


def test_a_mamba_step_is_one_launch_of_whole_words_without_a_copy(launches: list[Launch]) -> None:
    arguments = mamba()
    y, last = selective_step(*arguments)
    assert y.shape == (8, 1, 64)
    assert y.dtype == torch.bfloat16
    assert last.shape == (8, 64, 16)
    assert last.dtype == torch.float32
    ((_, blocks, threads, choices, values),) = launches
    assert (choices["STATE_WIDTH"], choices["MATRIX_WIDTH"], choices["ROWS"]) == ("4", "4", "2")
    assert choices["COMMON"] == "true"
    assert blocks * threads == 8 // 2 * 64 * 4
    named = dict(zip(("u", "dt", "D", "z", "dt_bias"), range(0, 20, 4), strict=True))
    for name, at in named.items():
        tensor = arguments[{"u": 0, "dt": 1, "D": 5, "z": 6, "dt_bias": 7}[name]]
        assert values[at] == tensor.data_ptr()
    assert values[0:4] == [arguments[0].data_ptr(), 0, 128, 1]
    assert values[42:47] == [arguments[3].data_ptr(), 0, 80, 0, 1]
    assert values[52:54] == [y.data_ptr(), last.data_ptr()]
    per_batch = 64 * 4 // threads  # blocks: every channel has four lanes
    assert values[-10:-3] == [8, 8, 64, 16, 64, 64, per_batch]
    assert values[-3:] == [4 + 16, 1, 0]  # D and dt_bias are stored as float32


def test_a_narrower_load_where_something_is_not_aligned(launches: list[Launch]) -> None:
    def widths(arguments: list[Any]) -> tuple[str, str]:
        selective_step(*arguments)
        choices = launches[-1][3]
        return choices["STATE_WIDTH"], choices["MATRIX_WIDTH"]

    assert widths(mamba(offset=3)) == ("4", "1")
    assert widths(mamba(offset=4)) == ("4", "4")
    assert widths(mamba(states=3)) == ("1", "1")
    assert widths(mamba(states=6)) == ("2", "2")
    moved = mamba()
    moved[8] = torch.zeros(8, 64, 17)[..., 1:]
    assert widths(moved) == ("1", "4")
    turned = mamba()
    turned[2] = torch.zeros(16, 64).T
    assert widths(turned) == ("1", "4")
    alone = mamba((1,))  # strides of axes of one number do not matter
    alone[8] = torch.zeros(64 * 16 + 1)[:1024].as_strided((1, 64, 16), (1025, 16, 1))
    assert widths(alone) == ("4", "4")


def test_what_is_not_as_in_mamba_takes_the_kernel_for_everything(launches: list[Launch]) -> None:
    def common(place: int, value: Any, states: int = 16) -> bool:
        arguments = mamba(states=states)
        arguments[place] = value
        selective_step(*arguments)
        return launches[-1][3]["COMMON"] == "true"

    assert common(14, "zoh")
    assert common(14, "mamba", 128)
    assert common(8, torch.zeros(3, 8, 64, 16)[1])
    assert not common(14, "mamba", 8 + 1)
    for place in (5, 6, 7, 8):  # D, z, dt_bias, h0
        assert not common(place, None)
    assert not common(9, torch.zeros(8, 1, 64, dtype=torch.bfloat16))  # decay_dt
    assert not common(11, torch.zeros(8, 1, dtype=torch.bool))  # reset
    assert not common(12, value=False)  # softplus
    assert not common(0, torch.zeros(8, 1, 128, dtype=torch.bfloat16)[..., ::2])
    assert not common(3, torch.zeros(8, 1, 2, 16, dtype=torch.bfloat16))  # two groups of B
    assert not common(5, torch.zeros(64, dtype=torch.bfloat16))
    assert not common(1, torch.zeros(8, 1, 64))
    assert not common(2, torch.zeros(64, 20)[:, :16])
    assert not common(8, torch.zeros(8, 64, 20)[..., :16])


def test_the_order_of_operations_depends_on_the_states_and_their_dtype_alone(
    launches: list[Launch],
) -> None:
    for states, dtype in itertools.product((1, 3, 16, 200, 1024), cuda_selective_step.ACTIVATIONS):
        for batch, offset in itertools.product(((), (1,), (2,), (64,), (3, 5)), (3, 4)):
            selective_step(*mamba(batch, 8, states, offset, dtype))
        order = {(c["VECTOR"], c["LANES"], c["LOOP"]) for _, _, _, c, _ in launches}
        assert len(order) == 1
        assert all(t <= cuda_selective_step.THREADS and t % 32 == 0 for _, _, t, _, _ in launches)
        launches.clear()


def test_partitions_cover_the_states() -> None:
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        for states in range(1, 1025):
            vector, lanes = partition(states, dtype)
            assert states % vector == 0
            assert vector * dtype.itemsize <= 16
            assert lanes in (1, 2, 4, 8, 16)
            assert lanes == 16 or lanes * vector >= states


def test_what_a_kernel_does_not_read_is_cast_or_copied_once(launches: list[Launch]) -> None:
    arguments = mamba()
    arguments[2] = arguments[2].bfloat16()
    selective_step(*arguments)
    assert len(launches) == 1
    assert launches[-1][-1][32] != arguments[2].data_ptr()
    arguments = mamba((2, 3, 2))
    arguments[0] = arguments[0][:, :1].expand(2, 3, 2, 1, 64)
    arguments[6] = arguments[6][:1, :, :1].expand(2, 3, 2, 1, 64)
    selective_step(*arguments)
    assert len(launches) == 2
    assert launches[-1][-1][0] != arguments[0].data_ptr()


def test_parameters_with_batch_axes_are_read_row_by_row(launches: list[Launch]) -> None:
    arguments = mamba((4, 8))
    for i, shape in ((2, (4, 64, 16)), (5, (4, 64)), (7, (4, 64))):
        arguments[i] = torch.zeros(shape)
    selective_step(*arguments)
    *_, choices, values = launches[-1]
    assert choices["ROWS"] == "1"
    assert values[32:37] == [arguments[2].data_ptr(), 1024, 0, 16, 1]
    assert values[-9] == 8  # inner rows


def test_nothing_is_launched_for_nothing(launches: list[Launch]) -> None:
    for batch, width in (((0,), 8), ((2,), 0)):
        y, last = selective_step(*mamba(batch, width))
        assert y.shape == (*batch, 1, width)
        assert last.shape == (*batch, width, 16)
    assert not any(blocks == 0 for _, blocks, *_ in launches)
    assert not launches


def test_no_other_device_and_no_other_dtype(launches: list[Launch]) -> None:
    arguments = mamba()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "get_device", lambda self: -1 if self.ndim == 2 else 0)
        with pytest.raises(ValueError, match="A is on cpu, the other tensors on"):
            selective_step(*arguments)
    arguments[0] = arguments[0].to(torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"float8_e5m2 on CUDA, expected one of float32"):
        selective_step(*arguments)
    assert not launches


def test_the_kernels_of_mamba_are_listed(launches: list[Launch]) -> None:
    listed = {k.options for k in cuda.KERNELS["selective_step"](H100)}
    for dtype, batch in itertools.product((torch.float32, torch.bfloat16), ((1,), (8,))):
        selective_step(*mamba(batch, dtype=dtype))
    assert all(kernel.options in listed for kernel, *_ in launches)
