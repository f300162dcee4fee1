"""OpenAI's batches, asked by OpenAI's real client at a real gateway. No job runs: where one would,
the test does to the store and the storage what a job does."""

import contextlib
import json
import time
from typing import Any

import openai
import pytest

from llm_engine import files
from llm_engine.api.auth import make_key
from llm_engine.api.batches import Batches
from llm_engine.api.openai.batches import window_seconds
from llm_engine.batches.rows import row_id, split_lines
from llm_engine.errors import NotFound
from llm_engine.records import BatchRecord, ModelRecord, Scope, Usage
from llm_engine.statuses import BatchState
from tests.support.batches import Bench
from tests.support.gateway import GatewayThread, fake_endpoint

ROOT = "sk-operator"
CHAT = "/v1/chat/completions"
LEASE_S = 60.0
NEW = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h"}


@pytest.fixture(scope="module")
def served():
    endpoints = [fake_endpoint("fake"), fake_endpoint("vectors", task="embed")]
    batches = {"max_open": 40, "max_rows": 50}
    with GatewayThread(endpoints, api_keys=[ROOT], sections={"batches": batches}) as running:
        yield running


def key_of(gateway: GatewayThread, owner: str, *scopes: Scope) -> str:
    record, key = make_key(owner, "test", scopes or (Scope.FILES,), None)
    gateway.services.store.keys.add(record, 1000)
    return key


def client_of(gateway: GatewayThread, key: str) -> openai.OpenAI:
    return gateway.openai(key)


@pytest.fixture(scope="module")
def ann(served):
    return client_of(served, key_of(served, "ann"))


@pytest.fixture
def http(served):
    with served.client(headers={"authorization": f"Bearer {key_of(served, 'ann')}"}) as client:
        yield client


@pytest.fixture(autouse=True)
def room(served):
    """Each test's batches are over when it is."""
    yield
    store = served.services.store.batches
    for record in store.open():
        if record.worker is not None:
            store.release(record, "the test is over")
        store.end(store.get(record.id), BatchState.EXPIRED)


def keep(gateway: GatewayThread, data: bytes, owner: str = "ann", purpose: str = "batch") -> str:
    services = gateway.services
    return files.keep(
        services.storage, services.store, owner=owner, purpose=purpose, filename="x.jsonl",
        pieces=[data],
    ).id  # fmt: skip


def rows(count: int = 2, model: str = "fake", said: str = "hi") -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": said}]}
    line = {"method": "POST", "url": CHAT, "body": body}
    return b"".join(
        json.dumps({"custom_id": f"r{n}"} | line).encode() + b"\n" for n in range(count)
    )


def work(gateway: GatewayThread, batch: str, to: BatchState, **values: Any) -> BatchRecord:
    """A job claims the batch and moves it there."""
    store = gateway.services.store.batches
    record = store.claim(batch, "worker", LEASE_S)
    moved = store.move(record, [record.state], to, **values)
    assert moved is not None
    return moved


def result(record: BatchRecord, row: int, status: int = 200) -> bytes:
    body = {"id": f"answer {row}"} if status == 200 else {"error": {"message": "no"}}
    response = {"status_code": status, "request_id": "req", "body": body}
    line = {"id": row_id(record.id, row), "custom_id": f"r{row}", "response": response}
    return json.dumps(line | {"error": None}).encode() + b"\n"


# -- the object


def test_a_new_batch_has_every_field_and_what_is_unset_is_null(ann, served, http):
    file = keep(served, rows())
    made = ann.batches.create(
        input_file_id=file, endpoint=CHAT, completion_window="24h", metadata={"team": "search"}
    )
    assert made.id.startswith("batch_") and made.status == "validating"
    told = http.get(f"/v1/batches/{made.id}").json()
    assert told.pop("created_at") == pytest.approx(time.time(), abs=5)
    assert told.pop("expires_at") - made.created_at == 86400
    nothing = {"input_tokens": 0, "input_tokens_details": {"cached_tokens": 0},
               "output_tokens": 0, "output_tokens_details": {"reasoning_tokens": 0},
               "total_tokens": 0}  # fmt: skip
    assert told == {
        "id": made.id, "object": "batch", "endpoint": CHAT, "model": None, "errors": None,
        "input_file_id": file, "completion_window": "24h", "status": "validating",
        "output_file_id": None, "error_file_id": None, "in_progress_at": None,
        "finalizing_at": None, "completed_at": None, "failed_at": None, "expired_at": None,
        "cancelling_at": None, "cancelled_at": None, "usage": nothing,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": {"team": "search"}, "status_reason": None, "progress": None,
        "own_engine": False,
    }  # fmt: skip
    assert set(openai.types.Batch.model_fields) <= {*told, "created_at", "expires_at"}


def test_a_batch_is_watched_to_its_end(ann, served):
    made = ann.batches.create(**NEW)
    record = work(served, made.id, BatchState.IN_PROGRESS, total=3, model="fake")
    store = served.services.store.batches
    store.beat(record, LEASE_S, {"rows_per_s": 2.0, "tokens_per_s": 9.5, "eta_s": 1.5})
    store.note(record, usage=Usage(10, 4, 20, 5), completed=2, failed=1, reason="it waits")
    seen = ann.batches.retrieve(made.id)
    assert (seen.status, seen.model, seen.status_reason) == ("in_progress", "fake", "it waits")
    assert seen.progress == {"rows_per_s": 2.0, "tokens_per_s": 9.5, "eta_s": 1.5}
    assert seen.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
    assert seen.usage.to_dict() == {
        "input_tokens": 10, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 5}, "total_tokens": 30,
    }  # fmt: skip
    assert seen.in_progress_at == pytest.approx(time.time(), abs=5) and seen.completed_at is None

    output = keep(served, result(record, 0), purpose="batch_output")
    store.note(record, output_file_id=output)  # not before it is readable
    assert ann.batches.retrieve(made.id).output_file_id is None
    store.finish(record, BatchState.COMPLETED, [], output_file_id=output)
    ended = ann.batches.retrieve(made.id)
    assert (ended.status, ended.output_file_id) == ("completed", output)
    assert ended.completed_at >= ended.in_progress_at
    assert json.loads(ann.files.content(output).text)["custom_id"] == "r0"


def test_what_is_wrong_with_the_input_is_told_line_by_line(ann, served):
    made = ann.batches.create(**NEW)
    errors = [
        {"code": "invalid_url", "message": "m", "param": "url", "line": 3},
        {"code": "empty_file", "message": "n", "param": None, "line": None},
    ]
    record = served.services.store.batches.claim(made.id, "w", LEASE_S)
    served.services.store.batches.finish(record, BatchState.FAILED, [], errors=errors)
    seen = ann.batches.retrieve(made.id)
    assert seen.status == "failed" and seen.failed_at and seen.errors.object == "list"
    assert [error.to_dict() for error in seen.errors.data] == errors


def test_a_file_becomes_results_with_the_job_as_a_real_process(ann, served):
    file = ann.files.create(file=("rows.jsonl", rows(3)), purpose="batch")
    made = ann.batches.create(**NEW | {"input_file_id": file.id})
    with contextlib.closing(Bench(served.settings, [served.url])) as bench:
        _, printed, _ = bench.run(served.services.store.batches.get(made.id))
    ended = ann.batches.retrieve(made.id)
    assert (ended.status, ended.model, ended.error_file_id) == ("completed", "fake", None), printed
    assert ended.request_counts.to_dict() == {"total": 3, "completed": 3, "failed": 0}
    lines = [json.loads(line) for line in ann.files.content(ended.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in lines] == ["r0", "r1", "r2"]
    assert [line["id"] for line in lines] == [row_id(made.id, row) for row in range(3)]
    generated = sum(line["response"]["body"]["usage"]["completion_tokens"] for line in lines)
    assert ended.usage.output_tokens == generated > 0


# -- create


@pytest.mark.parametrize(
    ("window", "seconds"),
    [("24h", 86400), ("1h", 3600), ("4h", 14400), ("10m", 600), ("90m", 5400), ("7d", 604800),
     ("14d", 1209600)],
)  # fmt: skip
def test_windows_beyond_24h_are_honoured_and_shown_as_they_were_asked_for(ann, window, seconds):
    made = ann.batches.create(**NEW | {"completion_window": window})
    assert made.completion_window == window
    assert made.expires_at - made.created_at == seconds == window_seconds(window)


def test_a_file_that_is_not_there_is_for_the_job_to_tell(ann, served):
    theirs = keep(served, rows(), owner="ben")
    for file in ("file-nowhere", theirs):
        assert ann.batches.create(**NEW | {"input_file_id": file}).status == "validating"


def test_how_long_results_are_kept_is_for_the_job_to_know(ann, served):
    made = ann.batches.create(**NEW, output_expires_after={"anchor": "created_at", "seconds": 3600})
    options = served.services.store.batches.get(made.id).options
    assert options.output_expires_after_s == 3600


WRONG = {
    "window": ({"completion_window": "25"}, "completion_window", "invalid_value"),
    "too short": ({"completion_window": "9m"}, "completion_window", "invalid_value"),
    "too long": ({"completion_window": "15d"}, "completion_window", "invalid_value"),
    "huge": ({"completion_window": "9" * 5000 + "h"}, "completion_window", "invalid_value"),
    "digits": ({"completion_window": "٣h"}, "completion_window", "invalid_value"),
    "endpoint": ({"endpoint": "/v1/images"}, "endpoint", "invalid_value"),
    "moderations": ({"endpoint": "/v1/moderations"}, "endpoint", "invalid_value"),
    "endpoint type": ({"endpoint": 5}, "endpoint", "invalid_type"),
    "unknown": ({"priority": 1}, "priority", "unknown_parameter"),
    "no file": ({"input_file_id": ""}, "input_file_id", "empty_string"),
    "file type": ({"input_file_id": None}, "input_file_id", "invalid_type"),
    "nul": ({"input_file_id": "file-\0"}, "input_file_id", "invalid_value"),
    "long": ({"input_file_id": "x" * 201}, "input_file_id", "string_above_max_length"),
    "metadata": ({"metadata": {"k": 5}}, "metadata.k", "invalid_type"),
    "metadata null": ({"metadata": {"k": None}}, "metadata.k", "invalid_type"),
    "metadata value": ({"metadata": {"k": "x" * 513}}, "metadata.k", "string_above_max_length"),
    "metadata key": ({"metadata": {"k" * 65: "x"}}, None, "string_above_max_length"),
    "metadata pairs": (
        {"metadata": {str(n): "x" for n in range(17)}}, "metadata", "object_above_max_properties",
    ),
    "metadata type": ({"metadata": [1]}, "metadata", "invalid_type"),
    "anchor": (
        {"output_expires_after": {"anchor": "now", "seconds": 3600}},
        "output_expires_after.anchor", "invalid_value",
    ),
    "seconds": (
        {"output_expires_after": {"anchor": "created_at", "seconds": 3599}},
        "output_expires_after.seconds", "integer_below_min_value",
    ),
    "no seconds": (
        {"output_expires_after": {"anchor": "created_at"}},
        "output_expires_after.seconds", "missing_required_parameter",
    ),
    "too much": (
        {"output_expires_after": {"anchor": "created_at", "seconds": 3600, "x": 1}},
        "output_expires_after.x", "unknown_parameter",
    ),
    "own_engine": ({"own_engine": "yes"}, "own_engine", "invalid_type"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_request_is_named(http, served, case):
    change, param, code = WRONG[case]
    answer = http.post("/v1/batches", json=NEW | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code), error
    assert error["type"] == "invalid_request_error" and error["message"]
    assert param is None or error["param"] == param
    assert served.services.store.batches.open() == []


@pytest.mark.parametrize("field", NEW)
def test_a_required_field_is_missed_by_its_name(http, field):
    answer = http.post("/v1/batches", json={k: v for k, v in NEW.items() if k != field})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert error["code"] == "missing_required_parameter"


@pytest.mark.parametrize("body", [b"", b"[]", b"nonsense", b'{"a":', b"\xff"])
def test_a_body_that_is_no_object_is_a_400(http, body):
    assert http.post("/v1/batches", content=body).status_code == 400


def test_too_many_open_batches_are_a_429_that_names_the_setting(served, http):
    made = [http.post("/v1/batches", json=NEW) for _ in range(41)]
    assert [answer.status_code for answer in made] == [200] * 40 + [429]
    error = made[-1].json()["error"]
    assert error["code"] == "too_many_batches" and "batches.max_open" in error["message"]
    assert made[-1].headers["retry-after"] == "5"


def test_a_request_with_an_idempotency_key_makes_one_batch(http):
    def post(key: str, **changes: Any) -> Any:
        return http.post("/v1/batches", json=NEW | changes, headers={"Idempotency-Key": key})

    first = post("k1")
    assert post("k1").json() == first.json()
    assert post("k2").json()["id"] != first.json()["id"]
    other = post("k1", completion_window="1h")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"
    assert post("x" * 256).status_code == 400


# -- engines of its own


@pytest.fixture(scope="module")
def kept_endpoints(served):
    """The store has them, as the controller puts them there."""
    for endpoint in (fake_endpoint("fake", vllm_args={"seed": 3}, fallback="x"),
                     fake_endpoint("vectors", task="embed")):  # fmt: skip
        served.services.store.endpoints.create(endpoint, "ann", {}, 100)


def own(client: openai.OpenAI, **fields: Any) -> openai.types.Batch:
    return client.batches.create(**NEW | fields, extra_body={"own_engine": True})


def test_engines_of_its_own_are_like_those_of_the_models_endpoint(ann, served, kept_endpoints):
    file = keep(served, b"\xef\xbb\xbf\n \r\n" + rows())
    made = own(ann, input_file_id=file)
    assert (made.own_engine, made.model) == (True, "fake")
    engine = served.services.store.batches.get(made.id).options.own_engine
    assert (engine["engine"], engine["vllm_args"]) == ("fake", {"seed": 3})
    assert (engine["public"], engine["fallback"]) == (False, None)
    assert engine["autoscaling"]["min_replicas"] == 1


def test_its_first_row_may_be_long(ann, served, kept_endpoints):
    file = keep(served, rows(1, said="x" * (3 * 2**20)))
    assert own(ann, input_file_id=file).own_engine


@pytest.mark.parametrize("data", [b"", b"nonsense\n", b"[]\n", b'{"body": {"model": 5}}\n'])
def test_an_input_that_names_no_model_is_for_the_job_to_tell(ann, served, data):
    made = own(ann, input_file_id=keep(served, data))
    assert (made.status, made.own_engine) == ("validating", False)


def test_what_is_no_endpoint_cannot_have_engines_of_its_own(ann, served, kept_endpoints):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        own(ann, input_file_id=keep(served, rows(model="nowhere")))
    with pytest.raises(openai.BadRequestError, match="makes embeddings"):
        own(ann, input_file_id=keep(served, rows(model="vectors")))
    registered = served.services.store.registered
    now = time.time()
    facts = {"created_at": now, "updated_at": now}
    registered.add(ModelRecord("mdl_1", "ann", "alias", model="fake", **facts), 10)
    registered.add(ModelRecord("mdl_2", "ann", "far", url="http://x.example", **facts), 10)
    served.services.update(None, served.services.store.directory())
    for name, what in (("alias", "an alias"), ("far", "an external model")):
        with pytest.raises(openai.BadRequestError, match=what):
            own(ann, input_file_id=keep(served, rows(model=name)))


# -- list


def test_the_client_walks_through_all_pages_newest_first(served):
    client = client_of(served, key_of(served, "lister"))
    assert client.batches.list().data == []
    made = sorted(client.batches.create(**NEW).id for _ in range(5))
    assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]
    page = client.batches.list(limit=2, after=made[2])
    assert [batch.id for batch in page.data] == made[1::-1] and not page.has_more
    with served.client(headers={"authorization": f"Bearer {ROOT}"}) as http:
        page = http.get("/v1/batches", params={"limit": 1}).json()
    assert page["object"] == "list" and page["has_more"]
    assert page["first_id"] == page["last_id"] == page["data"][0]["id"] == made[-1]


@pytest.mark.parametrize("limit", ["0", "101", "-1", "x", "1e9"])
def test_a_limit_that_is_none_is_named(http, limit):
    answer = http.get("/v1/batches", params={"limit": limit})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")


# -- cancel


def test_cancel_is_asked_for_once_or_twice(ann, served):
    made = ann.batches.create(**NEW)
    for _ in range(2):
        asked = ann.batches.cancel(made.id)
        assert asked.status == "cancelling" and asked.cancelling_at
    record = served.services.store.batches.claim(made.id, "w", LEASE_S)
    served.services.store.batches.finish(record, BatchState.CANCELLED, [])
    assert ann.batches.cancel(made.id).status == "cancelled"


@pytest.mark.parametrize("state", ["completed", "failed", "expired"])
def test_what_has_ended_cannot_be_cancelled_and_is_not_asked_again(ann, served, state, http):
    made = ann.batches.create(**NEW)
    store = served.services.store.batches
    store.end(store.get(made.id), BatchState(state))
    with pytest.raises(openai.ConflictError, match=f"Cannot cancel a batch with status '{state}'"):
        ann.batches.cancel(made.id)
    answer = http.post(f"/v1/batches/{made.id}/cancel")
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["type"] == "invalid_request_error"


# -- whose


def test_another_owners_batch_does_not_exist(ann, served):
    made = ann.batches.create(**NEW)
    ben = client_of(served, key_of(served, "ben"))
    for attempt in (ben.batches.retrieve, ben.batches.cancel, lambda b: ben.batches.list(after=b)):
        with pytest.raises(openai.NotFoundError, match=f"No batch found with id '{made.id}'"):
            attempt(made.id)
    assert made.id not in [batch.id for batch in ben.batches.list()]
    operator = client_of(served, ROOT)
    assert operator.batches.retrieve(made.id).id == made.id
    assert made.id in [batch.id for batch in operator.batches.list()]
    assert ann.batches.retrieve(made.id).status == "validating"


@pytest.mark.parametrize("name", ["nowhere", "%00", "batch_%0a", "x" * 3000])
def test_an_id_that_nobody_has_is_a_404(http, name):
    for answer in (http.get(f"/v1/batches/{name}"), http.post(f"/v1/batches/{name}/cancel")):
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "batch_id")


def test_all_of_it_needs_the_scope_files(served):
    key = key_of(served, "ann", Scope.INFERENCE, Scope.ENDPOINTS)
    with served.client(headers={"authorization": f"Bearer {key}"}) as client:
        answers = [
            client.post("/v1/batches", json=NEW),
            client.get("/v1/batches"),
            client.get("/v1/batches/batch_1"),
            client.post("/v1/batches/batch_1/cancel"),
        ]
    assert [answer.status_code for answer in answers] == [403] * 4
    assert all("'files'" in answer.json()["error"]["message"] for answer in answers)


# -- results, for the dialects that show them


def test_results_of_both_files_come_in_the_inputs_order(ann, served):
    made = ann.batches.create(**NEW)
    record = work(served, made.id, BatchState.FINALIZING)
    good = [result(record, n) for n in (0, 2, 3, 5)]
    bad = [result(record, n, 400) for n in (1, 4)]
    ended = served.services.store.batches.finish(
        record, BatchState.COMPLETED, [],
        output_file_id=keep(served, b"".join(good)), error_file_id=keep(served, b"".join(bad)),
    )  # fmt: skip
    batches = Batches(served.services)
    found = [json.loads(line)["custom_id"] for line in batches.results(ended)]
    assert found == [f"r{n}" for n in range(6)]
    files.discard(served.services.storage, served.services.store, ended.error_file_id)
    with pytest.raises(NotFound):
        batches.results(ended)


def test_a_batch_without_results_has_none(ann, served):
    made = ann.batches.create(**NEW)
    assert list(Batches(served.services).results(served.services.store.batches.get(made.id))) == []


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_are_whole_however_their_bytes_come(size):
    data = b"one\n\ntwo and more\r\nlast"
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert list(split_lines(pieces)) == [b"one\n", b"\n", b"two and more\r\n", b"last"]
