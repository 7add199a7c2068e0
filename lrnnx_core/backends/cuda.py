# SPDX-License-Identifier: MIT
# pyright: basic
"""Where the CUDA C++ sources are. They are text, compiled on first use."""

from __future__ import annotations

from pathlib import Path


def source_dir() -> Path:
    """Return the folder of the CUDA sources: the checkout's ``cuda/``, else the wheel's copy.

    The checkout is preferred where it stands beside the package, since an editable install may
    carry an old copy.

    Raises:
        FileNotFoundError: neither is there; the installation is broken.
    """
    here = Path(__file__).resolve().parent
    root = here.parent.parent
    if (root / "cuda").is_dir() and (root / "pyproject.toml").is_file():
        return root / "cuda"
    if (here / "_cuda").is_dir():
        return here / "_cuda"
    raise FileNotFoundError(
        f"no CUDA sources in {root / 'cuda'} or {here / '_cuda'}; reinstall lrnnx-core"
    )
