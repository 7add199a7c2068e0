"""Data sets: what ships, files of the user's, splits, and all that is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lrnnx_nn.data import bundled_names, load_dataset, statistics, stratified_split
from lrnnx_nn.data.dataset import Sequences

pytest.importorskip("aeon")


def arrays(n: int = 12, length: int = 5, channels: int = 2, classes: int = 3) -> dict[str, Any]:
    random = np.random.default_rng(0)
    X = random.standard_normal((2 * n, length, channels))
    y = np.arange(2 * n) % classes
    return {"X_train": X[:n], "y_train": y[:n], "X_test": X[n:], "y_test": y[n:]}


def npz(path: Path, **values: Any) -> Path:
    np.savez(path / "mine.npz", **values)
    return path / "mine.npz"


def ts(path: Path, rows: list[str], *, equal: str = "false", header: str = "") -> Path:
    text = (
        f"@problemName mine\n@timeStamps false\n@univariate false\n@equalLength {equal}\n"
        f"{header or '@classLabel true a b'}\n@data\n"
    )
    path.write_text(text + "".join(row + "\n" for row in rows))
    return path


def test_japanese_vowels_is_ragged_speech() -> None:
    data = load_dataset("japanesevowels")
    assert (data.name, data.split) == ("JapaneseVowels", "official")
    assert (len(data.train), len(data.test), data.channels, len(data.classes)) == (270, 370, 12, 9)
    assert (int(data.train.lengths.min()), int(data.test.lengths.max())) == (7, 29)
    row = data.train.x[0]
    assert bool((row[int(data.train.lengths[0]) :] == 0).all())
    assert torch.bincount(data.train.y).tolist() == [30] * 9
    torch.testing.assert_close(row[0, :2], torch.tensor([1.860936, -0.207383]))


@pytest.mark.parametrize("name", ["BasicMotions", "ItalyPowerDemand", "PickupGestureWiimoteZ"])
def test_other_bundled_sets(name: str) -> None:
    assert name in bundled_names()
    data = load_dataset(name)
    assert data.train.x.shape[0] == len(data.train.y)
    assert int(data.test.y.max()) == len(data.classes) - 1


def test_digits_are_read_row_by_row() -> None:
    data = load_dataset("Digits")
    assert (data.name, data.split, data.channels, len(data.classes)) == ("digits", "carved", 1, 10)
    assert (len(data.train), len(data.test)) == (1258, 539)
    assert bool((data.train.lengths == 64).all())
    images = load_digits().images.reshape(-1, 64)
    rows = torch.cat([data.train.x, data.test.x])[..., 0].numpy()
    assert sorted(map(tuple, rows)) == sorted(map(tuple, images))
    zeros = np.bincount(data.test.y.numpy()) / np.bincount(load_digits().target)
    np.testing.assert_allclose(zeros, 0.3, atol=0.01)  # of every class


def test_every_bundled_name_is_a_classification_set() -> None:
    names = bundled_names()
    assert "JapaneseVowels" in names
    assert not {"Covid3Month", "CardanoSentiment", "UnitTestTimeStamps"} & set(names)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"neither a set that ships .* JapaneseVowels"):
        load_dataset("JapaneseVowel")
    with pytest.raises(ValueError, match=r"nothing is downloaded .* BasicMotions"):
        load_dataset("FordA")


def test_npz_with_both_parts(tmp_path: Path) -> None:
    values = arrays()
    values["X_train"][0, 3:] = np.nan  # padding may hold anything
    lengths = np.full(12, 5)
    lengths[0] = 3
    data = load_dataset(npz(tmp_path, **values, lengths_train=lengths))
    assert (data.split, data.classes) == ("keys", ("0", "1", "2"))
    assert data.train.lengths.tolist() == lengths.tolist()
    assert bool((data.train.x[0, 3:] == 0).all())
    np.testing.assert_allclose(data.test.x.numpy(), values["X_test"].astype(np.float32))


def test_npz_in_one_piece_is_split_by_class(tmp_path: Path) -> None:
    values = arrays(20, classes=2)
    path = npz(tmp_path, X=values["X_train"], y=np.array(["up", "down"] * 10))
    first, again, other = (load_dataset(path, seed=seed) for seed in (1, 1, 2))
    assert first.classes == ("down", "up")
    assert first.split == "carved"
    assert torch.bincount(first.train.y).tolist() == [7, 7]
    assert torch.bincount(first.test.y).tolist() == [3, 3]
    assert torch.equal(first.test.x, again.test.x)
    assert not torch.equal(first.test.x, other.test.x)
    everything = torch.cat([first.train.x, first.test.x]).sum((1, 2)).sort().values
    expected = np.sort(values["X_train"].astype(np.float32).sum((1, 2)))
    np.testing.assert_allclose(everything.numpy(), expected, rtol=1e-4, atol=1e-5)


ROWS = [f"{i},1,2:{i},3,4:{'ab'[i % 2]}" for i in range(10)]


def test_ts_pair_and_single_file(tmp_path: Path) -> None:
    train = ts(tmp_path / "mine_TRAIN.ts", ROWS)
    single = load_dataset(train)
    assert (single.split, len(single.test)) == ("carved", 4)
    ts(tmp_path / "mine_TEST.ts", ["7,8:9,10:a", "1:2:b"])
    for source in (train, tmp_path / "mine_TEST.ts", tmp_path / "mine.ts"):
        data = load_dataset(str(source))
        assert (data.name, data.split) == ("mine", "files")
        assert (len(data.train), data.test.lengths.tolist()) == (10, [2, 1])
        assert data.test.x[0].tolist() == [[7.0, 9.0], [8.0, 10.0]]
        assert data.classes == ("a", "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X_train": np.zeros((12, 5))}, r"X_train: \(12, 5\), expected \(n, L, channels\)"),
        ({"y_train": np.zeros(11)}, r"labels \(11,\) for 12 sequences, expected \(12,\)"),
        ({"y_train": np.zeros(12, int)}, "only one class, 0; expected at least two"),
        ({"y_train": np.full(12, np.nan)}, "a label is NaN"),
        ({"X_train": np.full((12, 5, 2), np.nan)}, "sequence 0 holds nan at time 0, channel 0"),
        ({"X_test": np.full((12, 5, 2), np.inf)}, "X_test: sequence 0 holds inf"),
        ({"X_test": np.zeros((12, 5, 3))}, "2 channels in the training part and 3 in the test"),
        ({"X_train": np.zeros((0, 5, 2))}, "X_train: no sequences"),
        ({"X_train": np.zeros((12, 0, 2))}, "expected at least one sample"),
        ({"X_train": np.zeros((12, 5, 2), complex)}, "dtype complex128, expected real numbers"),
        ({"y_test": np.full(12, 7)}, "test label 7 does not occur in the training part"),
        ({"lengths_train": np.full(12, -1)}, "lengths: between -1 and -1, expected 0 ... 5"),
        ({"lengths_train": np.full(12, 6)}, "lengths: between 6 and 6, expected 0 ... 5"),
        ({"lengths_train": np.zeros(12, int)}, "expected at least one sample"),
        ({"lengths_train": np.full(3, 5)}, r"lengths_train: \(3,\) int64, expected \(12,\)"),
        ({"lengths_train": np.full(12, 2.5)}, r"float64, expected \(12,\) integers"),
    ],
)
def test_bad_npz_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(npz(tmp_path, **(arrays() | change)))


def test_files_that_are_not_data(tmp_path: Path) -> None:
    for name in ("none.npz", "none.ts"):
        with pytest.raises(ValueError, match=f"{name}: no such file"):
            load_dataset(tmp_path / name)
    for name in ("empty.npz", "bad.npz"):
        (tmp_path / name).write_bytes(b"" if name == "empty.npz" else b"PK not a zip")
        with pytest.raises(ValueError, match=f"{name}: not a readable .npz file"):
            load_dataset(tmp_path / name)
    with pytest.raises(ValueError, match=r"keys \['a'\], expected X_train, y_train"):
        load_dataset(npz(tmp_path, a=np.zeros(3)))
    np.savez(tmp_path / "pickle.npz", X=np.array([{}, 1], dtype=object), y=np.zeros(2))
    with pytest.raises(ValueError, match=r"pickle\.npz: not a readable"):
        load_dataset(tmp_path / "pickle.npz")
    (tmp_path / "empty.ts").touch()
    with pytest.raises(ValueError, match=r"empty\.ts: the file is empty"):
        load_dataset(tmp_path / "empty.ts")
    (tmp_path / "text.ts").write_text("hello\n")
    with pytest.raises(ValueError, match=r"text\.ts: no sequences"):
        load_dataset(tmp_path / "text.ts")


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([], "", "no sequences"),
        (["1,2:3,4:a", "1,x:3,4:b"], "", "not a readable .ts file .*could not convert"),
        (["1,2:3,4:a", "1,2:b"], "", "Inconsistent number of dimensions"),
        (["1,2:3,4:a", "1,?:3,4:b"], "", "sequence 1 holds nan at time 1, channel 0"),
        (["1,2:3,4:a", "5,6:7,8:a"], "", "only one class, a"),
        (["1,2:3,4", "5,6:7,8"], "@classLabel false", "no class labels"),
        (["1,2:3,4:1.5", "5,6:7,8:2"], "@targetlabel true", "no class labels"),
        (["(0,1.0):a"], "@timeStamps true\n@classLabel true a b", "time stamps"),
    ],
)
def test_bad_ts_is_refused(tmp_path: Path, rows: list[str], header: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(ts(tmp_path / "bad.ts", rows, header=header))


def test_stratified_split() -> None:
    y = torch.tensor([0] * 10 + [1] * 5 + [2])
    first, second = stratified_split(y, 0.3, seed=3)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(16))
    assert torch.bincount(y[second], minlength=3).tolist() == [3, 2, 0]
    assert torch.equal(second, stratified_split(y, 0.3, seed=3)[1])
    assert not torch.equal(second, stratified_split(y, 0.3, seed=4)[1])
    assert torch.bincount(y[stratified_split(y, 0.99, 0)[0]]).tolist() == [1, 1, 1]
    assert torch.bincount(y[stratified_split(y, 0.01, 0)[1]]).tolist() == [1, 1]
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected 0 < fraction < 1"):
            stratified_split(y, fraction, 0)
    with pytest.raises(ValueError, match="every class has a single row"):
        stratified_split([0, 1, 2], 0.5, 0)


def test_statistics_count_valid_samples_alone() -> None:
    x = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [99.0, 99.0]]])
    part = Sequences(x, torch.tensor([2]), torch.tensor([0]))
    mean, std = statistics(part)
    assert mean.tolist() == [2.0, 5.0]
    assert std.tolist() == [1.0, 1.0]  # a constant channel is left alone


def test_take_cuts_to_the_longest() -> None:
    part = Sequences(torch.ones(3, 9, 2), torch.tensor([9, 2, 4]), torch.arange(3))
    taken = part.take(torch.tensor([2, 1]))
    assert taken.x.shape == (2, 4, 2)
    assert taken.y.tolist() == [2, 1]
