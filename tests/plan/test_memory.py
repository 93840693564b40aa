"""Bytes of a training step, against sums by hand."""

import pytest
import torch
from torch import nn

from distill.plan.memory import (
    Memory,
    gradient_bytes,
    optimizer_bytes,
    saved_bytes,
    tensors_in,
    weight_bytes,
)

FLOAT = 4  # bytes


def small(bias=False):
    return nn.Sequential(nn.Linear(4, 3, bias), nn.ReLU(), nn.Linear(3, 2, bias))


@pytest.mark.parametrize("images", [2, 7])
def test_a_forward_pass_keeps_the_inputs_of_its_layers(images):
    model, shown = small(), torch.randn(images, 4)
    kept, _ = saved_bytes(lambda: model(shown), model.parameters())
    # the images for the first weight; the ReLU's output, for itself and for the second weight
    assert kept == FLOAT * images * (4 + 3)


def test_a_loss_keeps_its_probabilities_and_labels():
    shown, labels = torch.randn(5, 3, requires_grad=True), torch.arange(5) % 3
    kept, loss = saved_bytes(lambda: nn.functional.cross_entropy(shown, labels), [shown])
    # log-probabilities [5, 3], labels [5] of 8 bytes, and the sum of their weights
    assert kept == FLOAT * 5 * 3 + 8 * 5 + FLOAT
    loss.backward()


def test_weights_are_counted_when_nothing_is_left_out():
    model, shown = small(), torch.randn(2, 4)
    with_weights, _ = saved_bytes(lambda: model(shown))
    assert with_weights == FLOAT * (2 * (4 + 3) + 3 * 2)  # only the second layer's is needed


def test_what_is_not_learned_keeps_nothing():
    model = small().requires_grad_(False)
    assert saved_bytes(lambda: model(torch.randn(2, 4)))[0] == 0


def test_weights_gradients_and_the_optimisers_state():
    model = nn.Sequential(small(bias=True), nn.BatchNorm1d(2))
    model[0][0].requires_grad_(False)
    learned = (3 * 2 + 2) + 2 + 2
    frozen, statistics = 4 * 3 + 3, FLOAT * (2 + 2) + 8  # of batches seen, one int64
    assert weight_bytes(model) == FLOAT * (learned + frozen) + statistics
    assert gradient_bytes(model) == FLOAT * learned
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    assert optimizer_bytes(optimizer) == 0
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    assert optimizer_bytes(optimizer) == FLOAT * (2 * learned + 4)  # and a step for each tensor
    assert weight_bytes(None) == 0


def test_a_weight_that_is_used_twice_is_counted_once():
    layer = nn.Linear(3, 3, bias=False)
    other = nn.Linear(3, 3, bias=False)
    other.weight = layer.weight
    assert weight_bytes(nn.Sequential(layer, other)) == FLOAT * 9


def test_tensors_are_found_in_a_nested_state():
    one, two = torch.zeros(1), torch.zeros(2)
    assert list(tensors_in({"a": one, "b": [3, {"c": two}]})) == [one, two]


def test_all_together():
    assert Memory(1, 2, 3, 4, 5).total == 15
