"""What a resumed run or sweep takes for the same job, and what for another."""

import json
from contextlib import nullcontext

import pytest
import torch
from hydra import compose, initialize_config_dir

from distill.config import read
from distill.config.overrides import CONF
from distill.report.leaderboard import setting
from distill.training import resume


@pytest.fixture
def composed(tmp_path):
    def make(*overrides):
        paths = (f"paths.output_dir={tmp_path / '0'}", f"sweep.resume={tmp_path}")
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", overrides=[*paths, *overrides])

    return make


def leave(folder, cfg, top1=0.5):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"config": read.plain(cfg)}))
    (folder / "metrics.csv").write_text(f"epoch,val/top1\n0,{top1}\n")


CHANGES = [
    ("annealing=cosine",),
    ("scheduler=null",),
    ("callbacks=[checkpoints,progress,sparsity]",),
    ("assistants=[{}]",),
    ("student=timm", "student.name=resnet10t"),
    ("+student.args.stem_width=8",),
    ("objective.temperature=3",),
]


@pytest.mark.parametrize("changed", CHANGES, ids=lambda change: change[0])
@pytest.mark.parametrize("first", [True, False])
def test_another_configuration_is_another_job_whichever_was_first(
    composed, tmp_path, changed, first
):
    before, now = (composed(*changed), composed()) if first else (composed(), composed(*changed))
    leave(tmp_path / "0", before)
    said = resume.finished(now)
    assert isinstance(said, str)
    assert "its numbers are kept" in said


@pytest.mark.parametrize(
    "free",
    [
        (),
        ("report=false",),
        ("sweep.metrics=[val/top1]",),
        ("store.path=elsewhere", "data.num_workers=1", "trainer.log_every_n_steps=7"),
    ],
)
def test_what_decides_no_number_is_no_other_job(composed, tmp_path, free):
    leave(tmp_path / "0", composed())
    told = resume.finished(composed(*free))
    assert told == ([0.5] if "sweep.metrics=[val/top1]" in free else 0.5)


def test_another_jobs_checkpoint_is_not_gone_on_from(composed, tmp_path):
    checkpoints = tmp_path / "0" / "checkpoints"
    checkpoints.mkdir(parents=True)
    progress = {"fit_loop": {"epoch_progress": {"current": {"processed": 3}}}}
    content = {"state_dict": {"student.w": torch.ones(1)}, "loops": progress,
               "distill": {"job": resume.fingerprint(composed("seed=1"))}}  # fmt: skip
    torch.save(content, checkpoints / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt was left by another configuration"):
        resume.with_checkpoint(composed())
    cfg = composed("seed=1")
    cfg = resume.with_checkpoint(cfg)
    assert cfg.ckpt_path.endswith("last.ckpt")


@pytest.mark.parametrize("changed", ["data", "teacher", None])
def test_a_run_does_not_go_on_under_another_teacher_or_other_images(composed, tmp_path, changed):
    checkpoint = tmp_path / "last.ckpt"
    then = {"data": "a", "teacher": ["b", "c"]}
    weights = {"student.w": torch.ones(1)}
    torch.save({"state_dict": weights, "distill": {"learned_from": then}}, checkpoint)
    now = {"data": "a", "teacher": ["b", "c"]} | ({changed: "d"} if changed else {})
    refused = pytest.raises(ValueError, match=f"the {changed} changed since")
    with refused if changed else nullcontext():
        cfg = composed(f"ckpt_path={checkpoint}")
        resume.check_unchanged(cfg, resume.left_behind(cfg), now)


def test_jobs_of_a_resumed_sweep_are_of_one_setting(composed):
    rows = [
        {"config": resume.flat(read.plain(composed(*own)))}
        for own in (("seed=0", "sweep.resume=null"), ("seed=1", "ckpt_path=0/last.ckpt"))
    ]
    assert setting(rows[0], "seed") == setting(rows[1], "seed")


def test_of_checkpoints_that_can_be_read_the_latest_is_gone_on_from(tmp_path, caplog):
    def write(name, step):
        torch.save({"state_dict": {"student.w": torch.ones(1)}, "global_step": step},
                   tmp_path / name)  # fmt: skip

    assert resume.latest(tmp_path) is None
    write("best.ckpt", 20)
    write("early.ckpt", 10)
    assert resume.latest(tmp_path)[0].name == "best.ckpt"
    write("last.ckpt", 15)
    assert resume.latest(tmp_path)[0].name == "last.ckpt"
    content = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[: len(content) // 2])
    assert resume.latest(tmp_path)[1]["global_step"] == 20
    assert "last.ckpt is not a checkpoint that can be read safely; another is" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("resume=true",), "resume=True is unknown: it is auto"),
        (("resume=auto", "ckpt_path=a.ckpt"), "finds the checkpoint itself: leave out ckpt_path"),
    ],
)
def test_what_cannot_be_meant_is_refused(composed, overrides, message):
    with pytest.raises(ValueError, match=message):
        resume.check(composed(*overrides))


def test_a_folder_that_has_moved_is_still_the_same_run(composed):
    here, there = (composed(f"paths.output_dir={name}") for name in ("here", "there"))
    assert resume.fingerprint(here) == resume.fingerprint(there)
    assert resume.difference(read.plain(here), there) is None
