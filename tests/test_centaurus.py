"""What Centaurus' papers alone say: connectivities, initial values, and what is never built."""

from __future__ import annotations

import math
from typing import Any

import dense_models
import pytest
import torch
from model_cases import assert_agree, error, normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrnnx_core import centaurus
from lrnnx_core.ops import causal_convolution, linear_scan
from lrnnx_nn import Block, Centaurus, param_groups

H, OUT, SIZE = 3, 5, 4
EXACT = 1e-12
VARIANTS = ("neck", "pointwise", "dws", "full")
MODES = ("conv", "scan", "recurrent", "auto")
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def init(variant: Any, **options: Any) -> dict[str, Tensor]:
    """Draw parameters and move each a little."""
    generator = torch.Generator().manual_seed(0)
    if variant in ("neck", "pointwise"):
        options.setdefault("sub_state_dim", 2)
    options.setdefault("d_out", OUT)
    params = centaurus.init(
        H, SIZE, variant=variant, generator=generator, dtype=torch.float64, **options
    )
    return {
        k: v + 0.2 * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        for k, v in params.items()
    }


# ---------------------------------------------------------------------------------- initial values

SHAPES = {
    "neck": {
        "A_raw": (4, 2),
        "A_im": (4, 2),
        "log_dt": (4,),
        "B": (4, 3),
        "C": (5, 4),
        "E": (4, 2),
    },
    "pointwise": {"A_raw": (4, 2), "A_im": (4, 2), "log_dt": (4,), "B": (8, 3), "C": (5, 8)},
    "dws": {"A_raw": (3, 4), "A_im": (3, 4), "log_dt": (3,), "E": (3, 4), "W": (5, 3)},
    "full": {"A_raw": (5, 3, 4), "A_im": (5, 3, 4), "log_dt": (5,), "E": (5, 3, 4)},
}
SECOND = {"neck": "C", "pointwise": "C", "dws": "E", "full": "E"}


@every_variant
def test_shapes_of_parameters_states_and_kernels(variant: Any) -> None:
    for tied in (True, False):
        for both in (True, False):
            want = dict(SHAPES[variant])
            if not tied:
                want["log_dt"] = (*want["log_dt"], want["A_raw"][-1])
            if both:
                want[SECOND[variant] + "2"] = want[SECOND[variant]]
            params = init(variant, tied_dt=tied, bidirectional=both)
            assert {k: tuple(v.shape) for k, v in params.items()} == want
    state = centaurus.init_state(params, (7,))
    assert state.shape == (7, *SHAPES[variant]["A_raw"])
    assert state.dtype == torch.complex128
    assert centaurus.kernel(params, 6, variant=variant).shape == (6, OUT, H)
    assert (
        centaurus.init(H, SIZE, variant=variant)[
            {"neck": "C", "pointwise": "C", "dws": "W", "full": "E"}[variant]
        ].shape[0]
        == H
    )  # d_out is d_model if none is given


def test_the_number_of_sub_states() -> None:
    for variant in ("neck", "pointwise"):
        assert centaurus.init(H, 6, variant=variant)["A_raw"].shape == (6, 8)
        assert centaurus.init(H, 6, variant=variant, sub_state_dim=3)["A_raw"].shape == (6, 3)
        with pytest.raises(ValueError, match="sub_state_dim = 0, expected an integer >= 1"):
            centaurus.init(H, 6, variant=variant, sub_state_dim=0)
    for variant in ("dws", "full"):
        assert centaurus.init(H, 6, variant=variant, sub_state_dim=6)["A_raw"].shape[-1] == 6
        with pytest.raises(
            ValueError, match=f"sub_state_dim = 8 with variant '{variant}', where d_state = 6"
        ):
            centaurus.init(H, 6, variant=variant, sub_state_dim=8)
    with pytest.raises(ValueError, match=r"variant = 'wide', expected one of \('neck', "):
        centaurus.init(H, 6, variant="wide")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="d_out = 0, expected an integer >= 1"):
        centaurus.init(H, 6, d_out=0)


@every_variant
def test_initial_values_are_the_published_ones(variant: Any) -> None:
    p = centaurus.init(64, 200, variant=variant, d_out=100, dtype=torch.float64, dt_min=1e-2)
    size = p["A_raw"].shape[-1]
    decay = torch.nn.functional.softplus(p["A_raw"])
    torch.testing.assert_close(decay, torch.full_like(decay, 0.5))
    assert torch.equal(p["A_im"], (math.pi * torch.arange(size).double()).expand_as(p["A_im"]))
    grid = torch.logspace(-2, -1, len(p["log_dt"]), dtype=torch.float64)
    torch.testing.assert_close(p["log_dt"].exp(), grid)
    deviations = {"E": math.sqrt(2), "C": math.sqrt(2 / (200 * size)), "W": 1 / 8}
    for key, deviation in deviations.items():
        if key in p and not (key == "E" and variant in ("dws", "full")):
            assert float(p[key].std()) == pytest.approx(deviation, rel=0.05), key
            assert abs(float(p[key].mean())) < 5 * deviation / math.sqrt(p[key].numel())
    if "B" in p:
        assert torch.equal(p["B"], torch.full_like(p["B"], 1 / 8))
    if variant == "dws":
        torch.testing.assert_close(p["E"], torch.full_like(p["E"], 200**-0.5))
    if variant == "full":
        assert torch.equal(p["E"], torch.full_like(p["E"], 1 / 8))


@every_variant
def test_outputs_start_with_a_variance_near_one_for_slow_inputs(variant: Any) -> None:
    """Measured: 0.6 ... 3.9 for constants, 0.2 ... 1.9 for noise correlated over 100 samples.

    White noise comes out far smaller, for the gain is dt (0.02 ... 0.16).
    """
    torch.manual_seed(0)
    variances = {"constant": [], "slow": [], "white": []}
    for _ in range(4):
        p = centaurus.init(16, 16 if variant in ("neck", "pointwise") else 8, variant=variant)
        white = torch.randn(4, 1500, 16)
        inputs = {
            "constant": torch.randn(4, 1, 16).expand(4, 1500, 16),
            "slow": linear_scan(torch.tensor([[0.99]]), 0.1411 * white, torch.randn(4, 16))[0],
            "white": white,
        }
        for name, u in inputs.items():
            y = centaurus.scan(p, u, variant=variant, mode="conv")[0][:, 1000:]
            variances[name].append(float(y.square().mean()))
    mean = {k: sum(v) / len(v) for k, v in variances.items()}
    assert 0.3 < mean["constant"] < 6, mean
    assert 0.1 < mean["slow"] < 4, mean
    assert mean["white"] < mean["slow"], mean


# -------------------------------------------------------------------------------------- equations


@every_variant
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("both", [False, True], ids=["causal", "bidirectional"])
def test_every_variant_is_its_equations(variant: Any, tied: bool, both: bool) -> None:
    params = init(variant, tied_dt=tied, bidirectional=both)
    u, state = normal(2, 33, H), None
    if not both:
        state = torch.view_as_complex(normal(2, *params["A_raw"].shape, 2, seed=5))
    elapsed = normal(2, 33, seed=6).abs() + 0.1
    for scheme in centaurus.DISCRETIZATIONS:
        options: dict[str, Any] = {"variant": variant, "discretization": scheme}
        dense = {"choices": {"variant": variant}, "scheme": scheme}
        want = dense_models.run("centaurus", params, u, state, **dense)
        K = centaurus.kernel(params, 40, bidirectional=both, **options)
        run = lambda **more: centaurus.scan(params, u, state, bidirectional=both, **more)  # noqa: E731
        for mode in MODES:
            assert_agree(run(mode=mode, **options), want, EXACT, f"{scheme} {mode}")
        assert_agree(run(kernel=K, **options), want, EXACT, f"{scheme} kernel=")
        for timestep_mode in ("both", "state_only"):
            want = dense_models.run(
                "centaurus", params, u, state, timesteps=elapsed,
                state_only=timestep_mode == "state_only", **dense,
            )  # fmt: skip
            got = run(integration_timesteps=elapsed, timestep_mode=timestep_mode, **options)
            assert_agree(got, want, EXACT, f"{scheme} {timestep_mode}")


@every_variant
@pytest.mark.parametrize("both", [False, True], ids=["causal", "bidirectional"])
def test_the_frequency_response_is_the_transform_of_the_kernel(variant: Any, both: bool) -> None:
    params, omega = init(variant, bidirectional=both, dt_min=0.05), normal(2, 3)
    options: dict[str, Any] = {"variant": variant, "discretization": "zoh", "bidirectional": both}
    K = centaurus.kernel(params, 3000, **options) + 0j
    turn = torch.exp(-1j * omega[..., None] * torch.arange(3000))
    want = torch.einsum("...l,loi->...oi", turn, K[0] if both else K)
    if both:
        want = want + torch.einsum("...l,loi->...oi", turn.conj(), K[1])
    assert_agree(centaurus.frequency_response(params, omega, **options), want, 1e-9)


def test_pointwise_is_a_neck_of_single_sub_states() -> None:
    p, u = init("pointwise"), normal(2, 40, H)
    neck = {
        "A_raw": p["A_raw"].reshape(-1, 1), "A_im": p["A_im"].reshape(-1, 1), "B": p["B"],
        "log_dt": p["log_dt"].repeat_interleave(2), "C": p["C"],
        "E": torch.ones(8, 1, dtype=torch.float64),
    }  # fmt: skip
    for mode in MODES:
        y, state = centaurus.scan(p, u, variant="pointwise", mode=mode)
        want, last = centaurus.scan(neck, u, mode=mode)
        assert_agree((y, state.flatten(-2)), (want, last.squeeze(-1)), EXACT, mode)


def test_dws_is_a_depthwise_convolution_and_a_linear_mixer() -> None:
    p, u = init("dws"), normal(2, 40, H)
    neck = {k: v for k, v in p.items() if k != "W"}
    neck |= {"B": torch.eye(H).double(), "C": p["W"]}
    for mode in MODES:
        got = centaurus.scan(p, u, variant="dws", mode=mode)
        assert_agree(got, centaurus.scan(neck, u, mode=mode), EXACT, mode)
    alone = p | {"W": torch.eye(H).double()}
    K = centaurus.kernel(alone, 40, variant="dws")
    assert not (K - torch.diag_embed(K.diagonal(dim1=-2, dim2=-1))).any()
    mixed = causal_convolution(u, K.diagonal(dim1=-2, dim2=-1)) @ p["W"].mT
    assert_agree(centaurus.scan(p, u, variant="dws")[0], mixed, EXACT)


def test_full_is_a_sum_over_a_dws_for_each_output() -> None:
    p, u = init("full"), normal(2, 40, H)
    for o in range(OUT):
        one = {k: p[k][o] for k in ("A_raw", "A_im", "E")}
        one |= {"log_dt": p["log_dt"][o].expand(H), "W": torch.ones(1, H).double()}
        for mode in MODES:
            y, state = centaurus.scan(p, u, variant="full", mode=mode)
            want = centaurus.scan(one, u, variant="dws", mode=mode)
            assert_agree((y[..., o : o + 1], state[:, o]), want, EXACT, mode)


@every_variant
def test_zoh_is_the_true_one_and_a_callable_may_stand_for_it(variant: Any) -> None:
    params, u = init(variant), normal(2, 33, H)

    def hold(A: Tensor, dt_decay: Tensor, dt_input: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(dt_decay * A), (torch.exp(dt_input * A) - 1) / A

    A_bar, gamma = centaurus.discretize(params, variant=variant, discretization="zoh")
    dt = params["log_dt"].exp().reshape(-1, *(1,) * (A_bar.ndim - 1))
    A = torch.log(A_bar) / dt
    assert_agree(gamma, (A_bar - 1) / A, 1e-10)
    first_order = centaurus.discretize(params, variant=variant)[1]
    assert_agree(first_order, dt.expand_as(A) + 0j, EXACT)
    for mode in MODES:
        want = centaurus.scan(params, u, variant=variant, discretization="zoh", mode=mode)
        got = centaurus.scan(params, u, variant=variant, discretization=hold, mode=mode)
        assert_agree(got, want, 1e-11, mode)
    with pytest.raises(
        ValueError, match="unknown discretization 'bilinear'; expected one of mamba,"
    ):
        centaurus.scan(params, u, variant=variant, discretization="bilinear")


# ------------------------------------------------------------------------------- sizes and errors


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@every_variant
def test_no_table_of_all_exponentials_is_built(variant: Any) -> None:
    """Nothing made here, forward or backward, has a number for each sub-state and sample."""
    length, options = 2048, {"sub_state_dim": 64}
    p = centaurus.init(8, 64 if variant in ("dws", "full") else 8, variant=variant, **options)
    p = {k: v.requires_grad_() for k, v in p.items()}
    state = torch.zeros(p["A_raw"].shape, dtype=torch.complex64)
    with Largest() as seen:
        y, last = centaurus.scan(p, torch.randn(length, 8), state, variant=variant, mode="conv")
        (y.sum() + last.real.sum()).backward()
    if variant != "pointwise":  # where a sub-state is a channel
        assert seen.elements < length * p["A_raw"].numel() / 4


@every_variant
def test_parameters_of_another_variant_are_refused_by_every_function(variant: Any) -> None:
    params, u = init(variant), normal(4, H)
    state = centaurus.init_state(params)
    for other in set(VARIANTS) - {variant}:
        calls = {
            "discretize": lambda o: centaurus.discretize(params, variant=o),
            "kernel": lambda o: centaurus.kernel(params, 4, variant=o),
            "frequency_response": lambda o: centaurus.frequency_response(params, u[0], variant=o),
            "scan": lambda o: centaurus.scan(params, u, variant=o),
            "step": lambda o: centaurus.step(params, u[0], state, variant=o),
        }
        for name, call in calls.items():
            with pytest.raises(
                ValueError, match=rf"centaurus.{name}: .*give the variant that init"
            ):
                call(other)
    with pytest.raises(ValueError, match=r"centaurus.scan: variant = 'wide', expected one of"):
        centaurus.scan(params, u, variant="wide")  # type: ignore[arg-type]
    second = SECOND[variant] + "2"
    with pytest.raises(ValueError, match=rf"params have no {second}; make them with init\(bidir"):
        centaurus.scan(params, u, variant=variant, bidirectional=True)


# ---------------------------------------------------------------------------------------- Modules


@every_variant
def test_layers_and_blocks_of_every_variant(variant: Any) -> None:
    options = {} if variant in ("dws", "full") else {"sub_state_dim": 2}
    layer = Centaurus(H, SIZE, variant=variant, d_out=OUT, dtype=torch.float64, **options)
    u = normal(2, 33, H)
    assert layer.d_output == OUT
    want = centaurus.scan(layer.params, u, variant=variant, mode="recurrent")
    assert_agree(layer.prefill(u), want, EXACT)
    block = Block(H, layer, activation="glu").double()
    assert block(u).shape == u.shape
    with pytest.raises(ValueError, match="the mixer gives 5 channels and the block has 3"):
        Block(H, layer, activation="gelu")
    groups = {g["name"]: len(g["params"]) for g in param_groups(layer, 1e-2)}
    assert groups == {"ssm": 3, "normal": len(layer.params) - 3}
    both = Centaurus(H, SIZE, variant=variant, bidirectional=True, **options)
    assert both(u.float()).shape == u.shape
    with pytest.raises(ValueError, match="sub_state_dim = 9"):
        Centaurus(H, SIZE, variant="dws", sub_state_dim=9)


def test_gradients_reach_every_parameter_in_every_mode() -> None:
    for variant in VARIANTS:
        params = {k: v.requires_grad_() for k, v in init(variant).items()}
        want = None
        for mode in ("conv", "scan", "recurrent"):
            y, _ = centaurus.scan(params, normal(2, 20, H), variant=variant, mode=mode)
            grads = torch.autograd.grad(y.square().sum(), list(params.values()))
            want = grads if want is None else want
            for key, a, b in zip(params, grads, want, strict=True):
                assert float(a.abs().max()) > 0, key
                assert error(a, b) < 1e-11, f"{variant} {mode} {key}"
