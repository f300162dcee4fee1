"""Batches of OpenAI's and Scale's real clients, against the running system on vLLM."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.api.test_llm_engine_dialect import import_client, use
from tests.support.cluster import Cluster, eventually

pytestmark = [pytest.mark.slow, pytest.mark.alone]

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES = "/v1/responses"
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"}
ENDED = ("completed", "failed", "expired", "cancelled")
TIMEOUT_S = 60
Row = dict[str, Any]


def question(country: str) -> str:
    return f"What is the capital of {country}?"


def asked(country: str, **changes: Any) -> Row:
    messages = [{"role": "user", "content": question(country)}]
    body = {"model": "demo-chat", "messages": messages, "temperature": 0, "max_tokens": 20}
    return body | changes


@pytest.fixture
def client(cluster: Cluster) -> OpenAI:
    return cluster.openai()


def start(client: OpenAI, endpoint: str, bodies: dict[str, Row], **fields: Any) -> Any:
    """A batch of these bodies, by custom_id."""
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": endpoint, "body": body})
        for name, body in bodies.items()
    ]
    data = "\n".join(lines).encode()
    file = client.files.create(file=("rows.jsonl", data), purpose="batch")
    wanted = {"completion_window": "24h"} | fields
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, **wanted)


def wait(client: OpenAI, batch: str) -> Any:
    def ended() -> Any:
        found = client.batches.retrieve(batch)
        return found if found.status in ENDED else None

    return eventually(ended, TIMEOUT_S, 0.2, f"{batch} does not end")


def lines(client: OpenAI, file: str | None) -> list[Row]:
    if file is None:
        return []
    return [json.loads(line) for line in client.files.content(file).text.splitlines()]


def text(row: Row) -> str:
    return row["response"]["body"]["choices"][0]["message"]["content"]


# -- OpenAI's


def test_questions_are_answered_and_a_bad_row_hurts_no_other(client: OpenAI):
    bodies = {f"capital of {country}": asked(country) for country in CAPITALS}
    bodies["bad"] = asked("France", temperature=9)
    bodies["ünïcode \n id"] = asked("France")
    made = start(client, CHAT, bodies, metadata={"team": "maps"}, completion_window="1h")
    assert (made.status, made.completion_window) == ("validating", "1h")
    ended = wait(client, made.id)
    assert (ended.status, ended.model, ended.errors) == ("completed", "demo-chat", None)
    assert ended.request_counts.to_dict() == {"total": 5, "completed": 4, "failed": 1}
    assert ended.metadata == {"team": "maps"}
    times = (ended.created_at, ended.in_progress_at, ended.finalizing_at, ended.completed_at)
    assert list(times) == sorted(times)

    good, bad = lines(client, ended.output_file_id), lines(client, ended.error_file_id)
    assert [row["custom_id"] for row in good] == [name for name in bodies if name != "bad"]
    for row, capital in zip(good, [*CAPITALS.values(), "Paris"], strict=True):
        assert capital in text(row) and row["error"] is None
        assert row["response"]["status_code"] == 200 and row["response"]["request_id"]
        assert row["response"]["body"]["model"] == "demo-chat"
    (refused,) = bad
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("bad", 400)
    assert refused["response"]["body"]["error"]["param"] == "temperature"
    ids = [row["id"] for row in good + bad]
    assert len(set(ids)) == 5 and all(name.startswith("batch_req_") for name in ids)

    counted = [row["response"]["body"]["usage"] for row in good]
    assert ended.usage.input_tokens == sum(each["prompt_tokens"] for each in counted)
    assert ended.usage.output_tokens == sum(each["completion_tokens"] for each in counted)
    assert made.id in [batch.id for batch in client.batches.list(limit=5)]
    with pytest.raises(openai.ConflictError, match="completed"):
        client.batches.cancel(made.id)


def test_completions_and_embeddings(client: OpenAI):
    prompts = {"a": {"model": "demo-chat", "prompt": "One", "max_tokens": 3, "temperature": 0}}
    texts = {
        name: {"model": "demo-embed", "input": [question(name)], "encoding_format": "float"}
        for name in CAPITALS
    }
    begun = start(client, COMPLETIONS, prompts), start(client, EMBEDDINGS, texts)
    written, embedded = (wait(client, batch.id) for batch in begun)
    (row,) = lines(client, written.output_file_id)
    assert row["response"]["body"]["usage"]["completion_tokens"] == 3
    whole = client.completions.create(**prompts["a"])
    assert row["response"]["body"]["choices"][0]["text"] == whole.choices[0].text
    rows = lines(client, embedded.output_file_id)
    assert [row["custom_id"] for row in rows] == list(CAPITALS)
    assert all(row["response"]["body"]["data"][0]["embedding"] for row in rows)
    assert embedded.usage.input_tokens > 0 and embedded.usage.output_tokens == 0


def test_responses(client: OpenAI):
    bodies = {
        name: {"model": "demo-chat", "input": question(name), "temperature": 0} for name in CAPITALS
    }
    bodies["bad"] = bodies["France"] | {"background": True}
    ended = wait(client, start(client, RESPONSES, bodies).id)
    assert ended.request_counts.to_dict() == {"total": 4, "completed": 3, "failed": 1}
    for row, capital in zip(lines(client, ended.output_file_id), CAPITALS.values(), strict=True):
        told = row["response"]["body"]
        assert capital in told["output"][0]["content"][0]["text"]
        with pytest.raises(openai.NotFoundError):  # the batch keeps it
            client.responses.retrieve(told["id"])
    assert ended.usage.output_tokens > 0


def test_an_input_that_is_wrong_runs_no_row_and_says_why(client: OpenAI):
    begun = [
        start(client, CHAT, {"a": asked("France"), "b": asked("Italy", model="demo-embed")}),
        start(client, CHAT, {"a": asked("France", model="nowhere")}),
        client.batches.create(input_file_id="file-nowhere", endpoint=CHAT, completion_window="24h"),
    ]
    ended = [wait(client, batch.id) for batch in begun]
    assert [batch.status for batch in ended] == ["failed"] * 3
    told = [(batch.errors.data[0].code, batch.errors.data[0].line) for batch in ended]
    assert told == [("mismatched_model", 2), ("model_not_found", 1), ("invalid_request", None)]
    assert all(batch.failed_at and batch.output_file_id is None for batch in ended)


def test_a_batch_that_is_cancelled_keeps_what_it_has(client: OpenAI):
    long = {str(n): asked("France", ignore_eos=True, max_tokens=200, seed=n) for n in range(2000)}
    made = start(client, CHAT, long)

    def some() -> bool:
        return client.batches.retrieve(made.id).request_counts.completed > 0

    eventually(some, TIMEOUT_S, 0.2, "no row is finished")
    assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    ended = wait(client, made.id)
    rows = lines(client, ended.output_file_id)
    assert ended.status == "cancelled" and ended.cancelled_at >= ended.cancelling_at
    assert 0 < len(rows) == ended.request_counts.completed < 2000
    assert len({row["custom_id"] for row in rows}) == len(rows)


def test_engines_of_its_own_answer_and_go(client: OpenAI, cluster: Cluster):
    bodies = {country: asked(country) for country in CAPITALS}
    file = start(client, CHAT, bodies).input_file_id
    made = client.batches.create(
        input_file_id=file, endpoint=CHAT, completion_window="1h", extra_body={"own_engine": True}
    )
    assert made.own_engine
    ended = wait(client, made.id)
    assert (ended.status, ended.request_counts.completed) == ("completed", 3), ended.status_reason
    rows = lines(client, ended.output_file_id)
    assert all(CAPITALS[row["custom_id"]] in text(row) for row in rows)
    with cluster.client() as http:
        path = f"/v1/endpoints/{made.id}"
        eventually(lambda: http.get(path).status_code == 404, 30, 0.3, "its engine stays")


# -- Scale's


@pytest.fixture
def scale(cluster: Cluster) -> Any:
    client = import_client()
    use(client, cluster, cluster.KEY)
    yield client
    client.api_engine.set_base_path(None)
    client.api_engine.set_api_key(None)


@pytest.fixture
def outputs(cluster: Cluster) -> Path:
    """Where relative paths of the operator lie."""
    return Path(cluster.settings.storage_url) / "data"


def prompts_of(scale: Any, countries: Iterable[str]) -> Any:
    kind = scale.data_types.batch_completion.CreateBatchCompletionsV1RequestContent
    prompts = [question(country) for country in countries]
    return kind(prompts=prompts, max_new_tokens=8, temperature=0.0, return_token_log_probs=True)


def finish(scale: Any, job: str) -> Row:
    def ended() -> Row | None:
        told = scale.Completion.get_batch_completion(job)["job"]
        return told if told["status"] in ENDED else None

    return eventually(ended, TIMEOUT_S, 0.2, f"{job} does not end")


def read(outputs: Path, path: str) -> list[Row]:
    (found,) = outputs.glob(f"*/{path}")  # one folder an owner
    return json.loads(found.read_bytes())


def make(scale: Any, path: str, model: str = "demo-chat", **fields: Any) -> str:
    config = fields.pop("config", {})
    return scale.Completion.batch_create(
        output_data_path=path,
        model_config=scale.data_types.CreateBatchCompletionsModelConfig(model=model, **config),
        **fields,
    ).job_id


def test_v1_prompts_are_answered_in_order(scale: Any, outputs: Path):
    job = make(scale, "v1/out.json", content=prompts_of(scale, CAPITALS))
    assert finish(scale, job)["status"] == "completed"
    answers = [scale.data_types.CompletionOutput.parse_obj(r) for r in read(outputs, "v1/out.json")]
    for country, answer in zip(CAPITALS, answers, strict=True):
        asked_now = scale.Completion.create(
            model="demo-chat", prompt=question(country), max_new_tokens=8, temperature=0.0
        )
        assert answer.text == asked_now.output.text
        assert len(answer.tokens) == answer.num_completion_tokens


def test_v2_chat_items_inline_and_by_path(scale: Any, outputs: Path):
    item = scale.data_types.batch_completion.FilteredChatCompletionV2Request
    messages = {country: asked(country)["messages"] for country in CAPITALS}
    inline = [item(messages=each, temperature=0, max_tokens=20) for each in messages.values()]
    first = make(scale, "v2/inline.json", content=inline, use_v2=True)
    assert finish(scale, first)["status"] == "completed"

    (owner,) = {path.parents[1] for path in outputs.glob("*/v2/inline.json")}
    items = [{"messages": each, "temperature": 0, "max_tokens": 20} for each in messages.values()]
    items.insert(1, items[0] | {"temperature": 9})
    (owner / "v2" / "items.json").write_text(json.dumps(items))
    second = make(scale, "v2/path.json", input_data_path="v2/items.json", use_v2=True)
    assert finish(scale, second)["request_counts"] == {"total": 4, "completed": 3, "failed": 1}

    by_path = read(outputs, "v2/path.json")
    assert by_path.pop(1)["error"]["param"] == "temperature"
    for found in (read(outputs, "v2/inline.json"), by_path):
        told = [each["choices"][0]["message"]["content"] for each in found]
        assert all(capital in each for capital, each in zip(CAPITALS.values(), told, strict=True))


def test_a_model_that_is_not_deployed_runs_on_engines_of_its_own(scale: Any, outputs: Path):
    config = {"checkpoint_path": "builtin:chat", "max_model_len": 512, "seed": 1}
    content = prompts_of(scale, CAPITALS)
    job = make(scale, "own.json", "not-deployed", content=content, config=config)
    told = finish(scale, job)
    assert told["status"] == "completed", told["status_reason"]
    assert told["model_config"]["checkpoint_path"] == "builtin:chat"
    live = make(scale, "live.json", content=content)
    assert finish(scale, live)["status"] == "completed"
    own, deployed = read(outputs, "own.json"), read(outputs, "live.json")
    assert [each["text"] for each in own] == [each["text"] for each in deployed]


def test_a_job_is_cancelled(scale: Any):
    kind = scale.data_types.batch_completion.CreateBatchCompletionsV1RequestContent
    content = kind(prompts=["One two three"] * 3000, max_new_tokens=200, temperature=1.0)
    job = make(scale, "cancelled.json", content=content)
    assert scale.Completion.cancel_batch_completion(job) == {"success": True}
    assert finish(scale, job)["status"] == "cancelled"
    with pytest.raises(scale.errors.NotFoundError):
        scale.Completion.cancel_batch_completion("ft-nowhere")
