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
#: From the start of a job that did not come to a batch's end to the next one's, doubled each time.
#: Rows that are finished wait for a disk or a storage that comes back: nothing is lost by waiting.
REST_S, LONGEST_REST_S = 300.0, 3600.0
#: For so long after its window they try to bring such a batch to its end.
ENDING_S = 86400.0


class Deed(StrEnum):
    NOTHING = "nothing"
    START = "start"  # a job
    RELEASE = "release"  # its worker is dead: the lease ends now
    STOP = "stop"  # its job, which does not do anything
    END = "end"  # without a job: it was cancelled before any had begun it, and has no results
    REST = "rest"  # jobs die while they put results together: the next one starts later
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
    started: Mapping[str, float],
) -> dict[str, Deed]:
    """By the record's id. `jobs`: by the record's id, too; the last one of each. `unclaimed`: how
    many jobs in a row did not even get as far as to claim it. `started`: when its last job was, as
    far as anybody remembers."""
    deeds: dict[str, Deed] = {}
    waiting: list[BatchRecord | FineTuneRecord] = []
    busy: Counter[str] = Counter()  # jobs, by owner
    for record in records:
        job = jobs.get(record.id)
        too_many = record.idle_starts + unclaimed.get(record.id, 0) - max_idle_starts
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
        elif too_many >= 0 and not _is_ending(record, now):
            deeds[record.id] = Deed.CONCLUDE if _has_results(record) else Deed.GIVE_UP
        elif too_many >= 0 and now < started.get(record.id, 0.0) + _rest_s(too_many):
            deeds[record.id] = Deed.REST
        elif record.state is BatchState.CANCELLING and record.starts == 0:
            deeds[record.id] = Deed.END
        else:
            deeds[record.id] = Deed.NOTHING
            waiting.append(record)
    while may_start := [each for each in waiting if _has_room(each, busy, max_running)]:
        # What is over is soon done. Else whoever has the fewest under way comes first; of one
        # owner's, the most urgent.
        following = min(
            may_start,
            key=lambda each: (not _is_over(each, now), busy[each.owner], _due(each), each.id),
        )
        waiting.remove(following)
        deeds[following.id] = Deed.START
        busy[following.owner] += 1
    return deeds


def _has_room(record: BatchRecord | FineTuneRecord, busy: Counter[str], max_running: int) -> bool:
    """Batches of one owner may wait for a model until their windows end: whoever has none under
    way gets one beyond `max_running`. Fine-tunes do not wait, and hold what they reserve."""
    beyond = isinstance(record, BatchRecord) and not busy[record.owner]
    return busy.total() < (2 * max_running if beyond else max_running)


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


def _is_ending(record: BatchRecord | FineTuneRecord, now: float) -> bool:
    """Its finished rows only have to be put together, and it is not too late for that."""
    return (
        isinstance(record, BatchRecord)
        and record.state in (BatchState.FINALIZING, BatchState.CANCELLING)
        and record.completed + record.failed > 0
        and now < record.expires_at + ENDING_S
    )


def _rest_s(too_many: int) -> float:
    """`too_many`: jobs in a row beyond those that may die without a rest."""
    return min(REST_S * 2 ** min(too_many, 10), LONGEST_REST_S)


def _is_over(record: BatchRecord | FineTuneRecord, now: float) -> bool:
    """Its job has little to do: it runs no row any more, but each has its line in the results."""
    return isinstance(record, BatchRecord) and record.expires_at <= now


def _due(record: BatchRecord | FineTuneRecord) -> float:
    """When it must have ended; a fine-tune: at once."""
    return record.expires_at if isinstance(record, BatchRecord) else record.created_at
