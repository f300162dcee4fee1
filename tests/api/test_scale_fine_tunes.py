"""Scale's fine-tunes, asked by its real client at a real gateway. No job runs: where one would, the
test does to the store what a job does."""

import asyncio
import contextlib
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from llm_engine.api.llm_engine_api.fine_tunes import PATH
from llm_engine.api.llm_engine_api.hyperparameters import DEFAULTS
from llm_engine.errors import Conflict
from llm_engine.records import FineTuneRecord, Scope
from tests.api.test_batches import key_of
from tests.api.test_llm_engine_dialect import import_client, use
from tests.support.fine_tuned import Work, adapter_folder, jsonl, keep, table
from tests.support.gateway import GatewayThread, fake_endpoint

ROOT = "sk-operator"
HEADERS = "Required column headers"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sections = {
        "fine_tunes": {"max_open": 5, "max_file_bytes": 5_000},
        "batches": {"data_paths": [str(folder)]},
    }
    endpoints = [
        fake_endpoint("fake", max_adapters=2),
        fake_endpoint("org/model", max_adapters=2),
        fake_endpoint("plain"),
        fake_endpoint("vectors", task="embed"),
    ]
    with GatewayThread(endpoints, api_keys=[ROOT], sections=sections) as running:
        running.data = folder
        # The store has it, as the controller puts it there.
        running.services.store.endpoints.create(endpoints[0], "op", {}, 10)
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


@pytest.fixture
def file(served):
    return keep(served, table(), name="train.csv")


def record_of(served: GatewayThread, job: str) -> FineTuneRecord:
    return served.services.store.fine_tunes.get(job)


def files_of(served: GatewayThread, owner: str = "ann") -> set[str]:
    return {each.id for each in served.services.store.files.page(owner, limit=1000)[0]}


# -- create


def test_a_csv_becomes_a_fine_tune(scale, served, tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(table())
    with path.open() as handle:
        file = scale.File.upload(handle).id
    made = scale.FineTune.create(model="fake", training_file=file)
    record = record_of(served, made.id)
    assert (record.owner, record.dialect, record.method) == ("ann", "llm_engine", "supervised")
    assert (record.base, record.training_file_id, record.validation_file_id) == ("fake", file, None)
    assert record.hyperparameters == DEFAULTS | {"validation_split": 0.1}
    assert re.fullmatch(r"fake\.[0-9]{6}-[0-9]{6}", record.name)


def test_all_of_its_hyperparameters_as_numbers_or_as_strings(scale, served, file):
    valid = keep(served, table(), name="valid.csv")
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q_proj"],
            "bias": "none", "task_type": "CAUSAL_LM", "peft_type": "LORA", "use_rslora": False,
            "modules_to_save": None, "rank_pattern": {}}  # fmt: skip
    numbers = {"lr": "0.0002", "epochs": "1", "warmup_ratio": 0.1, "weight_decay": 0,
               "peft_config": lora, "report_to": "none"}  # fmt: skip
    made = scale.FineTune.create(
        model="org/model", training_file=file, validation_file=valid, hyperparameters=numbers,
        suffix="my-run",
    )  # fmt: skip
    record = record_of(served, made.id)
    assert record.hyperparameters == {
        "learning_rate": 0.0002, "n_epochs": 1, "warmup_ratio": 0.1, "weight_decay": 0.0,
        "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.05, "target_modules": ["q_proj"],
        "lr_scheduler": "cosine",
    }  # fmt: skip
    assert record.validation_file_id == valid
    assert re.fullmatch(r"org-model\.my-run\.[0-9]{6}-[0-9]{6}", record.name)


def test_two_of_the_same_second_have_two_names(scale, served, file):
    made = [scale.FineTune.create(model="fake", training_file=file).id for _ in range(3)]
    assert len({record_of(served, job).name for job in made}) == 3


def test_a_multiplier_stands_for_the_rate(http, served, file):
    body = {"model": "fake", "training_file": file,
            "hyperparameters": {"learning_rate_multiplier": 2, "lr": None}}  # fmt: skip
    job = http.post(f"/llm-engine{PATH}", json=body).json()["id"]
    numbers = record_of(served, job).hyperparameters
    assert numbers["learning_rate_multiplier"] == 2 and "learning_rate" not in numbers


@pytest.mark.parametrize(
    "columns", ["prompt,response", "input,output", ",prompt,response,note", "a,output,input"]
)
def test_the_columns_may_be_in_any_company(scale, served, columns):
    width = columns.count(",") + 1
    data = f"{columns}\n".encode() + b",".join([b"x"] * width) + b"\n"
    made = scale.FineTune.create(model="fake", training_file=keep(served, data, name="t.csv"))
    assert record_of(served, made.id)


def test_json_lines_are_taken_as_well(scale, served):
    made = scale.FineTune.create(model="fake", training_file=keep(served, jsonl()))
    assert record_of(served, made.id)


def test_a_file_may_lie_under_a_path(scale, served):
    for path in (served.data / "train.csv", Path(served.settings.storage_url) / "data/ann/t.csv"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(table())
    for named in (str(served.data / "train.csv"), "t.csv"):
        made = scale.FineTune.create(model="fake", training_file=named, validation_file=named)
        record = record_of(served, made.id)
        brought = served.services.store.files.get(record.training_file_id)
        assert brought.owner == "ann" and brought.filename == named.rpartition("/")[2]
        assert brought.id != record.validation_file_id and brought.expires_at
        assert b"".join(served.services.storage.read(brought.key)) == table()


# -- what is refused


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"model": "plain"}, "Fine-tuning not implemented for model type plain"),
        ({"model": "vectors"}, "Fine-tuning not implemented for model type vectors"),
        ({"suffix": "x" * 29}, "suffix"),
        ({"suffix": "a_b"}, "suffix"),
        ({"suffix": ""}, "suffix"),
        ({"wandb_config": {"api_key": "k"}}, "wandb_config"),
        ({"hyperparameters": {"report_to": "wandb"}}, "hyperparameters.report_to"),
        ({"hyperparameters": {"epochs": 0}}, "'hyperparameters.epochs' must be"),
        ({"hyperparameters": {"epochs": "many"}}, "'hyperparameters.epochs' must be"),
        ({"hyperparameters": {"lr": -1}}, "'hyperparameters.lr' must be"),
        ({"hyperparameters": {"lr": 1, "learning_rate": 1}}, "means the same"),
        ({"hyperparameters": {"colour": 1}}, "Unknown hyperparameter 'colour'"),
        ({"hyperparameters": {"beta": 0.1}}, "Unknown hyperparameter 'beta'"),
        ({"hyperparameters": {"peft_config": "r=8"}}, "hyperparameters.peft_config"),
        ({"hyperparameters": {"peft_config": {"r": 0}}}, "'hyperparameters.peft_config.r' must"),
        ({"hyperparameters": {"peft_config": {"r": 64}}}, "'hyperparameters.peft_config.r' cannot"),
        ({"hyperparameters": {"peft_config": {"use_dora": True}}}, "peft_config.use_dora"),
        ({"training_file": "https://example.org/train.csv"}, "not fetched here"),
        ({"training_file": "/etc/passwd"}, "in no place that may be read"),
        ({"training_file": "../x.csv"}, "no path of an object"),
        ({"training_file": "gs://x/y.csv"}, "cannot be opened"),
        ({"validation_file": "https://example.org/valid.csv"}, "not fetched here"),
    ],
)
def test_a_mistake_is_told_at_once(scale, served, file, fields, sentence):
    before = files_of(served)
    with pytest.raises(scale.errors.BadRequestError) as caught:
        scale.FineTune.create(**{"model": "fake", "training_file": file} | fields)
    assert sentence in str(caught.value)
    assert files_of(served) == before


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"question,answer\n1,2\n", HEADERS),
        (b"prompt,output\n1,2\n", HEADERS),
        (b"", HEADERS),
        (b"\x00\xff\xfe", HEADERS),
        (b'{"prompt": "x"}\n', HEADERS),
        (b'{"prompt": \n', "Cannot parse the training dataset as JSONL"),
        (b'"prompt,response\n1,2\n', "Cannot parse the training dataset as CSV"),
    ],
)
def test_a_wrong_header_is_told_at_once(scale, served, data, sentence):
    file = keep(served, data, name="t.csv")
    with pytest.raises(scale.errors.BadRequestError, match=sentence):
        scale.FineTune.create(model="fake", training_file=file)
    with pytest.raises(
        scale.errors.BadRequestError, match=sentence.replace("training", "validation")
    ):
        good = keep(served, table(), name="t.csv")
        scale.FineTune.create(model="fake", training_file=good, validation_file=file)


def test_what_is_not_there_is_404(scale, served, file):
    theirs = keep(served, table(), owner="ben", name="t.csv")
    for missing in ("file-nowhere", theirs, "nowhere.csv"):
        with pytest.raises(scale.errors.NotFoundError, match="Training file does not exist"):
            scale.FineTune.create(model="fake", training_file=missing)
        with pytest.raises(scale.errors.NotFoundError, match="Validation file does not exist"):
            scale.FineTune.create(model="fake", training_file=file, validation_file=missing)
    with pytest.raises(scale.errors.NotFoundError):
        scale.FineTune.create(model="nowhere", training_file=file)


def test_what_was_brought_goes_with_what_is_refused(scale, served):
    (served.data / "good.csv").write_bytes(table())
    (served.data / "large.csv").write_bytes(table(1000))
    before, path = files_of(served), str(served.data / "good.csv")
    for model, valid in (("plain", None), ("fake", "file-nowhere")):
        with pytest.raises((scale.errors.BadRequestError, scale.errors.NotFoundError)):
            scale.FineTune.create(model=model, training_file=path, validation_file=valid)
    with pytest.raises(scale.errors.BadRequestError, match=r"fine_tunes\.max_file_bytes"):
        scale.FineTune.create(model="fake", training_file=str(served.data / "large.csv"))
    assert files_of(served) == before


def test_too_many_open_ones(scale, file):
    for _ in range(5):
        scale.FineTune.create(model="fake", training_file=file)
    with pytest.raises(scale.errors.RateLimitExceededError, match=r"fine_tunes\.max_open"):
        scale.FineTune.create(model="fake", training_file=file)


# -- what became of it


def test_a_fine_tune_is_watched_to_its_end(scale, served, file):
    job = scale.FineTune.create(model="fake", training_file=file, suffix="x").id
    seen = scale.FineTune.get(job)
    name = record_of(served, job).name
    assert (seen.id, seen.status.value, seen.fine_tuned_model) == (job, "PENDING", name)
    work = Work(served, job)
    assert scale.FineTune.get(job).status.value == "RUNNING"
    work.run().step(10)
    assert scale.FineTune.get(job).status.value == "RUNNING"
    work.finish()
    ended = scale.FineTune.get(job)
    assert (ended.status.value, ended.fine_tuned_model) == ("SUCCESS", name)
    events = scale.FineTune.get_events(job).events
    assert events[0].message == f"Created fine-tuning job: {job}" and events[0].level == "info"
    assert events[0].timestamp == pytest.approx(time.time(), abs=30)
    assert "Step 10/30: training loss=0.50" in [event.message for event in events]
    assert events[-1].message == "The job has successfully completed"
    assert [event.timestamp for event in events] == sorted(event.timestamp for event in events)


def test_a_failure_says_why(scale, served, http, file):
    job = scale.FineTune.create(model="fake", training_file=file).id
    Work(served, job).fail("invalid_training_file", "Line 3: no")
    assert scale.FineTune.get(job).status.value == "FAILURE"
    row = http.get(f"/llm-engine{PATH}/{job}").json()
    assert row["status_reason"] == "Line 3: no" and row["error"]["param"] == "training_file"


def test_every_state_is_one_that_the_client_knows(scale, served, file):
    store = served.services.store.fine_tunes
    job = scale.FineTune.create(model="fake", training_file=file).id
    store.pause(job)
    assert scale.FineTune.get(job).status.value == "PENDING"
    store.resume(job)
    assert scale.FineTune.get(job).status.value == "PENDING"
    assert scale.FineTune.cancel(job).success
    assert scale.FineTune.get(job).status.value == "CANCELLED"


def test_cancel_again_and_too_late(scale, served, file):
    job = scale.FineTune.create(model="fake", training_file=file).id
    assert scale.FineTune.cancel(job).success and scale.FineTune.cancel(job).success
    other = scale.FineTune.create(model="fake", training_file=file).id
    Work(served, other).run().finish()
    assert not scale.FineTune.cancel(other).success
    assert scale.FineTune.get(other).status.value == "SUCCESS"


def test_the_list_has_fine_tunes_and_nothing_else(scale, served, http, file):
    made = [scale.FineTune.create(model="fake", training_file=file).id for _ in range(3)]
    elsewhere = http.post("/v1/fine_tuning/jobs", json={"model": "fake", "training_file": file})
    listed = [job.id for job in scale.FineTune.list().jobs]
    assert listed[:4] == [elsewhere.json()["id"], *made[::-1]]
    page = http.get(f"/llm-engine{PATH}?limit=2").json()
    assert page["has_more"] and [job["id"] for job in page["jobs"]] == listed[:2]
    page = http.get(f"/llm-engine{PATH}?limit=2&after={listed[1]}").json()
    assert [job["id"] for job in page["jobs"]] == listed[2:4]
    use(scale, served, key_of(served, "ben", Scope.FILES))
    assert not {job.id for job in scale.FineTune.list().jobs} & set(listed)


def test_another_owners_does_not_exist(scale, served, file):
    job = scale.FineTune.create(model="fake", training_file=file).id
    use(scale, served, key_of(served, "ben", Scope.FILES))
    for call in (scale.FineTune.get, scale.FineTune.cancel, scale.FineTune.get_events):
        with pytest.raises(scale.errors.NotFoundError, match="specified fine-tune job"):
            call(job)
    use(scale, served, key_of(served, "ann", Scope.INFERENCE))
    with pytest.raises(scale.errors.UnknownError):
        scale.FineTune.list()


# -- download


@pytest.fixture
def tuned(scale, served, file, tmp_path):
    """A model that has come of a fine-tune."""
    job = scale.FineTune.create(model="fake", training_file=file).id
    return Work(served, job).run().finish(adapter_folder(tmp_path / "adapter"))


def test_links_of_a_model_fetch_its_files(scale, served, tuned):
    urls = scale.Model.download(tuned.name).urls
    assert set(urls) == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    weights = httpx.get(urls["adapter_model.safetensors"], trust_env=False)
    assert weights.status_code == 200 and weights.content == b"weights" * 1000
    assert 'filename="adapter_model.safetensors"' in weights.headers["content-disposition"]
    part = {"range": "bytes=7-13"}
    answer = httpx.get(urls["adapter_model.safetensors"], headers=part, trust_env=False)
    assert (answer.status_code, answer.content) == (206, b"weights")
    assert httpx.head(urls["tokenizer.json"], trust_env=False).headers["content-length"] == "2"


def test_a_link_opens_one_file_and_nothing_else(scale, served, tuned, http):
    urls = scale.Model.download(tuned.name).urls
    link = urlsplit(urls["adapter_config.json"])
    other = link.path.replace("adapter_config.json", "tokenizer.json")
    with served.client() as anyone:
        assert anyone.get(f"{link.path}?{link.query}").status_code == 200
        assert anyone.get(f"{other}?{link.query}").status_code == 401
        assert anyone.get(link.path).status_code == 401
        assert anyone.post(f"{link.path}?{link.query}").status_code in (401, 405)
    assert http.get(link.path).json() == {"r": 8}  # its owner needs no link
    for path in ("manifest.json", "optimizer.pt", "..%2f..%2fx"):
        folder = link.path.rpartition("/")[0]
        assert http.get(f"{folder}/{path}").status_code == 404
    with served.client(headers={"x-api-key": key_of(served, "ben")}) as ben:
        assert ben.get(link.path).status_code == 404
    served.services.store.adapters.delete(tuned.id)
    with served.client() as anyone:
        assert anyone.get(f"{link.path}?{link.query}").status_code == 404


def test_there_is_nothing_to_download_of_other_models(scale, served, tuned):
    gone: Any = "The requested fine-tuned model could not be found."
    for name in ("fake", "nowhere", "a\0b"):
        with pytest.raises((scale.errors.NotFoundError, scale.errors.BadRequestError)):
            scale.Model.download(name)
    with pytest.raises(scale.errors.BadRequestError, match="download_format"):
        scale.Model.download(tuned.name, download_format="gguf")
    use(scale, served, key_of(served, "ben", Scope.FILES))
    with pytest.raises(scale.errors.NotFoundError, match=gone):
        scale.Model.download(tuned.name)
    use(scale, served, key_of(served, "ann", Scope.FILES))
    served.services.storage.put(f"adapters/{tuned.id}/manifest.json", b"{")
    with pytest.raises(scale.errors.ServerError, match="damaged"):
        scale.Model.download(tuned.name)


# -- as an endpoint


def refresh(served: GatewayThread) -> None:
    asyncio.run_coroutine_threadsafe(served.refresh(), served.loop).result(10)


def test_a_fine_tuned_model_is_shown_as_one_of_the_endpoints(scale, served, tuned, http):
    shown = scale.Model.get(tuned.name)
    assert (shown.name, shown.id, shown.model_name) == (tuned.name, tuned.id, "none")
    assert shown.spec.created_by == "ann" and not shown.spec.public_inference
    assert shown.spec.metadata == {"fine_tune_id": tuned.fine_tune, "base_model": "fake"}
    assert shown.status == scale.Model.get("fake").status
    refresh(served)
    listed = [model.name for model in scale.Model.list().model_endpoints]
    assert listed[0] == "fake" and tuned.name in listed
    path = "/llm-engine/v1/llm/model-endpoints"
    for order, place in (("newest", 0), ("oldest", -1)):
        rows = http.get(path, params={"order_by": order}).json()["model_endpoints"]
        assert rows[place]["name"] == tuned.name
    (row,) = http.get(path, params={"name": tuned.name}).json()["model_endpoints"]
    assert row["name"] == tuned.name
    use(scale, served, key_of(served, "ben", Scope.FILES))
    assert tuned.name not in [model.name for model in scale.Model.list().model_endpoints]
    for call in (scale.Model.get, scale.Model.delete):
        with pytest.raises(scale.errors.NotFoundError):
            call(tuned.name)


def test_a_model_that_its_base_cannot_serve_says_why(scale, served, tuned):
    table = served.services.balancer.table
    other = replace(table.endpoints["fake"], model="another")
    served.services.balancer.update(replace(table, endpoints=table.endpoints | {"fake": other}))
    try:
        shown = scale.Model.get(tuned.name)
    finally:
        served.services.balancer.update(table)
    assert shown.status.value == "UPDATE_FAILED"
    refresh(served)
    names = [model.name for model in scale.Model.list().model_endpoints]
    assert tuned.name in names


def test_a_fine_tuned_model_is_deleted_with_a_key_that_keeps_files(scale, served, tuned):
    assert scale.Model.delete(tuned.name).deleted
    for call in (scale.Model.get, scale.Model.delete, scale.Model.download):
        with pytest.raises(scale.errors.NotFoundError):
            call(tuned.name)
    assert scale.FineTune.get(tuned.fine_tune).status.value == "SUCCESS"
    with pytest.raises(scale.errors.UnknownError, match="endpoints"):
        scale.Model.delete("fake")


def test_a_checkpoint_can_be_read_and_goes_unlisted(scale, served, file):
    job = scale.FineTune.create(model="fake", training_file=file).id
    checkpoint = Work(served, job).run().checkpoint(10)
    refresh(served)
    assert scale.Model.get(checkpoint.name).name == checkpoint.name
    assert checkpoint.name not in [model.name for model in scale.Model.list().model_endpoints]
