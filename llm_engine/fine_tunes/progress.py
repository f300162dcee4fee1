"""How fast a fine-tune goes, from its last minute, and how it is told."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from llm_engine.batches.progress import duration
from llm_engine.records import FineTuneRecord

WINDOW_S = 60.0
_PASSED_ON = ("epoch", "train_loss", "valid_loss")


class Progress:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.step = 0  # done, durable or not
        self._clock = clock
        self._last: dict[str, Any] = {}
        self._seen: deque[tuple[float, int, int]] = deque()  # when, steps, tokens

    def begin(self, step: int, tokens: int) -> None:
        """The trainer is about to make the next step."""
        self.step = step
        self._seen = deque([(self._clock(), step, tokens)])

    def saw(self, event: dict[str, Any]) -> None:
        """A step."""
        self.step = event["step"]
        for name in _PASSED_ON:
            if event.get(name) is not None:
                self._last[name] = event[name]
        now = self._clock()
        self._seen.append((now, self.step, event.get("tokens") or 0))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()

    def _rates(self) -> tuple[float, float]:
        """Steps and tokens a second."""
        if len(self._seen) < 2:
            return 0.0, 0.0
        then, steps, tokens = self._seen[0]
        passed = max(self._clock() - then, 1e-3)
        return (self.step - steps) / passed, max(0, self._seen[-1][2] - tokens) / passed

    def plain(self, record: FineTuneRecord) -> dict[str, float]:
        """What the record keeps of it."""
        steps_per_s, tokens_per_s = self._rates()
        told: dict[str, float] = {
            "step": self.step,
            "steps_per_s": round(steps_per_s, 4),
            "tokens_per_s": round(tokens_per_s, 1),
            **self._last,
        }
        if steps_per_s > 0:
            told["left_s"] = round((record.total_steps - self.step) / steps_per_s, 1)
        return told

    def line(self, record: FineTuneRecord) -> str:
        """`ftjob-… step 12/50 (24 %), loss 0.52, 3.1 steps/s, 1,800 tokens/s, about 12 s left`"""
        steps_per_s, tokens_per_s = self._rates()
        share = 100 * self.step // max(1, record.total_steps)
        parts = [f"{record.id} step {self.step}/{record.total_steps} ({share} %)"]
        if "train_loss" in self._last:
            parts.append(f"loss {self._last['train_loss']:.4g}")
        if steps_per_s > 0:
            parts.append(f"{steps_per_s:,.{0 if steps_per_s >= 10 else 2}f} steps/s")
            parts.append(f"{tokens_per_s:,.0f} tokens/s")
            left_s = (record.total_steps - self.step) / steps_per_s
            parts.append(f"about {duration(left_s)} left")
        return ", ".join(parts)
