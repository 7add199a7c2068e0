# SPDX-License-Identifier: MIT
"""From raw event streams to batches: time stamps to gaps, addresses to tokens, streams to tensors.

These are helpers for data, on the CPU, in eager mode: they look at values, and raise where one
cannot be right. What they return is what models take: token numbers for an embedding,
``integration_timesteps`` and ``lengths``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from lrnnx_core import checks
from lrnnx_core.sequences import timesteps_from_timestamps

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Values: TypeAlias = "Tensor | ArrayLike"
"""A tensor, a numpy array, or a list of numbers."""

Unit = Literal["s", "ms", "us", "ns"]
NANOSECONDS: dict[str, int] = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
"""Nanoseconds in each unit of time."""

Crop = Literal["first", "last", "random"]


class Addresses(NamedTuple):
    """Where events happened: x and y (...) int64, polarity (...) int64, 0 or 1."""

    x: Tensor
    y: Tensor
    polarity: Tensor


class Stream(NamedTuple):
    """A stream of L events: tokens (L,) int64 and the time elapsed before each, (L,) floating."""

    tokens: Tensor
    integration_timesteps: Tensor


class Batch(NamedTuple):
    """Right-padded streams: tokens (B, L), gaps (B, L), which are zero at padding, lengths (B,)."""

    tokens: Tensor
    integration_timesteps: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch on another device."""
        return Batch(*(t.to(device, non_blocking=non_blocking) for t in self))


# ------------------------------------------------------------------------------------------- time


def integration_timesteps(
    timestamps: Values,
    *,
    unit: Unit,
    per: Unit = "ms",
    convention: Literal["before", "after"] = "before",
    last: Tensor | float | None = None,
    first: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Turn absolute time stamps in one unit into gaps in another.

    Differences are taken first, integers in int64, and only they are rounded to ``dtype``: a
    recording of a minute in microseconds has stamps that float32 cannot tell apart.

    Args:
        timestamps: (..., L), nondecreasing, integers or floating.
        unit: of the time stamps: ``s``, ``ms``, ``us`` or ``ns``.
        per: unit of the result, and so of dt; Event-SSM's step sizes are in milliseconds.
        convention: see `lrnnx_core.sequences.timesteps_from_timestamps`. ``after`` reproduces the
            released Event-SSM loader: the result is one shorter, drop the last event.
        last: (...) or a number, in ``unit``: the stamp of the event before these, if any.
        first: the gap before the first event where ``last`` is None, in ``per``.
        dtype: of the result.

    Returns:
        (..., L), or (..., L - 1) for ``after``.

    Raises:
        ValueError: unknown units; time stamps that are not real, run backwards, are not finite, or
            of a dtype too narrow to tell neighbours apart at their size; ``last`` behind the first.
    """
    where = "events.integration_timesteps"
    for name, value in (("unit", unit), ("per", per)):
        if value not in NANOSECONDS:
            raise ValueError(f"{where}: {name} = {value!r}, expected one of {list(NANOSECONDS)}")
    if not dtype.is_floating_point:
        raise ValueError(f"{where}: dtype {dtype}, expected a floating one")
    stamps = torch.as_tensor(timestamps)
    if stamps.is_complex() or stamps.dtype == torch.bool:
        raise ValueError(f"{where}: timestamps have dtype {stamps.dtype}, expected real numbers")
    checks.timestamps(stamps)
    if stamps.is_floating_point():
        _check_resolution(where, stamps)
        stamps = stamps.to(torch.float64)
    numerator, denominator = NANOSECONDS[unit], NANOSECONDS[per]
    gaps = timesteps_from_timestamps(
        stamps, last, first * denominator / numerator, convention=convention
    )
    if last is not None and bool((gaps[..., :1] < 0).any()):
        raise ValueError(f"{where}: last is later than the first time stamp")
    return (gaps * numerator / denominator).to(dtype)


def _check_resolution(where: str, stamps: Tensor) -> None:
    """Raise if floating time stamps are so large that neighbouring integers are one number."""
    limit = 2 / torch.finfo(stamps.dtype).eps
    largest = float(stamps.abs().max()) if stamps.numel() else 0.0
    if largest > limit:
        raise ValueError(
            f"{where}: timestamps up to {largest:.0f} in {stamps.dtype}, which has no odd numbers "
            f"beyond {limit:.0f}; keep them as int64 or float64"
        )


# ----------------------------------------------------------------------------------------- tokens


def vocabulary_size(width: int, height: int = 1, *, polarities: Literal[1, 2] = 2) -> int:
    """Return how many tokens `tokens_from_addresses` knows.

    Args:
        width: of the sensor, or the number of channels of a one-dimensional one.
        height: of the sensor.
        polarities: 1 where events have none.

    Raises:
        ValueError: a size < 1, polarities other than 1 or 2.
    """
    _check_sensor("events.vocabulary_size", width, height, polarities)
    return width * height * polarities


def tokens_from_addresses(
    x: Values,
    y: Values | None = None,
    polarity: Values | None = None,
    *,
    width: int,
    height: int = 1,
) -> Tensor:
    """Give each address of a sensor its own number: x + width y + width height polarity.

    Args:
        x: (...) integers, 0 ... width - 1; the channel of a one-dimensional sensor.
        y: (...) integers, 0 ... height - 1; 0 if None.
        polarity: (...) 0 and 1, -1 and 1, or bool; 0 if None.
        width: of the sensor: 128 for DVS128, 700 channels for the spiking Heidelberg sets.
        height: of the sensor.

    Returns:
        (...) int64, below `vocabulary_size`.

    Raises:
        ValueError: shapes that differ, numbers that are not integers, an address off the sensor,
            a polarity of another kind; the message names the first bad event.
    """
    where = "events.tokens_from_addresses"
    _check_sensor(where, width, height, 2)
    columns = _integers(where, "x", x, 0, width - 1)
    rows = torch.zeros_like(columns) if y is None else _integers(where, "y", y, 0, height - 1)
    signs = torch.zeros_like(columns) if polarity is None else _polarity(where, polarity)
    if not columns.shape == rows.shape == signs.shape:
        raise ValueError(
            f"{where}: x {tuple(columns.shape)}, y {tuple(rows.shape)}, polarity "
            f"{tuple(signs.shape)}, expected one shape"
        )
    return columns + width * (rows + height * signs)


def addresses_from_tokens(tokens: Values, *, width: int, height: int = 1) -> Addresses:
    """Undo `tokens_from_addresses`; polarities come back as 0 and 1.

    Args:
        tokens: (...) integers, 0 ... 2 width height - 1.
        width: of the sensor.
        height: of the sensor.

    Raises:
        ValueError: tokens that are not integers, or not of such a sensor.
    """
    where = "events.addresses_from_tokens"
    _check_sensor(where, width, height, 2)
    numbers = _integers(where, "tokens", tokens, 0, 2 * width * height - 1)
    plane = width * height
    return Addresses(numbers % width, numbers % plane // width, numbers // plane)


def _check_sensor(where: str, width: int, height: int, polarities: int) -> None:
    for name, value in (("width", width), ("height", height)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"{where}: {name} = {value!r}, expected an integer >= 1")
    if polarities not in (1, 2):
        raise ValueError(f"{where}: polarities = {polarities!r}, expected 1 or 2")


_NO_INTEGERS = (torch.bool, torch.complex64, torch.complex128)


def _integers(where: str, name: str, values: Values, low: int, high: int) -> Tensor:
    """Return values as int64; raise unless they are integers in low ... high."""
    given = torch.as_tensor(values)
    empty = given.is_floating_point() and not given.numel()  # what an empty list becomes
    if not empty and (given.dtype.is_floating_point or given.dtype in _NO_INTEGERS):
        raise ValueError(f"{where}: {name} has dtype {given.dtype}, expected integers")
    numbers = given.to(torch.int64)
    bad = (numbers < low) | (numbers > high)
    if bool(bad.any()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{where}: {name} = {int(numbers[at])} at {at}, expected {low} ... {high}")
    return numbers


def _polarity(where: str, values: Values) -> Tensor:
    given = torch.as_tensor(values)
    numbers = given.to(torch.int64)
    bad = (numbers != given) | (numbers < -1) | (numbers > 1)
    if bool(bad.any()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{where}: polarity = {given[at].item()} at {at}, expected 0, 1 or -1, 1")
    if bool((numbers == 0).any()) and bool((numbers == -1).any()):
        raise ValueError(f"{where}: polarity holds both 0 and -1, expected 0, 1 or -1, 1")
    return (numbers > 0).to(torch.int64)


# ---------------------------------------------------------------------------------------- batches


def pad(
    streams: Sequence[Stream],
    *,
    pad_token: int = 0,
    stride: int = 1,
    trim: bool = False,
    max_length: int | None = None,
    crop: Crop = "first",
    generator: torch.Generator | None = None,
) -> Batch:
    """Make one right-padded batch of ragged streams.

    Args:
        streams: B of them, each of its own length, 0 included.
        pad_token: stands at padding; lengths hide it, so any token of the vocabulary does. Give the
            number behind the vocabulary to tell padding apart in an embedding of one more.
        stride: the batch is padded to a multiple of it, so that a network that pools by it (or
            by strides whose product it is) loses no events at the end of the longest row.
        trim: cut each stream to a multiple of ``stride`` instead, as pooling would.
        max_length: keep that many events of each stream at most; all if None.
        crop: which ones: the ``first``, the ``last``, or a ``random`` stretch.
        generator: source of the random numbers of ``random``; torch's own if None.

    Returns:
        Batch: tokens (B, L) int64, integration_timesteps (B, L) in their promoted dtype, zero at
        padding, lengths (B,) int64.

    Raises:
        ValueError: no streams; one whose parts are not (L,), whose gaps are negative or not finite;
            sizes < 1, an unknown crop.
    """
    where = "events.pad"
    for name, value in (("stride", stride), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{where}: {name} = {value}, expected >= 1")
    if crop not in get_args(Crop):
        raise ValueError(f"{where}: crop = {crop!r}, expected one of {get_args(Crop)}")
    if not len(streams):
        raise ValueError(f"{where}: no streams")
    kept: list[Stream] = []
    for i, stream in enumerate(streams):
        _check_stream(where, i, stream)
        kept.append(_cropped(stream, max_length, crop, stride if trim else 1, generator))
    lengths = [len(s.tokens) for s in kept]
    longest = -(-max(lengths) // stride) * stride
    dtype = kept[0].integration_timesteps.dtype
    for stream in kept:
        dtype = torch.promote_types(dtype, stream.integration_timesteps.dtype)
    tokens = torch.full((len(kept), longest), pad_token, dtype=torch.int64)
    gaps = torch.zeros(len(kept), longest, dtype=dtype)
    for row, (n, stream) in enumerate(zip(lengths, kept, strict=True)):
        tokens[row, :n], gaps[row, :n] = stream.tokens, stream.integration_timesteps
    return Batch(tokens, gaps, torch.tensor(lengths))


def collate(
    samples: Sequence[tuple[Stream, int]],
    *,
    pad_token: int = 0,
    stride: int = 1,
    trim: bool = False,
    max_length: int | None = None,
    crop: Crop = "first",
    generator: torch.Generator | None = None,
) -> tuple[Batch, Tensor]:
    """Make a batch of labelled streams: the ``collate_fn`` of a ``torch.utils.data.DataLoader``.

    Fix the options with ``functools.partial``, which worker processes can receive.

    Args:
        samples: B pairs of a stream and its class number.
        pad_token: see `pad`.
        stride: see `pad`.
        trim: see `pad`.
        max_length: see `pad`.
        crop: see `pad`.
        generator: see `pad`.

    Returns:
        The batch of `pad`, and the class numbers (B,) int64.

    Raises:
        ValueError: see `pad`.
    """
    batch = pad(
        [stream for stream, _ in samples], pad_token=pad_token, stride=stride, trim=trim,
        max_length=max_length, crop=crop, generator=generator,
    )  # fmt: skip
    return batch, torch.tensor([int(label) for _, label in samples])


def _check_stream(where: str, i: int, stream: Stream) -> None:
    tokens, gaps = stream
    if tokens.ndim != 1 or tokens.shape != gaps.shape:
        raise ValueError(
            f"{where}: stream {i} has tokens {tuple(tokens.shape)} and integration_timesteps "
            f"{tuple(gaps.shape)}, expected (L,) both"
        )
    if tokens.is_floating_point() or tokens.is_complex() or not gaps.is_floating_point():
        raise ValueError(
            f"{where}: stream {i} has tokens of {tokens.dtype} and integration_timesteps of "
            f"{gaps.dtype}, expected integers and a floating dtype"
        )
    try:
        checks.integration_timesteps(gaps)
    except ValueError as error:
        raise ValueError(f"{where}: stream {i}: {error}") from None


def _cropped(
    stream: Stream,
    max_length: int | None,
    crop: Crop,
    multiple: int,
    generator: torch.Generator | None,
) -> Stream:
    length = len(stream.tokens)
    keep = length if max_length is None else min(length, max_length)
    keep = keep // multiple * multiple
    start = 0 if crop == "first" else length - keep
    if crop == "random":
        start = int(torch.randint(length - keep + 1, (), generator=generator))
    return Stream(*(t[start : start + keep] for t in stream))
