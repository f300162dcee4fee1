"""What the keeper does about each batch that has not ended: a decision from what is known. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from llm_engine.records import BatchRecord
from llm_engine.statuses import BatchState

#: A job whose process runs has so long to claim its batch, in leases.
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
    """A batch's job as Ray sees it; None where Ray knows of none."""

    live: bool
    running: bool
    message: str
    running_for_s: float = 0.0


def decide(
    batches: Sequence[BatchRecord],
    jobs: Mapping[str, Seen | None],
    now: float,
    *,
    max_running: int,
    max_idle_starts: int,
    lease_s: float,
    unclaimed: Mapping[str, int],
) -> dict[str, Deed]:
    """By the batch's id. `jobs`: by the batch's id, too; the last one of each. `unclaimed`: how
    many jobs in a row did not even get as far as to claim it."""
    deeds: dict[str, Deed] = {}
    waiting: list[BatchRecord] = []
    busy: Counter[str] = Counter()  # jobs, by owner
    for batch in batches:
        job = jobs.get(batch.id)
        leased = batch.worker is not None and batch.lease_until > now
        if leased or (job is not None and job.live):
            busy[batch.owner] += 1
        if leased:
            # Ray saw its process end: no need to wait until the lease does.
            dead = job is not None and not job.live
            deeds[batch.id] = Deed.RELEASE if dead else Deed.NOTHING
        elif job is not None and job.live:
            hangs = job.running and job.running_for_s > CLAIM_LEASES * lease_s
            deeds[batch.id] = Deed.STOP if hangs else Deed.NOTHING
        elif batch.idle_starts + unclaimed.get(batch.id, 0) >= max_idle_starts:
            any_rows = batch.state is BatchState.IN_PROGRESS and batch.completed + batch.failed
            deeds[batch.id] = Deed.CONCLUDE if any_rows else Deed.GIVE_UP
        elif _is_empty(batch, now):
            deeds[batch.id] = Deed.END
        else:
            deeds[batch.id] = Deed.NOTHING
            waiting.append(batch)
    free = max_running - sum(busy.values())
    while waiting and free > 0:
        # Whoever has the fewest under way comes first; of one owner's, the earliest deadline.
        following = min(waiting, key=lambda b: (busy[b.owner], b.expires_at, b.id))
        waiting.remove(following)
        deeds[following.id] = Deed.START
        busy[following.owner] += 1
        free -= 1
    return deeds


def _is_empty(batch: BatchRecord, now: float) -> bool:
    """It is over, and no job has ever begun it."""
    over = batch.state is BatchState.CANCELLING or batch.expires_at <= now
    return over and batch.starts == 0
