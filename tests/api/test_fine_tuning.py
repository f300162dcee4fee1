"""OpenAI's fine-tuning jobs, asked by OpenAI's real client at a real gateway. No job runs: where
one would, the test does to the store what a job does."""

import contextlib
import re
import time
from typing import Any

import openai
import pytest

from llm_engine.errors import Conflict, StorageUnavailable
from llm_engine.records import ModelRecord, Scope
from tests.api.test_batches import client_of, key_of
from tests.support.cluster import eventually
from tests.support.fine_tuned import Work, jsonl, keep
from tests.support.gateway import GatewayThread, fake_endpoint

ROOT = "sk-operator"
JOBS = "/v1/fine_tuning/jobs"
NUMBERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
AUTO = dict.fromkeys(NUMBERS, "auto")
RESOLVED = {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 1.0}


@pytest.fixture(scope="module")
def served():
    endpoints = [
        fake_endpoint("fake", max_adapters=2),
        fake_endpoint("org/small:1", max_adapters=1, max_adapter_rank=8),
        fake_endpoint("demo", model="builtin:chat"),
        fake_endpoint("plain"),
        fake_endpoint("vectors", task="embed"),
    ]
    sections = {"fine_tunes": {"max_open": 8, "max_file_bytes": 10_000}}
    with GatewayThread(endpoints, api_keys=[ROOT], sections=sections) as running:
        yield running


@pytest.fixture(scope="module")
def ann(served):
    return client_of(served, key_of(served, "ann"))


@pytest.fixture(scope="module")
def jobs(ann):
    return ann.fine_tuning.jobs


@pytest.fixture
def http(served):
    with served.client(headers={"authorization": f"Bearer {key_of(served, 'ann')}"}) as client:
        yield client


@pytest.fixture(autouse=True)
def room(served):
    """Each test's fine-tunes are over when it is."""
    yield
    store = served.services.store.fine_tunes
    for record in store.open():
        with contextlib.suppress(Conflict):  # its file was found bad just now
            store.ask_cancel(record.id)


@pytest.fixture(scope="module")
def file(served):
    return keep(served)


def refused(http: Any, status: int = 400, path: str = JOBS, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
    return error


# -- the object


def test_a_new_job_has_every_field_and_what_is_unset_is_null(jobs, http, file):
    made = jobs.create(model="fake", training_file=file)
    assert re.fullmatch("ftjob-[0-9a-f]{26}", made.id)
    told = http.get(f"{JOBS}/{made.id}").json()
    assert told.pop("created_at") == pytest.approx(time.time(), abs=5)
    assert 0 <= told.pop("seed") < 2**31
    assert told == {
        "id": made.id, "object": "fine_tuning.job", "error": None, "fine_tuned_model": None,
        "finished_at": None, "hyperparameters": AUTO, "model": "fake", "organization_id": "ann",
        "result_files": [], "status": "validating_files", "trained_tokens": None,
        "training_file": file, "validation_file": None, "estimated_finish": None,
        "integrations": [], "metadata": None, "user_provided_suffix": None, "usage_metrics": None,
        "shared_with_openai": False, "status_reason": None,
        "method": {"type": "supervised", "supervised": {"hyperparameters": AUTO}},
        "progress": {"step": 0, "total_steps": None},
    }  # fmt: skip
    fields = set(openai.types.fine_tuning.FineTuningJob.model_fields)
    assert fields <= {*told, "created_at", "seed"}


def test_all_that_is_asked_for_is_kept_and_told(jobs, served, file):
    valid = keep(served, name="valid.jsonl")
    numbers = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5, "beta": 0.2}
    made = jobs.create(
        model="fake", training_file=file, validation_file=valid, suffix="my: modèl", seed=7,
        metadata={"team": "search"}, method={"type": "dpo", "dpo": {"hyperparameters": numbers}},
    )  # fmt: skip
    assert (made.seed, made.validation_file, made.metadata) == (7, valid, {"team": "search"})
    assert made.method.type == "dpo" and made.method.dpo.hyperparameters.to_dict() == numbers
    assert made.hyperparameters.to_dict() == {name: numbers[name] for name in NUMBERS}
    assert made.to_dict()["user_provided_suffix"] == "my: modèl"
    record = served.services.store.fine_tunes.get(made.id)
    assert (record.owner, record.dialect, record.base, record.method) == (
        "ann", "openai", "fake", "dpo",
    )  # fmt: skip
    assert (record.weights, record.parent, record.hyperparameters) == ("none", None, numbers)
    assert record.name == f"ft:fake:ann:my--mod-l:{made.id[-8:]}"


def test_a_job_is_watched_to_its_end(jobs, served, http, file):
    made = jobs.create(model="fake", training_file=file)
    work = Work(served, made.id).run()
    work.step(10, 0.75, tokens_per_s=99.0, left_s=20.0, train_loss=0.75)
    seen = jobs.retrieve(made.id)
    assert seen.status == "running" and seen.fine_tuned_model is None
    assert seen.estimated_finish == pytest.approx(time.time() + 20, abs=3)
    assert seen.hyperparameters.to_dict() == RESOLVED
    assert seen.method.supervised.hyperparameters.to_dict() == RESOLVED
    assert seen.to_dict()["progress"] == {
        "step": 10, "total_steps": 30, "tokens_per_s": 99.0, "left_s": 20.0, "train_loss": 0.75,
    }  # fmt: skip
    work.finish()
    ended = jobs.retrieve(made.id)
    assert (ended.status, ended.trained_tokens) == ("succeeded", 1234)
    assert ended.fine_tuned_model == f"ft:fake:ann::{made.id[-8:]}"
    assert ended.finished_at == pytest.approx(time.time(), abs=5)
    assert ended.estimated_finish is None and ended.error is None
    (results,) = ended.result_files
    assert http.get(f"/v1/files/{results}").json()["purpose"] == "fine-tune-results"
    assert http.get(f"/v1/files/{results}/content").text.startswith("step,train_loss")


def test_what_is_wrong_with_the_files_is_told_by_the_job(jobs, served, file):
    made = jobs.create(model="fake", training_file=file)
    Work(served, made.id).fail("invalid_training_file", "Line 3: no")
    ended = jobs.retrieve(made.id)
    assert (ended.status, ended.fine_tuned_model, ended.result_files) == ("failed", None, [])
    assert ended.error.to_dict() == {
        "code": "invalid_training_file", "message": "Line 3: no", "param": "training_file",
    }  # fmt: skip
    assert ended.finished_at


def test_the_deprecated_hyperparameters_count_as_well(jobs, file):
    made = jobs.create(model="fake", training_file=file, hyperparameters={"n_epochs": 4})
    assert made.hyperparameters.to_dict() == AUTO | {"n_epochs": 4}
    assert made.method.supervised.hyperparameters.n_epochs == 4


def test_our_own_hyperparameters_are_told_back(jobs, file):
    numbers = {"lora_rank": 4, "n_epochs": None}
    made = jobs.create(
        model="fake", training_file=file,
        method={"type": "supervised", "supervised": {"hyperparameters": numbers}},
    )  # fmt: skip
    assert made.method.supervised.hyperparameters.to_dict() == AUTO | {"lora_rank": 4}


def test_a_fine_tune_goes_on_from_a_fine_tuned_model_and_through_an_alias(jobs, served, file):
    first = jobs.create(model="fake", training_file=file)
    work = Work(served, first.id).run()
    checkpoint = work.checkpoint(10)
    adapter = work.finish()
    for name in (adapter.name, checkpoint.name):
        made = jobs.create(model=name, training_file=file)
        record = served.services.store.fine_tunes.get(made.id)
        parent = adapter if name == adapter.name else checkpoint
        assert (record.base, record.parent) == ("fake", parent.id)
        assert made.model == name and record.name == f"ft:fake:ann::{made.id[-8:]}"
    alias = ModelRecord("mdl_tune", "ann", "best", model=adapter.name)
    served.services.store.registered.add(alias, 100)
    directory = served.services.store.directory()
    served.services.update(None, directory)
    made = jobs.create(model="best", training_file=file)
    assert served.services.store.fine_tunes.get(made.id).parent == adapter.id
    ben = client_of(served, key_of(served, "ben"))
    with pytest.raises(openai.NotFoundError):  # it is ann's
        ben.fine_tuning.jobs.create(model=adapter.name, training_file=keep(served, owner="ben"))


def test_the_rank_is_one_that_the_endpoint_can_serve(jobs, served, http, file):
    made = jobs.create(model="org/small:1", training_file=file)
    record = served.services.store.fine_tunes.get(made.id)
    assert record.hyperparameters == {"lora_rank": 8}
    assert record.name == f"ft:org/small:1:ann::{made.id[-8:]}"
    method = {"type": "supervised", "supervised": {"hyperparameters": {"lora_rank": 16}}}
    error = refused(http, model="org/small:1", training_file=file, method=method)
    assert error["param"] == "method.supervised.hyperparameters.lora_rank"
    assert "larger rank than 8" in error["message"]


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens", "nonsense"])
def test_modules_that_the_demo_model_serves_no_adapter_of_are_refused(http, file, module):
    where = "method.supervised.hyperparameters"

    def asking(modules):
        hyperparameters = {"target_modules": modules}
        method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        return {"model": "demo", "training_file": file, "method": method}

    error = refused(http, **asking(["q_proj", module]))
    assert error["param"] == f"{where}.target_modules" and f"'{module}'" in error["message"]
    for modules in ("all-linear", "auto", ["q_proj", "layers.0.mlp.down_proj"]):
        assert http.post(JOBS, json=asking(modules)).status_code == 200


def test_the_rank_of_one_that_goes_on_is_its_parents(jobs, served, http):
    file = keep(served)
    first = jobs.create(model="org/small:1", training_file=file)
    parent = Work(served, first.id).run().finish()
    made = jobs.create(model=parent.name, training_file=file)
    assert served.services.store.fine_tunes.get(made.id).hyperparameters == {}
    body = {"model": parent.name, "training_file": file}
    assert http.post(JOBS, json=body | {"hyperparameters": {"lora_rank": 8}}).status_code == 200
    error = refused(http, **body, hyperparameters={"lora_rank": 4})
    assert error["param"] == "hyperparameters.lora_rank" and parent.name in error["message"]


# -- what the files hold


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (jsonl(1), "invalid_n_examples", "must have at least 10 examples"),
        (jsonl(11) + b"[]\n", "invalid_training_file", "Line 12: It is not a JSON object."),
    ],
)
def test_a_bad_file_is_told_before_its_job_has_its_turn(jobs, served, data, code, said):
    made = jobs.create(model="fake", training_file=keep(served, data))
    failed = eventually(lambda: (now := jobs.retrieve(made.id)).status == "failed" and now)
    assert (failed.error.code, failed.error.param) == (code, "training_file")
    assert said in failed.error.message
    last = jobs.list_events(made.id, limit=1).data[0]
    assert last.level == "error" and said in last.message


def test_a_bad_validation_file_is_told_and_good_files_wait_their_turn(jobs, served, file):
    bad = jobs.create(model="fake", training_file=file, validation_file=keep(served, b"{}\n"))
    good = jobs.create(model="fake", training_file=file, validation_file=file)
    failed = eventually(lambda: (now := jobs.retrieve(bad.id)).status == "failed" and now)
    assert failed.error.param == "validation_file"
    eventually(lambda: not served.services.checking.locked())
    assert jobs.retrieve(good.id).status == "validating_files"


def test_a_storage_that_is_away_fails_nothing(jobs, served, monkeypatch):
    file, asked = keep(served, jsonl(1)), []

    def away(key):
        asked.append(key)
        raise StorageUnavailable("away")

    monkeypatch.setattr(served.services.storage, "read", away)
    made = jobs.create(model="fake", training_file=file)
    eventually(lambda: asked and not served.services.checking.locked())
    assert jobs.retrieve(made.id).status == "validating_files"


# -- what is refused


@pytest.mark.parametrize(
    "body, param, code",
    [
        ({"training_file": None}, "training_file", None),
        ({"model": None}, "model", None),
        ({"model": 7}, "model", "invalid_type"),
        ({"model": "plain"}, "model", "model_not_supported"),
        ({"model": "vectors"}, "model", "model_not_supported"),
        ({"training_file": "file-nowhere"}, "training_file", "file_not_found"),
        ({"training_file": "a\0b"}, "training_file", "invalid_value"),
        ({"validation_file": "file-nowhere"}, "validation_file", "file_not_found"),
        ({"suffix": "x" * 65}, "suffix", "string_above_max_length"),
        ({"suffix": "a\nb"}, "suffix", "invalid_value"),
        ({"seed": -1}, "seed", "integer_below_min_value"),
        ({"seed": 2**31}, "seed", "integer_above_max_value"),
        ({"seed": "1"}, "seed", "invalid_type"),
        ({"metadata": {"k": 1}}, "metadata.k", "invalid_type"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "object_above_max_properties"),
        ({"metadata": {"k": "\0"}}, "metadata.k", "invalid_value"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "unsupported_parameter"),
        ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_value"),
        ({"method": {"type": "other"}}, "method.type", "invalid_value"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised", "invalid_value"),
        ({"method": {}}, "method.type", "missing_required_parameter"),
        ({"method": "dpo"}, "method", "invalid_type"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size", "invalid_value"),
        ({"hyperparameters": {"batch_size": []}}, "hyperparameters.batch_size", "invalid_value"),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta", "unknown_parameter"),
        ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs", "unknown_parameter"),
        ({"typo": 1}, "typo", "unknown_parameter"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_at_once(http, file, body, param, code):
    whole = {"model": "fake", "training_file": file} | body
    error = refused(http, **{name: value for name, value in whole.items() if value is not None})
    assert error["param"] == param and error["code"] == (code or "missing_required_parameter")


@pytest.mark.parametrize("value", [0, -1, "much", 1e999])
def test_numbers_of_a_method_are_named_with_all_their_path(http, file, value):
    numbers = {"learning_rate_multiplier": "Infinity" if value == 1e999 else value}
    method = {"type": "dpo", "dpo": {"hyperparameters": numbers}}
    error = refused(http, model="fake", training_file=file, method=method)
    assert error["param"] == "method.dpo.hyperparameters.learning_rate_multiplier"
    assert error["param"] in error["message"]


def test_numbers_in_both_places_are_too_many(http, file):
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}}
    numbers = {"n_epochs": 1}
    error = refused(http, model="fake", training_file=file, method=method, hyperparameters=numbers)
    assert error["param"] == "hyperparameters"


def test_a_model_that_does_not_exist_is_404(http, file, served):
    error = refused(http, 404, model="nowhere", training_file=file)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    upstream = ModelRecord("mdl_up", "ann", "far", url="http://127.0.0.1:1/v1")
    served.services.store.registered.add(upstream, 100)
    served.services.update(None, served.services.store.directory())
    error = refused(http, model="far", training_file=file)
    assert "external model" in error["message"] and error["code"] == "model_not_supported"


def test_anothers_file_is_as_good_as_none_and_a_large_one_is_too_large(http, served):
    theirs = keep(served, owner="ben")
    assert refused(http, model="fake", training_file=theirs)["code"] == "file_not_found"
    large = keep(served, jsonl(500))
    error = refused(http, model="fake", training_file=large)
    assert error["code"] == "file_too_large" and "fine_tunes.max_file_bytes" in error["message"]


def test_too_many_open_ones(jobs, http, file):
    for _ in range(8):
        jobs.create(model="fake", training_file=file)
    answer = http.post(JOBS, json={"model": "fake", "training_file": file})
    assert answer.status_code == 429 and answer.headers["retry-after"]
    assert answer.json()["error"]["code"] == "too_many_fine_tunes"


def test_the_scope_files_is_needed(served, file):
    with served.client() as client:
        client.headers["authorization"] = f"Bearer {key_of(served, 'ann', Scope.INFERENCE)}"
        assert client.post(JOBS, json={}).status_code == 403
        assert client.get(JOBS).status_code == 403


# -- once, and whose


def test_a_request_that_is_sent_again_makes_nothing_twice(jobs, served, http, file):
    key = {"idempotency-key": "tune-1"}
    body = {"model": "fake", "training_file": file}
    first, again = (http.post(JOBS, json=body, headers=key) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    other = http.post(JOBS, json=body | {"seed": 1}, headers=key)
    assert other.status_code == 409 and other.headers["x-should-retry"] == "false"
    gone = keep(served)
    key, body = {"idempotency-key": "tune-2"}, body | {"training_file": gone}
    first = http.post(JOBS, json=body, headers=key).json()
    http.delete(f"/v1/files/{gone}")  # what was made stays made
    assert http.post(JOBS, json=body, headers=key).json()["id"] == first["id"]


def test_another_owners_job_does_not_exist(jobs, served, file):
    made = jobs.create(model="fake", training_file=file)
    ben = client_of(served, key_of(served, "ben")).fine_tuning.jobs
    calls = (ben.retrieve, ben.cancel, ben.pause, ben.resume, ben.list_events)
    for call in (*calls, ben.checkpoints.list):
        with pytest.raises(openai.NotFoundError) as caught:
            call(made.id)
        assert caught.value.code == "fine_tune_not_found"
    assert made.id not in [each.id for each in ben.list()]
    with pytest.raises(openai.NotFoundError):
        ben.list(after=made.id)
    operator = client_of(served, ROOT).fine_tuning.jobs
    assert operator.retrieve(made.id).id == made.id
    assert made.id in [each.id for each in operator.list()]


# -- lists


def test_the_newest_comes_first_page_by_page(jobs, http, file):
    made = [jobs.create(model="fake", training_file=file).id for _ in range(5)]
    page = http.get(JOBS, params={"limit": 2}).json()
    assert set(page) == {"object", "data", "has_more"} and page["has_more"]
    assert [each["id"] for each in page["data"]] == made[:-3:-1]
    found = [each.id for each in jobs.list(limit=2)]
    assert found[:5] == made[::-1] and len(set(found)) == len(found)
    for query in ("limit=0", "limit=101", "limit=x"):
        assert http.get(f"{JOBS}?{query}").status_code == 400
    assert http.get(f"{JOBS}?after=ftjob-nowhere").status_code == 404


def test_jobs_are_found_by_their_metadata(jobs, http, file):
    labels: list[Any] = [{"team": "a", "n": "1"}, {"team": "a"}, {'we"i\\rd[]': "x", "e": ""}, None]
    made = [jobs.create(model="fake", training_file=file, metadata=each).id for each in labels]

    def found(**query: Any) -> list[str]:
        ids = [each.id for each in jobs.list(**query)]
        return [job for job in made if job in ids]

    assert found(metadata={"team": "a"}) == made[:2]
    assert found(metadata={"team": "a", "n": "1"}) == made[:1]
    assert found(metadata={"team": "b"}) == []
    assert found(metadata={'we"i\\rd[]': "x"}) == [made[2]]
    assert found(metadata={"e": ""}) == [made[2]]
    assert found(extra_query={"metadata": "null"}) == [made[3]]
    assert found() == made
    for query in ("metadata=x", "metadata=null&metadata[a]=b", "metadata[a=b", "metadata[%00]=b"):
        answer = http.get(f"{JOBS}?{query}")
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "metadata"


def test_events_are_told_newest_first(jobs, served, http, file):
    made = jobs.create(model="fake", training_file=file)
    work = Work(served, made.id).run()
    for step in range(1, 6):
        work.step(step, 1 / step)
    work.finish()
    events = list(jobs.list_events(made.id, limit=3))
    assert len({event.id for event in events}) == len(events) == 10
    assert all(event.id.startswith("ftevent-") for event in events)
    assert [event.message for event in events[:2]] == [
        "The job has successfully completed",
        f"New fine-tuned model created: ft:fake:ann::{made.id[-8:]}",
    ]
    assert events[-1].message == f"Created fine-tuning job: {made.id}"
    metrics = [event for event in events if event.type == "metrics"]
    assert metrics[0].message == "Step 5/30: training loss=0.20"
    assert metrics[0].data == {"step": 5, "train_loss": 0.2, "train_mean_token_accuracy": 0.75}
    row = http.get(f"{JOBS}/{made.id}/events?limit=1").json()["data"][0]
    assert row == {
        "object": "fine_tuning.job.event", "id": events[0].id, "created_at": events[0].created_at,
        "level": "info", "message": events[0].message, "type": "message", "data": None,
    }  # fmt: skip
    for cursor in ("ftevent-x", "7", "ftevent-" + "9" * 30, "ftevent-٣"):
        answer = http.get(f"{JOBS}/{made.id}/events", params={"after": cursor})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "after"


def test_checkpoints_are_models(jobs, served, http, file):
    made = jobs.create(model="fake", training_file=file)
    assert list(jobs.checkpoints.list(made.id)) == []
    work = Work(served, made.id).run()
    kept = [work.checkpoint(step) for step in (10, 20, 30)]
    work.finish()
    found = list(jobs.checkpoints.list(made.id, limit=2))
    assert [each.step_number for each in found] == [30, 20, 10]
    assert [each.fine_tuned_model_checkpoint for each in found] == [a.name for a in kept[::-1]]
    assert found[0].fine_tuned_model_checkpoint.endswith(":ckpt-step-30")
    assert found[0].id.startswith("ftckpt_") and found[0].fine_tuning_job_id == made.id
    metrics = found[0].metrics.to_dict()
    assert metrics["step"] == 30 and metrics["train_loss"] == 0.5 and metrics["valid_loss"] is None
    page = http.get(f"{JOBS}/{made.id}/checkpoints?limit=2").json()
    assert (page["first_id"], page["last_id"]) == (found[0].id, found[1].id) and page["has_more"]
    assert http.get(f"{JOBS}/{made.id}/checkpoints?after=nowhere").status_code == 400


# -- cancel, pause, resume


def test_a_job_is_cancelled_at_once_and_again_does_nothing(jobs, served, file):
    made = jobs.create(model="fake", training_file=file)
    Work(served, made.id).run()
    ended = jobs.cancel(made.id)
    assert ended.status == "cancelled" and ended.finished_at and ended.estimated_finish is None
    assert jobs.cancel(made.id).finished_at == ended.finished_at
    assert "The job was cancelled" in [event.message for event in jobs.list_events(made.id)]


def test_a_job_that_has_ended_cannot_be_cancelled_paused_or_resumed(jobs, served, file):
    made = jobs.create(model="fake", training_file=file)
    Work(served, made.id).run().finish()
    for change in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.BadRequestError, match="succeeded") as caught:
            change(made.id)
        assert caught.value.code.startswith("fine_tune_")


def test_a_job_rests_and_goes_on(jobs, served, file):
    made = jobs.create(model="fake", training_file=file)
    work = Work(served, made.id).run()
    assert jobs.pause(made.id).status == jobs.pause(made.id).status == "paused"
    assert jobs.retrieve(made.id).estimated_finish is None
    served.services.store.fine_tunes.leave(work.record, None, tried=True)
    assert jobs.resume(made.id).status == "queued"
    with pytest.raises(openai.BadRequestError, match="Cannot resume"):
        jobs.resume(made.id)
    early = jobs.create(model="fake", training_file=file)
    jobs.pause(early.id)
    assert jobs.resume(early.id).status == "validating_files"


def test_the_keeper_is_told(jobs, served, file, monkeypatch):
    told = []

    async def nudge() -> None:
        told.append(1)

    monkeypatch.setattr(served.services, "nudge_jobs", nudge)
    made = jobs.create(model="fake", training_file=file)
    jobs.pause(made.id)
    jobs.resume(made.id)
    jobs.cancel(made.id)
    assert len(told) == 4


def test_graders_are_not_there(http):
    error = refused(http, 404, "/v1/fine_tuning/alpha/graders/run")
    assert error["code"] == "unknown_url"
    assert http.post(f"{JOBS}/ftjob-1/other").status_code == 404
    assert http.put(f"{JOBS}/ftjob-1").status_code == 405


def test_a_gateway_that_is_read_by_anyone_needs_no_owner_of_its_own(served: GatewayThread, file):
    """The operator's own: no such file of theirs, but they see ann's."""
    made = client_of(served, ROOT).fine_tuning.jobs.create(model="fake", training_file=file)
    assert served.services.store.fine_tunes.get(made.id).sees_all
