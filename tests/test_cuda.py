"""On a GPU: every operator and every model variant gives what the CPU gives, gradients included.

Run with ``pytest -m cuda tests/test_cuda.py`` on a machine that has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import op_cases
import pytest
import torch
from op_cases import Case
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.utils import _pytree as pytree

from lrnnx_core import registry
from lrnnx_core.registry import MODELS, Model, Variant
from lrnnx_nn import LAYERS

pytestmark = pytest.mark.cuda

OPS = pytest.mark.parametrize(
    "case", [c for _, c in op_cases.ALL], ids=[n for n, _ in op_cases.ALL]
)
CONFIGURATIONS = [
    pytest.param(model, variant, id=f"{model.name}-{variant.name}")
    for model in MODELS.values()
    for variant in model.variants
]
H, N, L = 6, 8, 37


def on(device: str, tree: Any) -> Any:
    return pytree.tree_map(lambda t: t.detach().to(device) if isinstance(t, Tensor) else t, tree)


def assert_same(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    for a, e in pairs:
        assert a.is_cuda
        a, e = a.detach(), e.detach()
        scale = float(e.abs().max()) if e.numel() and e.dtype != torch.bool else 1.0
        torch.testing.assert_close(a.cpu(), e, rtol=rtol, atol=rtol * max(scale, 1e-30))


def gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_(x.dtype != torch.bool) for x in inputs]
    outputs = [y for y in pytree.tree_leaves(function(*leaves)) if y.requires_grad]
    loss = sum((y.abs() ** 2).sum() for y in outputs)
    wanted = [x for x in leaves if x.requires_grad]
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


@OPS
def test_operator_and_its_gradients_agree_with_the_cpu(case: Case) -> None:
    inputs = case.inputs()
    assert_same(case.outputs(*on("cuda", inputs)), case.outputs(*inputs))
    assert_same(
        gradients(case.outputs, on("cuda", inputs)), gradients(case.outputs, inputs), rtol=1e-9
    )


@OPS
def test_transforms_agree_with_the_reference_loop_on_the_gpu(case: Case) -> None:
    if not case.primary:
        pytest.skip("primary cases only")
    inputs = on("cuda", case.real_inputs())
    constants = on("cuda", case.inputs())  # only the first one varies

    def loss(backend: str) -> Callable[..., Tensor]:
        def function(x: Tensor) -> Tensor:
            filled = list(constants)
            filled[0] = torch.complex(*x.unbind(-1)) if filled[0].is_complex() else x
            return sum((y.abs() ** 2).sum() for y in case.outputs(*filled, backend=backend))

        return function

    x = inputs[0]
    transforms: dict[str, Callable[..., Any]] = {
        "grad": lambda f: grad(f)(x),
        "vmap(grad)": lambda f: vmap(grad(f))(torch.stack([x, 0.9 * x])),
        "jvp": lambda f: jvp(f, (x,), (x,))[1],
        "hessian": lambda f: hessian(f)(x),
        "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f))(x),
    }
    for name, transform in transforms.items():
        actual, expected = transform(loss("auto")), transform(loss("reference"))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=name)


def bound(model: Model, variant: Variant) -> Model:
    return registry.bind(model.name, **{**variant.init, **variant.call})


def make(model: Model, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = model.init(H, N, generator=generator, dtype=dtype)
    return params, torch.randn(3, L, H, generator=generator, dtype=dtype)


@pytest.mark.parametrize(("model", "variant"), CONFIGURATIONS)
def test_every_mode_agrees_with_the_cpu(model: Model, variant: Variant) -> None:
    m = bound(model, variant)
    params, u = make(m, torch.float64)
    lengths = torch.tensor([L, 5, 0])
    for mode in model.modes:
        for extra in ({}, {"lengths": lengths}):
            expected = m.scan(params, u, mode=mode, **extra)
            actual = m.scan(on("cuda", params), u.cuda(), mode=mode, **on("cuda", extra))
            assert_same(actual, expected)


@pytest.mark.parametrize(("model", "variant"), CONFIGURATIONS)
def test_gradients_of_the_parameters_agree_with_the_cpu(model: Model, variant: Variant) -> None:
    m = bound(model, variant)
    params, u = make(m, torch.float64)
    keys = list(params)

    def run(*values: Tensor) -> Tensor:
        *tensors, x = values
        return m.scan(dict(zip(keys, tensors, strict=True)), x)[0]

    inputs = (*params.values(), u)
    assert_same(gradients(run, on("cuda", inputs)), gradients(run, inputs), rtol=1e-9)


@pytest.mark.parametrize(("model", "variant"), CONFIGURATIONS)
def test_steps_in_float32_agree_with_one_scan(model: Model, variant: Variant) -> None:
    if variant.init.get("bidirectional"):
        pytest.skip("a bidirectional model does not step")
    m = bound(model, variant)
    params, u = on("cuda", make(m, torch.float32))
    y, last = m.scan(params, u)
    state, steps = m.init_state(params, (3,)), []
    for t in range(L):
        y_t, state = m.step(params, u[:, t], state)
        steps.append(y_t)
    scale = float(y.abs().max())
    torch.testing.assert_close(torch.stack(steps, 1), y, rtol=1e-4, atol=1e-5 * scale)
    for a, b in zip(pytree.tree_leaves(state), pytree.tree_leaves(last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_trains_under_autocast_and_compile(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](H, N).cuda()
    u = torch.randn(2, L, H, device="cuda")
    expected = layer(u)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        cast = layer(u)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(cast.float(), expected, rtol=2e-2, atol=4e-2 * scale)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(u)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5 * scale)
    compiled.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_mix_of_cpu_and_gpu_is_refused_before_any_work(model: Model) -> None:
    params, u = make(model, torch.float32)
    with pytest.raises(ValueError, match="is on cuda"):
        model.scan(params, u.cuda())
    with pytest.raises(ValueError, match="is on cpu"):
        model.scan(on("cuda", params), u.cuda(), lengths=torch.tensor([L, 5, 0]))
