import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.objective.schedules import SCHEDULES, exponential, step

ends = st.floats(0.1, 100)


@pytest.mark.parametrize("name", SCHEDULES)
@given(start=ends, end=ends)
def test_a_schedule_leaves_from_its_start_and_arrives_at_its_end(name, start, end):
    assert SCHEDULES[name](0.0, start, end) == pytest.approx(start)
    assert SCHEDULES[name](1.0, start, end) == pytest.approx(end)


@pytest.mark.parametrize("name", SCHEDULES)
@given(start=ends, end=ends, first=st.floats(0, 1), second=st.floats(0, 1))
def test_a_schedule_moves_one_way_only(name, start, end, first, second):
    early, late = sorted((first, second))
    move = SCHEDULES[name](late, start, end) - SCHEDULES[name](early, start, end)
    assert move * (end - start) >= -1e-6


@given(start=ends, end=ends, progress=st.floats(0, 0.9))
def test_an_exponential_changes_by_the_same_factor_everywhere(start, end, progress):
    factor = exponential(progress + 0.1, start, end) / exponential(progress, start, end)
    assert math.log(factor) == pytest.approx(0.1 * math.log(end / start), abs=1e-9)


def test_a_cosine_is_symmetric_about_its_middle():
    cosine = SCHEDULES["cosine"]
    for progress in (0.0, 0.1, 0.3, 0.5):
        assert cosine(progress, 8, 2) + cosine(1 - progress, 8, 2) == pytest.approx(10)


def test_steps_are_level_between_their_edges():
    values = [step(i / 1000, 5.0, 1.0) for i in range(1001)]
    assert sorted(set(values)) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [values.index(v) for v in (5.0, 4.0, 3.0, 2.0, 1.0)] == [0, 200, 400, 600, 800]


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="positive ends"):
        exponential(0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match="at least one step"):
        step(0.5, 1.0, 2.0, steps=0)
