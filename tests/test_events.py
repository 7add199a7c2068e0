"""From raw event streams to batches: exact gaps, tokens without collisions, ragged batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import assert_agree, normal
from torch.utils.data import DataLoader

from lrnnx_core import event_ssm, events, sequences
from lrnnx_core.events import Stream

F32, F64 = torch.float32, torch.float64

# ------------------------------------------------------------------------------------------- time


def test_gaps_are_in_the_unit_asked_for() -> None:
    t = torch.tensor([0, 1500, 1500, 4250])
    assert events.integration_timesteps(t, unit="us").tolist() == [1.0, 1.5, 0.0, 2.75]
    assert events.integration_timesteps(t, unit="us", per="us").tolist() == [1, 1500, 0, 2750]
    assert events.integration_timesteps(t, unit="ms", per="s").tolist() == [1, 1.5, 0, 2.75]
    assert events.integration_timesteps(t, unit="s", per="ns", dtype=F64)[1] == 1.5e12
    seconds = torch.tensor([0.0, 0.25], dtype=F64)
    assert events.integration_timesteps(seconds, unit="s").tolist() == [1.0, 250.0]
    for unit, to in (("s", "ms"), ("ms", "us"), ("us", "ns")):
        assert events.NANOSECONDS[unit] == 1000 * events.NANOSECONDS[to]


def test_the_first_gap_is_as_given_or_since_the_last_event() -> None:
    t = torch.tensor([[2000, 3000], [5000, 9000]])
    assert events.integration_timesteps(t, unit="us", first=0.0).tolist() == [[0, 1], [0, 4]]
    assert events.integration_timesteps(t, unit="us", first=2.5)[:, 0].tolist() == [2.5, 2.5]
    last = torch.tensor([1000, 5000])
    assert events.integration_timesteps(t, unit="us", last=last).tolist() == [[1, 1], [0, 4]]
    assert events.integration_timesteps(t, unit="us", last=500)[:, 0].tolist() == [1.5, 4.5]


def test_two_chunks_have_the_gaps_of_the_whole() -> None:
    t = torch.randint(0, 1000, (2, 9)).cumsum(-1)
    whole = events.integration_timesteps(t, unit="us")
    parts = [
        events.integration_timesteps(t[:, :4], unit="us"),
        events.integration_timesteps(t[:, 4:], unit="us", last=t[:, 3]),
    ]
    assert torch.equal(torch.cat(parts, dim=-1), whole)


def test_after_reproduces_the_released_loader() -> None:
    t = torch.tensor([0, 1500, 1500, 4250])
    got = events.integration_timesteps(t, unit="us", convention="after")
    assert got.tolist() == [1.5, 0.0, 2.75]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32, F64])
def test_absolute_stamps_do_not_pass_through_float32(dtype: torch.dtype) -> None:
    # forty seconds in, one event every microsecond
    t = 40_000_000 + torch.arange(9)
    got = events.integration_timesteps(t.to(dtype), unit="us")
    assert_agree(got[1:], torch.full((8,), 1e-3), 1e-7)
    naive = sequences.timesteps_from_timestamps(t.to(F32))
    assert naive[1:].min() == 0  # what float32 makes of them
    assert naive[1:].max() == 4


def test_integers_are_exact_where_float64_is_not() -> None:
    t = 1_700_000_000_000_000_000 + torch.tensor([0, 1, 3])  # nanoseconds since 1970
    assert t.double().diff().tolist() == [0.0, 0.0]
    assert events.integration_timesteps(t, unit="ns", per="ns").tolist() == [1.0, 1.0, 2.0]
    assert sequences.timesteps_from_timestamps(t).tolist() == [1.0, 1.0, 2.0]
    assert sequences.timesteps_from_timestamps(t[1:], last=t[0]).tolist() == [1.0, 2.0]
    assert sequences.timesteps_from_timestamps(t[1:], last=int(t[0])).tolist() == [1.0, 2.0]
    after = sequences.timesteps_from_timestamps(t, convention="after")
    assert after.tolist() == [1.0, 2.0]
    assert after.dtype == F64
    # and a float64 stays what it is beside integers, in both directions
    half = torch.tensor([10, 12])
    assert sequences.timesteps_from_timestamps(half, last=9.5).tolist() == [0.5, 2.0]
    assert sequences.timesteps_from_timestamps(half.double(), last=0.1)[0].item() == 10 - 0.1


def test_arrays_and_lists_are_taken_as_tensors_are() -> None:
    t = np.array([3, 5, 9], dtype=np.uint32)
    assert events.integration_timesteps(t, unit="ms").tolist() == [1, 2, 4]
    assert events.integration_timesteps([3, 5, 9], unit="ms").tolist() == [1, 2, 4]
    assert events.integration_timesteps([0.5, 2.0], unit="ms").tolist() == [1, 1.5]
    assert events.integration_timesteps(torch.empty(2, 0), unit="ms").shape == (2, 0)
    narrow = torch.tensor([0.5, 0.625], dtype=torch.float16)  # seconds, as in some recordings
    assert events.integration_timesteps(narrow, unit="s").tolist() == [1, 125]


def test_time_stamps_that_cannot_be_right_are_refused() -> None:
    def refuses(message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            events.integration_timesteps(*args, **{"unit": "us", **options})

    refuses(r"timestamps: 3 at \(2,\) after 5, expected nondecreasing", [1, 5, 3, 2])
    refuses(r"timestamps: 0 at \(1, 2\) after 2", torch.tensor([[0, 1, 2], [1, 2, 0]]))
    refuses(r"timestamps: nan at \(1,\), expected finite", [0.0, float("nan")])
    # unsigned numbers: their difference would wrap
    refuses(r"timestamps: 1 at \(1,\) after 2", np.array([2, 1], dtype=np.uint16))
    refuses(r"unit = 'min', expected one of \['s', 'ms', 'us', 'ns'\]", [1, 2], unit="min")
    refuses("per = 'steps', expected one of", [1, 2], per="steps")
    refuses("timestamps have dtype torch.bool", torch.tensor([True, True]))
    refuses("timestamps have dtype torch.complex64", torch.tensor([1j]))
    refuses("dtype torch.int64, expected a floating one", [1, 2], dtype=torch.int64)
    refuses("convention 'between', expected 'before' or 'after'", [1, 2], convention="between")
    refuses(r"needs a time axis", torch.tensor(1))
    refuses("last is later than the first time stamp", [1, 2], last=3)
    wide = torch.tensor([0.0, 2.0**24 + 2])
    refuses("up to 16777218 in torch.float32, which has no odd numbers beyond 16777216", wide)
    assert events.integration_timesteps(wide.double(), unit="us").shape == (2,)


# ----------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(("width", "height"), [(5, 3), (3, 5), (1, 1), (7, 1)])
def test_every_address_has_a_token_of_its_own(width: int, height: int) -> None:
    x, y, p = torch.meshgrid(
        torch.arange(width), torch.arange(height), torch.arange(2), indexing="ij"
    )
    tokens = events.tokens_from_addresses(x, y, p, width=width, height=height)
    size = events.vocabulary_size(width, height)
    assert sorted(tokens.flatten().tolist()) == list(range(size))
    back = events.addresses_from_tokens(tokens, width=width, height=height)
    for got, want in zip(back, (x, y, p), strict=True):
        assert torch.equal(got, want)


def test_the_token_is_the_published_formula_mended() -> None:
    """x + W y + W H p; the released first version multiplied x by y."""
    got = events.tokens_from_addresses([3, 2], [2, 3], [1, 1], width=128, height=128)
    assert got.tolist() == [3 + 2 * 128 + 128 * 128, 2 + 3 * 128 + 128 * 128]
    assert events.vocabulary_size(128, 128) == 32768


@pytest.mark.parametrize(
    "polarity",
    [
        torch.tensor([0, 1, 1, 0]),
        torch.tensor([-1, 1, 1, -1]),
        torch.tensor([False, True, True, False]),
        torch.tensor([0.0, 1.0, 1.0, 0.0]),
        torch.tensor([0, 1, 1, 0], dtype=torch.uint8),
        np.array([-1, 1, 1, -1], dtype=np.int8),
        np.array([False, True, True, False]),
    ],
)
def test_polarities_of_every_kind_are_one(polarity: Any) -> None:
    x = torch.arange(4)
    got = events.tokens_from_addresses(x, x, polarity, width=4, height=4)
    assert got.tolist() == [0, 5 + 16, 10 + 16, 15]


def test_channels_are_their_own_tokens() -> None:
    units = np.array([0, 699, 3], dtype=np.uint16)  # a spiking Heidelberg recording
    assert events.tokens_from_addresses(units, width=700).tolist() == [0, 699, 3]
    assert events.vocabulary_size(700, polarities=1) == 700
    signed = events.tokens_from_addresses(units, polarity=[1, 0, 1], width=700)
    assert signed.tolist() == [700, 699, 703]
    assert events.tokens_from_addresses([], width=4).tolist() == []
    assert events.tokens_from_addresses([], width=4).dtype == torch.int64


def test_addresses_off_the_sensor_are_refused() -> None:
    def refuses(message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            events.tokens_from_addresses(*args, **{"width": 4, "height": 3, **options})

    refuses(r"tokens_from_addresses: x = 4 at \(1,\), expected 0 ... 3", [0, 4], [0, 0])
    refuses(r"y = 3 at \(0,\), expected 0 ... 2", [0, 3], [3, 0])
    refuses(r"x = -1 at \(0, 1\), expected", [[0, -1]])
    refuses("x has dtype torch.float32, expected integers", [0.0])
    refuses("y has dtype torch.bool, expected integers", [0], [True])
    refuses(r"polarity = 2 at \(1,\), expected 0, 1 or -1, 1", [0, 0], [0, 0], [1, 2])
    refuses(r"polarity = 0.5 at \(0,\)", [0], [0], [0.5])
    refuses("polarity holds both 0 and -1", [0, 0, 0], [0, 0, 0], [1, 0, -1])
    refuses(r"x \(2,\), y \(1,\), polarity \(2,\), expected one shape", [0, 0], [0])
    refuses("width = 0, expected an integer >= 1", [0], width=0)
    refuses("height = 1.5, expected an integer >= 1", [0], height=1.5)
    with pytest.raises(ValueError, match=r"tokens = 24 at \(1,\), expected 0 ... 23"):
        events.addresses_from_tokens([0, 24], width=4, height=3)
    with pytest.raises(ValueError, match="polarities = 3, expected 1 or 2"):
        events.vocabulary_size(4, polarities=3)


# ---------------------------------------------------------------------------------------- batches


def stream(length: int, start: int = 1, dtype: torch.dtype = F32) -> Stream:
    return Stream(torch.arange(start, start + length), 0.5 * torch.arange(length, dtype=dtype))


def test_ragged_streams_become_one_padded_batch() -> None:
    batch = events.pad([stream(3), stream(0), stream(5, start=7, dtype=F64)])
    assert batch.lengths.tolist() == [3, 0, 5]
    assert batch.tokens.tolist() == [[1, 2, 3, 0, 0], [0] * 5, [7, 8, 9, 10, 11]]
    assert batch.integration_timesteps.tolist() == [
        [0, 0.5, 1, 0, 0],
        [0] * 5,
        [0, 0.5, 1, 1.5, 2],
    ]
    assert batch.integration_timesteps.dtype == F64
    assert events.pad([stream(2), stream(1)], pad_token=99).tokens.tolist() == [[1, 2], [1, 99]]
    assert events.pad([stream(0)]).tokens.shape == (1, 0)
    assert [t.device.type for t in batch.to("meta")] == ["meta"] * 3


def test_a_batch_is_padded_or_trimmed_to_groups() -> None:
    streams = [stream(3), stream(6), stream(1)]
    assert events.pad(streams, stride=4).tokens.shape == (3, 8)
    assert events.pad(streams, stride=4).lengths.tolist() == [3, 6, 1]
    assert events.pad(streams, stride=3).tokens.shape == (3, 6)
    trimmed = events.pad(streams, stride=4, trim=True)
    assert trimmed.lengths.tolist() == [0, 4, 0]
    assert trimmed.tokens.tolist() == [[0] * 4, [1, 2, 3, 4], [0] * 4]


def test_long_streams_are_cropped() -> None:
    streams = [stream(7), stream(2)]
    assert events.pad(streams, max_length=3).tokens.tolist() == [[1, 2, 3], [1, 2, 0]]
    last = events.pad(streams, max_length=3, crop="last")
    assert last.tokens.tolist() == [[5, 6, 7], [1, 2, 0]]
    assert last.integration_timesteps[0].tolist() == [2.0, 2.5, 3.0]
    assert events.pad(streams, max_length=5, stride=2, trim=True).lengths.tolist() == [4, 2]
    generator = torch.Generator().manual_seed(0)
    starts = set()
    for _ in range(60):
        got = events.pad(streams, max_length=3, crop="random", generator=generator)
        start = int(got.tokens[0, 0])
        assert got.tokens[0].tolist() == [start, start + 1, start + 2]
        assert got.integration_timesteps[0, 0] == 0.5 * (start - 1)
        assert got.lengths.tolist() == [3, 2]
        starts.add(start)
    assert starts == {1, 2, 3, 4, 5}


def test_streams_that_cannot_be_right_are_refused() -> None:
    good = stream(2)

    def refuses(message: str, streams: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            events.pad(streams, **options)

    refuses("events.pad: no streams", [])
    refuses("stride = 0, expected >= 1", [good], stride=0)
    refuses("max_length = 0, expected >= 1", [good], max_length=0)
    refuses("crop = 'middle', expected one of", [good], crop="middle")
    refuses(
        r"stream 1 has tokens \(2,\) and integration_timesteps \(3,\)",
        [good, Stream(good.tokens, torch.ones(3))],
    )
    refuses(r"stream 0 has tokens \(1, 2\)", [Stream(good.tokens[None], torch.ones(1, 2))])
    refuses(
        "stream 0 has tokens of torch.float32", [Stream(torch.ones(2), torch.ones(2))]
    )  # fmt: skip
    refuses(
        "integration_timesteps of torch.int64", [Stream(good.tokens, good.tokens)]
    )  # fmt: skip
    refuses(
        r"stream 1: integration_timesteps: -1 at \(1,\), expected values >= 0",
        [good, Stream(good.tokens, torch.tensor([0.0, -1.0]))],
    )


def test_a_data_loader_collates_labelled_streams() -> None:
    data = [(stream(n), n % 3) for n in (3, 5, 2, 8)]
    loader = DataLoader(data, batch_size=2, collate_fn=partial(events.collate, stride=4))
    batches = list(loader)
    assert [b.tokens.shape for b, _ in batches] == [(2, 8), (2, 8)]
    assert [b.lengths.tolist() for b, _ in batches] == [[3, 5], [2, 8]]
    assert [y.tolist() for _, y in batches] == [[0, 2], [2, 2]]
    assert all(y.dtype == torch.int64 for _, y in batches)


def test_a_padded_batch_pools_as_its_streams_do() -> None:
    lengths, stride = [9, 4, 0, 11], 4
    streams = []
    for i, n in enumerate(lengths):
        stamps = torch.randint(0, 2000, (n,)).cumsum(0)
        tokens = torch.randint(0, 12, (n,))
        time = events.integration_timesteps(stamps, unit="us", dtype=F64)
        streams.append(Stream(tokens, time))
        assert len(streams[i].tokens) == n
    table, params = normal(12, 3), event_ssm.init(3, 8, dtype=F64)
    batch = events.pad(streams, stride=stride)
    out, _ = event_ssm.pooled_scan(
        params, table[batch.tokens], stride=stride, lengths=batch.lengths,
        integration_timesteps=batch.integration_timesteps,
    )  # fmt: skip
    assert out.y.shape == (4, 3, 3)
    for i, s in enumerate(streams):
        alone, _ = event_ssm.pooled_scan(
            params, table[s.tokens], stride=stride, integration_timesteps=s.integration_timesteps
        )
        assert_agree(out.y[i, : lengths[i] // stride], alone.y, 1e-12)
        assert out.lengths[i] == lengths[i] // stride
