# SPDX-License-Identifier: MIT
"""What a run of ``lrnnx train --task lm`` learns from, and what it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrnnx_nn import recipes
from lrnnx_nn.architectures.language_config import LRNNLMConfig
from lrnnx_nn.architectures.language_model import LRNNLMHeadModel
from lrnnx_nn.data.text import Texts, read_text, split_text
from lrnnx_nn.mixers import ATTENTION, WITHOUT_D_STATE, mixer_name
from lrnnx_nn.training.lm_task import WINDOWS


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """What a language model learns from, and what it is.

    Attributes:
        text: files, or folders of text files.
        validation_text: files of the validation part; cut from ``text`` if None.
        test_text: files of the test part; cut from the end of ``text`` if None.
        validation_fraction: of ``text``, for the validation part; 0 leaves none.
        test_fraction: of ``text``, for the test part.
        vocabulary: ``byte``, ``char``, or the path of a tokenizer's JSON file.
        unknown_characters: for ``char``, a token for what the training part lacks.
        mixer_types: see `LRNNLMConfig`; so are the next ones.
        mixer_kwargs: attention has a window of ``context`` if none is given here.
        d_model: width.
        d_state: state size; None: that of `recipes.model_defaults` for each layer.
        n_layer: blocks.
        d_intermediate: width of the MLPs, 0 for none.
        norm: of the blocks.
        mlp: kind of MLP.
        dropout: probability of a zero.
        context: tokens of a training window.
        windows: ``random`` or ``stream``, see `LanguageTask`.
        baselines: whether to compare with compressors and counting.
        sample: tokens of the text that is written at the end.
        prompt: what that goes on from; "" for the first words of the test part.
        temperature: of that text.

    Raises:
        ValueError: a number outside its range, an unknown choice; attention without a window.
    """

    text: Sequence[str]
    validation_text: Sequence[str] | None = None
    test_text: Sequence[str] | None = None
    validation_fraction: float = recipes.LM["validation_fraction"]
    test_fraction: float = recipes.LM["test_fraction"]
    vocabulary: str = "byte"
    unknown_characters: bool = False
    mixer_types: Sequence[str] = (recipes.LM["mixer"],)
    mixer_kwargs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    d_model: int = recipes.LM["d_model"]
    d_state: int | None = None
    n_layer: int = recipes.LM["n_layer"]
    d_intermediate: int = recipes.LM["d_intermediate"]
    norm: str = recipes.LM["norm"]
    mlp: str = recipes.LM["mlp"]
    dropout: float = recipes.LM["dropout"]
    context: int = recipes.LM["context"]
    windows: str = recipes.LM["windows"]
    baselines: bool = True
    sample: int = recipes.LM["sample"]
    prompt: str = ""
    temperature: float = recipes.LM["temperature"]

    def __post_init__(self) -> None:
        for name in ("text", "validation_text", "test_text"):
            value = getattr(self, name)
            files = [value] if isinstance(value, str | Path) else value
            given = isinstance(files, list | tuple) and all(
                isinstance(f, str | Path) for f in files
            )
            if not given and (value is not None or name == "text"):
                raise ValueError(f"{name} = {value!r}, expected names of files")
        if not isinstance(self.mixer_kwargs, Mapping):
            raise ValueError(f"mixer_kwargs = {self.mixer_kwargs!r}, expected a mapping")
        if self.windows not in WINDOWS:
            raise ValueError(f"windows = {self.windows!r}, expected one of {', '.join(WINDOWS)}")
        if self.context < 1:
            raise ValueError(f"context = {self.context}, expected an integer >= 1")
        if self.sample < 0:
            raise ValueError(f"sample = {self.sample}, expected an integer >= 0")
        if not self.temperature >= 0:
            raise ValueError(f"temperature = {self.temperature}, expected >= 0")
        if self.validation_text is None and not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction = {self.validation_fraction}, expected 0 <= "
                "validation_fraction < 1"
            )
        if self.test_text is None and not 0 < self.test_fraction < 1:
            raise ValueError(
                f"test_fraction = {self.test_fraction}, expected 0 < test_fraction < 1"
            )
        self.model(1)

    def model(self, vocab_size: int) -> LRNNLMConfig:
        """Return the network's config for a vocabulary of that size.

        Raises:
            ValueError: whatever the network or a mixer refuses.
        """
        types = tuple(mixer_name(name) for name in self.mixer_types)
        given = {mixer_name(key): dict(value) for key, value in self.mixer_kwargs.items()}
        kwargs: dict[str, dict[str, Any]] = {}
        for name in dict.fromkeys(types):
            options = given.pop(name, {})
            if name == ATTENTION:
                if options.setdefault("window", self.context) is None:
                    raise ValueError(
                        "attn.window = None: without a window the state of attention grows with "
                        "the text; expected an integer >= 1 (default: the context)"
                    )
            elif name not in WITHOUT_D_STATE:
                default = recipes.model_defaults(name)["d_state"]
                options.setdefault("d_state", default if self.d_state is None else self.d_state)
            kwargs[name] = options
        config = LRNNLMConfig(
            self.d_model, None, self.n_layer, vocab_size, types, {**kwargs, **given},
            self.d_intermediate, norm=self.norm, mlp=self.mlp, dropout=self.dropout,
        )  # fmt: skip
        try:
            LRNNLMHeadModel.from_config(config, device="meta")
        except TypeError as error:
            raise ValueError(f"mixer options: {error}") from error
        return config

    def read(self) -> Texts:
        """Read the files and return the three parts.

        Raises:
            ValueError: see `read_text` and `split_text`.
        """
        own = [
            read_text(files) if files is not None else None
            for files in (self.validation_text, self.test_text)
        ]
        cut = split_text(
            read_text(self.text),
            self.validation_fraction if own[0] is None else 0.0,
            self.test_fraction if own[1] is None else 0.0,
        )
        return Texts(cut.train, own[0] or cut.validation, own[1] or cut.test)
