"""Fine-tunes for tests: training files, records, and `python -m jobs.fine_tune` as a process."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import psutil

from llm_engine import files
from llm_engine.config import Settings, dump, parse
from llm_engine.errors import StoreUnavailable
from llm_engine.fine_tunes import adapters
from llm_engine.fine_tunes.adapters import Manifest
from llm_engine.ids import new_id
from llm_engine.records import AdapterRecord, FineTuneEvent, FineTuneRecord
from llm_engine.statuses import FineTuneState
from llm_engine.storage.opening import open_storage
from llm_engine.store.sql import Store
from tests.support.fake_trainer import learned, loss_of

Job = subprocess.Popen[str]
ROOT = Path(__file__).parents[2]
TRAINERS = (["tests.support.fake_trainer"], ["llm_engine.fine_tunes.trainer"])
LIMITS = {"lease_s": 2, "checkpoint_every_s": 0.2}


def example(number: int = 0) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    }


def jsonl(rows: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in rows)


def fine_tune_record(**facts: Any) -> FineTuneRecord:
    made = new_id("ftjob", "-")
    given = {
        "id": made, "owner": "ann", "dialect": "openai", "base": "demo-chat",
        "weights": "builtin:chat", "training_file_id": "file-none", "method": "supervised",
        "name": f"ft:demo-chat:ann::{made[-8:]}", "seed": 7, "state": FineTuneState.VALIDATING,
        "created_at": time.time(),
    }  # fmt: skip
    return FineTuneRecord(**given | facts)


class Bench:
    """A store and a storage, and jobs that work on what lies there."""

    def __init__(self, folder: Path, module: str = "tests.support.fine_tune_job", **limits: Any):
        """`module`: the job; by default the one with a trainer that learns nothing."""
        raw = {"cluster": {"state_dir": str(folder)}, "fine_tunes": LIMITS | limits}
        self.settings: Settings = parse(raw, {})
        self.store = Store.open(self.settings.store_url)
        self.storage = open_storage(self.settings)
        self.module = module
        self.environment: dict[str, str] = {}  # of its jobs, besides
        self.temporary = folder / "tmp"  # where jobs work
        self.temporary.mkdir(exist_ok=True)

    def close(self) -> None:
        self.store.close()

    def file(self, data: bytes, owner: str = "ann", name: str = "train.jsonl") -> str:
        return files.keep(
            self.storage, self.store, owner=owner, purpose="fine-tune", filename=name,
            pieces=[data],
        ).id  # fmt: skip

    def tune(
        self,
        data: bytes | int = 40,
        fake: dict[str, Any] | None = None,
        valid: int = 0,
        asked: dict[str, Any] | None = None,
        **facts: Any,
    ) -> FineTuneRecord:
        """A new one. `data`: its training file, or how many examples it has; `fake`: how the
        trainer misbehaves; `valid`: examples of a validation file."""
        content = data if isinstance(data, bytes) else jsonl(map(example, range(data)))
        facts = {"training_file_id": self.file(content)} | facts
        if valid:
            facts["validation_file_id"] = self.file(jsonl(map(example, range(valid))))
        hyperparameters = (asked or {}) | ({"fake": fake} if fake else {})
        record = fine_tune_record(hyperparameters=hyperparameters, **facts)
        return self.store.fine_tunes.create(record, 1000)

    def get(self, tune: FineTuneRecord) -> FineTuneRecord:
        return self.store.fine_tunes.get(tune.id)

    def start(self, tune: FineTuneRecord, log: IO[str] | int = subprocess.PIPE) -> Job:
        told = {"settings": dump(self.settings, reveal=True) | {"endpoints": []}, "gateways": []}
        return subprocess.Popen(
            [sys.executable, "-m", self.module, tune.id],
            env=os.environ
            | {"LLM_ENGINE_JOB": json.dumps(told), "TMPDIR": str(self.temporary)}
            | {"PYTHONUNBUFFERED": "1"}
            | self.environment,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, tune: FineTuneRecord, timeout_s: float = 60) -> tuple[int, str, FineTuneRecord]:
        """Its exit code, what it printed, and the record."""
        with self.start(tune) as job:
            printed, _ = job.communicate(timeout=timeout_s)
            return job.returncode, printed, self.get(tune)

    def release(self, tune: FineTuneRecord) -> None:
        """As the keeper does where a job is dead."""
        self.store.fine_tunes.release(self.get(tune), "it is dead")

    def events(self, tune: FineTuneRecord) -> list[FineTuneEvent]:
        """Oldest first."""
        return self.store.fine_tunes.events(tune.id, None, 100_000)[0][::-1]

    def messages(self, tune: FineTuneRecord) -> list[str]:
        return [event.message for event in self.events(tune) if event.type == "message"]

    def told_steps(self, tune: FineTuneRecord) -> list[int]:
        return [event.data["step"] for event in self.events(tune) if event.data]

    def rows(self, tune: FineTuneRecord) -> list[dict[str, str]]:
        """Of the result file."""
        file = self.store.fine_tunes.get(tune.id).result_file_id
        text = b"".join(self.storage.read(self.store.files.get(file).key)).decode()
        return list(csv.DictReader(io.StringIO(text)))

    def checkpoints(self, tune: FineTuneRecord) -> list[AdapterRecord]:
        """Those that can be served."""
        return [each for each in self.store.adapters.of(tune.id) if each.step is not None]

    def fetch(self, adapter: str, folder: Path) -> Manifest:
        return adapters.fetch(self.storage, adapter, folder)

    def learned(self, adapter: str, folder: Path) -> int:
        """Of the trainer that learns nothing: the number that came of it."""
        self.fetch(adapter, folder)
        return int((folder / "adapter_model.safetensors").read_text().split()[1])

    def left_over(self, tune: FineTuneRecord) -> list[str]:
        """What it keeps to go on from."""
        return [each.key for each in self.storage.list(f"fine_tunes/{tune.id}/")]

    def trainers(self, of: FineTuneRecord | None = None) -> list[psutil.Process]:
        """The processes that train for this bench's jobs."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                job = process.parent()
                if process.cmdline()[2:] not in TRAINERS or job is None:
                    continue
                if process.environ().get("TMPDIR") == str(self.temporary):
                    if of is None or job.cmdline()[-1] == of.id:
                        found.append(process)
        return found

    def verify(self, tune: FineTuneRecord, folder: Path, steps: int) -> None:
        """Of the trainer that learns nothing: it ended as if nothing had ever interrupted it."""
        record = self.get(tune)
        assert record.state is FineTuneState.SUCCEEDED, (record.state, record.reason, record.error)
        assert (record.step, record.total_steps, record.worker) == (steps, steps, None)
        assert self.learned(record.adapter, folder / record.adapter) == learned(steps)
        rows = self.rows(tune)
        assert [int(row["step"]) for row in rows] == list(range(1, steps + 1))
        losses = [f"{loss_of(learned(step)):.6g}" for step in range(1, steps + 1)]
        assert [row["train_loss"] for row in rows] == losses
        told = self.told_steps(tune)
        assert told == sorted(set(told)) and {1, steps} <= set(told)
        texts = self.messages(tune)
        for text in ("Files validated", "Fine-tuning job started", "New fine-tuned", "Checkpoint"):
            matching = [each for each in texts if each.startswith(text)]
            assert matching and len(matching) == len(set(matching)), texts
        kept = [each.step for each in self.checkpoints(tune)]
        assert kept == sorted(kept) and kept[-1] == steps, kept
        for each in self.checkpoints(tune):
            assert self.learned(each.id, folder / each.id) == learned(each.step)
        assert self.left_over(tune) == [f"fine_tunes/{tune.id}/results.csv"]


def freeze(bench: Bench, job: Job) -> None:
    """At a moment when it keeps nobody else from writing: SQLite has one writer."""
    while True:
        job.send_signal(signal.SIGSTOP)
        try:
            with bench.store.database.writing():
                return
        except StoreUnavailable:
            job.send_signal(signal.SIGCONT)
            time.sleep(0.1)  # in which it ends what it has begun to write
