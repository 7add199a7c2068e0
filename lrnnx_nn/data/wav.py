# SPDX-License-Identifier: MIT
"""WAV files in and out, and other sampling rates."""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from lrnnx_nn.files import write_atomically
from lrnnx_nn.optional import require

Channel = Literal["mean", "left", "right"]

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
_SUBTYPE = bytes.fromhex("000000001000800000aa00389b71")
"""What follows the format number in the GUID of an extensible format chunk."""


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """One channel of sound: samples (L,) float32, mostly within -1 ... 1, at ``rate`` per second.

    Attributes:
        name: the file below the folder it was found in.
        samples: (L,).
        rate: samples a second.
    """

    name: str
    samples: Tensor
    rate: int

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.samples) / self.rate


def read_wav(path: str | Path, *, channel: Channel = "mean") -> Recording:
    """Read a WAV file: PCM of 8, 16, 24 or 32 bits, or floating point of 32 or 64.

    Args:
        path: the file.
        channel: what becomes of several: their ``mean``, or the ``left`` (first) or ``right``
            (second) one.

    Raises:
        ValueError: no such file, not a WAV file, a truncated one, an encoding that is neither PCM
            nor floating point, no samples, samples that are not finite, no right channel; the
            message names the file.
    """
    path = Path(path)
    if channel not in get_args(Channel):
        raise ValueError(f"channel = {channel!r}, expected one of {list(get_args(Channel))}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    content = path.read_bytes()
    form, data = _chunks(path, content)
    samples = _decode(path, form, data)
    if channel == "mean":
        mono = samples.mean(1)
    elif channel == "left":
        mono = samples[:, 0]
    elif samples.shape[1] < 2:
        raise ValueError(f"{path}: one channel, there is no right one")
    else:
        mono = samples[:, 1]
    return Recording(path.name, torch.from_numpy(np.ascontiguousarray(mono, np.float32)), form.rate)


class _Format(NamedTuple):
    kind: int
    channels: int
    rate: int
    bits: int


def _chunks(path: Path, content: bytes) -> tuple[_Format, bytes]:
    """Return the format and the bytes of the samples."""
    if len(content) < 12 or content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError(f"{path}: not a WAV file")
    form: _Format | None = None
    position = 12
    while position + 8 <= len(content):
        name, size = content[position : position + 4], _integer(content, position + 4)
        body = content[position + 8 : position + 8 + size]
        if name in (b"fmt ", b"data") and len(body) < size:
            raise ValueError(f"{path}: truncated, {len(body)} of {size} bytes of {name.decode()!r}")
        if name == b"fmt ":
            form = _format(path, body)
        elif name == b"data":
            if form is None:
                raise ValueError(f"{path}: not a readable WAV file, samples before their format")
            return form, body
        position += 8 + size + size % 2
    raise ValueError(f"{path}: truncated, no chunk of samples")


def _integer(content: bytes, position: int) -> int:
    return int.from_bytes(content[position : position + 4], "little")


def _format(path: Path, body: bytes) -> _Format:
    if len(body) < 16:
        raise ValueError(f"{path}: not a readable WAV file, a format chunk of {len(body)} bytes")
    kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
    if kind == EXTENSIBLE and len(body) >= 40 and body[26:40] == _SUBTYPE:
        kind = int.from_bytes(body[24:26], "little")
    if (kind, bits) not in _READERS:
        raise ValueError(
            f"{path}: encoding {kind:#x} of {bits} bits, expected PCM of 8, 16, 24 or 32 bits or "
            "floating point of 32 or 64"
        )
    if channels < 1 or rate < 1:
        raise ValueError(f"{path}: {channels} channels at {rate} Hz, expected at least one of each")
    return _Format(kind, channels, rate, bits)


def _wide(data: bytes) -> np.ndarray:
    """Return 24-bit samples as 32-bit ones, their last byte zero."""
    bytes_of = np.zeros((len(data) // 3, 4), np.uint8)
    bytes_of[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    return bytes_of.view("<i4")[:, 0]


_READERS = {
    (PCM, 8): lambda data: (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 2**7,
    (PCM, 16): lambda data: np.frombuffer(data, "<i2") / 2**15,
    (PCM, 24): lambda data: _wide(data) / 2**31,
    (PCM, 32): lambda data: np.frombuffer(data, "<i4") / 2**31,
    (FLOAT, 32): lambda data: np.frombuffer(data, "<f4").astype(np.float64),
    (FLOAT, 64): lambda data: np.frombuffer(data, "<f8"),
}


def _decode(path: Path, form: _Format, data: bytes) -> np.ndarray:
    """Return samples (L, channels) float64."""
    frame = form.channels * form.bits // 8
    if len(data) % frame:
        raise ValueError(f"{path}: truncated, {len(data)} bytes in frames of {frame}")
    if not data:
        raise ValueError(f"{path}: no samples")
    samples = _READERS[form.kind, form.bits](data).reshape(-1, form.channels)
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: a sample that is NaN or infinite")
    return samples


def write_wav(path: str | Path, samples: Tensor, rate: int) -> None:
    """Write samples (L,) within -1 ... 1 as 16-bit PCM, atomically; louder ones are clipped.

    Raises:
        ValueError: samples that are not (L,) or not finite.
    """
    if samples.ndim != 1 or not bool(samples.isfinite().all()):
        raise ValueError(f"write_wav: samples {tuple(samples.shape)}, expected finite (L,)")
    scaled = (samples.detach().cpu().double() * 2**15).round().clamp(-(2**15), 2**15 - 1)
    data = scaled.numpy().astype("<i2").tobytes()
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, PCM, 1, rate,
        2 * rate, 2, 16, b"data", len(data),
    )  # fmt: skip
    write_atomically(path, header + data)


def resample(recording: Recording, rate: int) -> Recording:
    """Return a recording at another rate, by a polyphase filter.

    Raises:
        ValueError: a rate < 1.
        MissingDependencyError: scipy is not installed.
    """
    if rate < 1:
        raise ValueError(f"resample: rate = {rate}, expected >= 1")
    if rate == recording.rate:
        return recording
    common = math.gcd(rate, recording.rate)
    changed = require("scipy.signal").resample_poly(
        recording.samples.double().numpy(), rate // common, recording.rate // common
    )
    return Recording(recording.name, torch.from_numpy(changed.astype(np.float32)), rate)
