"""What clients can do with files, whatever dialect they speak.

Who may is decided here: what one must not see does not exist for them. A file is acknowledged once
its bytes and its record are durable; whatever goes wrong before leaves nothing.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import Request

from llm_engine import files
from llm_engine.api.blocking import finish, intake
from llm_engine.api.multipart import Field, FileBegins, clean_name, read_form
from llm_engine.api.once import once
from llm_engine.errors import BodyTooLarge, InvalidRequest, NotFound, StoreUnavailable, Unavailable
from llm_engine.records import FileRecord, Principal
from llm_engine.services import Services
from llm_engine.store.files import ROUTE, no_file
from llm_engine.store.idempotency import Once


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a form's fields say of its file."""

    purpose: str
    expires_after_s: int | None = None


#: Fields by name, and whether these are all of them; None: not to be said yet.
ReadFields = Callable[[dict[str, str], bool], Wanted | None]


@dataclass(slots=True)
class _Arriving:
    """A form on its way in."""

    read: ReadFields
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    first: files.FirstLine = field(default_factory=files.FirstLine)

    def see(self, data: bytes) -> None:
        self.digest.update(data)
        self.first.feed(data)


class Files:
    """Shared by the dialects."""

    def __init__(self, services: Services) -> None:
        self._store = services.store
        self._storage = services.storage
        self._limits = services.settings.files
        self._batch_limit = services.settings.batches.max_file_bytes

    async def upload(self, who: Principal, request: Request, read: ReadFields) -> FileRecord:
        """The form's part `file`. Raises InvalidRequest, BodyTooLarge, or Conflict where its
        Idempotency-Key came with another file."""
        file = files.new_file_id()
        form = _Arriving(read)
        try:
            async with intake(self._storage, files.key_of(file), form.see) as taking:
                async for event in read_form(
                    request, "file", self._limits.max_bytes, "files.max_bytes"
                ):
                    if isinstance(event, Field):
                        _add(form.fields, event)
                    elif isinstance(event, FileBegins):
                        form.filename = clean_name(event.filename or "")
                        self._check(read(form.fields, False), form.filename, 0)
                    else:
                        await taking.write(event)
                await taking.flush()
                wanted = self._whole(form, taking.bytes)
                asked = _asked(who, request, form, wanted)
                await self._not_made_before(asked)
        except _MadeBefore as before:
            return before.record
        assert form.filename is not None
        record = files.new_record(
            file, who.owner, wanted.purpose, form.filename, taking.bytes, wanted.expires_after_s
        )
        try:
            kept = await finish(self._store.files.add, record, self._limits.max_files, asked)
        except (StoreUnavailable, asyncio.CancelledError):
            await finish(self._take_back, record)
            raise
        except BaseException:
            await finish(self._drop_bytes, record)
            raise
        if kept.id != file:
            await finish(self._drop_bytes, record)
        return kept

    async def get(self, who: Principal, file: str) -> FileRecord:
        """Raises NotFound, for another owner's too."""
        record = await asyncio.to_thread(self._store.files.get, file)
        if not who.sees(record.owner):
            raise no_file(file)
        return record

    async def page(
        self,
        who: Principal,
        *,
        limit: int,
        after: str | None = None,
        purpose: str | None = None,
        newest_first: bool = True,
    ) -> tuple[list[FileRecord], bool]:
        """Their own, or all for an admin, and whether there are more."""
        return await asyncio.to_thread(
            self._store.files.page,
            who.whose,
            limit=limit,
            after=after,
            purpose=purpose,
            newest_first=newest_first,
        )

    async def delete(self, who: Principal, file: str) -> None:
        """Raises NotFound, for another owner's too."""
        await self.get(who, file)
        await finish(files.discard, self._storage, self._store, file)

    def _whole(self, form: _Arriving, size: int) -> Wanted:
        if form.filename is None:
            raise InvalidRequest(
                "Missing required parameter: 'file'.",
                param="file",
                code="missing_required_parameter",
            )
        wanted = form.read(form.fields, True)
        assert wanted is not None
        self._check(wanted, form.filename, size)
        if wanted.purpose == files.BATCH:
            form.first.check()
        return wanted

    def _check(self, wanted: Wanted | None, filename: str, size: int) -> None:
        if wanted is None or wanted.purpose != files.BATCH:
            return
        files.check_batch_name(filename)
        if size > self._batch_limit:
            raise BodyTooLarge(
                f"The file is larger than {self._batch_limit} bytes, the most of one with "
                "purpose 'batch' (batches.max_file_bytes).",
                param="file",
            )

    async def _not_made_before(self, asked: Once | None) -> None:
        found = asked and await asyncio.to_thread(self._store.idempotency.find, *asked)
        if not asked or not found:
            return
        try:
            raise _MadeBefore(await asyncio.to_thread(self._store.files.get, found))
        except NotFound:  # it has expired since
            await asyncio.to_thread(self._store.idempotency.forget, *asked[:3])

    def _take_back(self, record: FileRecord) -> None:
        """Where it is: a record that is not there now may still come, and then needs its bytes."""
        with contextlib.suppress(NotFound, Unavailable):
            self._store.files.remove(record.id)
            self._drop_bytes(record)

    def _drop_bytes(self, record: FileRecord) -> None:
        with contextlib.suppress(Unavailable):
            self._storage.delete(record.key)


class _MadeBefore(Exception):
    """The same request, again: what it has brought is not kept."""

    def __init__(self, record: FileRecord) -> None:
        self.record = record


def _asked(who: Principal, request: Request, form: _Arriving, wanted: Wanted) -> Once | None:
    return once(
        request, who, ROUTE,
        wanted.purpose, form.filename, str(wanted.expires_after_s), form.digest.digest(),
    )  # fmt: skip


def _add(fields: dict[str, str], event: Field) -> None:
    if event.name in fields:
        raise InvalidRequest(
            f"Duplicate parameter: '{event.name[:100]}'.",
            param=event.name[:100],
            code="duplicate_parameter",
        )
    fields[event.name] = event.value
