"""How many requests batches may have under way."""

from dataclasses import replace

import pytest

from llm_engine.background import FEWEST, HARM, PRIORITY, RECENT_S, URGENT, Online, room
from llm_engine.records import EndpointStatus, Load, ReplicaReport
from llm_engine.statuses import EndpointState, ReplicaState

ENDPOINT = EndpointStatus(
    "m", "x", "generate", EndpointState.READY, max_queue=256, target_queue_depth=16, max_replicas=1
)


def replicas(*loads: Load) -> list[ReplicaReport]:
    return [
        ReplicaReport("m", f"r{i}", "1", ReplicaState.READY, load=load)
        for i, load in enumerate(loads)
    ]


def busy(running: int, waiting: int = 0) -> Load:
    """With batches and nobody else."""
    return Load(running, waiting, batches=running + waiting)


def given(*loads: Load, online: int = 0, priority: int = PRIORITY, most: int = 1) -> int:
    return room(replace(ENDPOINT, max_replicas=most), replicas(*loads), online, priority)


def test_a_model_that_sleeps_is_woken_by_one_request():
    assert given() == 1


def test_an_idle_engine_is_filled_until_requests_wait_in_it():
    allowed, steps = 0, []
    for _ in range(12):  # an engine that can run 64 at once
        allowed = given(busy(min(allowed, 64), max(0, allowed - 64)))
        steps.append(allowed)
    assert steps[0] == FEWEST
    assert steps == sorted(steps)
    assert steps[-1] == 64 + 32, "what it can run, and half as much that waits"


@pytest.mark.parametrize(("online", "left"), [(1, 8), (8, 8), (12, 4), (16, 1), (500, 1)])
def test_batches_leave_room_to_those_who_wait(online: int, left: int):
    assert given(busy(64), online=online) == left


def test_in_an_idle_engine_a_few_slots_stay_free():
    assert given(Load(slots=64)) == 60
    assert given(Load(slots=128), Load(slots=16), most=2) == 120 + 15
    assert given(Load(slots=1)) == 1
    assert given(Load(slots=1024)) == 192, "of the 256 that its replica holds"
    assert given(Load(slots=64), most=4) == 16, "more would start replicas"


def test_batches_make_others_wait_by_a_tenth_at_most():
    slow = Load(running=4, step_s=0.004, request_s=0.0002)  # each request more is felt
    beside = given(slow, online=4)
    step = slow.step_s + 4 * slow.request_s
    assert beside == 2 and beside * slow.request_s <= HARM * step
    wide = Load(running=4, step_s=0.02, request_s=0.00001)
    assert given(wide, online=4) == 192, "as many as may wait"
    assert given(Load(running=4, step_s=0.001, request_s=0.001), online=1) == 1, "never none"


def test_of_two_replicas_each_takes_what_does_no_harm():
    slow = Load(running=4, step_s=0.004, request_s=0.0002)
    assert given(slow, slow, online=8, most=2) == 4


def test_where_replicas_could_be_added_batches_do_not_add_them():
    wide = Load(running=4, step_s=0.02, request_s=0.00001)
    assert given(wide, online=4, most=2) == 12


def test_others_that_came_by_another_gateway_count():
    known = {"step_s": 0.004, "request_s": 0.0002}
    assert given(Load(running=12, batches=8, **known)) == 2
    assert given(Load(running=12, batches=12, **known)) > 12


def test_who_asked_a_moment_ago_will_ask_again():
    now = [0.0]
    online = Online(lambda: now[0])
    for _ in range(4):
        online.enter()
    now[0] = 10.0
    assert online.recent == 4, "they are still under way"
    for _ in range(4):
        online.leave()
    now[0] += RECENT_S - 0.1
    assert online.recent == 4
    now[0] += 0.2
    assert online.recent == 0
    online.enter()
    assert online.recent == 1


def test_batches_start_no_replica_for_work_that_nobody_waits_for():
    # The scaler adds one where the queues are longer than 2 x 16.
    assert given(busy(16), busy(16), most=4) == 32


def test_an_urgent_batch_may_fill_the_queue():
    assert given(Load(running=16), online=20, priority=URGENT, most=4) == 192
