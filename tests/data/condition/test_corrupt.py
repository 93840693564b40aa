"""Conditions: which labels are wrong, which images are kept, and what stays as it is."""

import math

import pytest
import torch
from scipy.stats import chisquare

from distill.data import DataModule
from distill.data.condition.corrupt import (
    CUT,
    OWN,
    Condition,
    kept,
    noisy_labels,
    read_transition,
    tail_sizes,
    transition_matrix,
)
from distill.data.sources import digits
from distill.data.sources.splits import Source
from distill.data.views.views import CLEAN
from tests.data.conftest import refusal
from tests.data.test_module import resident, source, streamed

N, K = 40_000, 8
INDEX = torch.arange(N)
LABELS = INDEX % K
SKEWED = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.125, 0.375, 0.5]]).double()


def same(first, second):
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("images", "labels", "index")
    )


@pytest.mark.parametrize("rate", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_as_many_labels_are_wrong_as_the_rate_says(kind, rate):
    given = noisy_labels(LABELS, INDEX, transition_matrix(kind, rate, K), seed=3)
    wrong = given != LABELS
    deviation = math.sqrt(N * rate * (1 - rate))
    assert abs(int(wrong.sum()) - N * rate) < 4 * deviation
    steps = (given - LABELS)[wrong] % K
    if kind == "pair":
        assert (steps == 1).all()
    else:
        counts = torch.bincount(steps, minlength=K)[1:]
        assert chisquare(counts.tolist()).pvalue > 1e-4


def test_labels_are_drawn_by_the_rows_of_a_matrix():
    labels = INDEX % 3
    given = noisy_labels(labels, INDEX, SKEWED, seed=1)
    for k in range(3):
        counts = torch.bincount(given[labels == k], minlength=3)
        expected = SKEWED[k] * int((labels == k).sum())
        assert (counts[expected == 0] == 0).all()
        there = expected > 0
        if there.sum() > 1:
            assert chisquare(counts[there].tolist(), expected[there].tolist()).pvalue > 1e-4


def test_a_matrix_of_many_classes_is_looked_up_in_the_right_row():
    classes = 1000
    given = noisy_labels(INDEX % classes, INDEX, transition_matrix("pair", 0.5, classes), seed=0)
    assert set(((given - INDEX) % classes).tolist()) == {0, 1}


def test_no_noise_changes_nothing_and_more_noise_only_adds_to_it():
    assert torch.equal(noisy_labels(LABELS, INDEX, torch.eye(K).double(), seed=5), LABELS)
    before = torch.zeros(N, dtype=torch.bool)
    for rate in (0.1, 0.3, 0.6):
        wrong = noisy_labels(LABELS, INDEX, transition_matrix("pair", rate, K), seed=5) != LABELS
        assert not (before & ~wrong).any()
        before = wrong


def test_noise_is_a_function_of_seed_and_index_alone():
    matrix = transition_matrix("symmetric", 0.5, K)
    given = noisy_labels(LABELS, INDEX, matrix, seed=2)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:999]
    assert torch.equal(noisy_labels(LABELS[order], INDEX[order], matrix, seed=2), given[order])
    for seed, where in ((3, CUT), (2, OWN)):
        assert not torch.equal(noisy_labels(LABELS, INDEX, matrix, seed, where), given)


def test_a_confusion_matrix_of_counts_is_read_as_shares(tmp_path):
    path = tmp_path / "confusion.csv"
    path.write_text("true,b,a\na,1,3\nb,5,0\n")
    assert read_transition(str(path), ["a", "b"]).tolist() == [[0.75, 0.25], [0.0, 1.0]]
    path.write_text("1,2,3\n1,1,1\n")
    refusal(lambda: read_transition(str(path), ["a", "b"]), path, "3 columns for 2 classes")
    for row in ("0,0", "-1,2"):
        path.write_text(f"1,0\n{row}\n")
        refusal(lambda: read_transition(str(path), ["a", "b"]), path, "the row of b")


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("imbalance", [1, 10, 100])
def test_an_exponential_tail_follows_its_formula(classes, imbalance):
    sizes = tail_sizes(torch.full((classes,), 500), "exponential", imbalance)
    for k in (0, classes // 2, classes - 1):
        exact = 500 * imbalance ** (-k / (classes - 1))
        assert exact - 1 < int(sizes[k]) <= exact + 1e-6
    assert int(sizes[0]) == 500
    assert int(sizes[-1]) == 500 // imbalance
    assert (sizes.diff() <= 0).all()


@pytest.mark.parametrize("tail", ["exponential", "step"])
def test_a_class_without_images_does_not_decide_the_tail_of_the_others(tail):
    full = tail_sizes(torch.tensor([90, 90, 90, 90]), tail, 9.0)
    assert tail_sizes(torch.tensor([90, 0, 90, 90]), tail, 9.0).equal(full)
    condition = Condition(tail=tail, imbalance=9.0)
    sizes = condition.sizes(torch.tensor([90, 0, 90, 90]), ["a", "b", "c", "d"], least=1)
    assert sizes.tolist() == [full[0], 0, *full[2:]]


@pytest.mark.parametrize("tail", ["exponential", "step"])
def test_a_tail_has_the_largest_head_that_there_are_images_for(tail):
    counts = torch.tensor([90, 70, 30, 8, 40])
    sizes = tail_sizes(counts, tail, 10)

    def profile(head):
        shares = [10 ** (-k / 4) if tail == "exponential" else (1, 1, 1, 0.1, 0.1)[k]
                  for k in range(5)]  # fmt: skip
        return [math.floor(head * share + 1e-6) for share in shares]

    fitting = [n for n in range(1, 100) if all(map(int.__le__, profile(n), counts.tolist()))]
    assert sizes.tolist() == profile(max(fitting))


def test_as_many_are_kept_as_asked_and_a_smaller_choice_is_part_of_a_larger():
    few, more = (kept(LABELS, INDEX, torch.full((K,), n), seed=1) for n in (5, 50))
    assert torch.bincount(LABELS[few]).tolist() == [5] * K
    assert set(few.tolist()) < set(more.tolist())
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    again = kept(LABELS[order], INDEX[order], torch.full((K,), 5), seed=1)
    assert set(INDEX[order][again].tolist()) == set(few.tolist())
    assert set(kept(LABELS, INDEX, torch.full((K,), 5), seed=2).tolist()) != set(few.tolist())
    assert abs(more.double().mean() - N / 2) < 4 * N / math.sqrt(12 * len(more))


def test_the_test_split_is_untouched_and_validation_only_if_it_is_to_stay_clean():
    plain = DataModule(digits(), batch_size=8)
    options = {"noise": "symmetric", "rate": 0.5, "tail": "step", "imbalance": 4, "drop": [3]}
    hard = DataModule(digits(), batch_size=8, condition=options)
    clean = DataModule(digits(), batch_size=8, condition=options | {"clean_validation": True})
    assert same(hard.test, plain.test)
    assert same(clean.test, plain.test)
    assert same(clean.val, plain.val)
    assert same(clean.train, hard.train)
    assert len(hard.val) < len(plain.val)
    assert len({plain.fingerprint, hard.fingerprint, clean.fingerprint}) == 3
    change = hard.corrupted["train"]
    places = torch.searchsorted(plain.train.index, hard.train.index)
    assert torch.equal(plain.train.labels[places], change.true)
    assert torch.equal(plain.train.images[places], hard.train.images)
    assert int(torch.bincount(change.true, minlength=10)[3]) == 0
    assert hard.class_counts == torch.bincount(hard.train.labels, minlength=10).tolist()
    assert hard.class_counts != hard.image_counts == change.counts()["kept"]
    assert change.counts()["before"] == plain.class_counts
    assert 0 < change.counts()["wrong_labels"] == int((hard.train.labels != change.true).sum())


def test_no_condition_leaves_everything_as_it_is():
    options = {"noise": None, "tail": None, "drop": [], "shots": None, "imbalance": 100}
    plain, off = (DataModule(digits(), batch_size=8, condition=c) for c in (None, options))
    assert off.condition is None
    assert not off.corrupted
    assert off.fingerprint == plain.fingerprint
    assert off.notes == plain.notes


def test_an_image_keeps_its_wrong_label_in_whichever_split_it_lies():
    options = {"noise": "symmetric", "rate": 0.5}
    given = []
    for seed in (0, 1):
        data = DataModule(digits(), batch_size=8, split_seed=seed, condition=options)
        indices = torch.cat([data.train.index, data.val.index])
        labels = torch.cat([data.train.labels, data.val.labels])
        given.append(dict(zip(indices.tolist(), labels.tolist(), strict=True)))
    assert given[0] == given[1]


def test_a_validation_split_of_its_own_has_draws_of_its_own():
    both = source(resident(300), resident(300), resident(60, offset=900))
    data = DataModule(both, batch_size=4, condition={"noise": "symmetric", "rate": 0.5})
    assert torch.equal(data.train.index, data.val.index)
    assert not torch.equal(data.train.labels, data.val.labels)


def test_streamed_images_are_chosen_and_relabelled_alike():
    options = {"noise": "pair", "rate": 0.25, "shots": 12}
    made = Source("painted", ["even", "odd"], 3, streamed(80))
    data = DataModule(made, batch_size=4, image_size=8, condition=options)
    assert data.corrupted["train"].counts()["kept"] == [12, 12]
    shown = data.in_order(data.train, CLEAN, [torch.arange(24)], torch.device("cpu"))
    batch = next(shown)
    assert (batch.view[:, 0, 0, 0] * 255).round().long().tolist() == batch.index.tolist()
    assert torch.equal(data.corrupted["train"].true, data.train.index % 2)


def test_few_shots_are_as_many_of_each_class():
    data = DataModule(digits(), batch_size=8, condition={"shots": 6, "drop": ["1", 2]})
    assert data.class_counts == [6, 0, 0, *[6] * 7]
    assert data.train.index.tolist() == sorted(data.train.index.tolist())
    assert int(torch.bincount(data.val.labels).max()) <= 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": "symmetric", "rate": 1.0}, "condition.rate must be a share from 0 to below 1"),
        ({"noise": "pair", "rate": -0.1}, "got -0.1"),
        ({"noise": "pair"}, "got None"),
        ({"noise": "pair", "rate": math.nan}, "got nan"),
        ({"rate": 0.2}, "goes with condition.noise"),
        ({"noise": "t.csv", "rate": 0.2}, "goes with condition.noise"),
        ({"tail": "long"}, "condition.tail must be exponential or step"),
        ({"tail": "step", "imbalance": 0.5}, "condition.imbalance must be at least 1, got 0.5"),
        ({"tail": "step", "imbalance": 1000}, "imbalance=1000 leaves no training image of 5"),
        ({"shots": 0}, "condition.shots must be how many images"),
        ({"shots": 500}, "condition.shots=500: there are"),
        ({"shots": 5, "tail": "step"}, "both say how many"),
        ({"drop": "3"}, "a list of classes"),
        ({"drop": ["ten"]}, "there is no class ten; there are 0, 1"),
        ({"drop": list(range(9))}, "fewer than two classes"),
        ({"noise": "symmetric", "rate": 0.9, "shots": 1}, "with the label"),
        ({"clean_validation": "yes"}, "true or false"),
        ({"shots": 5, "seed": "now"}, "condition.seed must be a whole number, got 'now'"),
        ({"rates": 1}, "no option rates; there are noise, rate"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, words):
    refusal(lambda: DataModule(digits(), batch_size=8, condition=options), words, error=ValueError)


def test_a_condition_that_asks_for_nothing_is_none():
    assert not Condition().active
    assert Condition(noise="pair", rate=0.0).active  # a sweep over rates begins with it
