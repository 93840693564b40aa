import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill import Objective
from distill.losses import LOSSES, cross_entropy, kl_divergence

torch.manual_seed(0)
S, Z = torch.randn(2, 6, 5, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 4, 0])
KD = {"ce": "cross_entropy", "kl": "kl_divergence"}


@given(alpha=st.floats(0, 1), temperature=st.floats(0.5, 20))
def test_kd_is_the_weighted_sum_of_its_two_terms(alpha, temperature):
    losses = Objective(KD, temperature=temperature, alpha=alpha)(S, Z, Y)
    probs = (Z / temperature).softmax(1)
    kl = (probs * (probs.log() - (S / temperature).log_softmax(1))).sum(1).mean()
    ce = -S.log_softmax(1)[torch.arange(6), Y].mean()
    assert losses["ce"].item() == pytest.approx(ce.item())
    assert losses["kl"].item() == pytest.approx(temperature**2 * kl.item())
    expected = (1 - alpha) * ce + alpha * temperature**2 * kl
    assert losses["loss"].item() == pytest.approx(expected.item())


def test_alpha_zero_is_the_hard_loss_and_one_the_soft_loss():
    assert Objective(KD, 4, alpha=0.0)(S, Z, Y)["loss"] == cross_entropy(S, Y).mean()
    soft = kl_divergence(S, Z, temperature=4.0).mean()
    assert Objective(KD, 4, alpha=1.0)(S, Z, Y)["loss"] == soft


def test_without_alpha_the_weights_stand_alone():
    terms = {"ce": {"loss": "cross_entropy", "weight": 2.0}, "kl": {"loss": "kl_divergence"}}
    losses = Objective(terms)(S, Z, Y)
    assert losses["loss"].item() == pytest.approx((2 * losses["ce"] + losses["kl"]).item())


def test_a_term_may_name_its_own_temperature():
    terms = {"kl": {"loss": "kl_divergence", "temperature": 2.0}}
    assert torch.equal(
        Objective(terms, temperature=9)(S, Z, Y)["kl"], kl_divergence(S, Z, 2.0).mean()
    )


def own_loss(student, target, scale=1.0):
    return scale * student.gather(1, target[:, None])[:, 0]


def test_a_dotted_path_names_a_loss_of_ones_own():
    terms = {"own": {"loss": f"{__name__}.own_loss", "scale": 3.0}}
    losses = Objective(terms)(S, None, Y)
    assert losses["loss"].item() == pytest.approx(3 * S[torch.arange(6), Y].mean().item())


def test_annealing_moves_and_checkpoints_keep_the_same_values():
    objective = Objective(KD, temperature=4, alpha=0.9)
    for name, value in (("temperature", 2.5), ("alpha", 0.3), ("terms.kl.weight", 0.5)):
        objective.annealed[name] = value
        assert objective.annealed[name] == value
    other = Objective(KD, alpha=0.5)
    other.load_state(objective.state())
    assert torch.equal(other(S, Z, Y)["loss"], objective(S, Z, Y)["loss"])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match=r"objective\.temperature must be a number above 0"):
        Objective(KD, temperature=temperature)


@pytest.mark.parametrize(
    ("terms", "options", "message"),
    [
        ({}, {}, "at least one term"),
        ({"ce": "cross_entrpy"}, {}, "unknown loss 'cross_entrpy'"),
        ({"ce": {"weight": 1}}, {}, "does not name its loss"),
        ({"kl": {"loss": "kl_divergence", "temprature": 2}}, {}, "no option 'temprature'"),
        ({"kl": {"loss": "kl_divergence", "weight": -1}}, {}, r"terms\.kl\.weight must be"),
        (KD, {"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ({"kl": "kl_divergence"}, {"alpha": 0.0}, "weight zero"),
        ({"x": "nowhere.loss"}, {}, "cannot import"),
        ({"x": "math.sin"}, {}, "first arguments"),
    ],
)
def test_mistakes_are_explained(terms, options, message):
    with pytest.raises(ValueError, match=message):
        Objective(terms, **options)


def test_a_missing_teacher_and_an_unknown_value_are_explained():
    with pytest.raises(ValueError, match="there is none"):
        Objective(KD)(S, None, Y)
    with pytest.raises(ValueError, match="cannot anneal 'alpha'"):
        Objective(KD).annealed["alpha"]
    with pytest.raises(ValueError, match=r"has terms\.ce\.weight, terms\.kl\.weight, temp"):
        Objective(KD).annealed["terms.kll.weight"] = 1.0


def test_reweighted_values_are_multiplied_by_class_balanced_weights():
    counts = [10, 20, 5, 1, 3]
    terms = {"ce": {"loss": "cross_entropy", "reweight": 0.9}}
    effective = [(1 - 0.9) / (1 - 0.9**n) for n in counts]
    weights = torch.tensor(effective, dtype=torch.float64) * 5 / sum(effective)
    expected = (weights[Y] * cross_entropy(S, Y)).mean()
    found = Objective(terms, class_counts=counts)(S, None, Y)["loss"]
    torch.testing.assert_close(found, expected)


def test_class_counts_reach_the_losses_that_ask_for_them():
    from distill.losses import ldam

    counts = [10, 20, 5, 1, 3]
    found = Objective({"ldam": "ldam"}, class_counts=counts)(S, None, Y)["loss"]
    torch.testing.assert_close(found, ldam(S, Y, counts).mean())
    with pytest.raises(ValueError, match=r"terms\.ldam needs class_counts"):
        Objective({"ldam": "ldam"})
    with pytest.raises(ValueError, match=r"reweight must lie in \[0, 1\)"):
        Objective({"ce": {"loss": "cross_entropy", "reweight": 1.0}}, class_counts=counts)


def test_any_companion_stands_under_any_soft_term():
    terms = {
        "hard": {"loss": "generalized_cross_entropy", "q": 0.5},
        "soft": {"loss": "pairwise_soft_hinge", "margin": 2.0},
    }
    losses = Objective(terms, temperature=2.0, alpha=0.25)(S, Z, Y)
    assert losses["loss"].item() == pytest.approx(
        0.75 * losses["hard"].item() + 0.25 * losses["soft"].item()
    )


# Remedies for labels that are wrong, rare or too sure

SMOOTH = {
    "cross_entropy",
    "tempered_cross_entropy",
    "generalized_cross_entropy",
    "symmetric_cross_entropy",
    "class_balanced_cross_entropy",
    "logit_adjusted_cross_entropy",
}
ON_LABELS = {name for name, loss in LOSSES.items() if loss.inputs == ("student", "target")}
COUNTS = [10, 20, 5, 1, 3]


def one_hot(smoothing=0.0):
    return (1 - smoothing) * torch.eye(5, dtype=torch.float64)[Y] + smoothing / 5


@pytest.mark.parametrize("loss", sorted(SMOOTH))
def test_smoothed_labels_are_class_probabilities(loss):
    objective = Objective({"term": loss}, class_counts=COUNTS, label_smoothing=0.2)
    plain = Objective({"term": loss}, class_counts=COUNTS)
    found = objective(S, None, Y)["loss"]
    torch.testing.assert_close(found, plain(S, None, one_hot(0.2))["loss"])
    torch.testing.assert_close(found, objective(S, None, one_hot())["loss"])
    assert found != plain(S, None, Y)["loss"]


def test_terms_on_the_teacher_see_labels_as_they_are():
    terms = {"ce": "cross_entropy", "dkd": "decoupled"}
    smoothed, plain = Objective(terms, label_smoothing=0.2)(S, Z, Y), Objective(terms)(S, Z, Y)
    assert torch.equal(smoothed["dkd"], plain["dkd"])
    assert smoothed["ce"] != plain["ce"]


@pytest.mark.parametrize("loss", sorted(ON_LABELS - SMOOTH))
def test_losses_of_class_indices_refuse_smoothed_labels(loss):
    options = {"k": 2} if "topk" in loss else {}
    terms = {"term": {"loss": loss, **options}}
    Objective(terms, class_counts=COUNTS)(S, None, Y)
    with pytest.raises(ValueError, match="needs class indices"):
        Objective(terms, class_counts=COUNTS, label_smoothing=0.2)(S, None, Y)


def test_several_remedies_at_once_give_the_loss_that_their_formulas_say():
    """α, T, effective-number weights, two label terms, smoothing, and both selections."""
    terms = {
        "ce": {"loss": "cross_entropy", "weight": 2.0, "reweight": 0.9},
        "gce": {"loss": "generalized_cross_entropy", "q": 0.5},
        "kl": "kl_divergence",
    }
    teacher = Z.clone()
    teacher[torch.arange(6), Y] += torch.tensor([9.0, 9.0, 9.0, 9.0, 0.0, -9.0])
    objective = Objective(
        terms, temperature=3.0, alpha=0.3, class_counts=COUNTS, label_smoothing=0.1,
        sample_selection={"small_loss": 0.5, "agreement": 0.6},
    )  # fmt: skip
    effective = [(1 - 0.9) / (1 - 0.9**n) for n in COUNTS]
    weights = [5 * w / sum(effective) for w in effective]
    ce, gce, kl, trusted = [], [], [], []
    for s, z, y in zip(S.tolist(), teacher.tolist(), Y.tolist(), strict=True):
        p = softmax(s)
        goal = [0.9 * (k == y) + 0.1 / 5 for k in range(5)]
        weight = sum(g * w for g, w in zip(goal, weights, strict=True))
        ce.append(-weight * sum(g * math.log(q) for g, q in zip(goal, p, strict=True)))
        gce.append(sum(g * (1 - q**0.5) / 0.5 for g, q in zip(goal, p, strict=True)))
        soft, student = softmax(z, 3.0), softmax(s, 3.0)
        kl.append(9 * sum(t * math.log(t / q) for t, q in zip(soft, student, strict=True)))
        trusted.append(softmax(z)[y] >= 0.6)
    hard = [2 * a + b for a, b in zip(ce, gce, strict=True)]
    small = sorted(range(6), key=hard.__getitem__)[:3]
    kept = [n for n in small if trusted[n]]
    assert 0 < len(kept) < 3

    found = objective(S, teacher, Y)
    assert found["kept"].item() == pytest.approx(len(kept) / 6)
    for name, values, seen in (("ce", ce, kept), ("gce", gce, kept), ("kl", kl, range(6))):
        mean = sum(values[n] for n in seen) / len(seen)
        assert found[name].item() == pytest.approx(mean, rel=1e-7), name  # weights are float32
    expected = 0.7 * (2 * found["ce"] + found["gce"]) + 0.3 * found["kl"]
    torch.testing.assert_close(found["loss"], expected)
    assert "kept" not in objective.eval()(S, teacher, Y)


def softmax(values, temperature=1.0):
    powers = [math.exp(value / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def test_samples_left_out_have_no_gradient_from_labels_and_none_kept_is_no_loss():
    student = S.clone().requires_grad_()
    objective = Objective({"ce": "cross_entropy"}, sample_selection={"small_loss": 0.5})
    losses = objective(student, None, Y)
    losses["loss"].backward()
    ours = cross_entropy(S, Y)
    kept = ours <= ours.sort().values[2]
    assert losses["loss"].item() == pytest.approx(ours[kept].mean().item())
    assert torch.equal((student.grad != 0).any(1), kept)

    contrary = Objective(KD, sample_selection={"agreement": True})
    losses = contrary(S, torch.eye(5).double()[(Y + 1) % 5], Y)
    assert losses["kept"] == losses["ce"] == 0
    assert losses["loss"] == losses["kl"] > 0


def test_nothing_else_teaches_by_a_classifier_that_a_term_sets():
    terms = {"embedding": "reused_classifier"}
    assert Objective(terms).helpers.sets_classifier
    with pytest.raises(ValueError, match="sets the student's classifier from others"):
        Objective({**terms, "ce": "cross_entropy"})


def test_the_share_of_small_losses_can_be_annealed():
    objective = Objective(KD, sample_selection={"small_loss": 0.5})
    assert "sample_selection.small_loss" in objective.annealed
    objective.annealed["sample_selection.small_loss"] = 1.0
    assert objective(S, Z, Y)["kept"] == 1
    other = Objective(KD, sample_selection={"small_loss": 0.5})
    other.load_state(objective.state())
    assert other.annealed["sample_selection.small_loss"] == 1.0
    assert (
        "sample_selection.small_loss"
        not in Objective(KD, sample_selection={"agreement": True}).annealed
    )
    with pytest.raises(ValueError, match="small_loss is the share"):
        objective.annealed["sample_selection.small_loss"] = 0.0


def test_without_the_labels_share_not_even_an_infinite_label_loss_reaches_the_student():
    student = S.clone().requires_grad_()
    terms = {"own": {"loss": f"{__name__}.infinite"}, "kl": "kl_divergence"}
    losses = Objective(terms, 4.0, alpha=1.0)(student, Z, Y)
    assert not losses["own"].isfinite()
    losses["loss"].backward()
    assert student.grad.isfinite().all()
    assert losses["loss"] == losses["kl"]


def infinite(student, target):
    return student.gather(1, target[:, None])[:, 0] * float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"terms": {"kl": "kl_divergence"}, "label_smoothing": 0.1}, "this objective has none"),
        (
            {"terms": {"kl": "kl_divergence"}, "sample_selection": {"agreement": True}},
            "objective has none",
        ),
        ({"terms": {"kept": "cross_entropy"}}, r"terms\.kept has the name of a metric"),
    ],
)
def test_remedies_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**{"terms": KD, **options})
    assert Objective({"ce": "cross_entropy"}, sample_selection={"agreement": True}).needs_teacher


# Samples without labels


PART = 4  # of the six samples have labels
UNKNOWN = torch.cat([Y[:PART], torch.tensor([-1, -1])])


def kl_by_hand(student, teacher, t):
    probs = (teacher / t).softmax(1)
    return t**2 * (probs * (probs.log() - (student / t).log_softmax(1))).sum(1)


def decoupled_by_hand(student, teacher, target, t, alpha, beta):
    """TCKD and NCKD of 2203.08679, equations 3 to 7, one sample at a time."""
    values = []
    for s, z, y in zip(student, teacher, target.tolist(), strict=True):
        p, q = (z / t).softmax(0), (s / t).softmax(0)
        others = [k for k in range(len(s)) if k != y]
        rest_p, rest_q = p[others], q[others]
        binary = p[y] * (p[y] / q[y]).log()
        binary = binary + rest_p.sum() * (rest_p.sum() / rest_q.sum()).log()
        p_hat, q_hat = rest_p / rest_p.sum(), rest_q / rest_q.sum()
        values.append(t**2 * (alpha * binary + beta * (p_hat * (p_hat / q_hat).log()).sum()))
    return torch.stack(values)


def test_samples_without_labels_are_seen_by_the_teachers_own_terms_alone():
    losses = Objective(KD, temperature=4, alpha=0.9)(S, Z, UNKNOWN, labelled=PART)
    ce = -S.log_softmax(1)[torch.arange(PART), Y[:PART]].mean()
    kl = kl_by_hand(S, Z, 4).mean()
    assert losses["ce"].item() == pytest.approx(ce.item(), rel=1e-12)
    assert losses["kl"].item() == pytest.approx(kl.item(), rel=1e-12)
    assert losses["loss"].item() == pytest.approx((0.1 * ce + 0.9 * kl).item(), rel=1e-12)


def test_a_term_that_reads_both_is_a_mean_over_the_labelled():
    terms = {"dkd": {"loss": "decoupled", "alpha": 1.0, "beta": 8.0}, "kl": "kl_divergence"}
    losses = Objective(terms, temperature=2)(S, Z, UNKNOWN, labelled=PART)
    dkd = decoupled_by_hand(S[:PART], Z[:PART], Y[:PART], 2, 1.0, 8.0).mean()
    assert losses["dkd"].item() == pytest.approx(dkd.item(), rel=1e-10)
    assert losses["kl"].item() == pytest.approx(kl_by_hand(S, Z, 2).mean().item(), rel=1e-12)


def test_the_gradient_of_a_sample_without_a_label_is_the_teachers():
    student = S.clone().requires_grad_()
    Objective(KD, temperature=3, alpha=0.4)(student, Z, UNKNOWN, labelled=PART)["loss"].backward()
    soft = 0.4 * 3 * ((S / 3).softmax(1) - (Z / 3).softmax(1)) / 6
    hard = 0.6 * (S.softmax(1) - torch.nn.functional.one_hot(UNKNOWN.clamp(min=0), 5)) / PART
    hard[PART:] = 0
    torch.testing.assert_close(student.grad, soft + hard, rtol=1e-10, atol=1e-12)


def test_weights_of_classes_leave_a_teachers_term_to_the_labelled():
    terms = {"kl": {"loss": "kl_divergence", "reweight": 0.9}}
    objective = Objective(terms, class_counts=[1, 2, 3, 4, 5])
    losses = objective(S, Z, UNKNOWN, labelled=PART)
    alone = objective(S[:PART], Z[:PART], Y[:PART])
    assert losses["kl"] == alone["kl"]
    assert not objective.teaches_unlabeled()


def test_a_selection_is_of_the_labelled():
    objective = Objective(KD, 2, sample_selection={"small_loss": 0.5}).train()
    losses = objective(S, Z, UNKNOWN, labelled=PART)
    each = -S.log_softmax(1)[torch.arange(PART), Y[:PART]]
    assert losses["ce"].item() == pytest.approx(each.sort().values[:2].mean().item())
    assert losses["kept"] == 0.5
    assert losses["kl"].item() == pytest.approx(kl_by_hand(S, Z, 2).mean().item())


@pytest.mark.parametrize("scope", ["run", "instance"])
def test_a_learned_temperature_is_that_of_each_sample(scope):
    torch.manual_seed(0)
    terms = {"ce": "tempered_cross_entropy", "kl": "kl_divergence"}
    objective = Objective(terms, 4, class_counts=[1] * 5, curriculum={"scope": scope})
    student, teacher = S.float(), Z.float()
    losses = objective(student, teacher, UNKNOWN, labelled=PART)
    shared = objective.curriculum(student, teacher)
    own = shared[:PART] if scope == "instance" else shared
    tempered = LOSSES["tempered_cross_entropy"].function(student[:PART], Y[:PART], temperature=own)
    assert losses["ce"].item() == pytest.approx(tempered.mean().item())
    assert losses["kl"].item() == pytest.approx(
        kl_divergence(student, teacher, shared).mean().item()
    )


@pytest.mark.parametrize(
    ("terms", "options", "moved", "teaches"),
    [
        (KD, {"alpha": 0.5}, (), True),
        (KD, {"alpha": 1.0}, (), True),
        (KD, {"alpha": 0.0}, (), False),
        (KD, {"alpha": 0.0}, ("alpha",), True),
        ({"ce": "cross_entropy"}, {}, (), False),
        ({"ce": "cross_entropy", "dkd": "decoupled"}, {}, (), False),
        ({"ce": "cross_entropy", "kl": {"loss": "kl_divergence", "weight": 0}}, {}, (), False),
        ({"ce": "cross_entropy", "kl": {"loss": "kl_divergence", "weight": 0}}, {},
         ("terms.kl.weight",), True),
        ({"ce": "cross_entropy", "at": "attention_transfer"}, {}, (), True),
    ],
)  # fmt: skip
def test_which_objectives_learn_from_samples_without_labels(terms, options, moved, teaches):
    assert Objective(terms, **options).teaches_unlabeled(moved) is teaches
