"""Check an installed wheel from outside the checkout: `python -I smoke.py`.

Proves that the packages come from site-packages, that the CUDA sources travelled with them, that
importing the core pulls in no optional package, and that every model runs once.
"""

import sys
from pathlib import Path

import torch

import lrnnx_core

# Before anything else is imported: what `import lrnnx_core` alone brought in.
OPTIONAL = {"cupy", "numba", "triton", "torch._dynamo"} & set(sys.modules)

import lrnnx_nn  # noqa: E402
from lrnnx_core.backends import cuda  # noqa: E402
from lrnnx_core.registry import MODELS  # noqa: E402

D_MODEL, D_STATE, LENGTH = 4, 8, 5


def check(condition: bool, message: str) -> None:
    """Stop with the message unless the condition holds."""
    if not condition:
        sys.exit(f"smoke: {message}")


def installed() -> None:
    """Check where the packages and their data lie."""
    for package in (lrnnx_core, lrnnx_nn):
        folder = Path(package.__file__).parent
        check("site-packages" in folder.parts, f"{package.__name__} comes from {folder}")
        check((folder / "py.typed").is_file(), f"{folder} has no py.typed")
    check(not OPTIONAL, f"import lrnnx_core imported {sorted(OPTIONAL)}")

    sources = Path(cuda.source_dir())
    check("site-packages" in sources.parts, f"the CUDA sources are looked for in {sources}")
    check(sources.is_dir() and any(sources.iterdir()), f"{sources} is missing or empty")
    check(not (sources / "__init__.py").exists(), f"{sources} must not be a package")


def functions() -> None:
    """Run init and scan of every model of the registry."""
    check(len(MODELS) > 0, "the registry is empty")
    for name, model in MODELS.items():
        generator = torch.Generator().manual_seed(0)
        params = model.init(D_MODEL, D_STATE, generator=generator)
        y, _ = model.scan(params, torch.randn(2, LENGTH, D_MODEL, generator=generator))
        check(y.shape == (2, LENGTH, D_MODEL), f"{name}: scan returned {tuple(y.shape)}")
        check(bool(y.isfinite().all()), f"{name}: scan returned values that are not finite")


def modules() -> None:
    """Run forward and backward of every model's Module."""
    classes = {
        name.lower(): value
        for name in lrnnx_nn.__all__
        if isinstance(value := getattr(lrnnx_nn, name), type)
    }
    for name in MODELS:
        layer = classes.get(name.replace("_", ""))
        if layer is None:
            sys.exit(f"smoke: lrnnx_nn exports no Module for {name}")
        y = layer(D_MODEL, D_STATE)(torch.randn(2, LENGTH, D_MODEL))
        check(y.shape == (2, LENGTH, D_MODEL), f"{name}: forward returned {tuple(y.shape)}")
        y.sum().backward()


if __name__ == "__main__":
    installed()
    functions()
    modules()
    print(f"smoke: {', '.join(MODELS)} run from {Path(lrnnx_core.__file__).parent}")
