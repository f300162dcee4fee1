"""Who computes next, where more adapters are asked for than an engine has slots for.

Left alone, vLLM lets a request of an adapter in a slot pass all that wait for a slot: while some
adapters are asked for without a pause, the others never come to it. Here an adapter that others
wait for keeps its slot for a while, then takes no more until its running requests have ended.

While an adapter is loaded, the engine computes for nobody. So loads have a pace: where adapters
come and go without an end, those in memory go on first. Requests without an adapter never come
here. Pure.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

#: How long an adapter may take new requests while another one waits for a slot.
TURN_S = 1.0
#: Of an engine's time that loads may take in the long run, and how much of it at once.
LOADING, BURST_S = 0.1, 0.5


class TooMany(Exception):
    """No more can wait."""


class Pace:
    """When the next adapter may be loaded."""

    def __init__(
        self,
        share: float = LOADING,
        burst_s: float = BURST_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._share = share
        self._burst_s = burst_s
        self._clock = clock
        self._credit_s, self._credited_at = burst_s, clock()
        # A load waits for the engine's step to end, too; the shortest ones tell what it costs.
        self._lasted: deque[float] = deque(maxlen=20)

    def wait_s(self) -> float:
        """0: now."""
        self._refill()
        return max(0.0, -self._credit_s / self._share)

    def spend(self, seconds: float) -> None:
        """A load has taken so long."""
        self._refill()
        self._lasted.append(seconds)
        self._credit_s -= min(self._lasted)

    def _refill(self) -> None:
        now = self._clock()
        earned = (now - self._credited_at) * self._share
        self._credit_s = min(self._burst_s, self._credit_s + earned)
        self._credited_at = now


@dataclass(eq=False, slots=True)
class _Waiter:
    name: str
    deferred: bool
    admitted: asyncio.Future[None]


class Turns:
    def __init__(
        self,
        slots: int,
        most_waiting: int,
        wait_s: Callable[[str], float] = lambda _: 0.0,
        turn_s: float = TURN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wait_s`: in how many seconds a name may begin, if there is a slot."""
        self._slots = slots
        self._most_waiting = most_waiting
        self._wait_s = wait_s
        self._alarm: asyncio.TimerHandle | None = None
        self._turn_s = turn_s
        self._clock = clock
        self._running: dict[str, int] = {}  # requests, by name
        self._since: dict[str, float] = {}  # when a name got its slot
        self._waiting: list[_Waiter] = []  # in order: batches' behind the others

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def enter(self, name: str, deferred: bool = False) -> None:
        """Returns once it may run. `deferred`: it is a batch's. Raises TooMany."""
        if len(self._waiting) >= self._most_waiting:
            raise TooMany
        waiter = _Waiter(name, deferred, asyncio.get_running_loop().create_future())
        behind = (i for i, each in enumerate(self._waiting) if each.deferred and not deferred)
        self._waiting.insert(next(behind, len(self._waiting)), waiter)
        self._admit()
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._admit()  # somebody may have waited only for it
            else:
                self.leave(name)
            raise

    def leave(self, name: str) -> None:
        self._running[name] -= 1
        if self._running[name] == 0:
            del self._running[name], self._since[name]
        self._admit()

    def _admit(self) -> None:
        while waiter := self._next():
            self._waiting.remove(waiter)
            self._since.setdefault(waiter.name, self._clock())
            self._running[waiter.name] = self._running.get(waiter.name, 0) + 1
            waiter.admitted.set_result(None)

    def _next(self) -> _Waiter | None:
        """The first that may run now."""
        over = self._over()
        free = len(self._running) < self._slots
        for waiter in self._waiting:
            if waiter.name in self._running:
                if waiter.name not in over:
                    return waiter
            elif free:
                wait_s = self._wait_s(waiter.name)
                if wait_s <= 0:
                    return waiter
                self._look_again(wait_s)
        return None

    def _look_again(self, wait_s: float) -> None:
        if self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_later(wait_s, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._admit()

    def _over(self) -> set[str]:
        """The names whose turn is over: the longest ones, as many as there are others waiting."""
        others = {each.name for each in self._waiting} - self._running.keys()
        missing = len(others) - (self._slots - len(self._running))
        if missing <= 0:
            return set()
        due = self._clock() - self._turn_s
        ripe = sorted((at, name) for name, at in self._since.items() if at <= due)
        return {name for _, name in ripe[:missing]}
