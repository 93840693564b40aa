import pytest
import torch
from torch import nn

from distill import Distiller, Objective, Teacher
from distill.data.batch import Batch
from distill.models.build import Normalize
from distill.teacher.ensemble import Ensemble
from distill.training.cache import identity


class Fixed(nn.Module):
    """A model that always answers the same."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, view):
        return self.logits.expand(len(view), -1)


VIEW = torch.zeros(3, 1, 2, 2)
A, B = [2.0, 0.0, -1.0], [-1.0, 3.0, 0.5]


def test_probabilities_are_averaged_with_their_weights():
    answer = Ensemble([Fixed(A), Fixed(B)], "probability", [3, 1])(VIEW).softmax(1)
    expected = 0.75 * torch.tensor(A).softmax(0) + 0.25 * torch.tensor(B).softmax(0)
    torch.testing.assert_close(answer, expected.expand(3, -1))


def test_logits_are_averaged_with_their_weights():
    answer = Ensemble([Fixed(A), Fixed(B)], "logit", [3, 1])(VIEW)
    torch.testing.assert_close(answer[0], 0.75 * torch.tensor(A) + 0.25 * torch.tensor(B))


def test_one_teacher_is_itself_and_a_weight_of_zero_leaves_a_teacher_out():
    for combine in ("probability", "logit", "draw"):
        alone = Ensemble([Fixed(A)], combine)(VIEW)
        torch.testing.assert_close(alone[0].softmax(0), torch.tensor(A).softmax(0))
        first = Ensemble([Fixed(A), Fixed(B)], combine, [1, 0])(VIEW)
        torch.testing.assert_close(first[0].softmax(0), torch.tensor(A).softmax(0))


def test_a_draw_is_a_function_of_the_step_with_the_weights_frequencies():
    ensemble = Ensemble([Fixed(A), Fixed(B)], "draw", [3, 1])
    drawn = [ensemble.drawn(step) for step in range(2000)]
    assert drawn == [ensemble.drawn(step) for step in range(2000)]
    assert 1400 < drawn.count(0) < 1600  # 1500 ± 5 standard deviations
    for step in range(20):
        assert torch.equal(ensemble(VIEW, step)[0], torch.tensor((A, B)[drawn[step]]))
    averaged = 0.75 * torch.tensor(A).softmax(0) + 0.25 * torch.tensor(B).softmax(0)
    torch.testing.assert_close(ensemble(VIEW)[0].softmax(0), averaged)  # evaluation


def test_the_distiller_draws_in_training_and_averages_in_validation():
    teacher = Teacher(Ensemble([Fixed(A), Fixed(B)], "draw"))
    module = Distiller(Fixed(A), teacher, Objective({"kl": "kl_divergence"}), num_classes=3)
    target = torch.zeros(3, dtype=torch.long)
    trained = module.learned(Batch(VIEW, target), step=0).teacher
    validated = module.learned(Batch(VIEW, target)).teacher
    assert torch.equal(trained[0], torch.tensor((A, B)[teacher.model.drawn(0)]))
    assert not torch.allclose(validated[0].softmax(0), trained[0].softmax(0))


@pytest.mark.parametrize(
    ("models", "combine", "weights", "message"),
    [
        ([], "logit", None, "at least one"),
        ([Fixed(A)], "mean", None, "probability, logit, draw"),
        ([Fixed(A)], "logit", [1, 2], "1 numbers"),
        ([Fixed(A)], "logit", [-1], "at least 0"),
        ([Fixed(A)], "logit", [0], "not all 0"),
    ],
)
def test_impossible_ensembles_are_refused(models, combine, weights, message):
    with pytest.raises(ValueError, match=message):
        Ensemble(models, combine, weights)


def test_what_decides_the_answers_tells_ensembles_and_normalisations_apart():
    members = [nn.Linear(2, 2), nn.Linear(2, 2)]
    found = {
        identity(Ensemble(members, combine, weights))
        for combine in ("probability", "logit")
        for weights in (None, [1, 20])
    }
    assert len(found) == 4
    assert identity(Normalize([0.1], [0.2])) != identity(Normalize([0.5], [0.9]))
