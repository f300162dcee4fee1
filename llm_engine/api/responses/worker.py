"""Works on what is in the background: as many at a time as the settings let one gateway.

What it has claimed is its own until its lease ends. It looks at what it has twice a second: what
shall be cancelled, and what is no longer its own. Of a model that is away one response at a time
tries whether it is back, so that the others' are not kept waiting.
"""

import asyncio
import contextlib
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.responses.run import ModelAway, Run
from llm_engine.api.responses.tail import Tail
from llm_engine.errors import APIError, LeaseLost, StoreUnavailable
from llm_engine.patience import backoff
from llm_engine.responses import ResponseRecord
from llm_engine.services import Services
from llm_engine.store.responses import Whose

logger = logging.getLogger("llm_engine.api")

#: Between two looks: while it works, and while there is nothing to do that is known here.
BUSY_S, QUIET_S = 0.5, 2.0
BEATS_A_LEASE = 4
STOPPING_S = 5.0


@dataclass
class Absence:
    """Of an owner's model."""

    tries: int = 0
    until: float = 0.0  # the next one


class Worker:
    def __init__(self, services: Services, dispatcher: Dispatcher, tail: Tail) -> None:
        self.name = f"{socket.gethostname()[:50]}:{os.getpid()}:{secrets.token_hex(4)}"
        self._services = services
        self._dispatcher = dispatcher
        self._tail = tail
        self._store = services.store.responses
        self._limits = services.settings.responses
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._absent: dict[Whose, Absence] = {}
        self._asked: dict[str, Whose] = {}  # of the runs
        self._beaten_at = 0.0
        self._away_at = -math.inf  # when the store did not answer last
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._retiring: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._work())

    def retire(self, within_s: float) -> None:
        """Nothing more is claimed; what runs has so long to end, and then others go on with it."""
        if self._retiring is None:
            self._retiring = asyncio.create_task(self._retire(within_s))

    async def _retire(self, within_s: float) -> None:
        ends = time.monotonic() + within_s
        await asyncio.sleep(BUSY_S)  # what is being claimed begins yet
        while self._runs and time.monotonic() < ends:
            await asyncio.sleep(BUSY_S)
        await self._stop()

    def hurry(self) -> None:
        """There is something new, or something that shall not go on."""
        self._hurry.set()

    async def stop(self) -> None:
        """Others may go on with what it has; at once, but where it retires."""
        await (self._retiring or self._stop())

    async def _stop(self) -> None:
        if self._task is None:
            return
        self._stopping = True
        self._hurry.set()
        # What is being claimed must be known, to be given back.
        await asyncio.wait([self._task], timeout=STOPPING_S)
        for task in (tasks := [self._task, *self._runs.values()]):
            task.cancel()
        await asyncio.wait(tasks, timeout=STOPPING_S)
        self._task = None
        try:
            await asyncio.to_thread(self._store.release, self.name)
        except StoreUnavailable as error:
            logger.warning("what this gateway worked on waits for its lease to end: %s", error)

    async def _work(self) -> None:
        while not self._stopping:
            with contextlib.suppress(TimeoutError):
                pause = BUSY_S if self._runs else QUIET_S
                await asyncio.wait_for(self._hurry.wait(), pause)
            self._hurry.clear()
            try:
                await self._look()
            except StoreUnavailable as error:
                logger.warning("responses in the background wait: %s", error)
                self._away_at = time.monotonic()
                await asyncio.sleep(1)
            except Exception:
                logger.exception("looking for responses to work on failed; trying again")
                await asyncio.sleep(1)

    async def _look(self) -> None:
        if self._runs:
            now = time.monotonic()
            if now - self._beaten_at > self._limits.lease_s / BEATS_A_LEASE:
                mine = list(self._runs)
                await asyncio.to_thread(self._store.beat, self.name, self._limits.lease_s, mine)
                self._beaten_at = now
        await self._heed()
        if self._retiring is not None or self._stopping:
            return
        room = self._limits.max_running - len(self._runs)
        if room > 0 and await asyncio.to_thread(self._store.any_waiting, list(self._absent)):
            await self._claim(room, without=list(self._absent))
        asked = set(self._asked.values())
        for whose, absence in list(self._absent.items()):
            room = self._limits.max_running - len(self._runs)
            if room > 0 and whose not in asked and time.monotonic() >= absence.until:
                if not await self._claim(1, of=whose):
                    self._absent.pop(whose, None)

    async def _claim(
        self, limit: int, of: Whose | None = None, without: Sequence[Whose] = ()
    ) -> int:
        """How many."""
        # After an outage of the store those whose gateways live must have the time to say so.
        abandoned = time.monotonic() - self._away_at > self._limits.lease_s
        claimed = await asyncio.to_thread(
            self._store.claim,
            self.name,
            self._limits.lease_s,
            limit,
            abandoned=abandoned,
            of=of,
            without=without,
        )
        for record in claimed:
            self._begin(record)
        return len(claimed)

    async def _heed(self) -> None:
        """What shall not go on, and what this gateway has claimed and does not work on: a run that
        broke off, or a claim whose answer was lost."""
        running = dict(self._runs)
        held = await asyncio.to_thread(self._store.held, self.name)
        for response, task in running.items():
            if held.get(response, True) and not task.done() and not task.cancelling():
                if response in held:
                    self._cancelled.add(response)
                task.cancel()
        left = held.keys() - running.keys() - self._runs.keys()
        if left:
            logger.warning("left for another gateway: %s", ", ".join(sorted(left)))
            await asyncio.to_thread(self._store.abandon, self.name, list(left))

    def _begin(self, record: ResponseRecord) -> None:
        task = asyncio.create_task(self._run(record))
        self._runs[record.id] = task
        self._asked[record.id] = (record.owner, record.model)
        task.add_done_callback(lambda _: self._over(record.id))

    def _over(self, response: str) -> None:
        self._runs.pop(response, None)
        self._asked.pop(response, None)
        self._cancelled.discard(response)
        self._hurry.set()  # there is room for another one

    async def _run(self, record: ResponseRecord) -> None:
        run = Run(self._services, self._dispatcher, self._tail, record)
        try:
            try:
                await run.run()
                self._absent.pop((record.owner, record.model), None)
            except ModelAway as away:
                logger.info("%s waits: %s", record.id, away)
                self._note_absence((record.owner, record.model))
                mine = (self.name, record.id, away.lost)
                if not await asyncio.to_thread(self._store.put_back, *mine):
                    await run.cancelled()
            except asyncio.CancelledError:
                if record.id not in self._cancelled:
                    raise
                await run.cancelled()
        except LeaseLost as lost:
            logger.warning("%s", lost)
        except APIError as error:  # the store: its lease ends, and another one takes it up
            logger.warning("%s is left for another gateway: %s", record.id, error)
        except Exception:
            logger.exception("%s is left for another gateway", record.id)

    def _note_absence(self, whose: Whose) -> None:
        now = time.monotonic()
        absence = self._absent.setdefault(whose, Absence())
        if now >= absence.until:  # not for each of those that ran together
            absence.until = now + backoff(absence.tries)
            absence.tries += 1
