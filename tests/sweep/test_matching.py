"""A resumed sweep: each job has the folder of the job that was told the same, by any launcher."""

import json

import pytest
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from distill.config.overrides import CONF
from distill.sweep import matching
from distill.sweep.alone import name_it


@pytest.fixture
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="distill"):
        yield GlobalHydra.instance().hydra


def swept(hydra, folder, *overrides):
    told = [f"sweep.resume={folder}", *overrides]
    return hydra.compose_config("train", told, run_mode=RunMode.MULTIRUN)


def leave(hydra, job, *overrides, done=True):
    """What Hydra and a run leave of a job."""
    record = job / ".hydra"
    record.mkdir(parents=True)
    cfg = hydra.compose_config("train", list(overrides), run_mode=RunMode.RUN)
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    (record / "config.yaml").write_text(OmegaConf.to_yaml(own))
    (record / "overrides.yaml").write_text(json.dumps(list(overrides)))
    if done:
        (job / "summary.json").write_text("{}")


@pytest.mark.parametrize(
    "overrides",
    [
        ("seed=0,1", "objective.temperature=1,2", "optimizer.lr=0.1"),
        ("objective.temperature=1,2", "seed=3", "objective.temperature=4,8,1"),  # the last counts
        ("seed=range(0,3)", "objective.temperature=choice(1,2)", "+student.args={drop_rate: 0.1}"),
    ],
)
def test_the_jobs_are_those_that_hydras_own_sweeper_makes(hydra, tmp_path, overrides):
    config = swept(hydra, tmp_path, *overrides)
    loader = GlobalHydra.instance().config_loader()
    told = OverridesParser.create(config_loader=loader).parse_overrides(
        [f"sweep.resume={tmp_path}", *overrides]
    )
    (expected,) = BasicSweeper.split_arguments(told, None)
    assert matching.job_overrides(config) == expected


def test_jobs_keep_their_folders_in_any_order_and_new_ones_get_new_numbers(hydra, tmp_path):
    for name, seed in (("0", 0), ("1", 1), ("7", 2)):
        leave(hydra, tmp_path / name, "optimizer.lr=8e-3", f"seed={seed}", "tags=[old]")
    leave(hydra, tmp_path / "best", "seed=5", "optimizer.lr=0.008")  # one that was renamed
    config = swept(hydra, tmp_path, "seed=3,2,5,0", "optimizer.lr=0.008,0.004", "report=false")
    found = matching.match(config, tmp_path)
    assert found.folders == ["8", "9", "7", "10", "best", "11", "0", "12"]
    assert str(found) == "8 jobs: 3 finished before, 5 new; 1 more there, not asked for now, kept"

    name_it(config, "hydra.sweep.subdir", matching.subdir_of(found.folders))
    jobs = matching.job_overrides(config)
    for number, own in enumerate(jobs):  # as every launcher composes a job
        job = hydra.config_loader.load_sweep_config(config, own)
        job.hydra.job.num = number
        assert job.hydra.sweep.subdir == found.folders[number]


def test_what_a_default_says_is_the_same_job_as_what_is_written_out(hydra, tmp_path):
    for name, temperature in (("0", 1), ("1", 4)):
        leave(hydra, tmp_path / name, f"objective.temperature={temperature}", done=name == "0")
    (tmp_path / "1" / "checkpoints").mkdir()
    (tmp_path / "1" / "checkpoints" / "last.ckpt").touch()
    config = swept(hydra, tmp_path, "seed=1,0", "objective.temperature=4.0,1")
    found = matching.match(config, tmp_path)
    assert found.folders == ["2", "3", "1", "0"]
    assert str(found) == "4 jobs: 1 finished before, 1 goes on, 2 new"


@pytest.mark.parametrize("name", ["lr=0.1/a b", "it's", '"$', "ü,[x]"])
def test_a_folder_of_any_name_reaches_the_job(hydra, tmp_path, name):
    leave(hydra, tmp_path / name, "seed=1")
    config = swept(hydra, tmp_path, "seed=0,1")
    found = matching.match(config, tmp_path)
    assert found.folders[1] == name
    name_it(config, "hydra.sweep.subdir", matching.subdir_of(found.folders))
    job = hydra.config_loader.load_sweep_config(config, ["seed=1"])
    job.hydra.job.num = 1
    assert job.hydra.sweep.subdir == name


def test_nested_folders_keep_their_pattern(hydra, tmp_path):
    pattern = "hydra.sweep.subdir=t${objective.temperature}/${hydra.job.num}"
    leave(hydra, tmp_path / "t1" / "0", "objective.temperature=1")
    config = swept(hydra, tmp_path, pattern, "objective.temperature=4,1")
    assert matching.match(config, tmp_path).folders == ["t4/1", "t1/0"]


def test_a_pattern_that_names_one_folder_for_two_jobs_is_refused(hydra, tmp_path):
    leave(hydra, tmp_path / "t1", "objective.temperature=1")
    pattern = "hydra.sweep.subdir=t${objective.temperature}"
    config = swept(hydra, tmp_path, pattern, "objective.temperature=1", "seed=0,1")
    with pytest.raises(ValueError, match=r"hydra\.sweep\.subdir names the folder t1 for two jobs"):
        matching.match(config, tmp_path)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a=8e-3", "+a=0.008", True),
        ("a=[1, 2]", "++a=[1,2.0]", True),
        ("a='x'", "a=x", True),
        ("a={x:1,y:2}", "a={y:2,x:1}", True),
        ("a=1", "a=true", False),
        ("a=1", "a='1 '", False),
        ("~a", "a=null", False),
        ("objective=kd", "objective=dkd", False),
    ],
)
def test_how_a_value_is_written_does_not_matter(one, other, same):
    pairs = matching.canonical_pairs
    assert (pairs((one,)) == pairs((other, "resume=auto"))) == same
