"""Groups of samples to one sample and back, against loops; streams in pieces of any length."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lrnnx_nn import Downsample, Upsample
from lrnnx_nn.pieces import Waiting

C, D, R = 3, 5, 4
LENGTHS = (0, 1, R - 1, R, R + 1, 3 * R + 2)


def down() -> Downsample:
    return Downsample(C, D, R).double()


def up() -> Upsample:
    return Upsample(D, C, R).double()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("length", LENGTHS)
def test_downsampling_is_its_loop(length: int) -> None:
    layer, x = down(), noise(2, length, C)
    weight = layer.projection.weight.unflatten(1, (R, C))
    want = torch.zeros(2, -(-length // R), D, dtype=torch.float64)
    for t in range(length):
        want[:, t // R] += x[:, t] @ weight[:, t % R].mT
    y, lengths, gaps = layer(x)
    assert lengths is gaps is None
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("length", LENGTHS)
def test_upsampling_is_its_loop(length: int) -> None:
    layer, x = up(), noise(2, -(-length // R), D)
    weight = layer.projection.weight.unflatten(0, (R, C))
    want = [x[:, t // R] @ weight[t % R].mT for t in range(length)]
    y = layer(x, length=length)
    assert y.shape == (2, length, C)
    torch.testing.assert_close(y, torch.stack([*want, x.new_zeros(2, C)], -2)[:, :length])
    assert layer(x).shape == (2, R * x.shape[1], C)


def test_white_noise_keeps_its_variance() -> None:
    with torch.no_grad():
        low = Downsample(32, 48, 4)(torch.randn(1, 4096, 32)).x
        high = Upsample(48, 32, 4)(torch.randn(1, 1024, 48))
    assert float(low.var()) == pytest.approx(1.0, rel=0.1)
    assert float(high.var()) == pytest.approx(1.0, rel=0.1)


def test_rows_of_a_padded_batch_are_what_they_are_alone() -> None:
    layer, x, gaps = down(), noise(len(LENGTHS), LENGTHS[-1], C), noise(6, LENGTHS[-1]).exp()
    lengths = torch.tensor(LENGTHS)
    beyond = torch.arange(LENGTHS[-1]) >= lengths[:, None]
    x[beyond], filled = float("nan"), gaps.masked_fill(beyond, 7.0)
    y, groups, coarse = layer(x, lengths=lengths, integration_timesteps=filled)
    assert coarse is not None
    assert groups is not None
    assert groups.tolist() == [-(-n // R) for n in LENGTHS]
    for i, n in enumerate(LENGTHS):
        alone = layer(x[i, :n], integration_timesteps=gaps[i, :n])
        m = alone.x.shape[-2]
        torch.testing.assert_close(y[i, :m], alone.x)
        torch.testing.assert_close(coarse[i, :m], alone.integration_timesteps)
        assert bool((y[i, m:] == 0).all())
    z = up()(y, length=LENGTHS[-1], lengths=lengths)
    assert bool((z[beyond] == 0).all())
    assert bool((z[~beyond] != 0).all())


def test_gaps_of_a_group_are_averaged_and_ones_stay_ones() -> None:
    gaps = noise(2, 2 * R).exp()
    coarse = down()(noise(2, 2 * R, C), integration_timesteps=gaps).integration_timesteps
    torch.testing.assert_close(coarse, gaps.unflatten(1, (2, R)).mean(-1))
    coarse = down()(noise(2, R + 1, C), integration_timesteps=torch.ones(R + 1))
    assert coarse.integration_timesteps is not None
    assert bool((coarse.integration_timesteps == 1).all())


@pytest.mark.parametrize("timed", [False, True])
def test_a_stream_in_pieces_is_the_whole(timed: bool) -> None:
    layer, length = down(), 3 * R + 2
    x, gaps = noise(2, length, C), noise(2, length).exp() if timed else None
    whole = layer(x, integration_timesteps=gaps)
    for cuts in ([1, 1, 2, 5], [R, 2 * R], [0, 3, 13], []):
        edges = [0, *cuts, length]
        state, ys, times = layer.init_state((2,)), [], []
        for a, b in itertools.pairwise(edges):
            kept = state.x.clone()
            piece, after = layer.prefill(
                x[:, a:b], state, integration_timesteps=None if gaps is None else gaps[:, a:b]
            )
            assert torch.equal(state.x, kept)
            assert piece.x.shape[1] == b // R - a // R  # as soon as a group is full
            ys.append(piece.x)
            times.append(piece.integration_timesteps)
            state = after
        rest = layer.finish(state)
        torch.testing.assert_close(torch.cat([*ys, rest.x], 1), whole.x)
        if timed:
            torch.testing.assert_close(
                torch.cat([t for t in (*times, rest.integration_timesteps) if t is not None], 1),
                whole.integration_timesteps,
            )


def test_a_state_does_not_keep_the_piece_in_memory() -> None:
    _, state = down().prefill(noise(2, 1001, C))
    assert state.x.untyped_storage().nbytes() == 2 * 1 * C * 8


def test_gradients_reach_input_and_weight() -> None:
    layer, back, x = down(), up(), noise(2, R + 1, C).requires_grad_()

    def both(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        y = torch.func.functional_call(layer, {"projection.weight": w}, x).x
        return torch.func.functional_call(
            back, {"projection.weight": v}, (y,), {"length": x.shape[-2]}
        )

    assert torch.autograd.gradcheck(both, (x, layer.projection.weight, back.projection.weight))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Downsample(C, D, 0), "factor = 0, expected an integer >= 1"),
        (lambda: Upsample(0, D, 2), "d_input = 0"),
        (lambda: down()(noise(2, 8, D)), "expected (..., L, 3)"),
        (lambda: up()(noise(2, 8, C)), "expected (..., n, 5)"),
        (lambda: up()(noise(2, 2, D), length=9), "length = 9, expected 0 ... 8"),
        (lambda: down()(noise(2, 8, C), lengths=torch.tensor([9, 1])), "expected 0 ... 8"),
        (lambda: down()(noise(2, 8, C), integration_timesteps=-torch.ones(8)), "values >= 0"),
        (lambda: down().prefill(noise(2, 1, C), down().init_state((3,))), "the same batch"),
        (
            lambda: down().prefill(
                noise(1, C), Waiting(noise(1, C), noise(0)), integration_timesteps=torch.ones(1)
            ),
            "expected in all or in none",
        ),
    ],
)
def test_bad_input_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)
