"""causal_conv1d: against torch's conv1d, against a window that slides, and its tail."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from backends_both import both_backends  # noqa: F401
from op_cases import draw
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

from lrnnx_core.ops import causal_conv1d

pytestmark = pytest.mark.usefixtures("both_backends")

C = 3
TAPS = pytest.mark.parametrize("taps", [1, 2, 4])
ACTIVATION = pytest.mark.parametrize("activation", ["none", "silu"])


def problem(
    length: int, taps: int, *batch: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    shapes = {
        "x": (*batch, length, C), "weight": (C, 1, taps), "bias": (C,),
        "tail": (*batch, taps - 1, C),
    }  # fmt: skip
    return {k: draw(*s, seed=i).to(dtype) for i, (k, s) in enumerate(shapes.items())}


def window(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor,
    activation: str = "none",
    reset: Tensor | None = None,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Slide the last K inputs over one row x (L, C), emptied at every reset."""
    taps = weight.shape[-1]
    seen, outputs = list(tail.unbind(0)), []
    for t in range(x.shape[0] if length is None else length):
        if reset is not None and bool(reset[t]):
            seen = [torch.zeros_like(v) for v in seen]
        seen = [*seen, x[t]]
        y = bias + sum(weight[:, 0, k] * v for k, v in enumerate(seen))
        outputs.append(y / (1 + torch.exp(-y)) if activation == "silu" else y)
        seen = seen[1:]
    y = torch.stack(outputs) if outputs else x[:0]
    return y, torch.stack(seen) if taps > 1 else tail


def close(got: Any, want: Any, tolerance: float = 1e-13) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@TAPS
@ACTIVATION
@pytest.mark.parametrize("length", [1, 2, 3, 4, 17])
def test_equals_torchs_convolution(length: int, activation: str, taps: int) -> None:
    p = problem(length, taps, 2)
    want = conv1d(pad(p["x"], (0, 0, taps - 1, 0)).mT, p["weight"], p["bias"], groups=C).mT
    want = silu(want) if activation == "silu" else want
    y, tail = causal_conv1d(p["x"], p["weight"], p["bias"], activation=activation)
    close(y, want)
    close(tail, pad(p["x"], (0, 0, taps - 1, 0))[:, length:])
    joined = torch.cat([p["tail"], p["x"]], 1)
    want = conv1d(joined.mT, p["weight"], groups=C).mT
    close(causal_conv1d(p["x"], p["weight"], tail=p["tail"])[0], want)


@TAPS
@ACTIVATION
@pytest.mark.parametrize("length", [0, 1, 2, 3, 9])
def test_equals_a_sliding_window_resets_and_lengths_too(
    length: int, activation: str, taps: int
) -> None:
    p = problem(length, taps, 4)
    resets = draw(4, length, seed=8) > 0.5
    for reset, lengths in itertools.product(
        (None, resets), (None, torch.tensor([0, 1, 3, length]))
    ):
        if lengths is not None:
            lengths = lengths.clamp(max=length)
        y, tail = causal_conv1d(**p, activation=activation, reset=reset, lengths=lengths)
        for row in range(4):
            n = length if lengths is None else int(lengths[row])
            r = None if reset is None else reset[row]
            want, last = window(
                p["x"][row], p["weight"], p["bias"], p["tail"][row], activation, r, n
            )
            close(y[row, :n], want)
            close(tail[row], last)


@TAPS
@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
def test_every_split_hands_the_tail_over(with_reset: bool, taps: int) -> None:
    length = 9
    p = problem(length, taps, 2)
    reset = draw(2, length, seed=8) > 0.6 if with_reset else None
    rest = {"weight": p["weight"], "bias": p["bias"]}
    y, tail = causal_conv1d(**p, reset=reset)
    for a, b in itertools.combinations_with_replacement(range(length + 1), 2):
        outputs, state = [], p["tail"]
        for piece in (slice(0, a), slice(a, b), slice(b, length)):  # many shorter than K
            r = None if reset is None else reset[:, piece]
            out, state = causal_conv1d(p["x"][:, piece], **rest, tail=state, reset=r)
            outputs.append(out)
        close(torch.cat(outputs, 1), y)
        close(state, tail)


@TAPS
def test_a_reset_hides_even_infinite_samples_from_output_tail_and_gradient(taps: int) -> None:
    p = problem(8, taps, 2)
    reset = torch.arange(8) == 5
    dirty = {**p, "x": p["x"].clone(), "tail": torch.full_like(p["tail"], float("nan"))}
    dirty["x"][:, :5] = float("inf")
    y, tail = causal_conv1d(**dirty, reset=reset)
    want, clean = causal_conv1d(p["x"][:, 5:], p["weight"], p["bias"])
    close(y[:, 5:], want)
    # after 3 samples of the document a tail of K = 4 ends exactly at its start
    close(tail, clean)
    # the next piece sees no more than the document
    short = torch.arange(8) == 7
    _, tail = causal_conv1d(**dirty, reset=short)
    assert not tail[:, :-1].any()
    x = p["x"].requires_grad_()
    y, tail = causal_conv1d(x, p["weight"], p["bias"], p["tail"], reset=reset)
    (g,) = torch.autograd.grad(y[:, 5:].sum() + tail.sum(), x)
    assert not g[:, :5].any()


def test_lengths_and_resets_without_batch_axes_apply_to_every_row() -> None:
    p = problem(7, 4, 2)
    reset, lengths = torch.arange(7) == 2, torch.tensor(5)
    got = causal_conv1d(**p, reset=reset, lengths=lengths)
    want = causal_conv1d(**p, reset=reset.expand(2, 7), lengths=lengths.expand(2))
    close(got, want, 0)


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)], ids=str)
def test_batch_axes_are_free(batch: tuple[int, ...]) -> None:
    p = problem(6, 4, *batch)
    y, tail = causal_conv1d(**p)
    assert (y.shape, tail.shape) == ((*batch, 6, C), (*batch, 3, C))
    if batch == (2, 3):
        one = {**p, "x": p["x"][1, 2], "tail": p["tail"][1, 2]}
        close(causal_conv1d(**one), (y[1, 2], tail[1, 2]), 0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)],
    ids=["fp32", "bf16", "fp16"],
)
def test_dtypes_are_kept_and_sums_are_float32(dtype: torch.dtype, tolerance: float) -> None:
    p = problem(40, 4, 2, dtype=dtype)
    y, tail = causal_conv1d(**p, activation="silu")
    assert y.dtype == tail.dtype == dtype
    want, _ = causal_conv1d(**{k: v.double() for k, v in p.items()}, activation="silu")
    # one rounding, that of the result
    assert ((y.double() - want).abs() <= tolerance * want.abs().clamp(min=0.1)).all()
    assert torch.equal(tail, p["x"][:, -3:])
    mixed, _ = causal_conv1d(p["x"], p["weight"].float(), p["bias"].float(), p["tail"].float())
    assert mixed.dtype == dtype


def test_float64_weights_make_no_float64_of_float32_outputs() -> None:
    p = problem(5, 4)
    y, tail = causal_conv1d(p["x"].float(), p["weight"], p["bias"])
    assert (y.dtype, tail.dtype) == (torch.float32, torch.float32)


@TAPS
@ACTIVATION
def test_gradients(activation: str, taps: int) -> None:
    p = problem(5, taps, 2)
    x = [v.requires_grad_() for v in p.values()]
    reset = draw(2, 5, seed=8) > 0.6
    for options in ({}, {"reset": reset, "lengths": torch.tensor([2, 5])}):

        def f(*v: Tensor, o: Any = options) -> Any:
            return causal_conv1d(*v, activation=activation, **o)

        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)


def test_strides_do_not_matter_and_nothing_is_written_to() -> None:
    p = problem(9, 4, 2)
    before = {k: v.clone() for k, v in p.items()}
    strided = {
        "x": p["x"].mT.contiguous().mT, "weight": p["weight"].mT.contiguous().mT,
        "bias": torch.stack([p["bias"]] * 2, -1)[:, 0], "tail": p["tail"].flip(1).flip(1),
    }  # fmt: skip
    close(causal_conv1d(**strided), causal_conv1d(**p), 1e-15)
    wide = {**p, "x": p["x"][:1].expand(2, 9, C)}
    close(causal_conv1d(**wide), causal_conv1d(**{**p, "x": wide["x"].clone()}), 1e-15)
    assert all(torch.equal(p[k], before[k]) for k in p)


@TAPS
def test_the_tail_does_not_keep_the_sequence_in_memory(taps: int) -> None:
    p = problem(1000, taps)
    for lengths in (None, torch.tensor(7)):
        _, tail = causal_conv1d(**p, lengths=lengths)
        assert tail.untyped_storage().nbytes() == 8 * (taps - 1) * C


BAD = {
    "activation": ({"activation": "gelu"}, r"activation 'gelu', expected 'none' or 'silu'"),
    "rank": ({"x": torch.zeros(C)}, r"x \(3,\) torch.float32, expected real \(\.\.\., L, C\)"),
    "integers": ({"x": torch.zeros(5, C).long()}, r"x \(5, 3\) torch.int64, expected real"),
    "complex": ({"x": torch.zeros(5, C).cfloat()}, r"torch.complex64, expected real"),
    "weight": ({"weight": torch.zeros(C, 4)}, r"weight \(3, 4\), expected \(3, 1, K\) for x"),
    "groups": ({"weight": torch.zeros(C, 2, 4)}, r"weight \(3, 2, 4\), expected \(3, 1, K\)"),
    "channels": ({"weight": torch.zeros(4, 1, 4)}, r"weight \(4, 1, 4\), expected \(3, 1, K\)"),
    "no taps": ({"weight": torch.zeros(C, 1, 0)}, r"weight \(3, 1, 0\), expected"),
    "bias": ({"bias": torch.zeros(2)}, r"bias \(2,\), expected \(3,\)"),
    "tail": ({"tail": torch.zeros(2, 4, C)}, r"tail \(2, 4, 3\), expected \(2, 3, 3\)"),
    "tail of one row": ({"tail": torch.zeros(3, C)}, r"tail \(3, 3\), expected \(2, 3, 3\)"),
    "reset": ({"reset": torch.zeros(2, 4).bool()}, r"reset \(2, 4\), expected \(2, 5\)"),
    "reset of a rank": ({"reset": torch.zeros(1, 2, 5).bool()}, r"reset \(1, 2, 5\), expected"),
    "reset of numbers": ({"reset": torch.zeros(2, 5)}, r"reset has dtype torch.float32"),
    "lengths": ({"lengths": torch.ones(3).long()}, r"lengths \(3,\), expected \(2,\)"),
    "lengths of floats": ({"lengths": torch.ones(2)}, r"lengths has dtype torch.float32"),
    "lengths of flags": ({"lengths": torch.ones(2).bool()}, r"lengths has dtype torch.bool"),
    "flags elsewhere": ({"reset": torch.zeros(5, device="meta").bool()}, "reset is on meta"),
    "device": ({"weight": torch.zeros(C, 1, 4, device="meta")}, r"weight is on meta and x on cpu"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(bad: str) -> None:
    change, message = BAD[bad]
    good = {k: v.float() for k, v in problem(5, 4, 2).items()}
    causal_conv1d(**good)
    with pytest.raises(ValueError, match="^causal_conv1d: .*" + message):
        causal_conv1d(**good | change)
