"""Server-sent events: the framing, in one place."""

import re

import orjson

from llm_engine.errors import APIError

DONE = b"[DONE]"
#: An error object, or vLLM's word for a generation that it gave up: OpenAI has none for that.
_FAILURE = re.compile(rb'data: \{"error"|"finish_reason":"(?:abort|error)"')


def event(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"


def error_event(error: APIError) -> bytes:
    """What ends a stream that fails after its first byte. No [DONE] follows: a client that only
    counts bytes must not take the stream for a whole one."""
    return event(orjson.dumps(error.body()))


def count(data: bytes) -> int:
    """Events that end in `data`."""
    return data.count(b"\n\n")


def holds_failure(data: bytes) -> bool:
    return _FAILURE.search(data) is not None


class Whole:
    """Lets a stream of bytes through as whole events: what ends within one waits for its rest."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        data = self._rest + data
        end = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
        self._rest = data[end:]
        return data[:end]


def payloads(data: bytes) -> list[bytes]:
    """Of the `data:` events that end in it; it begins with one."""
    return [part[_data(part) :] for part in data.split(b"\n\n")[:-1] if _data(part)]


def _data(event: bytes) -> int:
    """Where its data begin, behind its name where it has one; 0: it has none."""
    if event.startswith(b"event: "):
        return event.find(b"\ndata: ") + 7 if b"\ndata: " in event else 0
    return 6 if event.startswith(b"data: ") else 0
