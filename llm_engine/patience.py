"""Outages of the store and the storage that pass are waited out; longer ones end the job, and
another job goes on from what is durable."""

import asyncio
import random
from collections.abc import Callable
from typing import Any, TypeVar

from llm_engine.errors import StorageUnavailable, StoreUnavailable

Result = TypeVar("Result")

PATIENCE_S = 120.0
_FIRST_S, _LONGEST_S = 0.2, 5.0


async def patiently(
    call: Callable[..., Result], *args: Any, patience_s: float | None = None
) -> Result:
    """What the blocking `call` gives, however often it must be tried. Raises StoreUnavailable or
    StorageUnavailable after `patience_s`, by default PATIENCE_S."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + (PATIENCE_S if patience_s is None else patience_s)
    pause = _FIRST_S
    while True:
        try:
            return await asyncio.to_thread(call, *args)
        except (StoreUnavailable, StorageUnavailable):
            if loop.time() + pause > ends:
                raise
        await asyncio.sleep(pause * random.uniform(0.5, 1))
        pause = min(pause * 2, _LONGEST_S)


def backoff(tries: int, longest_s: float = 30.0) -> float:
    """Seconds before the next try: doubled each time, and never the same for two rows."""
    return min(0.25 * 2 ** min(tries, 10), longest_s) * random.uniform(0.5, 1)
