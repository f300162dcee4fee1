"""The end of a batch: its results as files, in the input's order. A second try writes the same."""

from typing import Any

import orjson

from llm_engine.batches.lease import Lease
from llm_engine.batches.outcomes import EXPIRED
from llm_engine.batches.parts import folder_of
from llm_engine.batches.results import Spool, add_unfinished, write
from llm_engine.config import Settings
from llm_engine.errors import NotFound, StorageUnavailable
from llm_engine.files import key_of, new_file_id, new_record
from llm_engine.patience import patiently
from llm_engine.records import BatchPart, BatchRecord, FileRecord
from llm_engine.statuses import BatchState
from llm_engine.storage.base import NoSuchObject, Storage
from llm_engine.store.sql import Store

PURPOSE = "batch_output"


class Conclusion:
    """`write` it. Raises LeaseLost, StoreUnavailable, StorageUnavailable."""

    def __init__(self, settings: Settings, store: Store, storage: Storage, lease: Lease) -> None:
        self._settings = settings
        self._store = store
        self._storage = storage
        self._lease = lease

    async def write(self) -> None:
        record = self._lease.record
        parts = await patiently(self._store.batches.parts, record.id)
        try:
            spool = await patiently(self._collect, parts)
        except NoSuchObject:
            await self._lease.beat()  # another one may have ended it, and deleted them
            raise
        with spool:
            await self._write(spool)
        await patiently(self._sweep)

    async def _write(self, spool: Spool) -> None:
        record = self._lease.record
        names = {
            "output_file_id": (record.output_file_id or new_file_id()) if spool.completed else None,
            "error_file_id": (record.error_file_id or new_file_id()) if spool.failed else None,
        }
        await self._lease.note(**names)
        results: list[FileRecord] = []
        for (field, file), failed in zip(names.items(), (False, True), strict=True):
            if file is not None:
                size = await patiently(self._write_file, spool, file, failed)
                kind = field.removesuffix("_file_id")
                name, expires_s = f"{record.id}_{kind}.jsonl", record.options.output_expires_after_s
                results.append(new_record(file, record.owner, PURPOSE, name, size, expires_s))
        values: dict[str, Any] = {**names, "completed": spool.completed, "failed": spool.failed}
        values["reason"] = record.errors[0]["message"] if record.errors else None
        outcome = record.outcome or "completed"
        if record.options.output_path is not None and outcome != "cancelled":
            from llm_engine.batches import by_path  # late: it brings a whole dialect along

            refused = await by_path.deliver(self._settings, self._storage, record, spool)
            if refused is not None:
                outcome = "failed"
                values |= {"reason": refused["message"], "errors": [refused]}
        state = BatchState(outcome)
        await patiently(self._describe, state, results, values)
        await self._lease.finish(state, results, **values)

    def _collect(self, parts: list[BatchPart]) -> Spool:
        try:
            return self._spool(parts)
        except OSError as error:  # the node's disk, which is no more the batch's fault than S3
            raise StorageUnavailable(
                f"The node's disk does not take the results: {error.strerror}."
            ) from error

    def _spool(self, parts: list[BatchPart]) -> Spool:
        record = self._lease.record
        spool = Spool(record.total)
        try:
            spool.collect(self._storage, parts)
            error = _of_unfinished(record)
            if error is not None and spool.completed + spool.failed < spool.total:
                add_unfinished(spool, record, self._storage, self._input_key(), error)
            spool.flush()
        except BaseException:
            spool.__exit__()
            raise
        return spool

    def _input_key(self) -> str | None:
        try:
            return self._store.files.get(self._lease.record.input_file_id).key
        except NotFound:
            return None

    def _write_file(self, spool: Spool, file: str, failed: bool) -> int:
        return write(self._storage, key_of(file), spool.lines(failed), self._lease.check)

    def _describe(
        self, state: BatchState, results: list[FileRecord], values: dict[str, Any]
    ) -> None:
        """Beside the results, for people, and for a database that was lost."""
        record = self._lease.record
        told = {
            "id": record.id,
            "owner": record.owner,
            "state": state,
            "endpoint": record.endpoint,
            "model": record.model,
            "created_at": record.created_at,
            "input_file_id": record.input_file_id,
            "request_counts": {
                "total": record.total,
                "completed": values["completed"],
                "failed": values["failed"],
            },
            "files": {result.filename: result.key for result in results},
        }
        data = orjson.dumps(told, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        self._storage.put(f"batches/{record.id}/manifest.json", data)

    def _sweep(self) -> None:
        for part in self._storage.list(folder_of(self._lease.record.id)):
            self._storage.delete(part.key)


def _of_unfinished(record: BatchRecord) -> dict[str, str] | None:
    """The error of rows that never ran; None where they do not appear."""
    if record.outcome == "expired":
        return EXPIRED
    if record.outcome == "completed":  # all rows have run, unless something kept them from it
        told = record.errors[0] if record.errors else {}
        message = told.get("message") or "This request was not executed."
        return {"code": told.get("code") or "not_executed", "message": message}
    return None
