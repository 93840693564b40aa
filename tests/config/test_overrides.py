"""What is typed: flags anywhere, open dictionaries, keys that were meant, quotes, paths."""

import argparse
import os
import shlex
import stat
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from distill import save_student
from distill.config import schema
from distill.config.explain import one_line
from distill.config.overrides import CONF, in_hydras_order, requoted, typed
from distill.config.read import plain
from distill.config.resolvers import cache_folder
from distill.utils.files import resolved_path

ODD = ["my run", "photos (1)", "lr=0.1", "größe", "фото", "写真", "a,b", "a'b", 'a"b', "[x]", "{x}",
       "~/x",
       "2024", "null", "a\\", 'a\\"b', "a#b", "a;b", "$HOME/x", "${x}", "a & b"]  # fmt: skip


def composed(*overrides, name="train"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=["paths.output_dir=unused", *overrides])


def said(*overrides, name="train"):
    with pytest.raises(HydraException) as refused:
        composed(*overrides, name=name)
    return one_line(refused.value)


# Flags


@pytest.mark.parametrize(
    "line",
    ["-m seed=0,1 objective=kd", "seed=0,1 -m objective=kd", "seed=0,1 objective=kd --multirun"],
)
def test_flags_may_be_anywhere_on_the_line(line):
    arranged = in_hydras_order(argparse.ArgumentParser(add_help=False), shlex.split(line))
    assert arranged == ["--multirun", "seed=0,1", "objective=kd"]


def test_values_stay_with_their_flags():
    line = "seed=0 -c job -cd a=b objective=kd --info --resolve -sc query=bash"
    arranged = in_hydras_order(argparse.ArgumentParser(add_help=False), shlex.split(line))
    assert arranged[-3:] == ["seed=0", "objective=kd", "query=bash"]
    flags = arranged[:-3]
    assert {("--cfg", "job"), ("--config-dir", "a=b"), ("--info", "all")} <= set(pairwise(flags))
    assert {"--resolve", "--shell-completion"} <= set(flags)


def test_a_dictionary_that_a_shell_took_apart_is_whole_again():
    line = "student.args={drop_rate: 0.1, layers: [1, 1]} seed=0 -m"
    arranged = in_hydras_order(argparse.ArgumentParser(add_help=False), line.split())
    assert arranged == ["--multirun", "student.args={drop_rate: 0.1, layers: [1, 1]}", "seed=0"]


# Open dictionaries


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("student.args.drop_rate=0.1", "student.args.drop_rate", 0.1),
        ("student.args={drop_rate: 0.1}", "student.args", {"drop_rate": 0.1}),
        ("teacher.args={}", "teacher.args", {}),
        ("teacher.args.drop_rate=0.1", "teacher.args.drop_rate", 0.1),
        ("teacher.fit.optimizer.betas=[0.9,0.98]", "teacher.fit.optimizer.betas", [0.9, 0.98]),
        ("optimizer.betas=[0.9,0.98]", "optimizer.betas", [0.9, 0.98]),
        ("scheduler={sched: step, decay_epochs: 3}", "scheduler",
         {"sched": "step", "decay_epochs": 3}),
        ("data.view.re_prob=0.2", "data.view.re_prob", 0.2),
        ("data.view={pad: 2}", "data.view", {"pad": 2}),
        ("trainer.gradient_clip_algorithm=norm", "trainer.gradient_clip_algorithm", "norm"),
        ("objective.terms.kl.extra=1", "objective.terms.kl.extra", 1),
        ("objective.terms.mse={loss: logit_mse}", "objective.terms.mse", {"loss": "logit_mse"}),
        ("objective.terms={ce: cross_entropy}", "objective.terms", {"ce": "cross_entropy"}),
        ("callbacks.best.save_top_k=2", "callbacks.best.save_top_k", 2),
        ("callbacks.lr._target_=a.B", "callbacks.lr", {"_target_": "a.B"}),
        ("logger.mine={_target_: a.B, x: 1}", "logger.mine", {"_target_": "a.B", "x": 1}),
        ("+optimizer.betas=[0.9,0.98]", "optimizer.betas", [0.9, 0.98]),
        ("++student.args.drop_rate=0.1", "student.args.drop_rate", 0.1),
    ],
)  # fmt: skip
def test_open_dictionaries_take_new_keys_and_whole_dictionaries(override, key, value):
    found = OmegaConf.select(composed(override), key)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value


def test_the_keys_of_a_new_entry_may_come_in_any_order():
    entry = composed("callbacks.lr.x=1", "callbacks.lr._target_=a.B").callbacks.lr
    assert entry == {"x": 1, "_target_": "a.B"}


def test_a_dictionary_without_its_target_adds_to_what_has_one():
    kept = composed("callbacks.best={save_top_k: 2}").callbacks.best
    assert kept.save_top_k == 2
    assert kept.filename == "best"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.nane=x", "did you mean student.name=x?"),
        ("callbacks.lr.x=1", "Could not override 'callbacks.lr.x'"),
        ("teacher.fit.epochs=3", "did you mean teacher.fit.max_epochs=3?"),
        ("data.num_classes=5", "'data.num_classes': the data decide it, and there is no key"),
        ("num_classes=5", "'num_classes': the data decide it, and there is no key"),
        ("preview={rows: 1}", "did you mean preview.row?"),
        ("lr='${student.lr}'", "did you mean optimizer.lr=''\"'\"'${student.lr}'\"'\"''?"),
        ("root='my photos'", """did you mean data.root=''"'"'my photos'"'"''?"""),
    ],
)
def test_everything_else_is_closed_and_names_what_was_meant(override, message):
    assert message in said(override)


def test_what_belongs_to_another_command_is_no_misspelling():
    assert "did you mean" not in said("optimizer.lr=1", name="eval")


# Quotes


@pytest.mark.parametrize("text", ODD)
def test_what_is_printed_can_be_pasted(text, tmp_path):
    line = typed("data.root", text)
    assert line.startswith("data.root=")
    done = subprocess.run(["bash", "-c", f"printf %s {line}"], capture_output=True, text=True,
                          cwd=tmp_path, check=True)  # fmt: skip
    read = OverridesParser.create().parse_override(done.stdout)
    assert not read.is_sweep_override()
    assert OmegaConf.create({"root": read.value()}).root == text


def test_quotes_are_only_advised_where_they_help():
    assert requoted("data.root=größe") == """data.root='"größe"'"""
    assert requoted("teacher.checkpoints=[größe/a,b]") == """teacher.checkpoints='["größe/a",b]'"""
    assert requoted("optimizer.lr=[") is None
    assert requoted("objective") is None


# Paths


def test_every_path_of_a_configuration_is_resolved_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DISTILL_CACHE", "~/kept")
    cfg = composed("student.checkpoint='~/student'", "teacher=ensemble", "store=disk",
                   "teacher.checkpoints=['~/a','$HOME/b']", "data=folder",
                   "data.root=photos")  # fmt: skip
    cfg = schema.resolved_paths(cfg)
    assert cfg.student.checkpoint == f"{tmp_path}/student"
    assert list(cfg.teacher.checkpoints) == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert cfg.paths.cache == f"{tmp_path}/kept"
    assert cfg.store.path.startswith(f"{tmp_path}/kept/") or cfg.store.path == f"{tmp_path}/kept"
    assert cfg.data.root == "photos"
    cfg = schema.resolved_paths(cfg, "/launched/here")
    assert cfg.data.root == "/launched/here/photos"
    assert cfg.student.checkpoint == f"{tmp_path}/student"


def test_hydras_own_folders_know_home_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert composed("sweep.resume='~/sweep'").sweep.resume == f"{tmp_path}/sweep"


def test_no_home_is_needed_where_a_variable_says_it_all(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("DISTILL_CACHE", "/kept")
    assert cache_folder() == "/kept"
    monkeypatch.setenv("DISTILL_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == "/caches/distill"
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(ValueError, match="~/x: there is no home folder: set HOME"):
        resolved_path("~/x")


def test_a_bundles_files_may_be_read_by_whom_the_umask_says(tmp_path):
    import timm

    before = os.umask(0o022)
    try:
        model = timm.create_model("cifar_resnet8", num_classes=2)
        bundle = save_student(model, tmp_path / "student")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in bundle.iterdir()}
    assert set(modes.values()) == {0o644}, modes
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("accelerator", "capability", "precision"),
    [("auto", (9, 0), "bf16-mixed"), ("gpu", (8, 0), "bf16-mixed"), ("auto", (7, 5), "32-true"),
     ("auto", None, "32-true"), ("cpu", (9, 0), "32-true")],
)  # fmt: skip
def test_the_precision_is_what_the_device_is_fast_in(
    accelerator, capability, precision, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"trainer.accelerator={accelerator}"])
        exact = compose("train", overrides=["trainer=gpu", "trainer.precision=32-true"])
    assert cfg.trainer.precision == precision
    assert plain(cfg.trainer)["precision"] == precision
    assert exact.trainer.precision == "32-true"
