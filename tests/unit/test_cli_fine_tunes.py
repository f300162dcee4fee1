"""`fine-tunes`: the look at a file before it is sent, what a watch shows, how a job is told."""

import json
import threading
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llm_engine.cli import fine_tune_input, fine_tune_watch, loss_chart, watch
from llm_engine.cli.client import Gateway
from llm_engine.cli.target import Target
from llm_engine.errors import LLMEngineError
from tests.support.cli import interrupt, run, serving, start, write_configuration
from tests.support.cluster import eventually
from tests.support.fine_tuned import jsonl, table

ID = "ftjob-1"
JOBS = "/v1/fine_tuning/jobs"
PATH = f"{JOBS}/{ID}"
EVENTS = f"{PATH}/events?limit=1000"
NEXT = f"{PATH}/events?limit=100"
MODEL = "ft:demo-chat:ann:support:0198c5f2"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_configuration(tmp_path)
    monkeypatch.setattr(fine_tune_watch, "PERIOD_S", 0.02)
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    with serving() as running:
        monkeypatch.setenv("LLM_ENGINE_URL", running.url)
        yield running


def row(status: str = "running", **changes: Any) -> dict[str, Any]:
    numbers = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 1.0}
    return {
        "id": ID, "object": "fine_tuning.job", "created_at": 100, "error": None,
        "fine_tuned_model": None, "finished_at": None, "hyperparameters": numbers,
        "model": "demo-chat", "organization_id": "ann", "result_files": [], "seed": 7,
        "status": status, "trained_tokens": None, "training_file": "file-t",
        "validation_file": None, "estimated_finish": None, "integrations": [], "metadata": None,
        "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
        "status_reason": None, "progress": {"step": 0, "total_steps": None},
    } | changes  # fmt: skip


def at(step: int, **changes: Any) -> dict[str, Any]:
    progress = {"step": step, "total_steps": 40, "train_loss": 2.0 / step, "tokens_per_s": 1234.5,
                "left_s": 12.0}  # fmt: skip
    return row(progress=progress, **changes)


def succeeded(**changes: Any) -> dict[str, Any]:
    return row(
        "succeeded", fine_tuned_model=MODEL, finished_at=160, trained_tokens=12345,
        result_files=["file-r"], progress={"step": 40, "total_steps": 40},
    ) | changes  # fmt: skip


def event(number: int, message: str = "", step: int = 0, **data: Any) -> dict[str, Any]:
    metrics = {"step": step, "train_loss": 2.0 / step} | data if step else None
    return {
        "object": "fine_tuning.job.event", "id": f"ftevent-{number}", "created_at": 100 + number,
        "level": "info", "message": message or f"Step {step}", "data": metrics,
        "type": "metrics" if step else "message",
    }  # fmt: skip


def page(*events: dict[str, Any], more: bool = False) -> tuple[int, dict[str, Any]]:
    """As they come: the newest first."""
    return 200, {"object": "list", "data": list(events)[::-1], "has_more": more}


# The look at a file.


@pytest.mark.parametrize(
    "name, data, method",
    [
        ("a.jsonl", jsonl(12), "supervised"),
        ("a.csv", table(12), "supervised"),
        ("a.txt", table(12, "input,output"), "supervised"),
    ],
)
def test_a_good_file_is_counted(name, data, method):
    Path(name).write_bytes(data)
    assert fine_tune_input.look(Path(name), method) == 12


@pytest.mark.parametrize(
    "data, method, sentence",
    [
        (b"", "supervised", "has 0 example(s), but must have at least 10"),
        (jsonl(9), "supervised", "has 9 example(s), but must have at least 10"),
        (jsonl(12) + b"{nope\n", "supervised", "Line 13: It is not valid JSON"),
        (table(12, "question,answer"), "supervised", "Line 1: It is neither JSONL nor a CSV"),
        (jsonl(12), "dpo", "Line 1: It lacks"),
        (b"[" + jsonl(1) + b"]", "supervised", "Line 1: The file is a JSON array"),
    ],
)
def test_what_no_job_takes_is_named_by_its_line_and_nothing_is_sent(server, data, method, sentence):
    Path("in.jsonl").write_bytes(data)
    words = ["in.jsonl", "--model", "demo-chat", "--method", method]
    result = run("fine-tunes", "create", *words)
    assert result.exit_code == 1 and sentence in result.stderr
    assert server.asked == []


def test_of_many_mistakes_the_first_few_are_shown():
    Path("in.jsonl").write_text("{}\n" * 50)
    with pytest.raises(LLMEngineError) as caught:
        fine_tune_input.look(Path("in.jsonl"), "supervised")
    shown = str(caught.value).splitlines()
    assert len(shown) == 1 + fine_tune_input.PROBLEMS_SHOWN + 1 and shown[-1].strip() == "..."


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["missing.jsonl"], "there is no file missing.jsonl, and it is no file's id"),
        (["."], "cannot read .: Is a directory"),
        (["in.jsonl", "--validation", "no.jsonl"], "there is no file no.jsonl"),
        (["in.jsonl", "--method", "magic"], "--method is supervised or dpo, not 'magic'"),
        (["in.jsonl", "--beta", "0.1"], "--beta is for --method dpo"),
        (["in.jsonl", "--set", "rank"], "--set takes KEY=VALUE"),
        (["in.jsonl", "--epochs", "2", "--set", "n_epochs=3"], "n_epochs is given twice"),
        (["in.jsonl", "--metadata", "x"], "--metadata takes KEY=VALUE, not 'x'"),
    ],
)
def test_a_mistake_is_told_before_anybody_is_asked(server, words, sentence):
    Path("in.jsonl").write_bytes(jsonl(12))
    result = run("fine-tunes", "create", *words, "--model", "demo-chat")
    assert result.exit_code == 1 and sentence in result.stderr
    assert server.asked == []


# What is asked for.


def test_all_that_can_be_said_is_sent(server):
    server.answers[JOBS] = (200, row("validating_files"))
    result = run(
        "fine-tunes", "create", "file-1", "-m", "demo-chat", "--validation", "file-2",
        "--method", "dpo", "--epochs", "3", "--batch-size", "4", "--learning-rate-multiplier", "2",
        "--learning-rate", "0.001", "--beta", "0.2", "--set", "lora_rank=8", "--suffix", "best",
        "--seed", "7", "--metadata", "team=search",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    numbers = {"n_epochs": 3, "batch_size": 4, "learning_rate": 0.001, "beta": 0.2,
               "learning_rate_multiplier": 2.0, "lora_rank": "8"}  # fmt: skip
    assert server.asked[-1]["body"] == {
        "model": "demo-chat", "training_file": "file-1", "validation_file": "file-2",
        "method": {"type": "dpo", "dpo": {"hyperparameters": numbers}}, "suffix": "best",
        "seed": 7, "metadata": {"team": "search"},
    }  # fmt: skip
    assert f"llm-engine fine-tunes get {ID} --watch" in result.stdout


def test_what_is_not_said_is_left_to_the_gateway(server):
    server.answers[JOBS] = (200, row("validating_files"))
    rows = [{"id": "small", "task": "generate", "status": "READY", "status_reason": None}]
    server.answers["/v1/endpoints"] = (200, {"data": rows})
    result = run("fine-tunes", "create", "file-1", "--json")
    assert json.loads(result.stdout) == row("validating_files")
    assert server.asked[-1]["body"] == {
        "model": "small", "training_file": "file-1", "method": {"type": "supervised"},
    }  # fmt: skip


def test_a_gateway_that_refuses_has_the_file_all_the_same(server, monkeypatch):
    Path("in.jsonl").write_bytes(jsonl(12))
    monkeypatch.setattr(fine_tune_input.transfer, "upload", lambda *_: {"id": "file-9"})
    no = {"error": {"message": "No.", "type": "x", "param": None, "code": None}}
    server.answers[JOBS] = (400, no)
    result = run("fine-tunes", "create", "in.jsonl", "-m", "demo-chat")
    assert result.exit_code == 1
    assert "No. The file is uploaded: `llm-engine fine-tunes create file-9`" in result.stderr


# The curve.


def chart(*curves: dict[int, float], last: int = 10, width: int = 60, dots: bool = True) -> str:
    return loss_chart.draw(curves, last, width, dots=dots).plain


def test_a_curve_falls_from_the_upper_left_to_the_lower_right():
    lines = chart({0: 2.0, 10: 0.5}, dots=False).splitlines()
    assert len(lines) == loss_chart.HEIGHT + 1
    stars = [line.partition("|")[2].rstrip().rfind("*") for line in lines[:-1]]
    assert stars == sorted(stars) and stars[0] < 10 and stars[-1] > 40
    assert lines[0].lstrip().startswith("2 ") and lines[-2].lstrip().startswith("0.5 ")
    assert lines[-1].rstrip().endswith("step 10")


def test_dots_are_finer_than_stars():
    curve = {n: 1.0 / n for n in range(1, 40)}
    fine = chart(curve, last=40)
    used = {character for character in fine if 0x2800 < ord(character) < 0x2900}
    assert len(used) > 3 and "*" not in fine


def test_the_curve_takes_as_much_of_the_axis_as_is_trained():
    half = chart({1: 2.0, 5: 1.0}, dots=False).splitlines()
    assert max(line.rfind("*") for line in half) < 40


def test_a_flat_curve_a_single_number_and_no_room():
    assert "*" in chart({1: 1.0, 5: 1.0}, dots=False)
    assert chart({1: 1.0}) == chart({}) == chart({1: 1.0, 2: 2.0}, width=20) == ""
    assert chart({1: 1.0}, {1: 2.0}, dots=False).count("*") == 2


def test_many_steps_are_drawn_as_few():
    long = {n: 3.0 / n for n in range(1, 20_000)}
    began = time.monotonic()
    text = loss_chart.draw([long, {}], 20_000, 200)
    assert time.monotonic() - began < 5
    assert max(len(line) for line in text.plain.splitlines()) <= loss_chart.WIDTH + 9


def test_the_second_curve_lies_over_the_first():
    text = loss_chart.draw([{1: 1.0, 10: 0.5}, {5: 0.7, 10: 0.6}], 10, 60)
    assert {str(span.style) for span in text.spans} >= {"cyan", "magenta"}


# What a watch draws.


def drawn(*shown: tuple[dict[str, Any], list[dict[str, Any]]], note: str = "") -> str:
    """What a terminal shows after the last of the rows."""
    display = fine_tune_watch.Display(Console(file=StringIO(), width=120))
    for each, events in shown:
        display.show(each, events)
    if note:
        display.note(note)
    out = Console(file=StringIO(), record=True, width=120)
    out.print(display.draw())
    return out.export_text()


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_terminal_shows_how_far_how_fast_the_loss_and_what_is_left():
    text = drawn((at(10), []))
    assert words(text).startswith(f"{ID} running demo-chat ")
    assert "step 10/40 loss 0.2 1,234 tokens/s about 12 s left" in words(text)


def test_a_terminal_draws_the_curve_of_all_events():
    events = [event(n, step=n) for n in range(1, 11)] + [event(11, step=11, valid_loss=0.4)]
    text = drawn((at(11), events[:5]), (at(11), events[5:]))
    assert "step 40" in text and "train loss 0.1818" in text and "valid loss 0.4" in text
    assert any(0x2800 < ord(character) < 0x2900 for character in text)


def test_steps_that_are_trained_again_replace_those_before():
    events = [event(n, step=n) for n in (1, 2, 3, 4)]
    again = event(9, step=2, train_loss=9.0)
    assert "train loss 9" in drawn((at(2), events), (at(2), [again]))


def test_one_that_waits_says_what_for_and_what_it_told_last():
    waiting = row("queued", status_reason="waits for\x1b[2J 2 others")
    assert words(drawn((waiting, []))).endswith("waits for[2J 2 others")
    told = drawn((row("validating_files"), [event(1, "Validating training\x07 file")]))
    assert words(told).endswith("Validating training file")


def test_one_that_has_ended_has_no_speed_and_waits_for_nothing():
    text = drawn((succeeded(status_reason="x y z"), [event(1, "done")]), note="gone")
    assert words(text).endswith("step 40/40")


def test_a_terminal_keeps_the_last_picture():
    out = Console(file=StringIO(), force_terminal=True, width=120, color_system=None)
    with fine_tune_watch.Display(out) as display:
        display.show(at(1), [])
        display.show(succeeded(), [])
    assert "succeeded" in out.file.getvalue().rpartition(ID)[2]


def test_where_nothing_can_be_redrawn_events_are_lines_and_progress_is_told_at_times(monkeypatch):
    out = Console(file=StringIO(), width=200)
    display = fine_tune_watch.Display(out)
    display.show(row("validating_files"), [event(1, "Created")])
    display.show(at(1), [event(2, "Started"), event(3, step=1)])
    display.show(at(2), [event(4, step=2)])  # too early for another line
    monkeypatch.setattr(fine_tune_watch, "LINE_PERIOD_S", 0)
    display.show(at(2), [])
    display.show(at(4), [])
    assert out.file.getvalue().splitlines() == [
        "Created",
        f"{ID} validating files",
        "Started",
        f"{ID} running: step 1/40, loss 2, 1,234 tokens/s, about 12 s left",
        f"{ID} running: step 2/40, loss 1, 1,234 tokens/s, about 12 s left",
        f"{ID} running: step 4/40, loss 0.5, 1,234 tokens/s, about 12 s left",
    ]


# Events, as they come.


def test_events_are_asked_for_once(server):
    with Gateway(Target(server.url, None)) as gateway:
        found = fine_tune_watch.Events(gateway, ID)
        server.answers[EVENTS] = page(event(1), event(2), more=True)  # older ones are left
        assert [each["id"] for each in found.new()] == ["ftevent-1", "ftevent-2"]
        server.answers[NEXT] = page(event(1), event(2))
        assert found.new() == []
        server.answers[NEXT] = page(event(4), event(5), more=True)
        server.answers[f"{NEXT}&after=ftevent-4"] = page(event(2), event(3), more=True)
        assert [each["id"] for each in found.new()] == ["ftevent-3", "ftevent-4", "ftevent-5"]


def test_a_job_without_events_is_asked_again(server):
    with Gateway(Target(server.url, None)) as gateway:
        found = fine_tune_watch.Events(gateway, ID)
        server.answers[EVENTS] = page()
        assert found.new() == found.new() == []


# How it ends.


def test_one_that_succeeds_is_a_model_to_talk_to(server):
    server.answers[PATH] = (200, succeeded())
    server.answers[EVENTS] = page(event(1, "The job has successfully completed"))
    result = run("fine-tunes", "get", ID, "--watch")
    assert result.exit_code == 0
    assert "The job has successfully completed" in result.stdout
    assert f"{MODEL} is ready after 60 s." in result.stdout
    assert f"llm-engine chat --model {MODEL}" in result.stdout


@pytest.mark.parametrize(
    "status, error, sentence",
    [
        ("failed", {"message": "Line 3: no", "code": "x", "param": None}, "failed: Line 3: no"),
        ("cancelled", None, "is cancelled."),
    ],
)
def test_another_end_is_exit_code_1(server, status, error, sentence):
    server.answers[PATH] = (200, row(status, error=error, finished_at=120))
    server.answers[EVENTS] = page()
    result = run("fine-tunes", "get", ID, "--watch")
    assert result.exit_code == 1 and f"{ID} {sentence}" in result.stderr


def test_programs_get_the_last_row_and_nothing_else_on_stdout(server):
    server.answers[PATH] = (200, succeeded())
    server.answers[EVENTS] = page(event(1, "hello"))
    result = run("fine-tunes", "get", ID, "--watch", "--json")
    assert json.loads(result.stdout) == succeeded() and "hello" in result.stderr


# A gateway that goes away, and people who do.


def test_a_gateway_that_restarts_is_waited_for():
    out = Console(file=StringIO(), width=200)
    with serving() as first:
        port = first.server_port
        first.answers |= {PATH: (200, at(1)), EVENTS: page(event(1, "one"))}
        first.answers[NEXT] = page(event(1, "one"))
        gateway = Gateway(Target(first.url, None))
        ended: list[dict[str, Any]] = []
        thread = threading.Thread(
            target=lambda: ended.append(fine_tune_watch.follow(gateway, at(1), out))
        )
        thread.start()
        eventually(lambda: len(first.asked) > 3, 15, 0.01)
    time.sleep(0.1)
    with serving(port) as second, gateway:
        second.answers |= {PATH: (200, succeeded()), NEXT: page(event(1, "one"), event(2, "two"))}
        thread.join(10)
    assert ended == [succeeded()]
    text = out.file.getvalue()
    assert "Trying again, for up to 3 min 0 s." in text and "answers again" in text
    assert text.count("one") == text.count("two") == 1


def test_a_gateway_that_stays_away_is_given_up(monkeypatch):
    monkeypatch.setattr(watch, "PATIENCE_S", 0.1)
    with (
        Gateway(Target("http://127.0.0.1:1", None)) as gateway,
        pytest.raises(LLMEngineError, match=r"Nothing answers at .* Given up after"),
    ):
        fine_tune_watch.follow(gateway, row(), Console(file=StringIO(), width=200))


def test_ctrl_c_stops_only_the_watching(server):
    server.answers |= {PATH: (200, at(1)), EVENTS: page(event(1)), NEXT: page(event(1))}
    process = start("fine-tunes", "get", ID, "--watch", "--url", server.url)
    eventually(lambda: len(server.asked) > 3, 20, 0.05)
    told = interrupt(process)
    assert process.returncode == 130
    assert "It goes on unwatched." in told and "Traceback" not in told
    assert f"llm-engine fine-tunes get {ID} --watch --url {server.url}" in told
    assert f"llm-engine fine-tunes cancel {ID} --url {server.url}" in told
    assert {asked["path"].partition("?")[0] for asked in server.asked} == {PATH, f"{PATH}/events"}


# What there is.


def test_list_shows_each_and_how_to_see_more(server):
    rows = [at(10, status_reason="[b]waits"), succeeded()]
    server.answers[f"{JOBS}?limit=2"] = (200, {"data": rows, "has_more": True})
    text = run("fine-tunes", "list", "--limit", "2").stdout
    assert "[b]waits" in text and "10/40" in text and MODEL in text
    assert f"llm-engine fine-tunes list --after {ID}" in text
    told = run("fine-tunes", "list", "--limit", "2", "--json").stdout
    assert json.loads(told) == rows
    server.answers[f"{JOBS}?limit=20"] = (200, {"data": [], "has_more": False})
    assert "has no fine-tune of yours" in run("fine-tunes", "list").stdout


def test_get_shows_all_of_it(server):
    server.answers[PATH] = (200, succeeded(metadata={"team": "search"}))
    checkpoints = [{"fine_tuned_model_checkpoint": f"{MODEL}:ckpt-step-{n}"} for n in (40, 20)]
    server.answers[f"{PATH}/checkpoints?limit=100"] = (200, {"data": checkpoints})
    text = words(run("fine-tunes", "get", ID).stdout)
    for part in (
        f"fine-tune {ID} status succeeded base demo-chat",
        "method supervised, n_epochs 3, batch_size auto, learning_rate_multiplier 1.0 seed 7",
        "step 40/40",
        "trained tokens 12,345",
        "metadata team=search results file-r",
        f"checkpoints {MODEL}:ckpt-step-40 {MODEL}:ckpt-step-20 model {MODEL}",
        f"talk to it llm-engine chat --model {MODEL}",
    ):
        assert part in text, part
    told = run("fine-tunes", "get", ID, "--json").stdout
    assert json.loads(told)["metadata"] == {"team": "search"}


def test_a_failure_is_shown(server):
    error = {"message": "Line 3:\x1b no", "code": "x", "param": "training_file"}
    server.answers[PATH] = (200, row("failed", error=error))
    server.answers[f"{PATH}/checkpoints?limit=100"] = (200, {"data": []})
    assert "error Line 3: no" in words(run("fine-tunes", "get", ID).stdout)


def test_events_read_like_a_log(server):
    failure = event(3, "It failed") | {"level": "error"}
    server.answers[f"{PATH}/events?limit=50"] = page(event(1, "One"), failure, more=True)
    result = run("fine-tunes", "events", ID)
    lines = result.stdout.splitlines()
    assert lines[0].endswith("  One") and lines[1].endswith("  error: It failed")
    assert "--after ftevent-1" in result.stderr
    server.answers[f"{PATH}/events?limit=2&after=ftevent-1"] = page()
    told = run("fine-tunes", "events", ID, "--limit", "2", "--after", "ftevent-1", "--json").stdout
    assert json.loads(told) == []


@pytest.mark.parametrize(
    "word, status", [("cancel", "cancelled"), ("pause", "paused"), ("resume", "queued")]
)
def test_changes_are_asked_for(server, word, status):
    server.answers[f"{PATH}/{word}"] = (200, row(status))
    assert run("fine-tunes", word, ID).stdout.strip() == f"{ID} is {status}."
    assert json.loads(run("fine-tunes", word, ID, "--json").stdout)["status"] == status


def test_a_refusal_is_one_sentence(server):
    no = {"error": {"message": "Cannot pause.", "type": "x", "param": None, "code": "y"}}
    server.answers[f"{PATH}/pause"] = (400, no)
    result = run("fine-tunes", "pause", ID)
    assert result.exit_code == 1 and result.stderr.strip() == "llm-engine: Cannot pause."


def test_a_model_is_deleted_by_its_name_or_its_jobs_id(server):
    gone = {"id": MODEL, "object": "model", "deleted": True}
    server.answers["/v1/models/ft%3Ademo-chat%3Aann%3Asupport%3A0198c5f2"] = (200, gone)
    server.answers[PATH] = (200, succeeded())
    for named in (MODEL, ID):
        assert run("fine-tunes", "delete", named).stdout.strip() == f"{MODEL} is deleted."
    server.answers[PATH] = (200, row())
    result = run("fine-tunes", "delete", ID)
    assert result.exit_code == 1 and "no model has come of it" in result.stderr


def test_chat_takes_such_names(server):
    server.answers["/v1/chat/completions"] = (
        200,
        'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\ndata: [DONE]\n\n',
    )
    result = run("chat", "hello", "--model", MODEL)
    assert result.stdout == "Hi\n" and server.asked[-1]["body"]["model"] == MODEL
