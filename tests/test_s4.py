"""S4 alone: the paper's matrices, truncation, the discrete low-rank form, rates, and gradients.

The oracle writes A = Lambda - P P^* out over conjugate pairs and takes the bilinear transform with
`torch.linalg.solve` (`dense_models`); HiPPO itself is written out once more, as a real matrix.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import dense_models
import pytest
import torch
from model_cases import assert_agree, error, loop, normal
from torch import Tensor
from torch.func import grad, jvp

from lrnnx_core import initialize, registry, s4, s4d
from lrnnx_core.models import _dense_blocks, _dense_resets, _dplr, _s4_run
from lrnnx_nn import S4

F32, F64 = torch.float32, torch.float64
MEASURES = ("legs", "legt", "fout")
SIZES = (2, 4, 16, 64)
LENGTHS = (1, 2, 3, 9, 16, 64, 1023, 4096)
LONG = 256
STEPS = (1e-5, -1e-5)
TRANSFORMS = ("exp", "softplus", "relu", "clip", "none")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(n: int, h: int = 3, **options: Any) -> dict[str, Tensor]:
    return s4.init(h, n, dtype=F64, generator=seeded(), **options)


def moved(params: dict[str, Tensor], spread: float = 0.3, seed: int = 5) -> dict[str, Tensor]:
    """Return the parameters, each moved a little, so that none has a special value."""
    generator = seeded(seed)
    return {
        k: v + spread * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        for k, v in params.items()
    }


def dense(params: dict[str, Tensor], dt_scale: float = 1.0, **choices: Any) -> tuple[Tensor, ...]:
    """Return A_bar, B_bar and C of the full complex system, (H, N, N), (H, N), (H, Ch, N)."""
    system = dense_models.DENSE["s4"](params, choices)
    one = torch.ones((), dtype=F64)
    scaled = system._replace(A=dt_scale * system.A, B=dt_scale * system.B)
    A_bar, B_bar = dense_models.steps(scaled, "bilinear", one, one, None)
    return A_bar, B_bar[..., 0], system.C


def recurrence(params: dict[str, Tensor], length: int, **options: Any) -> Tensor:
    """Return the kernel (L, H) by the dense recurrence."""
    A_bar, x, C = dense(params, **options)
    taps = []
    for _ in range(length):
        taps.append((C[:, 0] * x).sum(-1).real)
        x = (A_bar @ x.unsqueeze(-1)).squeeze(-1)
    return torch.stack(taps)


@cache
def long_kernel(measure: str, n: int, length: int) -> Tensor:
    return recurrence(start(n, A_init=measure), length)


# ------------------------------------------------------------------------ the kernel, in every way


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("measure", MEASURES)
def test_both_kernels_are_the_dense_recurrence(measure: Any, n: int, length: int) -> None:
    params = start(n, A_init=measure)
    want = long_kernel(measure, n, max(LENGTHS) if length > LONG else LONG)[:length]
    assert_agree(s4.kernel(params, length), want, 1e-12, "C")
    stored = s4.c_to_ctilde(params, length)
    # where a length of 1 ... 16 is short beside 1/|Re A|, C~ is a small difference
    allowed = 1e-12 if length > 16 or measure == "legs" else 1e-11
    assert_agree(s4.kernel(stored, length, l_kernel=length), want, allowed, "C~")
    narrow = {k: v.to(F32) for k, v in params.items()}
    exact = {k: v.double() for k, v in narrow.items()}
    want = s4.kernel(exact, length)
    assert_agree(s4.kernel(narrow, length), want, 2e-6, "C, float32")
    # C~ itself is rounded to float32: what its condition makes of that is the same in float64
    stored = {k: v.to(F32) for k, v in s4.c_to_ctilde(exact, length).items()}
    want = s4.kernel({k: v.double() for k, v in stored.items()}, length, l_kernel=length)
    bar = 2e-5 if measure == "legs" else 1e-3
    assert_agree(s4.kernel(stored, length, l_kernel=length), want, bar, "C~, float32")


@pytest.mark.parametrize("n", [2, 8, 32])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_start_is_hippo(measure: str, n: int) -> None:
    """The response of h_0 in x' = A x + B u with the published real matrices; Re A >= 1e-4."""
    k = torch.arange(n, dtype=F64)
    r = torch.sqrt(2 * k + 1)
    if measure == "legs":
        A, B = -torch.tril(r[:, None] * r, -1) - torch.diag(k + 1), r
    elif measure == "legt":
        sign = torch.where(k[:, None] >= k, 1.0, (-1.0) ** (k[:, None] - k))
        A, B = -0.5 * r[:, None] * r * sign, 0.5 * r
    else:
        B = torch.zeros(n, dtype=F64)
        B[0::2] = math.sqrt(2)
        B[0] = 1
        A = -B[:, None] * B
        for j in range(n // 2):
            A[2 * j, 2 * j + 1] -= math.pi * j
            A[2 * j + 1, 2 * j] += math.pi * j
    if measure != "legs":
        A = A - 1e-4 * torch.eye(n, dtype=F64)
    params = start(n, 1, A_init=measure, B_clip=None)
    dt = float(params["log_dt"].exp())
    eye = torch.eye(n, dtype=F64)
    A_bar = torch.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A)
    x = torch.linalg.solve(eye - dt / 2 * A, dt * B)
    C = initialize.normal_form(measure, n).V[:1]  # h_0 = 2 Re(V_0 . x)
    params = params | {"C_re": C.real.clone(), "C_im": C.imag.clone()}
    taps = []
    for _ in range(40):
        taps.append(x[:1])
        x = A_bar @ x
    assert_agree(s4.kernel(params, 40), torch.stack(taps), 1e-11)


def test_the_length_of_the_kernel_may_be_less_than_it_is_stored_for() -> None:
    stored = moved(start(8, l_kernel=50))
    whole = s4.kernel(stored, 50, l_kernel=50)
    for length in (1, 2, 17, 49):
        assert torch.equal(s4.kernel(stored, length, l_kernel=50), whole[:length])
    assert_agree(whole, recurrence(stored, 50, l_kernel=50), 1e-12)


def test_beyond_l_kernel_only_a_convolution_is_refused() -> None:
    stored, u = start(8, l_kernel=20), normal(2, 30, 3)
    said = r"length = 30 is beyond l_kernel = 20, .*s4\.extend"
    with pytest.raises(ValueError, match=r"s4\.kernel: " + said):
        s4.kernel(stored, 30, l_kernel=20)
    with pytest.raises(ValueError, match=r"s4\.scan: " + said):
        s4.scan(stored, u, mode="conv", l_kernel=20)
    want = s4.scan(s4.ctilde_to_c(stored, 20), u, mode="recurrent")
    for mode in ("auto", "scan", "recurrent"):
        assert_agree(s4.scan(stored, u, mode=mode, l_kernel=20), want, 1e-11, mode)
    longer = s4.extend(stored, 20)
    assert_agree(s4.scan(longer, u, mode="conv", l_kernel=40), want, 1e-11, "extended")


# -------------------------------------------------------------------------------------- truncation


@pytest.mark.parametrize("length", [1, 2, 3, 16, 100, 1000])
@pytest.mark.parametrize("measure", MEASURES)
def test_conversions_are_inverse_and_extension_is_direct(measure: Any, length: int) -> None:
    params = start(16, A_init=measure, channels=2, bidirectional=True)
    before = {k: v.clone() for k, v in params.items()}
    stored = s4.c_to_ctilde(params, length)
    A_bar, _, C = dense(params)
    want = C - C @ torch.linalg.matrix_power(A_bar, length)  # (H, Ch, N)
    want = want[..., :8].transpose(0, 1)
    got = torch.complex(stored["C_re"], stored["C_im"])
    assert_agree(got, want, 1e-11 if measure == "legs" else 1e-9, "C~")
    # I - A_bar^L has the condition 1/(L dt |Re A|): 1e7 at L = 1 for an undamped measure
    assert_agree(s4.ctilde_to_c(stored, length), params, 1e-8, "round trip")
    assert_agree(s4.extend(stored, length), s4.c_to_ctilde(params, 2 * length), 1e-11, "twice")
    assert_agree(params, before, 0.0, "nothing is written to")
    changed = {k for k in params if not torch.equal(stored[k], params[k])}
    assert changed == {"C_re", "C_im", "C2_re", "C2_im"}


def test_conversions_of_float32_lose_nothing_but_its_rounding() -> None:
    wide = start(16, A_init="legt")
    narrow = {k: v.to(F32) for k, v in wide.items()}
    wide = {k: v.double() for k, v in narrow.items()}
    got, want = s4.c_to_ctilde(narrow, 16), s4.c_to_ctilde(wide, 16)
    assert all(v.dtype == F32 for v in got.values())
    for k in want:  # not 4e-3, as powers and differences in float32 would make it
        assert_agree(got[k], want[k], 1e-7, k)


@pytest.mark.parametrize("scale", [0.5, 2.0, 3.7])
def test_another_rate_is_exact_with_a_stored_truncation(scale: float) -> None:
    """Fact 11: C~ belongs to the step it was made for."""
    length = 64
    params = start(16, dt_min=0.01)
    stored = s4.c_to_ctilde(params, length)
    want = recurrence(params, length, dt_scale=scale)
    got = s4.kernel(stored, length, l_kernel=length, dt_scale=scale)
    assert_agree(got, want, 1e-11)
    number = torch.tensor(scale, dtype=F64)
    assert_agree(s4.kernel(stored, length, l_kernel=length, dt_scale=number), want, 1e-11)
    other = stored | {"log_dt": stored["log_dt"] + math.log(scale)}
    assert error(s4.kernel(other, length, l_kernel=length), want) > 0.01, "C~ of the wrong step"
    u = normal(2, length, 3)
    for mode in ("conv", "scan", "recurrent"):
        y = s4.scan(stored, u, mode=mode, l_kernel=length, dt_scale=scale)[0]
        assert_agree(y, s4.scan(params, u, dt_scale=scale)[0], 1e-11, mode)


def test_a_discretization_that_is_given_is_the_one_that_runs() -> None:
    """Also from a state, where C~ could answer for the step it was made for alone."""
    length = 30
    params = start(8)
    stored = s4.c_to_ctilde(params, length)
    u, state = normal(2, length, 3), torch.complex(normal(2, 3, 4), normal(2, 3, 4, seed=9))
    discrete = s4.discretize(stored, dt_scale=1.7)
    want = s4.scan(params, u, state, dt_scale=1.7, mode="recurrent")
    for mode in ("auto", "conv", "scan", "recurrent"):
        got = s4.scan(stored, u, state, discrete=discrete, l_kernel=length, mode=mode)
        assert_agree(got, want, 1e-11, mode)


def test_both_directions_run_with_a_stored_truncation() -> None:
    length = 30
    params = start(8, A_init="legt", channels=2, bidirectional=True)
    stored = s4.c_to_ctilde(params, length)
    u, choices = normal(4, length, 3), {"bidirectional": True}
    lengths = torch.tensor([30, 17, 1, 0])
    want = s4.scan(params, u, lengths=lengths, mode="recurrent", **choices)
    K = s4.kernel(stored, length, l_kernel=length, **choices)
    assert_agree(K, s4.kernel(params, length, **choices), 1e-10)
    for options in ({"mode": "conv"}, {"mode": "scan"}, {"mode": "recurrent"}, {"kernel": K}):
        got = s4.scan(stored, u, lengths=lengths, l_kernel=length, **options, **choices)
        assert_agree(got, want, 1e-10, str(options.get("mode")))


def test_second_derivatives_agree_with_a_stored_truncation() -> None:
    """Whichever mode comes last, and by differences: the true readout is recovered by a solve."""
    params, u = start(4, 2, l_kernel=12, dt_min=0.05), normal(5, 2)
    along = {k: normal(*v.shape, seed=i) for i, (k, v) in enumerate(params.items())}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return s4.scan(params, u, mode="scan", l_kernel=12)[0].sin().sum()

    def slope(params: dict[str, Tensor]) -> Tensor:
        return jvp(loss, (params,), (along,))[1]

    want = jvp(grad(loss), (params,), (along,))[1]
    got = grad(slope)(params)
    for k in params:
        assert_agree(got[k], want[k], 1e-11, k)
    curvature = jvp(slope, (params,), (along,))[1]
    assert_agree(curvature, torch.stack([(want[k] * along[k]).sum() for k in params]).sum(), 1e-11)
    ahead, behind = (grad(loss)({k: v + s * along[k] for k, v in params.items()}) for s in STEPS)
    for k in params:
        assert_agree((ahead[k] - behind[k]) / (STEPS[0] - STEPS[1]), want[k], 1e-5, k)


def test_init_stores_the_truncation_of_the_same_model() -> None:
    for bidirectional in (False, True):
        plain = start(8, bidirectional=bidirectional)
        stored = start(8, bidirectional=bidirectional, l_kernel=30)
        assert_agree(s4.c_to_ctilde(plain, 30), stored, 0.0)


# ---------------------------------------------------------------------- the discrete low-rank form


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("tied_dt", [True, False])
def test_the_discrete_system_is_the_dense_one_at_every_rank(rank: int, tied_dt: bool) -> None:
    params = moved(start(8, 2, rank=rank, tied_dt=tied_dt, n_ssm=1))
    assert params["P_re"].shape == (rank, 1, 4)
    A_bar, B_bar, _ = dense(params)
    A, b = s4.discretize(params)
    # the basis [Re x, Im x] of the states [x, conj x]
    eye = torch.eye(4, dtype=torch.complex128)
    T = torch.cat([torch.cat([eye, 1j * eye], 1), torch.cat([eye, -1j * eye], 1)])
    assert_agree(A + 0j, torch.linalg.solve(T, A_bar @ T), 1e-12, "A_bar")
    assert_agree(b + 0j, torch.linalg.solve(T, B_bar.unsqueeze(-1))[..., 0], 1e-12, "B_bar")
    u, state = normal(3, 2), torch.complex(normal(3, 2, 4), normal(3, 2, 4, seed=9))
    full = torch.cat([state, state.conj()], -1)
    want = (A_bar @ full.unsqueeze(-1)).squeeze(-1) + B_bar * u.unsqueeze(-1)
    for options in ({}, {"discrete": (A, b)}):
        assert_agree(s4.step(params, u, state, **options)[1], want[..., :4], 1e-12)
    length = 37
    kernel = recurrence(params, length)
    assert_agree(s4.kernel(params, length), kernel, 1e-12, "C")
    stored = s4.c_to_ctilde(params, length)
    assert_agree(s4.kernel(stored, length, l_kernel=length), kernel, 1e-11, "C~")


@pytest.mark.parametrize("without", ["rank", "zeros"])
def test_without_the_low_rank_term_it_is_s4d_bilinear(without: str) -> None:
    params = moved(start(8, rank=0 if without == "rank" else None))
    if without == "zeros":
        params |= {k: torch.zeros_like(params[k]) for k in ("P_re", "P_im")}
    diagonal = {k: v for k, v in params.items() if not k.startswith("P")}
    u = normal(2, 70, 3)
    state = torch.complex(normal(2, 3, 4), normal(2, 3, 4, seed=9))
    want = s4d.scan(diagonal, u, state, discretization="bilinear")
    for mode in ("conv", "scan", "recurrent"):
        assert_agree(s4.scan(params, u, state, mode=mode), want, 1e-12, mode)
    K = s4d.kernel(diagonal, 70, discretization="bilinear")
    assert_agree(s4.kernel(params, 70), K, 1e-12)
    stored = s4.c_to_ctilde(params, 70)
    assert_agree(s4.kernel(stored, 70, l_kernel=70), K, 1e-12)
    omega = torch.linspace(0, 3, 7, dtype=F64)
    assert_agree(
        s4.frequency_response(params, omega),
        s4d.frequency_response(diagonal, omega, discretization="bilinear"),
        1e-12,
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_a_lambda_minus_p_p_star_is_stable_whatever_the_parameters(measure: Any) -> None:
    for seed in range(10):
        params = moved(start(16, A_init=measure, tied_dt=bool(seed % 2)), spread=2.0, seed=seed)
        system = dense_models.DENSE["s4"](params, {})
        assert torch.linalg.eigvals(system.A).real.max() < 0
        A_bar, _ = s4.discretize(params)
        assert torch.linalg.eigvals(A_bar).abs().max() < 1
        if seed % 2:  # one step a channel: a contraction, in every direction
            assert torch.linalg.matrix_norm(A_bar, 2).max() <= 1 + 1e-12
    loose = moved(start(16, A_transform="none")) | {"A_log": torch.full((3, 8), 3.0, dtype=F64)}
    values = torch.linalg.eigvals(s4.discretize(loose, A_transform="none")[0])
    assert values.abs().max() > 1


def test_the_node_at_minus_one_has_no_pole() -> None:
    """Fact 10: an even length has the node omega = -1."""
    for length in (2, 64, 65):
        params = {k: v.requires_grad_() for k, v in start(8, l_kernel=length).items()}
        K = s4.kernel(params, length, l_kernel=length)
        K.square().sum().backward()
        assert all(v.grad is None or v.grad.isfinite().all() for v in params.values())
        assert K.isfinite().all()


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("l_kernel", [None, 5])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients_of_the_kernel_are_right(rank: int, l_kernel: int | None) -> None:
    choices: dict[str, Any] = {"l_kernel": l_kernel}
    params = moved(start(4, 2, rank=rank, dt_min=0.1, dt_max=0.5, **choices))
    keys = [k for k in params if k != "D"]

    def run(*values: Tensor) -> Tensor:
        p = dict(zip(keys, values, strict=True)) | {"D": params["D"]}
        return s4.kernel(p, 5, **choices)

    inputs = tuple(params[k].requires_grad_() for k in keys)
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("A_transform", TRANSFORMS)
@pytest.mark.parametrize("dt_transform", ["exp", "softplus"])
@pytest.mark.parametrize("model", [s4, s4d], ids=["s4", "s4d"])
def test_transforms_start_alike_and_run_as_they_say(
    model: Any, dt_transform: Any, A_transform: Any
) -> None:
    choices = {"dt_transform": dt_transform, "A_transform": A_transform}
    name = "s4" if model is s4 else "s4d"
    scheme = "bilinear" if model is s4 else "zoh"
    for given in ({"A_init": "legs"}, {"A_init": "legs", "dt_min": 1e-6, "dt_max": 30.0}):
        params = model.init(3, 8, dtype=F64, generator=seeded(), **given, **choices)
        plain = model.init(3, 8, dtype=F64, generator=seeded(), **given)
        assert_agree(model.kernel(params, 30, **choices), model.kernel(plain, 30), 1e-10)
    spread = 0.0 if A_transform == "none" else 0.3
    params = moved(model.init(3, 8, dtype=F64, generator=seeded(), **choices), spread)
    u = normal(2, 40, 3)
    want = dense_models.run(name, params, u, choices=choices, scheme=scheme)
    for mode in ("conv", "scan", "recurrent"):
        assert_agree(model.scan(params, u, mode=mode, **choices), want, 1e-12, mode)
    assert_agree(loop(registry.bind(name, **choices), params, u), want, 1e-12, "step")
    assert_agree(
        model.scan(params, u, discrete=model.discretize(params, **choices), **choices),
        want, 1e-12, "discrete=",
    )  # fmt: skip
    inputs = tuple(v.requires_grad_() for v in params.values())

    def run(*values: Tensor) -> Tensor:
        return model.kernel(dict(zip(params, values, strict=True)), 4, **choices)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    for function in (model.discretize, model.scan, model.kernel):
        arguments = {model.discretize: (), model.scan: (u,), model.kernel: (4,)}[function]
        for option in choices:
            with pytest.raises(ValueError, match=f"{option} = 'log', expected one of"):
                function(params, *arguments, **{option: "log"})


# -------------------------------------------------------------------------------------------- init


def test_mixtures_share_the_copies_out_in_order() -> None:
    alone = {m: start(8, 2, A_init=m) for m in MEASURES}
    keys = ("A_log", "A_im", "B_re", "B_im")
    for A_init, order in (
        ("hippo", ("legs", "fout")),
        (("fout", "legt"), ("fout", "legt")),
        (("legs",), ("legs",)),
        (MEASURES, MEASURES),
    ):
        params = start(8, 12, A_init=A_init, n_ssm=6)
        each = 6 // len(order)
        for i, measure in enumerate(order):
            for key in keys:
                got = params[key][i * each : (i + 1) * each]
                assert torch.equal(got, alone[measure][key][:1].expand(each, -1))
            P = alone[measure]["P_re"][:, :1]
            got = params["P_re"][:, i * each : (i + 1) * each]
            assert len(got) == (2 if "legt" in order else 1)
            assert torch.equal(got[: len(P)], P.expand(-1, each, -1))
            assert not got[len(P) :].any()
    # the copies stand beside one another: channel h has copy h mod S
    params = start(8, 4, A_init="hippo", n_ssm=2)
    assert_agree(s4.kernel(params, 9), recurrence(params, 9), 1e-12)


def test_what_init_refuses() -> None:
    for options, said in (
        ({"d_state": 7}, "d_state = 7 is odd; conjugate pairs need an even one"),
        ({"n_ssm": 4}, "n_ssm = 4 does not divide d_model = 6"),
        ({"A_init": "hippo", "n_ssm": 3}, r"2 measures \('legs', 'fout'\) cannot share n_ssm = 3"),
        ({"A_init": ("legs", "lin")}, r"A_init = \('legs', 'lin'\), expected one of"),
        ({"A_init": ()}, r"A_init = \(\), expected one of"),
        ({"A_init": "legt", "rank": 1}, "rank = 1, expected 0 or at least 2"),
        ({"rank": -1}, "rank = -1, expected an integer >= 1"),
        ({"l_kernel": 0}, "l_kernel = 0, expected an integer >= 1"),
        ({"B_clip": 0.0}, "B_clip = 0.0, expected a number > 0 or None"),
        ({"channels": 0}, "channels = 0, expected an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=f"s4.init: {said}"):
            s4.init(6, **{"d_state": 8, **options})
    for convert in (s4.c_to_ctilde, s4.ctilde_to_c, s4.extend):
        with pytest.raises(ValueError, match=rf"s4.{convert.__name__}: length = 0, expected"):
            convert(start(4), 0)
    params = start(4)
    for function, arguments in ((s4.kernel, (5,)), (s4.scan, (normal(5, 3),))):
        with pytest.raises(ValueError, match=r"l_kernel = 2\.5, expected an integer >= 1"):
            function(params, *arguments, l_kernel=2.5)


def test_init_has_the_shapes_and_limits_it_says() -> None:
    shapes = lambda **o: {k: tuple(v.shape) for k, v in start(8, 6, **o).items()}  # noqa: E731
    pairs = {"A_log": (6, 4), "A_im": (6, 4), "B_re": (6, 4), "B_im": (6, 4)}
    assert shapes() == {
        "log_dt": (6,), **pairs, "P_re": (1, 6, 4), "P_im": (1, 6, 4), "C_re": (6, 4),
        "C_im": (6, 4), "D": (6,),
    }  # fmt: skip
    several = shapes(A_init="legt", n_ssm=2, channels=3, tied_dt=False, bidirectional=True)
    assert several["P_im"] == (2, 2, 4)
    assert several["C2_re"] == several["C_im"] == (3, 6, 4)
    assert several["log_dt"] == (6, 4)
    assert several["D"] == (3, 6)
    assert shapes(rank=4)["P_re"] == (4, 6, 4)
    for measure in MEASURES:
        params = start(32, A_init=measure)
        assert params["B_im"].abs().max() <= 2
        assert (params["A_im"] <= 0).all()
        decay = params["A_log"].exp()
        torch.testing.assert_close(
            decay, torch.full_like(decay, 0.5 if measure == "legs" else 1e-4)
        )
    assert start(32, B_clip=None)["B_im"].abs().max() > 20
    C = s4.init(400, 16, generator=seeded())["C_re"]
    assert float(C.std()) == pytest.approx(2**-0.5, rel=0.03)


# ------------------------------------------------------------------------------ runs over sequences


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_blocks_of_time_are_the_recurrence_at_every_length(rows: int) -> None:
    """Past one block, past two, and with so many rows that squares of A_bar^Q pay."""
    generator = seeded(3)
    H, N = 2, 4
    A = torch.randn(H, N, N, generator=generator, dtype=F64)
    A = 0.97 * A / torch.linalg.matrix_norm(A, 2)[:, None, None]
    b, C = normal(H, N), normal(H, 3, N, seed=4)
    block = _dense_blocks.BLOCK
    longest = 5 * block + 9
    u, x = normal(rows, longest, H), normal(rows, H, N, seed=8)
    h, states, ys = x, [x], []
    for t in range(longest):
        h = torch.einsum("hij,bhj->bhi", A, h) + b * u[:, t, :, None]
        states.append(h)
        ys.append(torch.einsum("hcn,bhn->bch", C, h))
    for length in (1, 2, 3, 31, block - 1, block, block + 1, 2 * block + 5, 4 * block, longest):
        table = _dense_blocks.krylov(A, b, length, rows)
        y, last = _dense_blocks.scan(table, C, u[:, :length], x, None)
        assert_agree(y, torch.stack(ys[:length], 1), 1e-12, f"y {length}")
        assert_agree(last, states[length], 1e-12, f"state {length}")
        final = _dense_blocks.final_state(table, u[:, :length], x, None)
        assert_agree(final, last, 1e-12, f"final {length}")
        lengths = torch.arange(rows) * 17 % (length + 1)
        _, last = _dense_blocks.scan(table, C, u[:, :length], x, lengths)
        want = torch.stack([states[int(n)][i] for i, n in enumerate(lengths)])
        assert_agree(last, want, 1e-12, f"lengths {length}")
    assert len(table.steps) > 1 or rows == 1


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_documents_run_by_blocks(bidirectional: bool) -> None:
    """Resets at, before and after the edges of blocks, rows that end anywhere."""
    size, length, rows = _dense_resets.BLOCK, 5 * _dense_resets.BLOCK + 3, 7
    params = moved(start(8, channels=2, bidirectional=bidirectional))
    u, choices = normal(rows, length, 3), {"bidirectional": bidirectional}
    state = None
    if not bidirectional:
        state = torch.complex(normal(rows, 3, 4), normal(rows, 3, 4, seed=9))
    reset = normal(rows, length, seed=6) > 1.5
    reset[0], reset[1] = False, True
    reset[2, [size - 1, size, size + 1, 3 * size]] = True
    lengths = torch.tensor([length, length, 3 * size, 0, 1, 2 * size + 5, length - 1])
    mask = normal(rows, length, seed=7) > -1.0
    for given in ({}, {"lengths": lengths}, {"mask": mask}, {"lengths": lengths, "mask": mask}):
        given["reset"] = reset
        want = s4.scan(params, u, state, mode="recurrent", **given, **choices)
        assert_agree(s4.scan(params, u, state, **given, **choices), want, 1e-12, str(list(given)))


def test_irregular_time_runs_on_across_the_blocks_it_is_made_in() -> None:
    params = moved(start(8, 2, A_init="legt"))
    length = 2 * _s4_run.TIMED_BLOCK + 3
    u, elapsed = normal(2, length, 2), 0.2 + normal(2, length, seed=6).abs()
    state = torch.complex(normal(2, 2, 4), normal(2, 2, 4, seed=9))
    for mode in ("both", "state_only"):
        want = dense_models.run(
            "s4", params, u, state, choices={}, scheme="bilinear", timesteps=elapsed,
            state_only=mode == "state_only",
        )  # fmt: skip
        got = s4.scan(params, u, state, integration_timesteps=elapsed, timestep_mode=mode)
        assert_agree(got, want, 1e-12, mode)


def test_a_kernel_of_float32_parameters_is_made_in_float64() -> None:
    """Powers of A_bar in float32 would lose what a slow mode needs."""
    params = {k: v.to(F32) for k, v in start(64, dt_max=1e-2).items()}
    exact = {k: v.double() for k, v in params.items()}
    u = normal(1, 2000, 3, dtype=F32)
    want = s4.scan(exact, u.double())
    for mode in ("scan", "conv", "recurrent"):
        y, last = s4.scan(params, u, mode=mode)
        assert error(y, want[0]) < 2e-5, mode
        assert error(last, want[1]) < 2e-5, mode


def test_the_real_form_of_a_state() -> None:
    x = torch.complex(normal(3, 4), normal(3, 4, seed=3))
    c = torch.complex(normal(3, 4, seed=4), normal(3, 4, seed=5))
    column, row = _dplr.column(x), _dplr.row(c)
    assert_agree((row * column).sum(-1), (c * x).sum(-1).real, 1e-14)
    assert torch.equal(_dplr.halves(column), x)
    assert torch.equal(_dplr.halves(row, -1.0), c)


# -------------------------------------------------------------------------------------- the Module


def test_extending_a_layer_doubles_its_reach_and_changes_nothing_else() -> None:
    layer = S4(3, 8, l_kernel=20, generator=seeded(), dtype=F64)
    u = normal(2, 20, 3)
    before = layer(u)
    with pytest.raises(ValueError, match=r"beyond l_kernel = 20"):
        S4(3, 8, l_kernel=20, mode="conv")(torch.randn(40, 3))
    held = dict(layer.named_parameters())
    layer.extend()
    assert layer.l_kernel == 40
    assert all(p is held[k] for k, p in layer.named_parameters())
    assert_agree(layer(u), before, 1e-11)
    long = normal(2, 40, 3)
    layer.mode = "conv"
    assert_agree(layer(long)[:, :20], layer(long[:, :20]), 1e-11)
    layer.reset_parameters(generator=seeded(1))
    fresh = S4(3, 8, l_kernel=40, generator=seeded(1), dtype=F64)
    assert_agree(layer(long), fresh(long), 1e-11)
    with pytest.raises(ValueError, match=r"S4.extend: the layer stores C itself"):
        S4(3, 8).extend()


def test_steps_in_evaluation_recover_the_true_readout_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = S4(3, 8, l_kernel=20, generator=seeded(), dtype=F64).eval()
    u, calls, plain = normal(2, 6, 3), [], s4.ctilde_to_c
    want = layer(u)
    monkeypatch.setattr(s4, "ctilde_to_c", lambda *a, **k: calls.append(1) or plain(*a, **k))
    with torch.no_grad():
        for _ in range(2):
            state, ys = layer.init_state((2,)), []
            for t in range(6):
                y, state = layer.step(u[:, t], state)
                ys.append(y)
            assert_agree(torch.stack(ys, 1), want, 1e-11)
        assert len(calls) == 1
        layer.C_re.mul_(2.0)
        layer.C_im.mul_(2.0)
        layer.D.mul_(2.0)
        y, _ = layer.step(u[:, 0], layer.init_state((2,)))
        assert_agree(y, 2 * want[:, 0], 1e-11)
    y, _ = layer.step(u[:, 0], layer.init_state((2,)))
    y.sum().backward()
    assert layer.C_re.grad is not None
