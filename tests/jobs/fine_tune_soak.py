"""Fine-tunes whose jobs and trainers are killed at random, and what must be true all the same.

    python -m tests.jobs.fine_tune_soak --kills 300 --seed 7

The trainer learns nothing but a number that depends on every step in order. What stands in for the
platform is a keeper that starts a job where a fine-tune has none.
"""

import argparse
import contextlib
import json
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from llm_engine.fine_tunes.adapters import sweep, sweep_fine_tune
from llm_engine.records import FineTuneRecord
from llm_engine.storage.base import UNFINISHED
from tests.support.fine_tunes import Bench, freeze

OPEN = 2  # fine-tunes at a time
LEASE_S = 2
EXAMPLES, EPOCHS, STEPS = 80, 3, 60
#: What happens how often.
EVILS = {"kill job": 45, "kill trainer": 30, "stop": 10, "freeze": 5, "unwritable": 5, "pause": 5}


@dataclass
class Process:
    """A job, and what it prints."""

    popen: subprocess.Popen[str]
    log: IO[str]
    frozen_until: float = 0.0

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None


@dataclass
class Soak:
    """`run` it, then `verify`."""

    bench: Bench
    chance: random.Random
    folder: Path
    happened: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(EVILS, 0)))
    tunes: list[FineTuneRecord] = field(default_factory=list)
    jobs: dict[str, Process] = field(default_factory=dict)  # the newest, by fine-tune
    all: list[Process] = field(default_factory=list)

    @property
    def killed(self) -> int:
        return self.happened["kill job"] + self.happened["kill trainer"]

    def run(self, kills: int, timeout_s: float) -> None:
        """Until so many processes have been killed and all fine-tunes have ended."""
        ends = time.monotonic() + timeout_s
        while True:
            still = self._tend()
            enough = self.killed >= kills
            if enough and not still:
                return
            while not enough and len(still) < OPEN:
                still.append(self._add())
            if not enough and self.chance.random() < 0.3:
                evil = self.chance.choices(list(EVILS), list(EVILS.values()))[0]
                if self._do(evil):
                    self.happened[evil] += 1
            assert time.monotonic() < ends, (
                f"after {timeout_s} s: {self.happened}, {len(still)} open"
            )
            time.sleep(0.1)

    # -- the keeper

    def _tend(self) -> list[FineTuneRecord]:
        """Starts jobs where there are none, as the real one does; those that have not ended."""
        now = time.time()
        for process in self.all:
            if process.frozen_until and process.frozen_until < now:
                process.frozen_until = 0.0
                process.popen.send_signal(signal.SIGCONT)
        tunes = self.bench.store.fine_tunes
        still = tunes.open()
        for record in still:
            job = self.jobs.get(record.id)
            if job is not None and job.alive and not job.frozen_until:
                continue
            if record.state == "paused" and record.worker is None:
                tunes.resume(record.id)
            if job is not None and not job.alive and _pid(record) == job.popen.pid:
                tunes.release(record, "its process is dead")
            elif record.worker is not None and record.lease_until > now:
                continue
            self._start(record)
        return still

    def _add(self) -> FineTuneRecord:
        tune = self.bench.tune(EXAMPLES, {"step_s": 0.04}, asked={"n_epochs": EPOCHS})
        self.tunes.append(tune)
        self._start(tune)
        return tune

    def _start(self, record: FineTuneRecord) -> None:
        log = (self.folder / f"{len(self.all)}.log").open("w+")
        process = Process(self.bench.start(record, log), log)
        self.jobs[record.id] = process
        self.all.append(process)

    # -- what goes wrong

    def _do(self, evil: str) -> bool:
        """Mostly to jobs that have come as far as to work. False where there is none."""
        if evil == "unwritable":
            self._make_unwritable(self.chance.uniform(0, 0.6))
            return True
        anyone = self.chance.random() < 0.1
        claimed = {_pid(record) for record in self.bench.store.fine_tunes.open()}
        targets = [
            (tune, job)
            for tune, job in self.jobs.items()
            if job.alive and not job.frozen_until and (anyone or job.popen.pid in claimed)
        ]
        if not targets:
            return False
        tune, job = self.chance.choice(targets)
        time.sleep(self.chance.uniform(0, 0.3))
        match evil:
            case "kill job":
                job.popen.kill()
                job.popen.wait()
            case "kill trainer":
                trainers = self.bench.trainers(self.bench.store.fine_tunes.get(tune))
                for trainer in trainers:
                    with contextlib.suppress(psutil.Error):
                        trainer.kill()
                return bool(trainers)
            case "stop":
                job.popen.terminate()
            case "pause":
                if self.bench.store.fine_tunes.get(tune).state.is_final:
                    return False
                self.bench.store.fine_tunes.pause(tune)
            case "freeze":
                freeze(self.bench, job.popen)
                job.frozen_until = time.time() + LEASE_S + self.chance.uniform(0.5, 3)
        return True

    def _make_unwritable(self, seconds: float) -> None:
        """For root, too: what is written first has no place."""
        unfinished = Path(self.bench.settings.storage_url) / UNFINISHED
        while not unfinished.is_symlink():
            # A job may make it anew in between, or not have made it yet.
            with contextlib.suppress(FileExistsError):
                if unfinished.exists():
                    unfinished.rename(unfinished.with_name(f"away-{time.monotonic_ns()}"))
                unfinished.symlink_to("nowhere")
        time.sleep(seconds)
        unfinished.unlink()

    # -- what must be true

    def verify(self) -> dict[str, float]:
        """Of every fine-tune; what it cost. An assertion says what is wrong."""
        for process in self.all:
            process.popen.wait(30)
            process.log.seek(0)
            printed = process.log.read()
            process.log.close()
            assert "Traceback" not in printed, printed
            assert process.popen.returncode in (0, 1, -signal.SIGKILL, -signal.SIGTERM), printed
        assert self.bench.trainers() == []
        for tune in self.tunes:
            # Of jobs that were killed at their very end, and what zombies wrote after it.
            sweep_fine_tune(self.bench.store, self.bench.storage, tune.id)
            self.bench.verify(tune, self.folder, STEPS)
        sweep(self.bench.store, self.bench.storage)
        assert self.bench.store.adapters.deleted() == []
        return {"fine-tunes": len(self.tunes), "jobs": len(self.all), **self.happened}


def _pid(record: FineTuneRecord) -> int | None:
    return int(record.worker.split(":")[-2]) if record.worker else None


def soak(kills: int, seed: int, timeout_s: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), lease_s=LEASE_S, max_idle_starts=1000)
        work = Soak(bench, random.Random(seed), Path(folder))
        try:
            work.run(kills, timeout_s)
            return work.verify()
        finally:
            for process in work.all:
                process.popen.kill()
                process.popen.wait()
                process.log.close()
            bench.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    asked = parser.parse_args()
    print(f"seed {asked.seed}")
    print(json.dumps(soak(asked.kills, asked.seed, 60 + 10 * asked.kills), indent=2))


if __name__ == "__main__":
    main()
