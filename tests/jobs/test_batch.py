"""One batch from its input file to its results: `python -m jobs.batch` against a real gateway."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from llm_engine import patience
from llm_engine.batches.job import Job
from llm_engine.errors import StorageUnavailable
from llm_engine.ids import new_id
from llm_engine.records import Usage
from llm_engine.statuses import BatchState
from tests.support.batches import Bench, batch_record, jsonl, row
from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread, fake_endpoint
from tests.support.upstream import Upstream, failing, reply, streaming

pytestmark = pytest.mark.slow

SLOW = {"token_delay_s": 0.05}  # a row of two tokens takes a tenth of a second


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    endpoints = [
        fake_endpoint("fake"),
        fake_endpoint("slow", vllm_args=SLOW),
        fake_endpoint("vectors", task="embed"),
    ]
    sections = {"batches": {"lease_s": 2, "max_rows": 2000}}
    with GatewayThread(endpoints, sections=sections) as gateway:
        bench = Bench(gateway.settings, ["http://127.0.0.1:9", gateway.url])  # one that is away
        yield bench
        bench.close()


def text_of(line):
    return line["response"]["body"]["choices"][0]["message"]["content"]


def parts_of(bench, batch):
    return [each.key for each in bench.storage.list(f"batches/{batch.id}/parts/")]


def test_every_row_has_its_answer_in_the_inputs_order(bench):
    batch = bench.batch((row(i) for i in range(300)), metadata={"a": "b"})
    code, printed, record = bench.run(batch)
    assert code == 0 and "300 rows done, 0 failed" in printed, printed
    assert (record.state, record.total, record.completed) == (BatchState.COMPLETED, 300, 300)
    assert record.usage == Usage(300, 0, 600, 0) and record.model == "fake"
    output, errors = bench.results(batch)
    assert errors == [] and record.error_file_id is None
    assert [line["custom_id"] for line in output] == [f"row-{i}" for i in range(300)]
    assert [text_of(line).split()[0] for line in output] == [str(i) for i in range(300)]
    assert len({line["id"] for line in output}) == 300
    assert all(line["response"]["request_id"] for line in output)
    order = ["validating", "in_progress", "finalizing", "completed"]
    assert sorted(record.times, key=record.times.__getitem__) == order
    assert parts_of(bench, batch) == [] and bench.store.batches.parts(batch.id) == []


def test_results_are_files_of_their_owner_with_the_expiry_that_was_asked_for(bench):
    batch = bench.batch([row(1)], options={"output_expires_after_s": 3600})
    _, _, record = bench.run(batch)
    file = bench.store.files.get(record.output_file_id)
    assert (file.owner, file.purpose) == ("ann", "batch_output")
    assert file.filename == f"{batch.id}_output.jsonl"
    assert file.expires_at - file.created_at == 3600
    assert bench.storage.stat(file.key).bytes == file.bytes
    manifest = json.loads(b"".join(bench.storage.read(f"batches/{batch.id}/manifest.json")))
    assert manifest["files"] == {file.filename: file.key}
    assert manifest["state"] == "completed"


def test_a_bad_row_is_an_error_line_and_hurts_no_other(bench):
    rows = [row(i) for i in range(20)]
    rows[7]["body"]["temperature"] = 3
    batch = bench.batch(rows)
    code, _, record = bench.run(batch)
    assert (code, record.state, record.completed, record.failed) == (0, "completed", 19, 1)
    output, errors = bench.results(batch)
    assert [line["custom_id"] for line in errors] == ["row-7"] and len(output) == 19
    assert errors[0]["response"]["status_code"] == 400 and errors[0]["error"] is None
    assert errors[0]["response"]["body"]["error"]["param"] == "temperature"


def test_where_all_rows_fail_there_is_no_output_file(bench):
    batch = bench.batch([row(i, temperature=3) for i in range(3)])
    _, _, record = bench.run(batch)
    assert (record.state, record.output_file_id, record.failed) == ("completed", None, 3)
    assert record.errors == [] and len(bench.results(batch)[1]) == 3


def test_embeddings_are_a_batch_too(bench):
    rows = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/embeddings",
         "body": {"model": "vectors", "input": ["a", "b"]}}
        for i in range(5)
    ]  # fmt: skip
    batch = bench.batch(rows, endpoint="/v1/embeddings")
    _, _, record = bench.run(batch)
    assert (record.state, record.completed) == ("completed", 5)
    assert len(bench.results(batch)[0][0]["response"]["body"]["data"]) == 2


# -- input that is wrong


def failed_with(bench, batch):
    code, printed, record = bench.run(batch)
    assert (code, record.state) == (0, BatchState.FAILED), printed
    assert record.reason and "Traceback" not in printed
    assert record.output_file_id is record.error_file_id is None
    return [(error["code"], error["param"], error["line"]) for error in record.errors]


def test_a_file_with_mistakes_fails_as_a_whole(bench):
    batch = bench.batch(jsonl([row(0), row(0)]) + b"oops\n")
    found = failed_with(bench, batch)
    assert found == [("duplicate_custom_id", "custom_id", 2), ("invalid_json_line", None, 3)]


@pytest.mark.parametrize("file", ["file-none", "somebody-elses", "expired"])
def test_a_file_that_is_not_theirs_does_not_exist(bench, file):
    if file == "somebody-elses":
        file = bench.file(jsonl([row()]), owner="bob")
    batch = bench.batch(b"", input_file_id=file)
    assert failed_with(bench, batch) == [("invalid_request", "file_id", None)]


def test_who_sees_all_may_use_every_file(bench):
    file = bench.file(jsonl([row()]), owner="bob")
    _, _, record = bench.run(bench.batch(b"", input_file_id=file, sees_all=True))
    assert record.state is BatchState.COMPLETED


def test_an_unknown_model_is_told_with_its_line(bench):
    batch = bench.batch(b"\n" + jsonl([row(0, model="gone/model")]))
    assert failed_with(bench, batch) == [("model_not_found", "body.model", 2)]


def test_too_many_rows_and_too_large_files_are_refused(bench):
    assert failed_with(bench, bench.batch(map(row, range(2001)))) == [("too_many_rows", None, 2001)]
    tight = bench.settings.batches.model_copy(update={"max_file_bytes": 100})
    small = Bench(bench.settings.model_copy(update={"batches": tight}), bench.gateways)
    assert failed_with(small, small.batch([row()])) == [("file_too_large", "file_id", None)]
    small.close()


def test_bytes_that_are_gone_from_under_the_file_fail_the_batch(bench):
    batch = bench.batch([row()])
    bench.storage.delete(bench.store.files.get(batch.input_file_id).key)
    assert failed_with(bench, batch) == [("invalid_request", "file_id", None)]


# -- what ends a batch early


def run_until(bench, batch, rows, then):
    """Start it, call `then` once so many rows are durable, and see it to its end."""
    with bench.start(batch) as job:
        eventually(lambda: bench.get(batch).completed >= rows, 30, 0.05, "no progress")
        then(job)
        printed, _ = job.communicate(timeout=30)
    return job.returncode, printed, bench.get(batch)


def test_a_cancelled_batch_keeps_what_has_finished(bench):
    batch = bench.batch([row(i, model="slow") for i in range(400)])
    code, _, record = run_until(
        bench, batch, 20, lambda _: bench.store.batches.ask_cancel(batch.id)
    )
    assert (code, record.state) == (0, BatchState.CANCELLED)
    output, errors = bench.results(batch)
    assert 20 <= len(output) == record.completed < 400 and errors == []


def test_a_batch_that_is_cancelled_before_it_begins_has_no_results(bench):
    batch = bench.batch([row()])
    bench.store.batches.ask_cancel(batch.id)
    code, _, record = bench.run(batch)
    assert (code, record.state, record.output_file_id) == (0, BatchState.CANCELLED, None)


@pytest.mark.slow
def test_when_the_window_closes_unfinished_rows_become_errors(bench):
    rows = [row(i, model="slow", max_tokens=30) for i in range(1500)]
    batch = bench.batch(rows, window_s=6.0)
    code, _, record = bench.run(batch)
    assert (code, record.state) == (0, BatchState.EXPIRED)
    output, errors = bench.results(batch)
    assert 0 < len(output) < 1500 and len(output) + len(errors) == 1500
    assert {line["custom_id"] for line in output + errors} == {f"row-{i}" for i in range(1500)}
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}
    assert (record.completed, record.failed) == (len(output), len(errors))


def test_an_input_that_is_deleted_while_it_runs_leaves_what_has_finished(bench):
    rows = [
        row(i, model="slow", messages=[{"role": "user", "content": "x" * 4000}]) for i in range(600)
    ]
    batch = bench.batch(rows)

    def delete(job):
        job.send_signal(signal.SIGTERM)
        job.wait(20)
        bench.storage.delete(bench.store.files.remove(batch.input_file_id).key)

    code, _, _ = run_until(bench, batch, 10, delete)
    assert code == 1
    bench.store.batches.release(bench.get(batch), "it has ended")
    code, printed, record = bench.run(batch)
    assert (code, record.state) == (0, BatchState.FAILED) and "has been deleted" in printed
    assert len(bench.results(batch)[0]) == record.completed >= 10


def test_told_to_stop_it_keeps_what_has_finished_and_another_job_goes_on(bench):
    batch = bench.batch([row(i, model="slow") for i in range(200)])
    code, printed, record = run_until(bench, batch, 20, lambda job: job.terminate())
    assert code == 1 and "told to stop" in printed and "Traceback" not in printed
    assert record.state is BatchState.IN_PROGRESS and 20 <= record.completed < 200
    bench.store.batches.release(record, "it was told to stop")
    code, _, record = bench.run(batch)
    assert (code, record.state, record.completed) == (0, BatchState.COMPLETED, 200)


def test_of_a_batch_that_no_job_can_finish_what_has_finished_is_the_result(bench):
    batch = bench.batch([row(i, model="slow") for i in range(200)])
    _, _, record = run_until(bench, batch, 20, lambda job: job.kill())
    bench.store.batches.release(record, "it was killed")
    error = {"code": "job_failed", "message": "5 jobs in a row ended", "param": None, "line": None}
    assert bench.store.batches.conclude(record, reason=error["message"], errors=[error])
    code, _, record = bench.run(batch)
    assert (code, record.state) == (0, BatchState.COMPLETED)
    assert record.completed >= 20 and record.completed + record.failed == 200
    output, errors = bench.results(batch)
    assert (len(output), len(errors)) == (record.completed, record.failed)
    assert {line["error"]["code"] for line in errors} == {"job_failed"}
    assert record.reason == error["message"] and parts_of(bench, batch) == []


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_storage_that_is_away_for_long_counts_against_no_batch(bench, monkeypatch, rows):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.3)
    batch = bench.batch([row(i) for i in range(rows)])

    def away(*_):
        raise StorageUnavailable("The storage does not answer.")

    monkeypatch.setattr(bench.storage, "put", away)
    job = Job(bench.settings, bench.gateways[1:], bench.store, bench.storage, print)
    with pytest.raises(StorageUnavailable):
        asyncio.run(job.run(batch.id))
    record = bench.get(batch)
    assert (record.worker, record.starts, record.idle_starts) == (None, 1, 0)
    assert record.reason == "its storage is away: The storage does not answer."
    monkeypatch.undo()
    code, _, record = bench.run(batch)
    assert (code, record.state, record.completed) == (0, BatchState.COMPLETED, rows)


# -- who may work on it


def test_a_batch_that_somebody_works_on_or_that_has_ended_is_left_alone(bench):
    batch = bench.batch([row()])
    bench.store.batches.claim(batch.id, "another", 60)
    code, printed, record = bench.run(batch)
    assert code == 0 and record.worker == "another" and "nothing to do" in printed
    with bench.start(batch_record()) as job:
        assert "nothing to do" in job.communicate(timeout=20)[0] and job.returncode == 0


def test_what_a_zombie_does_counts_for_nothing(bench):
    batch = bench.batch([row(i, model="slow") for i in range(200)])
    with bench.start(batch) as zombie:
        eventually(lambda: bench.get(batch).completed > 5, 30, 0.05, "no progress")
        zombie.send_signal(signal.SIGSTOP)
        eventually(lambda: bench.get(batch).lease_until < time.time(), 10, 0.1, "a lease lives on")
        before = bench.store.batches.claim(batch.id, "another", 60)
        zombie.send_signal(signal.SIGCONT)
        printed, _ = zombie.communicate(timeout=20)
    assert zombie.returncode == 0 and "another process" in printed
    record = bench.get(batch)
    assert (record.worker, record.completed) == ("another", before.completed)
    bench.store.batches.release(record, "it was none")
    code, printed, record = bench.run(batch)
    assert (code, record.state, record.completed) == (0, BatchState.COMPLETED, 200), printed
    assert len(bench.results(batch)[0]) == 200 and parts_of(bench, batch) == []


@pytest.mark.slow
def test_a_store_that_is_away_for_longer_than_a_lease_is_waited_out(bench):
    batch = bench.batch([row(i, model="slow") for i in range(300)])

    def lock(_):
        with bench.store.database.writing():
            time.sleep(8)  # longer than SQLite waits for a lock

    code, printed, record = run_until(bench, batch, 5, lock)
    assert (code, record.state, record.completed) == (0, BatchState.COMPLETED, 300), printed
    assert record.starts == 1


def test_a_job_without_settings_says_so(bench):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.batch", new_id("batch")],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 1 and "LLM_ENGINE_JOB is not set" in done.stdout


def test_a_job_brings_nothing_heavy_along():
    loaded = "import jobs.batch, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    heavy = {"ray", "pandas", "numpy", "fastapi", "boto3", "aiohttp", "httpx", "torch", "vllm"}
    assert not heavy & set(done.stdout.split())


# -- answers that fail: a server that fails as it is told stands in for the gateway


@pytest.fixture
def broken(bench) -> Iterator[tuple[Bench, Upstream]]:
    with Upstream() as server:
        url = server.url.removesuffix("/v1")
        other = Bench(bench.settings, [url])
        yield other, server
        other.close()


def sometimes(*, first, count):
    """`first` for so many requests to models, then good answers."""
    left = [count]

    async def behave(asked, send):
        if not asked.body:
            return await reply(send, 200, {})  # of /v1/models
        if left[0] > 0:
            left[0] -= 1
            return await first(asked, send)
        body = {"id": "x", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
        await reply(send, 200, body | {"model": asked.body["model"]})

    return behave


cut = streaming(b"{", then="cut")


@pytest.mark.parametrize("first", [failing(500), failing(429), failing(503), failing(401), cut])
def test_what_passes_is_tried_again(broken, first):
    bench, server = broken
    server.behave = sometimes(first=first, count=3)
    batch = bench.batch([row(i) for i in range(5)])
    code, printed, record = bench.run(batch)
    assert (code, record.state, record.completed, record.failed) == (0, "completed", 5, 0), printed
    assert len([asked for asked in server.asked if asked.body]) == 8


@pytest.mark.slow
@pytest.mark.parametrize(("first", "status"), [(failing(500), 500), (cut, None)])
def test_what_does_not_pass_is_tried_so_often_and_then_told(broken, first, status):
    bench, server = broken
    server.behave = sometimes(first=first, count=10**6)
    batch = bench.batch([row(0)])
    _, _, record = bench.run(batch)
    assert (record.state, record.completed, record.failed) == ("completed", 0, 1)
    (line,) = bench.results(batch)[1]
    assert len([a for a in server.asked if a.body]) == bench.settings.batches.max_attempts
    if status is None:
        assert line["response"] is None and "Tried 5 times" in line["error"]["message"]
    else:
        assert line["response"]["status_code"] == status and line["error"] is None


@pytest.mark.slow
def test_a_row_that_kills_engines_is_given_up_and_the_others_are_not(broken):
    bench, server = broken

    async def behave(asked, send):
        poison = asked.body.get("seed") == 3
        await (failing(503) if poison else sometimes(first=cut, count=0))(asked, send)

    server.behave = behave
    batch = bench.batch([row(i) for i in range(400)])
    code, printed, record = bench.run(batch, timeout_s=120)
    assert (code, record.completed, record.failed) == (0, 399, 1), printed
    (line,) = bench.results(batch)[1]
    assert line["custom_id"] == "row-3" and line["response"]["status_code"] == 503


def test_while_a_model_is_away_the_batch_says_what_it_waits_for(broken):
    bench, server = broken
    server.behave = sometimes(first=failing(503), count=10**6)
    batch = bench.batch([row(i) for i in range(5)])

    def told() -> bool:
        return bench.get(batch).reason is not None

    with bench.start(batch) as job:
        eventually(told, 20, 0.1, "no reason is told")
        server.behave = sometimes(first=failing(503), count=0)
        assert job.wait(60) == 0
    record = bench.get(batch)
    assert (record.state, record.completed, record.reason) == ("completed", 5, None)
