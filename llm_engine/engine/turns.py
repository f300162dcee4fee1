"""Who computes next, where more adapters are asked for than an engine has slots for.

Left alone, vLLM lets a request of an adapter in a slot pass all that wait for a slot: while some
adapters are asked for without a pause, the others never come to it. Here an adapter that others
wait for keeps its slot for a while, then takes no more until its running requests have ended.
Requests without an adapter never come here. Pure.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

#: How long an adapter may take new requests while another one waits for a slot. What a change
#: costs, reading the weights, is small beside it.
TURN_S = 1.0


class TooMany(Exception):
    """No more can wait."""


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
        turn_s: float = TURN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = slots
        self._most_waiting = most_waiting
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
                return waiter
        return None

    def _over(self) -> set[str]:
        """The names whose turn is over: the longest ones, as many as there are others waiting."""
        others = {each.name for each in self._waiting} - self._running.keys()
        missing = len(others) - (self._slots - len(self._running))
        if missing <= 0:
            return set()
        due = self._clock() - self._turn_s
        ripe = sorted((at, name) for name, at in self._since.items() if at <= due)
        return {name for _, name in ripe[:missing]}
