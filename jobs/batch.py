"""The Ray job of one batch: `python -m jobs.batch BATCH_ID`. Needs no Ray, and can die at any time.

Exits with 0 when the batch has ended or is somebody else's, with 1 when another job must go on.
"""

import asyncio
import os
import signal
import sys

from jobs.settings import read
from llm_engine.batches.job import Interrupted, Job
from llm_engine.errors import LeaseLost, LLMEngineError, NotFound
from llm_engine.storage.opening import open_storage
from llm_engine.store.sql import Store


def say(text: str) -> None:
    print(text, flush=True)


async def run(batch: str) -> int:
    try:
        told = read()
        store, storage = Store(told.settings.store_url), open_storage(told.settings)
        job = Job(told.settings, told.gateways, store, storage, say)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, job.interrupt)
        await job.run(batch)
    except (LeaseLost, NotFound) as over:
        say(f"{batch}: nothing to do, {over}")
    except Interrupted:
        say(f"{batch}: told to stop; what has finished is kept, and another job goes on from there")
        return 1
    except (LLMEngineError, OSError) as error:
        say(f"{batch}: stopped, and another job goes on from what is kept: {error}")
        return 1
    return 0


async def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m jobs.batch BATCH_ID")
    code = await run(sys.argv[1])
    # A thread may be writing something long, for which nobody waits any more, and which must not
    # be put in place by a process that has lost its lease.
    os._exit(code)


if __name__ == "__main__":
    asyncio.run(main())
