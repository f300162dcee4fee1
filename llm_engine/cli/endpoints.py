"""`endpoints`: what is wanted of one, from options and a file; what a gateway says of it."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_engine.cli import console, watch
from llm_engine.cli.client import Gateway, endpoint_path
from llm_engine.config import MASK
from llm_engine.errors import LLMEngineError

Row = dict[str, Any]
SCALING = ("min_replicas", "max_replicas", "target_queue_depth")
LAST_EVENTS = 10
PAGE = 100  # events of one answer, the most there can be


# -- what is wanted


def wanted(
    file: Path | None, vllm_args: list[str], env: list[str], private: bool | None, **options: Any
) -> dict[str, Any]:
    """The body of a request: the file's settings, and over them the options that were given."""
    body = read_file(file) if file is not None else {}
    given = {key: value for key, value in options.items() if value is not None}
    if private is not None:
        given["public"] = not private
    if given.get("fallback") == "":
        given["fallback"] = None
    parts = {
        "autoscaling": {key: given.pop(key) for key in SCALING if key in given},
        "vllm_args": dict(parse_vllm_arg(text) for text in vllm_args),
        "env": dict(split_pair(text, "--env") for text in env),
    }
    for key, part in parts.items():
        if part:
            before = body.get(key) or {}
            if not isinstance(before, dict):
                raise LLMEngineError(f"{file}: {key}: expected a mapping.")
            body[key] = before | part
    return body | given


def read_file(path: Path) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        body = yaml.safe_load(text)
    except OSError as error:
        raise LLMEngineError(f"cannot read {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LLMEngineError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(body, dict):
        raise LLMEngineError(f"{path}: expected a mapping with the settings of one endpoint.")
    env = body.get("env")
    for key in env if isinstance(env, dict) else ():
        if env[key] == MASK:
            raise LLMEngineError(f"{path}: env.{key} is masked: put the real value, or leave it.")
    _must_be_json(body, str(path))
    return body


def parse_vllm_arg(text: str) -> tuple[str, Any]:
    """`--max-model-len=4096` and `max_model_len=4096` are the same."""
    key, value = split_pair(text, "--vllm-arg")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or error
        raise LLMEngineError(f"--vllm-arg {key}: '{value}' is not valid YAML: {why}.") from None
    _must_be_json(parsed, f"--vllm-arg {key}")
    return key.lstrip("-").replace("-", "_"), parsed


def split_pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip("- "):
        raise LLMEngineError(f"{option} takes KEY=VALUE, not '{text}'.")
    return key.strip(), value


def _must_be_json(value: Any, where: str) -> None:
    """YAML knows dates, and numbers that are none."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LLMEngineError(f"{where}: it cannot be sent as JSON: {error}.") from None


def replica_range(replicas: int | None, least: int | None, most: int | None) -> dict[str, int]:
    bounds = {"min_replicas": least, "max_replicas": most}
    if replicas is not None:
        if least is not None or most is not None:
            raise LLMEngineError("give either N, or --min and --max.")
        if replicas == 0:
            raise LLMEngineError(
                "an endpoint can't be kept at 0 replicas. `--min 0` lets it sleep while nobody "
                "asks; `llm-engine endpoints delete` ends it."
            )
        bounds = dict.fromkeys(bounds, replicas)
    given = {key: bound for key, bound in bounds.items() if bound is not None}
    if not given:
        raise LLMEngineError("say how many: N, or --min and --max.")
    return given


def confirm_delete(name: str) -> None:
    """Raises LLMEngineError unless somebody at a terminal says yes."""
    if not sys.stdin.isatty():
        raise LLMEngineError(f"'{name}' is not deleted: without a terminal, --yes must say so.")
    question = f"Delete the endpoint '{console.plain(name)}'? Its clients will get 404. [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise LLMEngineError(f"'{name}' is not deleted.")


# -- what became of it


@dataclass(frozen=True, slots=True)
class Shown:
    """How the answer to a change is told."""

    gateway: Gateway
    as_json: bool
    hint: str

    def change(self, row: Row, *, watch: bool, deleting: bool = False) -> None:
        if watch:
            self._follow(row, deleting)
        elif self.as_json:
            console.print_json(row)
        else:
            self._outlook(row, deleting)

    def scaled(self, row: Row) -> None:
        if self.as_json:
            return console.print_json(row)
        bounds = row["spec"]["autoscaling"]
        least, most = bounds["min_replicas"], bounds["max_replicas"]
        many = f"{most}" if least == most else f"{least} to {most}"
        now = f"{row['replicas_ready']}/{row['replicas_wanted']}"
        console.say(f"{row['id']} is to have {many} replicas; ready now: {now}.")

    def _follow(self, row: Row, deleting: bool) -> None:
        last = watch.follow(
            self.gateway, row["id"], row, deleting=deleting, hint=self.hint, stderr=self.as_json
        )
        if self.as_json:  # of what is gone, the last that was known
            console.print_json(last or row)

    def _outlook(self, row: Row, deleting: bool) -> None:
        if row["settled"]:
            return console.say(f"{row['id']} is changed, and nothing had to start anew.")
        doing = "is being deleted" if deleting else "is wanted, and starts as soon as it can"
        name = shlex.quote(row["id"])
        console.say(f"{row['id']} {doing}.")
        console.say(f"Follow it: llm-engine endpoints watch {name}{self.hint}", "dim")


# -- what there is


def show_all(gateway: Gateway, *, as_json: bool) -> None:
    rows = gateway.rows("/v1/endpoints")
    if as_json:
        return console.print_json(rows)
    if not rows:
        text = f"{gateway.url} has no endpoint. `llm-engine endpoints create` makes one."
        return console.say(text)
    table = console.table(["name", "model", "status", "replicas", "owner", "reason"])
    for row in map(watch.truth, rows):
        table.add_row(
            row["id"],
            row["model"],
            console.coloured(row["status"]),
            f"{row['replicas_ready']}/{row['replicas_wanted']}",
            row["owned_by"],
            console.plain(row["status_reason"] or ""),
        )
    console.console().print(table)


def show_one(gateway: Gateway, name: str, *, as_json: bool) -> None:
    row = gateway.get(endpoint_path(name))
    events = last_events(gateway, name)
    if as_json:
        return console.print_json(row | {"events": events})
    out = console.console()
    out.print(_facts(watch.truth(row)))
    console.say("\nSettings", "bold")
    console.say(yaml.safe_dump(row["spec"], sort_keys=False, allow_unicode=True).rstrip())
    if row["replicas"]:
        out.print(_replicas(row["replicas"]))
    table = console.table(["last events", "what", "why"])
    for event in events:
        why = console.plain(event["message"] or "")
        table.add_row(console.moment(event["created_at"]), console.coloured(event["type"]), why)
    out.print(table)


def last_events(gateway: Gateway, name: str) -> list[Row]:
    """The newest ones, oldest first: that is how the gateway tells them, a page at a time."""
    events: list[Row] = []
    while True:
        after = events[-1]["id"] if events else 0
        page = gateway.rows(endpoint_path(name, f"/events?after={after}&limit={PAGE}"))
        events = (events + page)[-LAST_EVENTS:]
        if len(page) < PAGE:
            return events


def _facts(row: Row) -> Any:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("endpoint", row["id"])
    grid.add_row("status", console.coloured(row["status"]))
    eta = row["eta_s"]
    facts = {
        "reason": row["status_reason"],
        "last error": row["last_error"],
        "phases": watch.phases_line(row),
        "eta": None if eta is None else f"ready in about {console.duration(eta)}",
        "replicas": f"{row['replicas_ready']} ready of {row['replicas_wanted']} wanted",
        "load": _load(row["replicas"]),
        "model": row["model"],
        "task": row["task"],
        "context": f"{row['max_model_len']} tokens" if row["max_model_len"] else None,
        "owner": f"{row['owned_by']} (from the {_origin(row)})",
        "created": console.moment(row["created_at"]),
        "changed": console.moment(row["updated_at"]),
    }
    for label, value in facts.items():
        if value:
            grid.add_row(label, console.plain(value))
    return grid


def _origin(row: Row) -> str:
    return {"config": "configuration", "api": "API"}.get(row["origin"], row["origin"])


def _load(replicas: list[Row]) -> str:
    loads = [replica.get("load") or {} for replica in replicas]
    running, waiting = (sum(each.get(k, 0) for each in loads) for k in ("running", "waiting"))
    return f"{running} running, {waiting} waiting"


def _replicas(replicas: list[Row]) -> Any:
    table = console.table(["replica", "state", "running", "waiting", "KV cache", "where", "reason"])
    for each in replicas:
        load = each.get("load") or {}
        table.add_row(
            str(each.get("replica", "")),
            console.coloured(str(each.get("state", ""))),
            str(load.get("running", 0)),
            str(load.get("waiting", 0)),
            f"{load.get('kv_cache_usage', 0):.0%}",
            str(each.get("host") or "-"),
            console.plain(each.get("reason") or ""),
        )
    return table
