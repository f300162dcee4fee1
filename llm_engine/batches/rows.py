"""The rows of an input file: one JSON line each, read piece by piece with flat memory.

A byte order mark, CRLF and blank lines are tolerated. Rows count from 0 and leave blank lines out;
lines count from 1 and do not.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BOM = b"\xef\xbb\xbf"


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
