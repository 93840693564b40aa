"""Functions in turns: each in its own world, and what they share made once."""

import logging
import os
import random
from functools import partial

import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from distill.sweep.lockstep import in_turns
from distill.teacher.teacher import Teacher
from distill.utils import sharing as module
from distill.utils.sharing import Recent, Sharing, Streams


def test_turns_go_round_until_each_is_done():
    order = []

    def task(name, turns, sharing):
        for turn in range(turns):
            order.append(f"{name}{turn}")
            sharing.next_turn()

    in_turns([partial(task, "a", 3), partial(task, "b", 1), partial(task, "c", 2)])
    assert order == ["a0", "b0", "c0", "a1", "c1", "a2"]


def draws(seed, sharing, count=3):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    found = []
    for _ in range(count):
        found.append((random.random(), np.random.rand(), torch.rand(1).item()))
        sharing.next_turn()
    return found


def test_neighbours_change_nothing_about_what_is_random():
    found = {}
    in_turns(
        [
            lambda own, seed=seed: found.update({seed: draws(seed, own, 2 + seed)})
            for seed in range(3)
        ]
    )
    assert found == {seed: draws(seed, Sharing(), 2 + seed) for seed in range(3)}


def test_each_has_its_configuration_its_log_and_its_gradient_mode():
    before = HydraConfig.instance().cfg, logging.root.handlers[:]
    seen = []

    def task(name, mode, sharing):
        HydraConfig.instance().cfg = name
        handler = logging.NullHandler()
        logging.root.handlers[:] = [handler]
        os.environ["PL_GLOBAL_SEED"] = name
        with mode():
            state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            sharing.next_turn()
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == state
        assert HydraConfig.instance().cfg == name
        assert logging.root.handlers == [handler]
        assert os.environ["PL_GLOBAL_SEED"] == name
        seen.append(state)

    modes = [torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad]
    in_turns([partial(task, str(k), mode) for k, mode in enumerate(modes)])
    assert sorted(seen) == [(False, False), (False, True), (True, False), (True, False)]
    assert (HydraConfig.instance().cfg, logging.root.handlers) == before


def test_an_interrupt_ends_all_and_lets_each_clean_up():
    cleaned = []

    def waits(name, sharing):
        try:
            while True:
                sharing.next_turn()
        finally:
            cleaned.append(name)

    def interrupts(sharing):
        sharing.next_turn()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_turns([partial(waits, "a"), interrupts, partial(waits, "b")])
    assert sorted(cleaned) == ["a", "b"]


def test_what_is_made_once_is_made_without_ending_the_turn():
    made = []

    def make(sharing):
        sharing.next_turn()  # the others must not come to ask before there is an answer
        made.append(1)
        return object()

    def ask(sharing):
        found.append(sharing.once("key", partial(make, sharing)))

    found = []
    in_turns([ask] * 3)
    assert len(made) == 1
    assert found[0] is found[1] is found[2]
    ask(alone := Sharing())
    ask(alone)
    assert found[3] is not found[4]  # alone nothing is kept


def test_the_clock_stands_still_while_others_have_their_turns(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    taken = {}

    def task(name, seconds, sharing):
        start = sharing.clock()
        for _ in range(4):
            now[0] += seconds
            sharing.next_turn()
        taken[name] = sharing.clock() - start

    in_turns([partial(task, "slow", 10.0), partial(task, "fast", 1.0)])
    assert taken == {"slow": 40.0, "fast": 4.0}


def test_runs_go_through_a_stream_together_and_a_late_one_goes_alone():
    streams, begun = Streams(), []

    def begin(position):
        begun.append(position)
        return iter(range(position, 20))

    found = {}

    def through(name, wait, sharing):
        for _ in range(wait):
            sharing.next_turn()
        found[name] = list(streams.through("numbers", begin, sharing))

    in_turns([partial(through, "a", 0), partial(through, "b", 0), partial(through, "c", 2)])
    assert begun == [0]
    in_turns([partial(through, "d", 0), partial(through, "late", 9)])
    assert begun == [0, 0, 0]
    assert all(numbers == list(range(20)) for numbers in found.values())
    assert len(found) == 5


def test_a_run_that_falls_behind_goes_on_by_itself():
    streams, begun = Streams(), []

    def begin(position):
        begun.append(position)
        return iter(range(position, 30))

    found = []

    def slow(sharing):
        for number in streams.through("numbers", begin, sharing):
            found.append(number)
            for _ in range(5):
                sharing.next_turn()

    in_turns([lambda own: list(streams.through("numbers", begin, own)), slow])
    assert found == list(range(30))
    assert begun[0] == 0
    assert len(begun) == 2
    assert 0 < begun[1] < 5


def test_an_item_that_cannot_be_made_is_missed_by_every_run_at_its_place():
    streams, met = Streams(), {}

    def begin(position):
        for number in range(position, 6):
            if number == 3:
                raise ValueError("a broken image")
            yield number

    def through(name, sharing):
        met[name] = []
        with pytest.raises(ValueError, match="a broken image"):
            met[name].extend(streams.through("numbers", begin, sharing))

    in_turns([partial(through, name) for name in "abc"])
    assert met == {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1, 2]}


def test_recent_answers_are_to_the_same_object_and_detail():
    recent, asked = Recent(), []
    one, equal = torch.ones(2), torch.ones(2)

    def answer(given, detail=None):
        return recent.answer(given, detail, lambda: asked.append(1) or len(asked))

    found = [answer(one), answer(one), answer(equal), answer(one, 1), answer(one)]
    assert found == [1, 1, 2, 3, 1]


def test_a_shared_teacher_is_asked_once_for_each_view(tiny):
    asked = []
    model = tiny()
    model.register_forward_hook(lambda *given: asked.append(1))
    views = [torch.rand(8, 1, 8, 8) for _ in range(3)]
    answers = {}

    def ask(teacher, name, sharing):
        for view in views:
            answers.setdefault(name, []).append(teacher(view))
            sharing.next_turn()

    def run(name, sharing):
        teacher = sharing.once("teacher", lambda: Teacher(model, batch_size=8, shared=True))
        ask(teacher, name, sharing)

    in_turns([partial(run, name) for name in "abc"])
    assert len(asked) == 3
    alone = Teacher(model, batch_size=8)
    in_both_types = Teacher(model, batch_size=8, shared=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_both_types(views[0]).dtype == torch.bfloat16
    assert torch.equal(in_both_types(views[0]), alone(views[0]))
    for found in answers.values():
        assert all(torch.equal(z, alone(view)) for z, view in zip(found, views, strict=True))
