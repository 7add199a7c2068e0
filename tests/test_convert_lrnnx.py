"""Weights of the published lrnnx package: our layers compute what its formulas say, in float64.

The package needs a CUDA build to import, so its recurrences stand here as plain loops over tensors
in its layout.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import assert_agree, error, gaps, normal
from torch import Tensor
from torch.nn import functional as F

from lrnnx_nn import LRU, RGLRU, S4, S4D, S5, S7, STREAM, Centaurus, EventSSM, Mamba
from lrnnx_nn.convert import from_lrnnx

H, N, L, M = 3, 4, 11, 2
EXACT = 1e-10
Weights = dict[str, Tensor]


def inputs() -> Tensor:
    return normal(2, L, H, seed=8)


def named(**shapes: tuple[int, ...]) -> Weights:
    """Return random float64 tensors, a small number each."""
    return {k: 0.4 * normal(*s, seed=20 + i) for i, (k, s) in enumerate(shapes.items())}


def run(a: Tensor, b: Tensor) -> Tensor:
    """Return h_t = a_t h_{t-1} + b_t along axis 1 of b (B, L, ...)."""
    h, out = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = (a if a.ndim < b.ndim - 1 else a[:, t]) * h + b[:, t]
        out.append(h)
    return torch.stack(out, dim=1)


def as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.contiguous())


def gain(scheme: str, A: Tensor, dt: Tensor) -> Tensor:
    """Return gamma of lrnnx's names for the schemes."""
    table = {
        "zoh": lambda: (torch.exp(dt * A) - 1) / A,
        "bilinear": lambda: dt / (1 - dt * A / 2),
        "dirac": lambda: torch.ones_like(dt * A),
        "mamba": lambda: dt + 0 * A,
    }
    return table[scheme]()


def decay(scheme: str, A: Tensor, dt: Tensor) -> Tensor:
    return (1 + dt * A / 2) / (1 - dt * A / 2) if scheme == "bilinear" else torch.exp(dt * A)


def check(layer: Any, weights: Weights, want: Tensor, left: set[str] | None = None) -> None:
    """Load under a prefix, beside other tensors, and compare; `left` is what comes back."""
    others = {"backbone.layers.1.mixer.A_log": torch.zeros(1)}
    file = {f"backbone.layers.0.mixer.{k}": v for k, v in weights.items()} | others
    rest = from_lrnnx(file, layer, "backbone.layers.0.mixer.")
    assert set(rest) == (left or set())
    assert_agree(layer(inputs()), want, EXACT)


# ------------------------------------------------------------------------------ time-invariant


def test_lru() -> None:
    w = named(nu_log=(N,), theta_log=(N,), gamma_log=(N,), B_re=(N, H), B_im=(N, H), C_re=(H, N),
              C_im=(H, N), D=(H,))  # fmt: skip
    u = inputs()
    a = torch.exp(-w["nu_log"].exp() + 1j * w["theta_log"].exp())
    b = w["gamma_log"].exp() * (u.to(a.dtype) @ (w["B_re"] + 1j * w["B_im"]).mT)
    want = (run(a, b) @ (w["C_re"] + 1j * w["C_im"]).mT).real + w["D"] * u
    check(LRU(H, N, dtype=torch.float64), w, want)


def s5_lti() -> Weights:
    return named(A=(N, 2), B=(N, H), log_dt=(N,), C=(H, N, 2), D=(H, H))


def run_s5_lti(w: Weights, u: Tensor, scheme: str) -> Tensor:
    A = -F.softplus(w["A"][:, 0]) + 1j * w["A"][:, 1]
    dt = w["log_dt"].exp()
    if scheme == "swapped":
        a, gamma = (1 - dt * A / 2) / (1 + dt * A / 2), dt / (1 + dt * A / 2)
    else:
        a, gamma = decay(scheme, A, dt), gain(scheme, A, dt)
    h = run(a, gamma * (u @ w["B"].mT))
    return (h @ as_complex(w["C"]).mT).real + u @ w["D"]


@pytest.mark.parametrize("scheme", ["zoh", "dirac"])
def test_s5_time_invariant(scheme: str) -> None:
    w = s5_lti()
    layer = S5(H, N, scheme, conj_sym=False, dense_D=True, dtype=torch.float64)
    check(layer, w, run_s5_lti(w, inputs(), scheme))


def test_s5_exchanged_signs_are_reproduced_or_corrected_by_choice() -> None:
    w, u = s5_lti(), inputs()
    layer = S5(H, N, "bilinear", conj_sym=False, dense_D=True, dtype=torch.float64)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError, match="exchanges the signs of the bilinear transform"):
        from_lrnnx(w, layer)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    from_lrnnx(w, layer, swapped_bilinear=True)
    as_it_was = layer(u)
    assert_agree(as_it_was, run_s5_lti(w, u, "swapped"), EXACT)
    A_bar, _ = layer.model.discretize(layer.params, discretization="bilinear")
    assert (A_bar.abs() > 1).all()
    from_lrnnx(w, layer, swapped_bilinear=False)
    assert_agree(layer(u), run_s5_lti(w, u, "bilinear"), EXACT)
    assert error(layer(u), as_it_was) > 1e-2
    plain = S5(H, N, conj_sym=False, dense_D=True)
    with pytest.raises(ValueError, match="and only there, say"):
        from_lrnnx(w, plain, swapped_bilinear=True)


def test_s5_time_invariant_needs_its_form() -> None:
    with pytest.raises(ValueError, match="S5 of lrnnx has conj_sym = False built in"):
        from_lrnnx(s5_lti(), S5(H, 2 * N, dense_D=True))
    with pytest.raises(ValueError, match="S5 of lrnnx has dense_D = True built in"):
        from_lrnnx(s5_lti(), S5(H, N, conj_sym=False))


S4_FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"real_transform": "softplus", "imag_transform": "exp", "dt_transform": "softplus"}, {}),
    ({"real_transform": "relu"}, {"A_transform": "softplus"}),
    ({"real_transform": "sigmoid", "dt_transform": "sigmoid"}, {"dt_transform": "softplus"}),
    ({"dt_fast": True}, {"A_transform": "none"}),
    ({"dt_transform": "softplus"}, {"dt_transform": "softplus", "A_transform": "relu"}),
]
POSITIVE = {
    "none": lambda t: t, "exp": torch.exp, "softplus": F.softplus, "sigmoid": torch.sigmoid,
    "relu": lambda t: F.relu(t) + 1e-4,
}  # fmt: skip


def s4_weights(rank: int = 0, channels: int = 1, copies: int = H, steps: int = 1) -> Weights:
    """Return what S4 and S4D store for N states; every tensor of the kernel stands there twice."""
    half = N // 2
    shapes: dict[str, tuple[int, ...]] = {
        "A_real": (copies, half), "A_imag": (copies, half), "B": (1, copies, half, 2),
        "C": (channels, H, half, 2), "D": (channels, H), "inv_dt": (H, steps),
    }  # fmt: skip
    if rank:
        shapes["P"] = (rank, copies, half, 2)
    w = named(**shapes)
    twins = {f"layer.kernel.{k}": v for k, v in w.items() if k != "D"}
    return w | twins | {"layer.kernel.l_kernel": torch.tensor(0)} if rank else w | twins


def s4_system(w: Weights, **how: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dt (H, N/2 or 1), A, B (H, N/2) and C (Ch, H, N/2): channel h has copy h mod S."""
    A = -POSITIVE[how.get("real_transform", "exp")](w["A_real"])
    A = A - 1j * POSITIVE[how.get("imag_transform", "none")](w["A_imag"])
    raw = torch.sinh(w["inv_dt"]) if how.get("dt_fast") else w["inv_dt"]
    again = H // A.shape[0]
    B = as_complex(w["B"])[0]
    dt = POSITIVE[how.get("dt_transform", "exp")](raw)
    return dt, A.repeat(again, 1), B.repeat(again, 1), as_complex(w["C"])


def finish(w: Weights, y: Tensor, u: Tensor) -> Tensor:
    """Add D u to y (B, L, Ch, H), and put channels in front of features."""
    return (y + w["D"] * u.unsqueeze(-2)).flatten(-2)


@pytest.mark.parametrize("scheme", ["zoh", "bilinear"])
@pytest.mark.parametrize(("theirs", "ours"), S4_FORMS, ids=[str(i) for i in range(len(S4_FORMS))])
def test_s4d(theirs: dict[str, Any], ours: dict[str, Any], scheme: str) -> None:
    w, u = s4_weights(), inputs()
    if theirs.get("dt_transform") == "none":
        w["inv_dt"].abs_()
    dt, A, B, C = s4_system(w, **theirs)
    h = run(decay(scheme, A, dt), gain(scheme, A, dt) * B * u.unsqueeze(-1))
    want = finish(w, 2 * torch.einsum("chn,blhn->blch", C, h).real, u)
    layer = S4D(H, N, scheme, dtype=torch.float64, **ours)
    assert from_lrnnx(w, layer, **theirs) == {}
    assert_agree(layer(u), want, EXACT)


def test_s4d_of_copies_channels_and_untied_steps() -> None:
    w, u = s4_weights(channels=2, copies=1, steps=N // 2), inputs()
    w["output_linear.0.weight"] = normal(H, 2 * H)
    dt, A, B, C = s4_system(w)
    h = run(torch.exp(dt * A), gain("zoh", A, dt) * B * u.unsqueeze(-1))
    want = finish(w, 2 * torch.einsum("chn,blhn->blch", C, h).real, u)
    layer = S4D(H, N, channels=2, n_ssm=1, tied_dt=False, dtype=torch.float64)
    check(layer, w, want, {"output_linear.0.weight"})


def test_s4d_of_real_states() -> None:
    w, u = s4_weights(), inputs()
    del w["A_imag"], w["layer.kernel.A_imag"]
    for key in ("B", "C"):
        w[key] = w[f"layer.kernel.{key}"] = w[key][..., 0]
    A, dt = -w["A_real"].exp(), w["inv_dt"].exp()
    h = run(torch.exp(dt * A), gain("zoh", A, dt) * w["B"][0] * u.unsqueeze(-1))
    want = finish(w, 2 * torch.einsum("chn,blhn->blch", w["C"], h), u)
    check(S4D(H, N // 2, is_real=True, A_init="real", dtype=torch.float64), w, want)
    with pytest.raises(ValueError, match="S4D of lrnnx has is_real = True built in"):
        from_lrnnx(w, S4D(H, N))


def s4_dense(w: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Return A_bar (H, N, N), B_bar (H, N) and C (Ch, H, N) with both halves of every pair."""
    dt, A, B, C = s4_system(w)
    P = as_complex(w["P"]).repeat(1, H // w["P"].shape[1], 1)
    A, B, C, P = (torch.cat([t, t.conj()], dim=-1) for t in (A, B, C, P))
    full = torch.diag_embed(A) - torch.einsum("rhn,rhm->hnm", P, P.conj())
    eye = torch.eye(N, dtype=full.dtype)
    inverse = torch.linalg.inv(eye - dt.unsqueeze(-1) / 2 * full)
    return inverse @ (eye + dt.unsqueeze(-1) / 2 * full), (inverse @ (dt * B)[..., None])[..., 0], C


@pytest.mark.parametrize("wanted", [None, 16], ids=["C", "C~"])
@pytest.mark.parametrize("stored", [0, 7, 16])
@pytest.mark.parametrize(("rank", "channels", "copies"), [(1, 1, H), (2, 2, 1)])
def test_s4(rank: int, channels: int, copies: int, stored: int, wanted: int | None) -> None:
    w, u = s4_weights(rank, channels, copies), inputs()
    A_bar, B_bar, C = s4_dense(w)
    h, ys = torch.zeros(2, H, N, dtype=A_bar.dtype), []
    for t in range(L):
        h = torch.einsum("hnm,bhm->bhn", A_bar, h) + B_bar * u[:, t, :, None]
        ys.append(torch.einsum("chn,bhn->bch", C, h).real)
    want = finish(w, torch.stack(ys, dim=1), u)
    if stored:  # once it has run, its C is C (I - A_bar^L)
        powers = torch.linalg.matrix_power(A_bar, stored)
        truncated = C - torch.einsum("chn,hnm->chm", C, powers)
        w["C"] = w["layer.kernel.C"] = torch.view_as_real(truncated[..., : N // 2])
        w["layer.kernel.l_kernel"] = torch.tensor(stored)
    options = {"A_init": "legt"} if rank == 2 else {}
    if copies < H:
        options["n_ssm"] = copies
    layer = S4(H, N, rank=rank, channels=channels, l_kernel=wanted, dtype=torch.float64, **options)
    check(layer, w, want)


def test_s4_tensors_that_should_be_one_are_compared() -> None:
    w = s4_weights(1)
    w["layer.kernel.C"] = w["C"] + 1
    with pytest.raises(ValueError, match=r"C and layer\.kernel\.C differ"):
        from_lrnnx(w, S4(H, N))


@pytest.mark.parametrize("variant", ["neck", "pointwise", "dws", "full"])
def test_centaurus(variant: str) -> None:
    count = {"neck": 5, "pointwise": 5, "dws": H, "full": H * H}[variant]
    flat = count * M if variant == "pointwise" else count
    vector = variant in ("dws", "full")
    w = named(re=(count, M), im=(count, M), log_delta=(count,), E=(count, M),
              B=(count,) if vector else (flat, H), C=(count,) if vector else (H, flat))  # fmt: skip
    w["A"] = torch.complex(-w.pop("re").abs() - 0.1, 3 * w.pop("im"))
    if variant == "pointwise":
        del w["E"]
    u, dt = inputs(), w["log_delta"].exp()
    if variant == "dws":
        B, C = torch.diag(w["B"]), torch.diag(w["C"])
    elif variant == "full":  # state h_out H + h_in
        pairs = [(o, i) for o in range(H) for i in range(H)]
        B, C = torch.zeros(count, H).double(), torch.zeros(H, count).double()
        for n, (o, i) in enumerate(pairs):
            B[n, i], C[o, n] = w["B"][n], w["C"][n]
    else:
        B, C = w["B"], w["C"]
    drive = u @ B.mT
    if variant == "pointwise":
        drive = drive.unflatten(-1, (count, M))
    else:
        drive = drive.unsqueeze(-1).expand(-1, -1, -1, M)
    states = run(torch.exp(dt[:, None] * w["A"]), (dt[:, None] * drive).to(w["A"].dtype)).real
    mixed = states.flatten(-2) if "E" not in w else (states * w["E"]).sum(-1)
    sizes = (M, {}) if vector else (count, {"sub_state_dim": M})
    layer = Centaurus(H, sizes[0], variant=variant, dtype=torch.float64, **sizes[1])
    check(layer, w, mixed @ C.mT)
    other = Centaurus(H, M, variant="full" if variant == "dws" else "dws")
    with pytest.raises(ValueError, match=r"make the layer with the variant that lrnnx's mode was"):
        from_lrnnx(w, other)
    w["A"] = w["A"] + 2
    with pytest.raises(ValueError, match="holds no Re A >= 0"):
        from_lrnnx(w, layer)


def test_centaurus_has_one_discretization() -> None:
    w = {"A": torch.full((2, M), -0.5 + 1j), "log_delta": torch.zeros(2), "E": torch.ones(2, M)}
    w |= {"B": torch.ones(2, H), "C": torch.ones(H, 2)}
    layer = Centaurus(H, 2, "zoh", sub_state_dim=M)
    with pytest.raises(ValueError, match="computes gamma = dt whatever its discretization says"):
        from_lrnnx(w, layer)


# -------------------------------------------------------------------------------- time-varying


@pytest.mark.parametrize("conj_sym", [False, True])
@pytest.mark.parametrize("scheme", ["zoh", "bilinear", "dirac"])
def test_s5_time_varying(scheme: str, conj_sym: bool) -> None:
    w = named(A=(N, 2), B=(N, H, 2), C=(H, N, 2), D=(H,), log_dt=(N,))
    w["A"][:, 0] = -w["A"][:, 0].abs() - 0.1
    u, elapsed = inputs(), gaps(2, L)
    A, dt = as_complex(w["A"]), 1.5 * w["log_dt"].exp()
    tau = elapsed.unsqueeze(-1)
    drive = gain(scheme, A, dt) * (u.to(A.dtype) @ as_complex(w["B"]).mT)
    factor = 2 if conj_sym else 1

    def read(h: Tensor) -> Tensor:
        return factor * (h @ as_complex(w["C"]).mT).real + w["D"] * u

    size = 2 * N if conj_sym else N
    for make in (S5, EventSSM):
        layer = make(
            H, size, scheme, conj_sym=conj_sym, timestep_mode="state_only", dtype=torch.float64
        )
        assert from_lrnnx(w, layer, step_rescale=1.5) == {}
        assert_agree(layer(u), read(run(decay(scheme, A, dt), drive)), EXACT)
        want = read(run(decay(scheme, A, tau * dt), drive))
        assert_agree(layer(u, integration_timesteps=elapsed), want, EXACT)
    with pytest.raises(ValueError, match="step_rescale = 0, expected > 0"):
        from_lrnnx(w, layer, step_rescale=0)


def mamba_weights(bias: bool) -> Weights:
    E, K, R = 2 * H, 4, 1
    shapes: dict[str, tuple[int, ...]] = {
        "A_log": (E, N), "D": (E,), "in_proj.weight": (2 * E, H), "conv1d.weight": (E, 1, K),
        "conv1d.bias": (E,), "x_proj.weight": (R + 2 * N, E), "dt_proj.weight": (E, R),
        "dt_proj.bias": (E,), "dtA_proj.weight": (E, R), "dtA_proj.bias": (E,),
        "out_proj.weight": (H, E),
    }  # fmt: skip
    if bias:
        shapes |= {"in_proj.bias": (2 * E,), "out_proj.bias": (H,)}
    return named(**shapes)


def run_mamba(w: Weights, u: Tensor, scheme: str, elapsed: Tensor | None) -> Tensor:
    x, z = F.linear(u, w["in_proj.weight"], w.get("in_proj.bias")).chunk(2, dim=-1)
    x = F.conv1d(x.mT, w["conv1d.weight"], w["conv1d.bias"], padding=3, groups=x.shape[-1])
    v = F.silu(x[..., :L].mT)
    r, B, C = F.linear(v, w["x_proj.weight"]).split([1, N, N], dim=-1)
    dt = F.softplus(F.linear(r, w["dt_proj.weight"], w["dt_proj.bias"])).unsqueeze(-1)
    A = -w["A_log"].exp()
    fading = dt
    if elapsed is not None:
        fading = elapsed[..., None, None] * F.softplus(w["dtA_proj.bias"]).unsqueeze(-1)
    drive = gain(scheme, A, dt) * B.unsqueeze(-2) * v.unsqueeze(-1)
    h = run(decay(scheme, A, fading), drive)
    y = ((h * C.unsqueeze(-2)).sum(-1) + w["D"] * v) * F.silu(z)
    return F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", ["mamba", "zoh", "bilinear", "dirac"])
def test_mamba_and_stream(scheme: str, bias: bool) -> None:
    w, u, elapsed = mamba_weights(bias), inputs(), gaps(2, L)
    unread = {"dtA_proj.weight", "dtA_proj.bias"}
    plain = Mamba(H, N, scheme, bias=bias, dtype=torch.float64)
    check(plain, w, run_mamba(w, u, scheme, None), unread)
    event = STREAM(H, N, scheme, bias=bias, dtype=torch.float64)
    assert set(from_lrnnx(w, event)) == {"dtA_proj.weight"}
    want = run_mamba(w, u, scheme, elapsed)
    assert_agree(event(u, integration_timesteps=elapsed), want, EXACT)


@pytest.mark.parametrize("bias", [False, True])
def test_rglru(bias: bool) -> None:
    W = 2 * H
    shapes: dict[str, tuple[int, ...]] = {
        "a_log": (W, 1), "gate_proj.weight": (W, H), "in_proj.weight": (W, H),
        "conv1d.weight": (W, 1, 4), "conv1d.bias": (W,), "recurrent_gate_proj.weight": (W, W),
        "recurrent_gate_proj.bias": (W,), "input_gate_proj.weight": (W, W),
        "input_gate_proj.bias": (W,), "out_proj.weight": (H, W),
    }  # fmt: skip
    if bias:
        shapes |= {"gate_proj.bias": (W,), "in_proj.bias": (W,), "out_proj.bias": (H,)}
    w, u = named(**shapes), inputs()
    linear = lambda name, x: F.linear(x, w[name + ".weight"], w.get(name + ".bias"))  # noqa: E731
    x = linear("in_proj", u).mT
    v = F.conv1d(x, w["conv1d.weight"], w["conv1d.bias"], padding=3, groups=W)[..., :L].mT
    r, i = (torch.sigmoid(linear(f"{g}_gate_proj", v)) for g in ("recurrent", "input"))
    a = torch.sigmoid(w["a_log"][:, 0]) ** (6.0 * r)
    h = run(a, torch.sqrt(1 - a**2) * i * v)
    want = linear("out_proj", F.gelu(linear("gate_proj", u)) * h)
    options: dict[str, Any] = {"heads": 1, "bias": bias, "c": 6.0, "dtype": torch.float64}
    check(RGLRU(H, W, start_rule=False, gelu="erf", **options), w, want)
    for missing in ({"gelu": "erf"}, {"start_rule": False}):
        with pytest.raises(ValueError, match=r"RGLRU of lrnnx has (start_rule|gelu) = .* built in"):
            from_lrnnx(w, RGLRU(H, W, **missing, **options))
    blocks = RGLRU(H, W, start_rule=False, gelu="erf", **options | {"heads": 2})
    with pytest.raises(ValueError, match=r"rg_lru.input_gate_weight is \(1, 6, 6\) in the file"):
        from_lrnnx(w, blocks)


def test_s7_without_its_residual() -> None:
    rows = 2 * N + 2 * H * N + H
    w = named(base_params=(N,))
    w |= {"in_proj.weight": normal(H, H), "gate_proj.weight": normal(H, H, seed=3)}
    w["x_proj.weight"] = 0.2 * normal(rows, H, seed=4)
    u = inputs()
    v = u @ w["in_proj.weight"].mT
    parts = (v @ w["x_proj.weight"].mT).split([N, H * N, H * N, H, N], dim=-1)
    a, d, beta = parts[0] + w["base_params"], parts[3], parts[4]
    B, C = (p.unflatten(-1, (H, N)) for p in parts[1:3])
    h = run(1 - 1 / (a**2 + 0.5), torch.einsum("blhn,blh->bln", B, v) + beta)
    y = torch.einsum("blhn,bln->blh", C, h) + d * v
    want = y * torch.sigmoid(F.gelu(y) @ w["gate_proj.weight"].mT)
    check(S7(H, N, variant="full", dtype=torch.float64), w, want)
    with pytest.raises(ValueError, match="S7 of lrnnx has variant = 'full' built in"):
        from_lrnnx(w, S7(H, N))


# ------------------------------------------------------------------------------------ bad input


def test_unknown_tensors_layers_options_and_shapes_are_refused_before_anything_is_written() -> None:
    w = {k: v.float() for k, v in mamba_weights(False).items()}
    with pytest.raises(ValueError, match=r"under 'layers\.' are .*, the weights of none of LRU"):
        from_lrnnx(w, Mamba(H, N), "layers.")
    with pytest.raises(ValueError, match="these are weights of Mamba, for a layer Mamba; got S5"):
        from_lrnnx(w, S5(H, N))
    with pytest.raises(ValueError, match=r"models\.ltv\.S5, for a layer S5 or EventSSM; got LRU"):
        from_lrnnx({"A": torch.ones(2, 2), "log_dt": torch.ones(2), "B": torch.ones(2, H, 2)},
                   LRU(H, 2))  # fmt: skip
    with pytest.raises(ValueError, match=r"Mamba has no option 'dt_fast'; expected one of \[\]"):
        from_lrnnx(w, Mamba(H, N), dt_fast=True)
    with pytest.raises(ValueError, match="transform 'tanh', expected one of"):
        from_lrnnx(s4_weights(), S4D(H, N), real_transform="tanh")
    with pytest.raises(ValueError, match="does not reach; make the layer with A_transform='none'"):
        from_lrnnx(s4_weights(), S4D(H, N), real_transform="none")
    layer = Mamba(H, N + 1)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError, match="A_log is"):
        from_lrnnx(w, layer)
    del w["D"]
    with pytest.raises(ValueError, match=r"missing \['D'\]"):
        from_lrnnx(w, Mamba(H, N))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_weights_keep_the_layers_dtype_and_the_file_is_left_alone() -> None:
    w = {k: v.bfloat16() for k, v in mamba_weights(False).items()}
    before = {k: v.clone() for k, v in w.items()}
    layer = Mamba(H, N)
    from_lrnnx(w, layer)
    assert layer.A_log.dtype == torch.float32
    assert torch.equal(layer.A_log, w["A_log"].float())
    assert w.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in w.items())
    assert layer(torch.randn(2, 5, H)).isfinite().all()
