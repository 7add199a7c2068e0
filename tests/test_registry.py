"""The table of models, and the protocol that every function in it keeps."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import FUNCTIONS, Case, assert_agree, every_case, every_model, normal

import lrnnx_core
from lrnnx_core import checks, discretize, frequency, initialize, models, ops, registry, sequences
from lrnnx_core.registry import MODELS, Model

# design: `f(*these, *, options)` for every model; the rest are options
POSITIONAL: dict[str, list[str]] = {
    "init": ["d_model", "d_state"],
    "init_state": ["params", "batch_shape"],
    "discretize": ["params"],
    "kernel": ["params", "length"],
    "frequency_response": ["params", "omega"],
    "scan": ["params", "u", "state"],
    "step": ["params", "u_t", "state"],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "init": {"generator": None, "device": None, "dtype": None},
    "discretize": {"discretization": None, "dt_scale": 1.0},
    "kernel": {"discretization": None, "dt_scale": 1.0},
    "frequency_response": {"discretization": None, "dt_scale": 1.0},
    "scan": {
        "integration_timesteps": None, "lengths": None, "mask": None, "reset": None,
        "discretization": None, "dt_scale": 1.0, "mode": "auto", "kernel": None,
    },
    "step": {
        "integration_timestep": None, "discretization": None, "dt_scale": 1.0, "discrete": None,
    },
}  # fmt: skip


def functions(entry: Model) -> dict[str, Callable[..., Any]]:
    return {f: getattr(entry, f) for f in FUNCTIONS if getattr(entry, f) is not None}


# ----------------------------------------------------------------------------------------- look-up


@every_model
def test_models_are_found_without_regard_to_case_and_dashes(entry: Model) -> None:
    name = entry.name
    spellings = [name, name.upper(), name.title(), "-".join(name), name[:1] + "_" + name[1:]]
    spellings += [entry.title, *entry.aliases, *(a.upper() for a in entry.aliases)]
    for spelling in spellings:
        assert registry.get(spelling) is entry, spelling
    assert MODELS[name] is entry


def test_names_and_aliases_are_unique() -> None:
    plain = [re.sub("[-_]", "", n).lower() for m in MODELS.values() for n in (m.name, *m.aliases)]
    assert len(set(plain)) == len(plain)
    titles = [m.title for m in MODELS.values()]
    assert len(set(titles)) == len(titles)


def test_an_unknown_model_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="unknown model 'transformer'; expected one of ") as caught:
        registry.get("transformer")
    assert all(name in str(caught.value) for name in MODELS)
    with pytest.raises(ValueError, match="unknown model ''"):
        registry.bind("")


def test_names_are_those_of_the_files_and_of_the_packages_exports() -> None:
    files = {m.name for m in pkgutil.iter_modules(models.__path__) if not m.name.startswith("_")}
    assert set(MODELS) == files
    for name in MODELS:
        module = importlib.import_module(f"lrnnx_core.models.{name}")
        assert getattr(lrnnx_core, name) is module
        assert name in lrnnx_core.__all__
        for f, function in functions(MODELS[name]).items():
            assert function is getattr(module, f)


@every_model
def test_every_model_is_cited(entry: Model) -> None:
    text = lrnnx_core.citation(entry.title)
    assert text == entry.citation
    assert re.match(r"@(inproceedings|article|misc)\{\w+,\n", text)
    assert text.count("{") == text.count("}")
    for field in ("title", "author", "year", "arXiv"):
        assert field in text, field
    with pytest.raises(ValueError, match="unknown model"):
        lrnnx_core.citation("nothing")


@every_model
def test_facts_are_complete(entry: Model) -> None:
    assert entry.kind in ("lti", "ltv")
    assert entry.connectivity in ("siso", "mimo")
    assert (entry.kernel is not None) == (entry.kind == "lti")
    assert (entry.frequency_response is not None) == (entry.kind == "lti")
    assert {"auto", "recurrent"} <= set(entry.modes)
    assert entry.discretizations
    assert set(entry.discretizations) <= set(discretize.NAMES)
    assert entry.stability
    names = [v.name for v in entry.variants]
    assert len(set(names)) == len(names) >= 1
    for variant in entry.variants:
        assert re.fullmatch(r"[a-z0-9_]+", variant.name)
        assert set(variant.rtol) >= {"float64", "float32"}
        assert variant.rtol["float64"] <= 1e-12
        assert variant.rtol["float32"] <= 2e-5


# -------------------------------------------------------------------------------------------- bind


@every_case
def test_bind_fixes_choices_in_every_function_that_knows_them(case: Case) -> None:
    bound, entry, u = case.model, case.entry, normal(2, 6, 3)
    for f, function in functions(bound).items():
        known = registry.options(entry, f)
        kwargs = getattr(function, "keywords", {})
        assert kwargs == {k: v for k, v in case.choices.items() if k in known}
        assert registry.options(bound, f) == known
    params = case.params()
    known = registry.options(entry, "scan")
    want = entry.scan(params, u, **{k: v for k, v in case.choices.items() if k in known})
    assert_agree(bound.scan(params, u), want, 0.0)
    assert bound.name == entry.name
    assert registry.bind(entry.title.upper(), **case.choices).variants is entry.variants


@every_model
def test_bind_refuses_a_choice_that_no_function_has(entry: Model) -> None:
    with pytest.raises(
        ValueError, match=f"{entry.name} has no option 'widht'; expected one of"
    ) as e:
        registry.bind(entry.name, widht=3)
    for f in functions(entry):
        assert all(repr(option) in str(e.value) for option in registry.options(entry, f))
    assert registry.bind(entry.name).init is not None


@every_model
def test_every_choice_of_a_variant_is_an_option(entry: Model) -> None:
    for variant in entry.variants:
        assert set(variant.init) <= registry.options(entry, "init"), variant.name
        others = set().union(*(registry.options(entry, f) for f in FUNCTIONS if f != "init"))
        assert set(variant.call) <= others, variant.name
        shared = set(variant.init) & others
        for choice in shared:  # a choice both know is the same in both
            assert variant.call.get(choice, variant.init[choice]) == variant.init[choice]


# --------------------------------------------------------------------------------------- signatures


@every_model
def test_every_function_begins_as_the_protocol_says(entry: Model) -> None:
    for f, function in functions(entry).items():
        parameters = list(inspect.signature(function).parameters.values())
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        names = [p.name for p in positional]
        if f == "discretize" and entry.kind == "ltv":  # it takes what the step depends on, too
            names = names[:1]
        assert names == POSITIONAL[f], f
        rest = parameters[len(positional) :]
        assert all(p.kind is p.KEYWORD_ONLY for p in rest), f
        assert all(p.default is not p.empty for p in rest), f"{f}: an option has no default"
        for name, default in OPTIONS.get(f, {}).items():
            if name in ("kernel", "discrete") and entry.kind == "ltv":
                continue
            assert name in {p.name for p in rest}, f"{f} has no {name}"
            assert inspect.signature(function).parameters[name].default == default, f"{f}: {name}"
    state = inspect.signature(entry.scan).parameters["state"]
    assert state.default is None
    assert inspect.signature(entry.init_state).parameters["batch_shape"].default == ()


@every_model
def test_an_option_has_one_default_in_all_functions_of_a_model(entry: Model) -> None:
    seen: dict[str, tuple[str, Any]] = {}
    for f, function in functions(entry).items():
        for p in inspect.signature(function).parameters.values():
            if p.kind is not p.KEYWORD_ONLY:
                continue
            first, default = seen.setdefault(p.name, (f, p.default))
            assert p.default == default, f"{p.name}: {default} in {first}, {p.default} in {f}"


@every_model
def test_options_of_calls_are_known_wherever_they_matter(entry: Model) -> None:
    """What changes the recurrence changes it in every function that runs it."""
    scan, step = registry.options(entry, "scan"), registry.options(entry, "step")
    sequence = {
        "integration_timesteps",
        "lengths",
        "mask",
        "reset",
        "bidirectional",
        "mode",
        "kernel",
        "chunk_size",  # how many samples are worked on at once
        "max_bytes",  # in which order factors are contracted
    }
    assert scan - sequence == step - {"integration_timestep"}
    placed = {"integration_timesteps", "timestep_mode"}
    both = registry.options(entry, "discretize") - placed
    assert both <= scan
    if entry.kernel is not None:
        kernel = registry.options(entry, "kernel")
        assert both <= kernel == registry.options(entry, "frequency_response")


@every_model
def test_functions_are_annotated(entry: Model) -> None:
    for f, function in functions(entry).items():
        signature = inspect.signature(function)
        assert signature.return_annotation is not signature.empty, f
        for p in signature.parameters.values():
            assert p.annotation is not p.empty, f"{f}: {p.name}"


# --------------------------------------------------------------------------------------- docstrings

PUBLIC = [
    pytest.param(value, id=f"{module.__name__.removeprefix('lrnnx_core.')}.{name}")
    for module in [
        checks,
        discretize,
        frequency,
        initialize,
        sequences,
        registry,
        *(importlib.import_module(f"lrnnx_core.models.{m}") for m in MODELS),
        *(importlib.import_module(f"lrnnx_core.ops.{o}") for o in ops.__all__),
    ]
    for name, value in vars(module).items()
    if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
]


@pytest.mark.parametrize("function", PUBLIC)
def test_every_public_function_has_a_docstring(function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function)
    assert text
    first = text.splitlines()[0]
    assert first.endswith((".", ":"))
    assert first[0].isupper()


@every_model
def test_model_functions_document_every_argument_and_what_they_return(entry: Model) -> None:
    for f, function in functions(entry).items():
        text = inspect.getdoc(function) or ""
        if f == "init_state":  # its one line names the shape, if it is one
            one = "zero state (*batch_shape" in text
            assert one or ("Args:" in text and "(*batch_shape" in text), entry.name
            if one:
                continue
            text += "\nRaises:"  # nothing
        assert "Args:" in text, f
        assert "Returns:" in text or text.startswith("Return "), f
        assert "Raises:" in text, f
        arguments = text.split("Args:", 1)[1].split("\nReturns:")[0].split("\nRaises:")[0]
        for name in inspect.signature(function).parameters:
            assert re.search(rf"\b{name}\b.*:", arguments), f"{entry.name}.{f}: {name}"


@every_model
def test_sources_are_named(entry: Model) -> None:
    for f in ("init", "scan"):
        assert "Source:" in (inspect.getdoc(getattr(entry, f)) or ""), f


# ------------------------------------------------------------------------------------------ purity


@every_case
def test_core_functions_use_no_randomness_but_in_init(case: Case) -> None:
    params, u = case.params(), normal(2, 40, 3)
    before = torch.get_rng_state()
    for mode in case.model.modes:
        case.model.scan(params, u, mode=mode)
    case.model.discretize(*case.discretized(params))
    state = case.model.init_state(params, (2,))
    case.model.step(params, u[:, 0], state)
    assert torch.equal(torch.get_rng_state(), before)
