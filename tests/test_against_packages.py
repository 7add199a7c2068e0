"""Agreement with independent implementations from PyPI, given the same weights.

s5-pytorch stores all of P (no conjugate halves, no factor 2) and computes in complex64; lru-pytorch
has a dense D and loops in Python; attenuate has Centaurus' pointwise variant in float32. They are
development dependencies, read by tests alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from model_cases import error, normal
from torch import Tensor

from lrnnx_core import centaurus, lru, s5

NEAR = 5e-6  # their arithmetic is complex64; ours here is float64
H, P, L = 4, 8, 24


@pytest.fixture(scope="module")
def s5_package() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script at import
        return pytest.importorskip("s5")


@pytest.fixture(scope="module")
def lru_package() -> Any:
    return pytest.importorskip("LRU_pytorch")


def theirs_and_ours(package: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return one of their layers and our parameters with its weights, in float64."""
    with contextlib.redirect_stdout(io.StringIO()):
        layer = package.S5(H, P, **options)
    seq = layer.seq
    with torch.no_grad():
        seq.Lambda.add_(0.1 * torch.randn(P, dtype=torch.complex64))
    B, C, Lambda = torch.view_as_complex(seq.B.detach()), seq.C.detach(), seq.Lambda.detach()
    params = {
        "Lambda_re": Lambda.real, "Lambda_im": Lambda.imag,
        "log_dt": seq.log_step.detach().reshape(-1),
        "B_re": B.real, "B_im": B.imag, "C_re": C[:, :P].real, "C_im": C[:, :P].imag,
        "D": seq.D.detach(),
    }  # fmt: skip
    if options.get("bidir"):
        params |= {"C2_re": C[:, P:].real, "C2_im": C[:, P:].imag}
    return layer, {k: v.double().clone() for k, v in params.items()}


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_s5_agrees_with_s5_pytorch(s5_package: Any, blocks: int, discretization: Any) -> None:
    layer, params = theirs_and_ours(s5_package, block_count=blocks)
    if discretization == "bilinear":
        layer.seq.discretize = s5_package.s5_model.discretize_bilinear
    u = normal(3, L, H)
    with torch.no_grad():
        want, states = layer(u.float(), return_state=True)
    for mode in ("conv", "scan", "recurrent"):
        y, last = s5.scan(params, u, conj_sym=False, discretization=discretization, mode=mode)
        assert error(y, want.double()) < NEAR, mode
        assert error(last, states.to(torch.complex128)) < NEAR, mode


def test_s5_goes_on_from_a_state_as_s5_pytorch_does(s5_package: Any) -> None:
    layer, params = theirs_and_ours(s5_package)
    u = normal(2, L, H)
    state = torch.view_as_complex(normal(2, P, 2, seed=5))
    with torch.no_grad():
        want, states = layer(u.float(), state=state.to(torch.complex64), return_state=True)
    y, last = s5.scan(params, u, state, conj_sym=False)
    assert error(y, want.double()) < NEAR
    assert error(last, states.to(torch.complex128)) < NEAR


def test_s5_steps_as_s5_pytorch_does(s5_package: Any) -> None:
    layer, params = theirs_and_ours(s5_package)
    u, state = normal(L, H), torch.zeros(P, dtype=torch.complex128)
    theirs = torch.zeros(P, dtype=torch.complex64)
    for t in range(L):
        with torch.no_grad():
            want, theirs = layer.seq.forward_rnn(u[t].float(), theirs)
        y, state = s5.step(params, u[t], state, conj_sym=False)
        assert error(y, want.double()) < 10 * NEAR
    assert error(state, theirs.to(torch.complex128)) < NEAR


def test_s5_scales_its_step_as_s5_pytorch_does(s5_package: Any) -> None:
    layer, params = theirs_and_ours(s5_package)
    u = normal(2, L, H)
    with torch.no_grad():
        want = layer(u.float(), step_scale=2.0)
    y, _ = s5.scan(params, u, conj_sym=False, dt_scale=2.0)
    assert error(y, want.double()) < NEAR


def test_s5_takes_irregular_steps_as_s5_pytorch_does(s5_package: Any) -> None:
    layer, params = theirs_and_ours(s5_package)
    u = normal(2, L, H)
    elapsed = 0.2 + 2 * torch.rand(2, L, dtype=torch.float64)
    with torch.no_grad():
        want, states = layer(u.float(), step_scale=elapsed.float(), return_state=True)
    y, last = s5.scan(params, u, conj_sym=False, integration_timesteps=elapsed)
    assert error(y, want.double()) < NEAR
    assert error(last, states.to(torch.complex128)) < NEAR


def test_s5_runs_both_ways_as_s5_pytorch_does(s5_package: Any) -> None:
    layer, params = theirs_and_ours(s5_package, bidir=True)
    u = normal(2, L, H)
    with torch.no_grad():
        want = layer(u.float())
    y, _ = s5.scan(params, u, conj_sym=False, bidirectional=True)
    assert error(y, want.double()) < NEAR


def test_s5_starts_with_the_eigenvalues_of_s5_pytorch(s5_package: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        layer = s5_package.S5(H, P)
    ours = s5.init(H, P, conj_sym=False, dtype=torch.float64)
    want = layer.seq.Lambda.detach().to(torch.complex128)
    got = torch.complex(ours["Lambda_re"], ours["Lambda_im"])
    order = lambda x: x[x.imag.argsort()]  # noqa: E731
    assert error(order(got), order(want)) < 1e-6


# --------------------------------------------------------------------------------------------- LRU


def lru_pair(package: Any) -> tuple[Any, dict[str, Tensor]]:
    ours = lru.init(H, P, r_min=0.3, r_max=0.95)
    layer = package.LRU(H, H, P)
    with torch.no_grad():
        for key in ("nu_log", "theta_log", "gamma_log"):
            getattr(layer, key).copy_(ours[key])
        layer.B.copy_(torch.complex(ours["B_re"], ours["B_im"]))
        layer.C.copy_(torch.complex(ours["C_re"], ours["C_im"]))
        layer.D.copy_(torch.diag_embed(ours["D"]))
    return layer, {k: v.double() for k, v in ours.items()}


@pytest.mark.parametrize("mode", ["conv", "scan", "recurrent"])
def test_lru_agrees_with_lru_pytorch(lru_package: Any, mode: Any) -> None:
    layer, params = lru_pair(lru_package)
    u = normal(2, L, H)
    with torch.no_grad():
        want = layer(u.float())
    y, _ = lru.scan(params, u, mode=mode)
    assert error(y, want.double()) < NEAR


def test_lru_starts_on_the_ring_of_lru_pytorch(lru_package: Any) -> None:
    """Their formulas on our draws give our parameters."""
    torch.manual_seed(0)
    ours = lru.init(H, 512, r_min=0.3, r_max=0.95, max_phase=3.0)
    torch.manual_seed(0)
    u1, u2 = torch.rand(512), torch.rand(512)
    real = torch.rand
    draws = iter([u1, u2])
    try:
        torch.rand = lambda *_, **__: next(draws)
        layer = lru_package.LRU(H, H, 512, rmin=0.3, rmax=0.95, max_phase=3.0)
    finally:
        torch.rand = real
    for key in ("nu_log", "theta_log", "gamma_log"):
        assert error(ours[key], getattr(layer, key).detach().double()) < 1e-5, key


def test_gradients_agree_with_lru_pytorch(lru_package: Any) -> None:
    layer, params = lru_pair(lru_package)
    u = normal(2, 12, H)
    layer(u.float()).square().sum().backward()
    params = {k: v.requires_grad_() for k, v in params.items()}
    lru.scan(params, u)[0].square().sum().backward()
    for key in ("nu_log", "theta_log", "gamma_log"):
        assert error(params[key].grad, getattr(layer, key).grad.double()) < 1e-5, key
    for key in ("B", "C"):
        want = getattr(layer, key).grad
        got = torch.complex(params[f"{key}_re"].grad, params[f"{key}_im"].grad)
        assert error(got, want.to(torch.complex128)) < 1e-5, key
    assert error(params["D"].grad, layer.D.grad.diagonal().double()) < 1e-5


# --------------------------------------------------------------------------------- Centaurus


@pytest.fixture(scope="module")
def attenuate_package() -> Any:
    """Return attenuate (aTENNuate, Apache-2.0); its audio libraries are empty stand-ins.

    ``make setup`` installs it without its dependencies.
    """
    stand_ins = {name: ModuleType(name) for name in ("librosa", "torchaudio")}
    missing = {k: v for k, v in stand_ins.items() if importlib.util.find_spec(k) is None}
    strategy = torch.backends.opt_einsum.strategy
    sys.modules.update(missing)
    try:
        yield pytest.importorskip("attenuate.model")
    finally:
        for name in missing:
            del sys.modules[name]
        torch.backends.opt_einsum.strategy = strategy  # which its layers set


# Their rule takes another order of contraction for each of these: batch, inputs, outputs, blocks.
BRANCHES = {
    "full kernel": (6, 2, 3, 4),
    "project first": (1, 20, 5, 3),
    "frequency domain, wide": (2, 5, 7, 4),
    "frequency domain, narrow": (12, 4, 5, 3),
}
COEFFICIENTS = 4


@pytest.mark.parametrize("branch", BRANCHES)
def test_centaurus_pointwise_agrees_with_attenuate(
    attenuate_package: Any, branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, d_in, d_out, blocks = BRANCHES[branch]
    torch.manual_seed(0)
    layer = attenuate_package.SSMLayer(COEFFICIENTS, d_in, d_out, blocks)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    A = layer.A.detach().unflatten(0, (blocks, COEFFICIENTS)).double()
    params = {
        "A_raw": A[..., 0], "A_im": A[..., 1],
        "log_dt": layer.log_dt.detach().reshape(blocks, COEFFICIENTS).double(),
        "B": layer.B.detach().double(), "C": layer.C.detach().double(),
    }  # fmt: skip
    fresh = centaurus.init(
        d_in, blocks, variant="pointwise", sub_state_dim=COEFFICIENTS, d_out=d_out, tied_dt=False
    )
    assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in params.items()}
    convolved = []
    theirs = attenuate_package.fft_conv
    monkeypatch.setattr(
        attenuate_package, "fft_conv", lambda e, *x: convolved.append(e) or theirs(e, *x)
    )
    u = normal(batch, 40, d_in)
    with torch.no_grad():
        want = layer(u.mT.float()).mT
    assert convolved == [
        {"full kernel": "bcl,dcl->bdl", "project first": "bnl,nl->bnl"}.get(
            branch, "bcl,nl,nc,dn->bdl"
        )
    ]
    for mode in ("conv", "scan", "recurrent"):
        y, _ = centaurus.scan(params, u, variant="pointwise", mode=mode)
        assert error(y, want.double()) < NEAR, mode


def test_centaurus_pointwise_starts_as_attenuate(attenuate_package: Any) -> None:
    layer = attenuate_package.SSMLayer(COEFFICIENTS, 5, 200, 6)
    ours = centaurus.init(
        5, 6, variant="pointwise", sub_state_dim=COEFFICIENTS, d_out=200, tied_dt=False
    )
    assert error(ours["A_raw"].flatten(), layer.A.detach()[:, 0].double()) < 1e-6
    assert error(ours["A_im"].flatten(), layer.A.detach()[:, 1].double()) < 1e-6
    assert error(ours["log_dt"].flatten(), layer.log_dt.detach().double()) < 1e-6
    assert error(ours["B"], layer.B.detach().double()) < 1e-6
    assert float(ours["C"].std() / layer.C.detach().std()) == pytest.approx(1, rel=0.05)
