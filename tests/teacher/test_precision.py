"""Teachers of fewer bits, with a batch size or a device of their own."""

import copy

import pytest
import timm
import torch
from torch import nn

from distill.teacher.ensemble import Ensemble
from distill.teacher.precision import checked_device, computes_in, reduce_precision
from distill.teacher.teacher import Teacher
from distill.utils.memory import held_bytes

VIEWS = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    return tiny(width=16)


def rounded(weight):
    """A weight in eight bits, symmetric for each output channel, by a loop."""
    channels = []
    for channel in weight.double():
        step = channel.abs().max() / 127
        channels.append((channel / step).round() * step)
    return torch.stack(channels).float()


@pytest.mark.parametrize("precision", HALVES)
def test_weights_of_half_the_bits_answer_in_single_precision(model, precision):
    expected = copy.deepcopy(model).eval().to(HALVES[precision])(VIEWS.to(HALVES[precision]))
    size = held_bytes(model)
    teacher = Teacher(model).in_precision(precision)
    answers = teacher(VIEWS)
    assert answers.dtype == torch.float32
    assert torch.equal(answers, expected.float())
    # a batch norm counts its batches in eight bytes
    assert held_bytes(teacher.model) == pytest.approx(size / 2, abs=8)


def test_weights_in_eight_bits_are_those_of_each_channel_rounded(model):
    reference = copy.deepcopy(model).eval()
    reference.body[0].weight.data = rounded(reference.body[0].weight.data)
    reference.head.weight.data = rounded(reference.head.weight.data)
    whole, teacher = Teacher(copy.deepcopy(model)), Teacher(model).in_precision("int8")
    answers = teacher(VIEWS)
    torch.testing.assert_close(answers, reference(VIEWS))
    assert not torch.equal(answers, whole(VIEWS))
    assert held_bytes(teacher.model) < held_bytes(whole.model)
    assert [p.dtype for p in teacher.model.head.parameters()] == [
        torch.float32, torch.int8, torch.float32
    ]  # fmt: skip
    assert isinstance(teacher.model.head, nn.Linear)


def test_a_channel_of_zeros_stays_one(model):
    model.head.weight.data[2] = 0
    reduce_precision(model, "int8")
    assert not model.head.weight[2].any()


def test_an_answer_in_eight_bits_depends_on_no_other_view(model):
    teacher = Teacher(model).in_precision("int8")
    beside = torch.cat([VIEWS[:1], 50 * VIEWS[1:]])
    torch.testing.assert_close(teacher(beside)[0], teacher(VIEWS)[0])


def test_single_precision_leaves_the_autocast_of_whoever_asks(model):
    own, other = Teacher(copy.deepcopy(model)), Teacher(model).in_precision("fp32")
    expected = own(VIEWS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(other(VIEWS), expected)
        assert own(VIEWS).dtype == torch.bfloat16


def test_images_are_normalised_before_they_lose_bits(model):
    class Shift(nn.Module):
        def forward(self, view):
            assert view.dtype == torch.float32
            return view - 0.5

    teacher = Teacher(copy.deepcopy(model), Shift()).in_precision("bf16")
    expected = Teacher(model).in_precision("bf16")(VIEWS - 0.5)
    assert torch.equal(teacher(VIEWS), expected)
    assert torch.equal(teacher(VIEWS.bfloat16().float()), teacher(VIEWS.bfloat16()))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_members_of_an_ensemble_are_each_reduced(tiny, precision):
    torch.manual_seed(1)
    members = [tiny(width=8), tiny(width=16)]
    apart = [Teacher(copy.deepcopy(m)).in_precision(precision)(VIEWS) for m in members]
    teacher = Teacher(Ensemble([nn.Sequential(nn.Identity(), m) for m in members], "logit"))
    torch.testing.assert_close(teacher.in_precision(precision)(VIEWS), sum(apart) / 2)


def test_any_other_precision_is_refused_in_one_line(model):
    with pytest.raises(ValueError, match=r"precision must be one of fp32, .*int8, got 'int4'"):
        Teacher(model).in_precision("int4")


@pytest.mark.parametrize("precision", [None, "bf16", "int8"])
def test_features_come_in_single_precision_and_in_parts(precision):
    torch.manual_seed(0)
    model = timm.create_model(
        "resnet10t", layers=[1, 1, 1, 1], channels=[4, 8, 16, 32], num_classes=3, in_chans=1
    ).eval()  # fmt: skip
    views = torch.rand(5, 1, 32, 32)
    whole = Teacher(copy.deepcopy(model)).in_precision(precision) if precision else Teacher(model)
    parts = Teacher(model, batch_size=2)
    if precision:
        parts.in_precision(precision)
    expected, features = whole.with_features(views, [1, 3])
    logits, ours = parts.with_features(views, [1, 3])
    close = {"rtol": 1e-2, "atol": 1e-2} if precision == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits, expected, **close)
    pairs = zip([*features.maps, *features[1:]], [*ours.maps, *ours[1:]], strict=True)
    for one, other in pairs:
        assert one.dtype == torch.float32
        torch.testing.assert_close(other, one, **close)


def test_a_teacher_stays_where_it_was_placed(model):
    teacher = Teacher(model).placed_on(torch.device("cpu"))
    assert teacher.to(torch.device("meta")).model.head.weight.device.type == "cpu"
    assert teacher(VIEWS).device == VIEWS.device
    assert computes_in(teacher.model) == torch.float32


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cpu:x", "xpu"])
def test_a_device_that_is_not_there_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=f"teacher.device={name} is not on this machine: .* cpu"):
        checked_device(name)
    assert checked_device("cpu") == torch.device("cpu")
