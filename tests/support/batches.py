"""Batches for tests: input files, records, and `python -m jobs.batch` as a real process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from llm_engine import files
from llm_engine.config import Settings, dump
from llm_engine.ids import new_id
from llm_engine.records import BatchOptions, BatchRecord
from llm_engine.statuses import BatchState
from llm_engine.storage.opening import open_storage
from llm_engine.store.sql import Store

Job = subprocess.Popen[str]
CHAT = "/v1/chat/completions"
ROOT = Path(__file__).parents[2]


def row(number: int = 0, model: str = "fake", **body: Any) -> dict[str, Any]:
    """A line of an input file; its seed tells its answer from others'."""
    content = [{"role": "user", "content": f"question {number}"}]
    asked = {"model": model, "messages": content, "max_tokens": 2, "seed": number}
    return {"custom_id": f"row-{number}", "method": "POST", "url": CHAT, "body": asked | body}


def jsonl(rows: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in rows)


def batch_record(**facts: Any) -> BatchRecord:
    now = time.time()
    given = {
        "id": new_id("batch"), "owner": "ann", "dialect": "openai", "endpoint": CHAT,
        "input_file_id": "file-none", "window_s": 86400.0, "state": BatchState.VALIDATING,
        "created_at": now, "expires_at": now + facts.get("window_s", 86400.0),
    }  # fmt: skip
    return BatchRecord(**given | facts)


class Bench:
    """A store and a storage, and jobs that work on what lies there."""

    def __init__(self, settings: Settings, gateways: list[str]) -> None:
        self.settings = settings
        self.gateways = gateways
        self.store = Store.open(settings.store_url)
        self.storage = open_storage(settings)

    def close(self) -> None:
        self.store.close()

    def file(self, data: bytes, owner: str = "ann") -> str:
        return files.keep(
            self.storage, self.store, owner=owner, purpose="batch", filename="in.jsonl",
            pieces=[data],
        ).id  # fmt: skip

    def batch(self, data: bytes | Iterable[dict[str, Any]], **facts: Any) -> BatchRecord:
        """A new one; `data`: its input file, or the rows of it."""
        content = data if isinstance(data, bytes) else jsonl(data)
        facts = {"input_file_id": self.file(content)} | facts
        if "options" in facts and isinstance(facts["options"], dict):
            facts["options"] = BatchOptions(**facts["options"])
        record = batch_record(**facts)
        self.store.batches.create(record, 1000)
        return record

    def get(self, batch: BatchRecord) -> BatchRecord:
        return self.store.batches.get(batch.id)

    def start(self, batch: BatchRecord, log: IO[str] | int = subprocess.PIPE) -> Job:
        told = {
            "settings": dump(self.settings, reveal=True) | {"endpoints": []},
            "gateways": self.gateways,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.batch", batch.id],
            env=os.environ | {"LLM_ENGINE_JOB": json.dumps(told), "PYTHONUNBUFFERED": "1"},
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, batch: BatchRecord, timeout_s: float = 60) -> tuple[int, str, BatchRecord]:
        """Its exit code, what it printed, and the record."""
        with self.start(batch) as job:
            printed, _ = job.communicate(timeout=timeout_s)
            return job.returncode, printed, self.get(batch)

    def lines(self, file: str | None) -> list[dict[str, Any]]:
        """Of a result file."""
        if file is None:
            return []
        data = b"".join(self.storage.read(self.store.files.get(file).key))
        return [json.loads(line) for line in data.splitlines()]

    def results(self, batch: BatchRecord) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The lines of the output file, and of the error file."""
        record = self.get(batch)
        return self.lines(record.output_file_id), self.lines(record.error_file_id)
