"""What state an endpoint is in."""

from llm_engine.config import EndpointSettings
from llm_engine.endpoints import Observed, derive, generation
from llm_engine.records import ReplicaReport
from llm_engine.statuses import EndpointState, ReplicaState

SETTINGS = EndpointSettings(name="m", model="x")


def report(state: ReplicaState, reason: str | None = None, length: int = 0) -> ReplicaReport:
    return ReplicaReport("m", "r", "1", state, reason=reason, max_model_len=length)


def state(**seen):
    status = derive(SETTINGS, Observed(**seen), created=1)
    return status.state, status.reason


def test_wanted_but_not_deployed():
    assert state()[0] is EndpointState.UPDATE_PENDING


def test_being_placed_waiting_for_resources_loading_trying_again():
    assert state(deployed=True)[1] == "a replica is being placed"
    lacking = "needs 4 GPUs, the cluster has 2"
    assert state(deployed=True, lacking=lacking)[1] == f"waiting for resources: {lacking}"
    starting = report(ReplicaState.STARTING)
    assert state(deployed=True, reports=[starting])[1] == "a replica is loading the model"
    failed = report(ReplicaState.FAILED, "no weights")
    found, reason = state(deployed=True, reports=[failed])
    assert found is EndpointState.UPDATE_IN_PROGRESS and reason == "trying again after: no weights"


def test_ready_means_that_a_replica_answered_whatever_the_cluster_says():
    ready = report(ReplicaState.READY, length=512)
    status = derive(SETTINGS, Observed(reports=[ready], deployed=True), created=1)
    assert status.state is EndpointState.READY and status.reason is None
    assert status.replicas_ready == 1 and status.max_model_len == 512


def test_ready_with_fewer_replicas_than_wanted_says_why():
    reports = [report(ReplicaState.READY), report(ReplicaState.FAILED, "killed by SIGKILL")]
    found, reason = state(reports=reports, deployed=True, replicas_wanted=2)
    assert found is EndpointState.READY
    assert reason == "1 of 2 replicas are ready: killed by SIGKILL"


def test_failed_carries_the_engines_words_else_the_last_line_of_the_clusters():
    failed = report(ReplicaState.FAILED, "there is no folder /x.")
    assert state(deployed=True, failed=True, reports=[failed]) == (
        EndpointState.UPDATE_FAILED,
        "there is no folder /x.",
    )
    message = "Traceback ...\n  File ...\nRuntimeError: ValueError: bad architecture\n"
    assert state(deployed=True, failed=True, message=message)[1] == "ValueError: bad architecture"


def test_any_change_of_settings_is_another_generation():
    assert generation(SETTINGS) == generation(EndpointSettings(name="m", model="x"))
    assert generation(SETTINGS) != generation(EndpointSettings(name="m", model="x", max_queue=7))


def test_an_update_that_failed_leaves_the_earlier_version_ready_and_says_so():
    reports = [report(ReplicaState.READY), report(ReplicaState.FAILED, "no weights")]
    found, reason = state(reports=reports, deployed=True, failed=True, generation="2")
    assert found is EndpointState.READY
    assert reason == "the update failed, an earlier version serves on: no weights"


def test_an_update_on_its_way_is_told():
    reports = [report(ReplicaState.READY), report(ReplicaState.STARTING)]
    reason = state(reports=reports, deployed=True, generation="2")[1]
    assert reason == "an earlier version serves while the new one starts: " + (
        "a replica is loading the model"
    )


def test_what_could_not_even_be_deployed_says_why():
    assert state(problem="it cannot be deployed: no") == (
        EndpointState.UPDATE_FAILED,
        "it cannot be deployed: no",
    )


def test_a_replica_that_cannot_be_placed_beside_a_ready_one_is_told():
    reports = [report(ReplicaState.READY)]
    reason = state(reports=reports, deployed=True, replicas_wanted=2)[1]
    assert reason == "1 of 2 replicas are ready: a replica is being placed"
