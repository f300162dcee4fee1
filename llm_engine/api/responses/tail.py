"""Waiting for what other gateways write: one look into the store at a time, however many wait."""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator

from llm_engine.errors import StoreUnavailable
from llm_engine.store.sql import Store

logger = logging.getLogger("llm_engine.api")

#: Between two looks while somebody waits for a response, or for the feed only.
SOON_S, LATER_S = 0.1, 0.25
#: And between two of any: however much there is to tell.
LEAST_S = 0.02
#: After so long without events a reader gets an empty list, to write a sign of life.
QUIET_S = 15.0
#: Readers ask again and again: between them it goes on looking for so long.
IDLE_S = 2.0

Future = asyncio.Future[None]
Standing = tuple[int, bool]  # events that were told, and whether it has ended


class Tail:
    """Follows responses and the feed for all readers of this gateway."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: Who waits for a response, and how it stood when they began to.
        self._waiting: defaultdict[str, dict[Future, Standing | None]] = defaultdict(dict)
        #: Who waits for the feed, and whose entries: of which owner (None: all), of which stream.
        self._feed: dict[Future, tuple[str | None, str | None]] = {}
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.serial: int | None = None  # of the feed, as last seen

    def poke(self) -> None:
        """Something has changed here: look now."""
        self._hurry.set()

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def change(self, response: str, before: Standing | None) -> None:
        """Until it stands otherwise, has ended, or is gone."""
        mine = self._waiting[response]
        future = self._begin()
        mine[future] = before
        try:
            await future
        finally:
            mine.pop(future, None)

    async def news(self, owner: str | None, stream: str | None, serial: int | None) -> None:
        """Until the feed may have more of that than when `self.serial` was `serial`."""
        if self.serial != serial:
            return
        future = self._begin()
        self._feed[future] = (owner, stream)
        try:
            await future
        finally:
            self._feed.pop(future, None)

    async def follow(self, response: str, after: int) -> AsyncIterator[list[bytes]]:
        """Its events with a higher sequence number, until it has ended or is gone."""
        responses = self._store.responses
        while True:
            standing = (await asyncio.to_thread(responses.standing, [response])).get(response)
            events = await asyncio.to_thread(responses.events, response, after)
            if events:
                after += len(events)
                yield events
            elif standing is None or standing[1]:
                return
            else:
                try:
                    async with asyncio.timeout(QUIET_S):
                        await self.change(response, standing)
                except TimeoutError:
                    yield []

    def _begin(self) -> Future:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look())
        return asyncio.get_running_loop().create_future()

    async def _look(self) -> None:
        """For as long as anybody waits."""
        idle_since: float | None = None
        loop = asyncio.get_running_loop()
        while idle_since is None or loop.time() - idle_since < IDLE_S:
            pause = SOON_S if any(self._waiting.values()) else LATER_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), pause)
            self._hurry.clear()
            try:
                await self._look_once()
                await asyncio.sleep(LEAST_S)
            except StoreUnavailable as error:
                logger.warning("events are late: %s", error)
                await asyncio.sleep(1)
            except Exception:
                logger.exception("looking for events failed; trying again")
                await asyncio.sleep(1)
            if any(self._waiting.values()) or self._feed:
                idle_since = None
            else:
                idle_since = idle_since or loop.time()

    async def _look_once(self) -> None:
        for name in [name for name, waiting in self._waiting.items() if not waiting]:
            del self._waiting[name]
        if self._waiting:
            found = await asyncio.to_thread(self._store.responses.standing, list(self._waiting))
            for name, waiting in self._waiting.items():
                now = found.get(name)
                for future, before in waiting.items():
                    if now is None or now[1] or now != before:
                        _wake(future)
        if self._feed:
            first = self.serial is None
            last, news = await asyncio.to_thread(self._store.responses.news, self.serial)
            self.serial = max(self.serial or 0, last)
            for future, (owner, stream) in self._feed.items():
                mine = (owner, stream) in news
                if first or mine or (owner is None and any(n[1] == stream for n in news)):
                    _wake(future)


def _wake(future: Future) -> None:
    if not future.done():
        future.set_result(None)
