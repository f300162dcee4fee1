"""Where a request goes."""

from collections import Counter

import pytest

from llm_engine.errors import NotFound, Overloaded, Unavailable
from llm_engine.records import EndpointStatus, Load, ReplicaReport, RoutingTable
from llm_engine.routing import SUSPECT_S, Balancer
from llm_engine.statuses import EndpointState, ReplicaState


def endpoint(**changes) -> EndpointStatus:
    defaults = {"name": "m", "model": "x", "task": "generate", "state": EndpointState.READY}
    return EndpointStatus(**{**defaults, "max_queue": 4, **changes})


def replica(name: str, depth: int = 0) -> ReplicaReport:
    return ReplicaReport("m", name, "1", ReplicaState.READY, load=Load(running=depth))


def balancer(*replicas: ReplicaReport, clock=lambda: 0.0, **changes) -> Balancer:
    made = Balancer(clock=clock)
    made.update(RoutingTable(1, {"m": endpoint(**changes)}, {"m": replicas}))
    return made


def test_the_less_loaded_of_two_is_chosen():
    made = balancer(replica("a", 3), replica("b", 1))
    assert made.choose(made.endpoint("m")).replica == "b"


def test_what_is_in_flight_here_counts_at_once():
    made = balancer(replica("a"), replica("b"))
    chosen = Counter()
    for _ in range(6):
        each = made.choose(made.endpoint("m"))
        made.acquire(each)
        chosen[each.replica] += 1
    assert chosen == {"a": 3, "b": 3}


def test_a_report_that_includes_our_own_requests_does_not_count_them_twice():
    made = balancer(replica("a"))
    for _ in range(3):
        made.acquire(replica("a"))
    made.update(RoutingTable(2, {"m": endpoint()}, {"m": (replica("a", 3),)}))
    assert made.cost(replica("a")) == 3
    made.update(RoutingTable(3, {"m": endpoint()}, {"m": (replica("a", 5),)}))
    assert made.cost(replica("a")) == 5


def test_a_full_queue_is_refused_and_frees_up():
    made = balancer(replica("a"), max_queue=1)
    made.acquire(replica("a"))
    with pytest.raises(Overloaded) as error:
        made.choose(made.endpoint("m"))
    assert error.value.retry_after and "max_queue" in error.value.message
    made.release(replica("a"))
    assert made.choose(made.endpoint("m"))


def test_one_free_replica_among_full_ones_is_found():
    full = [replica(f"full{i}") for i in range(50)]
    made = balancer(*full, replica("free"))
    for each in full * 4:
        made.acquire(each)
    assert made.choose(made.endpoint("m")).replica == "free"


def test_a_suspect_is_left_alone_for_a_while():
    now = [0.0]
    made = balancer(replica("a"), replica("b", 3), clock=lambda: now[0])
    made.suspect(replica("a"))
    assert made.choose(made.endpoint("m")).replica == "b"
    now[0] = SUSPECT_S + 1
    made.update(made.table)
    assert made.choose(made.endpoint("m")).replica == "a"


def test_a_suspect_is_better_than_nobody():
    made = balancer(replica("a"))
    made.suspect(replica("a"))
    assert made.choose(made.endpoint("m")).replica == "a"
    with pytest.raises(Unavailable):
        made.choose(made.endpoint("m"), exclude={"a"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": EndpointState.UPDATE_IN_PROGRESS, "reason": "a replica is loading"}, "loading"),
        ({"state": EndpointState.UPDATE_FAILED, "reason": "out of memory"}, "out of memory"),
        ({"state": EndpointState.READY}, "being replaced"),
    ],
)
def test_no_replica_says_why_and_when_to_come_back(changes, said):
    made = balancer(**changes)
    with pytest.raises(Unavailable) as error:
        made.choose(made.endpoint("m"))
    assert said in error.value.message and error.value.retry_after == 5


def test_an_endpoint_that_is_gone():
    with pytest.raises(NotFound) as unknown:
        balancer(replica("a")).endpoint("other")
    assert unknown.value.code == "model_not_found"


def test_what_is_remembered_of_replicas_is_bounded():
    made = balancer()
    for i in range(1000):
        one = replica(f"r{i}")
        made.update(RoutingTable(i, {"m": endpoint()}, {"m": (one,)}))
        made.acquire(one)
        made.release(one)
        made.suspect(one)
    made.update(RoutingTable(0, {}, {}))
    assert not made._in_flight and not made._others and not made._suspects
