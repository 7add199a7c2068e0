# SPDX-License-Identifier: MIT
"""Load published language models, whole: their configs, their weights, under their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrnnx_nn.architectures.language_model import LRNNLMHeadModel
from lrnnx_nn.convert_configs import Recipe, recipe
from lrnnx_nn.files import read_json
from lrnnx_nn.layers.base import Layer
from lrnnx_nn.optional import require

CONFIG = "config.json"
SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

Weights = Mapping[str, Tensor]


def language_model(
    source: Path | str | Weights,
    config: Mapping[str, Any] | Any = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LRNNLMHeadModel:
    """Return a published Mamba, Mamba-2, FalconMamba or RecurrentGemma model as one of ours.

    Mixers keep their published names. Norms that scale by ``1 + w`` get that as their weight.
    State-space parameters (A_log, D, dt_bias, recurrent_param, ...) are at least float32, also
    from a bfloat16 file; a tied ``lm_head`` is dropped.

    Args:
        source: a folder with ``config.json`` and ``model.safetensors`` (or its shards and their
            index, or else ``pytorch_model.bin``, read with ``weights_only=True``), as transformers
            and the original state-spaces files have them; or a state dict.
        config: of the model, as a dict with the keys of ``config.json`` or as the config object of
            transformers. By default the folder's.
        device: where the model shall be; the CPU if None.
        dtype: of the parameters; the file's if None.

    Returns:
        The model, in evaluation mode. ``save_pretrained`` writes it in our own format.

    Raises:
        ValueError: not such a folder, a truncated or corrupt file, another kind of model, a key of
            the config that is missing, unknown or has a value which the layers do not have, a
            vocabulary of another size, tensors that are missing, unknown or of another shape, a
            state dict without a config. Nothing is built then.
        MissingDependencyError: safetensors is not installed.
    """
    if isinstance(source, Mapping):
        if config is None:
            raise ValueError("convert.language_model: a state dict, expected its config too")
        weights, where, told = source, "state dict", "config"
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder, expected one with {CONFIG} and weights")
        where, told = str(folder), "config"
        if config is None:
            config, told = read_json(folder / CONFIG), str(folder / CONFIG)
        weights = _read(folder)
    found = recipe(_as_mapping(config), told)
    try:
        model = LRNNLMHeadModel.from_config(found.config, device="meta")
    except ValueError as error:
        raise ValueError(f"{told}: {error}") from error
    tensors = _renamed(where, weights, found)
    _check_vocabulary(where, tensors, found)
    _check_shapes(where, tensors, model)
    shared = isinstance(source, Mapping)
    model.load_state_dict(_widened(tensors, model, found, copy=shared), assign=True)
    if device is not None or dtype is not None:
        model.to(device=device, dtype=dtype)
    return model.eval()


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    to_dict = getattr(config, "to_dict", None)
    if not callable(to_dict):
        raise ValueError(
            f"convert.language_model: config is a {type(config).__name__}, expected a dict or a "
            "config object of transformers"
        )
    values = to_dict()
    if not isinstance(values, Mapping):
        raise ValueError("convert.language_model: config.to_dict() gives no dict")
    return values


# ------------------------------------------------------------------------------------------ files


def _read(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder."""
    for index, file, read in (
        (SAFE_INDEX, SAFE, _read_safetensors), (PICKLED_INDEX, PICKLED, _read_pickled),
    ):  # fmt: skip
        if (folder / file).is_file():
            return read(folder / file)
        if (folder / index).is_file():
            return _read_shards(folder, index, read)
    raise ValueError(f"{folder}: no weights, expected {SAFE}, {SAFE_INDEX} or {PICKLED}")


def _read_shards(folder: Path, index: str, read: Any) -> dict[str, Tensor]:
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ValueError(f"{folder / index}: no weight_map of names to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / index}: {name} is not a file of that folder")
        tensors |= read(folder / name)
    if absent := sorted(set(places) - set(tensors)):
        raise ValueError(f"{folder}: {absent[0]} is in no file, though {index} lists it")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    core = require("safetensors")
    tensors: dict[str, Tensor] = {}
    try:
        with core.safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensors[key] = file.get_tensor(key).clone()  # not a view of the mapped file
    except (core.SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: truncated or corrupt checkpoint ({error})") from error
    return tensors


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a corrupt pickle raises nearly anything
        raise ValueError(f"{path}: truncated or corrupt checkpoint ({error})") from error
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise ValueError(f"{path}: holds no dict of tensors")
    return tensors


# ---------------------------------------------------------------------------------------- weights


def _renamed(where: str, weights: Weights, found: Recipe) -> dict[str, Tensor]:
    """Return the tensors under our names, without what the model does not need.

    Raises:
        ValueError: a name that is not known, two for one parameter, a head that should be tied
            and differs.
    """
    tensors: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in weights.items():
        name = found.name(key)
        if re.fullmatch(found.ignored, key):
            continue
        if name is None:
            unknown.append(key)
        elif name in tensors:
            raise ValueError(f"{where}: {key} and another tensor are both {name}")
        else:
            tensors[name] = value
    if unknown:
        raise ValueError(f"{where}: tensors that are not known: {_some(unknown)}")
    if found.config.tie_embeddings:
        head, embedding = tensors.pop("head.weight", None), tensors.get("embedding.weight")
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise ValueError(
                f"{where}: lm_head.weight differs from the embedding, and the config ties them"
            )
    return tensors


def _check_vocabulary(where: str, tensors: Weights, found: Recipe) -> None:
    config = found.config
    for name in ("embedding.weight", "head.weight"):
        if name in tensors and tensors[name].shape[:1] != (config.padded_vocab_size,):
            raise ValueError(
                f"{where}: {name} {tuple(tensors[name].shape)}, and the config's vocabulary of "
                f"{config.vocab_size} makes {config.padded_vocab_size} rows"
            )


def _check_shapes(where: str, tensors: Weights, model: LRNNLMHeadModel) -> None:
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    have = {key: tuple(value.shape) for key, value in tensors.items()}
    missing, extra = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    if missing or extra:
        raise ValueError(
            f"{where}: weights and config differ: missing {_some(missing)}, "
            f"not known {_some(extra)}"
        )
    for key, shape in have.items():
        if not tensors[key].is_floating_point():
            raise ValueError(
                f"{where}: {key} has dtype {tensors[key].dtype}, expected a floating one"
            )
        if shape != want[key]:
            raise ValueError(f"{where}: {key} {shape}, and the config makes {want[key]}")


def _widened(
    tensors: Weights, model: LRNNLMHeadModel, found: Recipe, *, copy: bool
) -> dict[str, Tensor]:
    """Return the tensors as parameters, state-space ones at least float32.

    Args:
        tensors: by our names.
        model: the model on the meta device.
        found: see `Recipe`.
        copy: whether somebody else holds the tensors.
    """
    wide = {
        f"{name}.{key}"
        for name, layer in model.named_modules()
        if isinstance(layer, Layer)
        for key in layer._wide_keys()
    }
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        more = found.one_more is not None and re.fullmatch(found.one_more, key)
        dtype = value.dtype
        if more or key in wide:
            dtype = torch.promote_types(dtype, torch.float32)
        value = value.detach().to(dtype, copy=copy)
        out[key] = value + 1 if more else value
    return out


def _some(names: list[str]) -> str:
    return f"{names[:6]}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")
