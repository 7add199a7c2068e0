"""The launchers of decoding's CUDA kernels and who calls them, up to the launch; needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrnnx_core.backends import cuda, cuda_linear_step, cuda_linear_tile, cuda_mamba_step
from lrnnx_core.backends.cuda_linear_step import linear_step
from lrnnx_core.backends.cuda_mamba_step import mamba_step
from lrnnx_core.backends.donation import donating, settling
from lrnnx_core.ops import _step_formulas as formulas
from lrnnx_nn import linears

H100 = cuda.Limits(132, 228 * 1024, 227 * 1024)
BF16 = torch.bfloat16


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Let CPU tensors pass for CUDA ones; return (kernel, blocks, threads, values) of launches."""
    found: list[Any] = []

    def launch(kernel: Any, device: int, blocks: int, threads: int, _: int, *values: Any) -> None:
        kernel._struct.pack(*values)
        found.append((kernel, blocks, threads, values))

    monkeypatch.setattr(cuda.Kernel, "launch", launch)
    monkeypatch.setattr(cuda, "ready", lambda: True)
    monkeypatch.setattr(cuda, "limits", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(Tensor, "is_cpu", property(lambda self: False))
    shapes = (cuda_linear_step._shape, cuda_mamba_step._shape)
    for cached in shapes:
        cached.cache_clear()
    yield found
    for cached in shapes:
        cached.cache_clear()


def mamba(batch: int, E: int = 1536, N: int = 16, R: int = 48, dtype: Any = BF16) -> list[Any]:
    wide = torch.promote_types(dtype, torch.float32)
    t, w = (lambda *s: torch.zeros(s, dtype=dtype)), (lambda *s: torch.zeros(s, dtype=wide))
    return [
        t(batch, 2 * E), t(batch, 3, E), w(batch, E, N), t(E, 1, 4), t(E), t(R + 2 * N, E), t(E, R),
        w(E), w(E, N), w(E), None, None, None, None, None, 1.0, False, False, "mamba",
    ]  # fmt: skip


def test_what_a_small_language_model_launches_is_listed(launches: list[Any]) -> None:
    for batch in (1, 64):
        arguments = mamba(batch)
        y, tail, new = mamba_step(*arguments)
        assert (y.shape, y.dtype) == ((batch, 1536), BF16)
        assert (tail.dtype, new.dtype) == (BF16, torch.float32)
    for rows in (1, 4):
        for inputs, outputs in ((768, 3072), (1536, 768)):
            x, weight = torch.zeros(rows, inputs), torch.zeros(outputs, inputs)
            assert linear_step(x.to(BF16), weight.to(BF16), None).shape == (rows, outputs)
    listed = {k for name in ("mamba_step", "linear_step") for k in cuda.KERNELS[name](H100)}
    assert all(kernel in listed for kernel, *_ in launches)
    assert len(launches) == 4 + 4
    for kernel, blocks, threads, values in launches[:4]:
        assert threads == (64 if kernel.entry == "mamba_step" else 192)
        assert values[16:23] == (values[16], 1536, 16, 48, 48, 64, 80)
        batch, tiles = values[16], values[23]
        if kernel.entry == "mamba_step_many":
            assert (batch, tiles, blocks) == (64, 5, 5 * 8 * 8)  # groups, slices, tiles of rows
        else:
            assert blocks == tiles * (batch // 4 if batch > 1 else 1)


def test_new_states_take_the_places_of_those_given_away(launches: list[Any]) -> None:
    arguments = mamba(2, 8)
    with donating(arguments[1:3]):
        _, tail, new = mamba_step(*arguments)
    assert (tail is arguments[1], new is arguments[2]) == (True, True)
    values = launches[-1][3]
    assert (values[1], values[11]) == (values[14], values[15])
    turned = arguments[2].mT.contiguous().mT
    with donating([arguments[1], turned]):
        _, _, new = mamba_step(*arguments[:2], turned, *arguments[3:])
    assert new is not turned
    assert new.is_contiguous()


def test_what_has_no_kernel_runs_in_pytorch(launches: list[Any]) -> None:
    normed, mixed = mamba(2, 8), mamba(2, 8)
    normed[16], mixed[5] = True, mixed[5].float()
    for arguments in (normed, mixed, mamba(0, 8)):
        for a, b in zip(mamba_step(*arguments), formulas.mamba_step(*arguments), strict=True):
            torch.testing.assert_close(a, b)
    x, weight = torch.ones(300, 8), torch.ones(5, 8)
    for rows, w in ((300, weight), (2, weight.T.contiguous().T), (0, weight)):
        torch.testing.assert_close(
            linear_step(x[:rows], w, None), nn.functional.linear(x[:rows], w)
        )
    assert not launches


def test_the_order_of_a_sum_depends_on_inputs_and_dtype_alone() -> None:
    for inputs in range(1, 5000, 7):
        vector, group = cuda_linear_step.partition(inputs, BF16)
        assert inputs % vector == 0
        assert group in (8, 16, 32, 64, 128)
        chunk, slices, long = cuda_linear_tile.partition(inputs, torch.float32)
        assert (chunk, inputs > slices * chunk) == (16, slices == 16 and inputs > 256)
        assert long == (inputs > 1024)


def test_who_multiplies_depends_on_rows_and_products(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    float32, float64 = torch.float32, torch.float64
    for rows, inputs, outputs, dtype, tf32, entry, blocks in (
        (4, 128, 512, float32, False, "linear_step", 32),
        (5, 128, 512, float32, False, "linear_tile", 128),
        (32, 128, 512, float32, True, "linear_tile", 256),
        (32, 256, 128, float32, False, "linear_tile", 128),
        (256, 128, 512, float32, False, "linear_tile", 256),
        (32, 256, 128, float64, True, "linear_tile", 128),
        (64, 768, 768, float32, False, "linear_tile", 96),
        (64, 768, 3072, float32, False, None, 0),
        (64, 768, 2304, float32, True, None, 0),
        (64, 768, 768, float64, False, None, 0),
    ):
        monkeypatch.setattr(cuda_linear_step, "tf32_allowed", lambda tf32=tf32: tf32)
        del launches[:]
        x, weight = (torch.zeros(n, inputs, dtype=dtype) for n in (rows, outputs))
        assert linear_step(x, weight, None).shape == (rows, outputs)
        assert [(k.entry, count) for k, count, *_ in launches] == [(entry, blocks)] * bool(entry)
        with settling([weight]):
            linear_step(x, weight, None)
        promised = [k if entry == "linear_step" else values[-1] for k, *_, values in launches]
        assert len(set(promised)) == len(launches) == 2 * bool(entry)


def test_who_multiplies_half_precision(launches: list[Any]) -> None:
    for rows, inputs, outputs, blocks, tile in (
        (5, 768, 3072, 96, (16, 32)), (32, 768, 3072, 192, (16, 32)),
        (64, 768, 3072, 128, (64, 24)), (128, 768, 3072, 0, None),
        (64, 1536, 768, 192, (16, 16)), (128, 1536, 768, 128, (32, 24)),
        (129, 1536, 768, 0, None), (8, 2048, 8192, 0, None), (16, 100, 64, 0, None),
    ):  # fmt: skip
        del launches[:]
        x, weight = (torch.zeros(n, inputs, dtype=BF16) for n in (rows, outputs))
        with settling([weight]):
            assert linear_step(x, weight, None).shape == (rows, outputs)
        linear_step(x, weight, None)
        assert [values[-1] for *_, values in launches] == ([True, False] if tile else [])
        for kernel, count, threads, _ in launches:
            assert (kernel.entry, count, threads) == ("linear_mma", blocks, 256)
            assert {f"-DHEIGHT={tile[0]}", f"-DOUTPUTS={tile[1]}"} <= set(kernel.options)
            # what fixes the order of a sum
            assert f"-DCHUNKS={-(-inputs // 256)}" in kernel.options


def test_a_linear_layer_is_called_where_something_stands_between(launches: list[Any]) -> None:
    layer, x = nn.Linear(8, 4), torch.ones(2, 8)

    def launched(module: nn.Module, rows: Tensor = x) -> bool:
        del launches[:]
        linears.apply_linear(module, rows)
        return bool(launches)

    assert not launched(layer)  # gradients
    with torch.no_grad():
        assert launched(layer)
        assert not launched(layer, torch.ones(300, 8))
        assert not launched(layer, torch.ones(0, 8))
        handles = (
            lambda: layer.register_forward_hook(lambda *a: None),
            lambda: layer.register_forward_pre_hook(lambda *a: None),
            lambda: nn.modules.module.register_module_forward_hook(lambda *a: None),
        )
        for register in handles:
            handle = register()
            assert not launched(layer)
            handle.remove()
            assert launched(layer)
        assert not launched(type("Adapted", (nn.Linear,), {})(8, 4))
        layer.forward = nn.Linear(8, 4).forward
        assert not launched(layer)
