"""`python -m jobs.fine_tune` with a trainer that learns nothing, and starts at once."""

import asyncio
import sys

from jobs.fine_tune import main

if __name__ == "__main__":
    asyncio.run(main([sys.executable, "-m", "tests.support.fake_trainer"]))
