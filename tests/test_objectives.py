import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill import Objective
from distill.losses import cross_entropy, kl_divergence

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
        objective.set(name, value)
        assert objective.get(name) == value
    other = Objective(KD, alpha=0.5)
    other.load_state(objective.state())
    assert torch.equal(other(S, Z, Y)["loss"], objective(S, Z, Y)["loss"])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match=r"objective\.temperature must be positive"):
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
        Objective(KD).get("alpha")
    with pytest.raises(ValueError, match=r"has terms\.ce\.weight, terms\.kl\.weight, temp"):
        Objective(KD).set("terms.kll.weight", 1.0)


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
