"""How the command line carries bytes: spans of files, where downloads go, what a meter says."""

import threading
from pathlib import Path

import pytest

from llm_engine.cli import files, transfer
from llm_engine.cli.client import Gateway
from llm_engine.cli.target import Target
from llm_engine.errors import LLMEngineError
from tests.support.cli import run, serving, write_configuration


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_configuration(tmp_path)
    return tmp_path


@pytest.fixture
def server():
    with serving() as running:
        yield running


def record(**changes) -> dict:
    return {
        "id": "file-1", "object": "file", "bytes": 5, "created_at": 1, "expires_at": None,
        "filename": "a.jsonl", "purpose": "batch", "status": "processed",
    } | changes  # fmt: skip


# Spans.


def test_a_span_is_a_file_of_its_own_and_counts_what_is_read(elsewhere):
    (elsewhere / "f").write_bytes(b"0123456789")
    moved = []
    with transfer.Span(Path("f"), 2, 5, moved.append) as span:
        assert (span.tell(), span.seek(0, 2), span.seek(0)) == (0, 5, 0)  # as httpx asks its size
        assert [span.read(3), span.read(3), span.read(3)] == [b"234", b"56", b""]
        span.seek(1)
        assert span.read() == b"3456"
    assert sum(moved) == 9


def test_a_file_that_becomes_shorter_is_a_sentence(elsewhere):
    (elsewhere / "f").write_bytes(b"0123")
    with transfer.Span(Path("f"), 0, 9, lambda _: None) as span:
        assert span.read(4) == b"0123"
        with pytest.raises(LLMEngineError, match="f became shorter while it was read"):
            span.read(4)


def test_a_span_ends_when_the_upload_is_stopped(elsewhere):
    (elsewhere / "f").write_bytes(b"0123")
    stop = threading.Event()
    with transfer.Span(Path("f"), 0, 4, lambda _: None, stop) as span:
        stop.set()
        with pytest.raises(transfer.Stopped):
            span.read(1)


def test_what_a_failed_try_has_counted_is_taken_back():
    total = []
    tally = transfer.Tally(total.append)
    tally.add(3)
    tally.add(4)
    tally.undo()
    assert sum(total) == 0


# Where a download goes.


def test_a_download_goes_here_into_a_folder_to_a_file_or_to_stdout(elsewhere):
    Path("folder").mkdir()
    for given, placed in (
        (None, "a.jsonl"),
        ("folder", "folder/a.jsonl"),
        ("b.txt", "b.txt"),
        ("-", "-"),
    ):
        assert transfer.place(given, "a.jsonl", force=False) == placed


@pytest.mark.parametrize(
    "filename, placed",
    [
        ("../../etc/passwd", "passwd"),
        (".bashrc", "bashrc"),
        ("a\x1b[2J", "a[2J"),
        ("..", "download"),
    ],
)
def test_a_name_from_afar_stays_in_its_folder_and_is_not_hidden(filename, placed):
    assert transfer.place(None, filename, force=False) == placed


def test_nothing_is_overwritten_without_force(elsewhere):
    Path("a.jsonl").write_text("mine")
    with pytest.raises(LLMEngineError, match=r"a\.jsonl exists already: --force replaces it"):
        transfer.place(None, "a.jsonl", force=False)
    assert transfer.place(None, "a.jsonl", force=True) == "a.jsonl"
    for given in ("no/such", "no/"):
        with pytest.raises(LLMEngineError, match="there is no folder no"):
            transfer.place(given, "a.jsonl", force=False)


def test_a_download_that_is_cut_off_leaves_what_was_there(elsewhere, server, monkeypatch):
    """The gateway says 9 bytes and closes after 5."""
    from tests.support.cli import Handler

    def cut(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", "9")
        self.end_headers()
        self.wfile.write(b"01234")

    monkeypatch.setattr(Handler, "answer", cut)
    Path("a.jsonl").write_text("mine")
    with (
        Gateway(Target(server.url, None)) as gateway,
        pytest.raises(LLMEngineError, match=r"the connection to .* broke"),
    ):
        transfer.download(gateway, record(bytes=9), "a.jsonl")
    assert Path("a.jsonl").read_text() == "mine"
    assert sorted(path.name for path in elsewhere.iterdir()) == ["a.jsonl", "llm-engine.yaml"]


def test_a_folder_that_cannot_be_written_is_a_sentence(server, monkeypatch):
    server.answers["/v1/files/file-1/content"] = (200, "01234")
    with (
        Gateway(Target(server.url, None)) as gateway,
        pytest.raises(LLMEngineError, match="Not a directory"),
    ):
        Path("file").touch()
        transfer.download(gateway, record(), "file/a.jsonl")


# What a meter says.


def test_where_nothing_can_be_redrawn_there_is_a_line_every_few_seconds(capsys, monkeypatch):
    with transfer.Meter("a.jsonl", 9_000) as meter:
        meter.add(1_000)
    assert capsys.readouterr().err == ""  # it was over before there was something to say
    monkeypatch.setattr(transfer, "LINE_PERIOD_S", 0)
    with transfer.Meter("a\x1b.jsonl", 9_000) as meter:
        meter.add(1_000)
        meter.add(2_000)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("a.jsonl: 1.0 kB of 9.0 kB, ") and first.endswith("B/s")
    assert second.startswith("a.jsonl: 3.0 kB of 9.0 kB, ")


# Mistakes.


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["upload", "missing.jsonl"], "no file missing.jsonl."),
        (["upload", "."], ". is not a file."),
        (["upload", "llm-engine.yaml", "--expires", "soon"], "--expires takes a span of time"),
    ],
)
def test_a_mistake_is_told_before_anybody_is_asked(server, words, sentence):
    result = run("files", *words, "--url", server.url)
    assert result.exit_code == 1 and sentence in result.stderr
    assert server.asked == []


def test_a_wrong_key_is_told_before_bytes_are_sent(server, elsewhere):
    server.answers["/v1/files?limit=1"] = (401, {"error": {"message": "Incorrect API key."}})
    (elsewhere / "a.jsonl").write_text("{}\n")
    result = run("files", "upload", "a.jsonl", "--url", server.url)
    assert result.exit_code == 1 and "Incorrect API key. (No key was sent" in result.stderr
    assert len(server.asked) == 1


def test_spans_of_time():
    assert [files.parse_span(text) for text in ("90s", "12h", "30d")] == [90, 43_200, 2_592_000]
