"""How many rows of a batch are under way at a time, and how urgent they are.

The gateway tells with each answer how much room a model has for batches; each takes its share.
Where nobody tells (an external model), the number grows while answers come and halves on a refusal.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from llm_engine.background import PRIORITY, URGENT

#: Rows under way until the first answer has told more.
FIRST = 8
#: Refusals of rows that were sent at the same time count once.
HALVE_EVERY_S = 1.0
#: Twice the time that is needed is plenty; with just the time that is needed a row is urgent.
PLENTY = 2.0
#: Without a rate to reckon with: so much of the window is for sure enough.
LAST_OF_WINDOW = 0.1


def share(room: int, batches: int, most: int) -> int:
    """Of a model's room, among the batches that use it."""
    return max(1, min(room // max(1, batches), most))


def priority(left_s: float, window_s: float, rows: int, rows_per_s: float) -> int:
    """Of a batch's requests in an engine's queue, by the time and the rows that are left."""
    if rows_per_s > 0:
        slack = left_s * rows_per_s / max(1, rows)
    else:
        slack = left_s / (window_s * LAST_OF_WINDOW / PLENTY)
    calm = min(1.0, max(0.0, (slack - 1) / (PLENTY - 1)))
    return URGENT + round(calm * (PRIORITY - URGENT))


class Pace:
    """Slots for rows: `await slot()` before each request, `release()` after it."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.batches = 1  # that use the same model
        self.in_flight = 0
        self._most = most
        self._limit = float(min(FIRST, most))
        self._told = False
        self._clock = clock
        self._halved_at = float("-inf")
        self._closed_until = float("-inf")
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        return int(self._limit)

    def answered(self, room: int | None) -> None:
        if room is not None:
            self._told = True
            self._limit = float(share(room, self.batches, self._most))
        elif not self._told:
            self._limit = min(self._limit + 1 / self._limit, float(self._most))
        self._admit()

    def refused(self) -> None:
        """The model has no room."""
        now = self._clock()
        if now - self._halved_at >= HALVE_EVERY_S:
            self._halved_at = now
            self._limit = max(1.0, self._limit / 2)

    def close(self, seconds: float) -> None:
        """Nobody can answer now: no slots for so long."""
        until = self._clock() + seconds
        if until > self._closed_until:
            self._closed_until = until
            asyncio.get_running_loop().call_later(seconds + 0.001, self._admit)

    async def slot(self, again: bool = False) -> None:
        """`again`: a row that has had one before goes first."""
        if self._free() and (again or not self._waiting):
            self.in_flight += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if again:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            raise

    def release(self) -> None:
        self.in_flight -= 1
        self._admit()

    def _free(self) -> bool:
        return self.in_flight < self.limit and self._clock() >= self._closed_until

    def _admit(self) -> None:
        while self._waiting and self._free():
            turn = self._waiting.popleft()
            if not turn.done():
                self.in_flight += 1
                turn.set_result(None)
