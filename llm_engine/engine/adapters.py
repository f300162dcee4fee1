"""The adapters that one engine has in memory: from the storage by way of the node's disk, used in
turns, and out again.

Knows the engine only by its `Host`. An adapter is in the engine's memory while requests use it,
and after that until its place is needed or it is deleted; its folder stays on the disk meanwhile.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llm_engine.config import Settings
from llm_engine.engine.base import AdapterProblem
from llm_engine.engine.turns import Pace, Turns

logger = logging.getLogger("llm_engine.engine")


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Where an engine finds adapters. No secrets: those of the storage are in the environment."""

    storage: dict[str, Any]  # StorageSettings
    folder: str  # of this node
    max_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> "AdapterSource":
        storage = settings.storage.model_copy(update={"url": settings.storage_url})
        folder = settings.cache_dir / "adapters"
        return cls(storage.model_dump(mode="json"), str(folder), settings.storage.cache_bytes)


class AdapterFailed(Exception):
    """The adapter cannot be used now; the engine is well."""

    def __init__(self, problem: AdapterProblem, message: str) -> None:
        super().__init__(message)
        self.problem = problem


class Host(Protocol):
    """What an engine does with an adapter's files."""

    async def load(self, adapter: str, folder: Path) -> None:
        """Raises AdapterFailed where it cannot."""

    async def unload(self, adapter: str) -> None:
        """Also where it is not loaded."""


class Adapters:
    def __init__(
        self,
        open_: Callable[[str], Any],
        remove: Callable[[str], bool],
        host: Host,
        *,
        weights: str,
        slots: int,
        kept: int,
        most_waiting: int,
    ) -> None:
        """`open_`, `remove`: an AdapterCache's. `slots`: adapters that compute at a time; `kept`:
        in memory, at least as many. `weights`: the model that adapters must have been trained on.
        """
        self._open = open_
        self._remove = remove
        self._host = host
        self._weights = weights
        self._kept = kept
        self._pace = Pace()
        self._turns = Turns(slots, most_waiting, self._wait_s)
        self._loaded: OrderedDict[str, Any] = OrderedDict()  # Opened, by adapter: last used last
        self._users: Counter[str] = Counter()
        self._deleted: set[str] = set()  # those in use that go once nobody uses them any more
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._changing = asyncio.Lock()  # what is loaded changes one by one

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    @property
    def waiting(self) -> int:
        """Requests that wait for their adapter's turn."""
        return self._turns.waiting

    @asynccontextmanager
    async def use(self, adapter: str, deferred: bool = False) -> AsyncIterator[None]:
        """Within it the engine knows the adapter by its id. `deferred`: for a batch. Raises
        AdapterFailed, TooMany."""
        if adapter not in self._loaded:
            await self._fetch(adapter)  # which may take a while, and no slot
        await self._turns.enter(adapter, deferred)
        self._users[adapter] += 1
        try:
            if adapter in self._loaded:
                self._loaded.move_to_end(adapter)
            else:
                # A caller who leaves meanwhile must not leave the engine half-way.
                loading = asyncio.create_task(self._load(adapter))
                loading.add_done_callback(_look_at)
                await asyncio.shield(loading)
            yield
        finally:
            self._users[adapter] -= 1
            if not self._users[adapter]:
                del self._users[adapter]
            self._turns.leave(adapter)
            if adapter in self._deleted and adapter not in self._users:
                with suppress(Exception):  # of an engine that has died
                    await self.forget([adapter])

    async def forget(self, adapters: Collection[str]) -> None:
        """They have been deleted: out of the memory, and off the disk where no other engine has
        them loaded. Those in use go once they are not."""
        for adapter in adapters:
            if adapter in self._users:
                self._deleted.add(adapter)
                continue
            async with self._changing:
                if adapter not in self._users:
                    await self._unload(adapter)
            self._deleted.discard(adapter)
            await asyncio.to_thread(self._remove, adapter)

    # -- inside

    def _wait_s(self, adapter: str) -> float:
        return 0.0 if adapter in self._loaded else self._pace.wait_s()

    async def _fetch(self, adapter: str) -> None:
        """Onto this node's disk; once, however many ask."""
        task = self._fetching.get(adapter)
        if task is None:
            task = asyncio.create_task(self._fetch_now(adapter))
            self._fetching[adapter] = task
            task.add_done_callback(_look_at)
            task.add_done_callback(lambda _: self._fetching.pop(adapter, None))
        await asyncio.shield(task)

    async def _fetch_now(self, adapter: str) -> None:
        (await self._opened(adapter)).close()

    async def _load(self, adapter: str) -> None:
        async with self._changing:
            if adapter in self._loaded:
                return
            opened = await self._opened(adapter)
            began = time.monotonic()
            try:
                while len(self._loaded) >= self._kept:
                    await self._unload(next(a for a in self._loaded if a not in self._users))
                await self._host.load(adapter, opened.path)
                self._pace.spend(time.monotonic() - began)
            except BaseException:
                opened.close()
                raise
            self._loaded[adapter] = opened

    async def _unload(self, adapter: str) -> None:
        opened = self._loaded.pop(adapter, None)
        if opened is not None:
            try:
                await self._host.unload(adapter)
            finally:
                opened.close()

    async def _opened(self, adapter: str) -> Any:
        from llm_engine.errors import StorageUnavailable
        from llm_engine.fine_tunes.adapters import AdapterBroken
        from llm_engine.storage.base import NoSuchObject

        try:
            opened = await asyncio.to_thread(self._open, adapter)
        except NoSuchObject as error:
            raise AdapterFailed(AdapterProblem.MISSING, str(error)) from None
        except AdapterBroken as error:
            logger.error("%s", error)
            raise AdapterFailed(AdapterProblem.BROKEN, str(error)) from None
        except (StorageUnavailable, OSError) as error:
            logger.warning("cannot fetch the adapter %s: %s", adapter, error)
            raise AdapterFailed(AdapterProblem.STORAGE, f"its files: {error}") from None
        if opened.manifest.weights != self._weights:
            opened.close()
            raise AdapterFailed(
                AdapterProblem.ELSEWHERE,
                f"it was trained on {opened.manifest.weights}, and a replica serves "
                f"{self._weights}.",
            )
        return opened


def _look_at(task: asyncio.Task[None]) -> None:
    """Whoever waited for it may have left; asyncio complains of a failure that nobody looks at."""
    if not task.cancelled():
        task.exception()
