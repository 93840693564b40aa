"""What differences come to in words, and which models tell nothing apart."""

import pytest
import torch

from distill.metrics import uncertainty
from distill.report import words

CLASSES = ["cat", "dog", "fox"]


def compared(only_first, only_second, both, neither=0):
    """Return what is found of two models that are right on so many examples."""
    count = only_first + only_second + both + neither
    first = torch.arange(count) < only_first + both
    second = (torch.arange(count) >= only_first) & (torch.arange(count) < count - neither)
    logits = {
        name: torch.stack([right.float(), 1 - right.float()], 1) * 3
        for name, right in (("student", first), ("baseline", second))
    }
    target = torch.zeros(count, dtype=torch.long)
    return {"comparisons": uncertainty(logits, target, ["baseline"])[1]}


def test_a_clear_difference_is_named_with_its_direction():
    (said,) = words.comparison_sentences(compared(30, 5, 765))
    assert said.startswith(
        "The student is better than the same student without a teacher by 3.1 points of top-1 "
        "(95 %: 1.6 to 4.6; McNemar p < 0.001)."
    )
    (said,) = words.comparison_sentences(compared(5, 30, 765))
    assert "is worse than" in said
    assert "by 3.1 points of top-1 (95 %: 1.6 to 4.6;" in said


def test_what_cannot_be_told_apart_is_called_so():
    (said,) = words.comparison_sentences(compared(14, 10, 776))
    assert "cannot be told apart on 800 images (difference +0.5 points of top-1, 95 %: −0." in said
    assert "McNemar p = 0.54)." in said
    (said,) = words.comparison_sentences(compared(0, 0, 2))
    assert "cannot be told apart on 2 images (difference 0.0 points" in said
    assert "p = 1.00" in said


def test_confidence_that_differs_is_told_even_where_accuracy_does_not():
    target = torch.zeros(400, dtype=torch.long)
    sure = torch.tensor([[6.0, 0.0]]).repeat(400, 1)
    sure[::40] = sure[::40].flip(1)
    found = uncertainty({"student": sure / 3, "teacher": sure}, target, ["teacher"])[1]
    (said,) = words.comparison_sentences({"comparisons": found})
    assert "cannot be told apart" in said
    both = [
        torch.nn.functional.cross_entropy(one, target).item() for one in (sure / 3, sure)
    ]  # the surer one is wrong as surely
    way = "lower" if both[0] < both[1] else "higher"
    clear = words.confidence_sentence(found["teacher"]) != ""
    low, high = found["teacher"]["differences"]["nll"]["interval"]
    assert clear == (low > 0 or high < 0)
    if clear:
        assert f"The student's NLL is {way} by {abs(both[0] - both[1]):.3f}" in said


def test_nothing_is_said_of_what_was_not_compared():
    assert words.sentences({"student": {}}) == []
    assert not words.is_unbalanced({})


@pytest.mark.parametrize(("counts", "unbalanced"), [
    ([80, 80, 80], False), ([80, 60, 80], False), ([90, 60, 80], True), ([2, 0, 2], False),
    ([5, 0, 0], True),
])  # fmt: skip
def test_classes_are_unbalanced_from_one_and_a_half_times(counts, unbalanced):
    assert words.is_unbalanced({"majority": {"counts": counts}}) == unbalanced


def test_a_model_of_one_answer_is_called_so_and_one_that_knows_a_frequent_class_is_not():
    blind = {"label": 1, "share": 0.992, "share_of_others": 0.97}
    able = {"label": 1, "share": 0.992, "share_of_others": 0.2}
    summary = {"student": {"favourite": blind}, "teacher": {"favourite": able}, "classes": CLASSES}
    (said,) = words.sentences(summary)
    assert said == (
        "The student answers almost only one class: “dog” for 99.2 % of the test images, and for "
        "97.0 % of those of other classes."
    )
    assert not words.is_blind({"label": 0, "share": 1.0, "share_of_others": None})


def test_a_temperature_that_does_harm_on_test_is_named():
    student = {"nll": 0.4, "nll_after_scaling": 0.45, "temperature_star": 1.844}
    (said,) = words.sentences({"student": student, "classes": CLASSES})
    assert "T = 1.84, makes the student's probabilities worse" in said
    assert "(NLL 0.400 → 0.450)" in said
    assert not words.scaling_sentences(student | {"nll_after_scaling": 0.403})
    assert not words.scaling_sentences(student | {"nll_after_scaling": None})


def test_no_control_character_of_a_class_reaches_the_terminal():
    summary = {"majority": {"class": "a\x1b[31mb" + "c" * 40}}
    assert words.majority_name(summary) == "always “a�[31mbcccccccccccc…”"
