"""Which jobs run together."""

import weakref

import numpy as np
import pytest
from omegaconf import OmegaConf

from distill.sweep import group
from distill.sweep.group import chunked, fitting, run_chunk
from distill.sweep.workers import Job


def job(number, seed=0, student="resnet18", epochs=8, **data):
    return Job(number, OmegaConf.create({
        "data": {"root": "a", "seed": seed, **data}, "teacher": {"name": "resnet34"},
        "trainer": {"accelerator": "cpu", "max_epochs": epochs, "precision": "32-true"},
        "student": {"name": student, "args": {}}, "seed": 3 + number,
    }))  # fmt: skip


def numbers(parts):
    return [[job.number for job in part] for part in parts]


def test_jobs_that_differ_on_the_students_side_only_are_together():
    jobs = [job(0), job(1, seed=1), job(2, student="resnet10t"), job(3, root="b"), job(4, epochs=2)]
    assert numbers(chunked(jobs, 1, None)) == [[0, 2, 4], [1], [3]]
    assert numbers(chunked(jobs, 1, 2)) == [[0, 2], [4], [1], [3]]
    assert numbers(chunked(jobs, 3, None)) == [[0], [2], [4], [1], [3]]
    logged = job(6)
    logged.config.logger = {"wandb": {"_target_": "WandbLogger"}}
    assert numbers(chunked([*jobs, logged], 1, None))[-1] == [6]
    broken = Job(5, OmegaConf.create({"data": "${nothing}", "teacher": None, "trainer": {}}))
    assert numbers(chunked([*jobs, broken], 1, None))[-1] == [5]


@pytest.mark.parametrize(("students", "expected"), [(0.4, 1), (1.1, 1), (2.1, 2), (99, 5)])
def test_as_many_train_at_a_time_as_half_of_the_memory_holds(
    monkeypatch, capsys, students, expected
):
    each = group.student_bytes(job(0).config)
    assert each == 5 * 4 * 11_689_512  # resnet18 on ImageNet
    monkeypatch.setattr(group, "free_bytes", lambda config: 2 * students * each)
    chunk = [job(number, student="resnet10t") for number in range(4)] + [job(4)]
    assert fitting(chunk) == expected
    assert fitting(chunk, sharers=5) == max(1, min(5, int(students / 5)))
    ran = []
    monkeypatch.setattr(group, "run_together", lambda a, b, part, report: ran.append(part))
    run_chunk(None, None, 1, chunk, None)
    assert [j.number for part in ran for j in part] == [0, 1, 2, 3, 4]
    assert max(map(len, ran)) == expected
    said = capsys.readouterr().err
    assert ("do not fit in memory" in said) == (expected < 5)


def test_what_a_failed_step_held_is_free_before_the_next(monkeypatch):
    held = []

    def fail():
        step = np.ones(3)  # as the tensors of a step
        held.append(weakref.ref(step))
        try:
            raise MemoryError("small")
        except MemoryError as error:
            raise RuntimeError("can't allocate memory") from error

    with pytest.raises(RuntimeError) as caught:
        fail()
    error = caught.value
    del caught
    assert held[0]() is not None
    group.release(error)
    assert held[0]() is None


def test_what_is_not_known_is_no_limit(monkeypatch):
    assert group.student_bytes(job(0, student="gone").config) == 0
    assert group.student_bytes(job(0, student=None).config) == 0
    assert group.free_bytes(job(0).config) > 0
    assert fitting([job(0, student="gone")] * 3) == 3
