# SPDX-License-Identifier: MIT
"""Where data sets come from: what aeon and scikit-learn ship, `.ts` and `.npz` files.

Nothing is downloaded.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from lrnnx_core import checks
from lrnnx_nn.data.dataset import Dataset, Raw, build, check_classes, check_raw, stratified_split
from lrnnx_nn.optional import require

TEST_FRACTION = 0.3
"""Of a file without a test part, what is set aside as one."""

DIGITS = "digits"
NPZ_KEYS = "X_train, y_train, X_test, y_test [lengths_train, lengths_test], or X, y [lengths]"


def load_dataset(source: str | Path, *, seed: int = 0) -> Dataset:
    """Load a classification set by name or from a file.

    Args:
        source: one of

            * the name of a set that aeon ships (see `bundled_names`), with its official split;
            * ``digits``, scikit-learn's 1797 handwritten digits of 8 x 8 pixels, read row by row as
              64 samples of one channel; a test part is carved;
            * a ``.ts`` file: ``NAME_TRAIN.ts`` or ``NAME_TEST.ts`` with the other one beside it (or
              ``NAME.ts`` for the pair), else one file from which a test part is carved;
            * a ``.npz`` file with keys ``X_train, y_train, X_test, y_test`` or ``X, y``; X is
              (n, L, channels), y (n,). ``lengths_train``, ``lengths_test`` or ``lengths`` (n,) say
              how many samples of each row count.
        seed: of the stratified split, where a test part is carved (30 % of each class).

    Raises:
        ValueError: an unknown name (the message lists the known ones), a file that is missing, not
            readable, empty, of one class, with NaN, or whose shapes do not match.
        MissingDependencyError: aeon is not installed (names and ``.ts`` files), or scikit-learn
            (``digits``).
    """
    path = Path(source)
    if str(source).lower() == DIGITS:
        return _load_digits(seed)
    if path.suffix.lower() == ".npz":
        return _load_npz(path, seed)
    if path.suffix.lower() == ".ts":
        return _load_ts(path, seed)
    return _load_bundled(str(source))


# --- aeon ----------------------------------------------------------------------------------------


def bundled_names() -> list[str]:
    """Return the names of the sets that need no file: those aeon ships, and ``digits``, sorted.

    Raises:
        MissingDependencyError: aeon is not installed.
    """
    return sorted((*_bundled(), DIGITS), key=str.lower)


def _bundled() -> dict[str, Path]:
    """Return the folders of aeon's own classification sets by name."""
    folder = Path(require("aeon").__file__).parent / "datasets" / "data"
    found: dict[str, Path] = {}
    for train in folder.glob("*/*_TRAIN.ts"):
        name = train.name.removesuffix("_TRAIN.ts")
        if train.with_name(f"{name}_TEST.ts").is_file() and _is_classification(train):
            found[name] = train.parent
    return found


def _is_classification(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        for line in file:
            words = line.lower().split()
            if words[:2] == ["@classlabel", "true"]:
                return True
            if words[:1] == ["@data"]:
                return False
    return False


def _load_bundled(name: str) -> Dataset:
    folders = _bundled()
    known = {key.lower(): key for key in folders}
    found = known.get(name.lower())
    if found is None:
        collections = require("aeon.datasets.tsc_datasets")
        archived = {n.lower() for n in (*collections.univariate, *collections.multivariate)}
        reason = (
            "is in the public archive, but aeon does not ship it and nothing is downloaded here; "
            "give its NAME_TRAIN.ts instead"
            if name.lower() in archived
            else "is neither a set that ships with aeon or scikit-learn nor a .ts or .npz file"
        )
        raise ValueError(
            f"data set {name!r} {reason}. known names are {', '.join(bundled_names())}"
        )
    train, test = (_read_ts(folders[found] / f"{found}_{part}.ts") for part in ("TRAIN", "TEST"))
    return build(found, train, test, "official")


# --- scikit-learn --------------------------------------------------------------------------------


def _load_digits(seed: int) -> Dataset:
    images, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    return _carve(DIGITS, Raw(list(images[:, :, None]), labels), seed)


# --- .ts -----------------------------------------------------------------------------------------


def _load_ts(path: Path, seed: int) -> Dataset:
    stem = path.stem
    for suffix in ("_TRAIN", "_TEST"):
        stem = stem.removesuffix(suffix)
    pair = [path.with_name(f"{stem}_{part}{path.suffix}") for part in ("TRAIN", "TEST")]
    asked = path in pair or not path.exists()
    if asked and all(p.is_file() for p in pair):
        train, test = (_read_ts(p) for p in pair)
        return build(stem, train, test, "files")
    return _carve(path.stem, _read_ts(path), seed)


def _read_ts(path: Path) -> Raw:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty")
    datasets = require("aeon.datasets")
    try:
        x, y, header = datasets.load_from_ts_file(str(path), return_meta_data=True)
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: not a readable .ts file ({error})") from error
    if not header["classlabel"]:
        raise ValueError(f"{path}: no class labels, expected a file with `@classLabel true ...`")
    if header["timestamps"]:
        raise ValueError(f"{path}: time stamps inside .ts files are not supported")
    raw = Raw([np.asarray(series).T for series in x], np.asarray(y))
    check_raw(str(path), raw)
    return raw


def _carve(name: str, raw: Raw, seed: int) -> Dataset:
    """Set a stratified test part aside."""
    check_classes(name, raw.y)
    _, numbers = np.unique(raw.y, return_inverse=True)
    first, second = stratified_split(numbers.tolist(), TEST_FRACTION, seed)
    parts = [Raw([raw.x[int(i)] for i in rows], raw.y[rows.numpy()]) for rows in (first, second)]
    return build(name, parts[0], parts[1], "carved")


# --- .npz ----------------------------------------------------------------------------------------


def _load_npz(path: Path, seed: int) -> Dataset:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error})") from error
    if {"X_train", "y_train", "X_test", "y_test"} <= set(arrays):
        train, test = (_npz_part(path, arrays, f"_{part}") for part in ("train", "test"))
        return build(path.stem, train, test, "keys")
    if {"X", "y"} <= set(arrays):
        return _carve(path.stem, _npz_part(path, arrays, ""), seed)
    raise ValueError(f"{path}: keys {sorted(arrays)}, expected {NPZ_KEYS}")


def _npz_part(path: Path, arrays: Mapping[str, np.ndarray], suffix: str) -> Raw:
    x, y = arrays[f"X{suffix}"], arrays[f"y{suffix}"]
    where = f"{path}, X{suffix}"
    if x.ndim != 3:
        raise ValueError(f"{where}: {x.shape}, expected (n, L, channels)")
    lengths = arrays.get(f"lengths{suffix}")
    if lengths is None:
        rows = list(x)
    else:
        if lengths.shape != x.shape[:1] or lengths.dtype.kind not in "iu":
            raise ValueError(
                f"{path}, lengths{suffix}: {lengths.shape} {lengths.dtype}, "
                f"expected ({len(x)},) integers"
            )
        try:
            checks.lengths(torch.from_numpy(lengths.astype(np.int64)), x.shape[1])
        except ValueError as error:
            raise ValueError(f"{path}, lengths{suffix}: {error}") from error
        rows = [row[: int(count)] for row, count in zip(x, lengths, strict=True)]
    raw = Raw(rows, y)
    check_raw(where, raw)
    return raw
