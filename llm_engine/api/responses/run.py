"""One response in the background, from its claim to its end."""

import asyncio
import contextlib
import logging
import time

from llm_engine.api.dispatch import Dispatcher, served_by
from llm_engine.api.http import Call
from llm_engine.api.responses.asking import ask, stays
from llm_engine.api.responses.context import context_of
from llm_engine.api.responses.engine import engine_request
from llm_engine.api.responses.tail import Tail
from llm_engine.api.responses.turn import Turn, ended
from llm_engine.errors import APIError, EngineFailed, InternalError, LeaseLost
from llm_engine.patience import backoff, patiently
from llm_engine.records import Principal, Scope
from llm_engine.responses import ResponseEnd, ResponseRecord
from llm_engine.services import Services
from llm_engine.statuses import ResponseState

logger = logging.getLogger("llm_engine.api")

#: Events are written together: so many, or those of so long.
TOGETHER, TOGETHER_S = 32, 0.05
#: Events that tell nothing of the answer yet: created, queued, in_progress.
BEGUN = 3
#: Engines that may be lost over one before their first word, while others answer at once.
MOST_LOST = 3
#: What passes by itself: waited out until the response's time is over.
_PASSES = frozenset({429, 502, 503, 504})


class ModelAway(Exception):
    """Nobody can answer now. No more was told than that it has begun: it may begin anew. `lost`:
    an engine was lost over it."""

    def __init__(self, error: APIError, lost: bool) -> None:
        super().__init__(str(error))
        self.lost = lost


class Run:
    """`run` returns once it has ended. Raises ModelAway, LeaseLost, and StoreUnavailable where the
    store is away for too long."""

    def __init__(
        self, services: Services, dispatcher: Dispatcher, tail: Tail, record: ResponseRecord
    ) -> None:
        self._services = services
        self._dispatcher = dispatcher
        self._tail = tail
        self._store = services.store.responses
        self._limits = services.settings.responses
        self._record = record
        self._turn = Turn(record)
        self._unsaid: list[bytes] = []
        self._saved_at = time.monotonic()
        self._saving = asyncio.Lock()
        self._soon: asyncio.Task[None] | None = None
        self._bytes = 0
        self._decided: ResponseEnd | None = None
        self._last: bytes | None = None  # the event that ends it

    async def run(self) -> None:
        if self._record.cancel_asked:
            return await self.cancelled()
        if problem := self._problem():
            self._turn.fail(problem)
            return await self._end(self._turn.close())
        scopes = {Scope.INFERENCE}
        who = Principal(self._record.owner, frozenset(scopes), sees_all=self._record.sees_all)
        if self._record.streamed and self._record.told < BEGUN:
            self._turn.begin("in_progress")
        lost = 0  # engines
        while True:
            error = await self._ask(who)
            if error is None and not self._turn.interrupted:
                break
            late = time.time() - self._record.created_at > self._limits.background_timeout_s
            final = late or self._turn.told_output
            engine_lost = error is None or isinstance(error, EngineFailed)
            lost += engine_lost
            if error is not None and error.status in _PASSES and not final:
                raise ModelAway(error, lost > 0)
            if final or not engine_lost or lost > MOST_LOST:
                if error is not None:
                    self._turn.fail(error)
                break
            logger.info("%s lost its engine before the first word", self._record.id)
            self._turn.end = None
            await asyncio.sleep(backoff(lost - 1))
        await self._end(self._turn.close())

    async def _ask(self, who: Principal) -> APIError | None:
        """Why it has no answer, where the engine was not even begun with."""
        try:
            before = await context_of(self._services, who, self._record)
            # Always event by event: a whole answer would have to come within the time that a
            # first byte has.
            request = engine_request(self._record, before, True)
            await ask(self._dispatcher, who, request, self._turn, stays, self._progress)
        except APIError as error:
            return error
        return None

    async def cancelled(self) -> None:
        """As `run`, where somebody has asked for it."""
        await self._end(ResponseEnd(ResponseState.CANCELLED))

    def _problem(self) -> APIError | None:
        """Why it is not begun once more."""
        if self._record.starts > self._limits.max_attempts:
            return InternalError(
                f"{self._limits.max_attempts} times the gateway that worked on this response, or "
                "the engine that answered it, was lost (responses.max_attempts)."
            )
        # Of one that is streamed some were told already: another answer would not fit to them.
        if self._record.told > BEGUN:
            return InternalError(
                "The gateway that worked on this response was lost, with a part of the answer told "
                "already. Send the request again."
            )
        return None

    async def _progress(self, inner: Call) -> None:
        self._turn.answered_by(served_by(inner))
        new = self._turn.take()
        if not self._record.streamed:
            return
        self._unsaid += new
        self._bytes += sum(map(len, new))
        if self._bytes > self._limits.max_events_bytes:
            raise InternalError(
                f"The events of this response are over {self._limits.max_events_bytes} bytes "
                "(responses.max_events_bytes)."
            )
        waited = time.monotonic() - self._saved_at
        if len(self._unsaid) >= TOGETHER or (self._unsaid and waited >= TOGETHER_S):
            await self._save()
        elif self._unsaid and (self._soon is None or self._soon.done()):
            self._soon = asyncio.create_task(self._save_soon())

    async def _save_soon(self) -> None:
        """The engine may say nothing more for long."""
        await asyncio.sleep(TOGETHER_S)
        # What keeps it from being written is met by whoever writes next.
        with contextlib.suppress(APIError, LeaseLost):
            await self._save()

    async def _save(self) -> None:
        async with self._saving:
            if not self._unsaid or self._decided is not None:
                return
            events = list(self._unsaid)  # they stay until they are known to be written
            self._record = await patiently(self._store.tell, self._record, events)
            del self._unsaid[: len(events)]
            self._saved_at = time.monotonic()
        self._tail.poke()

    async def _end(self, end: ResponseEnd) -> None:
        """Whoever cancels it while its end is being written is too late."""
        end = self._decided = self._decided or end
        async with self._saving:
            events: list[bytes] | None = None
            if self._record.streamed:
                self._unsaid += self._turn.take()
                if self._last is None:
                    self._last = self._turn.last(ended(self._record, end, time.time()))
                events = [*self._unsaid, self._last]
            await patiently(self._store.end, self._record, end, events)
        self._tail.poke()
