"""From examples to rows of tokens on disk, with labels where the model is to speak.

The trainer reads the rows through a memory map, so a file may be larger than memory. Only a chat
template knows where an answer begins, and few mark it; so the conversation is rendered up to each
answer and with it, and what the second has more is the answer. Runs in the trainer's process.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llm_engine.fine_tunes.data import Example, Problem
from llm_engine.fine_tunes.plan import DPO

IGNORED = -100  # what no loss is taken of
TOGETHER = 512  # examples tokenised at a time
MOST_NUMBERS = 20  # line numbers that are told

Row = dict[str, list[int]]
Span = tuple[int, int]  # of characters
#: Columns of a row, by method.
COLUMNS = {DPO: ("prompt_ids", "chosen_ids", "rejected_ids")}
SUPERVISED_COLUMNS = ("input_ids", "labels")


class Refused(Exception):
    """The data's or the asker's fault, which another try would meet again."""

    def __init__(
        self, code: str, message: str, param: str | None = None, line: int | None = None
    ) -> None:
        super().__init__(message)
        self.problem = Problem(code, message, param, line)


@dataclass(slots=True)
class Tokens:
    """The rows that were made of examples."""

    path: Path
    examples: int = 0
    rows: int = 0
    tokens: int = 0
    longest: int = 0  # tokens of a row
    too_long: list[int] = field(default_factory=list)  # line numbers, MOST_NUMBERS at most
    n_too_long: int = 0


def examples_in(path: Path) -> Iterator[Example]:
    with path.open("rb") as file:
        yield from map(json.loads, file)


def write_rows(encoder: "Encoder", examples: Iterable[Example], path: Path) -> Tokens:
    """Raises Refused."""
    import pyarrow as pa

    columns = COLUMNS.get(encoder.method, SUPERVISED_COLUMNS)
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in columns])
    made = Tokens(path)
    rest = iter(examples)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        while group := list(islice(rest, TOGETHER)):
            rows = list(_counted(encoder, group, made))
            if rows:
                stream.write_batch(pa.RecordBatch.from_pylist(rows, schema))
    return made


def _counted(encoder: "Encoder", group: list[Example], made: Tokens) -> Iterator[Row]:
    for example, rows in zip(group, encoder.encode(group), strict=True):
        kept = []
        cut = False
        for row in rows:
            length = encoder.length(row)
            if length > encoder.max_length:
                cut = True
                row = encoder.shorten(row)
            if encoder.teaches(row):
                kept.append(row)
                made.tokens += encoder.tokens(row)
                made.longest = max(made.longest, encoder.length(row))
        if cut:
            made.n_too_long += 1
            if len(made.too_long) < MOST_NUMBERS:
                made.too_long.append(example["line"])
        made.examples += bool(kept)
        made.rows += len(kept)
        yield from kept


class Encoder:
    """Examples of one method in, rows of tokens out; one example may make several rows."""

    def __init__(self, tokenizer: Any, method: str, max_length: int, param: str) -> None:
        """`param`: the request's field that a bad line is told under."""
        self.method = method
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._param = param
        self._end = tokenizer.eos_token_id

    def encode(self, group: Sequence[Example]) -> list[list[Row]]:
        if self.method == DPO:
            return [[self._preference(example)] for example in group]
        if "messages" in group[0]:
            return self._conversations(group)
        return self._pairs(group)

    # -- what a row is

    def length(self, row: Row) -> int:
        """Tokens of the longest sequence in it."""
        if self.method == DPO:
            answers = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            return len(row["prompt_ids"]) + answers
        return len(row["input_ids"])

    def tokens(self, row: Row) -> int:
        """That a step reads."""
        if self.method == DPO:
            return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        return len(row["input_ids"])

    def shorten(self, row: Row) -> Row:
        """The beginning stays, as it does when the model is served."""
        if self.method == DPO:
            room = max(0, self.max_length - len(row["prompt_ids"]))
            return {
                "prompt_ids": row["prompt_ids"][: self.max_length],
                "chosen_ids": row["chosen_ids"][:room],
                "rejected_ids": row["rejected_ids"][:room],
            }
        return {name: ids[: self.max_length] for name, ids in row.items()}

    def teaches(self, row: Row) -> bool:
        if self.method == DPO:
            return row["chosen_ids"] != row["rejected_ids"]
        return any(label != IGNORED for label in row["labels"][1:])

    # -- conversations

    def _conversations(self, group: Sequence[Example]) -> list[list[Row]]:
        texts: list[tuple[int, str, list[Span]]] = []
        for place, example in enumerate(group):
            texts += ((place, text, spans) for text, spans in self._render(example))
        coded = self._tokenise([text for _, text, _ in texts])
        rows: list[list[Row]] = [[] for _ in group]
        for (place, text, spans), (ids, offsets) in zip(texts, coded, strict=True):
            rows[place].append(self._row(ids, self._taught(text, ids, offsets, spans), text, spans))
        return rows

    def _render(self, example: Example) -> list[tuple[str, list[Span]]]:
        """Its text, with where the answers are; several, if a later turn changes what came before
        (some templates drop earlier thoughts): each answer is then learned as it would be given."""
        messages = [{k: v for k, v in m.items() if k != "weight"} for m in example["messages"]]
        whole = self._text(messages, example)
        spans: list[Span] = []
        alone: list[tuple[str, list[Span]]] = []
        for number, message in enumerate(example["messages"]):
            if message["role"] != "assistant" or message.get("weight", 1) == 0:
                continue
            before = self._text(messages[:number], example, opened=True)
            last = number == len(messages) - 1
            upto = whole if last else self._text(messages[: number + 1], example)
            span = (_common(before, upto), len(upto))
            if whole.startswith(upto):
                spans.append(span)
            else:
                alone.append((upto, [span]))
        return ([(whole, spans)] if spans else []) + alone

    def _text(self, messages: list[dict], example: Example, opened: bool = False) -> str:
        """`opened`: up to where the model begins to speak."""
        if not messages:
            return ""  # the assistant speaks first
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=example.get("tools"), tokenize=False, add_generation_prompt=opened
            )
        except Exception as error:  # a template raises what it likes
            raise Refused(
                f"invalid_{self._param}",
                f"Line {example['line']}: the model's chat template refuses it: {error}",
                self._param,
                example["line"],
            ) from error

    def _tokenise(self, texts: list[str]) -> Iterator[tuple[list[int], list[Span] | None]]:
        if not self._tokenizer.is_fast:
            for text in texts:
                yield self._ids(text), None
            return
        coded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        yield from zip(coded["input_ids"], coded["offset_mapping"], strict=True)

    def _taught(
        self, text: str, ids: list[int], offsets: list[Span] | None, spans: list[Span]
    ) -> Iterator[tuple[int, int]]:
        """The spans as tokens: from, to."""
        if offsets is None:  # a tokenizer that does not tell
            for start, end in spans:
                yield tuple(_common(self._ids(text[:at]), ids) for at in (start, end))  # type: ignore[misc]
            return
        at = 0
        for start, end in spans:
            while at < len(ids) and offsets[at][1] <= start:
                at += 1
            first = at
            while at < len(ids) and offsets[at][0] < end:
                at += 1
            yield first, at

    def _row(
        self, ids: list[int], taught: Iterable[tuple[int, int]], text: str, spans: list[Span]
    ) -> Row:
        labels = [IGNORED] * len(ids)
        stop = 0
        for first, stop in taught:
            stop = self._without_rest(ids, first, stop)
            labels[first:stop] = ids[first:stop]
        if spans[-1][1] == len(text) and self._end is not None and self._end not in ids[first:stop]:
            # A template that does not end a turn: without this the model would never stop.
            ids, labels = [*ids[:stop], self._end], [*labels[:stop], self._end]
        return {"input_ids": ids, "labels": labels}

    def _without_rest(self, ids: list[int], first: int, stop: int) -> int:
        """Templates put a line end after the end of a turn, which no engine waits for."""
        for at in range(stop - 1, first - 1, -1):
            if ids[at] == self._end:
                return at + 1 if not self._tokenizer.decode(ids[at + 1 : stop]).strip() else stop
        return stop

    # -- prompts and completions, as plain text

    def _pairs(self, group: Sequence[Example]) -> list[list[Row]]:
        return [[self._pair(example)] for example in group]

    def _pair(self, example: Example) -> Row:
        prompt = self._tokenizer(example["prompt"])["input_ids"]
        ids = self._tokenizer(example["prompt"] + example["completion"])["input_ids"]
        if prompt and prompt[-1] == self._end:  # a tokenizer that ends every text
            prompt, ids = prompt[:-1], ids[:-1]
        if ids[: len(prompt)] != prompt:  # a token would go over the edge: not when it is served
            ids = prompt + self._ids(example["completion"])
        if self._end is not None:
            ids = [*ids, self._end]
        return {"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]}

    # -- preferences

    def _preference(self, example: Example) -> Row:
        prompt = self._ids(self._text(example["prompt"], example, opened=True))
        answers = []
        for name in ("chosen", "rejected"):
            ids = self._ids(self._text(example["prompt"] + example[name], example))
            answers.append(ids)
        shared = min(_common(prompt, ids) for ids in answers)
        chosen, rejected = (self._ended(ids, shared) for ids in answers)
        return {"prompt_ids": prompt[:shared], "chosen_ids": chosen, "rejected_ids": rejected}

    def _ended(self, ids: list[int], first: int) -> list[int]:
        answer = ids[first : self._without_rest(ids, first, len(ids))]
        if self._end is not None and self._end not in answer:
            answer.append(self._end)
        return answer

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How far they are the same."""
    if len(one) <= len(other) and other[: len(one)] == one:
        return len(one)
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
