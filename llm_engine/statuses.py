"""The states of endpoints, replicas, batches, fine-tunes, responses and streams."""

from enum import StrEnum


class EndpointState(StrEnum):
    #: Wanted, and no replica has been asked for yet.
    UPDATE_PENDING = "UPDATE_PENDING"
    #: Replicas are being placed, are loading weights or are warming up.
    UPDATE_IN_PROGRESS = "UPDATE_IN_PROGRESS"
    #: A replica has answered a request.
    READY = "READY"
    #: No replica can start; `reason` says why. The controller goes on trying if the cause can pass.
    UPDATE_FAILED = "UPDATE_FAILED"
    #: Replicas finish what they have and stop.
    DELETE_IN_PROGRESS = "DELETE_IN_PROGRESS"


class ReplicaState(StrEnum):
    #: The engine process is loading or warming up.
    STARTING = "STARTING"
    #: It has answered a request, and takes more.
    READY = "READY"
    #: It finishes what it has and takes nothing new.
    DRAINING = "DRAINING"
    #: Its engine could not start or died; `reason` says why.
    FAILED = "FAILED"


class BatchState(StrEnum):
    """OpenAI's words; what follows what is drawn in `store/batches.py`."""

    #: Accepted. Its rows are checked as soon as a job runs.
    VALIDATING = "validating"
    #: Not one row ran: the input is wrong, or its model cannot be served; `errors` say why.
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    #: No row runs any more; the results are put together.
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in _FINAL


_FINAL = frozenset(
    {BatchState.FAILED, BatchState.COMPLETED, BatchState.EXPIRED, BatchState.CANCELLED}
)


class FineTuneState(StrEnum):
    """OpenAI's words; what follows what is drawn in `store/fine_tunes.py`."""

    #: Accepted. Its files are checked as soon as a job runs.
    VALIDATING = "validating_files"
    #: Its files are good; it waits for a place to train.
    QUEUED = "queued"
    RUNNING = "running"
    #: Whoever made it has asked it to rest; it goes on from its last checkpoint.
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (FineTuneState.SUCCEEDED, FineTuneState.FAILED, FineTuneState.CANCELLED)


class ResponseState(StrEnum):
    """OpenAI's words; what follows what is drawn in `store/responses.py`."""

    #: In the background, and nobody works on it yet.
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    #: It ran into a limit before its end; what there is of it is there.
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self not in (ResponseState.QUEUED, ResponseState.IN_PROGRESS)


class StreamState(StrEnum):
    """sference's words: a named queue that responses are put into."""

    OPEN = "open"
    #: It takes nothing new, and what had not begun is cancelled.
    CANCELLED = "cancelled"
    #: It takes nothing new; what is in it comes to its end.
    ARCHIVED = "archived"
