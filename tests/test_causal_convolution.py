"""The causal convolution against the direct sum, at every length and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lrnnx_core.ops import causal_convolution
from lrnnx_core.ops.causal_convolution import fast_length

F64, C128 = torch.float64, torch.complex128


def direct(u: Tensor, K: Tensor, mimo: bool = False) -> Tensor:
    """Return y_t = sum_{s <= t} K_s u_{t-s}, term by term."""
    taps = K.shape[-3] if mimo else K.shape[-2]
    rows = []
    for t in range(u.shape[-2]):
        terms = []
        for s in range(min(t + 1, taps)):
            x = u[..., t - s, :]
            terms.append((K[..., s, :, :] @ x[..., None])[..., 0] if mimo else K[..., s, :] * x)
        zero = u[..., t, :] * 0 if not mimo else (K.sum(-3) @ (0 * u[..., t, :, None]))[..., 0]
        rows.append(sum(terms, zero))
    return torch.stack(rows, dim=-2)


def close(got: Tensor, want: Tensor, rtol: float = 1e-12) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if want.numel():
        assert (got - want).abs().max() <= rtol * want.abs().max().clamp(min=1e-300)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 33, 64, 101])
@pytest.mark.parametrize("taps", ["one", "shorter", "equal", "longer"])
def test_it_is_the_direct_sum(length: int, taps: str) -> None:
    size = {"one": 1, "shorter": max(1, length // 3), "equal": length, "longer": length + 5}[taps]
    u, K = torch.randn(2, length, 3, dtype=F64), torch.randn(size, 3, dtype=F64)
    close(causal_convolution(u, K), direct(u, K))
    mixing = torch.randn(size, 4, 3, dtype=F64)
    close(causal_convolution(u, mixing, mimo=True), direct(u, mixing, mimo=True))


@pytest.mark.parametrize("length", [257, 4097])
def test_it_is_torchs_conv1d_at_long_odd_lengths(length: int) -> None:
    u, K = torch.randn(2, length, 3, dtype=F64), torch.randn(length, 3, dtype=F64)
    padded = torch.nn.functional.pad(u.mT, (length - 1, 0))
    want = torch.nn.functional.conv1d(padded, K.flip(0).T[:, None], groups=3).mT
    close(causal_convolution(u, K), want)
    narrow = causal_convolution(u.float(), K.float())
    assert (narrow - want).abs().max() < 1e-5 * want.abs().max()


def test_no_samples_no_taps_and_empty_batches_give_empty_or_zero_outputs() -> None:
    K = torch.randn(5, 3)
    assert causal_convolution(torch.randn(2, 0, 3), K).shape == (2, 0, 3)
    assert causal_convolution(torch.randn(0, 9, 3), K).shape == (0, 9, 3)
    y = causal_convolution(torch.randn(2, 9, 3), K[:0])
    assert y.shape == (2, 9, 3)
    assert not y.any()
    mixing = torch.randn(5, 4, 3)
    assert causal_convolution(torch.randn(2, 0, 3), mixing, mimo=True).shape == (2, 0, 4)
    assert causal_convolution(torch.randn(0, 9, 3), mixing, mimo=True).shape == (0, 9, 4)
    y = causal_convolution(torch.randn(2, 9, 3), mixing[:0], mimo=True)
    assert y.shape == (2, 9, 4)
    assert not y.any()
    u = torch.randn(0, 9, 3, requires_grad=True)
    K.requires_grad_()
    gu, gK = torch.autograd.grad(causal_convolution(u, K).sum(), (u, K))
    assert gu.shape == u.shape
    assert not gK.any()


@pytest.mark.parametrize("mimo", [False, True], ids=["siso", "mimo"])
@pytest.mark.parametrize(("u_type", "K_type"), [(F64, C128), (C128, F64), (C128, C128)], ids=str)
def test_complex_operands_promote(u_type: torch.dtype, K_type: torch.dtype, mimo: bool) -> None:
    u, K = torch.randn(2, 9, 3, dtype=u_type), torch.randn(9, *[4] * mimo, 3, dtype=K_type)
    want = direct(u.to(C128), K.to(C128), mimo)
    close(causal_convolution(u, K, mimo=mimo), want)


def test_batch_dimensions_broadcast_and_channels_make_an_axis() -> None:
    u, K = torch.randn(2, 1, 9, 3, dtype=F64), torch.randn(4, 9, 3, dtype=F64)
    y = causal_convolution(u, K)
    assert y.shape == (2, 4, 9, 3)
    for b in range(2):
        for c in range(4):
            close(y[b, c], direct(u[b, 0], K[c]))
    close(causal_convolution(u[0, 0], K[0]), direct(u[0, 0], K[0]))
    mixing = torch.randn(2, 1, 9, 5, 3, dtype=F64)
    y = causal_convolution(torch.randn(4, 9, 3, dtype=F64), mixing, mimo=True)
    assert y.shape == (2, 4, 9, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_inputs_are_transformed_in_float32(dtype: torch.dtype) -> None:
    u, K = torch.randn(2, 100, 3).to(dtype), torch.randn(100, 3).to(dtype)
    y = causal_convolution(u, K)
    assert y.dtype == dtype
    want = causal_convolution(u.double(), K.double())
    assert (y.double() - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()
    assert causal_convolution(u, K.float()).dtype == torch.float32


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 5, 7])
@pytest.mark.parametrize("mimo", [False, True], ids=["siso", "mimo"])
def test_gradients_are_right(length: int, size: int, mimo: bool) -> None:
    u = torch.randn(2, length, 2, dtype=F64, requires_grad=True)
    K = torch.randn(size, *[3] * mimo, 2, dtype=F64, requires_grad=True)
    run = lambda u, K: causal_convolution(u, K, mimo=mimo)  # noqa: E731
    assert gradcheck(run, (u, K), check_forward_ad=True)
    assert gradgradcheck(run, (u, K))


def test_gradients_are_right_for_complex_operands() -> None:
    u = torch.randn(4, 2, dtype=C128, requires_grad=True)
    K = torch.randn(4, 2, dtype=C128, requires_grad=True)
    assert gradcheck(causal_convolution, (u, K), check_forward_ad=True)


def test_the_future_never_reaches_the_past() -> None:
    u = torch.randn(50, 2, dtype=F64, requires_grad=True)
    y = causal_convolution(u, torch.randn(50, 2, dtype=F64))
    (g,) = torch.autograd.grad(y[20].sum(), u)
    assert g[21:].abs().max() < 1e-14


def test_transforms_fit_the_length() -> None:
    assert [fast_length(n) for n in (1, 2, 3, 7, 11, 13, 17, 97)] == [1, 2, 3, 8, 12, 15, 18, 100]
    for n in range(1, 2000):
        m = fast_length(n)
        assert m >= n
        for p in (2, 3, 5):
            while m % p == 0:
                m //= p
        assert m == 1


def test_strides_do_not_matter() -> None:
    base, K = torch.randn(2, 20, 3, dtype=F64), torch.randn(20, 3, dtype=F64)
    want = direct(base, K)
    close(causal_convolution(base.mT.contiguous().mT, K.T.contiguous().T), want)
    wide = torch.zeros(2, 40, 5, dtype=F64)
    wide[:, ::2, 1:4] = base
    close(causal_convolution(wide[:, ::2, 1:4], K), want)
    row = base[:1].expand(2, 20, 3)
    close(causal_convolution(row, K), direct(row, K))


def test_errors_say_what_came_and_what_was_expected() -> None:
    u, K = torch.randn(2, 9, 3), torch.randn(9, 3)
    for bad_u, bad_K, options, said in (
        (u[0, 0], K, {}, r"u \(3,\) and K \(9, 3\) need at least 2 and 2 dimensions"),
        (u, K, {"mimo": True}, r"u \(2, 9, 3\) and K \(9, 3\) need at least 2 and 3 dimensions"),
        (u, K[:, :2], {}, r"u \(2, 9, 3\) and K \(9, 2\) do not match at axis -1 \(channels\)"),
        (u, K.to("meta"), {}, "u is on cpu and K on meta"),
        (u.long(), K, {}, "u has dtype torch.int64, expected floating"),
        (u, K.bool(), {}, "K has dtype torch.bool, expected floating"),
        (
            u,
            K.expand(3, 9, 3),
            {},
            r"u \(2, 9, 3\) and K \(3, 9, 3\) do not broadcast at the batch",
        ),
    ):
        with pytest.raises(ValueError, match="causal_convolution: .*" + said):
            causal_convolution(bad_u, bad_K, **options)


def test_it_runs_on_the_meta_device() -> None:
    u, K = torch.empty(2, 9, 3, device="meta"), torch.empty(9, 4, 3, device="meta")
    assert causal_convolution(u, K, mimo=True).shape == (2, 9, 4)
    assert causal_convolution(u, K[:, 0]).shape == (2, 9, 3)
