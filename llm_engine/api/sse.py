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


class Splitter:
    """Cuts a stream of bytes into the payloads of its `data:` events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *whole, self._rest = (self._rest + data).split(b"\n\n")
        return [part[6:] for part in whole if part.startswith(b"data: ")]
