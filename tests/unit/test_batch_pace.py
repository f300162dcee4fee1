"""A batch takes its share of a model's room, and hurries only as its deadline nears."""

import asyncio

import pytest

from llm_engine.background import PRIORITY, URGENT
from llm_engine.batches.pace import FIRST, Pace, priority, share


@pytest.mark.parametrize(
    ("room", "batches", "given"), [(64, 1, 64), (64, 3, 21), (1, 4, 1), (0, 1, 1), (900, 2, 256)]
)
def test_the_room_is_shared_and_everybody_has_at_least_one(room, batches, given):
    assert share(room, batches, 256) == given


@pytest.mark.parametrize(
    ("left_s", "rows", "rows_per_s", "expected"),
    [
        (3600, 100, 1.0, PRIORITY),  # plenty
        (200, 100, 1.0, PRIORITY),  # twice what is needed
        (150, 100, 1.0, 5),  # it gets tight
        (100, 100, 1.0, URGENT),  # just what is needed
        (10, 100, 1.0, URGENT),
        (-5, 100, 1.0, URGENT),
        (80000, 100, 0.0, PRIORITY),  # no rate is known: by the window
        (4000, 100, 0.0, URGENT),
    ],
)
def test_urgency_comes_from_the_time_and_the_work_that_is_left(left_s, rows, rows_per_s, expected):
    assert priority(left_s, 86400, rows, rows_per_s) == expected


async def test_what_the_gateway_tells_is_what_is_taken():
    pace = Pace(256)
    assert pace.limit == FIRST
    pace.answered(100)
    assert pace.limit == 100
    pace.batches = 4
    pace.answered(100)
    assert pace.limit == 25


async def test_without_word_from_the_gateway_it_grows_slowly_and_halves_at_once():
    now = [0.0]
    pace = Pace(16, clock=lambda: now[0])
    for _ in range(FIRST + 1):
        pace.answered(None)
    assert pace.limit == FIRST + 1
    for _ in range(1000):
        pace.answered(None)
    assert pace.limit == 16
    for _ in range(10):
        pace.refused()  # all of the same moment
    assert pace.limit == 8
    for now[0] in range(2, 20):
        pace.refused()
    assert pace.limit == 1


async def test_no_more_than_the_limit_have_a_slot_and_who_had_one_comes_first():
    pace = Pace(2)
    await pace.slot()
    await pace.slot()
    order: list[str] = []

    async def ask(name: str, again: bool) -> None:
        await pace.slot(again)
        order.append(name)

    asking = [asyncio.create_task(ask("new", False)), asyncio.create_task(ask("old", True))]
    await asyncio.sleep(0)
    assert order == [] and pace.in_flight == 2
    pace.release()
    await asyncio.sleep(0)
    assert order == ["old"]
    pace.release()
    await asyncio.gather(*asking)
    assert order == ["old", "new"] and pace.in_flight == 2


async def test_a_row_that_is_cut_leaves_its_slot_to_the_next():
    pace = Pace(1)
    await pace.slot()
    waiting = asyncio.create_task(pace.slot())
    await asyncio.sleep(0)
    pace.release()  # the slot is its own from here on, though it has not run yet
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert pace.in_flight == 0


async def test_while_nobody_can_answer_nobody_is_asked():
    pace = Pace(8)
    pace.close(0.05)
    began = asyncio.get_running_loop().time()
    await pace.slot()
    assert asyncio.get_running_loop().time() - began >= 0.045
