"""multipart/form-data as it streams in: short fields, and one file of any size, in any order."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import unquote

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartState, parse_options_header

from llm_engine.errors import BodyTooLarge, InvalidRequest

MOST_FIELDS = 32
LONGEST_FIELD = 4096  # bytes
LONGEST_NAME = 1024  # characters of a file's
#: What a form may have besides its file: boundaries, headers, fields.
OVERHEAD = 2**18  # bytes
_CONTROL = re.compile("[\x00-\x1f\x7f\x80-\x9f]")
_EXTENDED_NAME = re.compile(r"filename\*\s*=\s*\"?utf-8'[^']*'([^;\"]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class FileBegins:
    """Its bytes follow, in pieces. `filename` has no path; None where it was sent without one."""

    filename: str | None


Event = Field | FileBegins | bytes


async def read_form(request: Request, file: str, most: int, setting: str) -> AsyncIterator[Event]:
    """Every field, and the one part that is named `file`, of at most `most` bytes.

    Raises InvalidRequest for what is no such form, or ends before its end, and BodyTooLarge, which
    names `setting`.
    """
    length = request.headers.get("content-length", "")
    too_large = BodyTooLarge(
        f"The {file} is larger than {most} bytes, the most that is taken ({setting}).", param=file
    )
    if length.isdigit() and int(length) > most + OVERHEAD:
        raise too_large
    form = _Form(_boundary(request), file)
    body = size = 0
    async for data in request.stream():
        body += len(data)
        for event in form.feed(data):
            size += len(event) if isinstance(event, bytes) else 0
            if size > most:
                raise too_large
            yield event
        if body > most + OVERHEAD:
            raise too_large
    form.close()


def clean_name(name: str, param: str = "file") -> str:
    """Of a file, without its path. Raises InvalidRequest for one that is empty or too long."""
    name = _CONTROL.sub("", re.split(r"[/\\]", name)[-1]).strip()
    if name in ("", ".", ".."):
        raise InvalidRequest("The file has no name.", param=param, code="invalid_filename")
    if len(name) > LONGEST_NAME:
        raise InvalidRequest(
            f"The file's name is longer than {LONGEST_NAME} characters.",
            param=param,
            code="invalid_filename",
        )
    return name


class _Form:
    """The parser's callbacks, as a list of events for each piece of the body."""

    def __init__(self, boundary: bytes, file: str) -> None:
        self._file = file
        self._fields = 0
        self._has_file = self._in_file = False
        self._events: list[Event] = []
        self._header = (bytearray(), bytearray())
        self._disposition = ""
        self._name = ""
        self._value = bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data,
                "on_part_end": self._part_ends,
            },
        )

    def feed(self, data: bytes) -> list[Event]:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(f"{error}.") from None
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        if self._parser.state != MultipartState.END:
            raise _malformed("It ends before its last boundary.")

    def _part_begins(self) -> None:
        self._disposition = ""
        self._value.clear()

    def _header_ends(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = value.decode("utf-8", "replace")
        name.clear()
        value.clear()

    def _headers_end(self) -> None:
        # The parser of options knows latin-1; every client sends UTF-8.
        options = {
            key: value.decode("utf-8", "replace")
            for key, value in parse_options_header(self._disposition.encode())[1].items()
        }
        self._name = options.get(b"name", "")
        self._in_file = self._name == self._file
        if not self._in_file:
            self._fields += 1
            if self._fields > MOST_FIELDS:
                raise _malformed(f"It has more than {MOST_FIELDS} fields.")
            return
        if self._has_file:
            raise InvalidRequest(
                f"Send one '{self._file}' in a request.", param=self._file, code="too_many_files"
            )
        self._has_file = True
        extended = _EXTENDED_NAME.search(self._disposition)
        filename = options.get(b"filename", unquote(extended[1]) if extended else None)
        self._events.append(FileBegins(filename))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._events.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > LONGEST_FIELD:
            raise InvalidRequest(
                f"The field '{self._name[:100]}' is longer than {LONGEST_FIELD} bytes.",
                param=self._name[:100],
                code="string_above_max_length",
            )

    def _part_ends(self) -> None:
        if not self._in_file:
            self._events.append(Field(self._name, self._value.decode("utf-8", "replace")))


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        shown = kind.decode("latin-1")[:100]
        raise InvalidRequest(
            f"The request must be multipart/form-data, not '{shown}'.", code="invalid_content_type"
        )
    boundary = options.get(b"boundary")
    if not boundary or len(boundary) > 70:  # RFC 2046
        raise InvalidRequest(
            "The content type multipart/form-data needs a boundary of 1 to 70 characters.",
            code="invalid_content_type",
        )
    return boundary


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest(f"The multipart form is malformed. {why}", code="invalid_multipart")
