"""How many requests batches may have under way."""

from dataclasses import replace

import pytest

from llm_engine.background import FEWEST, PRIORITY, URGENT, room
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


def given(*loads: Load, online: int = 0, priority: int = PRIORITY, most: int = 1) -> int:
    return room(replace(ENDPOINT, max_replicas=most), replicas(*loads), online, priority)


def test_a_model_that_sleeps_is_woken_by_one_request():
    assert given() == 1


def test_an_idle_engine_is_filled_until_requests_wait_in_it():
    allowed, steps = 0, []
    for _ in range(12):  # an engine that can run 64 at once
        allowed = given(Load(running=min(allowed, 64), waiting=max(0, allowed - 64)))
        steps.append(allowed)
    assert steps[0] == FEWEST
    assert steps == sorted(steps)
    assert steps[-1] == 64 + 32, "what it can run, and half as much that waits"


@pytest.mark.parametrize(("online", "left"), [(1, 8), (8, 8), (12, 4), (16, 1), (500, 1)])
def test_batches_leave_room_to_those_who_wait(online: int, left: int):
    assert given(Load(running=64), online=online) == left


def test_batches_start_no_replica_for_work_that_nobody_waits_for():
    # The scaler adds one where the queues are longer than 2 x 16.
    assert given(Load(running=16), Load(running=16), most=4) == 32


def test_an_urgent_batch_may_fill_the_queue():
    assert given(Load(running=16), online=20, priority=URGENT, most=4) == 128
