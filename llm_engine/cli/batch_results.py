"""What became of a batch: told, listed, and fetched as files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llm_engine.cli import batch_watch, console, transfer
from llm_engine.cli.client import Gateway, item_path
from llm_engine.errors import LLMEngineError

ERRORS_SHOWN = 5
LOOKED_AT = 16 * 2**20  # bytes of a file whose first lines are wanted
LONGEST_MESSAGE = 300  # characters
ROW_DIGITS = 8  # a result's id ends with its row's place in the input, from 0
FILES = {"results": "output_file_id", "errors": "error_file_id"}
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Results:
    """How a batch is told that is made or watched here. `output`: where its results are to go."""

    output: str | None
    force: bool
    as_json: bool
    hint: str

    def __post_init__(self) -> None:
        """Raises LLMEngineError for a place that can't be: now, and not when all is done."""
        if self.output == transfer.STDOUT and self.as_json:
            raise LLMEngineError("the results and --json cannot both be stdout: name a file.")
        if self.output is not None:
            for target in _targets(self.output, "batch").values():
                transfer.place(target, "", force=self.force)

    def accepted(self, row: Row) -> None:
        if self.as_json:
            return console.print_json(row)
        until = console.moment(row["expires_at"])
        console.say(f"{row['id']} is accepted, to be done by {until}.")
        console.say(f"Watch it: llm-engine batches get {row['id']} --watch{self.hint}", "dim")
        console.say(f"Results:  {_command(row, self.hint)}", "dim")

    def follow(self, gateway: Gateway, row: Row) -> None:
        """Raises LLMEngineError unless it is completed."""
        quiet = self.as_json or self.output == transfer.STDOUT
        row = batch_watch.follow(gateway, row, console.console(stderr=quiet), self.hint)
        places = self._fetch(gateway, row)
        console.console(stderr=quiet).print(console.facts(_facts(row) | places))
        for line in first_errors(gateway, row):
            console.say(f"  {line}", "red", stderr=quiet)
        if self.as_json:
            console.print_json(row)
        if row["status"] != "completed":
            raise LLMEngineError(_ending(row))

    def _fetch(self, gateway: Gateway, row: Row) -> dict[str, str]:
        """Where results and errors are: a path, or the command that fetches them."""
        places = _commands(row, self.hint)
        if self.output is None:
            return places
        for label, target in _targets(self.output, row["id"]).items():
            if label not in places:
                continue
            try:
                _download(gateway, row[FILES[label]], target)
            except LLMEngineError as error:
                raise LLMEngineError(f"{error} They are kept: {places[label]}") from None
            places[label] = target
        return places


def fetch(
    gateway: Gateway, row: Row, output: str | None, *, errors: bool, force: bool, hint: str
) -> None:
    """`batches download`."""
    file = row[FILES["errors" if errors else "results"]]
    if file is None:
        raise LLMEngineError(_why_no_file(row, errors, hint))
    target = transfer.place(output, _file_name(row["id"], errors), force=force)
    size = _download(gateway, file, target)
    if target != transfer.STDOUT:
        console.say(f"{target} ({console.bytes_(size)})")


def _download(gateway: Gateway, file: str, target: str) -> int:
    record = gateway.get(item_path("files", file))
    transfer.download(gateway, record, target)
    return record["bytes"]


def _targets(output: str, batch: str) -> dict[str, str]:
    """Where results and errors go. Errors do not mix with results on stdout."""
    if output == transfer.STDOUT:
        return {"results": output}
    path = Path(output)
    if path.is_dir() or output.endswith("/"):
        return {
            "results": str(path / _file_name(batch, errors=False)),
            "errors": str(path / _file_name(batch, errors=True)),
        }
    errors = path.with_name(f"{path.name.removesuffix('.jsonl')}.errors.jsonl")
    return {"results": output, "errors": str(errors)}


def _file_name(batch: str, errors: bool) -> str:
    return f"{batch}_{'errors' if errors else 'output'}.jsonl"


def _command(row: Row, hint: str, *, errors: bool = False) -> str:
    return f"llm-engine batches download {row['id']}{' --errors' if errors else ''}{hint}"


def _commands(row: Row, hint: str) -> dict[str, str]:
    """What fetches the files that there are."""
    return {
        label: _command(row, hint, errors=label == "errors")
        for label, key in FILES.items()
        if row[key]
    }


def _why_no_file(row: Row, errors: bool, hint: str) -> str:
    batch, counts = row["id"], row["request_counts"]
    if row["status"] not in batch_watch.ENDED:
        watch = f"llm-engine batches get {batch} --watch{hint}"
        return f"{batch} is {row['status']}; its files come when it has ended: {watch}"
    if errors:
        return f"{batch} has no file of errors: {counts['failed']} of its rows failed."
    if counts["failed"]:
        return f"{batch} has no results: each row failed. {_command(row, hint, errors=True)}"
    return f"{_ending(row)} It has no results."


def _ending(row: Row) -> str:
    verb = "" if row["status"] in ("failed", "expired") else "is "
    why = row.get("status_reason")
    return f"{row['id']} {verb}{row['status']}{f': {why}' if why else '.'}"


# -- what went wrong


def first_errors(gateway: Gateway, row: Row) -> list[str]:
    """The first few: of the input as a whole, else of rows."""
    whole = (row.get("errors") or {}).get("data") or []
    found = [_whole_error(error) for error in whole[:ERRORS_SHOWN]]
    many = len(whole)
    if not found and row["error_file_id"]:
        try:
            lines = first_lines(gateway, row["error_file_id"], ERRORS_SHOWN)
        except LLMEngineError as problem:  # the file may be gone; the batch is told all the same
            return [str(problem)]
        found = [_row_error(line) for line in lines]
        many = row["request_counts"]["failed"]
    return found + ([f"and {many - len(found):,} more"] if many > len(found) else [])


def first_lines(gateway: Gateway, file: str, count: int) -> list[Row]:
    """Of a file of JSON lines, as many as its first megabytes hold."""
    start = b""
    with gateway.download(item_path("files", file, "/content")) as pieces:
        for piece in pieces:
            start += piece
            if start.count(b"\n") >= count or len(start) > LOOKED_AT:
                break
    found = []
    for line in start.splitlines()[:count]:
        try:
            found.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            break
    return [line for line in found if isinstance(line, dict)]


def _whole_error(error: Row) -> str:
    line = f"line {error['line']}: " if error.get("line") else ""
    return f"{line}{_short(error.get('message'))} ({error.get('code')})"


def _row_error(line: Row) -> str:
    """Of a line of an error file: what the engine answered, or why it was not asked."""
    place = str(line.get("id", ""))[-ROW_DIGITS:]
    where = f"row {int(place) + 1}, " if place.isdigit() else ""
    response = line.get("response") or {}
    body = response.get("body")
    answered = body.get("error") if isinstance(body, dict) else None
    error = line.get("error") or answered or {}
    status = f"{response['status_code']} " if response.get("status_code") else ""
    message = error.get("message") if isinstance(error, dict) else error
    return f"{where}{line.get('custom_id')}: {status}{_short(message)}"


def _short(text: Any) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= LONGEST_MESSAGE else f"{words[:LONGEST_MESSAGE]} ..."


# -- what there is


def show_all(gateway: Gateway, page: Row, as_json: bool, hint: str) -> None:
    rows = page["data"]
    if as_json:
        return console.print_json(rows)
    if not rows:
        text = f"{gateway.url} has no batch of yours. `llm-engine batches create` makes one."
        return console.say(text)
    table = console.table(["id", "status", "model", "rows", "failed", "created", "reason"])
    for row in rows:
        counts = row["request_counts"]
        done = counts["completed"] + counts["failed"]
        table.add_row(
            row["id"],
            console.coloured(row["status"]),
            console.plain(row.get("model") or ""),
            f"{done}/{counts['total']}",
            str(counts["failed"] or ""),
            console.moment(row["created_at"]),
            console.plain(row.get("status_reason") or ""),
        )
    console.console().print(table)
    if page.get("has_more"):
        last = rows[-1]["id"]
        console.say(f"There are more: llm-engine batches list --after {last}{hint}", "dim")


def show_one(gateway: Gateway, row: Row, *, as_json: bool, hint: str) -> None:
    if as_json:
        return console.print_json(row)
    facts = _facts(row) | {
        "endpoint": row["endpoint"],
        "input": row["input_file_id"],
        "created": console.moment(row["created_at"]),
        "window": f"{row['completion_window']}, until {console.moment(row['expires_at'])}",
        "metadata": ", ".join(f"{k}={v}" for k, v in (row.get("metadata") or {}).items()),
    }
    console.console().print(console.facts(facts | _commands(row, hint)))
    for line in first_errors(gateway, row):
        console.say(f"  {line}", "red")


def _facts(row: Row) -> dict[str, Any]:
    return {
        "batch": row["id"],
        "status": console.coloured(row["status"]),
        "reason": row.get("status_reason"),
        "model": row.get("model"),
        "rows": ", ".join(batch_watch.amounts(row)),
        "tokens": _tokens(row),
        "took": _took(row),
    }


def _tokens(row: Row) -> str:
    usage = row.get("usage") or {}
    if not usage.get("total_tokens"):
        return ""
    return f"{usage['input_tokens']:,} in, {usage['output_tokens']:,} out"


def _took(row: Row) -> str:
    ended = row.get(f"{row['status']}_at") if row["status"] in batch_watch.ENDED else None
    if ended is None:
        return ""
    began = row.get("in_progress_at")
    running = f", {console.duration(ended - began)} of them running" if began else ""
    return f"{console.duration(ended - row['created_at'])}{running}"
