"""How long an engine's steps take, learned from those that were seen."""

import pytest

from llm_engine.engine.steps import StepTimes


def test_nothing_is_known_until_steps_of_two_sizes_were_seen():
    steps = StepTimes()
    assert steps.line() == (0.0, 0.0)
    for _ in range(100):
        steps.seen(4, 0.01)
    assert steps.line() == (0.0, 0.0)


@pytest.mark.parametrize("sizes", [(1, 2), (1, 4, 16, 64), (5, 40, 200, 700, 3000)], ids=str)
def test_a_straight_line_is_found(sizes: tuple[int, ...]):
    steps = StepTimes()
    for size in sizes * 50:
        steps.seen(size, 0.003 + 0.0002 * size)
    assert steps.line() == pytest.approx((0.003, 0.0002))


def test_a_step_that_hung_changes_little():
    steps = StepTimes()
    for size in (1, 8) * 50:
        steps.seen(size, 0.01)
    steps.seen(8, 60.0)
    base, each = steps.line()
    assert base == pytest.approx(0.01, rel=0.02) and each < 0.0002


def test_what_was_seen_long_ago_is_forgotten():
    now = [0.0]
    steps = StepTimes(lambda: now[0])
    steps.seen(1, 1.0)
    steps.seen(8, 2.0)
    now[0] = 601.0
    steps.seen(1, 0.01)
    assert steps.line() == (0.0, 0.0)
    steps.seen(8, 0.017)
    assert steps.line() == pytest.approx((0.009, 0.001))


def test_engines_whose_steps_grow_shorter_cost_nothing_more():
    steps = StepTimes()
    steps.seen(1, 0.02)
    steps.seen(8, 0.01)
    base, each = steps.line()
    assert each == 0.0 and 0.01 <= base <= 0.02


def test_no_step_no_time():
    steps = StepTimes()
    steps.seen(0, 1.0)
    steps.seen(3, 0.0)
    assert steps.line() == (0.0, 0.0)
