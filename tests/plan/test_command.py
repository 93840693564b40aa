"""`distill plan`: what it counts, what it refuses, and that nothing is left of it."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from distill import cli, run
from distill.config.overrides import CONF
from distill.data import DataModule
from distill.data.sources import contents, folder
from distill.plan import command
from distill.plan.measure import Answered, Decoding, decoding_of
from distill.teacher.records import Layout
from tests.commands import attempt
from tests.data.conftest import write_folder
from tests.data.sources.shard_cases import served, write_shards

MEASURED = ("plan.seconds=0.01",)
DATA = {"contents", "shards"}  # folders of a cache with what was read of data


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys, cache):
    """Plan a command in a folder of its own; return the numbers and what was printed."""

    def make(*overrides, multirun=False):
        folder = tmp_path / "here"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        out = tmp_path / "plan.json"
        more = (f"plan.json={out}", f"paths.cache={tmp_path / 'cache'}", *MEASURED)
        command.run({"multirun": multirun}, ["trainer.accelerator=cpu", *overrides, *more])
        assert [*folder.iterdir()] == []
        assert not (tmp_path / "cache").exists()
        return json.loads(out.read_text()), capsys.readouterr().out

    return make


def test_the_default_run(planned):
    found, text = planned()
    (job,) = found["jobs"]
    assert (job["train"], job["val"], job["test"], job["classes"]) == (897, 100, 800, 10)
    fits = {fit["role"]: fit for fit in job["fits"]}
    assert [*fits] == ["teacher", "baseline", "student"]
    each = 897 // 32
    assert [fit["steps"] for fit in fits.values()] == [20 * each, 8 * each, 8 * each]
    assert found["total"]["steps"] == 36 * each
    assert found["total"]["images"] == 36 * each * 32
    student = fits["student"]
    # 20,470 parameters, and AdamW keeps two numbers and a step for each tensor
    assert student["memory"]["gradients"] == 4 * 20_470
    assert 0 <= student["memory"]["optimizer"] - 2 * 4 * 20_470 < 4 * 100
    assert student["memory"]["teacher"] == fits["teacher"]["memory"]["weights"]
    assert fits["baseline"]["memory"]["teacher"] == 0
    assert student["images_per_second_fed"] > 0
    # records of a checksum and ten float16 numbers: 24 bytes, a row for each index
    assert job["store"]["kept"]
    assert job["store"]["bytes"] % 24 == 0
    assert job["checkpoints"] == 2
    assert student["checkpoint_bytes"] > 3 * 4 * 20_470
    for word in ("to be trained", "memory", "before the student (teacher, baseline)",
                 "store=auto keeps", "in all: 3 models", "8 devices in 8 machines",
                 "supposed"):  # fmt: skip
        assert word in text
    total = found["total"]
    assert total["memory"] == fits["teacher"]["memory"]["total"]
    assert (total["answers"], total["copies"]) == (job["store"]["bytes"], 0)
    disk = job["store"]["bytes"] + 2 * student["checkpoint_bytes"]
    assert total["bytes"]["8"] == {"machines": 8, "memory": 8 * total["memory"], "disk": disk}


def test_as_many_steps_as_a_run_takes(planned, tmp_path, cache, monkeypatch):
    choices = ["trainer.max_epochs=2", "trainer.accumulate_grad_batches=3", "baseline=false",
               "teacher=none", "objective=supervised", "trainer.limit_train_batches=0.5",
               "logger=none"]  # fmt: skip
    found, _ = planned(*choices)
    steps = []
    monkeypatch.setattr(run, "write_run", lambda *_: None)
    real = run.fit

    def noted(*given):
        student, trainer = real(*given)
        steps.append(trainer.global_step)
        return student, trainer

    monkeypatch.setattr(run, "fit", noted)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        paths = (f"paths.output_dir={tmp_path / 'run'}", f"paths.cache={cache}")
        run.train(compose("train", [*choices, *paths, "trainer.accelerator=cpu"]))
    assert [fit["steps"] for fit in found["jobs"][0]["fits"]] == steps == [2 * 5]


def test_a_sweep_is_the_sum_of_its_jobs(planned):
    choices = ("objective.temperature=1,2", "student.name=slim_resnet10_4,slim_resnet10_8",
               "teacher.fit.max_epochs=1")  # fmt: skip
    found, text = planned(*choices, multirun=True)
    jobs = found["jobs"]
    assert [job["name"] for job in jobs] == [
        f"objective.temperature={t}, student.name=slim_resnet10_{c}" for t in (1, 2) for c in (4, 8)
    ]
    once = {fit["role"]: fit["steps"] for fit in jobs[0]["fits"]}
    # one teacher for all, a baseline for each architecture, and the students
    steps = once["teacher"] + 2 * once["baseline"] + 4 * once["student"]
    assert (found["total"]["steps"], found["total"]["fits"]) == (steps, 7)
    # what is trained is measured once for each pair of models
    rates = {(job["fits"][-1]["images_per_second"]) for job in jobs}
    assert len(rates) == 2
    assert "its teacher asked, once" in text
    alone, _ = planned(*choices, "hydra/launcher=basic", "store=off", multirun=True)
    seconds = [{fit["role"]: fit["seconds"] for fit in job["fits"]} for job in alone["jobs"]]
    baselines = seconds[0]["baseline"] + seconds[1]["baseline"]
    students = sum(job["student"] for job in seconds)
    total = seconds[0]["teacher"] + baselines + students
    assert alone["total"]["seconds"] == pytest.approx(total)


@pytest.fixture
def planned_twice(tmp_path):
    """Plan a command of pictures twice, and yield in between; return what the cache then holds."""

    def make(*overrides):
        paths = [f"paths.cache={tmp_path / 'cache'}", f"paths.output_dir={tmp_path / 'run'}"]
        quick = ["baseline=false", "teacher=none", "objective=supervised", "data.image_size=16",
                 "data.batch_size=4", "data.num_workers=0", "trainer.accelerator=cpu",
                 f"plan.json={tmp_path / 'plan.json'}"]  # fmt: skip
        for _ in range(2):
            command.run({"multirun": False}, [*overrides, *paths, *quick, *MEASURED])
            yield
        there = (tmp_path / "cache").rglob("*")
        assert {path.relative_to(tmp_path / "cache").parts[0] for path in there} <= DATA
        assert not (tmp_path / "run").exists()

    return make


def test_what_pictures_hold_is_kept_for_the_run(planned_twice, tmp_path, monkeypatch):
    for path in write_folder(tmp_path / "photos").rglob("*.png"):
        os.utime(path, (1, 1))  # of one that was just written nothing is kept
    read = []
    examine = contents.examine
    monkeypatch.setattr(contents, "examine", lambda piece: read.append(piece) or examine(piece))
    numbers = [len(read) for _ in planned_twice("data=folder", f"data.root={tmp_path / 'photos'}")]
    assert numbers == [18, 18]


def test_index_and_copies_of_shards_are_kept_for_the_run(planned_twice, tmp_path, capsys):
    write_shards(tmp_path / "shards")
    with served(tmp_path / "shards") as server:
        names = ",".join(path.name for path in (tmp_path / "shards").iterdir())
        root = f'data.root="{server.address}/{{{names}}}"'
        said, sent = [], []
        for _ in planned_twice("data=shards", root):
            said.append(capsys.readouterr().err)
            sent.append([one for one in server.asked if one.startswith("GET") and ".tar" in one])
    assert ["reading 5 shards once" in one for one in said] == [True, False]
    assert sent[0] == sent[1]
    assert len(sent[0]) == 5
    total = json.loads((tmp_path / "plan.json").read_text())["total"]
    sizes = [path.stat().st_size for path in (tmp_path / "shards").iterdir()]
    assert total["copies"] == sum(sizes)
    assert total["bytes"]["8"]["disk"] == total["checkpoints"] + 8 * sum(sizes)


def test_assistants_and_a_teacher_that_is_kept(planned, tmp_path):
    found, text = planned("assistants=[{name: slim_resnet10_8}]", "baseline=false",
                          "teacher.fit.max_epochs=1", "objective=hint")  # fmt: skip
    (job,) = found["jobs"]
    assert [fit["role"] for fit in job["fits"]] == ["teacher", "assistant 1", "student"]
    assert job["fits"][-1]["images_per_second_fed"] is None  # of features no answer is kept
    assert not job["store"]["kept"]
    assert "only the teacher's logits are kept" in text
    assert "no assistant was trained before" in text
    memory = [fit["memory"] for fit in job["fits"]]
    assert memory[1]["teacher"] == memory[0]["weights"]
    # what a term learns with is trained with the model, and not part of it
    assert memory[0]["weights"] > memory[1]["weights"] > memory[2]["teacher"] > 0


def test_a_teacher_that_is_fine_tuned_is_timed_as_a_whole(planned):
    recipe = "teacher.fit.head_epochs=1", "teacher.fit.optimizer.layer_decay=0.5"
    scratch = ("teacher=trained", "teacher.name=slim_resnet10_8")
    tuned = ("teacher=finetuned", "teacher.name=slim_resnet10_8", "teacher.pretrained=false")
    common = ("baseline=false", "data.image_size=16")
    found, text = planned(*tuned, *recipe, *common)
    whole, _ = planned(*scratch, *common)
    teacher, other = (one["jobs"][0]["fits"][0] for one in (found, whole))
    assert teacher["memory"]["gradients"] == other["memory"]["gradients"] > 0  # of all layers
    assert "slim_resnet10_8, fine-tuned, to be trained here once" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("zzz=1", "Could not override 'zzz'"),
        ("calibration=refit", "Could not override 'calibration'"),
        ("objective.temprature=2", "did you mean objective.temperature=2"),
        ("objective.temperature=1,2", "add -m for a sweep"),
        ("data=fol", "there is no data=fol"),
        ("trainer.max_epochs=0", "trainer.max_epochs must be"),
        ("data.batch_size=2000 data.val_fraction=0", "val_fraction"),
        ("data=folder data.root=nowhere", "nowhere"),
        ("teacher=timm teacher.name=resnet10t", "would have random weights"),
        ("objective=kd teacher=none", "compares with a teacher"),
        ("resume=auto", "resume=auto needs a directory"),
        ("plan.devices=0", "plan.devices must be a number of devices"),
        ("plan.seconds=-1", "plan.seconds must be"),
        ("plan.json=[]", "plan.json must be"),
        ("--cfg job", "plan takes no --cfg"),
        ("--nothing", "unrecognized arguments"),
        ("-m hydra/sweeper=optuna_accuracy", ""),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(line, message, tmp_path):
    ended = attempt(f"distill plan {line}", tmp_path, DISTILL_CACHE=str(tmp_path / "cache"))
    assert ended.code == 2
    assert ended.errors.startswith("distill")
    assert ended.errors.count("\n") == 1
    assert message in ended.errors
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("line", ["objective.temprature=2", "teacher=none", "seed=x",
                                  "data.batch_size=0", "optimizer.opt=adamm"])  # fmt: skip
def test_a_mistake_is_said_as_a_run_says_it(line, tmp_path):
    words, place = ("plan ", ""), str(tmp_path / "cache")
    ended = [attempt(f"distill {word}{line}", tmp_path, DISTILL_CACHE=place) for word in words]
    assert [one.code for one in ended] == [2, 2]
    # the keys that there are differ by `plan`
    planned, trained = (one.errors.splitlines()[-1].partition("; there are ")[0] for one in ended)
    assert planned == trained


def test_help_is_there_and_a_run_names_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distill", "plan", "--help"])
    cli.train()
    assert "nothing is trained" in capsys.readouterr().out
    text = (CONF / "hydra" / "default.yaml").read_text()
    assert "distill plan" in text.partition("template:")[2]


def test_pictures_are_decoded_for_as_long_as_told(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for k in range(2):
            (tmp_path / split / str(k)).mkdir(parents=True)
            for n in range(4):
                pixels = generator.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / str(k) / f"{n}.png")
    data = DataModule(folder(str(tmp_path)), image_size=16, batch_size=4)
    found = decoding_of(data, 0.01, torch.device("cpu"))
    assert isinstance(found, Decoding)
    assert found.images_per_second > 0
    assert (found.workers, found.beside) == (0, False)


def test_a_store_that_has_every_answer():
    store = Answered(5, Layout(3, "float32"))
    logits, there = store.read(0, torch.tensor([0, 4, 4]))
    assert logits.shape == (3, 3)
    assert there.all()
    assert torch.equal(logits[0], logits[2])
    assert not store.writes
