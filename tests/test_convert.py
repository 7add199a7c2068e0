"""lrnnx_nn.convert: weights of published models by name, and agreement with who published them.

The models are tiny and random, made by `transformers`; nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrnnx_nn import RGLRU, Mamba
from lrnnx_nn.convert import load_mixer, mixer_params
from lrnnx_nn.layers.base import Layer

H, N, K, R, L = 16, 5, 4, 3, 11
SIZES = {"vocab_size": 11, "hidden_size": H, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def transformers() -> Any:
    package = pytest.importorskip("transformers")
    package.logging.set_verbosity_error()  # it says at length that it has no compiled kernels
    return package


def scattered(model: nn.Module) -> nn.Module:
    """Move every weight a little, so that none is a constant."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    scale = float(want.detach().abs().max().clamp(min=1))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * scale)


# ---------------------------------------------------------------------------------- Mamba's family


def mamba(package: Any, **options: Any) -> tuple[nn.Module, str, Layer]:
    config = package.MambaConfig(
        **SIZES, state_size=N, conv_kernel=K, time_step_rank=R, **options
    )  # fmt: skip
    bias = options.get("use_bias", False)
    layer = Mamba(H, N, dt_rank=R, bias=bias, conv_bias=options.get("use_conv_bias", True))
    return scattered(package.MambaForCausalLM(config)), "backbone.layers.1.mixer.", layer


def falcon(package: Any) -> tuple[nn.Module, str, Layer]:
    config = package.FalconMambaConfig(
        **SIZES, state_size=N, conv_kernel=K, time_step_rank=R, mixer_rms_eps=1e-6
    )
    layer = Mamba(H, N, dt_rank=R, inner_norm="rms")
    return scattered(package.FalconMambaForCausalLM(config)), "backbone.layers.1.mixer.", layer


def jamba(package: Any) -> tuple[nn.Module, str, Layer]:
    config = package.JambaConfig(
        **SIZES, mamba_d_state=N, mamba_d_conv=K, mamba_dt_rank=R, intermediate_size=H,
        num_attention_heads=2, num_key_value_heads=2, attn_layer_offset=0, attn_layer_period=2,
        num_experts=1,
    )  # fmt: skip
    layer = Mamba(H, N, dt_rank=R, inner_norm="learned")
    return scattered(package.JambaForCausalLM(config)), "model.layers.1.mamba.", layer


MAKERS = {
    "mamba": mamba,
    "mamba biased": lambda t: mamba(t, use_bias=True),
    "mamba without conv bias": lambda t: mamba(t, use_conv_bias=False),
    "falcon": falcon,
    "jamba": jamba,
}
maker = pytest.mark.parametrize("maker", MAKERS)


def states(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Return the state of a cache of transformers in our layout."""
    conv = cache.get_conv_state(layer)  # (B, E, K), a column more than is needed
    return conv[..., 1:].mT, cache.get_recurrent_state(layer)


@maker
def test_mixers_of_mambas_family_agree(maker: str, transformers: Any) -> None:
    model, prefix, layer = MAKERS[maker](transformers)
    load_mixer(layer, model.state_dict(), prefix)
    mixer, index = model.get_submodule(prefix.rstrip(".")), 1
    u = normal(2, L, H)
    with torch.no_grad():
        close(layer(u), mixer(u))
        for cut in (1, 2, 3, 7):  # shorter than the convolution, too
            cache = transformers.DynamicCache(config=model.config)
            y, state = layer.prefill(u[:, :cut])
            close(y, mixer(u[:, :cut], cache_params=cache))
            for t in range(cut, L):
                y_t, state = layer.step(u[:, t], state)
                want = mixer(u[:, t : t + 1], cache_params=cache)
                close(y_t, want[:, 0])
            for part, want in zip(state, states(cache, index), strict=True):
                close(part, want)


@maker
def test_gradients_of_loaded_mixers_agree(maker: str, transformers: Any) -> None:
    model, prefix, layer = MAKERS[maker](transformers)
    load_mixer(layer, model.state_dict(), prefix)
    mixer = model.get_submodule(prefix.rstrip("."))
    u = normal(2, L, H)
    layer(u).sin().sum().backward()
    mixer(u).sin().sum().backward()
    want = {k: p.grad for k, p in mixer.named_parameters()}
    for key, p in layer.named_parameters():
        torch.testing.assert_close(
            p.grad, want[key], rtol=0, atol=2e-5 * float(want[key].abs().max().clamp(min=1))
        )


def test_a_left_padded_batch_agrees(transformers: Any) -> None:
    model, prefix, layer = mamba(transformers)
    load_mixer(layer, model.state_dict(), prefix)
    mixer, u = model.get_submodule(prefix.rstrip(".")), normal(2, L, H)
    mask = torch.ones(2, L, dtype=torch.bool)
    mask[0, :4] = False
    with torch.no_grad():
        got, want = layer(u, mask=mask), mixer(u, attention_mask=mask.long())
    close(got[mask], want[mask])


# -------------------------------------------------------------------------------- RecurrentGemma


@pytest.fixture
def griffin(transformers: Any) -> tuple[nn.Module, str, Layer]:
    config = transformers.RecurrentGemmaConfig(
        **SIZES, lru_width=H, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=2 * H, conv1d_width=K,
    )  # fmt: skip
    model = scattered(transformers.RecurrentGemmaForCausalLM(config))
    return model, "model.layers.1.temporal_block.", RGLRU(H, heads=2)


def test_the_block_of_recurrentgemma_agrees(griffin: tuple[nn.Module, str, Layer]) -> None:
    model, prefix, layer = griffin
    load_mixer(layer, model.state_dict(), prefix)
    block, u = model.get_submodule(prefix.rstrip(".")), normal(2, L, H)
    positions = torch.arange(L).expand(2, L)
    with torch.no_grad():
        close(layer(u), block(u, positions, None, use_cache=False)[0])
        for cut in (2, 7):
            block(u, positions, None, use_cache=False)  # forget
            y, state = layer.prefill(u[:, :cut])
            close(y, block(u[:, :cut], positions[:, :cut], None)[0])
            for t in range(cut, L):
                y_t, state = layer.step(u[:, t], state)
                close(y_t, block(u[:, t : t + 1], positions[:, t : t + 1], None)[0][:, 0])
            close(state.h, block.rg_lru.recurrent_states)
            close(state.conv, block.conv1d_state.mT)


def test_documents_start_where_positions_do(griffin: tuple[nn.Module, str, Layer]) -> None:
    """Theirs reads across documents in the convolution; with one tap there is nothing to read."""
    model, prefix, layer = griffin
    load_mixer(layer, model.state_dict(), prefix)
    block, u = model.get_submodule(prefix.rstrip(".")), normal(2, L, H)
    with torch.no_grad():
        for weight in (block.conv_1d.weight, layer.get_parameter("conv_1d.weight")):
            weight[..., :-1] = 0
        positions = torch.cat([torch.arange(4), torch.arange(L - 4)]).expand(2, L)
        want = block(u, positions, None, use_cache=False)[0]
        close(layer(u, reset=positions == 0), want)


def test_deepminds_names_of_the_griffin_block(griffin: tuple[nn.Module, str, Layer]) -> None:
    model, prefix, layer = griffin
    theirs = {
        "conv_1d.weight": "conv_1d.w", "conv_1d.bias": "conv_1d.b",
        "rg_lru.recurrent_param": "rg_lru.a_param",
        "rg_lru.input_gate_weight": "rg_lru.input_gate.w",
        "rg_lru.input_gate_bias": "rg_lru.input_gate.b",
        "rg_lru.recurrent_gate_weight": "rg_lru.a_gate.w",
        "rg_lru.recurrent_gate_bias": "rg_lru.a_gate.b",
    }  # fmt: skip
    file = {}
    for key, value in model.get_submodule(prefix.rstrip(".")).state_dict().items():
        if key == "conv_1d.weight":
            value = value.squeeze(1).T.contiguous()  # (K, W)
        file["blocks.1.recurrent_block." + theirs.get(key, key)] = value
    load_mixer(layer, file, "blocks.1.recurrent_block.")
    other = RGLRU(H, heads=2)
    load_mixer(other, model.state_dict(), prefix)
    for a, b in zip(layer.params.values(), other.params.values(), strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------- what may go wrong


def file_of(layer: Layer, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a file with other numbers for this layer."""
    return {f"net.0.mixer.{k}": normal(*v.shape).to(dtype) for k, v in layer.params.items()}


@pytest.mark.parametrize("wrong", ["missing", "extra", "shape", "prefix", "several"])
def test_errors_name_the_trouble_and_write_nothing(wrong: str) -> None:
    layer = Mamba(4, 3)
    file, prefix = file_of(layer), "net.0.mixer."
    message = {
        "missing": r"Mamba and the file differ: missing \['D'\], not known \[\]",
        "extra": r"missing \[\], not known \['norm.weight'\]",
        "several": r"missing \['dt_proj.bias', 'x_proj.weight'\], not known \['dtA_bias'\]",
        "shape": r"A_log is \(8, 4\) in the file, \(8, 3\) in Mamba",
        "prefix": r"no tensor under 'net.1.mixer.'; prefixes are net.0.*",
    }[wrong]
    if wrong == "missing":
        del file[prefix + "D"]
    elif wrong == "several":
        del file[prefix + "x_proj.weight"], file[prefix + "dt_proj.bias"]
        file[prefix + "dtA_bias"] = torch.zeros(8)
    elif wrong == "extra":
        file[prefix + "norm.weight"] = torch.zeros(4)
    elif wrong == "shape":
        file[prefix + "A_log"] = torch.zeros(8, 4)
    else:
        prefix = "net.1.mixer."
    before = {k: v.detach().clone() for k, v in layer.params.items()}
    with pytest.raises(ValueError, match="^convert: .*" + message):
        load_mixer(layer, file, prefix)
    assert all(torch.equal(v, before[k]) for k, v in layer.params.items())


def test_the_prefixes_of_an_error_are_those_mixers_have(transformers: Any) -> None:
    model, _, layer = mamba(transformers)
    with pytest.raises(ValueError, match=r"prefixes are .*backbone\.layers\.0\.mixer\.[ ,]"):
        load_mixer(layer, model.state_dict(), "layers.0.")


@pytest.mark.parametrize(
    ("make", "wide"),
    [
        (lambda: Mamba(4, 3), {"A_log", "D", "dt_proj.bias"}),
        (lambda: RGLRU(4), {"rg_lru.recurrent_param"}),
    ],
    ids=["mamba", "rglru"],
)
def test_a_bfloat16_file_leaves_the_recurrence_in_float32(make: Any, wide: set[str]) -> None:
    layer = make().bfloat16()
    file = file_of(layer, torch.bfloat16)
    load_mixer(layer, file, "net.0.mixer.")
    for key, value in layer.params.items():
        assert value.dtype == (torch.float32 if key in wide else torch.bfloat16), key
        assert torch.equal(value, file["net.0.mixer." + key].to(value.dtype))
    y, state = layer.prefill(normal(2, 5, 4).bfloat16())
    assert (y.dtype, state.h.dtype) == (torch.bfloat16, torch.float32)
    # into a layer of float32 everything is exact
    single = make()
    load_mixer(single, file, "net.0.mixer.")
    assert all(v.dtype == torch.float32 for v in single.params.values())


def test_loading_keeps_the_parameters_objects_and_their_gradients_flags() -> None:
    layer = Mamba(4, 3)
    layer.A_log.requires_grad_(False)
    before = {k: id(v) for k, v in layer.named_parameters()}
    file = {k.removeprefix("net.0.mixer."): v for k, v in file_of(layer).items()}
    load_mixer(layer, file)
    assert {k: id(v) for k, v in layer.named_parameters()} == before
    assert not layer.A_log.requires_grad
    assert layer.D.requires_grad


def test_mixer_params_feeds_the_core(transformers: Any) -> None:
    from lrnnx_core import mamba as core

    model, prefix, _ = mamba(transformers)
    params, u = mixer_params(model.state_dict(), prefix), normal(2, L, H)
    with torch.no_grad():
        close(core.scan(params, u)[0], model.get_submodule(prefix.rstrip("."))(u))
