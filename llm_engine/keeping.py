"""What the keeper does about each batch and fine-tune that has not ended: a decision from what is
known. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from llm_engine.patience import PATIENCE_S
from llm_engine.records import BatchRecord, FineTuneRecord
from llm_engine.statuses import BatchState, FineTuneState

#: A job whose process runs has so long to claim its record, in leases.
CLAIM_LEASES = 4


class Deed(StrEnum):
    NOTHING = "nothing"
    START = "start"  # a job
    RELEASE = "release"  # its worker is dead: the lease ends now
    STOP = "stop"  # its job, which does not do anything
    END = "end"  # without a job, as there is nothing to put together
    CONCLUDE = "conclude"  # jobs die without getting any further: what is finished is the result
    GIVE_UP = "give up"  # jobs die without getting anywhere


@dataclass(frozen=True, slots=True)
class Seen:
    """A record's job as Ray sees it; None where Ray knows of none."""

    live: bool
    running: bool
    message: str
    running_for_s: float = 0.0


def decide(
    records: Sequence[BatchRecord] | Sequence[FineTuneRecord],
    jobs: Mapping[str, Seen | None],
    now: float,
    *,
    max_running: int,
    max_idle_starts: int,
    lease_s: float,
    unclaimed: Mapping[str, int],
) -> dict[str, Deed]:
    """By the record's id. `jobs`: by the record's id, too; the last one of each. `unclaimed`: how
    many jobs in a row did not even get as far as to claim it."""
    deeds: dict[str, Deed] = {}
    waiting: list[BatchRecord | FineTuneRecord] = []
    busy: Counter[str] = Counter()  # jobs, by owner
    for record in records:
        job = jobs.get(record.id)
        leased = record.worker is not None and record.lease_until > now
        if leased or (job is not None and job.live):
            busy[record.owner] += 1
        if leased:
            # Ray saw its process end: no need to wait until the lease does.
            dead = job is not None and not job.live
            deeds[record.id] = Deed.RELEASE if dead else Deed.NOTHING
        elif job is not None and job.live:
            hangs = job.running and _hangs(record, job, now, lease_s)
            deeds[record.id] = Deed.STOP if hangs else Deed.NOTHING
        elif record.state is FineTuneState.PAUSED:
            deeds[record.id] = Deed.NOTHING
        elif record.idle_starts + unclaimed.get(record.id, 0) >= max_idle_starts:
            deeds[record.id] = Deed.CONCLUDE if _has_results(record) else Deed.GIVE_UP
        elif _is_empty(record, now):
            deeds[record.id] = Deed.END
        else:
            deeds[record.id] = Deed.NOTHING
            waiting.append(record)
    free = max_running - sum(busy.values())
    while waiting and free > 0:
        # Whoever has the fewest under way comes first; of one owner's, the most urgent.
        following = min(waiting, key=lambda each: (busy[each.owner], _due(each), each.id))
        waiting.remove(following)
        deeds[following.id] = Deed.START
        busy[following.owner] += 1
        free -= 1
    return deeds


def _hangs(record: BatchRecord | FineTuneRecord, job: Seen, now: float, lease_s: float) -> bool:
    if record.worker is None:
        return job.running_for_s > CLAIM_LEASES * lease_s
    # Its lease has ended, as all do while the store is away: it waits that out, and goes on.
    return min(job.running_for_s, now - record.lease_until) > PATIENCE_S


def _has_results(record: BatchRecord | FineTuneRecord) -> bool:
    """Some of its rows are finished. Of a fine-tune the whole is wanted, or nothing."""
    return (
        isinstance(record, BatchRecord)
        and record.state is BatchState.IN_PROGRESS
        and record.completed + record.failed > 0
    )


def _is_empty(record: BatchRecord | FineTuneRecord, now: float) -> bool:
    """It is over, and no job has ever begun it. A fine-tune that is over has ended."""
    if isinstance(record, FineTuneRecord):
        return False
    over = record.state is BatchState.CANCELLING or record.expires_at <= now
    return over and record.starts == 0


def _due(record: BatchRecord | FineTuneRecord) -> float:
    """When it must have ended; a fine-tune: at once."""
    return record.expires_at if isinstance(record, BatchRecord) else record.created_at
