"""A step of two views: the mean of what a step of each would be."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from distill import Distiller, Objective
from distill.data.batch import Batch
from distill.training.callbacks.finite import named
from distill.training.callbacks.speed import Speed
from tests.losses.test_batchwise import multi_level_formula, softmax

CE = {"ce": "cross_entropy"}
LABELLED = 4
OBJECTIVES = {
    "each row by itself": {"terms": {**CE, "kl": "kl_divergence"}, "alpha": 0.9},
    "rows together": {"terms": {"mlkd": "multi_level_kd", "skd": "streamlined_kd"}},
    "columns": {"terms": {**CE, "dist": "dist"}},
    "relations": {"terms": {"rkd": "relational_distance", "pkt": "probabilistic_transfer"}},
    "contrast": {"terms": {"crd": {"loss": "contrast", "width": 4}}},
    "maps": {"terms": {"hint": "hint", **CE}, "stages": [-2, -1]},
    "small losses": {"terms": CE, "sample_selection": {"small_loss": 0.5}},
    "a learned temperature": {"terms": {"kl": "kl_divergence"},
                              "curriculum": {"low": 1.0, "high": 20.0}},
}  # fmt: skip


def models(width):
    import timm

    import distill.models.slim  # noqa: F401

    made = timm.create_model(f"slim_resnet10_{width}", num_classes=5, in_chans=1)
    return made.double()


def batch(views=2, labeled=None):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(6 * views, 1, 16, 16, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    return Batch(images, target.repeat(views), views=views, labeled=labeled)


def distiller(objective):
    torch.manual_seed(0)
    module = Distiller(models(4), models(8), Objective(**{"temperature": 4.0, **objective}))
    return module.double().train()


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("labeled", [None, LABELLED])
@pytest.mark.parametrize("case", OBJECTIVES)
def test_losses_and_gradients_are_the_means_of_those_of_each_view(case, labeled):
    module = distiller(OBJECTIVES[case])
    module.objective.checked = True
    whole = batch(labeled=labeled)
    apart = copy.deepcopy(module)
    found = module.learned(whole)
    found.losses["loss"].backward()
    each = [apart.learned(one) for one in whole.by_view()]
    (sum(one.losses["loss"] for one in each) / 2).backward()
    for name, value in found.losses.items():
        expected = sum(one.losses[name].item() for one in each) / 2
        assert value.item() == pytest.approx(expected, rel=1e-12), name
    right = sum(one.values["top1"].item() for one in each) / 2
    assert found.values["top1"].item() == pytest.approx(right)
    ours, theirs = gradients(module), gradients(apart)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-12)
    buffers = dict(apart.named_buffers())  # batch norm has seen two batches
    for name, value in module.named_buffers():
        torch.testing.assert_close(value, buffers[name], rtol=1e-9, atol=1e-12)
    assert found.teacher.shape == (12, 5)


def test_two_views_of_mlkd_are_the_paper_s_sum_by_plain_python():
    terms = {
        "ce": {"loss": "cross_entropy", "weight": 0.2},
        "mlkd": {"loss": "multi_level_kd", "weight": 1.8, "spread": [0.5, 1.0, 1.5]},
    }
    module = distiller({"terms": terms})
    whole = batch()
    student = copy.deepcopy(module.student)
    found = module.learned(whole).losses
    total, parts = 0.0, []
    for one in whole.by_view():  # a batch of its own, to batch norm too
        s = student(one.view).detach()
        z = module.teacher.model.eval()(one.view).detach()
        rows = zip(s.tolist(), one.target.tolist(), strict=True)
        ce = -np.mean([np.log(softmax(row, 1.0)[label]) for row, label in rows])
        levels = multi_level_formula(s, z, 1.0, 1.0, (0.5, 1.0, 1.5), 4.0).mean().item()
        parts.append((ce, levels))
        total += 0.1 * ce + 0.9 * levels
    assert found["loss"].item() == pytest.approx(total, rel=1e-9)
    for place, name in enumerate(("ce", "mlkd")):
        assert found[name].item() == pytest.approx((parts[0][place] + parts[1][place]) / 2)


def test_the_rows_of_two_views_are_not_compared_with_each_other():
    s, z = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    formula = multi_level_formula(s, z, 1.0, 1.0, (1.0,), 4.0).mean().item()
    halves = [
        multi_level_formula(a, b, 1.0, 1.0, (1.0,), 4.0).mean().item()
        for a, b in zip(s.chunk(2), z.chunk(2), strict=True)
    ]
    assert formula != pytest.approx(sum(halves) / 2, rel=0.01)  # so that it matters

    class Given(nn.Module):
        num_classes = 5

        def __init__(self, logits):
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, rows):
            return self.logits[rows.long().flatten()]

    objective = Objective({"mlkd": {"loss": "multi_level_kd", "spread": [1.0]}}, 4.0)
    module = Distiller(Given(s), Given(z), objective, num_classes=5).double()
    rows = torch.arange(8.0, dtype=torch.float64).view(8, 1)
    found = module.learned(Batch(rows, torch.zeros(8, dtype=torch.long), views=2))
    assert found.losses["loss"].item() == pytest.approx(sum(halves) / 2, rel=1e-9)


def test_a_step_of_one_view_does_what_it_did(monkeypatch):
    module, calls = distiller(OBJECTIVES["each row by itself"]), []
    monkeypatch.setattr(torch, "stack", lambda *a, **b: calls.append(a))
    monkeypatch.setattr(torch.Tensor, "chunk", lambda *a, **b: calls.append(a))
    module.learned(batch(views=1))
    assert calls == []


def test_speed_counts_a_picture_once_however_often_a_step_shows_it():
    for views in (1, 2):
        times = iter(range(9))
        speed = Speed(lambda times=times: float(next(times)))
        trainer = SimpleNamespace(world_size=1, current_epoch=0)
        speed.on_train_start(trainer, None)
        speed.on_train_epoch_start(trainer, None)
        speed.on_train_batch_end(trainer, None, None, batch(views), 0)
        assert speed.images_per_second == 6


def test_pictures_are_named_once_where_a_loss_is_not_finite():
    assert named(torch.tensor([7, 9, 7, 9])) == named(torch.tensor([7, 9]))
