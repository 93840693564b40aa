"""What every metric promises: the same values for any order, any split, any number of processes."""

import os
import socket
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import multiprocessing

from distill.metrics import (
    AUROC,
    AdaptiveCalibrationError,
    BalancedAccuracy,
    BrierScore,
    CalibrationError,
    ClasswiseCalibrationError,
    DecomposedBrierScore,
    MacroF1,
    MeanReciprocalRank,
    NegativeLogLikelihood,
    SmoothCalibrationError,
    TopKAccuracy,
    negative_log_likelihood,
    topk_accuracy,
)
from tests.metrics.test_calibration import predictions, sample


def every_metric(classes, bins=15):
    """All metrics of probabilities or of what a softmax makes them from, by name."""
    binned = {
        f"error {norm}": CalibrationError(classes, bins, norm) for norm in ("l1", "l2", "max")
    }
    return binned | {
        "classwise": ClasswiseCalibrationError(classes, bins),
        "adaptive": AdaptiveCalibrationError(classes, bins, cells=300),
        "smooth": SmoothCalibrationError(classes, cells=300),
        "brier": BrierScore(classes),
        "parts": DecomposedBrierScore(classes, bins),
        "nll": NegativeLogLikelihood(classes),
        "mrr": MeanReciprocalRank(),
        "balanced accuracy": BalancedAccuracy(classes),
        "macro f1": MacroF1(classes),
        "top1": TopKAccuracy(1),
        "top2": TopKAccuracy(2),
        "auroc": AUROC(classes, cells=64),
    }


def everything(metric):
    """All that a metric can tell, of all processes, as one float64 vector."""
    value = metric.compute()
    told = [*value] if isinstance(value, tuple) else [value]
    if hasattr(metric, "reliability"):
        with metric.sync_context():
            diagram = metric.reliability()
        told += [diagram.count, diagram.correct, diagram.confidence]
    return torch.cat([part.flatten() for part in told])


def assert_same(value, expected, name):
    same = torch.allclose(value, expected, rtol=0, atol=1e-12, equal_nan=True)
    assert same, f"{name}: {value} is not {expected}"


@settings(max_examples=25, deadline=None)
@given(data=predictions(), bins=st.integers(1, 40), random=st.randoms(use_true_random=False))
def test_any_order_and_split_gives_the_same(data, bins, random):
    probs, target = data
    order = torch.tensor(random.sample(range(len(probs)), len(probs)))
    cuts = sorted(random.sample(range(1, len(probs) + 1), random.randint(0, len(probs) - 1)))
    for name, whole in every_metric(probs.shape[1], bins).items():
        whole.update(probs, target)
        parts = every_metric(probs.shape[1], bins)[name]
        for part in order.tensor_split(cuts):
            if len(part):
                parts.update(probs[part], target[part])
        assert_same(everything(parts), everything(whole), name)


@pytest.mark.parametrize("classes", [2, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_splits_of_lower_precision_agree(classes, dtype):
    logits, target = sample(900, classes, sharpness=16.0)
    probs = logits.to(dtype).softmax(1)
    assert int((probs == 1).sum()) > 0
    for name, whole in every_metric(classes).items():
        whole.update(probs, target)
        parts = every_metric(classes)[name]
        for part in torch.randperm(900).split([7, 293, 600]):
            parts.update(probs[part], target[part])
        assert_same(everything(parts), everything(whole), name)


def test_blocks_of_rows_do_not_show(monkeypatch):
    logits, target = sample(257, 6)
    before = every_metric(6)
    for metric in before.values():
        metric.update(logits.softmax(1), target)
    monkeypatch.setattr("distill.metrics._shared.BLOCK_ELEMENTS", 13)
    for name, metric in every_metric(6).items():
        metric.update(logits.softmax(1), target)
        assert_same(everything(metric), everything(before[name]), name)


def test_a_collection_shares_only_what_is_the_same():
    # Not above: a spawned process imports this file, and must import distill before torchmetrics.
    from torchmetrics import MetricCollection

    # The first batch is all right, certain and alike for every metric: states look the same.
    batches = [(torch.eye(4), torch.arange(4)), (sample(50, 4)[0].softmax(1), sample(50, 4)[1])]
    together = MetricCollection(every_metric(4))
    for batch in batches:
        together.update(*batch)
    values = together.compute()
    for name, alone in every_metric(4).items():
        for batch in batches:
            alone.update(*batch)
        expected = alone.compute()
        if not isinstance(expected, tuple):
            expected, values[name] = (expected,), (values[name],)
        assert_same(torch.stack(list(values[name])), torch.stack(list(expected)), name)
    groups = [sorted(group) for group in together.compute_groups.values()]
    assert ["error l1", "error l2", "error max"] in groups


@pytest.mark.parametrize("classes", [2, 12])
def test_nll_and_top_k_are_sklearn_s(classes):
    logits, target = sample(400, classes)
    labels = list(range(classes))
    expected = log_loss(target.numpy(), logits.softmax(1).numpy(), labels=labels)
    assert float(negative_log_likelihood(logits, target)) == pytest.approx(expected, abs=1e-12)
    for k in range(1, classes if classes > 2 else 1):
        expected = top_k_accuracy_score(target.numpy(), logits.numpy(), k=k, labels=labels)
        assert float(topk_accuracy(logits, target, k)) == pytest.approx(expected, abs=1e-12)


def on_one_rank(rank, port, probs, target, expected):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mine = slice(0, 300) if rank == 0 else slice(300, None)
    for name, metric in every_metric(4).items():
        metric.update(probs[mine], target[mine])
        assert_same(everything(metric), expected[name], name)
        if hasattr(metric, "reliability"):
            assert int(metric.reliability().count.sum()) % len(target[mine]) == 0
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_tell_what_one_does():
    logits, target = sample(1000, 4)
    probs, expected = logits.softmax(1), {}
    for name, metric in every_metric(4).items():
        metric.update(probs, target)
        expected[name] = everything(metric)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(on_one_rank, (port, probs, target, expected), nprocs=2)


def test_nothing_added_is_nan_in_every_value():
    for name, metric in every_metric(3).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            value = metric.compute()
        values = value if isinstance(value, tuple) else (value,)
        assert all(bool(part.isnan()) for part in values), name
