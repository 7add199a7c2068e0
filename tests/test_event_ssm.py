"""Event-SSM against loops written from the equations, and event pooling in every split."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from model_cases import assert_agree, error, gaps, normal
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves as all_leaves
from torch.utils._pytree import tree_map

from lrnnx_core import checks, event_ssm, s5
from lrnnx_core.backends import reference
from lrnnx_core.models import _mimo
from lrnnx_core.models.event_ssm import Pending, Pooled, PooledState
from lrnnx_nn import Block, EventPooling, EventPoolingBlock, EventSSM, EventStage, param_groups

F64 = torch.float64
EXACT = 1e-12
H, P, L, S = 3, 8, 14, 4
RULES = ("async", "dirac", "zoh")
POOLINGS = ("last", "mean", "time_weighted")

every_rule = pytest.mark.parametrize("rule", RULES)
every_pooling = pytest.mark.parametrize("pooling", POOLINGS)
both_halves = pytest.mark.parametrize("conj_sym", [True, False], ids=["halves", "full"])
both_samplings = pytest.mark.parametrize("compat", [None, "event_ssm"], ids=["last", "first"])


def make(seed: int = 0, spread: float = 0.2, **choices: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = event_ssm.init(H, P, generator=generator, dtype=F64, **choices)
    return {
        k: v + spread * torch.randn(v.shape, generator=generator, dtype=F64)
        for k, v in params.items()
    }


def tree_leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in all_leaves(tree) if leaf is not None]


def complex_normal(*shape: int, seed: int = 5) -> Tensor:
    return torch.view_as_complex(normal(*shape, 2, seed=seed))


# ---------------------------------------------------------------- the paper's equations, in a loop


def equations(
    p: dict[str, Tensor], u: Tensor, x: Tensor, delta: Tensor, rule: str, conj_sym: bool
) -> tuple[Tensor, Tensor]:
    """Return the states (L, P) after each event of u (L, H), and the outputs (L, H_out).

    With one of each conjugate pair stored, the other is written out: no factor 2 stands here.
    """
    A = torch.complex(p["Lambda_re"], p["Lambda_im"])
    B = torch.complex(p["B_re"], p["B_im"])
    C = torch.complex(p["C_re"], p["C_im"])
    dt = torch.exp(p["log_dt"])
    stored = len(A)
    if conj_sym:
        A, B, C = torch.cat([A, A.conj()]), torch.cat([B, B.conj()]), torch.cat([C, C.conj()], 1)
        dt, x = torch.cat([dt, dt]), torch.cat([x, x.conj()])
    D = p["D"] if p["D"].ndim == 2 else torch.diag(p["D"])
    states, ys = [], []
    for k in range(len(u)):
        decay = torch.exp(A * dt * delta[k])
        gain = {
            "async": (torch.exp(A * dt) - 1) / A,
            "dirac": torch.ones_like(A),
            "zoh": (torch.exp(A * dt * delta[k]) - 1) / A,
        }[rule]
        x = decay * x + gain * (B @ (u[k] + 0j))
        states.append(x[:stored])
        ys.append((C @ x).real + D @ u[k])
    return torch.stack(states), torch.stack(ys)


def pooled_equations(
    p: dict[str, Tensor],
    u: Tensor,
    x: Tensor,
    delta: Tensor,
    rule: str,
    conj_sym: bool,
    pooling: str,
    compat: str | None,
    stride: int = S,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs (M, H_out), gaps (M,) and the state after the last whole group."""
    states, ys = equations(p, u, x, delta, rule, conj_sym)
    D = p["D"] if p["D"].ndim == 2 else torch.diag(p["D"])
    out, time = [], []
    for g in range(len(u) // stride):
        own = range(g * stride, (g + 1) * stride)
        at = own[0] if compat else own[-1]
        if pooling == "last":
            read = u[at]
        elif pooling == "mean":
            read = sum(u[k] for k in own) / stride
        else:
            weights = [delta[k] + 1e-6 for k in own]
            read = sum(w * u[k] for w, k in zip(weights, own, strict=True)) / sum(weights)
        out.append(ys[at] - D @ u[at] + D @ read)
        time.append(sum(delta[k] for k in own))
    whole = len(u) // stride * stride
    return torch.stack(out), torch.stack(time), states[whole - 1] if whole else x


@every_rule
@both_halves
@pytest.mark.parametrize("d_out", [None, 5], ids=["square", "wide"])
def test_the_three_published_rules_are_the_papers_recurrence(
    rule: str, conj_sym: bool, d_out: int | None
) -> None:
    p = make(conj_sym=conj_sym, d_out=d_out)
    u, delta, x = normal(L, H), gaps(L) + 0.01, complex_normal(len(p["log_dt"]))
    states, want = equations(p, u, x, delta, rule, conj_sym)
    given: dict[str, Any] = {"conj_sym": conj_sym}
    if rule != "async":  # which is the default
        given["discretization"] = rule
    for mode in ("scan", "recurrent", "auto"):
        got = event_ssm.scan(p, u, x, integration_timesteps=delta, mode=mode, **given)
        assert_agree(got, (want, states[-1]), EXACT, mode)
    for k in range(L):
        y, x = event_ssm.step(p, u[k], x, integration_timestep=delta[k], **given)
        assert_agree((y, x), (want[k], states[k]), EXACT, f"step {k}")


def test_the_default_rule_gives_every_event_the_same_gain() -> None:
    p, u = make(), normal(1, H)
    near, _ = event_ssm.scan(p, u, integration_timesteps=torch.tensor([0.0], dtype=F64))
    far, _ = event_ssm.scan(p, u, integration_timesteps=torch.tensor([1e6], dtype=F64))
    assert_agree(near, far, EXACT)  # an event after any silence writes what it always writes
    _, gain = event_ssm.discretize(p, integration_timesteps=gaps(7))
    assert gain.shape == (P // 2, H)
    assert_agree(gain, s5.discretize(p)[1], EXACT)  # the zero-order hold of S5
    zoh, _ = event_ssm.scan(
        p, u, integration_timesteps=torch.tensor([1e-9], dtype=F64), discretization="zoh"
    )
    assert error(zoh, p["D"] * u) < 1e-6  # which the gap scales


def test_constant_gaps_are_uniform_time_with_another_step() -> None:
    p, u = make(), normal(2, L, H)
    constant = torch.full((L,), 1.7, dtype=F64)
    for rule in ("zoh", "dirac"):
        got = event_ssm.scan(p, u, integration_timesteps=constant, discretization=rule)
        assert_agree(got, event_ssm.scan(p, u, dt_scale=1.7, discretization=rule), EXACT, rule)
        # the kernel of that step by convolution
        kernel = event_ssm.kernel(p, L, dt_scale=1.7, discretization=rule)
        by_kernel, _ = event_ssm.scan(p, u, dt_scale=1.7, discretization=rule, kernel=kernel)
        assert_agree(by_kernel, got[0], EXACT, rule)
    ones = torch.ones(L, dtype=F64)
    assert_agree(event_ssm.scan(p, u, integration_timesteps=ones), s5.scan(p, u), EXACT)


@pytest.mark.parametrize("rule", ["async", "dirac"])
def test_an_event_of_zero_input_merges_into_the_gap_after_it(rule: Any) -> None:
    p, u, delta = make(), normal(L, H), gaps(L) + 0.1
    silent = u.clone()
    silent[6] = 0
    merged, kept = delta.clone(), torch.arange(L) != 6
    merged[7] += merged[6]
    y, x = event_ssm.scan(p, silent, integration_timesteps=delta, discretization=rule)
    short = event_ssm.scan(
        p, u[kept], integration_timesteps=merged[kept], discretization=rule
    )  # fmt: skip
    assert_agree((y[kept], x), short, EXACT)


@pytest.mark.parametrize("rule", ["async", "dirac"])
def test_padding_by_events_of_zero_gap_and_input_leaves_the_state_alone(rule: Any) -> None:
    p, u, delta = make(), normal(L, H), gaps(L)
    longer, still = torch.cat([u, torch.zeros(5, H)]), torch.cat([delta, torch.zeros(5)])
    _, want = event_ssm.scan(p, u, integration_timesteps=delta, discretization=rule)
    _, got = event_ssm.scan(p, longer, integration_timesteps=still, discretization=rule)
    assert_agree(got, want, EXACT)


@every_rule
def test_bidirectional_reads_the_gaps_from_the_other_side(rule: str) -> None:
    p = make(bidirectional=True, d_out=2)
    u, delta, n = normal(2, L, H), gaps(2, L) + 0.1, 9
    zero = torch.zeros(P // 2, dtype=torch.complex128)
    other = p | {"C_re": p["C2_re"], "C_im": p["C2_im"], "D": torch.zeros_like(p["D"])}
    y, _ = event_ssm.scan(
        p, u, integration_timesteps=delta, discretization=rule, bidirectional=True,
        lengths=torch.tensor([L, n]),
    )  # fmt: skip
    for i, length in enumerate((L, n)):
        own, gap = u[i, :length], delta[i, :length]
        back = torch.cat([gap[1:], gap[:1]]).flip(0)  # the last event takes the first gap
        want = equations(p, own, zero, gap, rule, True)[1]
        want = want + equations(other, own.flip(0), zero, back, rule, True)[1].flip(0)
        assert_agree(y[i, :length], want, EXACT)
        assert not y[i, length:].any()


def test_the_frequency_response_is_the_sum_of_the_kernel_and_the_feedthrough() -> None:
    p, omega = make(d_out=2), torch.tensor([0.0, 0.3, -2.0], dtype=F64)
    p["Lambda_re"] = -p["Lambda_re"].abs() - 1.0
    K = event_ssm.kernel(p, 6000)
    turns = torch.exp(-1j * omega[:, None] * torch.arange(6000))
    want = torch.einsum("wt,toh->woh", turns, K + 0j) + p["D"]
    assert_agree(event_ssm.frequency_response(p, omega), want, 1e-10)


@pytest.fixture(scope="module")
def s5_package() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script at import
        return pytest.importorskip("s5")


def test_zoh_over_gaps_agrees_with_s5_pytorch(s5_package: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        layer = s5_package.S5(H, P, block_count=2)
    seq = layer.seq
    parts = {
        "Lambda": seq.Lambda.detach(),
        "B": torch.view_as_complex(seq.B.detach()),
        "C": seq.C.detach()[:, :P],
    }
    p = {f"{k}_re": v.real.double() for k, v in parts.items()}
    p |= {f"{k}_im": v.imag.double() for k, v in parts.items()}
    p |= {"log_dt": seq.log_step.detach().reshape(-1).double(), "D": seq.D.detach().double()}
    u, delta = normal(2, L, H), gaps(2, L) + 0.2
    with torch.no_grad():
        want, states = layer(u.float(), step_scale=delta.float(), return_state=True)
    got = event_ssm.scan(
        p, u, integration_timesteps=delta, discretization="zoh", conj_sym=False
    )  # fmt: skip
    assert_agree(got, (want.double(), states.to(torch.complex128)), 5e-6)


# ------------------------------------------------------------------------------ initial values


def test_initial_values_are_those_of_the_authors_configurations() -> None:
    p = event_ssm.init(64, 256, blocks=8, d_out=160, generator=torch.Generator().manual_seed(0))
    one = s5.init(1, 32)
    assert torch.equal(p["Lambda_im"].view(8, 16), one["Lambda_im"].expand(8, 16))
    assert (p["Lambda_re"] == -0.5).all()
    steps = p["log_dt"].exp()
    assert 4e-3 <= steps.min() < 8e-3
    assert 0.05 < steps.max() <= 0.1
    assert {k: tuple(v.shape) for k, v in p.items() if k[0] in "BCD"} == {
        "B_re": (128, 64), "B_im": (128, 64), "C_re": (160, 128), "C_im": (160, 128),
        "D": (160, 64),
    }  # fmt: skip
    # E|C|^2 a state: two parts of deviation 1/sqrt(P H_out), of which V has orthonormal columns
    assert p["C_re"].square().mean().sqrt().item() == pytest.approx((256 * 160) ** -0.5, rel=0.03)
    assert p["D"].std().item() == pytest.approx(math.sqrt(2 / (160 + 64)), rel=0.03)
    assert event_ssm.init(64, 8)["D"].shape == (64,)
    same = event_ssm.init(4, 8, d_out=4, generator=torch.Generator().manual_seed(1))
    assert same["D"].shape == (4,)
    drawn = s5.init(
        4, 8, C_init="lecun_normal", dt_min=4e-3, generator=torch.Generator().manual_seed(1)
    )
    assert_agree(same, drawn, 0.0)


def test_init_refuses_what_cannot_be() -> None:
    for bad in (0, 2.0, True):
        with pytest.raises(ValueError, match=r"event_ssm.init: d_out = .*expected an integer >= 1"):
            event_ssm.init(4, 8, d_out=bad)
    with pytest.raises(ValueError, match=r"event_ssm.init: d_state = 7 with blocks = 1.*even"):
        event_ssm.init(4, 7)
    with pytest.raises(ValueError, match=r"d_state = 6 with blocks = 2, conj_sym = True.*even"):
        event_ssm.init(4, 6, blocks=2)
    assert event_ssm.init(4, 7, conj_sym=False)["log_dt"].shape == (7,)


def test_log_dt_trains_with_the_rest_as_published() -> None:
    layer = EventSSM(4, 8, d_out=6)
    groups = {g["name"]: {id(p) for p in g["params"]} for g in param_groups(layer, lr=1e-2)}
    ssm = {k for k, v in layer.named_parameters() if id(v) in groups["ssm"]}
    assert ssm == {"Lambda_re", "Lambda_im", "B_re", "B_im"}


# ------------------------------------------------------------------------------------- pooling


@every_rule
@both_halves
@every_pooling
@both_samplings
def test_pooling_is_the_equations_read_once_a_group(
    rule: Any, conj_sym: bool, pooling: Any, compat: Any
) -> None:
    p = make(conj_sym=conj_sym, d_out=5)
    u, delta, x = normal(2, L, H), gaps(2, L), complex_normal(2, len(p["log_dt"]))
    start = PooledState(x, Pending(u[:, :0], delta[:, :0]))
    for mode in ("auto", "scan", "recurrent"):
        got, state = event_ssm.pooled_scan(
            p, u, start, stride=S, pooling=pooling, compat=compat, integration_timesteps=delta,
            discretization=rule, conj_sym=conj_sym, mode=mode,
        )  # fmt: skip
        assert got.lengths is None
        for i in range(2):
            y, time, h = pooled_equations(
                p, u[i], x[i], delta[i], rule, conj_sym, pooling, compat
            )  # fmt: skip
            assert_agree(got.y[i], y, EXACT, mode)
            assert_agree(got.integration_timesteps[i], time, EXACT, mode)
            assert_agree(state.h[i], h, EXACT, mode)
        assert torch.equal(state.pending.x, u[:, 12:])
        assert torch.equal(state.pending.timesteps, delta[:, 12:])


def pooled(p: dict[str, Tensor], u: Tensor, state: Any = None, **options: Any) -> Any:
    options.setdefault("stride", S)
    return event_ssm.pooled_scan(p, u, state, **options)


@both_samplings
def test_pooling_by_last_reads_the_outputs_of_the_plain_model(compat: Any) -> None:
    p, u, delta = make(), normal(2, L, H), gaps(2, L)
    want, _ = event_ssm.scan(p, u, integration_timesteps=delta)
    got, _ = pooled(p, u, integration_timesteps=delta, pooling="last", compat=compat)
    assert_agree(got.y, want[:, 0:12:S] if compat else want[:, S - 1 : 12 : S], EXACT)


@every_pooling
def test_groups_of_one_are_the_plain_model(pooling: Any) -> None:
    p, u, delta = make(d_out=2), normal(2, L, H), gaps(2, L)
    got, state = pooled(p, u, integration_timesteps=delta, stride=1, pooling=pooling)
    want = event_ssm.scan(p, u, integration_timesteps=delta)
    assert_agree((got.y, state.h), want, EXACT)
    assert torch.equal(got.integration_timesteps, delta)
    assert state.pending.x.shape == (2, 0, H)


def test_without_gaps_they_are_one() -> None:
    p, u = make(), normal(2, L, H)
    got = pooled(p, u)
    want = pooled(p, u, integration_timesteps=torch.ones(L, dtype=F64))
    assert_agree(got[0].y, want[0].y, EXACT)
    assert_agree(got[1].h, want[1].h, EXACT)
    assert (got[0].integration_timesteps == S).all()
    assert got[0].integration_timesteps.shape == (2, 3)
    # and they stay one for the events that wait, should the next chunk bring others
    later = gaps(2, 6)
    mixed, _ = pooled(p, normal(2, 6, H, seed=4), got[1], integration_timesteps=later)
    assert_agree(
        mixed.integration_timesteps,
        torch.stack([2 + later[:, :2].sum(1), later[:, 2:].sum(1)], dim=1),
        EXACT,
    )


def test_gaps_of_one_after_others_are_one() -> None:
    p, u, delta = make(), normal(2, L, H), gaps(2, L)
    _, state = pooled(p, u, integration_timesteps=delta)
    bare = pooled(p, u, state)
    want = pooled(p, u, state, integration_timesteps=torch.ones(L, dtype=F64))
    for a, b in zip(tree_leaves(bare), tree_leaves(want), strict=True):
        assert_agree(a, b, EXACT)


def join(parts: list[Pooled]) -> tuple[Tensor, Tensor]:
    return (
        torch.cat([part.y for part in parts], dim=-2),
        torch.cat([part.integration_timesteps for part in parts], dim=-1),
    )


@every_pooling
@both_samplings
@pytest.mark.parametrize("timed", [True, False], ids=["gaps", "uniform"])
def test_any_split_of_a_stream_pools_as_the_whole(pooling: Any, compat: Any, timed: bool) -> None:
    p, u, delta = make(), normal(2, L, H), gaps(2, L)
    options = {"pooling": pooling, "compat": compat}

    def run(cuts: list[int]) -> Any:
        state, parts, at = None, [], 0
        for n in cuts:
            given = {"integration_timesteps": delta[:, at : at + n]} if timed else {}
            out, state = pooled(p, u[:, at : at + n], state, **options, **given)
            parts.append(out)
            at += n
        return join(parts), state

    (y, time), last = run([L])
    for cuts in [[k, L - k] for k in range(L + 1)] + [[1] * L, [3, 0, 5, 1, 5], [0, 2, 1, 11]]:
        (got, elapsed), state = run(cuts)
        assert_agree(got, y, EXACT, str(cuts))
        assert_agree(elapsed, time, EXACT, str(cuts))
        for a, b in zip(tree_leaves(state), tree_leaves(last), strict=True):
            assert_agree(a, b, EXACT, str(cuts))


def test_a_stream_from_the_zero_state_is_one_from_none() -> None:
    p, u = make(), normal(2, L, H)
    zero = event_ssm.init_pooled_state(p, (2,))
    assert zero.h.shape == (2, P // 2)
    for a, b in zip(tree_leaves(pooled(p, u, zero)), tree_leaves(pooled(p, u)), strict=True):
        assert_agree(a, b, EXACT)
    wide = event_ssm.init_pooled_state({k: v.float() for k, v in p.items()}, dtype=F64)
    assert wide.h.dtype == torch.complex128
    assert wide.pending.x.shape == (0, H)


LENGTHS = [14, 7, 0, 3, 4, 12]


@every_rule
@every_pooling
@pytest.mark.parametrize("waiting", [0, 3])
def test_padded_rows_pool_as_the_rows_alone(rule: Any, pooling: Any, waiting: int) -> None:
    p, u, delta = make(d_out=2), normal(6, L, H), gaps(6, L)
    state = PooledState(
        complex_normal(6, P // 2), Pending(normal(6, waiting, H, seed=8), gaps(6, waiting, seed=9))
    )
    for poison in (0.0, float("nan"), float("inf")):
        dirty, lost = u.clone(), delta.clone()
        for i, n in enumerate(LENGTHS):
            dirty[i, n:], lost[i, n:] = poison, poison
        got, last = pooled(
            p, dirty, state, integration_timesteps=lost, lengths=torch.tensor(LENGTHS),
            pooling=pooling, discretization=rule,
        )  # fmt: skip
        assert got.lengths.tolist() == [(waiting + n) // S for n in LENGTHS]
        assert last.pending.x.shape == (6, 0, H)
        for i, n in enumerate(LENGTHS):
            own = tree_map(lambda t, i=i: t[i], state)
            want, end = pooled(
                p, u[i, :n], own, integration_timesteps=delta[i, :n], pooling=pooling,
                discretization=rule,
            )  # fmt: skip
            m = want.y.shape[0]
            assert m == got.lengths[i]
            assert_agree(got.y[i, :m], want.y, EXACT)
            assert_agree(got.integration_timesteps[i, :m], want.integration_timesteps, EXACT)
            assert_agree(last.h[i], end.h, EXACT)
            assert not got.y[i, m:].any()
            assert not got.integration_timesteps[i, m:].any()


def test_what_a_mask_hides_is_as_if_it_were_not_there() -> None:
    p, u, delta = make(), normal(2, L, H), gaps(2, L)
    mask = normal(2, L, seed=7) > -0.3
    got, last = pooled(
        p, torch.where(mask[..., None], u, float("nan")), mask=mask, integration_timesteps=delta,
        lengths=torch.tensor([L, 10]),
    )  # fmt: skip
    for i, n in enumerate((L, 10)):
        kept = mask[i] & (torch.arange(L) < n)
        want, end = pooled(p, u[i, kept], integration_timesteps=delta[i, kept])
        m = want.y.shape[0]
        assert got.lengths[i] == m >= 1
        assert_agree(got.y[i, :m], want.y, EXACT)
        assert_agree(got.integration_timesteps[i, :m], want.integration_timesteps, EXACT)
        assert_agree(last.h[i], end.h, EXACT)
        assert not got.y[i, m:].any()


def test_gradients_do_not_see_what_stands_in_padding() -> None:
    p, n = make(), torch.tensor([9, 4])
    results = []
    for poison in (0.0, float("nan")):
        u, delta = normal(2, L, H), gaps(2, L)
        for i in range(2):
            u[i, n[i] :], delta[i, n[i] :] = poison, poison
        u, delta = u.requires_grad_(), delta.requires_grad_()
        q = {k: v.clone().requires_grad_() for k, v in p.items()}
        out, state = pooled(q, u, integration_timesteps=delta, lengths=n, pooling="time_weighted")
        loss = out.y.square().sum() + state.h.abs().square().sum()
        results.append(torch.autograd.grad(loss, [u, delta, *q.values()]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_only_what_is_read_is_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    p, u, seen = make(), normal(2, L, H), []
    plain = _mimo.read

    def watched(params: Any, key: str, h: Tensor, scale: float) -> Tensor:
        seen.append(tuple(h.shape))
        return plain(params, key, h, scale)

    monkeypatch.setattr(_mimo, "read", watched)
    pooled(p, u)
    assert seen == [(2, 3, P)]  # [re | im] halves of P // 2 states


def test_the_skip_pools_as_the_feedthrough_does() -> None:
    p, u, delta = make(), normal(2, L, H), gaps(2, L)
    p["C_re"], p["C_im"] = torch.zeros_like(p["C_re"]), torch.zeros_like(p["C_im"])
    p["D"] = torch.ones_like(p["D"])
    for pooling in POOLINGS:
        for compat in (None, "event_ssm"):
            options: dict[str, Any] = {"stride": S, "pooling": pooling, "compat": compat}
            for given in (
                {},
                {"integration_timesteps": delta},
                {"integration_timesteps": delta, "lengths": torch.tensor([L, 6])},
                {"mask": delta > 0.5},
            ):
                want, state = event_ssm.pooled_scan(p, u, **options, **given)
                got, pending = event_ssm.pool(u, **options, **given)
                for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
                    assert_agree(a, b, EXACT)
                assert_agree(pending, state.pending, EXACT)


def test_the_time_weighted_mean_of_simultaneous_events_is_their_mean() -> None:
    x = normal(2, 8, H)
    still = torch.zeros(2, 8, dtype=F64)
    got, _ = event_ssm.pool(x, stride=4, pooling="time_weighted", integration_timesteps=still)
    assert_agree(got.y, x.unflatten(1, (2, 4)).mean(2), EXACT)
    # and all of the weight goes to the one event that anything elapsed before
    still[:, 2] = 1e9
    got, _ = event_ssm.pool(x, stride=4, pooling="time_weighted", integration_timesteps=still)
    assert_agree(got.y[:, 0], x[:, 2], 1e-12)


def test_the_state_keeps_no_view_of_a_long_sequence() -> None:
    p, u = make(), normal(401, H)
    _, state = pooled(p, u)
    for t in tree_leaves(state):
        assert t.untyped_storage().nbytes() <= 4 * t.nbytes + 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_narrow_inputs_are_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    p = {k: v.float() for k, v in make().items()}
    u, delta = normal(2, L, H).to(dtype), gaps(2, L).float()
    for pooling in POOLINGS:
        want, end = pooled(p, u.double(), integration_timesteps=delta.double(), pooling=pooling)
        got, state = pooled(p, u, integration_timesteps=delta, pooling=pooling)
        assert got.y.dtype == dtype
        assert got.integration_timesteps.dtype == torch.float32
        assert state.h.dtype == torch.complex64
        assert state.pending.x.dtype == dtype
        assert_agree(got.y, want.y, 8e-3 if dtype == torch.bfloat16 else 1e-5)
        assert_agree(state.h, end.h, 1e-5)


@every_rule
@every_pooling
def test_gradients_of_pooling_are_right(rule: Any, pooling: Any) -> None:
    p = make(spread=0.3, d_out=2)
    keys = list(p)
    u, delta = normal(6, H), gaps(6) + 0.1
    h, waits, gap = complex_normal(P // 2), normal(1, H, seed=8), gaps(1, seed=9) + 0.1

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        u, delta, h, waits, gap, *rest = x
        out, state = event_ssm.pooled_scan(
            dict(zip(keys, rest, strict=True)), u, PooledState(h, Pending(waits, gap)), stride=2,
            pooling=pooling, integration_timesteps=delta, discretization=rule,
        )  # fmt: skip
        return (
            out.y,
            out.integration_timesteps,
            torch.view_as_real(state.h),
            *state.pending,
        )

    inputs = [x.detach().requires_grad_() for x in (u, delta, h, waits, gap, *p.values())]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_pooling_maps_and_differentiates_as_a_loop_does() -> None:
    p, u, delta = make(), normal(3, L, H), gaps(3, L)
    n = torch.tensor([14, 9, 3])

    def loss(p: Any, u: Tensor, delta: Tensor, n: Tensor) -> Tensor:
        out, state = pooled(p, u, integration_timesteps=delta, lengths=n)
        return out.y.square().sum() + state.h.abs().square().sum()

    whole, _ = pooled(p, u, integration_timesteps=delta, lengths=n)
    mapped = vmap(lambda u, d, n: pooled(p, u, integration_timesteps=d, lengths=n)[0])(u, delta, n)
    assert_agree(mapped.y, whole.y, EXACT)
    got = vmap(grad(loss), (None, 0, 0, 0))(p, u, delta, n)
    for i in range(3):
        want = grad(loss)(p, u[i], delta[i], n[i])
        assert_agree({k: v[i] for k, v in got.items()}, want, 1e-11)
    direction = normal(3, L, seed=6)
    _, tangent = jvp(
        lambda d: pooled(p, u, integration_timesteps=d, lengths=n)[0].y, (delta,), (direction,)
    )
    step = 1e-6
    ahead, back = (
        pooled(p, u, integration_timesteps=delta + s * direction, lengths=n)[0].y
        for s in (step, -step)
    )
    assert_agree(tangent, (ahead - back) / (2 * step), 1e-7)


def test_pooling_compiles_whole() -> None:
    p, u, delta = make(), normal(2, L, H), gaps(2, L)
    n = torch.tensor([14, 9])
    run = torch.compile(event_ssm.pooled_scan, fullgraph=True, backend="aot_eager")
    for given in ({}, {"lengths": n}):
        got = run(p, u, stride=S, integration_timesteps=delta, **given)
        want = pooled(p, u, integration_timesteps=delta, **given)
        for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
            assert_agree(a, b, 1e-11)


def test_pooling_runs_on_the_meta_device() -> None:
    p = event_ssm.init(H, P, device="meta")
    out, state = pooled(p, torch.empty(2, L, H, device="meta"))
    assert out.y.shape == (2, 3, H)
    assert state.pending.x.shape == (2, 2, H)


def test_pooling_refuses_what_has_no_meaning() -> None:
    p, u = make(), normal(2, L, H)
    state = event_ssm.init_pooled_state(p, (2,))

    def refuses(message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            event_ssm.pooled_scan(*args, **{"stride": S, **options})

    for bad in (0, -1, 2.0, True):
        refuses("pooled_scan: stride = .*expected an integer >= 1", p, u, stride=bad)
    refuses(r"pooling = 'max', expected one of \('last', 'mean', 'time_w", p, u, pooling="max")
    refuses("compat = 's5', expected one of", p, u, compat="s5")
    refuses("mode = 'conv', expected one of", p, u, mode="conv")
    refuses("event_ssm.pooled_scan: unknown discretization 'foh'", p, u, discretization="foh")
    refuses(r"u \(2, 14, 2\), expected .* H = 3", p, u[..., :2])
    refuses(r"lengths \(3,\) does not fit u", p, u, lengths=torch.tensor([1, 2, 3]))
    refuses(r"state \(3, 4\), expected \(2, 4\)", p, u, event_ssm.init_pooled_state(p, (3,)))
    waiting = Pending(u[:, :S], torch.ones(2, S, dtype=F64))
    refuses(r"waiting are x \(2, 4, 3\).*w < stride = 4", p, u, state._replace(pending=waiting))
    waiting = Pending(u[:, :2], torch.ones(2, 1, dtype=F64))
    refuses(r"waiting are x \(2, 2, 3\) and timesteps \(2, 1\)", p, u,
            state._replace(pending=waiting))  # fmt: skip
    meta = Pending(*(t.to("meta") for t in state.pending))
    refuses("what waits is on meta and u on cpu", p, u, state._replace(pending=meta))
    with pytest.raises(ValueError, match=r"event_ssm.pool: x \(3,\) torch.float64, expected"):
        event_ssm.pool(u[0, 0], stride=S)
    with pytest.raises(ValueError, match=r"event_ssm.pool: x .* torch.int64, expected"):
        event_ssm.pool(u.long(), stride=S)
    with pytest.raises(ValueError, match=r"event_ssm.pool: stride = 0"):
        event_ssm.pool(u, stride=0)


# ------------------------------------------------------------------------------------- Modules


def test_the_pooling_layer_is_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = EventPooling(
        H, P, "dirac", stride=S, pooling="time_weighted", compat="event_ssm", d_out=5, blocks=2,
        clip_eigs=True, dtype=F64,
    )  # fmt: skip
    u, delta, n = normal(2, L, H), gaps(2, L), torch.tensor([14, 9])
    want, end = event_ssm.pooled_scan(
        layer.params, u, stride=S, pooling="time_weighted", compat="event_ssm",
        integration_timesteps=delta, discretization="dirac", clip_eigs=True, lengths=n,
        dt_scale=1.5,
    )  # fmt: skip
    given = {"integration_timesteps": delta, "lengths": n, "dt_scale": 1.5}
    got, state = layer.prefill(u, layer.init_state((2,)), **given)
    for result in (got, layer(u, **given)):
        for a, b in zip(result, want, strict=True):
            assert_agree(a, b, EXACT)
    assert_agree(state.h, end.h, EXACT)
    slow = EventPooling(
        H, P, "dirac", stride=S, pooling="time_weighted", compat="event_ssm", d_out=5, blocks=2,
        clip_eigs=True, dtype=F64, use_fast_path=False,
    )  # fmt: skip
    slow.load_state_dict(layer.state_dict())
    plain, calls = reference.linear_scan, []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(reference, "linear_scan", counted)
    assert_agree(slow(u, **given).y, want.y, EXACT)
    assert len(calls) == 1  # the loop of the specification
    layer(u, **given)
    assert len(calls) == 1
    assert layer.d_output == 5
    assert EventSSM(H, P).d_output == H
    assert "stride=4, pooling='time_weighted', compat='event_ssm'" in repr(layer)
    assert {k for k, v in layer.bfloat16().params.items() if v.dtype != F64} == set()


def test_the_pooling_layer_refuses_what_it_cannot_do() -> None:
    layer = EventPooling(H, P, stride=S)
    with pytest.raises(ValueError, match=r"after every 4 events; give prefill u \(..., 1, H\)"):
        layer.step(torch.randn(H), layer.init_state())
    for option in ({"bidirectional": True}, {"mode": "conv"}):
        with pytest.raises(ValueError, match=f"EventPooling has no option '{next(iter(option))}'"):
            EventPooling(H, P, stride=S, **option)
    with pytest.raises(ValueError, match="EventPooling: stride = 0"):
        EventPooling(H, P, stride=0)
    with pytest.raises(ValueError, match="EventPooling has no option 'widht'"):
        EventPooling(H, P, stride=S, widht=2)
    with pytest.raises(ValueError, match="integration_timesteps: -1 at"):
        layer(torch.randn(2, H), integration_timesteps=torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"lengths: between 0 and 3, expected 0 ... 2"):
        layer(torch.randn(2, 2, H), lengths=torch.tensor([0, 3]))


def test_the_pooling_layer_says_once_that_it_is_unstable() -> None:
    layer = EventPooling(H, P, stride=S).eval()
    with torch.no_grad():
        layer.Lambda_re.fill_(0.5)
        with pytest.warns(checks.StabilityWarning):
            layer(torch.randn(L, H))
        layer(torch.randn(L, H))  # a second warning would be an error


def test_a_block_with_outputs_of_another_width_needs_an_activation_that_projects() -> None:
    block = Block(H, EventSSM(H, P, d_out=5), activation="full_glu")
    assert block(torch.randn(2, 6, H)).shape == (2, 6, H)
    with pytest.raises(ValueError, match="the mixer gives 5 channels and the block has 3"):
        Block(H, EventSSM(H, P, d_out=5), activation="half_glu2")


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("d_out", [None, 5])
def test_the_pooling_block_is_the_published_layer(prenorm: bool, d_out: int | None) -> None:
    mixer = EventPooling(H, P, stride=S, d_out=d_out, pooling="mean")
    block = EventPoolingBlock(H, mixer, prenorm=prenorm).double().eval()
    x, delta = normal(2, L, H), gaps(2, L)
    got = block(x, integration_timesteps=delta)

    norm = block.norm
    before = norm(x) if prenorm else x
    y, _ = event_ssm.pooled_scan(
        mixer.params, before, stride=S, pooling="mean", integration_timesteps=delta
    )
    gate = block.activation.gate
    assert gate is not None
    # the gate is on the raw output of the state space
    y_gated = y.y * torch.sigmoid(gate(F.gelu(y.y, approximate="tanh")))
    skip = x[:, :12].unflatten(1, (3, S)).mean(2)
    skip = skip @ block.skip.weight.T + block.skip.bias if d_out else skip
    want = skip + y_gated
    assert_agree(got.y, want if prenorm else norm(want), EXACT)
    assert_agree(got.integration_timesteps, delta[:, :12].unflatten(1, (3, S)).sum(2), EXACT)


def stage(**options: Any) -> EventStage:
    settings: dict[str, Any] = {"n_layer": 3, "stride": S, "d_out": 6, "blocks": 2}
    return EventStage(H, P, **{**settings, **options}).double().eval()


@pytest.mark.parametrize("options", [{}, {"prenorm": False}, {"norm": "batch"}, {"stride": 1}])
def test_any_split_of_a_stream_through_two_stages_is_the_whole(options: dict[str, Any]) -> None:
    first, second = stage(**options), EventStage(6, P, n_layer=2, stride=2).double().eval()
    u, delta = normal(2, 30, H), gaps(2, 30)

    def run(u: Tensor, delta: Tensor, states: Any) -> Any:
        out, one = first.prefill(u, states[0], integration_timesteps=delta)
        out, two = second.prefill(out.y, states[1], integration_timesteps=out.integration_timesteps)
        return out, (one, two)

    with torch.no_grad():
        whole, end = run(u, delta, (None, None))
        at_once = second(*(x := first(u, integration_timesteps=delta))[:1],
                         integration_timesteps=x.integration_timesteps)  # fmt: skip
        assert_agree(at_once.y, whole.y, EXACT)
        zero = first.init_state((2,)), second.init_state((2,))
        for cuts in ([30], [1] * 30, [7, 0, 16, 3, 4]):
            states, parts = zero, []
            for n, m in zip(u.split(cuts, 1), delta.split(cuts, 1), strict=True):
                out, states = run(n, m, states)
                parts.append(out)
            got = join(parts)
            assert_agree(got, tuple(whole[:2]), 1e-11, str(cuts))
            for a, b in zip(tree_leaves(states), tree_leaves(end), strict=True):
                assert_agree(a, b, 1e-11)


@pytest.mark.parametrize(("norm", "n_layer"), [("layer", 3), ("batch", 3), ("layer", 1)])
def test_padded_rows_of_a_stage_are_the_rows_alone(norm: str, n_layer: int) -> None:
    net, n = stage(norm=norm, n_layer=n_layer), [14, 9, 3]
    u, delta = normal(3, L, H), gaps(3, L)
    got = net(u, integration_timesteps=delta, lengths=torch.tensor(n))
    assert got.lengths.tolist() == [3, 2, 0]
    mask = torch.arange(L) < torch.tensor(n)[:, None]
    masked = net(u, integration_timesteps=delta, mask=mask)
    assert masked.lengths.tolist() == [3, 2, 0]
    assert_agree(masked.y, got.y, EXACT)
    for i, length in enumerate(n):
        want = net(u[i, :length], integration_timesteps=delta[i, :length])
        m = want.y.shape[0]
        assert_agree(got.y[i, :m], want.y, EXACT)
        assert not got.y[i, m:].any()


def test_every_parameter_of_a_stage_learns_and_can_be_drawn_again() -> None:
    net = stage(dropout=0.1).train()
    out = net(normal(4, 40, H), integration_timesteps=gaps(4, 40))
    out.y.square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    before = {k: v.clone() for k, v in net.state_dict().items()}
    twin = copy.deepcopy(net)
    net.reset_parameters()
    same = [k for k, v in net.state_dict().items() if torch.equal(v, before[k])]
    # what starts as a constant is the same again
    assert all(k.split(".")[-1] in ("Lambda_re", "Lambda_im") or ".norm." in k for k in same)
    twin.load_state_dict(net.state_dict())
    u = normal(2, 9, H)
    assert torch.equal(twin.eval()(u).y, net.eval()(u).y)
    groups = {g["name"]: len(g["params"]) for g in param_groups(net, lr=1e-2)}
    assert groups["ssm"] == 3 * 4


def test_stages_refuse_sizes_and_widths_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="EventStage: n_layer = 0, expected an integer >= 1"):
        EventStage(H, P, n_layer=0, stride=2)
    with pytest.raises(ValueError, match="EventPoolingBlock: d_model = 4, and the mixer's is 3"):
        EventPoolingBlock(4, EventPooling(H, P, stride=2))
    with pytest.raises(ValueError, match=r"EventPoolingBlock: u \(3,\), expected \(..., L, H\)"):
        EventPoolingBlock(H, EventPooling(H, P, stride=2))(torch.randn(H))
    with pytest.raises(ValueError, match="has no option 'widht'"):
        EventStage(H, P, n_layer=2, stride=2, widht=1)
