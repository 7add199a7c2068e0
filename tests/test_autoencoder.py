"""Autoencoders along time: latent sequences and their lengths, and the way back, streamed too."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lrnnx_nn import LAYERS, Autoencoder, AutoencoderConfig
from lrnnx_nn.architectures import checkpoint

MIXERS = (*LAYERS, "attn")
SMALL: dict[str, Any] = {
    "d_input": 2, "channels": (6, 4), "factors": (3, 2), "d_state": 4, "d_stem": 4, "d_latent": 3,
    "n_output": 1,
}  # fmt: skip
FRAME = 6
LENGTHS = (0, 1, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME - 1)


def autoencoder(**changes: Any) -> Autoencoder:
    """Return a small network in float64 whose every parameter has been moved."""
    model = Autoencoder(AutoencoderConfig(**{**SMALL, **changes})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(a: Tensor, b: Tensor, rtol: float = 1e-9) -> None:
    """Compare at the scale of b."""
    scale = float(b.detach().abs().max()) if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("name", MIXERS)
def test_rows_of_a_padded_batch_are_what_they_are_alone(name: str) -> None:
    model, longest = autoencoder(layer=name), LENGTHS[-1]
    u, lengths = noise(len(LENGTHS), longest, 2), torch.tensor(LENGTHS)
    u[torch.arange(longest) >= lengths[:, None]] = float("nan")
    with torch.no_grad():
        z, frames = model.encode(u, lengths=lengths)
        assert z.shape == (len(LENGTHS), 3, 3)
        assert frames is not None
        assert frames.tolist() == [-(-n // FRAME) for n in LENGTHS]
        spoilt = z.clone()
        spoilt[torch.arange(3) >= frames[:, None]] = float("nan")
        y = model.decode(spoilt, length=longest, lengths=lengths)
        close(model(u, lengths=lengths), y)
        for i, n in enumerate(LENGTHS):
            alone = model.encode(u[i, :n])
            m = -(-n // FRAME)
            assert alone.lengths is None
            close(z[i, :m], alone.z)
            assert bool((z[i, m:] == 0).all())
            close(y[i, :n], model.decode(alone.z, length=n))
            close(y[i, :n], model(u[i, :n]))
            assert bool((y[i, n:] == 0).all())


CENTRED = [(name, False) for name in MIXERS]
CAUSAL = [(name, True) for name in ("centaurus", "mamba2", "attn")]


@pytest.mark.parametrize(("name", "causal"), CENTRED + CAUSAL)
def test_pieces_of_a_stream_are_one_forward(name: str, causal: bool) -> None:
    model, length = autoencoder(layer=name, causal=causal), 5 * FRAME + 2
    u, state, ys = noise(2, length, 2), None, []
    cuts = sorted(torch.randint(0, length + 1, (3,)).tolist())
    latest = [model.config.last_input(t) for t in range(length)]
    with torch.no_grad():
        for a, b in itertools.pairwise([0, *cuts, length]):
            y, state = model.prefill(u[:, a:b], state)
            ys.append(y)
            # as soon as the last input it needs is there
            assert sum(y.shape[1] for y in ys) == sum(need < b for need in latest)
        assert state is not None
        close(torch.cat([*ys, model.finish(state)], 1), model(u))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("timed", [True, False])
def test_the_halves_stream_apart(causal: bool, timed: bool) -> None:
    model, length = autoencoder(layer="s5", causal=causal), 4 * FRAME + 5
    u = noise(2, length, 2)
    gaps = 0.2 + torch.rand(2, length, dtype=torch.float64) if timed else None
    filled = None if gaps is None else F.pad(gaps, (0, -length % FRAME), value=1.0)
    with torch.no_grad():
        whole = model(u, integration_timesteps=gaps)
        latent = model.encode(u, integration_timesteps=gaps).z
        sent, state = [], None
        for a, b in itertools.pairwise([0, 4, 5, 19, length]):
            own = None if gaps is None else gaps[:, a:b]
            z, state = model.encoder.prefill(u[:, a:b], state, integration_timesteps=own)
            sent.append(z)
        assert state is not None
        close(torch.cat([*sent, model.encoder.finish(state)], 1), latent)
        ys, decoding, begun = [], model.decoder.init_state((2,)), 0
        for z in latent.split([1, 0, 3, 1], 1):
            n = z.shape[1] * FRAME
            own = None if filled is None else filled[:, begun : begun + n]
            y, decoding = model.decoder.prefill(z, decoding, integration_timesteps=own)
            ys.append(y)
            begun += n
        ys.append(model.decoder.finish(decoding))
        close(torch.cat(ys, 1)[:, :length], whole)


@pytest.mark.parametrize("causal", [True, False])
def test_gaps(causal: bool) -> None:
    model, length = autoencoder(layer="s5", causal=causal), 3 * FRAME + 2
    u, gaps = noise(2, length, 2), 0.2 + torch.rand(2, length, dtype=torch.float64)
    with torch.no_grad():
        plain, y = model(u), model(u, integration_timesteps=gaps)
        close(model(u, integration_timesteps=torch.ones(length)), plain)
        assert float((y - plain).abs().max()) > 1e-3 * float(plain.abs().max())
        for cuts in ([5, 6, 13], [1, 2, 3, 12], [18]):
            ys, state = [], model.init_state((2,))
            for a, b in itertools.pairwise([0, *cuts, length]):
                piece, state = model.prefill(u[:, a:b], state, integration_timesteps=gaps[:, a:b])
                ys.append(piece)
            close(torch.cat([*ys, model.finish(state)], 1), y)
        _, state = model.prefill(u[:, :2], integration_timesteps=gaps[:, :2])
        with pytest.raises(ValueError, match="expected in all or in none"):
            model.prefill(u[:, 2:], state)


def test_the_latent_sequence_is_all_that_the_decoder_knows() -> None:
    model, u = autoencoder(causal=True), noise(2, 3 * FRAME, 2).requires_grad_()
    z = model.encode(u).z
    y = model.decode(z.detach())
    assert y.shape == u.shape
    assert torch.autograd.grad(y.sum(), u, allow_unused=True)[0] is None
    close(y, model(u))
    late = z.detach().clone()
    late[:, 2:] += 1
    change = (model.decode(late) - y).abs().amax((0, 2))
    assert bool((change[: 2 * FRAME] == 0).all())
    assert bool((change[2 * FRAME :] > 0).all())
    assert model.config.compression == 2 * FRAME / 3


def test_every_parameter_gets_a_gradient() -> None:
    model = autoencoder()
    u = noise(2, 2 * FRAME + 1, 2).requires_grad_()
    model(u, lengths=torch.tensor([2 * FRAME + 1, 4])).square().sum().backward()
    assert u.grad is not None
    assert bool((u.grad[1, 4:] == 0).all())
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert bool((p.grad != 0).any()), key


def test_it_learns_to_reconstruct() -> None:
    config = AutoencoderConfig(
        channels=(8, 8), factors=(2, 2), d_latent=2, d_stem=8, n_output=1, layer="s5", d_state=8,
        residual=True,
    )  # fmt: skip
    model = Autoencoder(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = torch.arange(32) / 8

    def waves(rows: int) -> Tensor:
        return torch.sin(t + 6.3 * torch.rand(rows, 1)).unsqueeze(-1)

    for _ in range(40):
        u = waves(4)
        loss = (model(u) - u).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    u = waves(64)
    with torch.no_grad():
        assert float((model(u) - u).square().mean() / u.square().mean()) < 0.1


def test_levels_options_and_both_ways() -> None:
    layers = ["s5", {"layer": "mamba", "d_state": 3}, {"layer": "lru", "bidirectional": True}]
    model = autoencoder(layers=layers, n_neck=2, n_layer=2, residual=True, norm="batch")
    u, lengths = noise(2, 2 * FRAME, 2), torch.tensor([12, 7])
    close(model(u, lengths=lengths)[1, :7], model(u[1, :7]))
    assert model.lookahead is None
    assert [len(list(half.neck)) for half in (model.encoder, model.decoder)] == [2, 2]
    state = autoencoder(layer="s5").init_state((2,))
    for call in (
        lambda: model.init_state((2,)),
        lambda: model.prefill(u),
        lambda: model.finish(state),
        lambda: model.encoder.prefill(u),
        lambda: model.encoder.finish(state.encoder),
        lambda: model.decoder.prefill(noise(2, 1, 3)),
        lambda: model.decoder.finish(state.decoder),
    ):
        with pytest.raises(ValueError, match="a bidirectional layer cannot stream"):
            call()


def test_save_load_and_json(tmp_path: Path) -> None:
    model = autoencoder(layers=["s5", "mamba", "attn"]).float()
    values = json.loads(json.dumps(model.config.to_dict()))
    assert AutoencoderConfig.from_dict(values) == model.config
    model.save(tmp_path)
    again, u = Autoencoder.load(tmp_path), torch.randn(2, 9, 2)
    assert torch.equal(again(u), model(u))
    assert checkpoint.load_architecture(tmp_path) == "autoencoder"
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model.reset_parameters()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_bfloat16() -> None:
    model, u = Autoencoder(AutoencoderConfig(**SMALL)).eval(), torch.randn(2, 2 * FRAME + 1, 2)
    want = model(u)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(u)
        first, state = model.prefill(u[:, :8])
        pieces = torch.cat([first, model.prefill(u[:, 8:], state)[0]], 1)
    close(y.float(), want, 5e-2)
    close(pieces.float(), want[:, : pieces.shape[1]], 5e-2)


def test_bad_input_is_refused() -> None:
    model = autoencoder(causal=True)
    bad: list[tuple[Any, str]] = [
        (lambda: autoencoder(d_latent=0), "d_latent = 0, expected an integer >= 1"),
        (lambda: autoencoder(factors=(2,)), "2 channels and 1 factors"),
        (lambda: autoencoder(layer_options={"bidirectional": True}, causal=True), "bidirectional"),
        (lambda: AutoencoderConfig.from_dict({"d_output": 3}), "unknown key 'd_output'"),
        (lambda: model(noise(2, 6, 3)), r"expected real \(..., L, 2\)"),
        (lambda: model.decode(noise(2, 2, 4)), r"expected real \(..., L, 3\)"),
        (lambda: model.decode(noise(2, 2, 3), length=13), "length = 13 of 2 latent vectors"),
        (lambda: model.decode(noise(2, 2, 3), lengths=torch.tensor([13, 1])), "expected 0 ... 12"),
        (
            lambda: model.decoder.prefill(noise(2, 3), integration_timesteps=torch.ones(6)),
            r"integration_timesteps \(6,\) does not fit",
        ),
        (lambda: model.prefill(noise(2, 6, 2), model.init_state((3,))), "the same batch"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
