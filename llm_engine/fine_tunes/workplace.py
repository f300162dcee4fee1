"""The folder of this machine in which a job works: it goes with the job, however that ends."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "llm-engine-fine-tune-"
_LOCK = "lock"
#: A folder that is younger may not have been locked yet.
_YOUNG_S = 60.0


@contextlib.contextmanager
def workplace(fine_tune: str) -> Iterator[Path]:
    """Raises OSError."""
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{fine_tune[:60]}-"))
    lock = (folder / _LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _sweep() -> None:
    """What jobs have left that were killed: nobody holds the lock of their folders."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            known = folder.stat(follow_symlinks=False)
            if known.st_uid != os.getuid() or known.st_mtime > time.time() - _YOUNG_S:
                continue
            with (folder / _LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
