"""The rows of an input file: one JSON line each, read piece by piece with flat memory; and the ids
of the lines that become of them.

A byte order mark, CRLF and blank lines are tolerated. Rows count from 0 and leave blank lines out;
lines count from 1 and do not.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import orjson

BOM = b"\xef\xbb\xbf"
ROW_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Row:
    number: int  # its place in the input, from 0
    line: int  # from 1
    data: bytes | None  # stripped; None: longer than allowed


def read_rows(pieces: Iterable[bytes], longest: int) -> Iterator[Row]:
    """`longest`: bytes of a line. What is longer is not even held in memory."""
    number = 0
    for line, data in enumerate(_lines(pieces, longest), 1):
        if data is not None:
            data = (data.removeprefix(BOM) if line == 1 else data).strip()
        if data != b"":
            yield Row(number, line, data)
            number += 1


def _lines(pieces: Iterable[bytes], longest: int) -> Iterator[bytes | None]:
    held: list[bytes] = []
    size = 0  # of the line under way, what was thrown away included

    def ended() -> bytes | None:
        return b"".join(held) if size <= longest else None

    for piece in pieces:
        *whole, rest = piece.split(b"\n")
        for end in whole:
            size += len(end)
            held.append(end)
            yield ended()
            held.clear()
            size = 0
        size += len(rest)
        if size <= longest:
            held.append(rest)
        else:
            held.clear()
    if size:
        yield ended()


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines with their newline; the last one may lack it."""
    rest: list[bytes] = []
    for piece in pieces:
        *lines, last = piece.split(b"\n")
        if not lines:
            rest.append(piece)
            continue
        yield b"".join(chain(rest, (lines[0], b"\n")))
        for line in lines[1:]:
            yield line + b"\n"
        rest = [last] if last else []
    if rest:
        yield b"".join(rest)


def row_id(batch: str, row: int) -> str:
    """The id of a line of results."""
    return f"batch_req_{batch.removeprefix('batch_')}{row:0{ROW_DIGITS}d}"


def row_of(line: bytes) -> int:
    """Whose line of results it is."""
    return int(orjson.loads(line)["id"][-ROW_DIGITS:])
