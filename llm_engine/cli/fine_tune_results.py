"""What became of a fine-tune: told, listed, and how to talk to the model that came of it."""

import shlex
from typing import Any

from llm_engine.cli import console, fine_tune_watch
from llm_engine.cli.client import Gateway, item_path
from llm_engine.cli.fine_tune_watch import ENDED, JOBS
from llm_engine.errors import LLMEngineError

Row = dict[str, Any]


def accepted(row: Row, as_json: bool, hint: str) -> None:
    if as_json:
        return console.print_json(row)
    console.say(f"{row['id']} is accepted.")
    console.say(f"Watch it: llm-engine fine-tunes get {row['id']} --watch{hint}", "dim")


def follow(gateway: Gateway, row: Row, as_json: bool, hint: str) -> None:
    """Raises LLMEngineError unless it succeeds."""
    row = fine_tune_watch.follow(gateway, row, console.console(stderr=as_json), hint)
    if as_json:
        console.print_json(row)
    if row["status"] != "succeeded":
        raise LLMEngineError(_ending(row))
    name = row["fine_tuned_model"]
    console.say(f"{name} is ready{_took(row)}.", "green", stderr=as_json)
    console.say(f"Talk to it: {_chat(name, hint)}", "dim", stderr=as_json)


def show_all(gateway: Gateway, page: Row, as_json: bool, hint: str) -> None:
    rows = page["data"]
    if as_json:
        return console.print_json(rows)
    if not rows:
        text = f"{gateway.url} has no fine-tune of yours. `llm-engine fine-tunes create` makes one."
        return console.say(text)
    table = console.table(["id", "status", "base", "steps", "created", "fine-tuned model"])
    for row in rows:
        progress = row.get("progress") or {}
        total = progress.get("total_steps")
        table.add_row(
            row["id"],
            console.coloured(row["status"]),
            console.plain(row["model"]),
            f"{progress['step']}/{total}" if total else "",
            console.moment(row["created_at"]),
            console.plain(row["fine_tuned_model"] or row.get("status_reason") or ""),
        )
    console.console().print(table)
    if page.get("has_more"):
        last = rows[-1]["id"]
        console.say(f"There are more: llm-engine fine-tunes list --after {last}{hint}", "dim")


def show_one(gateway: Gateway, row: Row, as_json: bool, hint: str) -> None:
    if as_json:
        return console.print_json(row)
    checkpoints = gateway.get(item_path(JOBS, row["id"], "/checkpoints?limit=100"))["data"]
    name = row["fine_tuned_model"]
    console.console().print(
        console.facts(
            {
                "fine-tune": row["id"],
                "status": console.coloured(row["status"]),
                "reason": row.get("status_reason"),
                "error": _error(row),
                "base": row["model"],
                "method": _method(row),
                "seed": str(row["seed"]),
                "progress": ", ".join(fine_tune_watch.amounts(row)),
                "training file": row["training_file"],
                "validation file": row["validation_file"],
                "trained tokens": f"{row['trained_tokens']:,}" if row["trained_tokens"] else "",
                "created": console.moment(row["created_at"]),
                "finished": console.moment(row["finished_at"]),
                "metadata": ", ".join(f"{k}={v}" for k, v in (row.get("metadata") or {}).items()),
                "results": ", ".join(row["result_files"]),
                "checkpoints": "\n".join(c["fine_tuned_model_checkpoint"] for c in checkpoints),
                "model": name,
                "talk to it": _chat(name, hint) if name else "",
            }
        )
    )


def show_events(page: Row, as_json: bool, hint: str) -> None:
    """The newest last, as in a log."""
    rows = page["data"]
    if as_json:
        return console.print_json(rows)
    for row in reversed(rows):
        level = "" if row["level"] == "info" else f"{row['level']}: "
        style = {"warn": "yellow", "error": "red"}.get(row["level"], "")
        console.say(f"{console.moment(row['created_at'])}  {level}{row['message']}", style)
    if page.get("has_more"):
        console.say(f"There are earlier ones: --after {rows[-1]['id']}{hint}", "dim", stderr=True)


def model_of(gateway: Gateway, named: str) -> str:
    """`named`: a fine-tuned model, or the id of the job that it came of."""
    if not named.startswith("ftjob-"):
        return named
    row = gateway.get(item_path(JOBS, named))
    if not row["fine_tuned_model"]:
        raise LLMEngineError(f"{named} is {row['status']}: no model has come of it.")
    return row["fine_tuned_model"]


def _ending(row: Row) -> str:
    verb = "is " if row["status"] == "cancelled" else ""
    why = _error(row)
    return f"{row['id']} {verb}{row['status']}{f': {why}' if why else '.'}"


def _error(row: Row) -> str:
    error = row.get("error") or {}
    return error.get("message") or ""


def _method(row: Row) -> str:
    kind = row["method"]["type"]
    numbers = row["method"][kind]["hyperparameters"]
    return ", ".join([kind, *(f"{name} {value}" for name, value in numbers.items())])


def _took(row: Row) -> str:
    ended = row["finished_at"] if row["status"] in ENDED else None
    return f" after {console.duration(ended - row['created_at'])}" if ended else ""


def _chat(name: str, hint: str) -> str:
    return f"llm-engine chat --model {shlex.quote(name)}{hint}"
