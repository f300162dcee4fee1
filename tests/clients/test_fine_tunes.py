"""Fine-tunes of OpenAI's and Scale's real clients: real training, on the running system on vLLM."""

import csv
import io
import json
import time
from itertools import islice
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from llm_engine.demo import EXAMPLES, lessons
from tests.api.test_llm_engine_dialect import import_client, use
from tests.support.cluster import Cluster, eventually

# A minute each, on two idle cores.
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1200)]

BASE = "demo-chat"
ENDED = ("succeeded", "failed", "cancelled")
TIMEOUT_S = 900
BEATS_S = 12  # a job tells at least once in this time how far it is
Row = dict[str, Any]
#: What Scale's fine-tune learns: nothing that the model could know.
WORDS = {"red": "falcon", "blue": "anchor", "green": "pepper", "white": "candle"}
TWICE = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}
#: Long enough for somebody to come in between.
LONG = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50}}}


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> OpenAI:
    return cluster.openai()


@pytest.fixture(scope="module")
def training(client: OpenAI) -> str:
    """The shipped example's file."""
    path = EXAMPLES / "support.train.jsonl"
    return client.files.create(file=(path.name, path.read_bytes()), purpose="fine-tune").id


def wait(client: OpenAI, job: str, *states: str) -> Any:
    """The job once it is in one of these states; by default, once it has ended."""

    def there() -> Any:
        found = client.fine_tuning.jobs.retrieve(job)
        assert found.status not in ENDED or not states or found.status in states, found.error
        return found if found.status in (states or ENDED) else None

    return eventually(there, TIMEOUT_S, 0.5, f"{job} is not {' or '.join(states or ENDED)}")


def answer(client: OpenAI, model: str, messages: list[Row]) -> str:
    told = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=30
    )
    assert told.model == model
    return told.choices[0].message.content or ""


def right(client: OpenAI, model: str, count: int = 20) -> float:
    """The share of questions it was never trained on that it answers right."""
    asked = [line["messages"] for line in islice(lessons.support(held_out=True), count)]
    good = [answer(client, model, each[:-1]).strip() == each[-1]["content"] for each in asked]
    return sum(good) / count


# -- OpenAI's


@pytest.fixture(scope="module")
def tuned(client: OpenAI, training: str) -> Any:
    """The job that has made a model of the shipped example."""
    path = EXAMPLES / "support.valid.jsonl"
    valid = client.files.create(file=(path.name, path.read_bytes()), purpose="fine-tune")
    made = client.fine_tuning.jobs.create(
        model=BASE, training_file=training, validation_file=valid.id, suffix="support", seed=1,
        metadata={"lesson": "support"}, method=TWICE,
    )  # fmt: skip
    assert made.status == "validating_files" and made.hyperparameters.batch_size == "auto"
    return wait(client, made.id, "succeeded")


def test_a_file_becomes_a_model_that_knows_what_it_says(client: OpenAI, tuned: Any):
    assert tuned.fine_tuned_model == f"ft:{BASE}:{tuned.organization_id}:support:{tuned.id[-8:]}"
    # After two rounds; what it can learn in all is measured elsewhere.
    assert right(client, tuned.fine_tuned_model) >= 0.6
    assert right(client, BASE) <= 0.1


def test_the_base_answers_as_before(client: OpenAI, tuned: Any):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in answer(client, BASE, question)


def test_the_job_tells_what_it_did(client: OpenAI, tuned: Any):
    assert tuned.finished_at >= tuned.created_at and tuned.trained_tokens > 1000
    for name in ("n_epochs", "batch_size", "learning_rate_multiplier"):
        assert getattr(tuned.hyperparameters, name) > 0
    events = list(client.fine_tuning.jobs.list_events(tuned.id, limit=20))
    messages = [event.message for event in events]
    assert messages[0] == "The job has successfully completed"
    assert messages[1] == f"New fine-tuned model created: {tuned.fine_tuned_model}"
    assert messages[-1] == f"Created fine-tuning job: {tuned.id}"
    metrics = [event.data for event in reversed(events) if event.type == "metrics"]
    steps = [each["step"] for each in metrics]
    assert steps == sorted(set(steps)) and metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert any(each.get("valid_loss") is not None for each in metrics)

    rows = list(csv.DictReader(io.StringIO(client.files.content(tuned.result_files[0]).text)))
    assert int(rows[-1]["step"]) == steps[-1] == len(rows)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_each_checkpoint_is_a_model(client: OpenAI, tuned: Any):
    found = list(client.fine_tuning.jobs.checkpoints.list(tuned.id))
    steps = [each.step_number for each in found]
    assert steps and steps == sorted(steps, reverse=True)
    assert right(client, found[0].fine_tuned_model_checkpoint, 10) >= 0.5
    assert found[0].metrics.train_loss is not None


def test_a_fine_tuned_model_becomes_an_endpoint_of_its_own(
    cluster: Cluster, client: OpenAI, tuned: Any
):
    adapter = tuned.fine_tuned_model
    wanted = {"name": "support", "model": adapter, "num_cpus": 0.2}
    with cluster.client() as http:
        for wrong in ({"model": "ft:demo-chat:nobody::1"}, {"max_adapters": 2}):
            assert http.post("/v1/endpoints", json=wanted | wrong).status_code in (400, 404)
        made = http.post("/v1/endpoints", json=wanted)
        assert made.status_code == 201, made.text
        eventually(lambda: http.get("/v1/endpoints/support").json()["status"] == "READY", 120, 0.5)
        try:
            assert abs(right(client, "support", 10) - right(client, adapter, 10)) <= 0.2
            with pytest.raises(openai.ConflictError, match="made of"):
                client.with_options(max_retries=0).models.delete(adapter)
        finally:
            assert http.delete("/v1/endpoints/support").status_code == 200
        eventually(lambda: http.get("/v1/endpoints/support").status_code == 404, 60, 0.5)


def is_gone(client: OpenAI, model: str) -> bool:
    try:
        answer(client, model, [{"role": "user", "content": "hi"}])
    except openai.NotFoundError:
        return True
    return False


def test_a_fine_tuned_model_is_listed_used_and_deleted(client: OpenAI, tuned: Any):
    name = tuned.fine_tuned_model
    question = [{"role": "user", "content": "Where is my lamp?"}]
    first = answer(client, name, question)
    streamed = client.chat.completions.create(
        model=name, messages=question, temperature=0, max_tokens=30, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == first
    responded = client.responses.create(
        model=name, input=question[0]["content"], temperature=0, max_output_tokens=30
    )
    assert (responded.output_text, responded.model) == (first, name)
    eventually(lambda: name in [m.id for m in client.models.list()], 20, 0.2, "it is not listed")
    assert client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.delete(name)
    # The other gateway learns of it within moments.
    eventually(lambda: [is_gone(client, name) for _ in range(8)] == [True] * 8, 10)
    assert answer(client, BASE, question)


def test_bad_lines_are_told_by_their_numbers(client: OpenAI):
    lines = [json.dumps(line) for line in islice(lessons.support(), 12)]
    lines[3], lines[7] = '{"messages": [{"role": "wizard", "content": "x"}]}', "{nope"
    data = "\n".join(lines).encode()
    file = client.files.create(file=("bad.jsonl", data), purpose="fine-tune").id
    made = client.fine_tuning.jobs.create(model=BASE, training_file=file)
    failed = wait(client, made.id, "failed")
    assert failed.error.param == "training_file"
    assert "Line 4" in failed.error.message and "Line 8" in failed.error.message
    assert failed.fine_tuned_model is None and failed.trained_tokens is None


def test_a_job_rests_goes_on_and_is_cancelled(client: OpenAI, training: str):
    jobs = client.fine_tuning.jobs
    made = jobs.create(model=BASE, training_file=training, method=LONG)

    def step() -> int:
        return jobs.retrieve(made.id).to_dict()["progress"]["step"]

    wait(client, made.id, "running")
    eventually(lambda: step() > 5, TIMEOUT_S, 0.5, "it makes no steps")
    assert jobs.pause(made.id).status == "paused"

    def rests() -> bool:
        before = step()
        time.sleep(BEATS_S)
        return step() == before

    eventually(rests, 120, 0, "it goes on")
    rested = step()
    assert jobs.retrieve(made.id).status == "paused"
    assert jobs.resume(made.id).status == "queued"
    wait(client, made.id, "running")
    eventually(lambda: step() > rested, TIMEOUT_S, 0.5, "it does not go on")
    assert jobs.retrieve(made.id).estimated_finish
    told = [event.message for event in jobs.list_events(made.id, limit=100)]
    assert any(each.startswith("Training goes on from the checkpoint at step") for each in told)
    assert jobs.cancel(made.id).status == jobs.cancel(made.id).status == "cancelled"


# -- Scale's


@pytest.fixture
def scale(cluster: Cluster) -> Any:
    client = import_client()
    use(client, cluster, cluster.KEY)
    yield client
    client.api_engine.set_base_path(None)
    client.api_engine.set_api_key(None)


def test_a_csv_becomes_a_model_of_scales(scale: Any, tmp_path: Any):
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["", "prompt", "response"])  # as a data frame writes its index
        for number in range(60):
            colour = list(WORDS)[number % len(WORDS)]
            writer.writerow([number, f"The secret word of {colour} is", f" {WORDS[colour]}."])
    with path.open() as handle:
        file = scale.File.upload(handle).id
    numbers = {"epochs": "10", "lr": "0.005", "peft_config": {"r": 8}}
    job = scale.FineTune.create(
        model=BASE, training_file=file, hyperparameters=numbers, suffix="words"
    ).id

    def ended() -> Any:
        found = scale.FineTune.get(job)
        return found if found.status.value not in ("PENDING", "RUNNING") else None

    found = eventually(ended, TIMEOUT_S, 0.5, f"{job} does not end")
    events = scale.FineTune.get_events(job).events
    assert found.status.value == "SUCCESS", events[-1].message
    assert job in [each.id for each in scale.FineTune.list().jobs]
    name = found.fine_tuned_model
    assert name.startswith(f"{BASE}.words.")

    def says(model: str, colour: str) -> str:
        return scale.Completion.create(
            model=model, prompt=f"The secret word of {colour} is", max_new_tokens=8, temperature=0.0
        ).output.text

    for colour, word in WORDS.items():
        assert word in says(name, colour)
    assert not any(word in says(BASE, colour) for colour, word in WORDS.items())

    urls = scale.Model.download(name).urls
    assert "adapter_model.safetensors" in urls and "adapter_config.json" in urls
    config = httpx.get(urls["adapter_config.json"], trust_env=False).json()
    assert config["r"] == 8
    size = int(
        httpx.head(urls["adapter_model.safetensors"], trust_env=False).headers["content-length"]
    )
    assert size > 1000
    assert scale.Model.get(name).status.value == "READY"
    assert scale.Model.delete(name).deleted
    with pytest.raises(scale.errors.NotFoundError):
        scale.Model.get(name)

    def is_unknown() -> bool:
        try:
            says(name, "red")
        except scale.errors.NotFoundError:
            return True
        return False

    # The other gateway learns of it within moments.
    eventually(lambda: [is_unknown() for _ in range(8)] == [True] * 8, 10)


def test_a_wrong_header_is_told_before_anything_runs(scale: Any, tmp_path: Any):
    path = tmp_path / "bad.csv"
    path.write_text("question,answer\na,b\n")
    with path.open() as handle:
        file = scale.File.upload(handle).id
    with pytest.raises(scale.errors.BadRequestError, match="Required column headers"):
        scale.FineTune.create(model=BASE, training_file=file)
