"""The Ray job of one fine-tune: `python -m jobs.fine_tune FTJOB_ID`. It can die at any time.

Exits with 0 when the fine-tune has ended, rests or is somebody else's, with 1 when another job must
go on. Needs no Ray; a Ray job's resources are what its trainer uses.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from jobs.settings import read
from llm_engine.errors import LeaseLost, LLMEngineError, NotFound
from llm_engine.fine_tunes.job import Interrupted, Job
from llm_engine.storage.opening import open_storage
from llm_engine.store.sql import Store


def say(text: str) -> None:
    print(text, flush=True)


async def run(fine_tune: str, trainer: Sequence[str] | None = None) -> int:
    """`trainer`: the command that trains, if not ours."""
    try:
        settings = read().settings
        store, storage = Store(settings.store_url), open_storage(settings)
        job = Job(settings, store, storage, say, trainer)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, job.interrupt)
        await job.run(fine_tune)
    except (LeaseLost, NotFound) as over:
        say(f"{fine_tune}: nothing to do, {over}")
    except Interrupted:
        say(f"{fine_tune}: told to stop; another job goes on from the last checkpoint")
        return 1
    except (LLMEngineError, OSError) as error:
        say(f"{fine_tune}: stopped, and another job goes on from the last checkpoint: {error}")
        return 1
    return 0


async def main(trainer: Sequence[str] | None = None) -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m jobs.fine_tune FTJOB_ID")
    code = await run(sys.argv[1], trainer)
    # A thread may be writing something long, for which nobody waits any more, and which must not
    # be put in place by a process that has lost its lease.
    os._exit(code)


if __name__ == "__main__":
    asyncio.run(main())
