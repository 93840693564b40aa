"""Teachers that are fine-tuned once, and what a run trains for others after an interruption."""

import json
import logging
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from torch import nn

import distill
from distill import run
from distill.config import read
from distill.config.overrides import CONF
from distill.models.build import ModelSpec, build_model
from distill.models.weights import DataShape
from distill.training import auxiliary
from distill.training.callbacks.head_first import HeadFirst
from distill.training.callbacks.progress import EpochLines
from distill.training.module import create_optimizer

QUICK = ("trainer.max_epochs=1", "trainer.limit_train_batches=4", "trainer.accelerator=cpu",
         "logger=none", "baseline=false", "report=false", "store=off", "teacher=finetuned",
         "teacher.name=slim_resnet10_8")  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """Weights of the digits' images for three classes."""
    torch.manual_seed(0)
    model = distill.models.build.timm.create_model("slim_resnet10_8", num_classes=3, in_chans=1)
    torch.save({"model": model.state_dict()}, tmp_path / "start.pth")
    return tmp_path / "start.pth"


@pytest.fixture
def composed(tmp_path, start):
    def make(*overrides, folder="run", cache="cache"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", overrides=[
                f"paths.output_dir={tmp_path / folder}", f"paths.cache={tmp_path / cache}",
                *QUICK, f"teacher.checkpoint={start}", *overrides])  # fmt: skip

    return make


def kept(tmp_path, cache="cache"):
    (folder,) = [p for p in (tmp_path / cache).glob("teacher-*") if p.is_dir()]
    return folder


def weights(folder):
    return distill.load_student(folder).state_dict()


def test_it_starts_from_its_weights_with_a_new_head_and_keeps_its_best_epoch(
    composed, tmp_path, start, caplog
):
    caplog.set_level(logging.INFO, "distill")
    run.train(composed("teacher.fit.max_epochs=4", "teacher.fit.optimizer.lr=1e-7",
                       "teacher.fit.patience=1"))  # fmt: skip
    assert "of 3 classes, and the data have 10; the last layer starts anew" in caplog.text
    begun = torch.load(start, weights_only=True)["model"]
    found = weights(kept(tmp_path))
    assert found["fc.weight"].shape == (10, 64)
    assert torch.allclose(found["layer4.0.conv1.weight"], begun["layer4.0.conv1.weight"], atol=1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    model = distill.load_student(kept(tmp_path))
    assert summary["teacher"]["params"] == sum(p.numel() for p in model.parameters())
    assert not list((tmp_path / "cache").glob("*.training"))


def stopped(monkeypatch, epoch):
    """Press Ctrl-C after an epoch of the next fit, once."""
    line, pressed = EpochLines.on_train_epoch_end, []

    def interrupt(self, trainer, module):
        line(self, trainer, module)
        if trainer.current_epoch == epoch and not pressed:
            pressed.append(epoch)
            raise KeyboardInterrupt

    monkeypatch.setattr(EpochLines, "on_train_epoch_end", interrupt)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the commands ignore it, too
@pytest.mark.parametrize("recipe", [(), ("teacher.fit.ema=0.9", "teacher.fit.patience=null")])
def test_one_that_was_interrupted_goes_on_to_the_same_bytes(
    composed, tmp_path, monkeypatch, caplog, recipe
):
    caplog.set_level(logging.INFO, "distill")
    short = ("teacher.fit.max_epochs=4", *recipe)
    run.train(composed(*short, cache="whole"))
    stopped(monkeypatch, epoch=2)
    with pytest.raises(KeyboardInterrupt):
        run.train(composed(*short))
    assert not [p for p in (tmp_path / "cache").glob("teacher-*") if p.suffix == ""
                and (p / "model.safetensors").exists()]  # fmt: skip
    run.train(composed(*short, folder="again"))
    assert "teacher: going on from" in caplog.text
    expected, found = weights(kept(tmp_path, "whole")), weights(kept(tmp_path))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for cache in ("whole", "cache"):
        assert not list((tmp_path / cache).glob("*.training"))
    first, second = ((kept(tmp_path, cache) / "metrics.csv").read_text()
                     for cache in ("whole", "cache"))  # fmt: skip
    assert first == second


def test_a_named_model_is_that_model_whatever_the_defaults_are(composed):
    for overrides, role, size in (
        (("teacher=trained", "teacher.name=resnet34", "teacher.checkpoint=null"), "teacher", 21e6),
        (("student=small", "student.name=resnet26"), "student", 13e6),
    ):
        cfg = composed(*overrides)
        alone = auxiliary.supervised_config(cfg, "teacher")
        node = alone.student if role == "teacher" else cfg.student
        model = build_model(read.model_spec(node), DataShape(10, 3, (64, 64)), role)
        assert sum(p.numel() for p in model.parameters()) > size
    assert cfg.student.lr == 1e-3  # not what suits the small student
    assert composed("student=small").student.lr == 3e-2


def test_earlier_layers_move_less():
    torch.manual_seed(0)
    model = build_model(ModelSpec("slim_resnet10_8"), DataShape(10, 1, (32, 32)), "teacher")
    optimizer = create_optimizer(model, {"opt": "sgd", "lr": 1.0, "layer_decay": 0.5})
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups
              for p in group["params"]}  # fmt: skip
    first = [p for name, p in model.named_parameters() if name.endswith("conv1.weight")]
    ordered = [scales[id(parameter)] for parameter in first]
    assert ordered == sorted(ordered)
    assert ordered[0] < ordered[-1] < scales[id(model.fc.weight)] == 1


class Net(nn.Module):
    """Two layers, of which the last is the head."""

    def __init__(self):
        super().__init__()
        self.num_classes, self.body, self.head = 4, nn.Linear(64, 8), nn.Linear(8, 4)

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.flatten(1))))


class Snapshots(pl.Callback):
    """Weights of both layers at the end of every epoch, and who had gradients."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        net = pl_module.student
        self.seen.append((net.body.weight.detach().clone(), net.head.weight.detach().clone()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_last_layer_is_trained_before_the_others(loader, monkeypatch, ranks):
    """With several ranks gradients are exchanged for all, and those of what waits are dropped."""
    monkeypatch.setattr(pl.Trainer, "world_size", property(lambda self: ranks))
    torch.manual_seed(0)
    net, shots = Net(), Snapshots()
    begun = net.body.weight.detach().clone(), net.head.weight.detach().clone()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[HeadFirst(1), shots],
        use_distributed_sampler=False,
    )  # fmt: skip
    optimizer = {"opt": "adamw", "lr": 1e-2, "weight_decay": 0.1}
    trainer.fit(distill.Distiller(net, optimizer=optimizer), loader())
    (body_1, head_1), (body_2, head_2) = shots.seen
    assert torch.equal(body_1, begun[0])  # weight decay moved nothing either
    assert not torch.equal(head_1, begun[1])
    assert not torch.equal(body_2, body_1)
    assert not torch.equal(head_2, head_1)
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("teacher.checkpoint=null", "teacher.name=null"), r"give teacher\.name=NAME"),
        (("teacher.fit.head_epochs=3", "teacher.fit.max_epochs=3"), "leaves none of 3 epochs"),
        (("teacher.fit.patience=0",), "patience must be a whole number of at least 1"),
        (("teacher.fit.ema=2",), "ema must be a number from 0 to 1"),
        (("teacher.key_map=alphabet",), "key_map must be order, or patterns"),
        (("imports=[no_such_module]",), "imports=no_such_module: ModuleNotFoundError"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(composed, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        run.train(composed(*overrides))
    assert not Path(tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("teacher*"))
