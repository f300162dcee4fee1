"""The framing of server-sent events, wherever the bytes are cut."""

import pytest

from llm_engine.api import sse

EVENTS = [b'{"id":"1","choices":[]}', b'{"error":{"message":"no"}}', b"[DONE]"]
STREAM = b"".join(map(sse.event, EVENTS))


@pytest.mark.parametrize("size", [1, 2, 7, 30, len(STREAM)])
def test_only_whole_events_are_let_through(size):
    whole = sse.Whole()
    let = [whole.feed(STREAM[at : at + size]) for at in range(0, len(STREAM), size)]
    assert b"".join(let) == STREAM
    assert all(piece == b"" or piece.endswith(b"\n\n") for piece in let)


@pytest.mark.parametrize("size", [1, 2, 7, 30, len(STREAM)])
def test_a_failure_is_seen_and_stands_at_an_events_begin(size):
    """However the engine's bytes arrive, what is told instead follows a whole event."""
    whole, before = sse.Whole(), b""
    for at in range(0, len(STREAM), size):
        piece = whole.feed(STREAM[at : at + size])
        if sse.holds_failure(piece):
            payloads = sse.payloads(piece)
            assert EVENTS[1] in payloads
            assert before + b"".join(map(sse.event, payloads)) in (
                STREAM, STREAM.removesuffix(sse.event(EVENTS[2]))
            )  # fmt: skip
            return
        before += piece
    raise AssertionError("it was not seen")


def test_names_of_events_and_comments_are_no_payload():
    stream = b": ping\n\nevent: a\ndata: 1\n\nevent: b\n\ndata: 2\n\n"
    assert sse.payloads(stream) == [b"1", b"2"]
