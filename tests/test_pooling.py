"""Pooling over time: by hand, against a loop over rows, and blind to padding of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from lrnnx_nn.pooling import (
    GROUP_POOLINGS,
    VALUE_POOLINGS,
    Grouped,
    grouped_lengths,
    pool,
    pool_groups,
)

F64 = torch.float64
STRIDE = 3
every_value = pytest.mark.parametrize("pooling", VALUE_POOLINGS)
every_group = pytest.mark.parametrize("pooling", GROUP_POOLINGS[1:])


def one(x: Tensor, gaps: Tensor, pooling: str) -> Tensor:
    """Reduce one row (n, H), n >= 1, as the definition says."""
    if pooling == "mean":
        return x.mean(0)
    if pooling == "max":
        return x.max(0).values
    if pooling == "time_weighted":
        return sum((g * v for g, v in zip(gaps, x, strict=True)), torch.zeros_like(x[0])) / sum(
            gaps
        )
    return x[-1]  # last, stride


def groups_of(x: Tensor, gaps: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    """Pool one row (n, H) in groups of STRIDE: the specification."""
    parts = [slice(k, k + STRIDE) for k in range(0, len(x), STRIDE)]
    ys = [one(x[p], gaps[p], pooling) for p in parts]
    times = [gaps[p].sum() for p in parts]
    return torch.stack(ys) if ys else x[:0], torch.stack(times) if times else gaps[:0]


def drawn(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=F64), 0.1 + torch.rand(*shape[:-1], dtype=F64)


def assert_row(got: Grouped, row: int, x: Tensor, gaps: Tensor, pooling: str) -> None:
    """Check one row of a batch against the specification, and that zeros follow."""
    y, time = groups_of(x, gaps, pooling)
    assert got.integration_timesteps is not None
    torch.testing.assert_close(got.y[row, : len(y)], y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.integration_timesteps[row, : len(y)], time)
    assert not got.y[row, len(y) :].any()
    assert not got.integration_timesteps[row, len(y) :].any()


@every_group
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 6, 8])
def test_groups_are_the_definition(pooling: str, length: int) -> None:
    x, gaps = drawn(2, length, 4)
    got = pool_groups(x, STRIDE, pooling, integration_timesteps=gaps)
    assert got.y.shape == (2, -(-length // STRIDE), 4)
    assert (got.lengths, got.mask, got.reset) == (None, None, None)
    for row in (0, 1):
        assert_row(got, row, x[row], gaps[row], pooling)


@every_group
@pytest.mark.parametrize("spoiled", [1e3, float("nan"), float("inf")])
def test_padding_on_the_right_changes_nothing(pooling: str, spoiled: float) -> None:
    lengths = torch.arange(9)  # 0, 1, stride - 1, stride, stride + 1, ...
    x, gaps = drawn(9, 8, 2)
    beyond = torch.arange(8) >= lengths[:, None]
    padded, time = x.clone(), gaps.clone()
    padded[beyond], time[beyond] = spoiled, spoiled
    got = pool_groups(padded, STRIDE, pooling, integration_timesteps=time, lengths=lengths)
    assert got.lengths is not None
    assert got.lengths.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert got.lengths.tolist() == grouped_lengths(lengths, STRIDE).tolist()
    for row in range(9):
        assert_row(got, row, x[row, :row], gaps[row, :row], pooling)
    by_mask = pool_groups(padded, STRIDE, pooling, integration_timesteps=time, mask=~beyond)
    assert by_mask.lengths is not None
    assert by_mask.mask is None
    assert torch.equal(by_mask.y, got.y)
    assert torch.equal(by_mask.lengths, got.lengths)


@every_group
def test_a_mask_is_as_if_padding_were_not_there(pooling: str) -> None:
    x, gaps = drawn(4, 7, 2)
    mask = torch.tensor(
        [
            [False, False, True, True, True, True, True],  # on the left
            [True, False, True, True, False, True, True],  # holes
            [False] * 7,
            [True] * 7,
        ]
    )
    got = pool_groups(
        x.masked_fill(~mask.unsqueeze(-1), float("nan")), STRIDE, pooling,
        integration_timesteps=gaps, mask=mask, lengths=torch.tensor([7, 6, 7, 7]),
    )  # fmt: skip
    mask[1, 6] = False
    assert got.lengths is not None
    assert got.lengths.tolist() == [2, 2, 0, 3]
    for row in range(4):
        assert_row(got, row, x[row, mask[row]], gaps[row, mask[row]], pooling)


@every_group
def test_a_group_never_mixes_documents(pooling: str) -> None:
    x, gaps = drawn(1, 11, 2)
    reset = torch.zeros(1, 11, dtype=torch.bool)
    reset[0, [0, 3, 7]] = True  # at the start of a group, and within one
    got = pool_groups(x, STRIDE, pooling, integration_timesteps=gaps, reset=reset)
    assert got.reset is not None
    assert got.integration_timesteps is not None
    assert got.reset.tolist() == [[True, True, True, False]]
    parts = [slice(0, 3), slice(3, 6), slice(7, 9), slice(9, 11)]  # sample 6 is lost
    for k, part in enumerate(parts):
        torch.testing.assert_close(got.y[0, k], one(x[0, part], gaps[0, part], pooling))
        torch.testing.assert_close(got.integration_timesteps[0, k], gaps[0, part].sum())
    hidden = pool_groups(x, STRIDE, pooling, reset=reset, mask=torch.arange(11)[None] != 7)
    assert hidden.reset is not None
    assert hidden.reset.tolist() == [[True, True, False, False]]  # padding starts nothing


def test_a_stride_of_one_keeps_everything_but_padding() -> None:
    x, gaps = drawn(2, 4, 3)
    mask = torch.tensor([[False, True, True, True], [True, True, False, True]])
    got = pool_groups(x, 1, "none", integration_timesteps=gaps, mask=mask)
    assert got.mask is mask
    assert got.integration_timesteps is gaps
    assert torch.equal(got.y[mask], x[mask])
    assert not got.y[~mask].any()
    valid = got.valid()
    assert valid is not None
    assert torch.equal(valid, mask)


@every_group
def test_no_gaps_stay_none_and_weigh_alike(pooling: str) -> None:
    x, _ = drawn(2, 7, 3)
    got = pool_groups(x, STRIDE, pooling)
    ones = pool_groups(x, STRIDE, pooling, integration_timesteps=torch.ones(7, dtype=F64))
    assert got.integration_timesteps is None
    torch.testing.assert_close(got.y, ones.y)
    assert ones.integration_timesteps is not None
    assert ones.integration_timesteps.tolist() == [3.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("stride", "pooling", "message"),
    [
        (0, "mean", "stride = 0, expected an integer >= 1"),
        (True, "mean", "stride = True, expected an integer"),
        (1.5, "mean", "stride = 1.5, expected an integer"),
        (2, "sum", "pooling = 'sum', expected one of"),
        (2, "none", "stride = 2 with pooling = 'none', expected stride = 1"),
    ],
)
def test_bad_groups_are_refused(stride: int, pooling: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"pool_groups: {message}"):
        pool_groups(torch.zeros(2, 4, 3), stride, pooling)


def test_bad_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x \(4,\) torch\.float32, expected"):
        pool_groups(torch.zeros(4), 2, "mean")
    with pytest.raises(ValueError, match=r"torch\.int64, expected"):
        pool_groups(torch.zeros(4, 2, dtype=torch.int64), 2, "mean")
    with pytest.raises(ValueError, match=r"mask \(5,\) does not fit"):
        pool_groups(torch.zeros(4, 2), 2, "mean", mask=torch.ones(5, dtype=torch.bool))


# ------------------------------------------------------------------------------------ to a value


@every_value
def test_a_value_is_the_definition(pooling: str) -> None:
    x, gaps = drawn(5, 6, 3)
    valid = torch.rand(5, 6) < 0.5
    valid[0], valid[1] = True, False
    spoiled = x.masked_fill(~valid.unsqueeze(-1), float("nan"))
    got = pool(spoiled, valid, pooling, gaps.masked_fill(~valid, float("nan")))
    for row in range(5):
        want = torch.zeros(3, dtype=F64)
        if valid[row].any():
            want = one(x[row, valid[row]], gaps[row, valid[row]], pooling)
        torch.testing.assert_close(got[row], want, rtol=1e-13, atol=1e-13)


def test_time_weighting_in_closed_form() -> None:
    x = torch.tensor([[[4.0], [8.0], [1.0]]], dtype=F64)
    gaps = torch.tensor([[3.0, 1.0, 0.0]], dtype=F64)
    assert pool(x, None, "time_weighted", gaps).tolist() == [[5.0]]
    for unit in (1e-9, 1e9):  # seconds or nanoseconds
        torch.testing.assert_close(
            pool(x, None, "time_weighted", gaps * unit), torch.full((1, 1), 5.0, dtype=F64)
        )
    mean = torch.full((1, 1), 13 / 3, dtype=F64)
    torch.testing.assert_close(pool(x, None, "time_weighted", 0 * gaps), mean)
    torch.testing.assert_close(pool(x, None, "time_weighted"), mean)


@every_value
def test_no_padding_is_a_mask_that_hides_nothing(pooling: str) -> None:
    x, gaps = drawn(2, 5, 3)
    every = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(pool(x, None, pooling, gaps), pool(x, every, pooling, gaps))
    assert pool(x[:, :0], None, pooling, gaps[:, :0]).tolist() == [[0.0] * 3] * 2
    assert pool(x[:, :0], every[:, :0], pooling, gaps[:, :0]).tolist() == [[0.0] * 3] * 2


def test_bad_values_are_refused() -> None:
    x = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="pool: pooling 'sum', expected one of"):
        pool(x, None, "sum")
    with pytest.raises(ValueError, match=r"pool: x \(4,\)"):
        pool(x[0, :, 0], None, "mean")
    with pytest.raises(ValueError, match=r"pool: mask \(2, 5\) does not fit"):
        pool(x, torch.ones(2, 5, dtype=torch.bool), "mean")
    with pytest.raises(ValueError, match=r"pool: integration_timesteps \(3,\) does not fit"):
        pool(x, None, "mean", torch.ones(3))


@every_value
def test_gradients_stop_at_padding(pooling: str) -> None:
    x, gaps = drawn(3, 5, 2)
    lengths = torch.tensor([5, 2, 0])
    valid = torch.arange(5) < lengths[:, None]

    def loss(x: Tensor, gaps: Tensor) -> Tensor:
        return pool(x, valid, pooling, gaps).square().sum()

    dx, dgaps = grad(loss, (0, 1))(x.masked_fill(~valid.unsqueeze(-1), float("nan")), gaps)
    assert not dx[~valid].any()
    assert bool(dx[0].any())
    assert dgaps.isfinite().all()
    assert not dgaps[~valid].any()
    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), gaps.requires_grad_()))


@every_group
def test_groups_under_vmap_and_in_half_precision(pooling: str) -> None:
    x, gaps = drawn(3, 7, 2)
    lengths = torch.tensor([7, 4, 0])

    def run(x: Tensor, gaps: Tensor, n: Tensor) -> Tensor:
        return pool_groups(x, STRIDE, pooling, integration_timesteps=gaps, lengths=n).y

    torch.testing.assert_close(vmap(run)(x, gaps, lengths), run(x, gaps, lengths))
    half = run(x.bfloat16(), gaps, lengths)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), run(x, gaps, lengths), rtol=0.02, atol=0.02)
