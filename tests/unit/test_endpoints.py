"""What state an endpoint is in."""

from typing import Any

import pytest

from llm_engine.config import EndpointSettings
from llm_engine.endpoints import MOST_FAILURES, Observed, derive, generation
from llm_engine.records import EndpointRecord, EndpointStatus, Phases, ReplicaReport
from llm_engine.statuses import EndpointState, ReplicaState

SETTINGS = EndpointSettings(name="m", model="x")
NEW, OLD = generation(SETTINGS), "earlier"
READY, STARTING, FAILED = ReplicaState.READY, ReplicaState.STARTING, ReplicaState.FAILED


def report(state: ReplicaState, version: str = NEW, **facts: Any) -> ReplicaReport:
    return ReplicaReport("m", f"{version}-{state}", version, state, **facts)


def status(settled: bool = False, state: str = "UPDATE_PENDING", **seen: Any) -> EndpointStatus:
    record = EndpointRecord(
        "ep_1", "m", "me", "api", SETTINGS.model_dump(mode="json"), EndpointState(state),
        created_at=1, requested_at=100, updated_at=1, settled=settled,
    )  # fmt: skip
    return derive(record, SETTINGS, Observed(**{"replicas_wanted": 1} | seen), now=200)


def told(**seen: Any) -> tuple[EndpointState, str | None]:
    found = status(**seen)
    return found.state, found.reason


def test_wanted_but_not_deployed():
    assert told() == (EndpointState.UPDATE_PENDING, None)


def test_being_placed_waiting_for_resources_loading_warming_trying_again():
    def progress(**seen: Any) -> str | None:
        state, reason = told(deployed=True, **seen)
        assert state is EndpointState.UPDATE_IN_PROGRESS
        return reason

    assert progress() == "a replica is being placed"
    lacking = "needs 4 GPUs, the cluster has 2"
    assert progress(lacking=lacking) == f"waiting for resources: {lacking}"
    assert progress(reports=[report(STARTING)]) == "a replica is loading the model"
    assert progress(reports=[report(STARTING, loaded_at=5)]) == "a replica is warming up"
    assert progress(failures=1, last_error="no weights") == "trying again after: no weights"


def test_ready_means_that_a_replica_of_this_version_answered_whatever_the_cluster_says():
    found = status(reports=[report(READY, max_model_len=512)], deployed=True, failed=True)
    assert (found.state, found.reason) == (EndpointState.READY, None)
    assert found.replicas_ready == 1 and found.max_model_len == 512


def test_ready_with_fewer_replicas_than_wanted_says_why():
    found = told(
        reports=[report(READY)], deployed=True, replicas_wanted=2, failures=1, last_error="SIGKILL"
    )
    reason = "1 of 2 replicas are ready: trying again after: SIGKILL"
    assert found == (EndpointState.READY, reason)


def test_failed_carries_the_engines_words_else_the_last_line_of_the_clusters():
    assert told(deployed=True, failed=True, last_error="there is no folder /x.") == (
        EndpointState.UPDATE_FAILED,
        "there is no folder /x.",
    )
    message = "Traceback ...\n  File ...\nRuntimeError: ValueError: bad architecture\n"
    assert told(deployed=True, failed=True, message=message)[1] == "ValueError: bad architecture"


def test_what_no_node_has_is_a_failure_once_it_was_waited_for():
    starved = "needs 4 GPUs, the cluster has 2"
    assert told(deployed=True, starved=starved) == (EndpointState.UPDATE_FAILED, starved)


def test_replicas_that_fail_one_after_the_other_are_a_failure():
    seen = {"deployed": True, "last_error": "killed"}
    assert told(failures=MOST_FAILURES - 1, **seen)[0] is EndpointState.UPDATE_IN_PROGRESS
    assert told(failures=MOST_FAILURES, **seen) == (EndpointState.UPDATE_FAILED, "killed")


def test_an_update_that_failed_leaves_the_earlier_version_serving_and_says_so():
    found = status(
        reports=[report(READY, OLD)], deployed=True, failed=True, last_error="no weights"
    )
    assert found.state is EndpointState.UPDATE_FAILED
    assert found.reason == "the update failed, an earlier version serves on: no weights"
    assert found.replicas_ready == 1


def test_an_update_on_its_way_is_told():
    state, reason = told(reports=[report(READY, OLD), report(STARTING)], deployed=True)
    assert state is EndpointState.UPDATE_IN_PROGRESS
    assert reason == (
        "an earlier version serves while the new one starts: a replica is loading the model"
    )


def test_asleep_is_ready():
    state, reason = told(deployed=True, replicas_wanted=0, settled=True)
    assert state is EndpointState.READY and reason is not None and reason.startswith("asleep")


def test_what_is_being_deleted_stays_so_whatever_serves():
    found = status(state="DELETE_IN_PROGRESS", reports=[report(READY)], deployed=True)
    assert found.state is EndpointState.DELETE_IN_PROGRESS


def test_what_could_not_even_be_deployed_says_why():
    assert told(problem="it cannot be deployed: no") == (
        EndpointState.UPDATE_FAILED,
        "it cannot be deployed: no",
    )


def test_engine_settings_make_another_generation_and_scaling_does_not():
    assert NEW == generation(EndpointSettings(name="m", model="x"))
    assert NEW != generation(EndpointSettings(name="m", model="x", max_queue=7))
    light = {"autoscaling": {"max_replicas": 3}, "public": False, "fallback": "other"}
    assert NEW == generation(EndpointSettings(name="m", model="x", **light))


@pytest.mark.parametrize(
    ("times", "phases"),
    [
        ({}, Phases(queued=2)),
        ({"began_at": 105}, Phases(2, 3)),
        ({"began_at": 105, "loaded_at": 110}, Phases(2, 3, 5)),
        ({"began_at": 105, "loaded_at": 110, "ready_at": 111}, Phases(2, 3, 5, 1)),
    ],
)
def test_phases_are_measured_on_the_replica_that_has_come_furthest(times, phases):
    reports = [report(STARTING, **times)] if times else []
    found = status(reports=reports, deployed=True, deployed_at=102)
    assert found.phases == phases
    assert found.phases.total == (11 if phases.warming else None)


def test_an_eta_is_what_such_a_start_usually_takes_less_what_has_passed():
    assert status(deployed=True, began_at=195, usual_s=14).eta_s == 9
    assert status(deployed=True, began_at=100, usual_s=14).eta_s == 0
    assert status(deployed=True, began_at=195).eta_s is None
    assert status(reports=[report(READY)], deployed=True, began_at=195, usual_s=14).eta_s is None
