"""Recordings: every encoding against scipy, bad files, folders, silence, noise and splits."""

from __future__ import annotations

import math
import struct
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io.wavfile
import torch
from torch import Tensor

from lrnnx_nn.data import audio
from lrnnx_nn.data import wav as wav_module
from lrnnx_nn.data.audio import (
    RecordedNoise,
    Recording,
    mix,
    pink_noise,
    read_folder,
    read_wav,
    resample,
    split_by_file,
    trim_silence,
    white_noise,
    write_wav,
)

same = torch.testing.assert_close
RATE = 8000


def tone(n: int = 800, level: float = 0.5, hertz: float = 440.0, rate: int = RATE) -> np.ndarray:
    return level * np.sin(2 * np.pi * hertz * np.arange(n) / rate)


def recording(samples: np.ndarray | Tensor, rate: int = RATE, name: str = "x.wav") -> Recording:
    return Recording(name, torch.as_tensor(samples, dtype=torch.float32), rate)


def wav(folder: Path, name: str, samples: np.ndarray, rate: int = RATE) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    scipy.io.wavfile.write(folder / name, rate, np.round(samples * 2**15).astype("<i2"))
    return folder / name


def wav24(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 3, RATE, 0, "NONE", ""))
        data = np.round(samples * 2**23).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3]
        file.writeframes(data.tobytes())


# --------------------------------------------------------------------------------------- WAV files


@pytest.mark.parametrize(
    ("dtype", "scale", "offset", "error"),
    [
        ("u1", 2**7, 128, 2**-8),
        ("<i2", 2**15, 0, 2**-16),
        ("<i4", 2**31, 0, 2**-24),
        ("<f4", 1, 0, 2**-25),
        ("<f8", 1, 0, 2**-25),
    ],
)
def test_encodings(tmp_path: Path, dtype: str, scale: float, offset: float, error: float) -> None:
    x = tone()
    stored = x * scale + offset
    stored = stored if dtype[-2] == "f" else np.round(stored)
    scipy.io.wavfile.write(tmp_path / "x.wav", RATE, stored.astype(dtype))
    got = read_wav(tmp_path / "x.wav")
    assert (got.name, got.rate, got.samples.dtype, got.seconds) == (
        "x.wav",
        8000,
        torch.float32,
        0.1,
    )
    assert float((got.samples.double() - torch.from_numpy(x)).abs().max()) <= 1.01 * error


def test_24_bits(tmp_path: Path) -> None:
    wav24(tmp_path / "x.wav", tone())
    got = read_wav(tmp_path / "x.wav").samples.double().numpy()
    assert np.abs(got - tone()).max() < 2**-23
    assert np.abs(got - scipy.io.wavfile.read(tmp_path / "x.wav")[1] / 2**31).max() < 2**-24


def test_channels_and_other_chunks(tmp_path: Path) -> None:
    left, right = tone(), tone(hertz=1000.0)
    stereo = np.stack([left, right], 1).astype("<f4")
    body = stereo.tobytes()
    fmt = struct.pack("<HHIIHHHHI", 0xFFFE, 2, RATE, 8 * RATE, 8, 32, 22, 32, 3)
    fmt += struct.pack("<H", 3) + wav_module._SUBTYPE
    chunks = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # of odd size: one byte of padding
    chunks += b"fmt " + struct.pack("<I", len(fmt)) + fmt
    chunks += b"data" + struct.pack("<I", len(body)) + body + b"cue " + struct.pack("<I", 100)
    content = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
    (tmp_path / "x.wav").write_bytes(content)
    for channel, expected in (("left", left), ("right", right), ("mean", (left + right) / 2)):
        got = read_wav(tmp_path / "x.wav", channel=channel)  # type: ignore[arg-type]
        np.testing.assert_allclose(got.samples.numpy(), expected, atol=1e-7)
    with pytest.raises(ValueError, match="channel = 'middle'"):
        read_wav(tmp_path / "x.wav", channel="middle")  # type: ignore[arg-type]
    wav(tmp_path, "mono.wav", left)
    with pytest.raises(ValueError, match=r"mono\.wav: one channel, there is no right one"):
        read_wav(tmp_path / "mono.wav", channel="right")


def test_written_files_come_back(tmp_path: Path) -> None:
    x = torch.from_numpy(np.append(tone(), [1.5, -1.5])).float()
    write_wav(tmp_path / "x.wav", x, 16000)
    got = read_wav(tmp_path / "x.wav")
    assert got.rate == 16000
    same(got.samples, x.clamp(-1, 1 - 2**-15), rtol=0, atol=2**-16 * 1.01)
    rate, samples = scipy.io.wavfile.read(tmp_path / "x.wav")
    assert (rate, samples.dtype, samples.shape) == (16000, np.int16, (802,))
    for bad in (torch.ones(2, 2), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match=r"write_wav: .*expected finite \(L,\)"):
            write_wav(tmp_path / "bad.wav", bad, RATE)
    assert not (tmp_path / "bad.wav").exists()


def broken(path: Path, change: Callable[[bytes], bytes]) -> Path:
    wav(path, "x.wav", tone())
    (path / "x.wav").write_bytes(change((path / "x.wav").read_bytes()))
    return path / "x.wav"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b"", "not a WAV file"),
        (lambda b: b"OggS" + b[4:], "not a WAV file"),
        (lambda b: b[:8] + b"AVI " + b[12:], "not a WAV file"),
        (lambda b: b[:-10], "truncated, 1590 of 1600 bytes of 'data'"),
        (lambda b: b[:36], "truncated, no chunk of samples"),
        (lambda b: b[:30], "truncated, 10 of 16 bytes of 'fmt '"),
        (lambda b: b[:12] + b[36:], "not a readable WAV file, samples before their format"),
        (lambda b: b[:20] + b"\x06\x00" + b[22:], "encoding 0x6 of 16 bits, expected PCM"),
        (lambda b: b[:34] + b"\x0c\x00" + b[36:], "encoding 0x1 of 12 bits"),
        (lambda b: b[:22] + b"\x00\x00" + b[24:], "0 channels at 8000 Hz"),
        (lambda b: b[:22] + b"\x03\x00" + b[24:], "truncated, 1600 bytes in frames of 6"),
        (lambda b: b[:40] + bytes(4), "no samples"),
    ],
)
def test_bad_files(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(ValueError, match=rf"x\.wav: {message}"):
        read_wav(broken(tmp_path, change))


def test_samples_that_are_not_finite(tmp_path: Path) -> None:
    scipy.io.wavfile.write(tmp_path / "x.wav", RATE, np.array([0.0, np.nan], "<f4"))
    with pytest.raises(ValueError, match=r"x\.wav: a sample that is NaN or infinite"):
        read_wav(tmp_path / "x.wav")
    with pytest.raises(ValueError, match=r"y\.wav: no such file"):
        read_wav(tmp_path / "y.wav")


def test_resampling() -> None:
    x = recording(tone(16000, rate=16000), 16000)
    got = resample(x, RATE)
    assert (got.rate, len(got.samples), got.name) == (8000, 8000, "x.wav")
    inner = slice(100, -100)
    np.testing.assert_allclose(got.samples.numpy()[inner], tone(8000)[inner], atol=2e-3)
    assert resample(x, 16000) is x
    assert len(resample(recording(tone(441), 44100), 48000).samples) == 480
    with pytest.raises(ValueError, match="rate = 0"):
        resample(x, 0)


# ----------------------------------------------------------------------------------------- folders


def test_folders(tmp_path: Path) -> None:
    wav(tmp_path, "b/2.WAV", tone(300))
    wav(tmp_path, "a.wav", tone(200))
    wav(tmp_path, "quiet.wav", np.zeros(100))
    wav(tmp_path, ".hidden.wav", tone(200, rate=1), 1)
    (tmp_path / "notes.txt").write_text("no sound")
    found = read_folder(tmp_path)
    assert [item.name for item in found.items] == ["a.wav", "b/2.WAV"]
    assert (found.rate, found.silent, found.seconds) == (8000, ["quiet.wav"], 500 / 8000)


def test_another_rate_is_refused_or_resampled(tmp_path: Path) -> None:
    wav(tmp_path, "a.wav", tone(800))
    wav(tmp_path, "b.wav", tone(1600, rate=16000), 16000)
    with pytest.raises(ValueError, match=r"b\.wav: 16000 Hz, expected 8000 Hz .*on-rate resample"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match=r"a\.wav: 8000 Hz, expected 16000 Hz"):
        read_folder(tmp_path, rate=16000)
    found = read_folder(tmp_path, on_rate="resample", trim=False)
    assert [(item.rate, len(item.samples)) for item in found.items] == [(8000, 800)] * 2
    assert read_folder(tmp_path, rate=4000, on_rate="resample").rate == 4000


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no WAV files in it"):
        read_folder(tmp_path)
    wav(tmp_path, "quiet.wav", np.zeros(100))
    with pytest.raises(ValueError, match="1 WAV files, all of them silent"):
        read_folder(tmp_path)
    wav(tmp_path, "a.wav", tone())
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"b\.wav: not a WAV file"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match="on_rate = 'ignore'"):
        read_folder(tmp_path, on_rate="ignore")  # type: ignore[arg-type]


def test_silence_is_trimmed() -> None:
    x = np.concatenate([np.zeros(1000), tone(800), np.zeros(2000)])
    got = trim_silence(recording(x), margin=0.01).samples
    same(got, torch.from_numpy(x[960 - 80 : 1840 + 80]).float())  # in frames of 80 samples
    assert len(trim_silence(recording(np.zeros(100))).samples) == 0
    assert len(trim_silence(recording(1e-4 * tone())).samples) == 0  # -80 dB: quiet all through
    whole = recording(tone(805))
    same(trim_silence(whole).samples, whole.samples)
    faint = np.concatenate([tone(800), tone(800, level=0.5e-3)])  # 60 dB below
    assert len(trim_silence(recording(faint), margin=0.0).samples) == 800


def test_splits_by_file() -> None:
    items = [recording(tone(), name=f"{i:02d}.wav") for i in range(20)]
    split = split_by_file(items, 0.1, 0.2)
    names = [[item.name for item in part] for part in split]
    assert [len(part) for part in names] == [14, 2, 4]
    assert sorted(name for part in names for name in part) == [item.name for item in items]
    again = split_by_file(items[::-1], 0.1, 0.2)
    assert [[item.name for item in part] for part in again] == names
    assert [
        [item.name for item in part] for part in split_by_file(items, 0.1, 0.2, seed=1)
    ] != names
    assert [len(part) for part in split_by_file(items[:3], 0.01, 0.01)] == [1, 1, 1]
    with pytest.raises(ValueError, match="2 recordings, too few"):
        split_by_file(items[:2])
    with pytest.raises(ValueError, match=r"validation = 0\.5, test = 0\.5"):
        split_by_file(items, 0.5, 0.5)


# ------------------------------------------------------------------------------------------- noise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", [1, 2, 7, 4096])
@pytest.mark.parametrize("noise", [white_noise, pink_noise])
def test_noise_has_unit_power_and_repeats(noise: Callable[..., Tensor], length: int) -> None:
    x = noise((3, length), seeded())
    assert torch.equal(x, noise((3, length), seeded()))
    assert not torch.equal(x, noise((3, length), seeded(1))) or (
        length == 1 and noise is pink_noise
    )
    if length == 4096:
        assert float(x.square().mean()) == pytest.approx(1.0, abs=0.15)
    assert bool(x.isfinite().all())


def test_pink_noise_has_equal_power_in_every_octave() -> None:
    x = pink_noise((200, 4096), seeded())
    power = torch.fft.rfft(x).abs().square().mean(0)
    octaves = torch.stack([power[2**k : 2 ** (k + 1)].sum() for k in range(3, 11)])
    assert float(octaves.std() / octaves.mean()) < 0.1
    flat = torch.fft.rfft(white_noise((200, 4096), seeded())).abs().square().mean(0)
    assert float(flat[:500].mean() / flat[1500:].mean()) == pytest.approx(1.0, abs=0.05)


def test_recorded_noise_is_looped() -> None:
    noise = RecordedNoise([recording(np.arange(5.0)), recording(np.arange(10.0, 13.0))])
    x = noise((50, 12), seeded())
    assert x.shape == (50, 12)
    first = (x < 10).all(-1)
    assert bool(((x >= 10).all(-1) | first).all())
    assert 0 < int(first.sum()) < 50
    same((x[first].diff() % 5), torch.ones(int(first.sum()), 11))
    assert torch.equal(x, noise((50, 12), seeded()))


@pytest.mark.parametrize("snr", [-5.0, 0.0, 20.0])
def test_mixing_at_a_ratio(snr: float) -> None:
    clean = torch.from_numpy(tone(8000)).expand(2, -1)
    noise = white_noise((2, 8000), seeded()).double()
    got = mix(clean, noise, torch.tensor([snr, snr + 3]))
    added = got - clean
    ratio = 10 * torch.log10(clean.square().mean(-1) / added.square().mean(-1))
    same(ratio, torch.tensor([snr, snr + 3]).double())
    same(mix(clean, noise, snr)[0], got[0])


def test_mixing_with_silence() -> None:
    x = torch.ones(3, 4)
    same(mix(x, torch.zeros(3, 4), 5.0), x)
    same(mix(torch.zeros(3, 4), x, 5.0), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"mix: \(3, 4\) and \(3, 5\)"):
        mix(x, torch.ones(3, 5), 0.0)


def test_all_that_is_public_is_used_here() -> None:
    assert set(audio.__all__) - {"Channel", "OnRate"} == {
        "Recording", "Recordings", "FileSplit", "read_wav", "write_wav", "resample", "read_folder",
        "trim_silence", "split_by_file", "white_noise", "pink_noise", "RecordedNoise", "mix",
    }  # fmt: skip
