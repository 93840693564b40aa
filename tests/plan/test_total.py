"""Hours of one job and of several, against sums by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from distill.plan.fits import Fit
from distill.plan.job import devices_here
from distill.plan.measure import Decoding, Trial
from distill.plan.memory import Memory
from distill.plan.table import bytes_json, limit_text, machines_of, print_total, time_text
from distill.plan.total import Plan, Total, together, total_of

NOTHING = Memory(0, 0, 0, 0, 0)


def fit(role, epochs=4, images=1000, views=None, key=None, kept=False):
    """A fit of so many images an epoch, in batches of 100."""
    batch = SimpleNamespace(batch_size=100, labeled_per_batch=100, train=range(images), views=views)
    trainer = {"max_epochs": epochs, "limit_train_batches": 1.0, "accumulate_grad_batches": 1,
               "devices": 1, "num_nodes": 1}  # fmt: skip
    cfg = OmegaConf.create({"trainer": trainer, "student": {"name": "net"}})
    return Fit(role, cfg, batch, key or role, "teacher" if role == "student" else None, kept)


def plan(*fits, live=0.003, fed=0.001, decoding=None, answers=None, memory=None, **sizes):
    """A plan of these fits: role → memory, and the bytes of the student's checkpoint and others."""
    each = sizes.pop("checkpoint", 0)
    trials = {one.role: Trial(100, live, fed if one.role == "student" else None,
                              (memory or {}).get(one.role, NOTHING), each)
              for one in fits}  # fmt: skip
    facts = {"checkpoints": sizes.pop("checkpoints", 0)}
    return Plan("", None, fits, trials, decoding, answers, "", sizes.pop("store_bytes", 0), facts,
                **sizes)  # fmt: skip


def test_one_run_asks_its_teacher_in_each_epoch():
    one = total_of([[plan(fit("student"))]])
    assert one.seconds == pytest.approx(4 * 1000 * 0.003)
    assert (one.jobs, one.fits, one.steps, one.images) == (1, 1, 40, 4000)
    assert one.hours(8) == pytest.approx(12 / 3600 / 8)


def test_kept_answers_are_asked_for_once():
    one = total_of([[plan(fit("student", views=1), answers="a")]])
    assert one.seconds == pytest.approx(1000 * 0.003 + 3 * 1000 * 0.001)


def test_jobs_by_themselves_read_what_an_earlier_one_has_asked():
    jobs = [[plan(fit("student"), answers="a")], [plan(fit("student"), answers="a")],
            [plan(fit("student"), answers="b")]]  # fmt: skip
    assert total_of(jobs).seconds == pytest.approx(12 + 4 + 12)


def test_jobs_that_take_turns_ask_once():
    jobs = [plan(fit("student")) for _ in range(3)]
    assert total_of([jobs]).seconds == pytest.approx(3 * 4 + 4000 * 0.002)
    assert total_of([[job] for job in jobs]).seconds == pytest.approx(3 * 12)


def test_a_teacher_and_a_baseline_are_trained_once_for_all():
    jobs = [plan(fit("teacher", epochs=2), fit("baseline", key=f"b{k % 2}"), fit("student"))
            for k in range(4)]  # fmt: skip
    one = total_of([[job] for job in jobs])
    assert one.fits == 1 + 2 + 4
    assert one.steps == 20 + 2 * 40 + 4 * 40
    assert one.seconds == pytest.approx(0.003 * (2000 + 2 * 4000 + 4 * 4000))


def test_what_is_kept_costs_nothing():
    one = total_of([[plan(fit("teacher", kept=True), fit("student"))]])
    assert (one.fits, one.seconds) == (1, pytest.approx(12))


TEACHER, STUDENT = Memory(0, 500, 500, 1000, 3000), Memory(500, 10, 20, 40, 300)


def test_memory_is_that_of_what_takes_most_of_it():
    memory = {"teacher": TEACHER, "student": STUDENT}
    trained = plan(fit("teacher"), fit("student"), memory=memory)
    assert total_of([[trained]]).memory == 500 + 500 + 1000 + 3000
    kept = plan(fit("teacher", kept=True), fit("student"), memory=memory)
    assert total_of([[kept]]).memory == 500 + 10 + 20 + 40 + 300
    assert total_of([[kept], [kept]]).memory == 870  # one after the other
    # in turns: one teacher, the activations of one of them, and what each keeps between its steps
    assert total_of([[kept, kept, kept]]).memory == 500 + 3 * 70 + 300


def test_disks_hold_what_is_shared_once_and_copies_on_each_machine():
    jobs = [plan(fit("student"), answers=key, store_bytes=size, checkpoint=10, checkpoints=2,
                 data=data, copies=copies)
            for key, size, data, copies in [
                ("a", 100, "x", 1000), ("a", 100, "x", 1000), ("b", 7, "y", 50),
                (None, 999, "x", 1000),
            ]]  # fmt: skip
    one = total_of([[job] for job in jobs])
    assert (one.answers, one.checkpoints, one.copies) == (100 + 7, 4 * 20, 1000 + 50)
    assert [one.disk(machines) for machines in (1, 3)] == [107 + 80 + 1050, 107 + 80 + 3 * 1050]


@pytest.mark.parametrize(
    ("count", "here", "machines"), [(1, 1, 1), (8, 1, 8), (1, 8, 1), (8, 8, 1), (9, 8, 2)]
)
def test_devices_fill_machines(count, here, machines):
    one = Total(1, 1, 1, 1, 80.0, memory=10**6, answers=0, checkpoints=0, copies=10**9)
    assert machines_of(count, here) == machines
    assert bytes_json(one, count, here) == {
        "machines": machines, "memory": count * 10**6, "disk": machines * 10**9,
    }  # fmt: skip


def test_bytes_of_machines_are_printed(capsys):
    one = Total(1, 1, 1, 1, 80.0, memory=10**9, answers=10**6, checkpoints=0, copies=3 * 10**9)
    print_total(one, [1, 16], here=8)
    _, each, *lines = capsys.readouterr().out.splitlines()
    assert each == (
        "  each machine: 8 × 1.0 GB = 8.0 GB of memory, 3.0 GB of copied shards; all share 1.0 MB "
        "of answers"
    )
    assert lines == [
        "  1 device in 1 machine: 80 s, 1.0 GB of memory, 3.0 GB on disks",
        "  16 devices in 2 machines: 5.0 s, 16.0 GB of memory, 6.0 GB on disks",
    ]


@pytest.mark.parametrize(
    ("trainer", "gpus", "expected"),
    [
        ({"devices": 1, "num_nodes": 1, "accelerator": "cpu"}, 8, 1),
        ({"devices": 2, "num_nodes": 3, "accelerator": "cpu"}, 0, 2),
        ({"devices": 1, "num_nodes": 1, "accelerator": "auto"}, 8, 8),
        ({"devices": "auto", "num_nodes": 4, "accelerator": "gpu"}, 4, 4),
    ],
)
def test_a_machine_has_as_many_devices_as_this_one(trainer, gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert devices_here(OmegaConf.create({"trainer": trainer})) == expected


@pytest.mark.parametrize(
    ("decoding", "seconds"),
    [
        (Decoding(100, 2, 4, beside=True), 40),  # 4,000 images at 100 a second, longer than 12
        (Decoding(1000, 2, 4, beside=True), 12),
        (Decoding(1000, 0, 4, beside=True), 4 + 12),  # nobody else decodes
        (Decoding(1000, 2, 4, beside=False), 4 / 2 + 12),  # half of the cores are gone meanwhile
        (Decoding(1000, 8, 4, beside=False), 4 + 12),
    ],
)
def test_decoding_goes_on_beside_training_where_it_can(decoding, seconds):
    job = plan(fit("student"), decoding=decoding)
    assert together([(job, job.student)], 4) == pytest.approx(seconds)


def test_as_many_workers_as_balance():
    decoding = Decoding(300, 2, 8, beside=True)
    assert [decoding.balancing(rate) for rate in (100, 150, 151, 1000)] == [1, 1, 2, 7]
    assert decoding.seconds == pytest.approx(1 / 300)
    said = limit_text(decoding, 1 / 1000, "live")
    assert said.startswith("decoding limits where the student takes 1,000 images/s (live)")
    assert "data.num_workers=7" in said
    assert limit_text(decoding, 1 / 100, "live").startswith("training limits")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.034, "0.034 s"), (119, "120 s"), (121, "2.0 min"), (7200, "2.0 h"),
     (1e9, "280,000 h")],
)  # fmt: skip
def test_times_have_two_digits(seconds, text):
    assert time_text(seconds) == text


def test_a_trial_without_kept_answers_says_nothing_of_its_teacher():
    assert Trial(1, 2.0, None, NOTHING, 0).teacher == 0
    assert Trial(1, 2.0, 1.5, NOTHING, 0).teacher == 0.5
    assert Trial(1, 1.0, 1.5, NOTHING, 0).teacher == 0  # noise
    assert math.isclose(Trial(1, 1.0, 1.5, NOTHING, 0).step, 1.5)
