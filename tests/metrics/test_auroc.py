"""The area under the ROC curve against counting pairs and sklearn; its grid against its bound."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from distill.metrics import AUROC, auroc, log_odds
from distill.metrics.ranking import _score_cell
from tests.metrics.test_calibration import sample
from tests.metrics.test_ranking import scored

EXACT = {"abs": 1e-12, "rel": 0, "nan_ok": True}


def counted_area(scores, positive):
    """Share of (positive, negative) pairs in order, from every pair; None where there is none."""
    inside = [s for s, p in zip(scores, positive, strict=True) if p]
    outside = [s for s, p in zip(scores, positive, strict=True) if not p]
    wins = sum((a > b) + (a == b) / 2 for a in inside for b in outside)
    return wins / (len(inside) * len(outside)) if inside and outside else None


def counted_auroc(scores, target):
    per_class = [
        counted_area(column, [y == k for y in target.tolist()])
        for k, column in enumerate(scores.T.tolist())
    ]
    areas = [area for area in per_class if area is not None]
    return math.fsum(areas) / len(areas) if areas else math.nan


@settings(deadline=None)
@given(data=scored())
def test_auroc_counts_pairs(data):
    value = auroc(*data)
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert float(value) == pytest.approx(counted_auroc(*data), **EXACT)


@settings(deadline=None)
@given(data=scored())
def test_auroc_of_one_question_counts_pairs(data):
    scores, right = data[0][:, 0], (data[1] == 0)
    expected = counted_area(scores.tolist(), right.tolist())
    expected = math.nan if expected is None else expected
    assert float(auroc(scores, right)) == pytest.approx(expected, **EXACT)
    assert float(auroc(scores, right.long())) == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("classes", [2, 3, 40])
@pytest.mark.parametrize("rounded", [False, True])
def test_auroc_is_sklearn_s(classes, rounded):
    scores, target = sample(400, classes)
    scores = scores.round() if rounded else scores
    areas = [
        roc_auc_score((target == k).numpy(), scores[:, k].numpy())
        for k in range(classes)
        if (target == k).any()
    ]
    assert float(auroc(scores, target)) == pytest.approx(sum(areas) / len(areas), abs=1e-12)
    binary = roc_auc_score((target == 0).numpy(), scores[:, 0].numpy())
    assert float(auroc(scores[:, 0], target == 0)) == pytest.approx(binary, abs=1e-12)


def test_auroc_of_what_is_known_in_advance():
    target = torch.arange(6) % 3
    scores = torch.eye(3)[target]
    assert float(auroc(scores, target)) == 1
    assert float(auroc(-scores, target)) == 0
    assert float(auroc(torch.zeros(6, 3), target)) == 0.5
    assert math.isnan(float(auroc(scores, torch.zeros(6, dtype=torch.long))))
    infinite = torch.tensor([math.inf, 0.0, -math.inf])
    assert float(auroc(infinite, torch.tensor([1, 0, 0]))) == 1


def test_classes_without_members_do_not_count():
    target = torch.tensor([0, 0, 1, 1])
    scores = torch.tensor([[2.0, 0, 9], [1, 0, 8], [0, 1, 7], [0, 0, 6]])
    assert float(auroc(scores, target)) == pytest.approx((1 + 0.75) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_auroc_of_lower_precision_is_that_of_the_same_numbers(dtype):
    scores, target = sample(300, 5)
    scores = scores.to(dtype).requires_grad_()
    assert torch.equal(auroc(scores, target), auroc(scores.detach().double(), target))
    assert torch.equal(auroc(scores[:, 1], target == 1), auroc(scores[:, 1].double(), target == 1))
    narrow, wide = AUROC(5), AUROC(5)
    narrow.update(scores, target)
    wide.update(scores.double(), target)
    assert torch.equal(narrow.counts, wide.counts)


def test_scores_are_never_squashed():
    # All of these are 1 after a sigmoid in float32, and their softmax ties too.
    scores = torch.tensor([[40.0, 0.0], [50.0, 0.0], [60.0, 0.0]])
    target = torch.tensor([1, 0, 0])
    assert float(scores.sigmoid()[:, 0].unique().numel()) == 1
    assert float(auroc(scores[:, 0], target == 0)) == 1
    assert float(auroc(log_odds(scores), target)) == 1
    assert float(auroc(scores.softmax(1), target)) < 1


@pytest.mark.parametrize("classes", [2, 7])
def test_log_odds_are_those_of_the_softmax(classes):
    logits, _ = sample(200, classes)
    probs = logits.softmax(1)
    assert torch.allclose(log_odds(logits), torch.logit(probs), rtol=1e-12, atol=1e-12)
    assert torch.allclose(log_odds(logits + 100), log_odds(logits), rtol=0, atol=1e-11)
    assert log_odds(logits.float().requires_grad_()).dtype == torch.float64
    assert not log_odds(logits.requires_grad_()).requires_grad


@settings(deadline=None)
@given(data=scored())
def test_log_odds_are_the_formula(data):
    for row, odds in zip(data[0].tolist(), log_odds(data[0]).tolist(), strict=True):
        for k, value in enumerate(odds):
            others = row[:k] + row[k + 1 :]
            top = max(others)
            expected = row[k] - top - math.log(math.fsum(math.exp(s - top) for s in others))
            assert value == pytest.approx(expected, abs=1e-12, rel=1e-12)


def test_log_odds_do_not_saturate():
    top = torch.tensor([1e4, 1e4 + 1, 1e4 + 2])
    rows = torch.stack([top, torch.zeros(3), torch.full((3,), -1e4)], dim=1)
    odds = log_odds(rows)
    assert odds[:, 0].tolist() == [1e4, 1e4 + 1, 1e4 + 2]
    assert odds[:, 1].tolist() == [-1e4, -1e4 - 1, -1e4 - 2]
    assert odds[:, 2].tolist() == [-2e4, -2e4 - 1, -2e4 - 2]
    masked = torch.tensor([[3.0, -math.inf], [-math.inf, 0.0]])
    assert log_odds(masked).tolist() == [[math.inf, -math.inf], [-math.inf, math.inf]]


@settings(deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=False), min_size=2, max_size=30),
    half=st.integers(1, 3000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_cells_keep_the_order(values, half, dtype):
    values = torch.tensor(values, dtype=torch.float64).to(dtype).sort().values
    cells = _score_cell(values, 2 * half)
    assert bool((cells.diff() >= 0).all())
    assert int(cells.min()) >= 0
    assert int(cells.max()) < 2 * half
    # Equal scores, 0 and −0 among them, are never told apart.
    assert bool((cells.diff()[values.diff() == 0] == 0).all())


def test_cells_are_as_documented():
    edges = [0.0, 1 / 128, 1.0, 1 + 1 / 64, 3.0, 2.0**16 - 1 - 2.0**8]
    expected = [0, 1, 128, 129, 256, 2047]
    assert _score_cell(torch.tensor(edges), 4096).tolist() == [2048 + cell for cell in expected]
    assert _score_cell(-torch.tensor(edges[1:]), 4096).tolist() == [2047 - c for c in expected[1:]]
    far = torch.tensor([2.0**16, 1e30, math.inf, -1e30, -math.inf])
    assert _score_cell(far, 4096).tolist() == [4095, 4095, 4095, 0, 0]


@pytest.mark.parametrize("cells", [2, 32, 500, 4096])
@pytest.mark.parametrize("classes", [2, 5])
def test_grid_stays_within_its_bound(cells, classes):
    for seed in range(5):
        scores, target = sample(600, classes, seed=seed)
        metric = AUROC(classes, cells=cells)
        metric.update(scores, target)
        value, bound = float(metric.compute()), float(metric.error_bound())
        assert abs(value - float(auroc(scores, target))) <= bound + 1e-12
        assert bound <= 0.5
        if cells == 4096:
            assert bound < 5e-3


@settings(deadline=None)
@given(data=scored(), cells=st.integers(1, 60))
def test_grid_stays_within_its_bound_under_ties(data, cells):
    metric = AUROC(data[0].shape[1], cells=2 * cells)
    metric.update(*data)
    exact, value = float(auroc(*data)), float(metric.compute())
    assert math.isnan(exact) == math.isnan(value)
    if not math.isnan(exact):
        assert abs(value - exact) <= float(metric.error_bound()) + 1e-12


def test_bound_is_reached_and_is_half_the_pairs_of_a_cell():
    metric = AUROC(2, cells=2)
    scores = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    metric.update(scores, torch.tensor([0, 1]))
    assert float(auroc(scores, torch.tensor([0, 1]))) == 1
    assert float(metric.compute()) == 0.5
    assert float(metric.error_bound()) == 0.5


@settings(deadline=None)
@given(data=scored())
def test_grid_is_exact_where_cells_hold_single_scores(data):
    scores = data[0].round().clamp(-60, 60)
    metric = AUROC(scores.shape[1])
    metric.update(scores, data[1])
    assert float(metric.compute()) == pytest.approx(float(auroc(scores, data[1])), **EXACT)


def test_state_is_small_at_a_thousand_classes():
    metric = AUROC(1000)
    scores, target = sample(50, 1000)
    metric.update(scores, target)
    assert metric.counts.shape == (2, 1000, 4096)
    assert metric.counts.nbytes < 70e6
    assert metric.counts[0].sum() == 50
    assert abs(float(metric.compute() - auroc(scores, target))) <= float(metric.error_bound())


def test_forward_reset_and_inference_mode():
    first, second = sample(40, 3, seed=1), sample(60, 3, seed=2)
    metric = AUROC(3)
    alone = float(metric(*first))
    metric(*second)
    both = float(metric.compute())
    metric.reset()
    assert not metric.counts.any()
    with torch.inference_mode():
        metric.reset()
        metric.update(*first)
    assert float(metric.compute()) == alone
    metric.update(*second)
    assert float(metric.compute()) == both


def test_mistakes_are_explained():
    scores, target = torch.eye(3), torch.arange(3)
    nan = scores * math.nan
    for call in (auroc, lambda s, y: AUROC(3).update(s, y)):
        with pytest.raises(ValueError, match="scores holds NaN"):
            call(nan, target)
        with pytest.raises(ValueError, match="scores is empty"):
            call(scores[:0], target[:0])
        with pytest.raises(ValueError, match="0 … 2"):
            call(scores, target + 1)
    with pytest.raises(ValueError, match="scores holds NaN"):
        auroc(nan[0], target > 1)
    with pytest.raises(ValueError, match="0 … 1 for 2 classes"):
        auroc(scores[0], target)
    with pytest.raises(ValueError, match=r"target must have shape \[3\]"):
        auroc(scores[0], target[:2])
    with pytest.raises(ValueError, match="scores is empty"):
        auroc(scores[0, :0], target[:0])
    with pytest.raises(ValueError, match="scores must be floating point"):
        auroc(target, target > 1)
    with pytest.raises(ValueError, match=r"shape \[N, K\]"):
        log_odds(scores[0])
    with pytest.raises(ValueError, match="cells must be even"):
        AUROC(3, cells=5)
    with pytest.raises(ValueError, match="num_classes must be"):
        AUROC(1)
    with pytest.raises(ValueError, match="3 classes, but num_classes=4"):
        AUROC(4).update(scores, target)
