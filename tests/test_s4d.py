"""What only S4D has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_cases import assert_agree, normal

from lrnnx_core import s4d
from lrnnx_nn import S4D


@pytest.mark.parametrize("options", [{}, {"n_ssm": 1, "channels": 2}, {"tied_dt": False}])
def test_a_band_limit_leaves_out_the_states_that_alias(options: dict[str, Any]) -> None:
    params = s4d.init(4, 16, dt_min=0.05, dt_max=0.5, dtype=torch.float64, **options)
    dt = params["log_dt"].exp()
    dt = dt[:, None] if dt.ndim == 1 else dt
    cycles = dt * params["A_im"].expand(4, -1) / (2 * math.pi)
    inside = cycles < 0.3
    assert 0 < int(inside.sum()) < inside.numel()
    by_hand = params | {k: torch.where(inside, params[k], 0) for k in ("C_re", "C_im")}
    u, state = normal(2, 30, 4), torch.complex(normal(2, 4, 8), normal(2, 4, 8, seed=5))
    for scale in (1.0, 2.0):  # the band is that of the rate trained at
        call = {"dt_scale": scale}
        want = s4d.scan(by_hand, u, state, mode="recurrent", **call)
        for mode in ("conv", "scan", "recurrent"):
            got = s4d.scan(params, u, state, bandlimit=0.6, mode=mode, **call)
            assert_agree(got, want, 1e-12, mode)
        K = s4d.kernel(by_hand, 9, **call)
        assert_agree(s4d.kernel(params, 9, bandlimit=0.6, **call), K, 1e-12)
        one = s4d.step(params, u[:, 0], state, bandlimit=0.6, **call)
        assert_agree(one, s4d.step(by_hand, u[:, 0], state, **call), 1e-12)
        omega = torch.linspace(0, 3, 5, dtype=torch.float64)
        assert_agree(
            s4d.frequency_response(params, omega, bandlimit=0.6, **call),
            s4d.frequency_response(by_hand, omega, **call),
            1e-12,
        )


def test_a_layer_keeps_its_band_limit() -> None:
    layer = S4D(4, 16, bandlimit=0.2, dt_max=0.5)
    u = normal(2, 30, 4, dtype=torch.float32)
    y = layer(u)
    assert_agree(y, s4d.scan(layer.params, u, bandlimit=0.2)[0], 1e-6)
    assert not torch.allclose(y, s4d.scan(layer.params, u)[0], atol=1e-3)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_band_has_a_width(bad: float) -> None:
    with pytest.raises(ValueError, match=r"bandlimit = .*, expected a number > 0"):
        s4d.kernel(s4d.init(2, 4), 5, bandlimit=bad)


def test_real_models_have_no_band() -> None:
    with pytest.raises(ValueError, match=r"s4d.kernel: bandlimit is for complex models"):
        s4d.kernel(s4d.init(2, 4, A_init="real", is_real=True), 5, bandlimit=1.0)
