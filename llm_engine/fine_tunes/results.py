"""A fine-tune's metrics, step by step: which of them become events, and the result file of all.

A row is a line of the result file. Rows since the last checkpoint are held here; older ones lie in
the storage, where a crash does not reach them.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from llm_engine.storage.base import Storage

PURPOSE = "fine-tune-results"
FILENAME = "step_metrics.csv"
HEADER = b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"
#: Of a run; the first and the last step are always among them.
MOST_EVENTS = 500
#: By the trainer's names, in the header's order.
_COLUMNS = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
#: What an event tells, if it was measured.
_TOLD = (
    "step", "total_steps", *_COLUMNS, "full_valid_loss", "full_valid_mean_token_accuracy",
    "learning_rate", "epoch",
)  # fmt: skip


class Rows:
    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Any]] = {}

    def add(self, event: dict[str, Any]) -> None:
        """Of a step, or more of the same one."""
        self._rows.setdefault(event["step"], {}).update(
            {name: event[name] for name in _COLUMNS if event.get(name) is not None}
        )

    def up_to(self, step: int) -> bytes:
        return b"".join(_line(each, row) for each, row in self._rows.items() if each <= step)

    def forget(self, step: int) -> None:
        """Up to that one they are durable."""
        self._rows = {each: row for each, row in self._rows.items() if each > step}

    def all(self) -> bytes:
        return b"".join(_line(each, row) for each, row in self._rows.items())


def write(
    storage: Storage, key: str, history: Iterable[str], rest: bytes, check: Callable[[], None]
) -> int:
    """The result file; its bytes. `check` raises where it must not be put in place. Raises
    NoSuchObject where some of `history` is gone, and StorageUnavailable."""
    with storage.writer(key) as writer:
        for piece in chain([HEADER], _pieces(storage, history), [rest]):
            writer.write(piece)
        check()
    return writer.bytes


def is_told(event: dict[str, Any], total: int) -> bool:
    """Whether a step becomes an event."""
    step = event["step"]
    every = -(-total // (MOST_EVENTS - 2)) if total > MOST_EVENTS else 1
    return step in (1, total) or step % every == 0 or event.get("valid_loss") is not None


def data_of(event: dict[str, Any]) -> dict[str, Any]:
    """Of an event that tells of a step."""
    return {name: event[name] for name in _TOLD if event.get(name) is not None}


def sentence_of(event: dict[str, Any], total: int) -> str:
    """`Step 10/100: training loss=0.52, validation loss=0.61`"""
    parts = [
        f"{name} loss={event[key]:.4g}"
        for name, key in (("training", "train_loss"), ("validation", "valid_loss"))
        if event.get(key) is not None
    ]
    return f"Step {event['step']}/{total}: {', '.join(parts) or 'training loss is not a number'}"


def _line(step: int, row: dict[str, Any]) -> bytes:
    cells = [str(step), *("" if row.get(c) is None else f"{row[c]:.6g}" for c in _COLUMNS)]
    return ",".join(cells).encode() + b"\n"


def _pieces(storage: Storage, keys: Iterable[str]) -> Iterator[bytes]:
    for key in keys:
        yield from storage.read(key)
