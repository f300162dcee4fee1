"""How many replicas an endpoint should have, from what its engines hold. Pure but for a clock.

As many as the queues ask for, within the bounds, and not at every twitch: a change waits until it
has been asked for throughout a delay. Only waking is at once.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from llm_engine.config import AutoscalingSettings


@dataclass(frozen=True, slots=True)
class Demand:
    depth: int = 0  # requests running and waiting in engines
    held: int = 0  # requests held by ingress replicas until there is an engine
    active: bool = False  # requests have come since the last look, though none may be left


class Scaler:
    """Of one endpoint; `target` is what it has decided last."""

    def __init__(self, target: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.target = target
        self._clock = clock
        self._busy_at = clock()
        self._above_since: float | None = None
        self._below_since: float | None = None
        self._peak = 0  # most replicas asked for while fewer would do

    def decide(self, scaling: AutoscalingSettings, demand: Demand, proving: bool) -> int:
        """The number of replicas from now on. `proving`: a version that has not answered yet
        needs a replica to answer with."""
        now = self._clock()
        requests = demand.depth + demand.held
        if requests or demand.active or proving:
            self._busy_at = now
        low = scaling.min_replicas or self._least(scaling, proving, requests, now)
        wanted = math.ceil(requests / scaling.target_queue_depth)
        wanted = min(max(wanted, low), scaling.max_replicas)
        self.target = self._damped(scaling, wanted, low, now)
        return self.target

    def _least(self, scaling: AutoscalingSettings, proving: bool, requests: int, now: float) -> int:
        """Of an endpoint that may sleep: 0 or 1."""
        if proving or requests:
            return 1
        idle = now - self._busy_at >= scaling.idle_delay_s
        return 0 if idle or self.target == 0 else 1

    def _damped(self, scaling: AutoscalingSettings, wanted: int, low: int, now: float) -> int:
        current = min(max(self.target, low), scaling.max_replicas)
        if wanted > current:
            self._below_since = None
            self._above_since = self._above_since or now
            return wanted if now - self._above_since >= scaling.upscale_delay_s else current
        self._above_since = None
        if wanted == current:
            self._below_since = None
            return current
        if wanted == 0:
            return 0  # idle_delay_s has passed already
        if self._below_since is None:
            self._below_since, self._peak = now, wanted
        self._peak = max(self._peak, wanted)
        if now - self._below_since < scaling.downscale_delay_s:
            return current
        self._below_since = None
        return self._peak
