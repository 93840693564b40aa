"""Which samples the terms on labels see, against what the definitions say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.objective.selection import Selection, agreed, smallest


@given(loss=st.lists(st.floats(0, 9), min_size=1, max_size=20), share=st.floats(0.01, 1))
def test_the_smallest_losses_are_kept_and_one_at_least(loss, share):
    kept = smallest(torch.tensor(loss, dtype=torch.float64), share).tolist()
    assert sum(kept) == max(1, round(share * len(loss)))
    largest = max(value for value, keep in zip(loss, kept, strict=True) if keep)
    assert all(value >= largest for value, keep in zip(loss, kept, strict=True) if not keep)


def test_the_teacher_answers_as_labelled_or_finds_the_label_likely_enough():
    teacher = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
    target = torch.tensor([0, 1, 0])
    assert agreed(teacher, target, True).tolist() == [True, False, False]
    assert agreed(teacher, target, 0.25).tolist() == [True, True, False]
    assert agreed(teacher, target, 0.05).tolist() == [True, True, True]


def test_both_tests_must_be_passed_and_the_share_says_how_many_are():
    teacher = torch.eye(4)
    keep = Selection(small_loss=0.5, agreement=True)
    loss, target = torch.tensor([4.0, 1.0, 2.0, 3.0]), torch.tensor([0, 1, 3, 3])
    kept, share = keep(loss, teacher, target)
    assert kept.tolist() == [False, True, False, False]
    assert share == 0.25


@pytest.mark.parametrize("options", [{}, {"small_loss": None}, {"agreement": False}])
def test_what_is_not_asked_for_is_off(options):
    assert not Selection(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"small_loss": 0.0}, r"objective\.sample_selection\.small_loss is the share"),
        ({"small_loss": 1.2}, r"objective\.sample_selection\.small_loss is the share"),
        ({"small_loss": True}, r"objective\.sample_selection\.small_loss is the share"),
        ({"agreement": 0.0}, r"objective\.sample_selection\.agreement is true"),
        ({"agreement": "top1"}, r"objective\.sample_selection\.agreement is true"),
    ],
)
def test_mistakes_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        Selection(**options)


def test_agreement_needs_a_teacher_and_one_label():
    loss, keep = torch.ones(2), Selection(agreement=True)
    with pytest.raises(ValueError, match="there is none"):
        keep(loss, None, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="needs class indices"):
        keep(loss, torch.eye(2), torch.full((2, 2), 0.5))
