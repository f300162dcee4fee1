"""Batches whose jobs are killed at random, and what must be true of their results all the same.

    python -m tests.jobs.soak --kills 500 --seed 7

What stands in for the platform: a keeper that starts a job where a batch has none, a proxy that can
cut every connection to the gateway, and an engine whose answers begin with the row's own number.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import urlsplit

from llm_engine.batches.parts import sweep
from llm_engine.records import BatchRecord
from llm_engine.storage.base import UNFINISHED
from tests.support.batches import Bench, row
from tests.support.gateway import GatewayThread, fake_endpoint

ROWS = 1200
TOKENS = 2  # of a row
BAD_EVERY = 50  # so often a row is refused by the gateway
OPEN = 3  # batches at a time
LEASE_S = 2
#: A death costs what is in flight: few rows at a time, then, and each of them soon done.
ENGINE = {"token_delay_s": 0.02, "max_num_seqs": 4}
#: What happens how often.
EVILS = {"kill": 80, "freeze": 6, "cut": 7, "unwritable": 7}


class Proxy:
    """A TCP port before the gateway that can be away for a while, and then is the same again."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def restart(self, away_s: float) -> None:
        """Cuts every connection, and takes none for so long."""
        self._call(self._close())
        time.sleep(away_s)
        self._call(self._listen())

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        assert self._server is not None
        # What asyncio has accepted and not begun with is lost where its server is closed: first
        # no more is accepted, and what was is begun.
        for listener in self._server.sockets:
            self._loop.remove_reader(listener.fileno())
        await asyncio.sleep(0.01)
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        while self._open:
            await asyncio.sleep(0.01)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            far_reader, far = await asyncio.open_connection(
                self._target.hostname, self._target.port
            )
            self._open.add(far)
            pipes = [
                asyncio.create_task(_pipe(*ends)) for ends in ((reader, far), (far_reader, writer))
            ]
            await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
            for each in (far, writer):
                each.transport.abort()
            await asyncio.gather(*pipes)
            self._open.discard(far)
        finally:
            self._open.discard(writer)
            writer.transport.abort()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


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
    gateway: GatewayThread
    proxy: Proxy
    chance: random.Random
    folder: Path
    happened: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(EVILS, 0)))
    batches: list[BatchRecord] = field(default_factory=list)
    jobs: dict[str, Process] = field(default_factory=dict)  # the newest, by batch
    all: list[Process] = field(default_factory=list)

    def run(self, kills: int, timeout_s: float) -> None:
        """Until so many jobs have been killed and all batches have ended."""
        ends = time.monotonic() + timeout_s
        while True:
            still = self._tend()
            enough = self.happened["kill"] + self.happened["freeze"] >= kills
            if enough and not still:
                return
            while not enough and len(still) < OPEN:
                still.append(self._add())
            if not enough and (evil := self._draw()) is not None:
                self.happened[evil] += 1
            assert time.monotonic() < ends, (
                f"after {timeout_s} s: {self.happened}, {len(still)} open"
            )
            time.sleep(0.05)

    # -- the keeper

    def _tend(self) -> list[BatchRecord]:
        """Starts jobs where there are none, as the real one does; the batches that are open."""
        now = time.time()
        for process in self.all:
            if process.frozen_until and process.frozen_until < now:
                process.frozen_until = 0.0
                process.popen.send_signal(signal.SIGCONT)
        still = self.bench.store.batches.open()
        for record in still:
            job = self.jobs.get(record.id)
            if job is not None and job.alive and not job.frozen_until:
                continue
            if job is not None and not job.alive and _pid(record) == job.popen.pid:
                self.bench.store.batches.release(record, "its process is dead")
            elif record.worker is not None and record.lease_until > now:
                continue
            self._start(record)
        return still

    def _add(self) -> BatchRecord:
        rows = [row(n, max_tokens=TOKENS) for n in range(ROWS)]
        for bad in rows[::BAD_EVERY]:
            bad["body"]["temperature"] = 3
        batch = self.bench.batch(rows)
        self.batches.append(batch)
        self._start(batch)
        return batch

    def _start(self, record: BatchRecord) -> None:
        log = (self.folder / f"{len(self.all)}.log").open("w+")
        process = Process(self.bench.start(record, log), log)
        self.jobs[record.id] = process
        self.all.append(process)

    # -- what goes wrong

    def _draw(self) -> str | None:
        """Perhaps something happens; what did. Mostly to jobs that have come as far as to work."""
        if self.chance.random() > 0.5:
            return None
        evil = self.chance.choices(list(EVILS), list(EVILS.values()))[0]
        if evil == "cut":
            self.proxy.restart(self.chance.uniform(0, 0.4))
            return evil
        if evil == "unwritable":
            self._make_unwritable(self.chance.uniform(0, 0.6))
            return evil
        anyone = self.chance.random() < 0.15
        claimed = {_pid(record) for record in self.bench.store.batches.open()}
        targets = [
            job
            for job in self.jobs.values()
            if job.alive and not job.frozen_until and (anyone or job.popen.pid in claimed)
        ]
        if not targets:
            return None
        job = self.chance.choice(targets)
        if evil == "kill":
            time.sleep(self.chance.uniform(0, 0.1))
            job.popen.kill()
            job.popen.wait()
        else:
            job.popen.send_signal(signal.SIGSTOP)
            job.frozen_until = time.time() + LEASE_S + self.chance.uniform(0.5, 3)
        return evil

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
        """Every row of every batch; what it cost. An assertion says what is wrong."""
        for process in self.all:
            process.popen.wait(20)
            process.log.seek(0)
            printed = process.log.read()
            process.log.close()
            assert "Traceback" not in printed, printed
            assert process.popen.returncode in (0, 1, -signal.SIGKILL), printed
        sweep(self.bench.store, self.bench.storage)  # of jobs that were killed at their very end
        good = sum(map(self._verify, self.batches))
        generated = self.gateway.load("fake").generated_tokens // TOKENS
        died = self.happened["kill"] + self.happened["freeze"]
        return {
            "batches": len(self.batches),
            "rows": len(self.batches) * ROWS,
            "jobs": len(self.all),
            **self.happened,
            "generated again": generated - good,
            "a death costs": (generated - good) / ROWS / max(1, died),  # share of a batch
        }

    def _verify(self, batch: BatchRecord) -> int:
        record = self.bench.get(batch)
        assert record.state == "completed", f"{record.state}: {record.reason}"
        output, errors = self.bench.results(batch)
        bad = [f"row-{n}" for n in range(0, ROWS, BAD_EVERY)]
        good = [f"row-{n}" for n in range(ROWS) if n % BAD_EVERY]
        assert [line["custom_id"] for line in errors] == bad
        assert [line["custom_id"] for line in output] == good
        assert all(line["response"]["status_code"] == 400 for line in errors)
        for line in output:
            said = line["response"]["body"]["choices"][0]["message"]["content"]
            assert said.split()[0] == line["custom_id"].removeprefix("row-")
        counts = (record.total, record.completed, record.failed)
        assert counts == (ROWS, len(good), len(bad))
        assert record.usage.completion_tokens == TOKENS * len(good)
        for file in (record.output_file_id, record.error_file_id):
            kept = self.bench.store.files.get(file)
            assert self.bench.storage.stat(kept.key).bytes == kept.bytes
        assert list(self.bench.storage.list(f"batches/{batch.id}/parts/")) == []
        return len(good)


def _pid(record: BatchRecord) -> int | None:
    return int(record.worker.split(":")[-2]) if record.worker else None


def soak(kills: int, seed: int, timeout_s: float) -> dict[str, float]:
    endpoint = fake_endpoint("fake", vllm_args=ENGINE)
    sections = {"batches": {"lease_s": LEASE_S}}
    with (
        tempfile.TemporaryDirectory() as folder,
        GatewayThread([endpoint], sections=sections) as gateway,
        Proxy(gateway.url) as proxy,
    ):
        bench = Bench(gateway.settings, [f"http://127.0.0.1:{proxy.port}"])
        work = Soak(bench, gateway, proxy, random.Random(seed), Path(folder))
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
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    asked = parser.parse_args()
    print(f"seed {asked.seed}")
    print(json.dumps(soak(asked.kills, asked.seed, 60 + 5 * asked.kills), indent=2))


if __name__ == "__main__":
    main()
