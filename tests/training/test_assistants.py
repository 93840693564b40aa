"""Chains of teachers: assistants, and generations of one architecture."""

import json

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

import distill
from distill import run
from distill.config import build, read
from distill.config.overrides import CONF
from distill.data.sources import digits
from distill.models.build import build_model
from distill.models.weights import DataShape
from distill.training import auxiliary
from distill.training.untrained import prepare

QUICK = ("trainer.max_epochs=1", "trainer.limit_train_batches=4", "teacher.fit.max_epochs=1",
         "trainer.accelerator=cpu", "logger=none", "baseline=false", "report=false",
         "callbacks=none")  # fmt: skip


@pytest.fixture
def composed(tmp_path):
    def make(*overrides, folder="run"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = (f"paths.output_dir={tmp_path / folder}", f"paths.cache={tmp_path / 'cache'}")
            return compose("train", overrides=[*paths, *QUICK, *overrides])

    return make


def kept(tmp_path, role):
    (folder,) = [p for p in (tmp_path / "cache").glob(f"{role}-*") if p.is_dir()]
    return folder


def test_the_student_learns_from_the_assistant_and_the_assistant_from_the_teacher(
    composed, tmp_path, capsys
):
    run.train(composed("experiment=assistant"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    (first,) = summary["chain"]
    sizes = [model["params"] for model in (first, summary["teacher"], summary["student"])]
    assert sizes == sorted(sizes, reverse=True)
    printed = capsys.readouterr().out
    places = [printed.index(word) for word in ("│ first teacher", "│ teacher", "│ distilled")]
    assert places == sorted(places)

    answers = np.load(tmp_path / "run/predictions.npz")
    images = digits().test
    for role, name in (("teacher_1", "teacher"), ("teacher", "assistant-1")):
        model = distill.load_student(kept(tmp_path, name))
        mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in
                     ("mean", "std"))  # fmt: skip
        index = torch.from_numpy(answers["test_index"])
        rows = [int((images.index == i).nonzero()) for i in index[:40]]
        views = torch.nn.functional.interpolate(
            images.images[rows].float() / 255, size=32, mode="bilinear", antialias=True
        )
        with torch.inference_mode():
            found = model((views - mean) / std).argmax(1).numpy()
        assert (found == answers[f"test_{role}"][:40].argmax(1)).mean() > 0.9
    same = (answers["test_student"].argmax(1) == answers["test_teacher"].argmax(1)).mean()
    assert summary["student"]["agreement"] == pytest.approx(same)
    assert first["top1"] == pytest.approx(
        (answers["test_teacher_1"].argmax(1) == answers["test_target"]).mean()
    )


def test_a_chain_is_trained_once_for_all_that_learn_from_it(composed, tmp_path):
    run.train(composed("experiment=assistant"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*.saf*")}
    run.train(composed("experiment=assistant", "optimizer.lr=0.1", "student.lr=0.1", "seed=0",
                       folder="other"))  # fmt: skip
    more = {path.parent.name for path in (tmp_path / "cache").glob("*/*.saf*")} - {
        path.parent.name for path in before
    }
    assert {name.rpartition("-")[0] for name in more} == {"assistant-1"}  # its lr is the run's
    run.train(composed("experiment=assistant", "+student.args.channels=[4,8,8,16]", folder="small"))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(list((tmp_path / "cache").glob("assistant-1-*/*.saf*"))) == 2


def test_generations_have_one_architecture_and_seeds_of_their_own(composed, tmp_path):
    cfg = composed("experiment=born_again", "generations=3", "objective.temperature=auto",
                   "trainer.limit_train_batches=1.0", "trainer.max_epochs=2")  # fmt: skip
    run.train(cfg)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert len(summary["chain"]) == 2
    generations = [*summary["chain"], summary["teacher"], summary["student"]]
    assert len({model["params"] for model in generations}) == 1
    assert len({model["nll"] for model in generations}) == 4
    facts = [
        json.loads((kept(tmp_path, role) / "distill.json").read_text())["config"]
        for role in ("teacher", "assistant-1", "assistant-2")
    ]
    assert len({made["seed"] for made in facts} | {cfg.seed}) == 4
    assert facts[0]["student"]["args"] == facts[2]["student"]["args"] == cfg.student.args
    assert facts[0]["objective"]["terms"].keys() == {"ce"}
    assert facts[1]["objective"]["terms"].keys() == {"ce", "kl"}
    # Each learns at the temperature that calibrates its own teacher.
    assert facts[1]["objective"]["temperature"] != facts[2]["objective"]["temperature"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("assistants=[{}]", "teacher.name=null", "objective=supervised"), "and there is none"),
        (("assistants=[{nam: resnet18}]",), "not a change of `student`"),
        (("assistants=[3]",), "not a change of `student`"),
        (("assistants=[{name: resnet81, args: {}}]",), "no model 'resnet81' for assistant 1.name"),
        (("experiment=born_again", "generations=0"), "at least 1"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_before_anything_is_trained(
    composed, tmp_path, overrides, message
):
    with pytest.raises(Exception, match=message):
        run.train(composed(*overrides))
    assert not list(tmp_path.glob("cache/*"))


def test_a_student_of_other_classes_begins_with_the_backbone_and_says_so(
    composed, tmp_path, caplog
):
    cfg = composed()
    model = build_model(read.model_spec(cfg.student), DataShape(4, 1, (32, 32)), "student")
    distill.save_student(model, tmp_path / "four")
    caplog.set_level("INFO", "distill")
    cfg = composed(f"student.checkpoint={tmp_path / 'four'}")
    data = build.build_data(cfg)
    cfg = build.with_architecture(cfg)
    prepare(cfg, data)
    assert "of 4 classes, and the data have 10; the last layer starts anew" in caplog.text


def test_an_assistant_from_a_checkpoint_has_its_architecture(composed, tmp_path):
    spec = composed("+student.args.channels=[8,8,8,8]").student
    model = build_model(read.model_spec(spec), DataShape(10, 1, (32, 32)), "student")
    distill.save_student(model, tmp_path / "eight")
    cfg = composed(f"assistants=[{{checkpoint: {tmp_path / 'eight'}}}]")
    assert auxiliary.assistant_config(cfg, 1).student.args.channels == [8, 8, 8, 8]
    assert not auxiliary.assistant_config(composed("assistants=[{}]"), 1).student.checkpoint


def test_the_store_is_filled_for_the_assistants_that_a_run_trains(composed, tmp_path):
    run.fill_store(composed("assistants=[{}]"))
    run.train(composed("assistants=[{}]", folder="other"))
    assert len(list((tmp_path / "cache").glob("assistant-1-*/*.saf*"))) == 1
    run.train(composed("assistants=null", folder="none"))
