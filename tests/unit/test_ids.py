"""Ids sort by the time at which they were made."""

import time
from concurrent.futures import ThreadPoolExecutor

from llm_engine.ids import new_id


def test_ids_ascend_also_within_a_millisecond():
    made = [new_id("x") for _ in range(20_000)]
    assert made == sorted(set(made))


def test_threads_make_no_id_twice():
    with ThreadPoolExecutor(8) as pool:
        made = [each for part in pool.map(lambda _: [new_id("x") for _ in range(2000)], range(8))
                for each in part]  # fmt: skip
    assert len(set(made)) == len(made)


def test_an_id_tells_when_it_was_made():
    made = new_id("file", "-")
    assert made.startswith("file-") and len(made) == 5 + 26
    assert abs(int(made[5:17], 16) / 1000 - time.time()) < 60


def test_ids_ascend_when_the_clock_goes_back(monkeypatch):
    first = new_id("x")
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    assert new_id("x") > first
