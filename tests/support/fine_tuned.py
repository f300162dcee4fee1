"""What a job does to a fine-tune, done by a test: to the store, and where needed to the storage."""

import json
import time
from pathlib import Path
from typing import Any

from llm_engine import files
from llm_engine.fine_tunes import adapters
from llm_engine.fine_tunes.names import checkpoint_name
from llm_engine.records import AdapterRecord, FineTuneRecord
from llm_engine.statuses import FineTuneState
from tests.support import fine_tunes
from tests.support.gateway import GatewayThread

LEASE_S = 60.0
PLAN = {
    "method": "supervised", "n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 1.0,
    "learning_rate": 2e-3, "beta": 0.1, "lora_rank": 8, "total_steps": 30,
}  # fmt: skip
METRICS = {"train_loss": 0.5, "train_mean_token_accuracy": 0.75}


def jsonl(count: int = 12) -> bytes:
    return fine_tunes.jsonl(fine_tunes.example(n) for n in range(count))


def table(count: int = 12, columns: str = "prompt,response") -> bytes:
    return f"{columns}\n".encode() + b"".join(b"question %d,answer\n" % n for n in range(count))


def keep(
    gateway: GatewayThread,
    data: bytes | None = None,
    owner: str = "ann",
    name: str = "train.jsonl",
) -> str:
    """A file's id."""
    services = gateway.services
    assert services is not None
    return files.keep(
        services.storage, services.store, owner=owner, purpose="fine-tune", filename=name,
        pieces=[jsonl() if data is None else data],
    ).id  # fmt: skip


class Work:
    """`Work(gateway, job)`: its worker, once it is claimed."""

    def __init__(self, gateway: GatewayThread, job: str) -> None:
        services = gateway.services
        assert services is not None
        self._services = services
        self._store = services.store.fine_tunes
        self.record = self._store.claim(job, "worker", LEASE_S)

    def run(self, **plan: Any) -> "Work":
        """Its files are good, and it trains."""
        self._move(FineTuneState.VALIDATING, FineTuneState.QUEUED, "Files validated",
                   plan=PLAN | plan, total_steps=PLAN["total_steps"])  # fmt: skip
        self._move(FineTuneState.QUEUED, FineTuneState.RUNNING, "Fine-tuning job started")
        return self

    def step(self, step: int, loss: float = 0.5, **progress: float) -> None:
        data = METRICS | {"step": step, "train_loss": loss}
        total = PLAN["total_steps"]
        self._store.tell(self.record, f"Step {step}/{total}: training loss={loss:.2f}", data=data)
        self.record = self._store.beat(self.record, LEASE_S, {"step": step, **progress})

    def checkpoint(self, step: int) -> AdapterRecord:
        found = self._adapter(checkpoint_name(self.record.name, step), step)
        self.record = self._store.keep(self.record, step, found)
        return found

    def finish(self, folder: Path | None = None) -> AdapterRecord:
        """`folder`: of an adapter, to be published."""
        made = self._adapter(self.record.name, None)
        if folder is not None:
            adapters.publish(self._services.storage, folder, made)
        data = b"step,train_loss\n1,0.5\n"
        file = files.new_record(
            files.new_file_id(), self.record.owner, "fine-tune-results", "results.csv", len(data),
            None,
        )  # fmt: skip
        self._services.storage.put(file.key, data)
        self.record = self._store.finish(self.record, made, file, 1234)
        return made

    def fail(self, code: str, message: str, param: str | None = "training_file") -> None:
        error = {"code": code, "message": message, "param": param}
        self.record = self._store.fail(self.record, error)

    def _move(self, from_: FineTuneState, to: FineTuneState, message: str, **values: Any) -> None:
        moved = self._store.move(self.record, [from_], to, message, **values)
        assert moved is not None
        self.record = moved

    def _adapter(self, name: str, step: int | None) -> AdapterRecord:
        record: FineTuneRecord = self.record
        return AdapterRecord(
            adapters.new_adapter_id(), name, record.owner, record.base, record.weights, 8, 100,
            time.time(), fine_tune=record.id, step=step, metrics=METRICS,
        )  # fmt: skip


def adapter_folder(folder: Path) -> Path:
    """As a trainer leaves it."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"not served")
    return folder
