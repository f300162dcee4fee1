"""`python -m jobs.fine_tune` with the trainers of `train_elsewhere`."""

import asyncio
import sys

from jobs.fine_tune import main

if __name__ == "__main__":
    asyncio.run(main([sys.executable, "-m", "tests.support.train_elsewhere"]))
