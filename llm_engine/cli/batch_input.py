"""`batches create`: a cheap look at the input, its way to the gateway, and the request for a batch.

The look spares the way of what no gateway takes. The judge is the gateway.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from llm_engine.cli import transfer
from llm_engine.cli.client import Gateway
from llm_engine.cli.endpoints import split_pair
from llm_engine.errors import LLMEngineError

NEEDED = ("custom_id", "method", "url", "body")
LONGEST_LINE = 64 * 2**20  # bytes; what is longer is no JSONL
PROBLEMS_SHOWN = 5
BOM = b"\xef\xbb\xbf"
FILE_ID = "file-"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Look:
    rows: int
    endpoint: str  # the path of every row


def create(
    gateway: Gateway,
    file: str,
    endpoint: str | None,
    window: str,
    metadata: dict[str, str],
    own_engines: bool,
) -> Row:
    """`file`: a local one, or the id of one that the gateway has."""
    path = Path(file)
    if path.exists() or not file.startswith(FILE_ID):
        endpoint = look(path, endpoint).endpoint
        file_id = transfer.upload(gateway, path, "batch")["id"]
        again = f" The input is uploaded: `llm-engine batches create {file_id}` needs no {file}."
    else:
        file_id, again = file, ""
        endpoint = endpoint or _first_url(gateway, file)
    wanted: Row = {
        "input_file_id": file_id,
        "endpoint": endpoint,
        "completion_window": window,
    }
    if metadata:
        wanted["metadata"] = metadata
    if own_engines:
        wanted["own_engine"] = True
    try:
        return gateway.send("POST", "/v1/batches", wanted)
    except LLMEngineError as error:
        raise LLMEngineError(f"{error}{again}") from None


def parse_metadata(pairs: list[str]) -> dict[str, str]:
    return dict(split_pair(pair, "--metadata") for pair in pairs)


def look(path: Path, endpoint: str | None = None) -> Look:
    """Raises LLMEngineError that names the first lines that are wrong."""
    if path.is_file() and path.suffix.lower() != ".jsonl":
        raise LLMEngineError(f"{path}: the name of a batch's input must end in .jsonl.")
    problems: list[str] = []
    seen: dict[str, int] = {}  # where each custom_id was first
    for number, line in _lines(path):
        problem, endpoint = _judge(line, number, seen, endpoint)
        if problem:
            problems.append(f"line {number}: {problem}")
        if len(problems) > PROBLEMS_SHOWN:
            break
    if problems:
        shown = problems[:PROBLEMS_SHOWN]
        more = ["..."] if len(problems) > len(shown) else []
        raise LLMEngineError(
            "\n  ".join([f"{path} cannot be a batch, and nothing was sent:", *shown, *more])
        )
    if not endpoint or not seen:
        raise LLMEngineError(f"{path} is empty: a batch needs one JSON object a line.")
    return Look(len(seen), endpoint)


def _judge(
    line: bytes, number: int, seen: dict[str, int], endpoint: str | None
) -> tuple[str | None, str | None]:
    """What is wrong with a line, and the endpoint of the batch as far as it is known."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"not valid JSON: {error}", endpoint
    if isinstance(row, list):
        return "a JSON array; JSONL has one object a line, and nothing around them", endpoint
    if not isinstance(row, dict):
        return "not a JSON object", endpoint
    missing = [key for key in NEEDED if row.get(key) is None]
    if missing:
        return f"without {', '.join(missing)}", endpoint
    endpoint = endpoint or str(row["url"])
    name = row["custom_id"]
    if not isinstance(name, str):
        return "custom_id is not a string", endpoint
    first = seen.setdefault(name, number)
    if first != number:
        return f"the custom_id '{name}' is line {first}'s already", endpoint
    if row["method"] != "POST":
        return f"method is '{row['method']}', must be 'POST'", endpoint
    if row["url"] != endpoint:
        return f"url is '{row['url']}', the batch's is '{endpoint}'", endpoint
    if not isinstance(row["body"], dict):
        return "body is not a JSON object", endpoint
    return None, endpoint


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """With their number, from 1; without those that are blank."""
    try:
        with path.open("rb") as file:
            yield from _numbered(file, path)
    except FileNotFoundError:
        raise LLMEngineError(f"there is no file {path}, and it is no file's id.") from None
    except OSError as error:
        raise LLMEngineError(f"cannot read {path}: {error.strerror}.") from None


def _numbered(file: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise LLMEngineError(f"{path}: line {number} is longer than {LONGEST_LINE} bytes.")
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
            yield number, line


def _first_url(gateway: Gateway, file: str) -> str:
    """Of a file that the gateway has."""
    from llm_engine.cli.batch_results import first_lines

    for line in first_lines(gateway, file, 1):
        if url := line.get("url"):
            return str(url)
    raise LLMEngineError(f"the first line of {file} has no url: say --endpoint.")
