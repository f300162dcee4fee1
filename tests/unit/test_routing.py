"""Where a request goes."""

from collections import Counter
from dataclasses import replace

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


def taker(name: str, *adapters: str, depth: int = 0, **changes) -> ReplicaReport:
    """A replica that takes adapters, with some in memory."""
    load = Load(running=depth, adapters=adapters)
    defaults = {"weights": "x", "max_adapters": 2, "load": load}
    return ReplicaReport("m", name, "1", ReplicaState.READY, **{**defaults, **changes})


def test_an_adapter_is_asked_where_it_is_in_memory():
    made = balancer(taker("a"), taker("b", "ad"), taker("c"), target_queue_depth=8, max_queue=100)
    picked = {made.choose(made.endpoint("m"), adapter="ad").replica for _ in range(50)}
    assert picked == {"b"}


def test_unless_others_have_clearly_less_to_do():
    busy, idle = taker("a", "ad", depth=5), taker("b")
    made = balancer(busy, idle, target_queue_depth=8, max_queue=100)
    assert made.choose(made.endpoint("m"), adapter="ad").replica == "b"
    made = balancer(replace(busy, load=replace(busy.load, running=4)), idle, target_queue_depth=8)
    assert made.choose(made.endpoint("m"), adapter="ad").replica == "a"


def test_of_those_that_have_it_the_less_loaded_one_is_asked():
    made = balancer(taker("a", "ad", depth=3), taker("b", "ad", depth=1), taker("c"))
    assert made.choose(made.endpoint("m"), adapter="ad").replica == "b"


def test_before_anybody_has_it_all_ingresses_pick_the_same_and_adapters_spread():
    replicas = [taker(f"r{i}") for i in range(8)]
    one = balancer(*replicas, target_queue_depth=16, max_queue=100)
    other = balancer(*reversed(replicas), target_queue_depth=16, max_queue=100)
    homes = set()
    for i in range(100):
        home = one.choose(one.endpoint("m"), adapter=f"adapter-{i}").replica
        assert other.choose(other.endpoint("m"), adapter=f"adapter-{i}").replica == home
        homes.add(home)
    assert len(homes) == 8


def test_replicas_of_another_version_are_not_asked_for_an_adapter():
    without, others = taker("a", max_adapters=0), taker("b", weights="y")
    made = balancer(without, others, taker("c", depth=90), max_queue=100)
    assert made.choose(made.endpoint("m"), adapter="ad").replica == "c"
    made = balancer(without, others)
    with pytest.raises(Unavailable, match="being replaced"):
        made.choose(made.endpoint("m"), adapter="ad")
    assert made.choose(made.endpoint("m"))


def test_a_suspect_and_a_full_one_are_left_alone_though_they_have_it():
    made = balancer(taker("a", "ad"), taker("b"), max_queue=2)
    made.suspect(taker("a"))
    assert made.choose(made.endpoint("m"), adapter="ad").replica == "b"
    made = balancer(taker("a", "ad"), taker("b"), max_queue=2, target_queue_depth=100)
    for _ in range(2):
        made.acquire(taker("a"))
    assert made.choose(made.endpoint("m"), adapter="ad").replica == "b"
