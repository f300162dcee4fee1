"""How much a model can do for batches, beside what people wait for. Pure.

Batches fill what the engines have left: their requests stand behind everybody's in an engine's
queue, and of them no more are under way than these rules allow.
"""

import math
import time
from collections.abc import Callable, Collection

from llm_engine.records import EndpointStatus, Load, ReplicaReport

#: Of batches; everybody else's is 0, and a lower number comes first. Deadlines lower it, to 1.
PRIORITY = 10
URGENT = 1
#: Of the requests that an engine can run at a time, batches leave this share free: who comes next
#: need not wait until a row has ended.
FREE = 1 / 16
#: Where it is not known how many those are: of the requests that a replica runs so many more may
#: wait, so that it shows whether it could run them, too; and how many at least.
SPARE, FEWEST = 0.5, 32
#: Of the requests that a replica holds, batches take this share at most.
MOST = 0.75
#: While others are asking, batches may make each step of an engine longer by this share. Where it
#: is not known how long steps take, they leave this share of an engine's usual load to them.
HARM, RESERVED = 0.1, 0.5
#: Who asked a moment ago will ask again.
RECENT_S = 3.0


class Online:
    """The requests of others that one endpoint has under way here, or had a moment ago."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._now = self._peak = 0
        self._peak_at = float("-inf")

    def enter(self) -> None:
        self._now += 1
        if self._now >= self._peak:
            self._peak, self._peak_at = self._now, self._clock()

    def leave(self) -> None:
        if self._now >= self._peak:
            self._peak_at = self._clock()
        self._now -= 1

    @property
    def recent(self) -> int:
        if self._clock() - self._peak_at > RECENT_S:
            self._peak = self._now
        return max(self._peak, self._now)


def room(
    endpoint: EndpointStatus, replicas: Collection[ReplicaReport], online: int, priority: int
) -> int:
    """How many requests of batches the endpoint can have under way, over all batches.

    `online`: requests of others that are under way, as far as is known here; the engines tell of
    those from elsewhere. `priority`: of the batch that asks; an urgent one may fill the queue, so
    that the endpoint grows if it can.
    """
    ready = len(replicas)
    if not ready:
        return 1  # it sleeps, or starts: one request is enough to wake it
    most = max(1, int(ready * endpoint.max_queue * MOST))
    if priority <= URGENT:
        return most
    usual = int(ready * endpoint.target_queue_depth)
    online = max(online, sum(max(0, each.load.depth - each.load.batches) for each in replicas))
    if online:
        beside = sum(_harmless(each.load, online / ready, usual / ready) for each in replicas)
        if ready < endpoint.max_replicas:
            beside = min(beside, usual - online)  # more would start replicas
        return max(1, min(int(beside), most))
    if ready < endpoint.max_replicas:
        return max(1, usual)  # more would start replicas for work that nobody waits for
    return min(sum(_alone(each.load) for each in replicas), most)


def _alone(load: Load) -> int:
    """Requests that a replica can run while nobody else asks."""
    if load.slots:
        return max(1, load.slots - math.ceil(load.slots * FREE))
    return load.running + max(FEWEST, int(load.running * SPARE))


def _harmless(load: Load, online: float, usual: float) -> float:
    """Requests that a replica can run beside `online` others."""
    if load.step_s == load.request_s == 0.0:
        return min(usual * (1 - RESERVED), usual - online)
    if load.request_s == 0.0:
        return usual
    return HARM * (load.step_s + load.request_s * online) / load.request_s
