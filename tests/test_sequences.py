"""The helpers for padding, packing and irregular time."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

from lrnnx_core import sequences
from lrnnx_core.sequences import (
    Layout,
    align_right,
    at_length,
    gather_final_states,
    layout,
    reset_from_cu_seqlens,
    timesteps_from_timestamps,
    valid_mask,
)


def flags(text: str) -> torch.Tensor:
    return torch.tensor([c == "1" for c in text])


def test_valid_mask_marks_the_first_samples_of_each_row() -> None:
    got = valid_mask(torch.tensor([[0, 2], [3, 4]]), 4)
    assert got.tolist() == [
        [[False] * 4, [True, True, False, False]],
        [[True, True, True, False], [True] * 4],
    ]
    assert valid_mask(torch.tensor(2), 3).tolist() == [True, True, False]
    assert valid_mask(torch.tensor([1]), 0).shape == (1, 0)


def test_at_length_is_the_state_after_the_last_sample_or_the_one_before_all() -> None:
    h, before = torch.randn(3, 4, 2, 5), torch.randn(3, 2, 5)
    got = at_length(h, torch.tensor([0, 1, 4]), before)
    assert torch.equal(got, torch.stack([before[0], h[1, 0], h[2, 3]]))
    assert torch.equal(at_length(h[0], torch.tensor(2), before[0]), h[0, 1])
    assert torch.equal(at_length(h[:, :0], torch.tensor([0, 0, 0]), before), before)


def test_at_length_gives_gradients_to_what_it_took_alone() -> None:
    h, before = torch.randn(2, 3, 1, requires_grad=True), torch.randn(2, 1, requires_grad=True)
    at_length(h, torch.tensor([0, 2]), before).sum().backward()
    assert h.grad is not None
    assert before.grad is not None
    assert h.grad[:, :, 0].tolist() == [[0, 0, 0], [0, 1, 0]]
    assert before.grad[:, 0].tolist() == [1, 0]


def test_align_right_moves_rows_to_the_end_and_hides_what_was_padding() -> None:
    x = torch.arange(1.0, 9.0).reshape(2, 4, 1)
    x[0, 3] = float("nan")
    got = align_right(x, torch.tensor([3, 0]))[..., 0]
    assert got.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert torch.equal(align_right(x[1], torch.tensor(4)), x[1])


def test_timesteps_are_the_gaps_before_each_sample() -> None:
    t = torch.tensor([[1.0, 1.5, 1.5, 4.0], [0.0, 1.0, 2.0, 3.0]])
    got = timesteps_from_timestamps(t)
    assert got.tolist() == [[1.0, 0.5, 0.0, 2.5], [1.0, 1.0, 1.0, 1.0]]
    assert timesteps_from_timestamps(t, first=0.0)[:, 0].tolist() == [0.0, 0.0]
    assert timesteps_from_timestamps(t, last=-1.0)[:, 0].tolist() == [2.0, 1.0]
    assert timesteps_from_timestamps(t, last=torch.tensor([0.5, -3.0]))[:, 0].tolist() == [0.5, 3.0]
    after = timesteps_from_timestamps(t, convention="after")
    assert after.tolist() == [[0.5, 0.0, 2.5], [1.0, 1.0, 1.0]]


def test_timesteps_of_two_chunks_are_those_of_the_whole() -> None:
    t = torch.rand(2, 9, dtype=torch.float64).cumsum(-1)
    whole = timesteps_from_timestamps(t)
    parts = [timesteps_from_timestamps(t[:, :4]), timesteps_from_timestamps(t[:, 4:], last=t[:, 3])]
    assert torch.equal(torch.cat(parts, dim=-1), whole)


def test_integer_time_stamps_keep_their_precision() -> None:
    t = torch.tensor([2**40, 2**40 + 1, 2**40 + 3])
    got = timesteps_from_timestamps(t)
    assert got.dtype == torch.float64
    assert got.tolist() == [1.0, 1.0, 2.0]


def test_timesteps_refuse_what_has_no_meaning() -> None:
    t = torch.rand(3)
    with pytest.raises(ValueError, match=r"timestamps \(\) needs a time axis"):
        timesteps_from_timestamps(t[0])
    with pytest.raises(ValueError, match="last has no meaning with convention='after'"):
        timesteps_from_timestamps(t, last=0.0, convention="after")
    with pytest.raises(ValueError, match="convention 'middle', expected 'before' or 'after'"):
        timesteps_from_timestamps(t, convention="middle")


def test_resets_stand_where_documents_start() -> None:
    got = reset_from_cu_seqlens(torch.tensor([0, 2, 2, 5]), 5)
    assert torch.equal(got, flags("10100"))
    assert torch.equal(
        reset_from_cu_seqlens(torch.tensor([0, 3], dtype=torch.int32), 3), flags("100")
    )
    assert reset_from_cu_seqlens(torch.tensor([0]), 0).shape == (0,)
    # a document that is empty at the end
    assert torch.equal(reset_from_cu_seqlens(torch.tensor([0, 2, 2]), 2), flags("10"))


def test_final_states_are_those_after_each_document() -> None:
    h = torch.randn(5, 2, 3)
    cu = torch.tensor([0, 2, 2, 5])
    got = gather_final_states(h, cu)
    assert torch.equal(got, torch.stack([h[1], torch.zeros(2, 3), h[4]]))
    before = torch.randn(3, 2, 3)
    assert torch.equal(gather_final_states(h, cu, before), torch.stack([h[1], before[1], h[4]]))
    none = gather_final_states(h[:0], torch.tensor([0, 0, 0]))
    assert none.shape == (2, 2, 3)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 2, dtype=torch.long), torch.zeros(3), torch.zeros(0, dtype=torch.long)]
)
def test_cu_seqlens_must_be_a_vector_of_integers(bad: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"cu_seqlens: shape .*, dtype .*; expected a one-dimensional"
    ):
        reset_from_cu_seqlens(bad, 3)
    with pytest.raises(ValueError, match="cu_seqlens: shape"):
        gather_final_states(torch.randn(3, 2), bad)


# ----------------------------------------------------------------------------------------- layouts


def test_a_layout_knows_which_samples_count_and_where_states_clear() -> None:
    u = torch.randn(2, 4, 3)
    seq = layout("here", u, lengths=torch.tensor([3, 4]), mask=flags("0111"), reset=flags("1011"))
    assert torch.equal(seq.valid(4), torch.stack([flags("0110"), flags("0111")]))
    assert torch.equal(seq.resets(4), torch.stack([flags("0010"), flags("0011")]))
    assert not seq.uniform
    assert layout("here", u, lengths=torch.tensor(2)).uniform
    assert layout("here", u, lengths=torch.tensor(2)).lengths.shape == (2,)
    bare = layout("here", u)
    assert bare == Layout(None, None, None, None)
    assert bare.valid(4) is None
    assert bare.resets(4) is None


def test_reversing_pairs_every_sample_with_the_gap_to_its_successor() -> None:
    gaps = torch.tensor([10.0, 1.0, 2.0, 3.0])
    plain = Layout(None, None, None, gaps).reversed(4)
    assert plain.timesteps.flip(-1).tolist() == [1, 2, 3, 10]
    masked = Layout(None, flags("0101"), None, gaps).reversed(4)
    kept = masked.timesteps.flip(-1)
    assert kept[[1, 3]].tolist() == [3, 1]  # its successor is two on; the last takes the first gap
    assert torch.equal(masked.mask.flip(-1), flags("0101"))
    packed = Layout(None, None, flags("1010"), gaps).reversed(4)
    assert packed.timesteps.flip(-1).tolist() == [1, 10, 3, 2]
    padded = Layout(torch.tensor([2, 4]), None, None, gaps.expand(2, 4)).reversed(4)
    assert padded.timesteps.flip(-1)[0, :2].tolist() == [1, 10]
    assert padded.timesteps.flip(-1)[1].tolist() == [1, 2, 3, 10]


def test_reversing_clears_the_state_in_front_of_a_document_even_across_padding() -> None:
    plain = Layout(None, None, flags("10100"), None).reversed(5)
    assert torch.equal(plain.reset.flip(-1), flags("01000"))
    hole = Layout(None, flags("11011"), flags("00010"), None).reversed(5)
    assert torch.equal(hole.reset.flip(-1) & flags("11011"), flags("01000"))
    ignored = Layout(None, flags("11011"), flags("00100"), None).reversed(5)
    assert not ignored.reset.any()  # a document cannot start at padding


def test_reversing_nothing_is_nothing_and_maps() -> None:
    assert Layout(None, None, None, None).reversed(3) == Layout(None, None, None, None)
    empty = torch.zeros(2, 0)
    assert Layout(None, empty.bool(), empty.bool(), empty).reversed(0).timesteps.shape == (2, 0)
    gaps, mask = torch.rand(3, 5), torch.rand(3, 5) > 0.4
    got = vmap(lambda g, m: Layout(None, m, None, g).reversed(5).timesteps)(gaps, mask)
    assert torch.equal(got, Layout(None, mask, None, gaps).reversed(5).timesteps)


def test_the_module_documents_every_public_function() -> None:
    for name, value in vars(sequences).items():
        if callable(value) and getattr(value, "__module__", "") == sequences.__name__:
            assert name.startswith("_") or value.__doc__, name
