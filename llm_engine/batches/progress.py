"""How fast a batch goes, from its last half minute, and how it is told."""

import time
from collections import deque
from collections.abc import Callable

from llm_engine.records import BatchRecord

WINDOW_S = 30.0


class Progress:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.rows_per_s = self.tokens_per_s = 0.0
        self._clock = clock
        self._rows = self._tokens = 0
        self._seen = deque([(clock(), 0, 0)])

    def count(self, tokens: int) -> None:
        """A row has come to its end."""
        self._rows += 1
        self._tokens += tokens

    def look(self) -> None:
        """Once in a while: brings the rates up to date."""
        now = self._clock()
        self._seen.append((now, self._rows, self._tokens))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()
        then, rows, tokens = self._seen[0]
        passed = max(now - then, 1e-3)
        self.rows_per_s = (self._rows - rows) / passed
        self.tokens_per_s = (self._tokens - tokens) / passed

    def plain(self, record: BatchRecord, in_flight: int) -> dict[str, float]:
        """What the record keeps of it."""
        told = {
            "rows_per_s": round(self.rows_per_s, 3),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "in_flight": float(in_flight),
        }
        left = record.total - record.completed - record.failed
        if self.rows_per_s > 0:
            told["eta_s"] = round(left / self.rows_per_s, 1)
        return told

    def line(self, record: BatchRecord) -> str:
        """`batch_… 1,234/50,000 rows (2 %), 55 rows/s, 1,800 tokens/s, 3 failed, about 14 min …`"""
        done = record.completed + record.failed
        share = 100 * done // max(1, record.total)
        parts = [
            f"{record.id} {done:,}/{record.total:,} rows ({share} %)",
            f"{self.rows_per_s:,.{0 if self.rows_per_s >= 10 else 2}f} rows/s",
            f"{self.tokens_per_s:,.0f} tokens/s",
        ]
        if record.failed:
            parts.append(f"{record.failed:,} failed")
        if self.rows_per_s > 0:
            parts.append(f"about {duration((record.total - done) / self.rows_per_s)} left")
        if record.reason:
            parts.append(f"waiting: {record.reason}")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
