"""`batches`: the look at an input before it is sent, what a watch shows, how a batch is told."""

import json
import threading
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from llm_engine.cli import batch_input, batch_results, batch_watch, watch
from llm_engine.cli.client import Gateway
from llm_engine.cli.target import Target
from llm_engine.errors import LLMEngineError
from tests.support.cli import interrupt, run, serving, start, write_configuration
from tests.support.cluster import eventually

ID = "batch_1"
PATH = f"/v1/batches/{ID}"
CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_configuration(tmp_path)
    monkeypatch.setattr(batch_watch, "PERIOD_S", 0.02)
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    with serving() as running:
        monkeypatch.setenv("LLM_ENGINE_URL", running.url)
        yield running


def line(custom_id="q1", **changes) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"model": "m"}} | changes


def written(*lines: object, path: str = "in.jsonl") -> Path:
    texts = [each if isinstance(each, str) else json.dumps(each) for each in lines]
    Path(path).write_text("".join(f"{text}\n" for text in texts))
    return Path(path)


def row(status="in_progress", done=0, failed=0, total=4, **changes) -> dict:
    return {
        "id": ID, "object": "batch", "endpoint": CHAT, "model": "demo-chat", "errors": None,
        "input_file_id": "file-in", "completion_window": "24h", "status": status,
        "output_file_id": None, "error_file_id": None, "created_at": 100, "in_progress_at": 102,
        "expires_at": 86_500, "finalizing_at": None, "completed_at": None, "failed_at": None,
        "expired_at": None, "cancelling_at": None, "cancelled_at": None, "metadata": None,
        "request_counts": {"total": total, "completed": done, "failed": failed},
        "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
        "progress": {}, "status_reason": None,
    } | changes  # fmt: skip


RUNNING = {"rows_per_s": 3.25, "tokens_per_s": 1234.5, "in_flight": 2, "eta_s": 12.0}


# The look at an input.


def test_an_input_is_counted_and_its_endpoint_is_the_first_lines():
    assert batch_input.look(written(line("a"), line("b"))) == batch_input.Look(2, CHAT)


def test_blank_lines_a_byte_order_mark_and_carriage_returns_are_no_mistakes():
    one, two = (json.dumps(line(name)).encode() for name in "ab")
    Path("in.jsonl").write_bytes(b"\xef\xbb\xbf" + one + b"\r\n\r\n  \n" + two)
    assert batch_input.look(Path("in.jsonl")).rows == 2


@pytest.mark.parametrize(
    "lines, sentence",
    [
        (["{nope"], "line 1: not valid JSON"),
        (["", line(), '"text"'], "line 3: not a JSON object"),
        ([[line()]], "line 1: a JSON array; JSONL has one object a line"),
        ([{"custom_id": "a", "url": CHAT}], "line 1: without method, body"),
        ([line(), line()], "line 2: the custom_id 'q1' is line 1's already"),
        ([line(7)], "line 1: custom_id is not a string"),
        ([line(method="GET")], "line 1: method is 'GET', must be 'POST'"),
        ([line(), line("b", url="/x")], f"line 2: url is '/x', the batch's is '{CHAT}'"),
        ([line(body="hello")], "line 1: body is not a JSON object"),
        ([], "in.jsonl is empty"),
        (["", " "], "in.jsonl is empty"),
    ],
)
def test_what_no_gateway_takes_is_named_by_its_line(server, lines, sentence):
    written(*lines)
    result = run("batches", "create", "in.jsonl")
    assert result.exit_code == 1 and sentence in result.stderr
    assert server.asked == []


def test_an_endpoint_that_is_given_is_compared_with_every_line(server):
    written(line())
    result = run("batches", "create", "in.jsonl", "--endpoint", "/v1/embeddings")
    assert f"line 1: url is '{CHAT}', the batch's is '/v1/embeddings'" in result.stderr


def test_of_many_mistakes_the_first_few_are_shown():
    with pytest.raises(LLMEngineError) as caught:
        batch_input.look(written(*["nope"] * 50))
    shown = str(caught.value).splitlines()
    assert len(shown) == 1 + batch_input.PROBLEMS_SHOWN + 1 and shown[-1].strip() == "..."


def test_a_file_without_an_end_of_line_is_not_read_into_memory(monkeypatch):
    monkeypatch.setattr(batch_input, "LONGEST_LINE", 100)
    with pytest.raises(LLMEngineError, match="line 2 is longer than 100 bytes"):
        batch_input.look(written("", "x" * 200))


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["missing.jsonl"], "there is no file missing.jsonl, and it is no file's id"),
        (["taken"], "taken: the name of a batch's input must end in .jsonl"),
        (["."], "cannot read .: Is a directory"),
        (["in.jsonl", "--metadata", "x"], "--metadata takes KEY=VALUE, not 'x'"),
        (["in.jsonl", "-o", "taken"], "taken exists already: --force replaces it"),
        (["in.jsonl", "-o", "other.jsonl"], "other.errors.jsonl exists already"),
        (["in.jsonl", "-o", "no/such"], "there is no folder no"),
        (["in.jsonl", "-o", "-", "--json"], "cannot both be stdout"),
    ],
)
def test_a_mistake_is_told_before_anybody_is_asked(server, words, sentence):
    written(line())
    Path("taken").touch()
    Path("other.errors.jsonl").touch()
    result = run("batches", "create", *words)
    assert result.exit_code == 1 and sentence in result.stderr
    assert server.asked == []


# A file that the gateway has.


def test_the_endpoint_of_a_file_that_the_gateway_has_is_its_first_lines(server):
    first = json.dumps(line(url="/v1/embeddings"))
    server.answers["/v1/files/file-1/content"] = (200, f"{first}\n{first}\n")
    server.answers["/v1/batches"] = (200, row("validating"))
    result = run(
        "batches", "create", "file-1", "--window", "7d", "--metadata", "team=search=x",
        "--metadata", "n=1",
    )  # fmt: skip
    assert result.exit_code == 0
    assert server.asked[-1]["body"] == {
        "input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "7d",
        "metadata": {"team": "search=x", "n": "1"},
    }  # fmt: skip
    assert f"llm-engine batches get {ID} --watch" in result.stdout
    run("batches", "create", "file-1", "--endpoint", "/v1/completions")
    assert server.asked[-1]["body"]["endpoint"] == "/v1/completions"


def test_a_file_that_holds_no_requests_needs_an_endpoint(server):
    server.answers["/v1/files/file-1/content"] = (200, "hello\n")
    result = run("batches", "create", "file-1")
    assert result.exit_code == 1 and "has no url: say --endpoint" in result.stderr


# What a watch draws.


def drawn(*rows, note: str = "") -> str:
    """What a terminal shows after the last of the rows."""
    display = batch_watch.Display(Console(file=StringIO(), width=120))
    for each in rows:
        display.show(each)
    if note:
        display.note(note)
    out = Console(file=StringIO(), record=True, width=120)
    out.print(display.draw())
    return " ".join(out.export_text().split())


def test_a_terminal_shows_how_far_how_fast_what_failed_and_what_is_left():
    text = drawn(row(done=1, failed=1, progress=RUNNING))
    assert text.startswith(f"{ID} in_progress demo-chat ")
    assert text.endswith("2/4 rows 1 failed 3.2 rows/s 1,234 tokens/s about 12 s left")


def test_a_slow_batch_is_not_told_to_stand_still_and_hours_are_hours():
    slow = row(done=1, progress={"rows_per_s": 0.012, "eta_s": 90_000.0})
    assert drawn(slow).endswith("0.012 rows/s about 25 h 0 min left")


def test_a_batch_that_waits_says_what_for():
    waiting = row("validating", total=0, status_reason="waits for\x1b[2J 2 other batches")
    assert drawn(waiting).endswith("waits for[2J 2 other batches")
    assert "rows" not in drawn(waiting)


def test_a_batch_that_has_ended_has_no_speed_and_waits_for_nothing():
    text = drawn(row("completed", done=4, progress=RUNNING, status_reason="x y z"), note="gone")
    assert text.endswith("4/4 rows")


def test_a_terminal_keeps_the_last_picture():
    out = Console(file=StringIO(), force_terminal=True, width=120, color_system=None)
    with batch_watch.Display(out) as display:
        display.show(row(done=1, progress=RUNNING))
        display.show(row("completed", done=4))
    assert "completed" in out.file.getvalue().rpartition(ID)[2]


def test_where_nothing_can_be_redrawn_a_state_is_told_at_once_and_progress_at_times(monkeypatch):
    out = Console(file=StringIO(), width=200)
    display = batch_watch.Display(out)
    for each in (
        row("validating", total=0),
        row(done=1),
        row(done=2),  # too early for another line
        row(done=2, status_reason="the model has no replica"),
        row("finalizing", done=4),
    ):
        display.show(each)
    monkeypatch.setattr(batch_watch, "LINE_PERIOD_S", 0)
    display.show(row("finalizing", done=4))  # nothing is new
    display.show(row("finalizing", done=3, failed=1))
    assert out.file.getvalue().splitlines() == [
        f"{ID} validating",
        f"{ID} in progress: 1/4 rows",
        f"{ID} in progress: 2/4 rows (the model has no replica)",
        f"{ID} finalizing: 4/4 rows",
        f"{ID} finalizing: 4/4 rows, 1 failed",
    ]


# How it ends.


def error_line(number: int, message: str, status=400) -> str:
    return json.dumps({
        "id": f"batch_req_1{number:08d}", "custom_id": f"q{number}", "error": None,
        "response": {"status_code": status, "request_id": "r", "body": {"error": {
            "message": message}}},
    })  # fmt: skip


def completed(**changes) -> dict:
    return row(
        "completed", done=2, failed=2, completed_at=160, output_file_id="file-o",
        error_file_id="file-e",
        usage={"input_tokens": 1200, "output_tokens": 34, "total_tokens": 1234},
    ) | changes  # fmt: skip


def test_a_batch_that_is_completed_is_summed_up_with_its_first_errors(server):
    server.answers[PATH] = (200, completed())
    lines = [error_line(1, "too\nlong"), error_line(3, "x" * 900)]
    server.answers["/v1/files/file-e/content"] = (200, "\n".join(lines) + "\n")
    result = run("batches", "get", ID, "--watch")
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    for part in (
        f"batch {ID} status completed model demo-chat rows 4/4 rows, 2 failed",
        "tokens 1,200 in, 34 out took 60 s, 58 s of them running",
        f"results llm-engine batches download {ID} errors llm-engine batches download {ID} --err",
        "row 2, q1: 400 too long row 4, q3: 400 xxx",
    ):
        assert part in words, part
    assert "x" * 301 not in words


@pytest.mark.parametrize("status", ["failed", "expired", "cancelled"])
def test_another_end_is_exit_code_1(server, status):
    server.answers[PATH] = (200, row(status, done=1, status_reason="because"))
    result = run("batches", "get", ID, "--watch")
    verb = "is cancelled" if status == "cancelled" else status
    assert result.exit_code == 1 and f"{ID} {verb}: because" in result.stderr


def test_an_input_that_is_wrong_is_told_line_by_line(server):
    wrong = [{"code": "invalid_url", "message": f"no {n}", "param": "url", "line": n}
             for n in range(1, 8)]  # fmt: skip
    whole = {"code": "invalid_request", "message": "No such file", "param": "f", "line": None}
    server.answers[PATH] = (200, row("failed", total=0, errors={"data": [whole, *wrong]}))
    told = [text.strip() for text in run("batches", "get", ID, "--watch").stdout.splitlines()]
    assert told[-6:] == [
        "No such file (invalid_request)", *(f"line {n}: no {n} (invalid_url)" for n in range(1, 5)),
        "and 3 more",
    ]  # fmt: skip


def test_rows_that_were_never_asked_have_their_reason():
    late = {"id": "batch_req_x00000009", "custom_id": "z", "response": None,
            "error": {"code": "batch_expired", "message": "too late"}}  # fmt: skip
    assert batch_results._row_error(late) == "row 10, z: too late"


def test_programs_get_the_last_row_and_nothing_else_on_stdout(server):
    server.answers[PATH] = (200, completed())
    server.answers["/v1/files/file-e/content"] = (200, error_line(1, "no") + "\n")
    result = run("batches", "get", ID, "--watch", "--json")
    assert json.loads(result.stdout) == completed()
    assert "row 2, q1: 400 no" in result.stderr


# A gateway that goes away, and people who do.


def test_a_gateway_that_restarts_is_waited_for():
    out = Console(file=StringIO(), width=200)
    with serving() as first:
        port = first.server_port
        first.answers[PATH] = (200, row(done=1))
        gateway = Gateway(Target(first.url, None))
        ended: list[dict] = []
        thread = threading.Thread(
            target=lambda: ended.append(batch_watch.follow(gateway, row(done=1), out))
        )
        thread.start()
        eventually(lambda: len(first.asked) > 1, 15, 0.01)
    time.sleep(0.1)
    with serving(port) as second, gateway:
        second.answers[PATH] = (200, completed())
        thread.join(10)
    assert ended == [completed()]
    text = out.file.getvalue()
    assert "Trying again, for up to 3 min 0 s." in text and "answers again" in text


def test_a_gateway_that_stays_away_is_given_up(monkeypatch):
    monkeypatch.setattr(watch, "PATIENCE_S", 0.1)
    out = Console(file=StringIO(), width=200)
    with (
        Gateway(Target("http://127.0.0.1:1", None)) as gateway,
        pytest.raises(LLMEngineError, match=r"Nothing answers at .* Given up after"),
    ):
        batch_watch.follow(gateway, row(), out)


def test_ctrl_c_stops_only_the_watching(server):
    server.answers[PATH] = (200, row(done=1))
    process = start("batches", "get", ID, "--watch", "--url", server.url)
    eventually(lambda: len(server.asked) > 1, 20, 0.05)
    told = interrupt(process)
    assert process.returncode == 130
    assert "It goes on unwatched." in told and "Traceback" not in told
    assert f"llm-engine batches get {ID} --watch --url {server.url}" in told
    assert f"llm-engine batches cancel {ID} --url {server.url}" in told
    assert all(asked["path"] == PATH for asked in server.asked)


# What there is.


def test_list_shows_each_batch_and_how_to_see_more(server):
    rows = [row(done=1, failed=1, status_reason="[b]waits"), row("validating", total=0, model=None)]
    server.answers["/v1/batches?limit=2"] = (200, {"data": rows, "has_more": True})
    text = run("batches", "list", "--limit", "2").stdout
    assert "[b]waits" in text and "in_progress" in text and "2/4" in text
    assert f"llm-engine batches list --after {ID}" in text
    told = run("batches", "list", "--limit", "2", "--json").stdout
    assert json.loads(told) == rows
    server.answers["/v1/batches?limit=20"] = (200, {"data": [], "has_more": False})
    assert "has no batch of yours" in run("batches", "list").stdout


@pytest.mark.parametrize(
    "batch, words, sentence",
    [
        (row(), [], f"its files come when it has ended: llm-engine batches get {ID} --watch"),
        (row("completed", done=4), ["--errors"], "no file of errors: 0 of its rows failed"),
        (row("completed", failed=4), [], f"each row failed. llm-engine batches download {ID} --er"),
        (row("failed", total=0, status_reason="bad"), [], f"{ID} failed: bad It has no results."),
    ],
)
def test_a_batch_without_a_file_says_why(server, batch, words, sentence):
    server.answers[PATH] = (200, batch)
    result = run("batches", "download", ID, *words)
    assert result.exit_code == 1 and sentence in result.stderr
