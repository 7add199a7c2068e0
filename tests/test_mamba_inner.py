"""A Mamba block between its projections at once: against the operators one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import draw
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from lrnnx_core import mamba, stream
from lrnnx_core.models import _selective
from lrnnx_core.ops.mamba_inner import _composite, mamba_inner

E, N, R, K = 4, 3, 2, 3
OPTIONAL = ("conv_bias", "tail", "h0", "decay_dt", "timesteps")


def problem(*batch: int, length: int = 7, every: bool = True, taps: int = K) -> dict[str, Any]:
    """Return the arguments in order, without the optional ones unless ``every``."""
    shapes = {
        "xz": (*batch, length, 2 * E), "conv_weight": (E, 1, taps), "conv_bias": (E,),
        "x_proj": (R + 2 * N, E), "dt_proj": (E, R), "A": (E, N), "D": (E,), "dt_bias": (E,),
        "tail": (*batch, taps - 1, E), "h0": (*batch, E, N), "decay_dt": (*batch, 1, E),
        "timesteps": (*batch, length),
    }  # fmt: skip
    found: dict[str, Any] = {k: draw(*s, seed=i) for i, (k, s) in enumerate(shapes.items())}
    found["A"] = -found["A"].exp()
    found["decay_dt"], found["timesteps"] = found["decay_dt"].exp(), found["timesteps"].exp()
    found["reset"] = draw(*batch, length, seed=20) > 0.7
    if not every:
        found |= dict.fromkeys((*OPTIONAL, "reset"))
    return found | {"state_only": every, "scheme": "zoh" if every else "mamba"}


def leaves(p: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    p = {
        k: t.clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for k, t in p.items()
    }
    return p, [t for t in p.values() if isinstance(t, Tensor) and t.requires_grad]


def close(got: Any, want: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def weigh(outputs: Any) -> Tensor:
    """Return a scalar that depends on every number in its own way."""
    terms = [(y.sin().flatten() * torch.linspace(1, 2, y.numel()).to(y)).sum() for y in outputs]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("every", [False, True], ids=["least", "every"])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_outputs_and_two_gradients_are_those_of_the_parts(length: int, every: bool) -> None:
    results = []
    for f in (mamba_inner, _composite):
        p, wanted = leaves(problem(2, length=length, every=every))
        outputs = f(*p.values())
        first = torch.autograd.grad(weigh(outputs), wanted, create_graph=True)
        second = torch.autograd.grad(weigh(first), wanted)
        results.append((outputs, first, second))
    close(*results)


def test_a_single_tap_and_no_samples() -> None:
    for kind in ({"taps": 1}, {"length": 0}):
        results = []
        for f in (mamba_inner, _composite):
            p, wanted = leaves(problem(2, **kind))
            outputs = f(*p.values())
            results.append((outputs, torch.autograd.grad(weigh(outputs), wanted)))
        close(*results)


def test_gradients_of_samples_and_of_an_ensemble() -> None:
    p = problem(5)
    shared = ("conv_weight", "conv_bias", "x_proj", "dt_proj", "A", "D", "dt_bias")
    named = [k for k, t in p.items() if isinstance(t, Tensor) and t.is_floating_point()]

    def loss(*tensors: Tensor, reset: Tensor) -> Tensor:
        given = dict(zip(named, tensors, strict=True)) | {"reset": reset}
        return weigh(mamba_inner(*(p | given).values()))

    every = tuple(range(len(named)))
    values = [p[k] for k in named]
    in_dims = tuple(None if k in shared else 0 for k in named)
    got = vmap(lambda reset, *t: grad(loss, every)(*t, reset=reset), (0, *in_dims))(
        p["reset"], *values
    )
    for i in range(5):
        own = [t if d is None else t[i] for t, d in zip(values, in_dims, strict=True)]
        close([g[i] for g in got], list(grad(loss, every)(*own, reset=p["reset"][i])))

    scales = torch.tensor([1.0, 0.5], dtype=torch.float64)
    ensemble = [
        t * scales.reshape(2, *(1,) * t.ndim) if k in shared else t
        for k, t in zip(named, values, strict=True)
    ]
    in_dims = tuple(0 if k in shared else None for k in named)
    got = vmap(grad(loss, every), in_dims)(*ensemble, reset=p["reset"])
    for i in range(2):
        own = [t[i] if d == 0 else t for t, d in zip(ensemble, in_dims, strict=True)]
        close([g[i] for g in got], list(grad(loss, every)(*own, reset=p["reset"])))


@pytest.mark.compile
def test_compiled() -> None:
    results = []
    for f in (torch.compile(mamba_inner, fullgraph=True, backend="aot_eager"), mamba_inner):
        p, wanted = leaves(problem(2))
        with torch.no_grad():
            plain = f(*p.values())
        outputs = f(*p.values())
        results.append((plain, outputs, torch.autograd.grad(weigh(outputs), wanted)))
    close(*results)


class Calls(TorchDispatchMode):
    """Keeps the calls of the backward leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.lrnnx_core.mamba_inner_backward.default:
            self.seen.append(tuple(a.detach() if isinstance(a, Tensor) else a for a in args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("every", [False, True])
def test_the_leaf(every: bool) -> None:
    p, wanted = leaves(problem(2, every=every))
    with Calls() as calls:
        torch.autograd.grad(weigh(mamba_inner(*p.values())), wanted)
    (arguments,) = calls.seen
    leaf = torch.ops.lrnnx_core.mamba_inner_backward.default
    torch.library.opcheck(leaf, arguments)
    found = leaf(*arguments)
    assert [g.shape == (0,) for g in found] == [t is None for t in arguments[7:19]]
    own = [t for t in (*arguments, *found) if isinstance(t, Tensor) and t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in own}) == len(own)


CASES: list[tuple[bool, Any, dict[str, Any], dict[str, Any]]] = [
    (True, mamba, {}, {}),
    (True, mamba, {}, {"reset": torch.arange(6) == 3, "discretization": "async"}),
    (True, stream, {}, {"integration_timesteps": torch.arange(6) % 3 + 0.5}),
    (True, mamba, {"bidirectional": True}, {"bidirectional": True}),
    (False, mamba, {}, {"lengths": torch.tensor([6, 2])}),
    (False, mamba, {}, {"dt_scale": 0.5}),
    (False, mamba, {}, {"discretization": "euler"}),
    (False, mamba, {}, {"mode": "recurrent"}),
    (False, mamba, {"inner_norm": "learned"}, {"inner_norm": "learned"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join((c[1].__name__[12:], *c[3])))
def test_models_run_it_where_they_can(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    can, model, init, call = case
    u = draw(2, 6, 4, seed=1)
    call = {k: t.to(u.device) if isinstance(t, Tensor) else t for k, t in call.items()}
    draws = torch.Generator("cpu").manual_seed(0)
    params = model.init(4, 3, generator=draws, device="cpu", dtype=torch.float64, **init)
    params = {k: p.to(u.device).requires_grad_() for k, p in params.items()}
    results = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(_selective, "_plain", lambda *_: False)
        with Calls() as calls:
            y, state = model.scan(params, u, **call)
            found = torch.autograd.grad(weigh((y, *state)), list(params.values()))
        assert len(calls.seen) == at_once * can * (1 + call.get("bidirectional", False))
        results.append((y, *state, *found))
    close(*results)


def test_parameters_that_do_not_fit_are_named() -> None:
    params = mamba.init(4, 3)
    u = torch.zeros(2, 5, 4)
    with pytest.raises(
        ValueError, match=r"causal_conv1d: weight \(7, 1, 4\), expected \(8, 1, K\)"
    ):
        mamba.scan({**params, "conv1d.weight": torch.zeros(7, 1, 4)}, u)
    with pytest.raises(ValueError, match=r"selective_scan: D \(7,\), expected \(8,\)"):
        mamba.scan({**params, "D": torch.zeros(7)}, u)
