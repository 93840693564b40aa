"""Claims that are mathematics are pinned exactly, those of experience as margins at fixed seeds."""

import json
import math
import statistics

import numpy as np
import pytest
import scipy.stats
import torch

from claims import BUDGETS
from distill.config import build
from shared import composed
from ten_claims import STUDIES, eight_bits, imbalance, margins, poison, redundancy, transforms
from ten_claims.calibration import excess_of_ece
from ten_claims.page import Checked, write_page, write_study
from ten_claims.runs import ALONE, Run, Runs, cross_fitted, train_one
from ten_claims.study import (
    FAILS,
    HOLDS,
    OPEN,
    Finding,
    Interval,
    Result,
    in_short,
    larger,
    verdict,
)
from ten_claims.temperature import entropy, free_energy, laws, least_free_energy

TWO = (0, 1)


def finding(outcome, condition="it rains"):
    return Finding(condition, outcome, "numbers")


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_run_of_a_budget_is_a_configuration(budget, tmp_path):
    runs = Runs(tmp_path, BUDGETS[budget])
    wanted = {run for study in STUDIES.values() for run in study.runs(0)}
    wanted |= {run.teacher for run in wanted if run.teacher}
    kinds = {(*runs.overrides(run), *run.overrides): run for run in wanted}
    for overrides, run in kinds.items():
        teacher = ["teacher.checkpoint=model.pth"] if run.teacher else []
        cfg = composed(*overrides, *teacher)
        if budget == "full" and cfg.teacher.get("fit"):
            assert cfg.teacher.fit.max_epochs == 5


@pytest.mark.parametrize(
    ("outcomes", "told"),
    [
        ((HOLDS, HOLDS), "holds"),
        ((FAILS, FAILS), "fails"),
        ((HOLDS, FAILS), "holds only if part 0"),
        ((HOLDS, FAILS, HOLDS), "holds only if part 0; or if part 2"),
        ((OPEN,), "undecided"),
        ((FAILS, OPEN), "fails; undecided if part 1"),
        ((HOLDS, OPEN), "holds if part 0; undecided if part 1"),
        ((HOLDS, FAILS, OPEN), "holds only if part 0; undecided if part 2"),
    ],
)
def test_a_verdict_follows_from_the_outcomes(outcomes, told):
    assert verdict([finding(o, f"part {k}") for k, o in enumerate(outcomes)]) == told


def test_a_condition_under_which_anything_fails_is_not_one_under_which_the_claim_holds():
    assert verdict([finding(HOLDS), finding(FAILS)]) == "fails"
    assert verdict([finding(HOLDS), finding(OPEN)]) == "undecided"


@pytest.mark.parametrize(
    ("outcomes", "told"),
    [
        ((HOLDS, HOLDS), "It holds."),
        ((FAILS, FAILS), "It is wrong."),
        ((OPEN, OPEN), "These runs cannot tell."),
        ((HOLDS, FAILS), "Of 2 ways to read it, it is right in 1 and wrong in 1."),
        ((HOLDS, FAILS, OPEN, OPEN),
         "Of 4 ways to read it, it is right in 1, wrong in 1 and undecided in 2."),
    ],
)  # fmt: skip
def test_a_claim_is_told_in_one_sentence_first(outcomes, told):
    assert in_short([finding(o, f"part {k}") for k, o in enumerate(outcomes)]) == told


def test_what_is_open_says_how_many_seeds_would_decide_it():
    values = [1.0, 2.0, -1.5, 0.5]
    found = Interval.of(values)
    assert found.outcome(0.0) == OPEN
    needed = found.seeds_to_decide(0.0)
    # The same mean and deviation in as many seeds, and in one fewer: z-scores, repeated by hand.
    spread, mean = np.std(values, ddof=1), np.mean(values)
    for count, decided in ((needed, True), (needed - 1, False)):
        half = scipy.stats.t.ppf(0.975, count - 1) * spread / np.sqrt(count)
        assert (mean > half) == decided
    told = larger("it rains", {"": values}, "points").measured
    assert told.endswith(f"about {needed} seeds would decide it, if means and deviations stay as "
                         "they are")  # fmt: skip
    assert "would decide" not in larger("it rains", {"": [1.0, 1.1, 0.9]}, "points").measured
    assert Interval.of([0.5, -0.5]).seeds_to_decide(0.0) is None


def test_an_interval_is_students():
    values = [1.0, 2.0, 4.0]
    found = Interval.of(values)
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(4.302653 * statistics.stdev(values) / math.sqrt(3))
    assert Interval.of([5.0]).outcome(0.0) == OPEN


def test_differences_hold_fail_or_stay_open():
    assert larger("", {"": [1.0, 1.1, 0.9]}, "").outcome == HOLDS
    assert larger("", {"": [-1.0, -1.1, -0.9]}, "").outcome == FAILS
    assert larger("", {"": [-1.0, 1.0, 0.5]}, "").outcome == OPEN
    assert larger("", {"": [-0.01, 0.01, 0.0]}, "", margin=0.5).outcome == FAILS
    assert larger("", {"a": [1.0, 1.1], "b": [-1.0, -1.1]}, "").outcome == FAILS


def test_intervals_cover_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    found = [Interval.of(random.normal(3.0, 2.0, size=4).tolist()) for _ in range(2000)]
    covered = np.mean([abs(one.mean - 3.0) <= one.half for one in found])
    assert covered == pytest.approx(0.95, abs=0.02)


# 1. Temperature is thermodynamic.


def test_softmax_minimises_free_energy_and_all_laws_hold():
    assert {one.outcome for one in laws()} == {HOLDS}


def test_free_energy_is_energy_less_heat():
    s = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    for tau in (0.3, 1.0, 7.0):
        p = torch.softmax(s / tau, -1)
        energy = -(p * s).sum(-1)
        torch.testing.assert_close(free_energy(p, s, tau), energy - tau * entropy(s, tau))
        divergence = torch.nn.functional.kl_div(
            p.log(), torch.tensor([[0.2, 0.5, 0.3]]).double(), reduction="sum"
        )
        q = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
        gap = free_energy(q, s, tau) - least_free_energy(s, tau)
        torch.testing.assert_close(gap, tau * divergence.reshape(1))


# 3. An increasing transform leaves the area under the ROC curve alone.


@pytest.fixture(scope="module")
def scores():
    random = torch.Generator().manual_seed(0)
    target = torch.arange(400) % 5
    told = 12 * torch.nn.functional.one_hot(target, 5)
    return told + 9 * torch.randn(400, 5, generator=random, dtype=torch.float64), target


@pytest.mark.parametrize("name", transforms.TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_decides_whether_the_area_stays(scores, name, dtype):
    tried = transforms.try_transform(transforms.TRANSFORMS[name], scores[0].to(dtype), scores[1])
    if name not in transforms.SATURATES:  # those depend on how large the scores are
        assert tried.increasing != (name in transforms.TEXTBOOK)
    if tried.increasing:
        assert abs(tried.area) <= 1e-12
        assert tried.loss != 0


def test_squares_and_tangents_change_the_area(scores):
    for name in transforms.TEXTBOOK:
        assert abs(transforms.try_transform(transforms.TRANSFORMS[name], *scores).area) > 0.01


def test_ties_are_no_increase():
    before = torch.tensor([[9.5], [10.5]])
    assert not transforms.strictly_increasing(before, torch.tanh(before))
    assert transforms.strictly_increasing(before, before.double().tanh())
    assert transforms.strictly_increasing(torch.tensor([[1.0], [1.0]]), torch.zeros(2, 1))


# 4. Hinge ignores points beyond the margin, not those near the boundary.


@pytest.mark.parametrize("points", margins.SETS)
def test_hinge_ignores_what_is_beyond_its_margin_and_cross_entropy_nothing(points):
    made = margins.SETS[points](0)
    beyond, inside, random = margins.KINDS
    assert margins.moved("hinge", made, beyond).change < 1e-4
    assert margins.moved("cross-entropy", made, beyond).change > 0.1
    found = {kind: margins.moved("hinge", made, kind) for kind in (inside, random)}
    assert found[inside].share == found[random].share
    assert found[inside].degrees > found[random].degrees + 1


# 5. Neither cross-entropy nor hinge resists far-out poison, a bounded loss does.


@pytest.mark.parametrize("loss", [*poison.UNBOUNDED, *poison.BOUNDED])
def test_far_out_poison_breaks_unbounded_losses_alone(loss):
    clean, far = (poison.under_poison(loss, radius, 0) for radius in (0.0, 64.0))
    assert clean > 95
    assert (far < 10) if loss in poison.UNBOUNDED else (far > clean - 2)


@pytest.mark.parametrize("loss", poison.UNBOUNDED)
@pytest.mark.parametrize("radius", [4.0, 64.0])
def test_a_convex_fit_has_no_better_neighbour(loss, radius):
    features, labels = poison.poisoned(*poison.clouds(0), radius, poison.SHARE)
    padded = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    found = poison.fitted(loss, features, labels)
    least = poison.risk(loss, found, padded, labels)
    random = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(50):
            step = size * torch.randn(2, 3, dtype=torch.float64, generator=random)
            assert poison.risk(loss, found + step, padded, labels) > least - 1e-7


# 6. At costs of 100 to 1 the threshold is 1/101.


@pytest.mark.parametrize("name", imbalance.LOSSES)
def test_weights_move_the_threshold_and_margins_do_not(name):
    expected = 0.5 if "margin" in name else 1 / 101
    spacing = 0.0101 if "margin" in name else 1.1e-4  # of the grid of chances there
    assert imbalance.threshold(imbalance.LOSSES[name]) == pytest.approx(expected, abs=spacing)


def test_the_tail_prior_is_that_of_the_data_as_built():
    cfg = composed("data=digits", *imbalance.TAIL)
    counts = build.build_data(cfg).class_counts
    prior = imbalance.tail_prior(10)
    torch.testing.assert_close(
        prior, torch.tensor(counts).double() / sum(counts), atol=0.01, rtol=0.0
    )


# 7. L1 does not choose between exact copies; the larger of two wins.


def test_the_algorithm_chooses_between_copies_and_scale_decides():
    zero = torch.zeros(4, dtype=torch.float64)
    copies = redundancy.problem(0, 1.0)
    even = redundancy.by_proximal_steps(*copies, zero)
    uneven = redundancy.by_proximal_steps(*copies, zero + torch.tensor([0.5, 0, 0, 0]))
    one = redundancy.by_coordinates(*copies)
    for found in (even, uneven, one):  # as good as each other
        value = redundancy.objective(found, *copies)
        torch.testing.assert_close(value, redundancy.objective(even, *copies))
    assert float(even[0] - even[1]) == pytest.approx(0, abs=1e-12)
    assert float(uneven[0] - uneven[1]) == pytest.approx(0.5, abs=1e-9)
    assert float(one[:2].abs().min()) == pytest.approx(0, abs=1e-9)
    apart = redundancy.by_proximal_steps(*redundancy.problem(0, 1.25), zero)
    assert apart[0] == 0
    assert apart[3] == 0
    assert 1.25 * float(apart[1]) == pytest.approx(1 - 0.1 / 1.25, abs=0.1)  # 1, less the shrinkage
    assert (redundancy.by_adam(*redundancy.problem(0, 1.25), zero + 0.1) != 0).all()


# 8. In logits either loss moves by at most one step; probabilities are what breaks.


@pytest.mark.parametrize("seed", range(20))
def test_eight_bit_logits_move_either_loss_by_at_most_a_step(seed):
    random = torch.Generator().manual_seed(seed)
    spread = 10 ** (seed / 5 - 2)
    s = spread * torch.randn(500, 12, generator=random, dtype=torch.float64)
    found = eight_bits.logit_bounds(s, torch.arange(500) % 12)
    assert found["cross-entropy"] <= 1 + 1e-9
    assert found["hinge"] <= 1 + 1e-9
    assert found["flips"] == 0


def test_a_probability_below_half_a_level_is_lost():
    gap = math.log(510 - 1)  # the label's probability is 1/510
    just = torch.tensor([[gap - 0.01, 0.0], [gap + 0.01, 0.0]], dtype=torch.float64)
    assert eight_bits.broken(just, torch.tensor([1, 1])) == 0.5


def test_the_excess_of_an_ece_is_zero_on_average_for_a_calibrated_model_alone():
    random = torch.Generator().manual_seed(0)
    excess = []
    for _ in range(20):
        logits = 2 * torch.randn(300, 4, generator=random)
        target = torch.multinomial(logits.softmax(1), 1, generator=random).flatten()
        excess.append(excess_of_ece(logits, target))
    assert abs(Interval.of(excess).mean) < 2 * Interval.of(excess).half
    assert excess_of_ece(3 * logits, target) > 5


def test_cross_fitting_finds_the_temperature_and_never_sees_what_it_judges():
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2000, 4, generator=random)
    target = torch.multinomial(logits.softmax(1), 1, generator=random).flatten()
    scaled, fitted = cross_fitted(3 * logits, target)
    assert fitted == pytest.approx(3, rel=0.15)
    ratio = (3 * logits).double() / scaled
    assert len(ratio.mean(1).mul(1e6).round().unique()) == 2  # one for each half
    changed = target.clone()
    half = ratio[:, 0] == ratio[0, 0]
    changed[half] = (changed[half] + 1) % 4
    again, _ = cross_fitted(3 * logits, changed)
    torch.testing.assert_close(again[half], scaled[half])


# What studies leave, and what students say.


def test_a_study_leaves_a_figure_a_summary_and_its_place_on_the_page(tmp_path):
    study = STUDIES["margins"]
    result = study.examine(range(4), Runs(tmp_path, ()))
    hostile = Result(result.findings, [["<b>x</b>"], ["1"]], result.draw, "a < b", "<script>")
    for one in (result, hostile):
        write_study(tmp_path / "margins", Checked(study, one), {"seeds": 2})
    assert (tmp_path / "margins" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "margins" / "figure.svg").read_text()
    summary = json.loads((tmp_path / "margins" / "summary.json").read_text())
    assert summary["verdict"] == verdict(result.findings)
    assert summary["verdict"].startswith("holds only if")
    write_page(tmp_path / "claims.html", {4: Checked(study, hostile)}, {"told": "", "command": "x"})
    page = (tmp_path / "claims.html").read_text()
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "<script>" not in page.replace("<script>//", "")
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")


def test_ten_studies_have_names_and_runs_of_their_own():
    assert len(STUDIES) == 10
    for study in STUDIES.values():
        runs = study.runs(3)
        assert len(set(runs)) == len(runs)
        assert all(run.seed == 3 for run in runs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    """Students of digits, trained where they are asked for."""
    runs = Runs(tmp_path_factory.mktemp("claims"), ("data=digits", f"paths.cache={cache}"))

    def answer(run):
        if not runs.done(run):
            train_one(runs, run)
        return runs

    return answer


def numbers(trained, *overrides, seed=0):
    run = Run(overrides, seed)
    return trained(run).numbers(run)


@pytest.mark.slow
def test_2_a_hinge_student_is_unreadable_as_it_is_and_one_number_repairs_it(trained):
    kl, hinge = numbers(trained, "objective=kd"), numbers(trained, "objective=pairwise_soft_hinge")
    assert hinge["ece"] > kl["ece"] + 0.3
    assert hinge["ece_after_scaling"] < kl["ece_after_scaling"] + 0.05


@pytest.mark.slow
def test_5_wrong_labels_ruin_a_hinge_and_not_a_student_of_a_clean_teacher(trained):
    wrong = ("condition=symmetric_noise", "condition.rate=0.4")
    hinge = numbers(trained, "objective=crammer_singer", "teacher=none", *wrong)
    taught = poison.student(poison.TAUGHT, 0.4, 0)
    trained(taught.teacher)
    taught = trained(taught).numbers(taught)
    assert taught["top1"] > 0.93
    assert hinge["top1"] < taught["top1"] - 0.2


@pytest.mark.slow
def test_6_weights_find_rare_classes_that_cross_entropy_forgets(trained):
    recall = {}
    for name in ("cross-entropy", "effective-number weights"):
        run = imbalance.student(name, 0)
        logits, target = trained(run).answers(run)
        rare = target >= 10 - imbalance.RARE
        recall[name] = float((logits.argmax(1) == target)[rare].double().mean())
    assert recall["effective-number weights"] > recall["cross-entropy"] + 0.08


@pytest.mark.slow
def test_7_half_the_weights_of_a_student_are_not_needed(trained):
    run = redundancy.student(0.25, 0)
    counted = redundancy.zeros(trained(run).student(run))
    assert counted["zeros"] > 0.5 * counted["weights"]
    assert trained(run).numbers(run)["top1"] > numbers(trained, *ALONE)["top1"] - 0.02


@pytest.mark.slow
def test_9_cross_entropy_is_as_good_as_a_smooth_top_3_loss(trained):
    own = numbers(trained, *STUDIES["topk"].runs(0)[2].overrides)
    entropy_ = numbers(trained, *ALONE)
    assert entropy_["top3"] > own["top3"] - 0.01


@pytest.mark.slow
def test_10_a_teacher_lowers_nll(trained):
    gain = [numbers(trained, *ALONE, seed=k)["nll"]
            - numbers(trained, "objective=kd", seed=k)["nll"] for k in TWO]  # fmt: skip
    assert statistics.mean(gain) > 0.003


@pytest.mark.slow
def test_a_run_is_kept_and_found_again_by_what_it_is(trained):
    run = Run(ALONE, 0)
    runs = trained(run)
    assert runs.done(run)
    assert not runs.done(Run(ALONE, 7))
    assert not Runs(runs.folder, ("data=digits", "trainer.max_epochs=1")).done(run)
    assert (runs.place(run) / "student" / "model.safetensors").exists()
