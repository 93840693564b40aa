"""Losses with helper networks: formulas by hand, what is learned, and what the student becomes."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill.losses import (
    Contrast,
    Hint,
    MaskedMaps,
    ModelInfo,
    Projector,
    ReusedClassifier,
    Review,
    StageHeads,
    Transport,
    class_costs,
    hierarchical_context,
    hint,
    wasserstein_kd,
)

OURS = ModelInfo((4, 6, 8), 8, 5, nn.Linear(8, 5))
THEIRS = ModelInfo((5, 7, 9), 9, 5, nn.Linear(9, 5))


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def maps(channels, sides, count=6):
    return [torch.randn(count, c, s, s) for c, s in zip(channels, sides, strict=True)]


def embeddings(count=6):
    return torch.randn(count, 8), torch.randn(count, 9)


MADE = {
    "hint": (Hint, lambda: (maps(OURS.channels, (8, 4, 2)), maps(THEIRS.channels, (8, 4, 2)))),
    "review": (
        Review,
        lambda: (
            maps(OURS.channels, (8, 4, 2)), maps(THEIRS.channels, (16, 4, 2)), *embeddings(),
        ),
    ),
    "masked": (
        MaskedMaps, lambda: (maps(OURS.channels, (8, 4, 2)), maps(THEIRS.channels, (8, 4, 2)))
    ),
    "contrast": (Contrast, lambda: (*embeddings(), torch.tensor([0, 1, 2, 0, 3, 4]))),
    "projector": (Projector, embeddings),
    "heads": (
        StageHeads,
        lambda: (
            maps(OURS.channels, (8, 4, 2)), torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 3, 4]),
        ),
    ),
    "classifier": (ReusedClassifier, embeddings),
    "transport": (
        Transport, lambda: (torch.randn(6, 5), torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 3, 4]))
    ),
}  # fmt: skip


def make(name, **options):
    kind, inputs = MADE[name]
    info = [i._replace(classifier=nn.Linear(i.embedding, 5)) for i in (OURS, THEIRS)]
    return kind(*info, **options).double(), inputs()


@pytest.mark.parametrize("name", MADE)
def test_there_is_a_value_for_each_sample_and_all_that_is_learned_gets_a_gradient(name):
    module, inputs = make(name)
    value = module(*inputs)
    assert value.shape == (6,)
    assert value.isfinite().all()
    if name == "transport":  # has nothing to learn
        return
    value.mean().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
    assert any(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.parametrize("name", MADE)
def test_the_teacher_may_come_from_inference_mode_and_gets_no_gradient(name):
    module, inputs = make(name)
    theirs = {"hint": [1], "review": [1, 3], "heads": [1]}.get(name, [1])
    given = list(inputs)
    for place in theirs:
        value = inputs[place]
        with torch.inference_mode():
            given[place] = [m.clone() for m in value] if isinstance(value, list) else value.clone()
    value = module(*given)
    if value.requires_grad:
        value.mean().backward()


@pytest.mark.parametrize("name", MADE)
def test_evaluation_changes_nothing_that_is_kept(name):
    module, inputs = make(name, **({"queue": 4} if name == "contrast" else {}))
    module.eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    first, second = module(*inputs), module(*inputs)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def narrowed(value, dtype):
    if isinstance(value, list):
        return [narrowed(one, dtype) for one in value]
    return value.to(dtype) if value.is_floating_point() else value


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_helpers_take_the_precision_of_a_run(name, dtype):
    torch.set_default_dtype(torch.float32)
    module, inputs = make(name)
    value = module.to(dtype)(*narrowed(list(inputs), dtype))
    assert value.isfinite().all()
    assert value.dtype in (torch.float32, torch.float64)


def test_contrast_is_computed_in_full_under_autocast():
    torch.set_default_dtype(torch.float32)
    module, (ours, _, target) = make("contrast")
    module = module.float()
    own, other = (F.normalize(x.float(), dim=1) for x in (ours, torch.randn(6, 8)))
    exact = module._nearness(own, other, target, target[:0])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module._nearness(own, other, target, target[:0]), exact)


def test_a_hint_is_that_of_the_projected_maps():
    module, (ours, theirs) = make("hint")
    projected = [
        torch.einsum("nchw,dc->ndhw", x, p.weight[:, :, 0, 0])
        for x, p in zip(ours, module.projections, strict=True)
    ]
    torch.testing.assert_close(module(ours, theirs), hint(projected, theirs))


def test_the_hierarchical_context_is_the_weighted_mean_over_resolutions():
    s, z = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8)
    expected = []
    for a, b in zip(s.numpy(), z.numpy(), strict=True):
        total, weights = ((a - b) ** 2).mean(), 1.0
        for weight, side in ((0.5, 4), (0.25, 2), (0.125, 1)):
            step = 8 // side
            pooled = [x.reshape(2, side, step, side, step).mean((2, 4)) for x in (a, b)]
            total += weight * ((pooled[0] - pooled[1]) ** 2).mean()
            weights += weight
        expected.append(total / weights)
    torch.testing.assert_close(hierarchical_context(s, z), torch.tensor(expected))
    one = torch.ones(3, 2, 1, 1)
    assert hierarchical_context(one, 3 * one).tolist() == [4.0] * 3
    with pytest.raises(ValueError, match="do not compare"):
        hierarchical_context(one, s)


def test_the_last_map_is_made_from_the_places_that_are_not_masked():
    module, (ours, theirs) = make("masked", share=0.5, beta=0.3)
    module.eval()
    projected = [project(x) for project, x in zip(module.projections, ours, strict=True)]
    pairs = zip(projected[:-1], theirs[:-1], strict=True)
    first = sum((p - z).square().sum((1, 2, 3)) for p, z in pairs)
    masked = module._masked(projected[-1])
    assert masked.flatten(1).sum(1).tolist() == [2] * 6  # of 2 × 2 places
    hidden = torch.where(masked, module.token, projected[-1])
    missing = ((module.generate(hidden) - theirs[-1]).square() * masked).sum((1, 2, 3))
    torch.testing.assert_close(module(ours, theirs), first + 0.3 / 0.5 * missing)
    module.train()
    assert not torch.equal(module(ours, theirs), module(ours, theirs))  # drawn anew each time
    with pytest.raises(ValueError, match="share must lie"):
        make("masked", share=1.0)
    with pytest.raises(ValueError, match=r"maps of \[8, 8\] and \[4, 4\] places"):
        module(ours, [F.avg_pool2d(theirs[0], 2), *theirs[1:]])


def test_the_last_level_of_a_review_sees_only_the_embedding_and_the_first_sees_all():
    module, (ours, theirs, embedding, target) = make("review")
    module.eval()
    ours = [x.requires_grad_() for x in ours]
    embedding.requires_grad_()
    module([*ours], theirs, embedding, target).sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in (*ours, embedding))
    last = module.fusions[-1]
    out, _ = last(embedding.detach()[..., None, None], None, (1, 1))
    by_hand = last.leave(last.enter(embedding.detach()[..., None, None]))
    torch.testing.assert_close(out, by_hand)


def contrast_by_hand(module, ours, theirs, target, queue=(), labels=()):
    u, v = (
        F.normalize(layer(x), dim=1).detach().numpy()
        for layer, x in ((module.ours, ours), (module.theirs, theirs))
    )
    values = []
    for n in range(len(u)):
        value = 0.0
        for own, others, more in ((u, v, queue), (v, u, ())):
            scores = [
                math.exp(float(own[n] @ others[m]) / module.tau)
                for m in range(len(u))
                if m == n or target[m] != target[n]
            ]
            scores += [
                math.exp(float(own[n] @ q) / module.tau)
                for q, label in zip(more, labels if len(more) else (), strict=True)
                if label != target[n]
            ]
            value -= math.log(math.exp(float(own[n] @ others[n]) / module.tau) / sum(scores))
        values.append(value)
    return torch.tensor(values)


def test_contrast_is_its_formula_and_the_queue_holds_the_last_of_the_teacher():
    module, (ours, theirs, target) = make("contrast", queue=8, tau=0.5)
    expected = contrast_by_hand(module, ours, theirs, target)
    torch.testing.assert_close(module(ours, theirs, target), expected)
    first = F.normalize(module.theirs(theirs), dim=1).detach()
    assert module.queued_labels.tolist() == [*target.tolist(), -1, -1]
    torch.testing.assert_close(module.queued[:6], first)
    more = (torch.randn(6, 8), torch.randn(6, 9), torch.tensor([4, 3, 2, 1, 0, 0]))
    expected = contrast_by_hand(module, *more, first.numpy(), target.tolist())
    torch.testing.assert_close(module(*more), expected)
    assert module.queued_labels.tolist() == [4, 3, 2, 1, 0, 0, 0, 1]
    assert "queued" in module.state_dict()  # so that a run that goes on has the same negatives


def test_a_projector_compares_what_is_normalised_over_the_batch():
    module, (ours, theirs) = make("projector", power=4.0)
    s = (ours @ module.project.weight.T + module.project.bias).detach().numpy()
    z = theirs.numpy()
    s, z = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-4) for x in (s, z))
    expected = math.log((np.abs(s - z) ** 4).sum())
    torch.testing.assert_close(module(ours, theirs), torch.full((6,), expected))


def test_heads_learn_the_teachers_answer_and_gamma_raises_the_labels_share():
    module, (ours, teacher, target) = make("heads", gamma=1.0)
    module.eval()
    answers = [head(x) for head, x in zip(module.heads, ours, strict=True)]
    p = teacher.softmax(1)
    expected = sum(-(p * a.log_softmax(1)).sum(1) for a in answers)
    torch.testing.assert_close(module(ours, teacher, target), expected)
    sharper, _ = make("heads", gamma=1.5)
    sharper.load_state_dict(module.state_dict())
    sharper.eval()
    onehot = F.one_hot(target, 5)
    expected = sum(-(((p + onehot) ** 1.5 - onehot) * a.log_softmax(1)).sum(1) for a in answers)
    torch.testing.assert_close(sharper(ours, teacher, target), expected)
    with pytest.raises(ValueError, match="gamma must be at least 1"):
        make("heads", gamma=0.5)


def test_the_students_classifier_is_the_teachers_after_the_projection():
    teacher = nn.Linear(9, 5)
    module = ReusedClassifier(OURS, THEIRS._replace(classifier=teacher)).double()
    student = nn.Linear(8, 5)
    module.set_classifier(student)
    embedding = torch.randn(7, 8)
    torch.testing.assert_close(student(embedding), teacher(module.project(embedding)))
    assert not student.weight.requires_grad
    assert not any(name == "weight" for name in module.state_dict())
    with pytest.raises(ValueError, match="teacher's classifier is not one linear layer"):
        ReusedClassifier(OURS, THEIRS._replace(classifier=None))


def test_transport_takes_its_costs_from_the_teachers_classifier():
    teacher = nn.Linear(9, 5)
    module = Transport(OURS, THEIRS._replace(classifier=teacher), gamma=3.0, temperature=2.0)
    inputs = torch.randn(6, 5), torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 3, 4])
    cost = class_costs(teacher.weight)
    expected = wasserstein_kd(*inputs, cost, gamma=3.0, temperature=2.0)
    torch.testing.assert_close(module(*inputs), expected)
    with pytest.raises(ValueError, match="not one linear layer"):
        Transport(OURS, THEIRS._replace(classifier=None))


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [(Contrast, {"tau": 0}, "tau"), (Contrast, {"queue": -1}, "queue"),
     (Projector, {"power": 0}, "power")],
)  # fmt: skip
def test_options_out_of_range_are_refused(kind, options, match):
    with pytest.raises(ValueError, match=match):
        kind(OURS, THEIRS, **options)
