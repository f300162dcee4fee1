"""Training files: every form of them, read piece by piece and checked line by line. Pure.

supervised  JSON lines with `messages` (OpenAI's chat form: tools, assistant messages with a
            `weight` of 0 or 1); JSON lines or CSV with a pair of columns: prompt and completion,
            prompt and response, input and output; further columns are let be
dpo         JSON lines with `input`, `preferred_output` and `non_preferred_output`, or
            `preferred_completion` and `non_preferred_completion`

What comes out is TRL's conversational form ({messages}, {prompt, chosen, rejected}) or its plain
one ({prompt, completion}), with the `line` it is from. Tokens are counted by the trainer, who has
the tokenizer.
"""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from llm_engine.batches.rows import BOM, read_rows
from llm_engine.errors import InvalidRequest
from llm_engine.fine_tunes import messages as chat
from llm_engine.fine_tunes.plan import DPO

Example = dict[str, Any]

LONGEST_LINE = 8 * 2**20  # bytes, and characters of a cell: no context holds more
#: Problems that are told one by one; the others are counted.
MOST_TOLD = 50
FEWEST_EXAMPLES = 10  # OpenAI's own limit; fewer teach nothing
#: The names of question and answer, in the order in which they are looked for.
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("input", "output"))
#: The pairs that Scale's own check knows, as its message has them.
SCALE_PAIRS = [["prompt", "response"], ["input", "output"]]
_PREFERENCES = (
    ("preferred_output", "non_preferred_output"),
    ("preferred_completion", "non_preferred_completion"),
)
_PEEKED = 2**16  # bytes
_CONVERSATION, _PAIR, _PREFERENCE = "messages", "a prompt and its answer", "a preference"
_FORM_OF_METHOD = {DPO: "'input', 'preferred_output' and 'non_preferred_output'"}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a file, as OpenAI tells it; `param` is the file's field of the request."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None  # from 1; of a CSV: where the row begins

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"Line {self.line}: {self.message}" if self.line else self.message


def read(
    pieces: Iterable[bytes],
    filename: str,
    method: str,
    max_rows: int,
    *,
    param: str = "training_file",
    fewest: int = FEWEST_EXAMPLES,
) -> "Reader":
    """Iterate over it for the good examples; then look at its `verdict()`."""
    return Reader(pieces, filename, method, max_rows, param, fewest)


@dataclass(slots=True)
class Reader:
    pieces: Iterable[bytes]
    filename: str
    method: str
    max_rows: int
    param: str = "training_file"
    fewest: int = FEWEST_EXAMPLES
    examples: int = 0  # good ones
    problems: list[Problem] = field(default_factory=list)  # MOST_TOLD at most
    wrong: int = 0  # all problems
    _form: str | None = None
    _form_line: int = 0

    def __iter__(self) -> Iterator[Example]:
        first, pieces = _peek(self.pieces)
        if first.startswith(b"["):
            self._tell(
                "invalid_file_format",
                "The file is a JSON array; it must have one JSON object a line (JSONL).",
                1,
            )
            return
        rows = self._lines(pieces) if first.startswith(b"{") else self._table(pieces)
        for line, example in rows:
            if self.examples + self.wrong >= self.max_rows:
                self._tell(
                    "too_many_examples",
                    f"The file has more than {self.max_rows} examples, the most of a fine-tune "
                    "(fine_tunes.max_rows).",
                    line,
                )
                return
            if example is not None:
                self.examples += 1
                yield example | {"line": line}

    def verdict(self) -> Problem | None:
        """Everything that is wrong in one; None: the file is good. Ask once it has been read."""
        kind = self.param.removesuffix("_file")
        if not self.wrong and self.examples < self.fewest:
            return Problem(
                "invalid_n_examples",
                f"{kind.capitalize()} file has {self.examples} example(s), but must have at least "
                f"{self.fewest} examples",
                self.param,
            )
        if not self.wrong:
            return None
        told = " ".join(str(problem) for problem in self.problems)
        more = self.wrong - len(self.problems)
        rest = f" And {more} more errors." if more else ""
        return Problem(
            f"invalid_{self.param}",
            f"The job failed due to an invalid {kind} file. {told}{rest}",
            self.param,
            self.problems[0].line,
        )

    def _tell(self, code: str, message: str, line: int) -> None:
        self.wrong += 1
        if len(self.problems) < MOST_TOLD:
            self.problems.append(Problem(code, message, self.param, line))

    # -- JSON lines

    def _lines(self, pieces: Iterable[bytes]) -> Iterator[tuple[int, Example | None]]:
        for row in read_rows(pieces, LONGEST_LINE):
            yield row.line, self._line(row.data, row.line)

    def _line(self, data: bytes | None, line: int) -> Example | None:
        if data is None:
            self._tell("line_too_long", f"It is longer than {LONGEST_LINE} bytes.", line)
            return None
        try:
            given = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            self._tell("invalid_json", f"It is not valid JSON: {error}.", line)
            return None
        if not isinstance(given, dict):
            self._tell("invalid_json", "It is not a JSON object.", line)
            return None
        try:
            form, example = self._example(given)
        except chat.Wrong as error:
            self._tell("invalid_example", error.message, line)
            return None
        if self._form is None:
            self._form, self._form_line = form, line
        elif form != self._form:
            self._tell(
                "mixed_formats",
                f"It is {form} where line {self._form_line} is {self._form}: all lines of a file "
                "must have the same form.",
                line,
            )
            return None
        return example

    def _example(self, given: dict[str, Any]) -> tuple[str, Example]:
        if self.method == DPO:
            return _PREFERENCE, _preference(given)
        if "messages" in given:
            return _CONVERSATION, chat.conversation(given)
        for names in PAIRS:
            if all(name in given for name in names):
                prompt, answer = (given[name] for name in names)
                return _PAIR, _pair(names, prompt, answer)
        if any(name in given for pair in _PREFERENCES for name in pair):
            raise chat.Wrong("It is a preference: those are for the method 'dpo'.")
        raise chat.Wrong("It has neither 'messages' nor 'prompt' and 'completion'.")

    # -- CSV

    def _table(self, pieces: Iterable[bytes]) -> Iterator[tuple[int, Example | None]]:
        if self.method == DPO:
            self._tell(
                "invalid_file_format",
                f"The method 'dpo' needs a JSONL file whose lines have {_FORM_OF_METHOD[DPO]}.",
                1,
            )
            return
        csv.field_size_limit(LONGEST_LINE)
        rows = csv.reader(self._text(pieces))
        line = 1
        try:
            header = next(filter(None, rows), None)
            if header is None:
                return
            columns = _columns(header)
            if columns is None:
                self._tell(
                    "invalid_file_format",
                    "It is neither JSONL nor a CSV whose first line has the columns prompt and "
                    "response, or input and output.",
                    1,
                )
                return
            line = rows.line_num + 1
            for cells in rows:
                if cells:  # else: a blank line
                    yield line, self._cells(cells, columns, header, line)
                line = rows.line_num + 1
        except csv.Error as error:
            self._tell(
                "invalid_csv",
                f"It cannot be parsed as CSV: {error}. A quote that is not closed?",
                line,
            )

    def _cells(
        self, cells: list[str], columns: tuple[int, int], header: list[str], line: int
    ) -> Example | None:
        if len(cells) <= max(columns):
            message = f"It has {len(cells)} columns where the first line has {len(header)}."
            self._tell("invalid_example", message, line)
            return None
        names = header[columns[0]], header[columns[1]]
        try:
            return _pair(names, cells[columns[0]], cells[columns[1]])
        except chat.Wrong as error:
            self._tell("invalid_example", error.message, line)
            return None

    def _text(self, pieces: Iterable[bytes]) -> Iterator[str]:
        """Lines with their ends, for the parser: a cell may go over several."""
        for number, data in enumerate(_raw_lines(pieces), 1):
            if data is None:
                raise csv.Error(f"line longer than {LONGEST_LINE} bytes")
            if number == 1:
                data = data.removeprefix(BOM)
            try:
                yield data.decode()
            except UnicodeDecodeError:
                self._tell("invalid_encoding", "It is not UTF-8.", number)
                yield data.decode(errors="replace")


def check_header(first: bytes, filename: str, kind: str = "training") -> None:
    """Scale's check while the request waits: the columns, from the file's first bytes, which must
    hold the first line. Raises InvalidRequest in that API's words."""
    start = first.removeprefix(BOM).lstrip()
    if start.startswith(b"{"):
        line = start.partition(b"\n")[0]
        try:
            names = list(orjson.loads(line))
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(
                f"Cannot parse the {kind} dataset as JSONL. Details: {error}", param=f"{kind}_file"
            ) from None
        if "messages" in names:
            return
    else:
        try:
            text = first.removeprefix(BOM).decode(errors="replace")
            names = next(csv.reader(text.splitlines(keepends=True), strict=True), [])
        except csv.Error as error:
            raise InvalidRequest(
                f"Cannot parse the {kind} dataset as CSV. Details: {error}", param=f"{kind}_file"
            ) from None
    if not any(set(pair) <= set(names) for pair in SCALE_PAIRS):
        raise InvalidRequest(
            f"Required column headers (one subset of {SCALE_PAIRS}) not found in {kind} dataset",
            param=f"{kind}_file",
        )


def _peek(pieces: Iterable[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """What it begins with, without leading spaces, and all pieces."""
    rest = iter(pieces)
    held: list[bytes] = []
    start = b""
    for piece in rest:
        held.append(piece)
        start += piece
        if (len(start) > len(BOM) and start.removeprefix(BOM).strip()) or len(start) > _PEEKED:
            break
    start = start.removeprefix(BOM).lstrip()

    def again() -> Iterator[bytes]:
        yield from held
        yield from rest

    return start, again()


def _raw_lines(pieces: Iterable[bytes]) -> Iterator[bytes | None]:
    """Lines with their newline; None where one is too long to be held."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line + b"\n" for line in whole)
        if len(rest) > LONGEST_LINE:
            yield None
            return
    if rest:
        yield rest


def _columns(header: list[str]) -> tuple[int, int] | None:
    names = [name.strip() for name in header]
    for question, answer in PAIRS:
        if question in names and answer in names:
            return names.index(question), names.index(answer)
    return None


def _pair(names: tuple[str, str], prompt: Any, answer: Any) -> Example:
    for name, value in zip(names, (prompt, answer), strict=True):
        if not isinstance(value, str):
            raise chat.Wrong(f"'{name}' must be a string.")
    if not answer.strip():
        raise chat.Wrong(f"'{names[1]}' is empty: there is nothing to learn.")
    return {"prompt": prompt, "completion": answer}


def _preference(given: dict[str, Any]) -> Example:
    names = next((pair for pair in _PREFERENCES if any(name in given for name in pair)), None)
    if names is None or any(name not in given for name in ("input", *names)):
        missing = [n for n in ("input", *(names or _PREFERENCES[0])) if n not in given]
        what = " and ".join(f"'{name}'" for name in missing)
        raise chat.Wrong(f"It lacks {what}, which each line of the method 'dpo' needs.")
    asked = given["input"]
    if not isinstance(asked, dict):
        raise chat.Wrong("'input' must be an object with 'messages'.")
    chat.only(given, ("input", *names), "")
    example = chat.question(asked, "input.")
    chosen, rejected = (chat.answer(given[name], name) for name in names)
    if chosen == rejected:
        raise chat.Wrong(f"'{names[0]}' and '{names[1]}' are the same.")
    return example | {"chosen": [chosen], "rejected": [rejected]}
