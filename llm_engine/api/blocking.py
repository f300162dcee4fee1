"""Blocking work on bytes, from async code: on threads of its own, so that a storage that hangs
does not take those that keys and records are looked up on."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from llm_engine.storage.base import CHUNK, Storage, Writer

_THREADS = ThreadPoolExecutor(32, thread_name_prefix="storage")
Given = TypeVar("Given")


async def finish(function: Callable[..., Given], *args: object) -> Given:
    """What it gives. Unlike `asyncio.to_thread` this never leaves a thread behind: if the caller
    is cancelled, then once the work has come to its end."""
    work = asyncio.get_running_loop().run_in_executor(_THREADS, function, *args)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # nobody is left to be told
        raise


class Intake:
    """A storage's writer that takes small pieces and writes large ones, one at a time: whoever
    sends waits meanwhile, so that no more than a chunk is in memory."""

    def __init__(self, writer: Writer, also: Callable[[bytes], object]) -> None:
        self._writer = writer
        self._also = also
        self._waiting = bytearray()
        self.bytes = 0

    async def write(self, data: bytes) -> None:
        self._waiting += data
        self.bytes += len(data)
        if len(self._waiting) >= CHUNK:
            await self.flush()

    async def flush(self) -> None:
        if self._waiting:
            data = bytes(self._waiting)
            self._waiting.clear()
            await finish(self._write, data)

    def _write(self, data: bytes) -> None:
        self._also(data)
        self._writer.write(data)


@asynccontextmanager
async def intake(
    storage: Storage, key: str, also: Callable[[bytes], object]
) -> AsyncIterator[Intake]:
    """The object is there once the block has ended; an exception leaves nothing. `also` sees the
    bytes as well, in a thread."""
    writer = storage.writer(key)
    taking = Intake(writer, also)
    await finish(writer.__enter__)
    try:
        yield taking
        await taking.flush()
    except BaseException as error:
        await finish(writer.__exit__, type(error), error, error.__traceback__)
        raise
    try:
        await finish(writer.__exit__, None, None, None)
    except asyncio.CancelledError:
        await finish(storage.delete, key)
        raise
