"""`llm-engine files` and `batches` against a real gateway over HTTP, with a store, a storage and no
job: the test works on a batch as its job would."""

import hashlib
import json
import threading
import tracemalloc
from pathlib import Path

import pytest

from llm_engine import files
from llm_engine.batches.rows import row_id
from llm_engine.cli import batch_watch, transfer
from llm_engine.cli.client import Gateway
from llm_engine.cli.target import Target
from llm_engine.errors import StorageUnavailable
from llm_engine.records import BatchPart, FileRecord, Usage
from llm_engine.statuses import BatchState
from tests.support.cli import run, write_configuration
from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread

KEY = "bootstrap"
MIB = 2**20


@pytest.fixture(scope="module")
def shared():
    with GatewayThread([], api_keys=[KEY]) as running:
        yield running


@pytest.fixture
def gateway(shared, tmp_path, monkeypatch):
    """A gateway that the command line finds by itself, from an empty folder."""
    monkeypatch.chdir(tmp_path)
    write_configuration(tmp_path)
    monkeypatch.setenv("LLM_ENGINE_URL", shared.url)
    monkeypatch.setenv("LLM_ENGINE_API_KEY", KEY)
    monkeypatch.setattr(batch_watch, "PERIOD_S", 0.02)
    return shared


def told(*words: str):
    """What a command says to programs."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def stored(gateway, file: str) -> bytes:
    services = gateway.services
    return b"".join(services.storage.read(services.store.files.get(file).key))


def objects(gateway, prefix: str) -> list[str]:
    return [each.key for each in gateway.services.storage.list(prefix)]


# Files.


def test_a_file_goes_up_is_shown_comes_down_and_goes(gateway):
    content = b'{"custom_id": "a"}\n' * 1000
    Path("in.jsonl").write_bytes(content)
    up = run("files", "upload", "in.jsonl", "--expires", "2h")
    file = up.stdout.split()[-1]
    assert up.exit_code == 0 and up.stdout.startswith("in.jsonl (19.0 kB) is kept, until ")
    assert stored(gateway, file) == content

    row = told("files", "get", file)
    assert (row["purpose"], row["bytes"]) == ("batch", len(content))
    assert row["expires_at"] - row["created_at"] == 7200
    shown = " ".join(run("files", "get", file).stdout.split())
    assert f"file {file} name in.jsonl purpose batch size 19000 bytes" in shown
    assert file in run("files", "list").stdout
    assert file in [each["id"] for each in told("files", "list", "--purpose", "batch")]
    assert told("files", "list", "--purpose", "vision") == []

    down = run("files", "download", file, "-o", "out.jsonl")
    assert down.exit_code == 0 and Path("out.jsonl").read_bytes() == content
    assert run("files", "download", file, "-o", "-").stdout_bytes == content
    again = run("files", "download", file)
    assert again.exit_code == 1 and "in.jsonl exists already: --force" in again.stderr
    Path("in.jsonl").write_text("mine")
    assert run("files", "download", file, "--force").exit_code == 0
    assert Path("in.jsonl").read_bytes() == content

    gone = run("files", "delete", file, "file-none")
    assert gone.exit_code == 1 and f"{file} is deleted." in gone.stdout
    assert "No such File object: file-none" in gone.stderr
    assert run("files", "get", file).exit_code == 1


def test_a_list_says_how_to_see_more(gateway):
    Path("notes.txt").write_text("hello")
    made = [told("files", "upload", "notes.txt", "--purpose", "evals")["id"] for _ in range(3)]
    words = ["files", "list", "--purpose", "evals", "--limit", "2"]
    first = run(*words).stdout
    assert made[2] in first and made[1] in first and made[0] not in first
    assert f"llm-engine files list --after {made[1]}" in first
    assert [each["id"] for each in told(*words, "--after", made[1])] == [made[0]]


def test_an_empty_file_and_one_of_an_odd_name_are_kept(gateway):
    Path("empty").touch()
    odd = "a  ü%d.bin"
    Path(odd).write_bytes(bytes(range(256)))
    assert told("files", "upload", "empty", "--purpose", "user_data")["bytes"] == 0
    row = told("files", "upload", odd, "--purpose", "user_data")
    assert row["filename"] == odd and stored(gateway, row["id"]) == bytes(range(256))


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["large.bin"], "must end in .jsonl"),
        (["in.jsonl"], "JSON"),
        (["large.bin", "--purpose", "sing"], "Invalid 'purpose'"),
        (["large.bin", "--purpose", "evals", "--expires", "5s"], "expires_after.seconds"),
    ],
)
def test_what_the_gateway_refuses_is_a_sentence_however_large_the_file_is(gateway, words, sentence):
    Path("in.jsonl").write_text("hello\n")
    Path("large.bin").write_bytes(bytes(16 * MIB))
    result = run("files", "upload", *words)
    assert result.exit_code == 1 and sentence in result.stderr
    assert "Trying again" not in result.stderr


def test_a_key_without_the_scope_is_told_so(gateway, monkeypatch):
    made = told("keys", "create", "--owner", "ann", "--scope", "files")
    other = told("keys", "create", "--owner", "bob", "--scope", "inference")
    Path("notes.txt").write_text("hello")
    monkeypatch.setenv("LLM_ENGINE_API_KEY", made["key"])
    mine = told("files", "upload", "notes.txt", "--purpose", "evals")["id"]
    assert [each["id"] for each in told("files", "list")] == [mine]
    monkeypatch.setenv("LLM_ENGINE_API_KEY", other["key"])
    result = run("files", "upload", "notes.txt", "--purpose", "evals")
    assert result.exit_code == 1 and "files" in result.stderr


# Large ones.


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(transfer, "LARGEST_WHOLE", 3 * MIB)
    monkeypatch.setattr(transfer, "PART", MIB)
    monkeypatch.setattr(transfer, "RETRY_AFTER_S", (0, 0))


def large(size: int = 9 * MIB + 17) -> bytes:
    content = hashlib.shake_128(b"x").digest(size)
    Path("large.bin").write_bytes(content)
    return content


def test_a_large_file_goes_up_in_parts_and_comes_down_whole(gateway, small_parts):
    content = large()
    row = told("files", "upload", "large.bin", "--purpose", "user_data", "--expires", "1h")
    assert stored(gateway, row["id"]) == content
    assert row["expires_at"] - row["created_at"] == 3600
    assert objects(gateway, "uploads/") == []
    assert run("files", "download", row["id"], "-o", "back").exit_code == 0
    assert Path("back").read_bytes() == content


def test_a_part_that_gets_no_answer_is_sent_again(gateway, small_parts, monkeypatch):
    content, writer, failures = large(), gateway.services.storage.writer, [1, 2]

    def failing(key: str):
        if key.startswith("uploads/") and failures:
            failures.pop()
            raise StorageUnavailable("The storage cannot be used now.")
        return writer(key)

    monkeypatch.setattr(gateway.services.storage, "writer", failing)
    result = run("files", "upload", "large.bin", "--purpose", "user_data")
    assert result.exit_code == 0 and not failures
    assert result.stderr.count("The storage cannot be used now. Trying again.") == 2
    assert stored(gateway, result.stdout.split()[-1]) == content


def test_an_upload_that_fails_leaves_nothing(gateway, small_parts, monkeypatch):
    large()
    before = objects(gateway, "files/")

    def refuse(key: str):
        raise StorageUnavailable("The storage is full.")

    monkeypatch.setattr(gateway.services.storage, "writer", refuse)
    result = run("files", "upload", "large.bin", "--purpose", "user_data")
    assert result.exit_code == 1 and "The storage is full." in result.stderr
    assert objects(gateway, "uploads/") == [] and objects(gateway, "files/") == before


def test_the_memory_of_a_transfer_does_not_grow_with_the_file(gateway):
    """Of both ends: they are one process here."""
    peaks = []
    for size in (MIB, 64 * MIB):
        with Path("large.bin").open("wb") as file:
            file.truncate(size)
        tracemalloc.start()
        with Gateway(Target(gateway.url, KEY)) as asked:
            row = transfer.upload(asked, Path("large.bin"), "user_data")
            transfer.download(asked, row, "back.bin")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert Path("back.bin").stat().st_size == size
    assert peaks[1] < peaks[0] + 8 * MIB


# Batches.


class Job:
    """Works on a batch as its Ray job would: row `fails` becomes an error."""

    def __init__(self, gateway: GatewayThread, batch: str) -> None:
        services = gateway.services
        self._store, self._storage = services.store, services.storage
        self.record = self._store.batches.claim(batch, "a job", 60)
        lines = b"".join(self._storage.read(self._store.files.get(self.record.input_file_id).key))
        self._input = [json.loads(line) for line in lines.splitlines()]

    def begin(self) -> None:
        total = len(self._input)
        into = BatchState.IN_PROGRESS
        self._store.batches.move(self.record, [BatchState.VALIDATING], into, total=total, model="m")
        progress = {"rows_per_s": 2.5, "tokens_per_s": 150.0, "in_flight": 1.0, "eta_s": 3.0}
        self._store.batches.beat(self.record, 60, progress)

    def work(self, rows: range, fails: int = -1) -> None:
        part = BatchPart(
            rows.start, f"batches/{self.record.id}/parts/{rows.start:05d}", tuple(rows),
            int(fails in rows), Usage(prompt_tokens=10 * len(rows), completion_tokens=len(rows)),
        )  # fmt: skip
        self._store.batches.add_part(self.record, part)

    def end(self, state: str, done: range, fails: int = -1, reason: str | None = None) -> None:
        good = self._keep([self._line(n, 200, {"n": n}) for n in done if n != fails])
        error = {"error": {"message": "too long", "code": "context_length_exceeded"}}
        bad = self._keep([self._line(n, 400, error) for n in done if n == fails])
        self._store.batches.finish(
            self.record, BatchState(state), [file for file in (good, bad) if file], reason=reason,
            output_file_id=good and good.id, error_file_id=bad and bad.id,
        )  # fmt: skip

    def _line(self, row: int, status: int, body: dict) -> dict:
        return {
            "id": row_id(self.record.id, row), "custom_id": self._input[row]["custom_id"],
            "response": {"status_code": status, "request_id": "r", "body": body}, "error": None,
        }  # fmt: skip

    def _keep(self, lines: list[dict]) -> FileRecord | None:
        if not lines:
            return None
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        file = files.new_file_id()
        self._storage.put(files.key_of(file), data)
        owner, name = self.record.owner, "results.jsonl"
        return files.new_record(file, owner, "batch_output", name, len(data), None)


def questions(count: int) -> None:
    lines = [
        {"custom_id": f"q{n}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "m", "messages": [{"role": "user", "content": str(n)}]}}
        for n in range(count)
    ]  # fmt: skip
    Path("questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def working(gateway, script) -> threading.Thread:
    """Runs `script` with the job of the next batch."""

    def act() -> None:
        def waiting() -> list:
            return [r for r in gateway.services.store.batches.open() if r.worker is None]

        eventually(waiting, 10, 0.01)
        script(Job(gateway, waiting()[0].id))

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def ids(path: str) -> list[str]:
    return [json.loads(line)["custom_id"] for line in Path(path).read_text().splitlines()]


@pytest.fixture(autouse=True)
def none_is_left(shared):
    yield
    for record in shared.services.store.batches.open():
        shared.services.store.batches.release(record, "the test is over")
        shared.services.store.batches.end(record, BatchState.FAILED)


def test_a_batch_from_a_jsonl_file_to_results(gateway):
    questions(4)

    def job(job: Job) -> None:
        job.begin()
        job.work(range(0, 2))
        threading.Event().wait(0.2)  # the watch has seen it by then
        job.work(range(2, 4), fails=3)
        job.end("completed", range(4), fails=3)

    thread = working(gateway, job)
    result = run("batches", "create", "questions.jsonl", "--watch", "-o", "results.jsonl")
    thread.join(10)
    assert result.exit_code == 0, result.stderr
    assert ids("results.jsonl") == ["q0", "q1", "q2"] and ids("results.errors.jsonl") == ["q3"]
    words = " ".join(result.stdout.split())
    for part in (
        "validating batch_", "in progress: ", "status completed model m rows 4/4 rows, 1 failed",
        "tokens 40 in, 4 out", "results results.jsonl errors results.errors.jsonl",
        "row 4, q3: 400 too long",
    ):  # fmt: skip
        assert part in words, part
    batch = words.partition(" ")[0]
    [listed] = [row for row in told("batches", "list") if row["id"] == batch]
    assert listed["request_counts"] == {"total": 4, "completed": 3, "failed": 1}


def test_what_is_made_can_be_seen_fetched_and_cancelled_later(gateway):
    questions(2)
    made = run("batches", "create", "questions.jsonl", "--window", "7d", "--metadata", "team=a b")
    assert made.exit_code == 0 and "is accepted, to be done by" in made.stdout
    batch = made.stdout.split()[0]
    shown = " ".join(run("batches", "get", batch).stdout.split())
    for part in ("status validating", "window 7d, until", "metadata team=a b",
                 "endpoint /v1/chat/completions", "input file-"):  # fmt: skip
        assert part in shown, part
    early = run("batches", "download", batch)
    assert early.exit_code == 1 and "its files come when it has ended" in early.stderr

    job = Job(gateway, batch)
    job.begin()
    job.work(range(0, 1))
    shown = " ".join(run("batches", "get", batch).stdout.split())
    assert "1/2 rows, 2.5 rows/s, 150 tokens/s, about 3.0 s left" in shown
    assert "is cancelling; what is done of it is kept" in run("batches", "cancel", batch).stdout
    job.end("cancelled", range(1))

    assert run("batches", "download", batch).exit_code == 0
    assert ids(f"{batch}_output.jsonl") == ["q0"]
    assert "exists already" in run("batches", "download", batch).stderr
    piped = run("batches", "download", batch, "-o", "-").stdout
    assert json.loads(piped)["custom_id"] == "q0"
    Path("folder").mkdir()
    assert run("batches", "download", batch, "-o", "folder").exit_code == 0
    assert ids(f"folder/{batch}_output.jsonl") == ["q0"]
    assert "no file of errors" in run("batches", "download", batch, "--errors").stderr
    over = run("batches", "cancel", batch)
    assert over.exit_code == 0  # asked again it says what became of it


def test_a_cancelled_batch_that_is_watched_keeps_what_is_done_and_is_exit_code_1(gateway):
    questions(3)

    def job(job: Job) -> None:
        job.begin()
        job.work(range(0, 2))
        run("batches", "cancel", job.record.id)
        job.end("cancelled", range(2), fails=1)

    thread = working(gateway, job)
    result = run("batches", "create", "questions.jsonl", "-o", "-")
    thread.join(10)
    assert result.exit_code == 1 and "is cancelled." in result.stderr
    assert [json.loads(line)["custom_id"] for line in result.stdout.splitlines()] == ["q0"]
    assert "--errors" in result.stderr  # stdout has the results alone; this fetches the others


def test_an_input_that_is_refused_by_the_job_is_exit_code_1(gateway):
    questions(3)
    wrong = [{"code": "model_not_found", "message": "There is no model 'm'.", "param": "body.model",
              "line": 1}]  # fmt: skip

    def job(job: Job) -> None:
        gateway.services.store.batches.finish(
            job.record, BatchState.FAILED, [], errors=wrong, reason="its input is wrong"
        )

    thread = working(gateway, job)
    result = run("batches", "create", "questions.jsonl", "--watch", "--json")
    thread.join(10)
    assert result.exit_code == 1 and "failed: its input is wrong" in result.stderr
    assert "line 1: There is no model 'm'. (model_not_found)" in result.stderr
    assert json.loads(result.stdout)["errors"]["data"] == wrong


def test_a_batch_that_is_refused_leaves_its_input_for_another_try(gateway):
    questions(1)
    result = run("batches", "create", "questions.jsonl", "--window", "a while")
    assert result.exit_code == 1 and "Invalid value for 'completion_window'" in result.stderr
    again = result.stderr.partition("`llm-engine ")[2].partition("`")[0].split()
    assert again[:2] == ["batches", "create"]
    row = told(*again)
    assert (row["endpoint"], row["completion_window"]) == ("/v1/chat/completions", "24h")


def test_what_is_not_there_is_a_sentence(gateway):
    for words in (["get", "batch_no"], ["cancel", "batch_no"], ["download", "batch_no"]):
        result = run("batches", *words)
        assert result.exit_code == 1 and "No batch found with id 'batch_no'." in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert "No such File object: file-no" in run("batches", "create", "file-no").stderr
