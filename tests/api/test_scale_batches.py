"""Scale's batches, asked by its real client at a real gateway. No job runs: where one would, the
test does to the store what a job does."""

import contextlib
import json
import time
from datetime import datetime
from typing import Any

import orjson
import pytest

from llm_engine.api.llm_engine_api import batch_rows
from llm_engine.api.llm_engine_api.batch_rows import V1, V2
from llm_engine.errors import InvalidRequest
from llm_engine.records import BatchRecord, ModelRecord, Scope
from llm_engine.statuses import BatchState
from llm_engine.storage.opening import open_path
from tests.api.test_batches import key_of
from tests.api.test_llm_engine_dialect import import_client, use
from tests.stores.making import batch
from tests.support.batches import Bench
from tests.support.gateway import GatewayThread, fake_endpoint

ROOT = "sk-operator"
JOBS_V1, JOBS_V2 = "/llm-engine/v1/llm/batch-completions", "/llm-engine/v2/batch-completions"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPTS = {"prompts": ["a", "b"], "max_new_tokens": 3, "temperature": 0.0}
NEW = {"model_config": {"model": "fake"}, "output_data_path": "out.json", "content": PROMPTS}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sections = {
        "batches": {"max_rows": 5, "max_inline_bytes": 50_000, "data_paths": [str(folder)]},
    }
    endpoints = [fake_endpoint("fake"), fake_endpoint("vectors", task="embed")]
    with GatewayThread(endpoints, api_keys=[ROOT], sections=sections) as running:
        running.data = folder
        # The store has it, as the controller puts it there.
        kept = fake_endpoint("fake", vllm_args={"seed": 3})
        running.services.store.endpoints.create(kept, "op", {}, 10)
        yield running


@pytest.fixture
def scale(served):
    """The client, with a key that may keep files, and no more."""
    client = import_client()
    use(client, served, key_of(served, "ann", Scope.FILES))
    yield client
    client.api_engine.set_base_path(None)
    client.api_engine.set_api_key(None)


@pytest.fixture
def builder(scale, served):
    """The same, and the key may make endpoints, too."""
    use(scale, served, key_of(served, "ann", Scope.FILES, Scope.ENDPOINTS))
    return scale


@pytest.fixture
def http(served):
    with served.client(headers={"authorization": f"Bearer {ROOT}"}) as client:
        yield client


def make(client: Any, model: str = "fake", config: dict[str, Any] | None = None, **fields: Any):
    types = client.data_types
    fields.setdefault("output_data_path", "out.json")
    if "input_data_path" not in fields:
        content = types.batch_completion.CreateBatchCompletionsV1RequestContent(**PROMPTS)
        fields.setdefault("content", content)
    config = types.CreateBatchCompletionsModelConfig(model=model, **(config or {}))
    return client.Completion.batch_create(model_config=config, **fields)


def record_of(served: GatewayThread, job: str) -> BatchRecord:
    return served.services.store.batches.get(job)


def input_of(served: GatewayThread, record: BatchRecord) -> list[dict[str, Any]]:
    file = served.services.store.files.get(record.input_file_id)
    data = b"".join(served.services.storage.read(file.key))
    return [orjson.loads(line) for line in data.splitlines()]


# -- inline


def test_prompts_become_rows(scale, served):
    record = record_of(served, make(scale).job_id)
    assert (record.owner, record.dialect, record.endpoint) == ("ann", "llm_engine", COMPLETIONS)
    assert (record.model, record.window_s) == ("fake", 86400)
    assert record.options.output_path == "out.json" and record.options.output_form == V1
    assert record.options.input_path is None and record.options.own_engine is None
    body = {"model": "fake", "max_tokens": 3, "temperature": 0.0}
    assert input_of(served, record) == [
        {"custom_id": str(n), "method": "POST", "url": COMPLETIONS, "body": body | {"prompt": text}}
        for n, text in enumerate("ab")
    ]


def test_a_v2_job_is_told_at_once(scale, served):
    job = make(scale, use_v2=True, labels={"team": "search"}, max_runtime_sec=600)
    assert job.status.value == "queued" and job.output_data_path == "out.json"
    assert job.model_config.model == "fake" and job.metadata == {"team": "search"}
    created, expires = (datetime.fromisoformat(at) for at in (job.created_at, job.expires_at))
    assert (expires - created).total_seconds() == 600 and job.completed_at is None
    record = record_of(served, job.job_id)
    assert (record.window_s, record.options.labels) == (600, {"team": "search"})
    assert (record.options.output_form, record.endpoint) == (V2, COMPLETIONS)


def test_labels_of_a_v1_job_lie_in_its_model_config(scale, served):
    job = make(scale, config={"labels": {"team": "a"}})
    assert record_of(served, job.job_id).options.labels == {"team": "a"}


def test_completion_items_become_rows(scale, served):
    item = scale.data_types.batch_completion.FilteredCompletionV2Request
    content = [item(prompt="x", max_tokens=5, stop="s"), item(prompt=["y", "z"])]
    record = record_of(served, make(scale, content=content, use_v2=True).job_id)
    first, second = (row["body"] for row in input_of(served, record))
    assert (first["prompt"], first["max_tokens"], first["stop"]) == ("x", 5, "s")
    assert (second["prompt"], second["max_tokens"]) == (["y", "z"], 16)
    assert first["model"] == "fake" and not {"stream", "best_of", "guided_json"} & first.keys()


def test_chat_items_become_rows_that_an_engine_answers(scale, served, http):
    item = scale.data_types.batch_completion.FilteredChatCompletionV2Request
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    schema = {"name": "x", "schema": {"type": "object"}}
    content = [
        item(
            messages=[
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
                {"role": "assistant", "tool_calls": [called]},
                {"role": "tool", "tool_call_id": "1", "content": "x"},
            ],
            max_tokens=2,
            response_format={"type": "json_schema", "json_schema": schema},
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    ]
    record = record_of(served, make(scale, content=content, use_v2=True).job_id)
    assert record.endpoint == CHAT
    (row,) = input_of(served, record)
    assert row["url"] == CHAT
    assert row["body"]["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert row["body"]["messages"][2] == {"role": "assistant", "tool_calls": [called]}
    answer = http.post(CHAT, json=row["body"])
    assert answer.status_code == 200, answer.text


def test_items_without_messages_are_told_why(http):
    answer = http.post(JOBS_V2, json=NEW | {"content": [{"prompt": "a"}, {"prompt": None}]})
    assert answer.status_code == 400
    detail = answer.json()["detail"]
    assert "content[1]" in detail and "0.0.0b48" in detail and "input_data_path" in detail


ITEM = {"prompt": "a"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no content": ({"content": None}, "content"),
    "both": ({"input_data_path": "in.json"}, "content"),
    "no model": ({"model_config": {}}, "model_config.model"),
    "no config": ({"model_config": None}, "model_config"),
    "no output": ({"output_data_path": None}, "output_data_path"),
    "content type": ({"content": "text"}, "content"),
    "no prompts": ({"content": PROMPTS | {"prompts": []}}, "content.prompts"),
    "empty prompt": ({"content": PROMPTS | {"prompts": ["a", ""]}}, "content.prompts"),
    "top_k": ({"content": PROMPTS | {"top_k": 0}}, "content.top_k"),
    "greedy": ({"content": PROMPTS | {"top_p": 0.5}}, "content.top_p"),
    "stops": ({"content": PROMPTS | {"stop_sequences": list("abcde")}}, "content.stop_sequences"),
    "unknown": ({"content": PROMPTS | {"x": 1}}, "content.x"),
    "too many": ({"content": PROMPTS | {"prompts": ["a"] * 6}}, "batches.max_rows"),
    "tool_config": ({"tool_config": {"name": "code_evaluator"}}, "tool_config"),
    "priority": ({"priority": "high"}, "max_runtime_sec"),
    "parallel": ({"data_parallelism": 65}, "data_parallelism"),
    "runtime": ({"max_runtime_sec": 172_801}, "max_runtime_sec"),
    "no runtime": ({"max_runtime_sec": 0}, "max_runtime_sec"),
    "nodes": ({"nodes_per_worker": 2}, "nodes_per_worker"),
    "labels": ({"labels": {"a": "not a label"}}, "labels"),
    "unknown field": ({"x": 1}, "'x'"),
    "unknown option": ({"model_config": {"model": "fake", "x": 1}}, "model_config.x"),
    "gone": ({"model_config": {"model": "fake", "swap_space": 4}}, "model_config.swap_space"),
    "ranks": (
        {"model_config": {"model": "fake", "num_shards": 2}, "gpus": 1}, "model_config.num_shards",
    ),
    "embeds": ({"model_config": {"model": "vectors"}}, "makes embeddings"),
    "no path": ({"output_data_path": "../out.json"}, "out.json"),
    "far path": ({"output_data_path": "/etc/passwd"}, "batches.data_paths"),
    "far input": ({"content": None, "input_data_path": "s3://other/in.json"}, "data_paths"),
    "scheme": ({"output_data_path": "gs://bucket/out.json"}, "gs://bucket"),
    "model path": ({"model_config": {"model": "m", "checkpoint_path": "s3://b/m"}}, "storage yet"),
    "large": (
        {"model_config": {"model": "m", "mm_processor_kwargs": {"x": "y" * 20_000}}}, "16384",
    ),
}  # fmt: skip
WRONG_V2 = {
    "empty": ({"content": []}, "content"),
    "item type": ({"content": ["text"]}, "content[0]"),
    "both of an item": ({"content": [ITEM | {"messages": [{}]}]}, "content[0]"),
    "mixed": ({"content": [ITEM, {"messages": [{}]}]}, "content[1]"),
    "too many items": ({"content": [ITEM] * 6}, "batches.max_rows"),
    "guides": (
        {"content": [ITEM | {"guided_regex": "a", "guided_choice": ["a"]}]}, "guided_choice",
    ),
    "deep": ({"content": [ITEM | {"x": json.loads("[" * 300 + "]" * 300)}]}, "nested"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "case"),
    [*[(path, case) for case in WRONG for path in (JOBS_V1, JOBS_V2)],
     *[(JOBS_V2, case) for case in WRONG_V2]],
)  # fmt: skip
def test_what_is_wrong_is_named_and_leaves_nothing(http, served, path, case):
    change, named = (WRONG | WRONG_V2)[case]
    before = list(served.services.storage.list("files/"))
    answer = http.post(path, json=NEW | change)
    assert answer.status_code == 400, answer.text
    assert named in answer.json()["detail"]
    assert list(served.services.storage.list("files/")) == before


@pytest.mark.parametrize("content", [[ITEM], [], "text"])
def test_v1_takes_prompts_only(http, content):
    answer = http.post(JOBS_V1, json=NEW | {"content": content})
    assert (answer.status_code, "'prompts'" in answer.json()["detail"]) == (400, True)


def test_a_body_that_is_too_large_names_the_setting(http):
    answer = http.post(JOBS_V2, json=NEW | {"content": [{"prompt": "x" * 50_000}]})
    assert answer.status_code == 413 and "batches.max_inline_bytes" in answer.json()["detail"]
    for body in (b"", b"[]", b"\xff", b"{"):
        assert http.post(JOBS_V1, content=body).status_code == 400


# -- by path


@pytest.mark.parametrize(("v2", "endpoint"), [(False, COMPLETIONS), (True, CHAT)])
def test_an_input_by_path_is_left_to_the_job(scale, served, v2, endpoint):
    job = make(scale, input_data_path="nowhere.json", use_v2=v2)
    record = record_of(served, job.job_id)
    assert (record.options.input_path, record.endpoint) == ("nowhere.json", endpoint)
    assert record.input_file_id.startswith("file-")
    told = scale.Completion.get_batch_completion(job.job_id)["job"]
    assert told["input_data_path"] == "nowhere.json"


def test_a_folder_that_the_operator_has_named_may_be_used(scale, served):
    path = str(served.data / "in.json")
    job = make(scale, input_data_path=path, output_data_path=str(served.data / "out.json"))
    options = record_of(served, job.job_id).options
    assert (options.input_path, options.output_path) == (path, str(served.data / "out.json"))


# -- engines


def own_engine(served: GatewayThread, job: Any) -> dict[str, Any] | None:
    return record_of(served, job.job_id).options.own_engine


def test_a_name_alone_means_the_engines_that_serve_it(scale, served):
    defaults = {"num_shards": 1, "trust_remote_code": False, "labels": {"a": "b"}}
    assert own_engine(served, make(scale, config=defaults)) is None


def test_more_workers_are_engines_of_its_own_like_those(scale, served):
    engine = own_engine(served, make(scale, data_parallelism=3))
    assert (engine["engine"], engine["vllm_args"], engine["public"]) == ("fake", {"seed": 3}, False)
    assert (engine["autoscaling"]["min_replicas"], engine["autoscaling"]["max_replicas"]) == (3, 3)


def test_options_change_what_the_engines_are_like(builder, served):
    config = {"max_context_length": 64, "seed": 9, "enforce_eager": True, "response_role": "bot"}
    job = make(builder, config=config, use_v2=True, cpus="500m")
    engine = own_engine(served, job)
    assert (engine["engine"], engine["num_cpus"]) == ("fake", 0.5)
    args = {"seed": 9, "max_model_len": 64, "enforce_eager": True, "response_role": "bot"}
    assert engine["vllm_args"] == args
    assert job.model_config.seed == 9 and job.model_config.max_context_length == 64


def test_a_model_that_is_not_served_is_loaded(builder, served):
    job = make(builder, "mine", {"checkpoint_path": "builtin:chat"}, data_parallelism=2)
    engine = own_engine(served, job)
    assert (engine["engine"], engine["model"]) == ("vllm", "builtin:chat")
    assert engine["autoscaling"]["max_replicas"] == 2 and engine["vllm_args"] == {}
    assert record_of(served, job.job_id).model == "mine"
    assert own_engine(served, make(builder, "builtin:chat"))["model"] == "builtin:chat"
    job = make(builder, "org/model", {"num_shards": 2, "max_model_len": 99}, gpus=2, use_v2=True)
    engine = own_engine(served, job)
    assert (engine["model"], engine["num_gpus"]) == ("org/model", 2)
    assert engine["vllm_args"] == {"tensor_parallel_size": 2, "max_model_len": 99}


def test_what_decides_which_code_is_loaded_needs_the_scope_endpoints(scale):
    with pytest.raises(scale.errors.UnknownError, match="'endpoints'"):
        make(scale, config={"checkpoint_path": "builtin:chat"})
    with pytest.raises(scale.errors.UnknownError, match="'endpoints'"):
        make(scale, config={"trust_remote_code": True})
    with pytest.raises(scale.errors.NotFoundError, match="does not exist"):
        make(scale, "builtin:chat")


def test_an_external_model_runs_no_engines_of_its_own(builder, served):
    now = time.time()
    facts = {"url": "http://far.example", "created_at": now, "updated_at": now}
    served.services.store.registered.add(ModelRecord("mdl_1", "ann", "far", **facts), 10)
    served.services.update(None, served.services.store.directory())
    assert own_engine(served, make(builder, "far")) is None
    with pytest.raises(builder.errors.BadRequestError, match="an external model"):
        make(builder, "far", {"max_model_len": 64})


# -- get, list, cancel, update


def test_a_job_is_watched_to_its_end(scale, served):
    made = make(scale)
    get = scale.Completion.get_batch_completion
    assert get(made.job_id)["job"]["status"] == "queued"
    store = served.services.store.batches
    record = store.claim(made.job_id, "w", 60)
    assert get(made.job_id)["job"]["status"] == "running"
    for state in (BatchState.IN_PROGRESS, BatchState.FINALIZING):
        record = store.move(record, [record.state], state, total=2)
        assert get(made.job_id)["job"]["status"] == "running"
    store.finish(record, BatchState.COMPLETED, [], completed=2)
    job = get(made.job_id)["job"]
    assert (job["status"], job["request_counts"]["completed"]) == ("completed", 2)
    assert scale.data_types.batch_completion.BatchCompletionsJob.parse_obj(job).completed_at


@pytest.mark.parametrize(
    ("state", "word"), [("failed", "failed"), ("expired", "failed"), ("cancelled", "cancelled")]
)
def test_how_a_job_ended(scale, served, state, word):
    made = make(scale)
    store = served.services.store.batches
    store.end(store.get(made.job_id), BatchState(state), reason="because")
    job = scale.Completion.get_batch_completion(made.job_id)["job"]
    assert (job["status"], job["status_reason"]) == (word, "because")


def test_a_job_can_be_cancelled_until_it_has_ended(scale, served):
    made = make(scale)
    cancel = scale.Completion.cancel_batch_completion
    assert cancel(made.job_id) == cancel(made.job_id) == {"success": True}
    ended = make(scale)
    store = served.services.store.batches
    store.end(store.get(ended.job_id), BatchState.FAILED)
    assert cancel(ended.job_id) == {"success": False}


def test_every_batch_of_the_owner_is_listed_and_can_be_read(scale, served):
    store = served.services.store.batches
    openais = store.create(batch("lister", metadata={"a": "b"}), 10)
    use(scale, served, key_of(served, "lister", Scope.FILES))
    made = make(scale, use_v2=True)
    with served.client(headers={"x-api-key": key_of(served, "lister", Scope.FILES)}) as client:
        page = client.get(JOBS_V2).json()
        jobs = scale.data_types.batch_completion.ListBatchCompletionV2Response.parse_obj(page).jobs
        assert [job.job_id for job in jobs] == sorted([openais.id, made.job_id], reverse=True)
        page = client.get(JOBS_V2, params={"limit": 1}).json()
        assert page["has_more"]
        page = client.get(JOBS_V2, params={"after": page["jobs"][0]["job_id"]}).json()
        assert (len(page["jobs"]), page["has_more"]) == (1, False)
        assert client.get(JOBS_V2, params={"limit": 0}).status_code == 400


def test_only_what_can_be_changed_is(http, scale):
    made = make(scale)
    where = f"{JOBS_V2}/{made.job_id}"
    answer = http.post(where, json={"job_id": made.job_id, "priority": "high"})
    assert answer.status_code == 400 and "'priority'" in answer.json()["detail"]
    told = http.post(where, json={"job_id": made.job_id, "priority": None}).json()
    assert told["success"] and told["job_id"] == made.job_id
    assert http.post(where, json={"x": 1}).status_code == 400


def test_another_owners_job_does_not_exist(scale, served):
    made = make(scale)
    use(scale, served, key_of(served, "ben", Scope.FILES))
    for job in (made.job_id, "ft-nowhere", "%00"):
        for call in ("get_batch_completion", "cancel_batch_completion"):
            with pytest.raises(scale.errors.NotFoundError, match=r"Batch completion .* not found"):
                getattr(scale.Completion, call)(job)


def test_all_of_it_needs_the_scope_files(served):
    key = key_of(served, "ann", Scope.INFERENCE, Scope.ENDPOINTS)
    with served.client(headers={"x-api-key": key}) as client:
        answers = [
            client.post(JOBS_V1, json=NEW), client.post(JOBS_V2, json=NEW), client.get(JOBS_V2),
            client.get(f"{JOBS_V2}/x"), client.post(f"{JOBS_V2}/x", json={}),
            client.post(f"{JOBS_V2}/x/actions/cancel", json={}),
        ]  # fmt: skip
    assert [answer.status_code for answer in answers] == [403] * len(answers)


# -- with its job, as a real process


def run(served: GatewayThread, job: str) -> BatchRecord:
    with contextlib.closing(Bench(served.settings, [served.url])) as bench:
        code, printed, record = bench.run(record_of(served, job))
    assert (code, record.state) == (0, "completed"), printed
    return record


def output_of(served: GatewayThread, record: BatchRecord) -> list[dict[str, Any]]:
    assert record.options.output_path is not None
    storage, key = open_path(served.settings, record.options.output_path, owner=record.owner)
    return orjson.loads(b"".join(storage.read(key)))


def test_prompts_are_answered_in_v1s_form(scale, served):
    record = run(served, make(scale, output_data_path="v1/out.json").job_id)
    outputs = output_of(served, record)
    parsed = [scale.data_types.CompletionOutput.parse_obj(each) for each in outputs]
    assert [each.num_completion_tokens for each in parsed] == [3, 3]
    assert (record.completed, record.usage.completion_tokens) == (2, 6)


@pytest.mark.parametrize(
    ("asked", "endpoint"),
    [({"prompt": "a"}, COMPLETIONS), ({"messages": [{"role": "user", "content": "a"}]}, CHAT)],
)
def test_items_by_path_are_answered_in_order_and_a_bad_one_is_an_error(
    scale, served, asked, endpoint
):
    path = served.data / "items.json"
    asked = asked | {"stream": True, "model": "x"}
    items = [asked | {"max_tokens": tokens} for tokens in (1, 2, -5, 4)]
    path.write_bytes(orjson.dumps(items))
    out = str(served.data / "answers.json")
    job = make(scale, input_data_path=str(path), output_data_path=out, use_v2=True)
    record = run(served, job.job_id)
    assert record.endpoint == endpoint
    outputs = output_of(served, record)
    assert [each.get("usage", {}).get("completion_tokens") for each in outputs] == [1, 2, None, 4]
    assert outputs[2]["error"]["param"] == "max_tokens"
    told = scale.Completion.get_batch_completion(job.job_id)["job"]
    assert told["status"] == "completed"
    assert told["request_counts"] == {"total": 4, "completed": 3, "failed": 1}


def test_what_is_wrong_with_an_input_by_path_is_told(scale, served):
    path = served.data / "wrong.json"
    path.write_bytes(orjson.dumps([ITEM, {"prompt": None}]))
    job = make(scale, input_data_path=str(path), use_v2=True)
    with contextlib.closing(Bench(served.settings, [served.url])) as bench:
        bench.run(record_of(served, job.job_id))
    told = scale.Completion.get_batch_completion(job.job_id)["job"]
    assert told["status"] == "failed" and "0.0.0b48" in told["status_reason"]
    assert told["errors"][0]["param"] == "input[1]"


# -- rows


@pytest.mark.parametrize("item", [{}, ITEM | {"messages": []}, {"messages": None}, "text", None])
def test_an_item_that_is_none_says_which_it_is(item):
    with pytest.raises(InvalidRequest) as refused:
        batch_rows.convert(item, V2, "input[3]")
    assert refused.value.param == "input[3]"


def test_an_item_loses_what_is_not_its_own_to_say():
    item = ITEM | {"model": "x", "stream": True, "guided_regex": "a+", "seed": None, "top_k": 5}
    body = {"prompt": "a", "top_k": 5, "structured_outputs": {"regex": "a+"}}
    assert batch_rows.convert(item, V2) == body
    with pytest.raises(InvalidRequest, match="'prompts'"):
        batch_rows.convert(ITEM, V1)


def line(body: Any, status: int = 200, error: Any = None) -> dict[str, Any]:
    response = None if body is None else {"status_code": status, "request_id": "r", "body": body}
    return {"id": "batch_req_1", "custom_id": "0", "response": response, "error": error}


def answer(**choice: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": "Paris", "finish_reason": "stop", "logprobs": None} | choice
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    return {"object": "text_completion", "choices": [choice], "usage": usage}


def test_results_are_shown_in_the_form_of_their_version(scale):
    plain = {"text": "Paris", "num_prompt_tokens": 5, "num_completion_tokens": 1, "tokens": None}
    assert batch_rows.element(line(answer()), V1) == plain
    told = batch_rows.element(
        line(answer(logprobs={"tokens": ["Par", "is"], "token_logprobs": [-0.5, None]})), V1
    )
    assert scale.data_types.CompletionOutput.parse_obj(told).tokens[0].log_prob == -0.5
    assert batch_rows.element(line(answer()), V2) == answer()


@pytest.mark.parametrize("form", [V1, V2])
def test_a_row_that_failed_is_an_error_object(form):
    inner = {"message": "no", "type": "invalid_request_error", "param": "p", "code": "c"}
    assert batch_rows.element(line({"error": inner}, 400), form) == {"error": inner}
    expired = {"code": "batch_expired", "message": "too late"}
    told = batch_rows.element(line(None, error=expired), form)["error"]
    assert (told["code"], told["message"]) == ("batch_expired", "too late")
    for body in ({}, "text", {"error": "text"}):
        assert batch_rows.element(line(body, 500), form)["error"]["message"]


def test_an_answer_that_was_cut_off_is_none():
    assert "error" in batch_rows.element(line(answer(finish_reason="abort")), V1)
