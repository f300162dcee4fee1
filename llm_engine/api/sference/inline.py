"""The body of POST /v1/batches: checked row by row before anything is made of it. Blocking.

It may be as large as batches.max_inline_bytes and is never in memory as a whole: its rows go from
one temporary file into another, as lines of a batch's input.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any, Self

import ijson
import orjson

from llm_engine.api.openai.requests import not_in_batches, parse
from llm_engine.api.requests import Kind
from llm_engine.api.sference.bodies import shown, to_chat
from llm_engine.config import Settings
from llm_engine.errors import APIError, BodyTooLarge, InvalidRequest
from llm_engine.nesting import Event, TooMuch, watched

ENDPOINT = "/v1/chat/completions"  # what every row asks, in whichever form it came
#: Bytes that are kept in memory before they go to disk.
SMALL = 2**20
MOST_ID = 512  # characters of a custom_id

_TEXTS = frozenset({"window", "completion_window", "endpoint", "input_file_id"})
_ROW = "requests.item"


@dataclass
class Asked:
    """What a body asks for. `with` it, for its rows lie in a temporary file."""

    texts: dict[str, str | None] = field(default_factory=dict)  # the fields that are no rows
    inline: bool = False  # it brings its rows along
    model: str | None = None  # of all rows
    count: int = 0
    lines: IO[bytes] = field(default_factory=lambda: tempfile.SpooledTemporaryFile(SMALL))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.lines.close()


def read(body: IO[bytes], settings: Settings, exists: Callable[[str], object]) -> Asked:
    """`exists`: raises APIError for a model that the caller cannot use.

    Raises InvalidRequest for the first thing that is wrong, and what `exists` raises.
    """
    asked = Asked()
    try:
        rows = _Rows(asked, settings, exists)
        events = _sort(watched(body, _ROW), asked)
        for row in ijson.items(events, _ROW):
            rows.add(row)
    except TooMuch as error:
        asked.lines.close()
        raise _invalid(f"requests[{asked.count}]", str(error)) from None
    except ijson.JSONError as error:
        asked.lines.close()
        found = re.search(r"(?:lexical|parse) error: ([^\n\\]+)", str(error))
        why = found[1].rstrip(". ") if found else "it ends too early"
        raise InvalidRequest(f"The request body is not valid JSON: {why}.") from None
    except BaseException:
        asked.lines.close()
        raise
    asked.lines.seek(0)
    return asked


def too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The request body is larger than {limit} bytes, the limit of this server "
        "(batches.max_inline_bytes). Upload a file, or make several batches."
    )


def _sort(events: Iterator[Event], asked: Asked) -> Iterator[Event]:
    """Passes the parser's events on, and keeps what is no row. Raises InvalidRequest."""
    for path, event, value in events:
        if path == "":
            _check_top(event, value, asked)
        elif path in _TEXTS:
            if event not in ("string", "null"):
                raise _invalid(path, "it must be a string", "invalid_type")
            asked.texts[path] = value
        elif path == "requests" and event not in ("start_array", "end_array"):
            raise _invalid(path, "it must be an array of requests", "invalid_type")
        elif path == _ROW:
            if event in _SCALARS or event == "start_array":
                raise _invalid(f"requests[{asked.count}]", "it must be an object", "invalid_type")
        yield path, event, value


_SCALARS = ("string", "number", "integer", "double", "boolean", "null")


def _check_top(event: str, value: Any, asked: Asked) -> None:
    if event not in ("start_map", "end_map", "map_key"):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_type")
    if event != "map_key":
        return
    if value not in _TEXTS and value != "requests":
        raise InvalidRequest(
            f"Unknown parameter: '{value[:64]}'.", param=value[:64], code="unknown_parameter"
        )
    if value in asked.texts or (value == "requests" and asked.inline):
        raise _invalid(value, "it is there twice")
    if value == "requests":
        asked.inline = True


class _Rows:
    """Checks one row after the other, and writes it down as a line of a batch's input."""

    def __init__(self, asked: Asked, settings: Settings, exists: Callable[[str], object]) -> None:
        self._asked = asked
        self._exists = exists
        self._most = settings.batches.max_rows
        self._largest = settings.gateway.max_body_bytes
        self._ids: set[str] = set()

    def add(self, row: dict[str, Any]) -> None:
        where = f"requests[{self._asked.count}]"
        if self._asked.count >= self._most:
            raise InvalidRequest(
                f"A batch has at most {self._most} requests here (batches.max_rows).",
                param="requests",
                code="too_many_rows",
            )
        custom_id = self._custom_id(where, row)
        try:
            body = self._body(row)
        except APIError as error:
            raise _at(error, where, custom_id) from None
        request = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body}
        line = orjson.dumps(request)
        if len(line) > self._largest:
            raise _invalid(
                where, f"it is larger than {self._largest} bytes (gateway.max_body_bytes)"
            )
        self._asked.lines.write(line + b"\n")
        self._asked.count += 1

    def _custom_id(self, where: str, row: dict[str, Any]) -> str | None:
        for key in row.keys() - {"custom_id", "body"}:
            raise InvalidRequest(
                f"{where}: Unknown parameter: '{key[:64]}'. A request has 'custom_id' and 'body'.",
                param=f"{where}.{key[:64]}",
                code="unknown_parameter",
            )
        custom_id = row.get("custom_id")
        if custom_id is None:
            return None
        param = f"{where}.custom_id"
        if not isinstance(custom_id, str) or len(custom_id) > MOST_ID:
            raise _invalid(param, f"it must be null or a string of at most {MOST_ID} characters")
        if custom_id in self._ids:
            raise InvalidRequest(
                f"{where}: the custom_id '{custom_id[:64]}' is there already.",
                param=param,
                code="duplicate_custom_id",
            )
        self._ids.add(custom_id)
        return custom_id

    def _body(self, row: dict[str, Any]) -> orjson.Fragment:
        """Raises APIError, about a field of the body."""
        body = row.get("body")
        if not isinstance(body, dict):
            raise _invalid("body", "it must be an object", "invalid_type")
        try:
            written = orjson.dumps(to_chat(body))
        except TypeError as error:
            raise _invalid("body", str(error)) from None
        try:
            request = parse(Kind.CHAT, written)
            if request.store:
                raise not_in_batches()
            model = request.model
        except InvalidRequest as error:
            raise shown(error, body) from None
        if self._asked.model is None:
            self._exists(model)
            self._asked.model = model
        if model != self._asked.model:
            raise InvalidRequest(
                f"It asks the model '{model}', and the requests before it '{self._asked.model}'. "
                "A batch has one model.",
                param="model",
                code="mismatched_model",
            )
        return orjson.Fragment(written)


def _at(error: APIError, where: str, custom_id: str | None) -> APIError:
    """The same error, and which row it is in."""
    named = where if custom_id is None else f"{where} (custom_id '{custom_id[:64]}')"
    inside = "" if error.param in (None, "body") else f".{error.param}"
    return type(error)(
        f"{named}: {error.message}",
        param=f"{where}.body{inside}",
        code=error.code,
        status=error.status,
    )


def _invalid(param: str, why: str, code: str = "invalid_value") -> InvalidRequest:
    return InvalidRequest(f"Invalid '{param}': {why}.", param=param, code=code)
