"""What clients can do with fine-tunes, whatever dialect they speak.

A fine-tune is a record; a job trains what it asks for. What can be told at once is told here: whose
the files are, whether the model can be fine-tuned, whether the numbers make sense. What the files
hold is looked at right after that, for a job may wait for hours; it checks them again itself.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_engine.api.blocking import finish
from llm_engine.catalog import missing
from llm_engine.errors import Conflict, InvalidRequest, LLMEngineError, NotFound, Overloaded
from llm_engine.fine_tunes import inputs
from llm_engine.fine_tunes.plan import (
    ALL_LINEAR,
    AUTO,
    BUILTIN_CHAT_MODULES,
    RANK,
    check_hyperparameters,
)
from llm_engine.ids import new_id
from llm_engine.records import (
    AdapterRecord,
    EndpointStatus,
    FileRecord,
    FineTuneEvent,
    FineTuneRecord,
    Principal,
)
from llm_engine.services import Services
from llm_engine.statuses import EndpointState, FineTuneState
from llm_engine.store.fine_tunes import no_fine_tune
from llm_engine.store.idempotency import Once

logger = logging.getLogger("llm_engine.api")

#: Fine-tunes whose files are to be looked through; of more than that only their jobs do it.
MOST_CHECKS = 100
#: Of tries to find a name that nobody has.
MOST_NAMES = 60
SEEDS = 2**31
#: In FineTuneRecord.extras: the name of the model that it goes on from, where that is an adapter.
PARENT = "parent"
NO_FILE = "file_not_found"  # a code

#: Of a model that will come of a fine-tune: from the base's name, the owner, the id and a time.
Naming = Callable[[str, str, str, float], str]


@dataclass(frozen=True, slots=True)
class NewFineTune:
    """What is asked for; see FineTuneRecord."""

    dialect: str
    model: str
    training_file: str
    method: str
    name: Naming
    validation_file: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    where: str = "hyperparameters"  # these stand in the request
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None


class FineTunes:
    """Shared by the dialects."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._store = services.store
        self._limits = services.settings.fine_tunes
        self._checks: set[asyncio.Task[None]] = set()

    async def create(
        self, who: Principal, new: NewFineTune, once: Once | None = None
    ) -> FineTuneRecord:
        """Or what `once` has made before.

        Raises NotFound or InvalidRequest for a model that does not exist or cannot be fine-tuned,
        for files and for numbers; Overloaded where its owner has too many open; Conflict where
        `once` was something else.
        """
        before = once and await asyncio.to_thread(self._store.idempotency.find, *once)
        if before:
            return await asyncio.to_thread(self._store.fine_tunes.get, before)
        asked = check_hyperparameters(new.method, new.hyperparameters, new.where)
        base, parent = await self._base(who, new.model)
        asked = _check_rank(asked, base, parent, new.where)
        _check_modules(asked, base, new.where)
        await self.file(who, new.training_file, "training_file")
        if new.validation_file is not None:
            await self.file(who, new.validation_file, "validation_file")
        now = time.time()
        for attempt in range(MOST_NAMES):
            job = new_id("ftjob", "-")
            record = FineTuneRecord(
                id=job,
                owner=who.owner,
                dialect=new.dialect,
                base=base.name,
                weights=base.model,
                training_file_id=new.training_file,
                method=new.method,
                name=new.name(base.name, who.owner, job, now + attempt),
                seed=secrets.randbelow(SEEDS) if new.seed is None else new.seed,
                state=FineTuneState.VALIDATING,
                created_at=now,
                parent=parent and parent.id,
                validation_file_id=new.validation_file,
                suffix=new.suffix,
                hyperparameters=asked,
                metadata=new.metadata,
                extras={PARENT: parent.name} if parent else {},
                sees_all=who.sees_everything,
            )
            try:
                kept = await self._keep(record, once)
            except Conflict as error:
                if error.code != "name_taken" or attempt == MOST_NAMES - 1:
                    raise
            else:
                await self._services.nudge_jobs()
                if kept.id == job and len(self._checks) < MOST_CHECKS:
                    checking = asyncio.create_task(self._check_files(kept))
                    self._checks.add(checking)
                    checking.add_done_callback(self._checks.discard)
                return kept
        raise AssertionError

    async def file(self, who: Principal, file: str, param: str) -> FileRecord:
        """Raises InvalidRequest for one that is not there, is another owner's or too large."""
        try:
            record = await asyncio.to_thread(self._store.files.get, file)
        except NotFound:
            record = None
        if record is None or not who.sees(record.owner):
            raise InvalidRequest(
                f"There is no file '{file[:100]}'. Upload one first, and name it by its id.",
                param=param,
                code=NO_FILE,
            )
        if record.bytes > self._limits.max_file_bytes:
            raise InvalidRequest(
                f"The file '{record.id}' has {record.bytes} bytes; {self._limits.max_file_bytes} "
                "is the most of a training file (fine_tunes.max_file_bytes).",
                param=param,
                code="file_too_large",
            )
        return record

    async def get(self, who: Principal, fine_tune: str) -> FineTuneRecord:
        """Raises NotFound, for another owner's too."""
        record = await asyncio.to_thread(self._store.fine_tunes.get, fine_tune)
        if not who.sees(record.owner):
            raise no_fine_tune(fine_tune)
        return record

    async def page(
        self,
        who: Principal,
        after: str | None,
        limit: int,
        metadata: Mapping[str, str] | None = None,
        *,
        without_metadata: bool = False,
    ) -> tuple[list[FineTuneRecord], bool]:
        """Newest first, and whether there are more; those with all of these `metadata`, or those
        that have none. Raises NotFound for an unknown `after`."""
        store = self._store.fine_tunes
        wanted = store.labelled(None if without_metadata else metadata or {})
        return await asyncio.to_thread(store.page, who.whose, after, limit, *wanted)

    async def cancel(self, who: Principal, fine_tune: str) -> FineTuneRecord:
        """Again does nothing. Raises NotFound, or Conflict where it has ended otherwise."""
        return await self._change(who, fine_tune, self._store.fine_tunes.ask_cancel)

    async def pause(self, who: Principal, fine_tune: str) -> FineTuneRecord:
        """Again does nothing. Raises NotFound, or Conflict where it has ended."""
        return await self._change(who, fine_tune, self._store.fine_tunes.pause)

    async def resume(self, who: Principal, fine_tune: str) -> FineTuneRecord:
        """Raises NotFound, or Conflict where it does not rest."""
        return await self._change(who, fine_tune, self._store.fine_tunes.resume)

    async def events(
        self, who: Principal, fine_tune: str, before: int | None, limit: int
    ) -> tuple[list[FineTuneEvent], bool]:
        """Newest first, older ones than `before`, and whether there are more. Raises NotFound."""
        await self.get(who, fine_tune)
        return await asyncio.to_thread(self._store.fine_tunes.events, fine_tune, before, limit)

    async def checkpoints(self, who: Principal, fine_tune: str) -> list[AdapterRecord]:
        """Those that can be named as a model, newest first. Raises NotFound."""
        await self.get(who, fine_tune)
        found = await asyncio.to_thread(self._store.adapters.of, fine_tune)
        return [adapter for adapter in reversed(found) if adapter.step is not None]

    async def _change(
        self, who: Principal, fine_tune: str, change: Callable[[str], FineTuneRecord]
    ) -> FineTuneRecord:
        await self.get(who, fine_tune)
        record = await asyncio.to_thread(change, fine_tune)
        await self._services.nudge_jobs()
        return record

    async def _check_files(self, record: FineTuneRecord) -> None:
        """Fails it where they are bad, unless its job is at work, which will find the same."""
        services = self._services
        try:
            async with services.checking:
                await finish(inputs.check, services.settings, self._store, services.storage, record)
        except inputs.Unfit as unfit:
            with contextlib.suppress(LLMEngineError):
                await asyncio.to_thread(self._store.fine_tunes.end, record, unfit.error)
                await services.nudge_jobs()
        except (LLMEngineError, OSError):
            pass  # the store or the storage is away: its job waits for them
        except Exception:
            logger.exception("the files of %s could not be looked through", record.id)

    async def _keep(self, record: FineTuneRecord, once: Once | None) -> FineTuneRecord:
        try:
            most = self._limits.max_open
            return await asyncio.to_thread(self._store.fine_tunes.create, record, most, once)
        except Conflict as full:
            if full.code != "too_many_fine_tunes":
                raise
            retry = self._services.settings.gateway.retry_after_s
            raise Overloaded(full.message, code=full.code, retry_after=retry) from None

    async def _base(
        self, who: Principal, model: str
    ) -> tuple[EndpointStatus, AdapterRecord | None]:
        """The endpoint that will serve what comes of it, and the adapter that it goes on from.

        Raises NotFound for what does not exist or is not theirs to see, InvalidRequest for what
        cannot be fine-tuned.
        """
        route = await self._services.route(who, model)
        base = route.endpoint
        if base is None:
            raise _not_tunable(model, "is an external model: its weights are not here")
        if base.task != "generate":
            raise _not_tunable(model, "makes embeddings; only what generates text is fine-tuned")
        if base.state is EndpointState.DELETE_IN_PROGRESS:
            raise missing(model)
        if not base.max_adapters:
            raise _not_tunable(
                model,
                f"cannot be fine-tuned: its endpoint '{base.name}' takes no adapters. Operators: "
                "max_adapters in its settings says how many",
            )
        return base, route.adapter


def _check_rank(
    asked: dict[str, Any], base: EndpointStatus, parent: AdapterRecord | None, where: str
) -> dict[str, Any]:
    """What the endpoint could not serve must not be trained. Raises InvalidRequest."""
    rank, most = asked.get("lora_rank", AUTO), base.max_adapter_rank
    if rank == AUTO:
        return asked if parent or most >= RANK else asked | {"lora_rank": most}
    if parent is not None and rank != parent.rank:
        why = f"'{parent.name}', which this goes on from, has the rank {parent.rank}."
    elif rank > most:
        why = (
            f"'{base.name}' serves no adapter of a larger rank than {most}. Operators: "
            "max_adapter_rank in its settings."
        )
    else:
        return asked
    param = f"{where}.lora_rank"
    raise InvalidRequest(f"'{param}' cannot be {rank}: {why}", param=param, code="invalid_value")


def _check_modules(asked: dict[str, Any], base: EndpointStatus, where: str) -> None:
    """What the demo model's engines would leave out must not be trained: it would have learnt
    nothing. Raises InvalidRequest."""
    modules = asked.get("target_modules", AUTO)
    if base.model != "builtin:chat" or modules in (AUTO, ALL_LINEAR):
        return
    unserved = [m for m in modules if m.rpartition(".")[2] not in BUILTIN_CHAT_MODULES]
    if unserved:
        param = f"{where}.target_modules"
        raise InvalidRequest(
            f"'{param}' cannot have '{unserved[0]}': '{base.name}' serves adapters of "
            f"{', '.join(BUILTIN_CHAT_MODULES)}.",
            param=param,
            code="invalid_value",
        )


def _not_tunable(model: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The model '{model[:200]}' {why}.", param="model", code="model_not_supported"
    )
