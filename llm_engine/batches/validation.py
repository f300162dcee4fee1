"""A whole input file, checked before any of its rows runs: OpenAI's codes, params and lines. Pure.

What only the engine can judge (a temperature of 3) is not looked at: it is the row's own error.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from llm_engine.batches.rows import Row
from llm_engine.config import Settings
from llm_engine.nesting import is_too_deep
from llm_engine.records import BatchRecord

Problem = dict[str, Any]  # code, message, param, line

LONGEST_NAME = 440  # characters of a model's; adapters have the longest
#: Problems that are told one by one; the others are counted.
MOST_TOLD = 50
MOST_EMBEDDING_INPUTS = 50_000
#: What a body must have besides its model, by the batch's endpoint.
_PROMPT = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/embeddings": "input",
    "/v1/responses": "input",
}
#: Dialects that have brought their rows inline, where an id is a client's own business.
_WITHOUT_IDS = ("llm_engine", "sference")


def problem(code: str, message: str, param: str | None = None, line: int | None = None) -> Problem:
    # What is quoted may hold U+0000, which PostgreSQL does not keep.
    return {"code": code, "message": message.replace("\0", ""), "param": param, "line": line}


@dataclass(slots=True)
class Check:
    """`feed` it every row, then look at `problems()`, `total` and `model`."""

    batch: BatchRecord
    settings: Settings
    total: int = 0
    model: str | None = None
    model_line: int | None = None  # where it was first named
    _told: list[Problem] = field(default_factory=list)
    _count: int = 0
    _inputs: int = 0
    _ids: dict[bytes, int] = field(default_factory=dict)  # a digest's line: an id may be long

    def feed(self, rows: Iterable[Row]) -> None:
        """Stops at the row that is one too many."""
        most = self.settings.batches.max_rows
        for row in rows:
            self.total += 1
            if self.total > most:
                self._tell(
                    "too_many_rows",
                    f"The file has more than {most} requests, the most of a batch "
                    "(batches.max_rows).",
                    None,
                    row.line,
                )
                return
            self._check(row)

    def problems(self) -> list[Problem]:
        """What is wrong; none: the batch can run."""
        found = list(self._told)
        if self.total == 0:
            found.append(problem("empty_file", "The input file holds no requests."))
        more = self._count - len(self._told)
        if more:
            found.append(problem("more_errors", f"And {more} more errors in the input file."))
        return found

    def _tell(self, code: str, message: str, param: str | None, line: int) -> None:
        self._count += 1
        if len(self._told) < MOST_TOLD:
            self._told.append(problem(code, message, param, line))

    def _check(self, row: Row) -> None:
        line = row.line
        if row.data is None:
            limit = self.settings.gateway.max_body_bytes
            return self._tell(
                "line_too_long",
                f"This line is longer than {limit} bytes, the limit of a request "
                "(gateway.max_body_bytes).",
                None,
                line,
            )
        try:
            data = orjson.loads(row.data)
        except orjson.JSONDecodeError:
            data = None
        if not isinstance(data, dict):
            return self._tell(
                "invalid_json_line", "This line is not parseable as a JSON object.", None, line
            )
        if is_too_deep(data, row.data):
            return self._tell("invalid_request", "This line is nested too deeply.", None, line)
        self._check_id(data, line)
        self._check_target(data, line)
        body = data.get("body")
        if body is None:
            self._missing("body", line)
        elif not isinstance(body, dict):
            self._tell("invalid_request", "'body' must be a JSON object.", "body", line)
        else:
            self._check_body(body, line)

    def _check_id(self, data: Problem, line: int) -> None:
        given = data.get("custom_id")
        if given is None:
            if self.batch.dialect not in _WITHOUT_IDS:
                self._missing("custom_id", line)
            return
        if not isinstance(given, str):
            return self._tell("invalid_request", "'custom_id' must be a string.", "custom_id", line)
        digest = hashlib.blake2b(given.encode("utf-8", "replace"), digest_size=16).digest()
        first = self._ids.setdefault(digest, line)
        if first != line:
            self._tell(
                "duplicate_custom_id",
                f"The custom_id '{given[:100]}' is used on line {first}, too; each must be unique.",
                "custom_id",
                line,
            )

    def _check_target(self, data: Problem, line: int) -> None:
        method, url = data.get("method"), data.get("url")
        if method is None:
            self._missing("method", line)
        elif method != "POST":
            self._tell("invalid_method", "'method' must be POST.", "method", line)
        if url is None:
            self._missing("url", line)
        elif url != self.batch.endpoint:
            self._tell(
                "invalid_url",
                f"'url' must be the batch's endpoint, '{self.batch.endpoint}'.",
                "url",
                line,
            )

    def _check_body(self, body: Problem, line: int) -> None:
        model = body.get("model")
        if not isinstance(model, str) or not model:
            self._tell("invalid_request", "'body.model' must name a model.", "body.model", line)
        elif len(model) > LONGEST_NAME:
            self._tell(
                "invalid_request",
                f"'body.model' is longer than {LONGEST_NAME} characters: no model is called so.",
                "body.model",
                line,
            )
        elif self.model is None:
            self.model, self.model_line = model, line
        elif model != self.model:
            self._tell(
                "mismatched_model",
                f"'body.model' is '{model[:100]}' where line {self.model_line} has "
                f"'{self.model[:100]}': all requests of a batch go to one model.",
                "body.model",
                line,
            )
        prompt = _PROMPT.get(self.batch.endpoint)
        if prompt is not None and body.get(prompt) is None:
            param = f"body.{prompt}"
            self._tell("invalid_request", f"Missing required parameter: '{param}'.", param, line)
        if body.get("stream"):
            self._tell(
                "streaming_unsupported",
                "Requests of a batch cannot stream: leave 'stream' out, or set it to false.",
                "body.stream",
                line,
            )
        if self.batch.endpoint == "/v1/embeddings":
            self._count_inputs(body.get("input"), line)

    def _count_inputs(self, given: Any, line: int) -> None:
        before = self._inputs
        many = isinstance(given, list) and given and not isinstance(given[0], int)
        self._inputs += len(given) if many else 1
        if before <= MOST_EMBEDDING_INPUTS < self._inputs:
            self._tell(
                "too_many_inputs",
                f"The batch has more than {MOST_EMBEDDING_INPUTS} embedding inputs in all, the "
                "most that it may have.",
                "body.input",
                line,
            )

    def _missing(self, param: str, line: int) -> None:
        self._tell(
            "missing_required_parameter", f"Missing required parameter: '{param}'.", param, line
        )
