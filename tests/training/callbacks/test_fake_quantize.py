"""Rounding in training: the arithmetic, what it leaves alone, and onnxruntime's own int8."""

import copy

import numpy as np
import onnx
import pytest
import pytorch_lightning as pl
import torch
from onnx import numpy_helper
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from distill import Distiller
from distill.training.callbacks.fake_quantize import (
    LAYERS,
    FakeQuantize,
    Layer,
    rounded_input,
    rounded_weight,
    widest,
)


def fit(folder, student, loader, *callbacks, epochs=2, lr=1e-2, resume=None):
    torch.manual_seed(0)
    module = Distiller(student, optimizer={"lr": lr, "weight_decay": 0.0}, topk=(1,))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*callbacks, ModelCheckpoint(folder, "last")],
    )  # fmt: skip
    trainer.fit(module, loader(), loader(), ckpt_path=resume, weights_only=True)
    return module


@pytest.fixture
def student(tiny):
    torch.manual_seed(0)
    return tiny()


def test_rounding_follows_its_formulas():
    values = np.random.default_rng(0).normal(size=(6, 5, 3)).astype(np.float32)
    values[2] = 0
    step = np.abs(values).max((1, 2), keepdims=True) / 127
    expected = np.clip(np.round(values / np.where(step, step, 1)), -127, 127) * step
    assert np.abs(rounded_weight(torch.from_numpy(values)).numpy() - expected).max() < 1e-6

    low, high = -0.7, 1.9  # narrower than the values
    step = (high - low) / 255
    zero = np.round(-low / step)
    expected = (np.clip(np.round(values / step) + zero, 0, 255) - zero) * step
    ours = rounded_input(torch.from_numpy(values), torch.tensor([-low, high])).numpy()
    assert np.abs(ours - expected).max() < 1e-6
    assert not ours[2].any()  # 0 stays 0
    assert len(np.unique(ours)) > 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_rounding_and_stop_where_a_value_is_clipped(dtype):
    values = torch.tensor([-2.0, -0.4, 0.0, 0.3, 0.99, 3.0], dtype=dtype, requires_grad=True)
    rounded = rounded_input(values, torch.tensor([0.5, 1.0]))
    assert rounded.dtype == dtype
    rounded.sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 1, 0]
    weight = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    rounded_weight(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_a_range_holds_zero():
    assert widest(torch.tensor([2.0, 3.0])).tolist() == [0, 3]
    assert widest(torch.tensor([-2.0, -1.0])).tolist() == [2, 0]
    blank = rounded_input(torch.zeros(3), widest(torch.zeros(3)))
    assert blank.tolist() == [0, 0, 0]


def test_training_rounds_and_leaves_a_float_student_of_the_same_parameters(
    student, loader, tmp_path
):
    before = copy.deepcopy(student.state_dict())
    seen = {}

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.student.train()
            names = [name for name, _ in pl_module.named_parameters()]
            seen["parameters"] = names
            seen["grid"] = head_inputs(pl_module.student, batch[0])

    module = fit(tmp_path, student, loader, FakeQuantize(), Spy(), lr=0.0)
    after = module.student.state_dict()
    assert list(after) == list(before)
    for name in before:
        if "running" not in name and "tracked" not in name:
            assert torch.equal(after[name], before[name]), name
    assert seen["parameters"] == [f"student.{name}" for name, _ in student.named_parameters()]
    assert seen["grid"] <= 256  # values that the last layer was given, in training
    for layer in module.student.modules():
        assert not layer._forward_pre_hooks
        assert not layer._forward_hooks
        assert "weight" not in layer.__dict__
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert [k for k in saved["state_dict"] if k.startswith("student.")] == [
        f"student.{name}" for name in before
    ]


def head_inputs(student, images):
    """Return how many different values the last layer's product is made of."""
    given = []
    with torch.no_grad():
        handle = student.head.register_forward_hook(lambda m, inputs, out: given.append(inputs[0]))
        student(images)
        handle.remove()
    return len(given[0].unique())


def test_a_forward_pass_uses_rounded_weights_and_gives_the_parameters_their_gradients(student):
    images, plain = torch.rand(4, 1, 8, 8), copy.deepcopy(student.eval())
    layers = [
        Layer(m, None, torch.device("cpu")) for m in student.modules() if isinstance(m, LAYERS)
    ]
    rounded = student(images)
    rounded.sum().backward()
    with torch.no_grad():
        conv, head = plain.body[0], plain.head
        conv.weight.copy_(rounded_weight(conv.weight))
        head.weight.copy_(rounded_weight(head.weight))
        features = plain.body(rounded_input(images, widest(images))).mean((2, 3))
        expected = head(rounded_input(features, widest(features)))
    assert torch.allclose(rounded, expected, atol=1e-6)
    assert all(p.grad is not None for p in student.parameters())
    for layer in layers:
        layer.remove()


def test_a_forward_pass_that_fails_leaves_no_rounded_weight(student):
    Layer(student.head, None, torch.device("cpu"))
    with pytest.raises(RuntimeError):
        student.head(torch.rand(2, 3))
    assert "weight" not in student.head.__dict__


def test_ranges_follow_training_batches_until_they_are_frozen(student, loader, tmp_path):
    extremes = []

    class Record(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            extremes.append((min(float(batch[0].min()), 0.0), float(batch[0].max())))

    callback = FakeQuantize(decay=0.8, freeze=0.5)
    fit(tmp_path, student, loader, callback, Record(), epochs=2)
    assert len(extremes) == 8
    low, high = extremes[0]
    for below, above in extremes[1:4]:
        low, high = 0.8 * low + 0.2 * below, 0.8 * high + 0.2 * above
    ranges = callback.state_dict()["ranges"]
    assert list(ranges) == ["body.0", "head"]
    assert ranges["body.0"] == pytest.approx([low, high], rel=1e-6)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    (kept,) = [state for name, state in saved.items() if "FakeQuantize" in name]
    assert kept == {"ranges": ranges}


def test_a_resumed_run_ends_in_the_same_student_and_ranges(tiny, loader, tmp_path):
    def run(folder, epochs, resume=None):
        torch.manual_seed(0)
        student = tiny()
        student.body[3].p = 0.0  # dropout draws from a generator that a checkpoint does not keep
        callback = FakeQuantize(freeze=0.0)
        module = fit(folder, student, loader, callback, epochs=epochs, resume=resume)
        return module.student.state_dict(), callback.state_dict()

    weights, ranges = run(tmp_path / "whole", 3)
    run(tmp_path / "first", 2)
    again, found = run(tmp_path / "rest", 3, tmp_path / "first" / "last.ckpt")
    assert found == ranges
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_averaged_weights_and_copies_work(student, loader, tmp_path):
    copies = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            copies.append(copy.deepcopy(pl_module.student))

    ema = EMAWeightAveraging(decay=0.9)
    module = fit(tmp_path, student, loader, FakeQuantize(), ema, Copy())
    assert torch.isfinite(copies[0](torch.rand(2, 1, 8, 8))).all()
    assert not any("weight" in layer.__dict__ for layer in copies[-1].modules())
    own = dict(module.student.named_parameters())
    last = dict(copies[-1].named_parameters())
    assert any(not torch.equal(own[name], last[name]) for name in own)  # the average, not the last


def test_what_cannot_work_is_refused(student, loader, tmp_path):
    for options in ({"decay": 1.0}, {"decay": -0.1}, {"freeze": 1.5}):
        with pytest.raises(ValueError, match=r"callbacks\.fake_quantize\."):
            FakeQuantize(**options)
    student.compile(backend="eager")
    with pytest.raises(ValueError, match=r"needs trainer\.compile=false"):
        fit(tmp_path, student, loader, FakeQuantize())


class Plain(nn.Module):
    """Every activation that int8 rounds is some layer's input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, stride=2), nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(8 * 3 * 3, 10)

    def forward(self, images):
        features = self.second(self.first(images).relu()).relu()
        return self.head(features.flatten(1))


def test_it_computes_what_onnxruntime_does_with_the_exported_int8_student(tmp_path):
    from distill.deploy.export import onnx as formats
    from distill.deploy.export import program, quantize

    torch.manual_seed(0)
    model, images = Plain().eval(), torch.rand(256, 1, 16, 16) * 2 - 0.5
    with torch.no_grad():
        exact = model(images)
    path = tmp_path / "int8.onnx"
    graph = formats.as_onnx(program.trace(model, (1, 16, 16)))
    formats.write_onnx(quantize.quantized(graph, images.split(64), True), path, {})
    theirs = formats.open_onnx(path)(images)
    for layer, limits in zip(
        (model.first, model.second, model.head), input_ranges(onnx.load(path)), strict=True
    ):
        Layer(layer, limits, torch.device("cpu"))
    with torch.no_grad():
        ours = model(images)
    # The file also rounds biases, and a sum that lies between two steps may fall to either.
    moved, error = (ours - theirs).abs(), (theirs - exact).abs()
    assert moved.mean() < 0.1 * error.mean()
    assert moved.max() < 0.5 * error.max()
    assert (ours.argmax(1) == theirs.argmax(1)).double().mean() > 0.99


def input_ranges(model):
    """Return the range `[low, high]` of each weighted operator's input, in order."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            _, scale, zero = makers[node.input[0]].input
            step, offset = float(constants[scale]), int(constants[zero])
            yield [-offset * step, (255 - offset) * step]
