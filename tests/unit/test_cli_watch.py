"""`endpoints watch`: what is drawn, what is printed, and when it is over."""

import json
import threading
import time
from io import StringIO

import pytest
from rich.console import Console

from llm_engine.cli import watch
from llm_engine.cli.client import Gateway
from llm_engine.cli.target import Target
from llm_engine.errors import LLMEngineError
from tests.support.cli import interrupt, run, serving, start
from tests.support.cluster import eventually

PATH = "/v1/endpoints/qwen"
GONE = (404, {"error": {"message": "There is no endpoint.", "code": "endpoint_not_found"}})


def row(status="UPDATE_IN_PROGRESS", reason=None, *, settled=None, eta=None, ready=0, **phases):
    names = ("queued", "scheduling", "loading", "warming", "total")
    return {
        "id": "qwen",
        "status": status,
        "status_reason": reason,
        "last_error": None,
        "settled": status in watch.ENDED if settled is None else settled,
        "phases": {f"{name}_s": phases.get(name) for name in names},
        "eta_s": eta,
        "created_at": 1,
        "updated_at": time.time(),
        "replicas_ready": ready,
        "replicas_wanted": 1,
    }


LOADING = {"reason": "a replica is loading the model", "queued": 0.2, "scheduling": 2.1}


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(watch, "PERIOD_S", 0.02)


@pytest.fixture
def server():
    with serving() as running:
        yield running


def drawn(*rows, wait_s=0.0) -> str:
    """What a terminal shows some time after the last of the rows."""
    display = watch.Display("qwen", Console(file=StringIO(), width=80))
    for each in rows:
        display.show(each)
    time.sleep(wait_s)
    out = Console(file=StringIO(), record=True, width=80)
    out.print(display.draw())
    return out.export_text()


def words(text: str) -> str:
    return " ".join(text.split())


def states(each) -> list[str]:
    return [f"{step.label}: {step.state}" for step in watch.steps(each)]


# What is drawn.


def test_the_phases_before_the_running_one_are_done_and_the_later_ones_wait():
    assert states(row("UPDATE_PENDING")) == [
        "queued: running", "scheduling: waiting", "loading weights: waiting",
        "warming: waiting", "ready: waiting",
    ]  # fmt: skip
    assert states(row(**LOADING))[1:4] == [
        "scheduling: done", "loading weights: running", "warming: waiting"
    ]  # fmt: skip
    assert {state.split(": ")[1] for state in states(row("READY"))} == {"done"}


def test_a_failure_is_marked_at_the_phase_that_failed():
    failed = row("UPDATE_FAILED", "no memory", queued=0.1, scheduling=1.0)
    assert states(failed)[2:] == ["loading weights: failed", "warming: waiting", "ready: waiting"]
    died = row("UPDATE_FAILED", queued=0.1, scheduling=1.0, loading=1.0, warming=1.0)
    assert states(died)[-2:] == ["warming: done", "ready: failed"]


def test_the_phases_of_the_start_before_are_not_taken_for_this_ones():
    before = dict(queued=0.2, scheduling=2.0, loading=9.0, warming=0.8, total=12.0)
    asked = watch.truth(row("UPDATE_PENDING", **before))
    assert states(asked)[0] == "queued: running" and watch.phases_line(asked) == ""
    ready = row("READY", **before)
    assert watch.truth(ready) == ready


def test_a_terminal_shows_each_phase_with_its_seconds_and_what_is_left():
    text = drawn(row(**LOADING, eta=12.4))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == "qwen UPDATE_IN_PROGRESS 0/1 replicas ready".split()
    assert lines[1] == ["✓", "queued", "0.2", "s"]
    assert lines[2] == ["✓", "scheduling", "2.1", "s"]
    assert lines[3][1:3] == ["loading", "weights"] and lines[3][-1] == "s"
    assert lines[4] == ["·", "warming"] and lines[5] == ["·", "ready"]
    assert "━" in text and "about 12 s left" in text
    assert "a replica is loading the model" in text


def test_seconds_go_on_between_two_answers():
    text = words(drawn(row(**LOADING, eta=0.1), wait_s=0.2))
    assert "loading weights 0.2 s" in text and "longer than usual" in text


def test_who_joins_late_sees_how_long_the_phase_has_run():
    late = row(**LOADING) | {"updated_at": time.time() - 75}
    assert "~ loading weights 75 s" in words(drawn(late))
    warming = row(reason="a replica is warming up", queued=0.2, scheduling=2.1, loading=80.0)
    text = words(drawn(late, warming))
    assert "✓ loading weights 80 s" in text and "~ warming 0.0 s" in text


def test_a_note_and_the_reason_are_not_read_as_markup_nor_obeyed():
    display = watch.Display("qwen", Console(file=StringIO(), force_terminal=True, width=80))
    with display:
        display.show(row(reason="[bold]x\x1b[2J", queued=0.1))
        display.note("nobody [red]answers")
        shown = Console(file=StringIO(), width=80)
        shown.print(display.draw())
    assert "[bold]x[2J" in shown.file.getvalue() and "nobody [red]answers" in shown.file.getvalue()


def test_a_terminal_keeps_the_last_picture():
    out = Console(file=StringIO(), force_terminal=True, width=80, color_system=None)
    display = watch.Display("qwen", out)
    with display:
        display.show(row(**LOADING))
        display.end(row("READY", ready=1, queued=0.2, scheduling=2.1, total=31.0))
    last = out.file.getvalue().rpartition("qwen")[2]
    assert "✓ ready" in last and "31 s" in last and "⠋" not in last


# What is printed, and when it is over.


def follow(server, *told, capsys, **options):
    """Follow through these answers, each shown twice, the last for ever."""
    answers = [each if isinstance(each, tuple) else (200, each) for each in told]

    def advance() -> None:
        for answer in answers[1:]:
            seen = len(server.asked) + 2
            eventually(lambda seen=seen: len(server.asked) >= seen, 15, 0.005)
            server.answers[PATH] = answer

    server.answers[PATH] = answers[0]
    thread = threading.Thread(target=advance, daemon=True)
    thread.start()
    with Gateway(Target(server.url, None)) as gateway:
        try:
            return watch.follow(gateway, "qwen", **options)
        finally:
            thread.join(5)


def test_without_a_terminal_each_change_is_one_line(server, capsys):
    placed = row(reason="a replica is being placed", queued=0.2)
    ready = row("READY", ready=1, queued=0.2, scheduling=2.1, total=31.0)
    follow(server, row("UPDATE_PENDING"), placed, row(**LOADING), ready, capsys=capsys)
    assert capsys.readouterr().out.splitlines() == [
        "qwen is waiting (0/1 replicas)",
        "qwen is starting: a replica is being placed (0/1 replicas; queued 0.2 s)",
        "qwen is starting: a replica is loading the model "
        "(0/1 replicas; queued 0.2 s, scheduling 2.1 s)",
        "qwen is ready after 31 s: 1/1 replicas",
    ]


def test_a_failure_is_raised_with_its_reason(server, capsys):
    with pytest.raises(LLMEngineError, match="the endpoint 'qwen' failed: no memory"):
        follow(server, row(**LOADING), row("UPDATE_FAILED", "no memory"), capsys=capsys)


def test_a_delete_is_over_when_it_is_gone(server, capsys):
    before = row("READY", settled=False)
    stopping = row("DELETE_IN_PROGRESS", "replicas finish what they have")
    assert follow(server, stopping, GONE, capsys=capsys, row=before, deleting=True) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("qwen is stopping") and lines[-1] == "qwen is gone."


def test_another_endpoint_of_that_name_is_not_the_deleted_one(server, capsys):
    again = row("UPDATE_PENDING") | {"created_at": 2}
    assert follow(server, row("DELETE_IN_PROGRESS"), again, capsys=capsys) is None


def test_what_is_deleted_while_it_starts_never_got_ready(server, capsys):
    with pytest.raises(LLMEngineError, match="was deleted meanwhile"):
        follow(server, row(**LOADING), GONE, capsys=capsys)


def test_what_was_never_there_cannot_be_watched(server):
    server.answers[PATH] = GONE
    result = run("endpoints", "watch", "qwen", "--url", server.url)
    assert result.exit_code == 1 and "There is no endpoint." in result.stderr


@pytest.mark.parametrize(
    "answer",
    [
        (404, "no route: the proxy is up before the gateway"),
        (502, "Bad gateway"),
        (503, {"error": {"message": "The store does not answer."}}),
        (200, "<html>"),
    ],
)
def test_a_gateway_that_is_away_for_a_moment_is_waited_for(server, capsys, answer):
    follow(server, row(**LOADING), answer, row("READY", ready=1), capsys=capsys)
    out = capsys.readouterr().out
    assert out.count("Trying again, for up to 3 min 0 s.") == 1
    assert "The gateway answers again." in out and "qwen is ready" in out


def test_a_gateway_that_restarts_is_waited_for(capsys):
    with serving() as first:
        first.answers[PATH] = (200, row(**LOADING))
        port = first.server_port
        result = []
        watching = threading.Thread(
            target=lambda: result.append(run("endpoints", "watch", "qwen", "--url", first.url))
        )
        watching.start()
        eventually(lambda: first.asked, 15)
    time.sleep(0.2)  # nothing listens
    with serving(port) as second:
        second.answers[PATH] = (200, row("READY", ready=1))
        watching.join(10)
    assert result and result[0].exit_code == 0
    lines = result[0].stdout.splitlines()  # what is told of a restart depends on the moment
    assert len(lines) == 4 and lines[1].endswith(". Trying again, for up to 3 min 0 s.")
    assert lines[-1] == "qwen is ready: 1/1 replicas"


def test_a_gateway_that_stays_away_is_given_up(server, capsys, monkeypatch):
    monkeypatch.setattr(watch, "PATIENCE_S", 0.1)
    with pytest.raises(LLMEngineError, match=r"HTTP 502\). Given up after 0.\d s"):
        follow(server, row(**LOADING), (502, "Bad gateway"), capsys=capsys)


def test_ctrl_c_stops_only_the_watching(server):
    server.answers[PATH] = (200, row(**LOADING))
    child = start("endpoints", "watch", "qwen", "--url", server.url)
    assert "loading the model" in child.stdout.readline()
    told = interrupt(child)
    assert child.returncode == 130 and "Traceback" not in told
    assert f"llm-engine endpoints watch qwen --url {server.url}" in told


def test_json_of_the_end_stands_alone_on_stdout(server):
    server.answers["/v1/endpoints"] = (201, row("UPDATE_PENDING"))
    server.answers[PATH] = (200, row("READY", ready=1))
    result = run("endpoints", "create", "qwen", "-m", "x", "--watch", "--json", "--url", server.url)
    assert json.loads(result.stdout)["status"] == "READY"
    assert "qwen is ready" in result.stderr
