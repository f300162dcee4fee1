"""What the keeper does about each batch, and each fine-tune."""

from typing import Any

import pytest

from llm_engine.keeping import Deed, Seen, decide
from llm_engine.records import BatchRecord, FineTuneRecord
from llm_engine.statuses import BatchState, FineTuneState

NOW = 1_000_000.0
LEASE_S = 15.0
RUNS, STARTS = Seen(True, True, "running", 1.0), Seen(True, False, "waits for CPUs")
ENDED = Seen(False, False, "killed by SIGKILL")


def batch(name: str = "b", **facts: Any) -> BatchRecord:
    given: dict[str, Any] = {"owner": "ann", "dialect": "openai", "endpoint": "/v1/completions"}
    given |= {"input_file_id": "file-1", "window_s": 86400.0, "state": BatchState.IN_PROGRESS}
    given |= {"created_at": NOW - 60, "expires_at": NOW + 86000, "starts": 1}
    return BatchRecord(name, **given | facts)


def leased(name: str = "b", **facts: Any) -> BatchRecord:
    return batch(name, worker="host:1", lease_until=NOW + 10, **facts)


def deed(record: BatchRecord | FineTuneRecord, job: Seen | None, unclaimed: int = 0) -> Deed:
    return together([record], {record.id: job}, unclaimed={record.id: unclaimed})[record.id]


def together(records: list[Any], jobs: dict[str, Seen | None], **limits: Any) -> dict[str, Deed]:
    given: dict[str, Any] = {"max_running": 2, "max_idle_starts": 3, "lease_s": LEASE_S}
    return decide(records, jobs, NOW, **given | {"unclaimed": {}, "started": {}} | limits)


def test_a_new_batch_gets_a_job():
    assert deed(batch(state=BatchState.VALIDATING, starts=0), None) is Deed.START


def test_a_batch_with_a_living_worker_is_left_alone():
    assert deed(leased(), RUNS) is Deed.NOTHING


def test_a_job_that_ended_is_not_waited_for():
    assert deed(leased(), ENDED) is Deed.RELEASE


def test_the_next_job_starts_once_the_lease_is_gone():
    assert deed(batch(worker="host:1", lease_until=NOW - 1), ENDED) is Deed.START


def test_a_job_that_ray_has_forgotten_may_still_work():
    assert deed(leased(), None) is Deed.NOTHING
    assert deed(batch(worker="host:1", lease_until=NOW - 1), None) is Deed.START


def test_a_job_that_is_on_its_way_is_waited_for():
    assert deed(batch(), STARTS) is Deed.NOTHING
    assert deed(batch(), RUNS) is Deed.NOTHING


def test_a_process_that_never_claims_its_batch_is_ended():
    assert deed(batch(), Seen(True, True, "", 4 * LEASE_S + 1)) is Deed.STOP


def test_a_job_whose_lease_has_ended_while_the_store_was_away_may_take_it_again():
    old = Seen(True, True, "", 3600.0)
    assert deed(batch(worker="host:1", lease_until=NOW - 1), old) is Deed.NOTHING
    assert deed(batch(worker="host:1", lease_until=NOW - 100), old) is Deed.NOTHING
    assert deed(batch(worker="host:1", lease_until=NOW - 121), old) is Deed.STOP
    assert deed(batch(worker="host:1", lease_until=NOW - 121), RUNS) is Deed.NOTHING  # another one


def test_jobs_that_die_one_after_the_other_are_given_up():
    assert deed(batch(idle_starts=3), ENDED) is Deed.GIVE_UP
    assert deed(batch(starts=0), ENDED, unclaimed=3) is Deed.GIVE_UP
    assert deed(batch(idle_starts=2), ENDED) is Deed.START


def test_what_they_have_finished_is_not_given_up():
    assert deed(batch(idle_starts=3, completed=1), ENDED) is Deed.CONCLUDE
    assert deed(batch(idle_starts=3, failed=1), ENDED) is Deed.CONCLUDE


@pytest.mark.parametrize("state", [BatchState.FINALIZING, BatchState.CANCELLING])
def test_finished_rows_wait_for_a_disk_or_a_storage_that_comes_back(state: BatchState):
    """A job that dies while it puts them together says nothing about them."""

    def after(seconds: float, idle_starts: int, **facts: Any) -> Deed:
        facts = {"completed": 1, "state": state, "idle_starts": idle_starts} | facts
        started = {"b": NOW - seconds}
        return together([batch(**facts)], {"b": ENDED}, started=started)["b"]

    assert after(1, 2) is Deed.START
    assert after(299, 3) is Deed.REST and after(301, 3) is Deed.START
    assert after(599, 4) is Deed.REST and after(601, 4) is Deed.START
    assert after(3599, 999) is Deed.REST and after(3601, 999) is Deed.START
    assert deed(batch(state=state, completed=1), ENDED, unclaimed=9) is Deed.START  # none knows
    late, too_late = NOW - 86_000, NOW - 86_401
    assert after(3601, 9, expires_at=late) is Deed.START
    assert after(3601, 9, expires_at=too_late) is Deed.GIVE_UP
    assert after(3601, 2, expires_at=too_late) is Deed.START
    assert after(1, 3, completed=0) is Deed.GIVE_UP
    assert after(1, 3, completed=0, failed=1) is Deed.REST


def test_what_was_cancelled_before_any_job_began_it_ends_without_one():
    assert deed(batch(starts=0, state=BatchState.CANCELLING), None) is Deed.END
    begun = batch(starts=1, state=BatchState.CANCELLING)
    assert deed(begun, None) is Deed.START  # to put its results together


def test_what_was_never_begun_in_its_time_gets_a_job_that_says_so_of_every_row():
    for starts in (0, 1):
        late = batch(starts=starts, state=BatchState.VALIDATING, expires_at=NOW - 1)
        assert deed(late, None) is Deed.START


def test_what_is_over_is_soon_done_and_comes_before_others():
    records = [
        leased("a0"), leased("b0", owner="bob"), batch("a1", expires_at=NOW - 1, starts=0),
        batch("a2", expires_at=NOW + 1), batch("b1", owner="bob"),
    ]  # fmt: skip
    jobs = dict.fromkeys(r.id for r in records) | {"a0": RUNS, "b0": RUNS}
    deeds = together(records, jobs, max_running=3)
    assert [name for name, each in deeds.items() if each is Deed.START] == ["a1"]


def test_no_more_jobs_than_allowed():
    records = [batch(f"b{i}") for i in range(4)]
    deeds = together(records, dict.fromkeys("b0 b1 b2 b3".split()))
    assert list(deeds.values()).count(Deed.START) == 2


def test_a_job_that_works_or_starts_counts():
    records = [leased("b0"), batch("b1"), batch("b2")]
    deeds = together(records, {"b0": RUNS, "b1": STARTS, "b2": None})
    assert deeds["b2"] is Deed.NOTHING


def test_owners_take_turns_and_the_earliest_deadline_is_first():
    records = [
        leased("a0"), batch("a1", expires_at=NOW + 10), batch("a2"),
        batch("b0", owner="bob", expires_at=NOW + 99), batch("b1", owner="bob", expires_at=NOW + 5),
    ]  # fmt: skip
    jobs = dict.fromkeys(r.id for r in records) | {"a0": RUNS}
    started = [k for k, v in together(records, jobs, max_running=3).items() if v is Deed.START]
    assert started == ["a1", "b1"]


def test_an_owner_without_any_waits_for_nobody_elses():
    """Ann's may wait for a model that is away, until their windows end."""
    names = [("a0", "ann"), ("a1", "ann"), ("a2", "ann"), ("b0", "bob"), ("b1", "bob")]
    names += [("c0", "cleo"), ("d0", "dan")]
    records = [batch(name, owner=owner) for name, owner in names]
    jobs = dict.fromkeys((name for name, _ in names), None)
    started = [k for k, v in together(records, jobs).items() if v is Deed.START]
    assert started == ["a0", "b0", "c0", "d0"]  # and no more: twice two
    begun = jobs | {"a0": RUNS, "a1": RUNS}
    started = [k for k, v in together(records[:5], begun).items() if v is Deed.START]
    assert started == ["b0"]  # one, not two
    held = begun | {"b0": RUNS, "c0": RUNS}
    assert Deed.START not in together(records, held).values()


# -- fine-tunes


def fine_tune(name: str = "f", **facts: Any) -> FineTuneRecord:
    given: dict[str, Any] = {"owner": "ann", "dialect": "openai", "base": "m", "weights": "w"}
    given |= {"training_file_id": "file-1", "method": "supervised", "name": f"ft:{name}"}
    given |= {"seed": 1, "state": FineTuneState.RUNNING, "created_at": NOW - 60, "starts": 1}
    return FineTuneRecord(name, **given | facts)


@pytest.mark.parametrize("state", ["validating_files", "queued", "running"])
def test_a_fine_tune_that_goes_on_gets_a_job(state: str):
    assert deed(fine_tune(state=FineTuneState(state)), ENDED) is Deed.START
    assert deed(fine_tune(state=FineTuneState(state), starts=0), None) is Deed.START


def test_one_that_rests_gets_none_whatever_became_of_its_jobs():
    rests = {"state": FineTuneState.PAUSED}
    assert deed(fine_tune(**rests), ENDED) is Deed.NOTHING
    assert deed(fine_tune(**rests, idle_starts=9), None) is Deed.NOTHING
    dead = fine_tune(**rests, worker="host:1", lease_until=NOW + 10)
    assert deed(dead, ENDED) is Deed.RELEASE and deed(dead, RUNS) is Deed.NOTHING


def test_fine_tunes_are_given_up_whole():
    assert deed(fine_tune(idle_starts=3, step=10), ENDED) is Deed.GIVE_UP
    assert deed(fine_tune(starts=0), ENDED, unclaimed=3) is Deed.GIVE_UP


def test_the_fine_tune_that_was_made_first_is_next():
    records = [fine_tune("new", created_at=NOW - 1), fine_tune("old", created_at=NOW - 9)]
    jobs = dict.fromkeys(r.id for r in records)
    deeds = together(records, jobs, max_running=1)
    assert deeds == {"new": Deed.NOTHING, "old": Deed.START}


def test_of_fine_tunes_no_more_run_than_allowed_whoever_they_are_of():
    records = [fine_tune("f0"), fine_tune("f1", owner="bob")]
    assert together(records, {"f0": RUNS, "f1": None}, max_running=1)["f1"] is Deed.NOTHING
