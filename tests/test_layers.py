"""Every layer, in every variant of its model: a thin shell that promises what Modules promise."""

from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from model_cases import (
    BIDIRECTIONAL,
    FIRST,
    WITH_KERNEL,
    Case,
    assert_agree,
    every_bidirectional_case,
    every_case,
    every_case_first_quick,
    every_case_one_a_kind_quick,
    every_causal_case,
    every_model,
    first_case,
    first_case_one_a_kind_quick,
    gaps,
    normal,
    remembered,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from lrnnx_core import registry
from lrnnx_core.registry import Model
from lrnnx_nn import LAYERS, Layer

EXACT = 1e-12


def layer_of(case: Case, d_model: int = 3, d_state: int = 8, **options: Any) -> Layer:
    """Return the layer of a variant; float64 unless told."""
    options.setdefault("dtype", torch.float64)
    options.setdefault("generator", torch.Generator().manual_seed(0))
    d_state = max(d_state, 2 * case.choices.get("blocks", 1))
    return LAYERS[case.entry.name](d_model, d_state, **{**case.choices, **options})


def state_of(case: Case, layer: Layer, batch: tuple[int, ...]) -> Any:
    return case.state({k: v.detach() for k, v in layer.params.items()}, batch)


first_case_with_kernel = pytest.mark.parametrize(
    "case", [c for c in FIRST if c in WITH_KERNEL], ids=str
)


def convolving(case: Case) -> str:
    """Return the mode in which a layer keeps most in evaluation."""
    return "conv" if "conv" in case.entry.modes else "auto"


# ---------------------------------------------------------------------------- what a layer is


def test_every_model_has_a_layer_of_its_name() -> None:
    assert set(LAYERS) == set(registry.MODELS)
    for name, layer in LAYERS.items():
        assert layer.name == name
        assert layer.__name__ == registry.get(name).title.replace("-", "")


@every_model
def test_every_layer_has_the_uniform_constructor(entry: Model) -> None:
    default = LAYERS[entry.name](4, 8)
    named = LAYERS[entry.name](d_model=4, d_state=8, discretization=entry.discretizations[0])
    assert (default.d_model, default.d_state) == (4, 8)
    named.load_state_dict(default.state_dict())
    u = torch.randn(2, 5, 4)
    torch.testing.assert_close(named(u), default(u), rtol=0, atol=0)
    text = repr(default)
    assert "d_model=4" in text
    assert "d_state=8" in text


@every_case
def test_the_parameters_are_those_of_init_under_the_same_names(case: Case) -> None:
    layer = layer_of(case)
    want = case.model.init(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys = list(layer.state_dict())
    assert keys == [k for k, _ in layer.named_parameters()]
    assert set(keys) == set(want)
    if not any("." in k for k in want):  # children come after a module's own
        assert keys == list(want)
    for key, value in layer.named_parameters():
        assert torch.equal(value, want[key])
        assert value.requires_grad
        assert not value.is_complex()
    assert list(layer.params) == list(want)
    assert all(layer.params[k] is layer.get_parameter(k) for k in want)
    projections = {k for k, m in layer.named_modules() if isinstance(m, nn.Linear)}
    assert projections <= set(layer.projections)


@every_case
def test_forward_prefill_and_step_are_the_core(case: Case) -> None:
    layer, u = layer_of(case), normal(2, 40, 3)
    params = dict(layer.named_parameters())
    want = case.model.scan(params, u, mode="recurrent")
    for train in (True, False):
        layer.train(train)
        for grads in (True, False):
            with torch.set_grad_enabled(grads):
                y = layer(u)
                assert isinstance(y, Tensor)
                assert_agree(y, want[0], EXACT, f"train {train}, grad {grads}")
                if case.bidirectional:
                    continue
                assert_agree(layer.prefill(u), want, EXACT)
                state, ys = layer.init_state((2,)), []
                for t in range(40):
                    y, state = layer.step(u[:, t], state)
                    ys.append(y)
                assert_agree((torch.stack(ys, dim=1), state), want, EXACT, "steps")


@every_causal_case
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_every_split_into_prefill_and_steps_is_the_whole(case: Case, train: bool) -> None:
    layer, length = layer_of(case).train(train), 7
    u = normal(2, length, 3)
    with torch.set_grad_enabled(train):
        start = state_of(case, layer, (2,))
        want = layer.prefill(u, start)
        for k in range(length + 1):
            y, state = layer.prefill(u[:, :k], start)
            ys = list(y.unbind(1))
            for t in range(k, length):
                y, state = layer.step(u[:, t], state)
                ys.append(y)
            assert_agree((torch.stack(ys, dim=1), state), want, EXACT, f"k = {k}")
            first, state = layer.prefill(u[:, :k], start)
            second, state = layer.prefill(u[:, k:], state)
            assert_agree((torch.cat([first, second], dim=1), state), want, EXACT, f"k = {k}")


@every_case
def test_sequence_arguments_and_dt_scale_reach_the_core(case: Case) -> None:
    layer, u = layer_of(case), normal(3, 9, 3)
    params = dict(layer.named_parameters())
    given: dict[str, Any] = {
        "lengths": torch.tensor([9, 4, 0]),
        "mask": normal(3, 9, seed=4) > -1,
        "reset": normal(3, 9, seed=5) > 1,
        "integration_timesteps": gaps(3, 9),
        "dt_scale": 1.5,
    }
    refused = {k: given.pop(k) for k in list(given) if not case.takes("scan", k)}
    for key, value in refused.items():
        with pytest.raises(ValueError, match=key):
            layer(u, **{key: value})
    for chosen in [{k: v} for k, v in given.items()] + [given]:
        want = case.model.scan(params, u, **chosen)
        assert_agree(layer(u, **chosen), want[0], EXACT, str(list(chosen)))
        if not case.bidirectional:
            assert_agree(layer.prefill(u, **chosen), want, EXACT, str(list(chosen)))
    if not case.bidirectional:
        state, options = state_of(case, layer, (3,)), {}
        if case.timed:
            options["integration_timestep"] = given["integration_timesteps"][:, 0]
        if "dt_scale" in given:
            options["dt_scale"] = 1.5
        want = case.model.step(params, u[:, 0], state, **options)
        assert_agree(layer.step(u[:, 0], state, **options), want, EXACT)


@every_case
def test_use_fast_path_false_runs_the_loop_of_the_specification(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(case)
    slow = layer_of(case, use_fast_path=False)
    slow.load_state_dict(layer.state_dict())
    u = normal(2, 40, 3)
    calls = 0
    from lrnnx_core.backends import reference

    for name in ("linear_scan", "selective_scan", "state_scan"):
        plain = getattr(reference, name)

        def counted(*args: Any, plain: Any = plain) -> Any:
            nonlocal calls
            calls += 1
            return plain(*args)

        monkeypatch.setattr(reference, name, counted)
    fast = layer(u)
    assert calls == 0
    assert_agree(slow(u), fast, EXACT)
    with torch.no_grad():
        assert_agree(slow.eval()(u), fast, EXACT)
    assert calls == 2 * (1 + case.bidirectional)


# --------------------------------------------------------------------- what evaluation keeps


def _outputs(case: Case, layer: Layer, u: Tensor) -> tuple[Tensor, ...]:
    if case.bidirectional:
        return (layer(u),)
    return layer(u), layer.step(u[:, 0], layer.init_state((2,)))[0]


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        pytest.param(c, mode, id=f"{c}-{mode}")
        for c in [*FIRST, *BIDIRECTIONAL]  # what is kept does not depend on the variant
        for mode in ("auto", "conv")
        if mode in c.entry.modes
    ],
)
@pytest.mark.parametrize(
    "change", ["optimizer", "load_state_dict", "copy_", "data", "reset_parameters", "assign"]
)
def test_what_evaluation_keeps_is_dropped_when_a_parameter_changes(
    case: Case, change: str, mode: str
) -> None:
    if change == "reset_parameters" and not case.drawn:
        pytest.skip("draws nothing")
    layer = layer_of(case, mode=mode).eval()
    u, other = normal(2, 40, 3), case.params(seed=9)
    with torch.no_grad():
        before = _outputs(case, layer, u)
        again = _outputs(case, layer, u)
    if case.invariant:
        streams = not case.bidirectional  # steps keep (A_bar, B_bar)
        assert layer._cache or not (streams or (mode == "conv" and layer._keeps_kernel()))
    else:
        assert not layer._cache, "nothing is the same for every input"
    for a, b in zip(before, again, strict=True):
        assert torch.equal(a, b)
    if change == "optimizer":
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        layer(u).square().sum().backward()
        optimizer.step()
    elif change == "load_state_dict":
        layer.load_state_dict(other)
    elif change == "assign":
        layer.load_state_dict(other, assign=True)
    elif change == "copy_":
        with torch.no_grad():
            for k, v in layer.params.items():
                v.copy_(other[k])
    elif change == "data":
        for k, v in layer.params.items():
            v.data = other[k]
    else:
        layer.reset_parameters(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = _outputs(case, layer, u)
    fresh = layer_of(case, mode=mode).eval()
    fresh.load_state_dict(layer.state_dict())
    with torch.no_grad():
        want = _outputs(case, fresh, u)
    for a, b, old in zip(got, want, before, strict=True):
        assert torch.equal(a, b)
        assert not torch.allclose(a, old)


@first_case
def test_what_is_kept_belongs_to_the_very_parameters_it_was_made_from(case: Case) -> None:
    layer, u = layer_of(case, mode=convolving(case)).eval(), normal(2, 40, 3)
    state = layer.init_state((2,))
    with torch.no_grad():
        for seed in range(20):  # parameters that are gone leave their addresses to the next ones
            other = case.params(seed=seed)
            y, y_t = functional_call(layer, other, (u,)), None
            assert_agree(y, case.model.scan(other, u)[0], 1e-10)
            with torch.nn.utils.stateless._reparametrize_module(layer, other):
                y_t, _ = layer.step(u[:, 0], state)
            assert_agree(y_t, case.model.step(other, u[:, 0], state)[0], 1e-10)
            del other


@first_case_with_kernel
def test_evaluation_keeps_one_entry_a_use_and_training_none(case: Case) -> None:
    layer, u = layer_of(case, mode="conv").eval(), normal(2, 40, 3)
    with torch.no_grad():
        for length in (40, 20, 40):
            for scale in (1.0, 2.0):
                want = case.model.scan(layer.params, u[:, :length], dt_scale=scale)[0]
                assert_agree(layer(u[:, :length], dt_scale=scale), want, EXACT)
            assert layer(u[:, :0]).shape == (2, 0, 3)  # no kernel has a length of zero
        with pytest.raises(ValueError, match=r"u \(3,\), expected \(\.\.\., L, H\)"):
            layer(u[0, 0])
        assert len(layer._cache) == layer._keeps_kernel()
    layer.train()
    assert not layer._cache
    layer(u).sum().backward()
    with torch.no_grad():
        layer(u)
    assert not layer._cache
    layer.eval()
    layer(u)  # with gradients
    assert not layer._cache


@first_case
def test_gradients_in_evaluation_mode_are_not_cut_by_what_was_kept(case: Case) -> None:
    layer, u = layer_of(case, mode=convolving(case)).eval(), normal(2, 40, 3)
    with torch.no_grad():
        layer(u)
        layer.step(u[:, 0], layer.init_state((2,)))
    layer(u).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    x = u.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


@first_case
def test_inference_mode_works_and_leaves_the_layer_usable(case: Case) -> None:
    layer, u = layer_of(case).eval(), normal(2, 40, 3)
    with torch.inference_mode():
        inside = layer(u), layer.step(u[:, 0], layer.init_state((2,)))[0]
    with torch.no_grad():
        outside = layer(u), layer.step(u[:, 0], layer.init_state((2,)))[0]
    for a, b in zip(inside, outside, strict=True):
        assert_agree(a, b, EXACT)
    layer(u).sum().backward()


# --------------------------------------------------------------------- initial values


@every_case
def test_reset_parameters_draws_again_in_place(case: Case) -> None:
    layer = layer_of(case)
    held = dict(layer.named_parameters())
    before = {k: v.detach().clone() for k, v in held.items()}
    layer.reset_parameters(generator=torch.Generator().manual_seed(0))
    for k, v in layer.named_parameters():
        assert v is held[k]
        assert torch.equal(v, before[k])
    layer.reset_parameters(generator=torch.Generator().manual_seed(1))
    changed = any(not torch.equal(v, before[k]) for k, v in layer.named_parameters())
    assert changed == case.drawn


@every_case
def test_a_layer_of_the_meta_device_becomes_real_by_to_empty_and_reset(case: Case) -> None:
    layer = layer_of(case, device="meta", generator=None)
    assert all(p.device.type == "meta" for p in layer.parameters())
    layer.reset_parameters()  # nothing to do, and no error
    layer.to_empty(device="cpu")
    for p in layer.parameters():
        p.data.fill_(float("nan"))
    layer.reset_parameters(generator=torch.Generator().manual_seed(0))
    want = layer_of(case)
    for k, v in layer.named_parameters():
        assert torch.equal(v, want.get_parameter(k))
    assert torch.isfinite(layer(normal(2, 5, 3))).all()


@every_case
def test_a_wrappers_initialisation_of_linear_layers_leaves_the_state_space_alone(
    case: Case,
) -> None:
    net = nn.Sequential(nn.Linear(3, 3), layer_of(case), nn.Linear(3, 3)).double()
    before = {k: v.clone() for k, v in net[1].state_dict().items()}

    def wrapper_init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    net.apply(wrapper_init)
    # projections are linear layers like any other; the rest is not
    linear = {
        k for k in before if isinstance(net[1].get_submodule(k.rpartition(".")[0]), nn.Linear)
    }
    assert {k.split(".")[0] for k in linear} <= set(net[1].projections)
    for k in set(before) - linear:
        assert torch.equal(net[1].get_parameter(k), before[k])
    for module in net.modules():  # and the blunt form: everything that looks like a weight
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None:
                nn.init.normal_(getattr(module, name), std=0.02)
    for k, v in net[1].state_dict().items():
        if k.rpartition(".")[2] not in ("weight", "bias"):  # names of published checkpoints
            assert torch.equal(v, before[k])


# --------------------------------------------------------------------- saving, copying, moving


@every_case
def test_a_layer_survives_state_dict_torch_save_deepcopy_and_pickle(case: Case) -> None:
    layer, u = layer_of(case), normal(2, 40, 3)
    with torch.no_grad():
        want = layer.eval()(u)  # so that something is kept
    other = layer_of(case, generator=torch.Generator().manual_seed(7))
    missing = other.load_state_dict(layer.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    third = layer_of(case, generator=torch.Generator().manual_seed(8))
    third.load_state_dict(saved)
    copies = [other, third, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for each in copies:
        with torch.no_grad():
            assert torch.equal(each.eval()(u), want)
        with torch.no_grad():
            each.params.get("D", next(each.parameters())).add_(1.0)
            assert not torch.equal(each(u), want)
    with torch.no_grad():
        assert torch.equal(layer(u), want)


@every_case
def test_the_state_dict_holds_each_tensor_once(case: Case) -> None:
    layer = layer_of(case)
    state = layer.state_dict()
    storages = [v.untyped_storage().data_ptr() for v in state.values()]
    assert len(set(storages)) == len(storages)
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in layer.parameters())
    assert all(v.is_contiguous() for v in state.values())
    for v in state.values():
        assert v.untyped_storage().nbytes() == v.numel() * v.element_size(), "a view of something"


@every_case
def test_low_precision_casts_leave_parameters_and_states_at_float32(case: Case) -> None:
    u = torch.randn(2, 40, 3)
    reference = layer_of(case, dtype=torch.float32)
    want = reference(u)
    for cast in (
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: nn.Sequential(m, nn.Linear(3, 3)).bfloat16()[0],
    ):
        layer = layer_of(case, dtype=torch.float32)
        layer.load_state_dict(reference.state_dict())
        layer = cast(layer)
        wide = set(layer.params) if layer.kept_wide is None else layer.kept_wide
        assert layer.kept_wide is None or layer.projections
        for k, v in layer.named_parameters():
            if k in wide:
                assert v.dtype == torch.float32
                assert torch.equal(v, reference.get_parameter(k))
            else:
                assert v.dtype in (torch.bfloat16, torch.float16)
        assert all(t.real.dtype == torch.float32 for t in remembered(layer.init_state((2,))))
        y = layer(u.bfloat16())
        assert y.dtype == torch.bfloat16
        # a projection in bfloat16 rounds once more each
        assert_agree(y, want, 2e-2 if layer.kept_wide is None else 4e-2)
        if not case.bidirectional:
            y, state = layer.prefill(u.bfloat16())
            y, state = layer.step(u[:, 0].bfloat16(), state)
            assert all(t.real.dtype == torch.float32 for t in remembered(state))
    wide = layer.double()
    assert all(p.dtype == torch.float64 for p in wide.parameters())
    assert all(p.dtype == torch.float32 for p in wide.float().parameters())


@every_case
def test_layers_made_in_low_precision_have_float32_parameters(case: Case) -> None:
    layer = layer_of(case, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in layer.parameters())


@every_case
def test_training_under_autocast_gives_finite_float32_gradients_near_the_exact_ones(
    case: Case,
) -> None:
    layer, u = layer_of(case, dtype=torch.float32), torch.randn(2, 40, 3)
    exact = torch.autograd.grad(layer(u).square().mean(), list(layer.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(nn.Identity()(u))
        loss = y.float().square().mean()
    allowed = 4e-2 * (1 + case.bidirectional) if layer.projections else 2e-2  # a sum of two runs
    for got, want in zip(torch.autograd.grad(loss, list(layer.parameters())), exact, strict=True):
        assert got.dtype == torch.float32
        assert_agree(got, want, allowed)


# --------------------------------------------------------------------- transforms of modules


@every_case
def test_functional_call_equals_the_layer_with_other_parameters(case: Case) -> None:
    layer, u, other = layer_of(case), normal(2, 40, 3), case.params(seed=5)
    for train in (True, False):
        layer.train(train)
        want = case.model.scan(other, u)[0]
        with torch.no_grad():
            layer(u)  # so that something is kept
        assert_agree(functional_call(layer, other, (u,)), want, EXACT)
        with torch.no_grad():
            assert_agree(functional_call(layer, other, (u,)), want, EXACT)
            own = {k: v.detach() for k, v in layer.named_parameters()}
            assert_agree(layer(u), case.model.scan(own, u)[0], EXACT, "the layer itself again")


@every_case
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_an_ensemble_by_stack_module_state_is_a_loop(case: Case, train: bool) -> None:
    layers = [
        layer_of(case, generator=torch.Generator().manual_seed(s)).train(train) for s in range(3)
    ]
    u = normal(2, 40, 3)
    params, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    run = lambda p, b: functional_call(base, (p, b), (u,))  # noqa: E731
    with torch.no_grad():
        got = vmap(run)(params, buffers)
        assert_agree(got, torch.stack([m(u) for m in layers]), EXACT)
    loss = lambda p, b: run(p, b).square().mean()  # noqa: E731
    grads = vmap(grad(loss))(params, buffers)
    for i, layer in enumerate(layers):
        names = [k for k, _ in layer.named_parameters()]
        want = torch.autograd.grad(layer(u).square().mean(), list(layer.parameters()))
        for k, w in zip(names, want, strict=True):
            assert_agree(grads[k][i], w, 1e-11, k)


@every_case
def test_per_sample_gradients_of_a_layer_are_a_loop(case: Case) -> None:
    layer, u = layer_of(case), normal(3, 9, 3)
    params = {k: v.detach() for k, v in layer.named_parameters()}
    loss = lambda p, x: functional_call(layer, p, (x,)).square().sum()  # noqa: E731
    got = vmap(grad(loss), (None, 0))(params, u)
    for i, x in enumerate(u):
        want = grad(loss)(params, x)
        for k in params:
            assert_agree(got[k][i], want[k], 1e-11, k)


@every_case_one_a_kind_quick
def test_compiling_a_layer_whole_changes_nothing_forward_or_backward(case: Case) -> None:
    layer, u = layer_of(case), normal(2, 40, 3)
    names = [k for k, _ in layer.named_parameters()]
    want = layer(u)
    grads = torch.autograd.grad(want.square().mean(), list(layer.parameters()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = compiled(u)
    assert_agree(got, want, 1e-11)
    for k, a, b in zip(
        names,
        torch.autograd.grad(got.square().mean(), list(layer.parameters())),
        grads,
        strict=True,
    ):
        assert_agree(a, b, 1e-10, k)


@first_case_one_a_kind_quick
def test_compiled_steps_and_prefills_change_nothing(case: Case) -> None:
    layer, u = layer_of(case).eval(), normal(2, 40, 3)
    state = state_of(case, layer, (2,))
    lengths, mask = torch.tensor([40, 11]), normal(2, 40, seed=5) > -1
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    prefill = torch.compile(layer.prefill, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_agree(step(u[:, 0], state), layer.step(u[:, 0], state), 1e-11)
        assert_agree(prefill(u, state), layer.prefill(u, state), 1e-11)
        layouts = [{"lengths": lengths}, {"mask": mask}]
        if case.timed:
            layouts.append({"integration_timesteps": gaps(2, 40)})
        for given in layouts:
            assert_agree(prefill(u, state, **given), layer.prefill(u, state, **given), 1e-11)


@first_case_one_a_kind_quick
def test_a_compiled_layer_follows_its_parameters_in_evaluation(case: Case) -> None:
    layer, u = layer_of(case, mode=convolving(case)).eval(), normal(2, 40, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        layer(u)
        compiled(u)
        for p in layer.parameters():
            p.mul_(1.1)
        assert_agree(compiled(u), case.model.scan(layer.params, u)[0], 1e-11)


@every_case_first_quick
def test_a_layer_exports(case: Case) -> None:
    layer, u = layer_of(case).eval(), normal(2, 40, 3)
    program = torch.export.export(layer, (u,))
    other = normal(2, 40, 3, seed=8)
    assert_agree(program.module()(other), layer(other), 1e-11)


@first_case_one_a_kind_quick
def test_a_layer_exports_for_every_length(case: Case) -> None:
    if case.entry.name == "s4":
        pytest.skip("its blocks and its kernel are made for a length")
    layer, u = layer_of(case).eval(), normal(2, 40, 3)
    lengths = {1: torch.export.Dim("length", min=2, max=10**6)}
    # that Mamba-2's chunks hold the sequence is an assertion of the program, not a guard
    deferred = case.entry.name == "mamba2"
    program = torch.export.export(
        layer, (u,), dynamic_shapes=(lengths,), prefer_deferred_runtime_asserts_over_guards=deferred
    )
    for length in (3, 64, 150):
        other = normal(2, length, 3, seed=8)
        assert_agree(program.module()(other), layer(other), 1e-11)


# --------------------------------------------------------------------- bad input


@every_model
def test_unknown_options_and_choices_are_refused_at_construction(entry: Model) -> None:
    make = LAYERS[entry.name]
    title = make.__name__
    with pytest.raises(ValueError, match=f"{title} has no option 'widht'; expected one of ") as e:
        make(3, 8, widht=2)
    options = registry.options(entry, "init") - {"generator", "device", "dtype"}
    assert all(option in str(e.value) for option in options)
    for per_call in ("lengths", "kernel", "dt_scale"):
        with pytest.raises(ValueError, match=f"{title} has no option '{per_call}'"):
            make(3, 8, **{per_call: 1})
    with pytest.raises(ValueError, match=f"{title}: mode 'fast', expected one of .*'scan'"):
        make(3, 8, mode="fast")
    with pytest.raises(ValueError, match=r"discretization.*'tustin'.*expected one of"):
        make(3, 8, "tustin")
    with pytest.raises(ValueError, match="d_model = 0, expected an integer >= 1"):
        make(0, 8)
    with pytest.raises(ValueError, match=r"timestep_mode.*'neither'"):
        make(3, 8, timestep_mode="neither")
    if "gbt" in entry.discretizations:
        with pytest.raises(ValueError, match="discretization='gbt' needs alpha"):
            make(3, 8, "gbt")
        with pytest.raises(ValueError, match="alpha belongs to discretization='gbt'"):
            make(3, 8, alpha=0.5)


@every_bidirectional_case
def test_a_bidirectional_layer_refuses_to_stream(case: Case) -> None:
    layer, u = layer_of(case), normal(2, 6, 3)
    title = type(layer).__name__
    with pytest.raises(ValueError, match=f"{title}.prefill: a bidirectional layer cannot stream"):
        layer.prefill(u)
    with pytest.raises(ValueError, match=f"{title}.step: a bidirectional layer cannot stream"):
        layer.step(u[:, 0], layer.init_state((2,)))


@first_case
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, -0.5, 1.0], r"integration_timesteps: -0.5 at \(1,\), expected values >= 0"),
        ([1.0, float("nan"), 1.0], r"integration_timesteps: nan at \(1,\), expected finite"),
        ([1.0, 1.0, float("inf")], r"integration_timesteps: inf at \(2,\), expected finite"),
    ],
    ids=["negative", "nan", "infinite"],
)
def test_bad_timesteps_are_refused_on_cpu_in_eager_mode(
    case: Case, values: list[float], said: str
) -> None:
    layer, u = layer_of(case), normal(3, 3)
    with pytest.raises(ValueError, match=said):
        layer(u, integration_timesteps=torch.tensor(values))
    with pytest.raises(ValueError, match=said):
        layer.prefill(u, integration_timesteps=torch.tensor(values))
    bad = next(v for v in values if not 0 <= v < float("inf"))
    with pytest.raises(ValueError, match=re.escape("integration_timesteps: ")):
        layer.step(u[0], layer.init_state(), integration_timestep=torch.tensor(bad))
    vmap(lambda t: layer(u, integration_timesteps=t))(
        torch.ones(2, 3)
    )  # no check can be made there


@first_case
def test_bad_lengths_and_bad_shapes_are_refused(case: Case) -> None:
    layer, u = layer_of(case), normal(2, 6, 3)
    with pytest.raises(ValueError, match=r"lengths: between 2 and 7, expected 0 ... 6"):
        layer(u, lengths=torch.tensor([2, 7]))
    with pytest.raises(ValueError, match=r"lengths: between -1 and 2"):
        layer.prefill(u, lengths=torch.tensor([-1, 2]))
    with pytest.raises(ValueError, match=r"u \(2, 6, 4\), expected .* H = 3"):
        layer(normal(2, 6, 4))
    with pytest.raises(ValueError, match=r"u \(3,\), expected \(..., L, H\)"):
        layer(u[0, 0])
    with pytest.raises(ValueError, match="u is on meta and the parameters on cpu"):
        layer(u.to("meta"))
    with pytest.raises(ValueError, match=r"state(\.\w+)? \(3, .*expected \(2, "):
        layer.prefill(u, layer.init_state((3,)))


@first_case
def test_a_scale_is_one_number(case: Case) -> None:
    layer, u = layer_of(case), normal(3, 3, 3)  # a tensor (3,) fits the channels of some models
    for bad, said in (
        (torch.ones(3), r"dt_scale \(3,\), expected a 0-d tensor"),
        (-1.0, "dt_scale = -1.0, expected a finite number"),
        (float("nan"), "dt_scale = nan, expected a finite number"),
    ):
        for call in (layer, layer.prefill):
            with pytest.raises(ValueError, match=said):
                call(u, dt_scale=bad)
        with pytest.raises(ValueError, match=said):
            layer.step(u[:, 0], layer.init_state((3,)), dt_scale=bad)
    assert_agree(layer(u, dt_scale=torch.tensor(2.0)), layer(u, dt_scale=2.0), EXACT)


@every_model
def test_the_generic_layer_needs_a_model(entry: Model) -> None:
    class Renamed(Layer):
        name = entry.name.upper()

    layer = Renamed(3, 8)
    assert layer.model is entry
