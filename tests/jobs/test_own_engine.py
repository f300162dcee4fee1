"""A batch with engines of its own: an endpoint that is there for as long as its rows run.

The tests stand in for the controller, which would make the endpoint come true.
"""

from collections.abc import Iterator

import pytest

from llm_engine.config import EndpointSettings
from llm_engine.ids import new_id
from llm_engine.statuses import BatchState, EndpointState
from tests.support.batches import Bench, row
from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread, fake_endpoint

pytestmark = pytest.mark.slow

SLOW = {"token_delay_s": 0.05}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with GatewayThread([], sections={"batches": {"lease_s": 2}}) as gateway:
        bench = Bench(gateway.settings, [gateway.url])
        yield bench
        bench.close()


def own(bench, **engine):
    options = {"own_engine": {"model": "none", "engine": "fake"} | engine}
    return bench.batch([row(i, model="their-name") for i in range(10)], options=options)


def settle(bench, batch, state, reason=None):
    def made():
        return any(e.name == batch.id for e in bench.store.endpoints.all())

    eventually(made, 20, 0.05, "no endpoint was made")
    endpoint = bench.store.endpoints.get(batch.id)
    assert endpoint.origin == "batch" and not EndpointSettings(**endpoint.spec).public
    bench.store.endpoints.observe(endpoint, state, reason, True, None)


def test_a_batch_with_engines_of_its_own_waits_for_them_and_removes_them():
    name = new_id("batch")
    with GatewayThread([fake_endpoint(name)]) as gateway:
        bench = Bench(gateway.settings, [gateway.url])
        options = {"own_engine": {"model": "none", "engine": "fake"}}
        rows = [row(i, model="their-name") for i in range(10)]
        batch = bench.batch(rows, id=name, options=options)
        with bench.start(batch) as job:
            eventually(
                lambda: "is starting" in (bench.get(batch).reason or ""), 20, 0.05, "no reason"
            )
            settle(bench, batch, EndpointState.READY)
            assert job.wait(30) == 0
        record = bench.get(batch)
        assert (record.state, record.completed, record.reason) == ("completed", 10, None)
        bodies = [line["response"]["body"] for line in bench.results(batch)[0]]
        assert {body["model"] for body in bodies} == {"their-name"}
        endpoint = bench.store.endpoints.get(name)
        assert endpoint.state is EndpointState.DELETE_IN_PROGRESS
        bench.close()


def test_engines_that_cannot_start_fail_the_batch_with_their_reason(bench):
    batch = own(bench)
    with bench.start(batch) as job:
        settle(bench, batch, EndpointState.UPDATE_FAILED, "needs 4 GPUs, the cluster has 2")
        assert job.wait(30) == 0
    record = bench.get(batch)
    assert record.state is BatchState.FAILED and "needs 4 GPUs" in record.reason
    assert [error["code"] for error in record.errors] == ["model_unavailable"]
    assert bench.store.endpoints.get(batch.id).state is EndpointState.DELETE_IN_PROGRESS


def test_engines_that_fail_half_way_leave_what_has_finished():
    name = new_id("batch")
    with GatewayThread([fake_endpoint(name, vllm_args=SLOW)]) as gateway:
        bench = Bench(gateway.settings, [gateway.url])
        options = {"own_engine": {"model": "none", "engine": "fake"}}
        rows = [row(i, model="their-name", max_tokens=20) for i in range(300)]
        batch = bench.batch(rows, id=name, options=options)
        with bench.start(batch) as job:
            settle(bench, batch, EndpointState.READY)
            eventually(lambda: bench.get(batch).completed, 30, 0.05, "no progress")
            settle(bench, batch, EndpointState.UPDATE_FAILED, "its GPU is gone")
            assert job.wait(30) == 0
        record = bench.get(batch)
        output, errors = bench.results(batch)
        assert record.state is BatchState.COMPLETED and "its GPU is gone" in record.reason
        assert len(output) == record.completed > 0 and len(output) + len(errors) == 300
        assert {line["error"]["code"] for line in errors} == {"model_unavailable"}
        bench.close()


def test_a_cancelled_batch_waits_for_no_engine(bench):
    batch = own(bench)
    with bench.start(batch) as job:
        settle(bench, batch, EndpointState.UPDATE_IN_PROGRESS)
        bench.store.batches.ask_cancel(batch.id)
        assert job.wait(30) == 0
    assert bench.get(batch).state is BatchState.CANCELLED
    assert bench.store.endpoints.get(batch.id).state is EndpointState.DELETE_IN_PROGRESS
