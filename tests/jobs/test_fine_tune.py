"""One fine-tune from its file to its adapter: `python -m jobs.fine_tune`, with a trainer that
learns nothing. The real one is in test_fine_tune_training.py."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llm_engine import patience
from llm_engine.errors import StorageUnavailable
from llm_engine.fine_tunes.job import Job
from llm_engine.fine_tunes.results import MOST_EVENTS
from llm_engine.ids import new_id
from llm_engine.statuses import FineTuneState
from tests.support.cluster import eventually
from tests.support.fake_trainer import FIRST, learned, loss_of
from tests.support.fine_tunes import Bench, example, fine_tune_record, freeze, jsonl

pytestmark = pytest.mark.slow

SLOW = {"step_s": 0.05}
FAKE = [sys.executable, "-m", "tests.support.fake_trainer"]
_S = FineTuneState


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("fine-tunes"), max_rows=500, max_idle_starts=3)
    yield bench
    bench.close()


# -- from beginning to end


def test_a_file_becomes_a_model(bench, tmp_path):
    tune = bench.tune(40, valid=8)  # of 4 a step, twice
    code, printed, record = bench.run(tune)
    assert code == 0, printed
    bench.verify(tune, tmp_path, 20)
    assert record.trained_tokens == 800 and record.plan["n_epochs"] == 2
    assert (record.error, record.reason, record.idle_starts) == (None, None, 0)
    order = ["validating_files", "queued", "running", "succeeded"]
    assert sorted(record.times, key=record.times.__getitem__) == order
    assert "a line that is no event" in printed and record.name in printed


def test_its_events_are_openais(bench):
    tune = bench.tune(40, valid=8)
    bench.run(tune)
    assert bench.messages(tune) == [
        f"Created fine-tuning job: {tune.id}",
        f"Validating training file: {tune.training_file_id}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Checkpoint created at step 10",
        "Checkpoint created at step 20",
        f"New fine-tuned model created: {tune.name}",
        "The job has successfully completed",
    ]
    metrics = [event for event in bench.events(tune) if event.type == "metrics"]
    assert [event.data["step"] for event in metrics] == list(range(1, 21))
    first, last = metrics[0], metrics[-1]
    assert first.message == f"Step 1/20: training loss={loss_of(learned(1)):.4g}"
    assert first.data == {
        "step": 1, "total_steps": 20, "train_loss": loss_of(learned(1)), "epoch": 0.1,
        "train_mean_token_accuracy": 0.5, "learning_rate": 0.001,
    }  # fmt: skip
    assert last.message.endswith(", validation loss=0.5") and last.data["valid_loss"] == 0.5


def test_the_adapter_lies_in_the_storage_as_it_is_served(bench, tmp_path):
    tune = bench.tune(40)
    _, _, record = bench.run(tune)
    manifest = bench.fetch(record.adapter, tmp_path / "adapter")
    assert {file.name for file in manifest.files} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "README.md",
        "tokenizer.json",
    }  # fmt: skip
    kept = bench.store.adapters.get(tune.name)
    assert kept.bytes == sum(file.bytes for file in manifest.files)
    assert (kept.id, kept.owner, kept.base, kept.rank) == (record.adapter, "ann", "demo-chat", 8)
    assert (manifest.name, manifest.fine_tune, manifest.step) == (tune.name, tune.id, None)
    assert manifest.metrics == kept.metrics == {"train_loss": loss_of(learned(20))}
    assert (tmp_path / "adapter" / "README.md").read_text() == f"# {tune.name}\n"


def test_the_result_file_is_its_owners(bench):
    tune = bench.tune(40, valid=8)
    _, _, record = bench.run(tune)
    file = bench.store.files.get(record.result_file_id)
    assert (file.owner, file.purpose, file.filename) == (
        "ann", "fine-tune-results", "step_metrics.csv",
    )  # fmt: skip
    data = b"".join(bench.storage.read(file.key))
    assert len(data) == file.bytes
    lines = data.decode().splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert lines[1].endswith(",0.5,,") and lines[20].endswith(",0.5,0.5,0.75")


def test_the_last_checkpoints_can_be_served_and_no_others(bench, tmp_path):
    tune = bench.tune(40, asked={"n_epochs": 5})
    bench.run(tune)
    kept = bench.checkpoints(tune)
    assert [(each.step, each.name) for each in kept] == [
        (step, f"{tune.name}:ckpt-step-{step}") for step in (30, 40, 50)
    ]
    assert [each.metrics["step"] for each in kept] == [30, 40, 50]
    assert bench.learned(kept[0].id, tmp_path / "a") == learned(30)
    gone = [each.id for each in bench.store.adapters.deleted() if each.fine_tune == tune.id]
    assert len(gone) == 2


def test_a_checkpoint_that_another_one_goes_on_from_is_not_pruned(bench):
    tune = bench.tune(40, {"step_s": 0.1}, asked={"n_epochs": 5})
    with bench.start(tune) as job:
        first = eventually(lambda: bench.checkpoints(tune))[0]
        later = bench.tune(40, parent=first.id)
        printed, _ = job.communicate(timeout=60)
    assert job.returncode == 0, printed
    assert [each.step for each in bench.checkpoints(tune)] == [10, 30, 40, 50]
    bench.store.fine_tunes.ask_cancel(later.id)


def test_a_long_run_has_no_more_events_than_anybody_reads(bench):
    tune = bench.tune(499, {"step_s": 0}, asked={"batch_size": 1, "n_epochs": 3})
    _, printed, record = bench.run(tune)
    told = bench.told_steps(tune)
    assert record.total_steps == 1497 and len(bench.rows(tune)) == 1497, printed
    assert told[0] == 1 and told[-1] == 1497 and MOST_EVENTS / 2 < len(told) <= MOST_EVENTS


def test_a_csv_file_is_taken_and_a_share_of_it_held_out(bench):
    rows = "".join(f'{i},"question {i}","answer {i}"\n' for i in range(50))
    file = bench.file(f"number,prompt,response\n{rows}".encode(), name="train.csv")
    tune = bench.tune(b"", training_file_id=file, asked={"validation_split": 0.1})
    _, printed, record = bench.run(tune)
    assert record.state is _S.SUCCEEDED, printed
    assert record.plan["examples"] == 45 and bench.rows(tune)[-1]["valid_loss"] == "0.5"


def test_what_is_cut_is_told_with_its_lines(bench):
    tune = bench.tune(20, {"too_long": [3, 17]})
    bench.run(tune)
    (warning,) = [event for event in bench.events(tune) if event.level == "warn"]
    assert "2 of 20 examples are longer than 2048 tokens" in warning.message
    assert warning.message.endswith("lines: 3, 17")


# -- what is wrong with what it was given


def failed_with(bench: Bench, tune) -> dict[str, Any]:
    code, printed, record = bench.run(tune)
    assert (code, record.state) == (0, _S.FAILED), printed
    assert "Traceback" not in printed and record.adapter is record.result_file_id is None
    assert bench.messages(tune)[-1] == f"The job failed: {record.error['message']}"
    assert bench.events(tune)[-1].level == "error"
    assert bench.left_over(tune) == []
    return record.error


def test_a_file_with_mistakes_fails_with_their_lines(bench):
    rows = list(map(example, range(20)))
    rows[3]["messages"][0]["role"] = "nobody"
    error = failed_with(bench, bench.tune(jsonl(rows) + b"oops\n"))
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert "Line 4:" in error["message"] and "Line 21:" in error["message"]


def test_a_validation_file_with_mistakes_is_told_as_that(bench):
    file = bench.file(b'{"messages": []}\n')
    error = failed_with(bench, bench.tune(validation_file_id=file))
    assert (error["code"], error["param"]) == ("invalid_validation_file", "validation_file")


def test_too_few_examples_are_refused(bench):
    error = failed_with(bench, bench.tune(9))
    assert error["code"] == "invalid_n_examples" and "has 9 example(s)" in error["message"]


def test_too_many_examples_and_too_large_files_are_refused(bench, tmp_path):
    assert "more than 500 examples" in failed_with(bench, bench.tune(501))["message"]
    small = Bench(tmp_path, max_file_bytes=100)
    assert failed_with(small, small.tune())["code"] == "file_too_large"
    small.close()


@pytest.mark.parametrize("which", ["training_file", "validation_file"])
@pytest.mark.parametrize("file", ["file-none", "somebody-elses", "without-bytes"])
def test_a_file_that_is_not_theirs_does_not_exist(bench, which, file):
    if file != "file-none":
        owner = "bob" if file == "somebody-elses" else "ann"
        made = bench.file(jsonl(map(example, range(20))), owner=owner)
        if file == "without-bytes":
            bench.storage.delete(bench.store.files.get(made).key)
        file = made
    error = failed_with(bench, bench.tune(**{f"{which}_id": file}))
    assert (error["code"], error["param"]) == (f"invalid_{which}", which)
    assert error["message"] == f"The file '{file}' does not exist or has been deleted."


def test_who_sees_all_may_use_every_file(bench):
    file = bench.file(jsonl(map(example, range(20))), owner="bob")
    _, _, record = bench.run(bench.tune(training_file_id=file, sees_all=True))
    assert record.state is _S.SUCCEEDED


def test_weights_that_are_nowhere_are_told(bench):
    error = failed_with(bench, bench.tune(weights="/no/such/model"))
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert failed_with(bench, bench.tune(weights="builtin:none"))["code"] == "model_not_found"


def test_what_the_trainer_refuses_is_the_error(bench):
    refusal = {"code": "training_diverged", "message": "The loss was no number.", "line": 3,
               "param": "learning_rate_multiplier"}  # fmt: skip
    error = failed_with(bench, bench.tune(fake={"fail": refusal}))
    assert error == {"code": "training_diverged", "message": "Line 3: The loss was no number.",
                     "param": "learning_rate_multiplier"}  # fmt: skip


def test_a_loss_that_is_no_number_hurts_no_record(bench):
    tune = bench.tune(fake={"nan_at": 3})
    _, printed, record = bench.run(tune)
    assert record.state is _S.SUCCEEDED, printed
    assert bench.rows(tune)[2]["train_loss"] == ""
    assert "not a number" in bench.events(tune)[6].message


# -- a fine-tune of a fine-tune


def test_it_goes_on_from_another_ones_adapter(bench):
    first = bench.tune(40)
    _, _, record = bench.run(first)
    _, printed, second = bench.run(bench.tune(40, parent=record.adapter))
    assert second.state is _S.SUCCEEDED, printed


def test_a_parent_that_is_gone_or_damaged_is_told(bench):
    _, _, first = bench.run(bench.tune(40))
    key = f"adapters/{first.adapter}/adapter_model.safetensors"
    bench.storage.put(key, b"x" * 7)
    error = failed_with(bench, bench.tune(40, parent=first.adapter))
    assert (error["code"], error["param"]) == ("model_damaged", "model")
    error = failed_with(bench, bench.tune(40, parent="adapter-none"))
    assert (error["code"], error["param"]) == ("model_not_found", "model")


# -- what stops it


def run_until(bench: Bench, tune, step: int, then) -> tuple[int, str, Any]:
    """Start it, call `then` once so many steps are durable, and see the job to its end."""
    with bench.start(tune) as job:
        eventually(lambda: bench.get(tune).step >= step, 30, 0.02, "no progress")
        then(job)
        printed, _ = job.communicate(timeout=30)
    return job.returncode, printed, bench.get(tune)


def test_told_to_stop_it_keeps_a_checkpoint_and_another_job_goes_on(bench, tmp_path):
    tune = bench.tune(40, SLOW)
    code, printed, record = run_until(bench, tune, 4, lambda job: job.terminate())
    assert code == 1 and "told to stop" in printed and "Traceback" not in printed
    assert (record.state, record.worker, record.idle_starts) == (_S.RUNNING, None, 0)
    assert record.reason == "its job was told to stop" and bench.trainers() == []
    at = record.step
    code, printed, record = bench.run(tune)
    assert code == 0, printed
    bench.verify(tune, tmp_path, 20)
    assert f"Training goes on from the checkpoint at step {at}" in bench.messages(tune)


def test_told_to_stop_before_it_trains_it_leaves_at_once(bench):
    tune = bench.tune(40)
    with bench.start(tune) as job:
        eventually(lambda: bench.get(tune).worker, 20, 0.01, "it is not claimed")
        job.terminate()
        job.communicate(timeout=20)
    record = bench.get(tune)
    if record.state is not _S.SUCCEEDED:
        assert job.returncode == 1 and (record.worker, record.idle_starts) == (None, 0)


def test_a_paused_one_rests_and_goes_on_where_it_was(bench, tmp_path):
    tune = bench.tune(40, SLOW)
    code, printed, record = run_until(
        bench, tune, 4, lambda _: bench.store.fine_tunes.pause(tune.id)
    )
    assert (code, record.state, record.worker) == (0, _S.PAUSED, None), printed
    assert record.step >= 4 and record.idle_starts == 0 and bench.trainers() == []
    at = record.step
    code, printed, record = bench.run(tune)
    assert code == 0 and "nothing to do" in printed and record.state is _S.PAUSED
    assert bench.store.fine_tunes.resume(tune.id).state is _S.QUEUED
    bench.run(tune)
    bench.verify(tune, tmp_path, 20)
    texts = [text for text in bench.messages(tune) if not text.startswith("Checkpoint")]
    assert texts[texts.index("The job was paused") :][:3] == [
        "The job was paused",
        "The job was resumed and moved to queued state",
        f"Training goes on from the checkpoint at step {at}",
    ]


def test_one_that_is_resumed_before_it_rests_never_does(bench, tmp_path):
    tune = bench.tune(40, SLOW)

    def blink(_: object) -> None:
        bench.store.fine_tunes.pause(tune.id)
        bench.store.fine_tunes.resume(tune.id)

    code, _, _ = run_until(bench, tune, 4, blink)
    if code:  # it had noticed all the same, and left
        bench.run(tune)
    else:
        assert "Training goes on" in bench.messages(tune)
    bench.verify(tune, tmp_path, 20)


def test_a_trainer_that_does_not_listen_is_ended(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_engine.fine_tunes.child.STOP_S", 1.0)
    tune = bench.tune(40, {"deaf": True, "hang_at": 5})
    job = Job(bench.settings, bench.store, bench.storage, print, FAKE)

    async def run() -> None:
        running = asyncio.create_task(job.run(tune.id))
        while bench.get(tune).state is not _S.RUNNING:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        bench.store.fine_tunes.pause(tune.id)
        await asyncio.wait_for(running, 20)

    asyncio.run(run())
    assert (bench.get(tune).state, bench.get(tune).worker) == (_S.PAUSED, None)


def test_a_cancelled_one_leaves_nothing_behind(bench):
    tune = bench.tune(40, SLOW, asked={"n_epochs": 9})
    began = time.monotonic()
    code, printed, record = run_until(
        bench, tune, 4, lambda _: bench.store.fine_tunes.ask_cancel(tune.id)
    )
    assert (code, record.state, record.adapter) == (0, _S.CANCELLED, None)
    assert "nothing to do" in printed and time.monotonic() - began < 15
    assert bench.left_over(tune) == [] and bench.trainers() == []
    assert list(bench.temporary.glob("llm-engine-fine-tune-*")) == []
    assert bench.messages(tune)[-1] == "The job was cancelled"


def test_one_that_somebody_works_on_or_that_has_ended_is_left_alone(bench):
    tune = bench.tune()
    bench.store.fine_tunes.claim(tune.id, "another", 60)
    code, printed, record = bench.run(tune)
    assert code == 0 and record.worker == "another" and "nothing to do" in printed
    with bench.start(fine_tune_record()) as job:
        assert "nothing to do" in job.communicate(timeout=20)[0] and job.returncode == 0


def test_what_a_zombie_does_counts_for_nothing(bench, tmp_path):
    tune = bench.tune(40, SLOW)
    with bench.start(tune) as zombie:
        eventually(lambda: bench.get(tune).step > 3, 30, 0.02, "no progress")
        freeze(bench, zombie)
        try:
            eventually(lambda: bench.get(tune).lease_until < time.time(), 10, 0.1, "it lives on")
            code, printed, _ = bench.run(tune)
            assert code == 0, printed
        finally:
            zombie.send_signal(signal.SIGCONT)
        printed, _ = zombie.communicate(timeout=20)
    assert zombie.returncode == 0 and "nothing to do" in printed
    bench.verify(tune, tmp_path, 20)


# -- what dies


def test_a_trainer_that_dies_is_started_again_by_the_next_job(bench, tmp_path):
    tune = bench.tune(40, SLOW | {"die_at": 15})
    code, printed, record = bench.run(tune)
    assert code == 1 and "Traceback" not in printed
    assert (record.state, record.worker) == (_S.RUNNING, None)
    assert record.reason.startswith("its trainer died") and "SIGKILL" in record.reason
    assert 0 < record.step < 15
    bench.run(tune)
    bench.verify(tune, tmp_path, 20)


def test_one_whose_trainer_always_dies_fails_and_says_why(bench):
    limit = bench.settings.fine_tunes.max_idle_starts
    tune = bench.tune(40, {"always_die_at": 2})
    for _ in range(limit - 1):
        code, printed, record = bench.run(tune)
        assert (code, record.state) == (1, _S.RUNNING), printed
    error = failed_with(bench, tune)
    assert error["code"] == "trainer_failed"
    assert error["message"].endswith(
        "the last time it ended with exit code 3: ValueError: no luck."
    )


def test_what_ended_the_trainer_is_told_and_not_what_it_said_afterwards(bench):
    words = (
        "Traceback ...\n  line 3\nOSError: there is no such model\nsee there\n  <no Python frame>"
    )
    tune = bench.tune(40, {"always_die_at": 2, "last_words": words})
    _, _, record = bench.run(tune)
    assert record.reason.endswith("exit code 3: OSError: there is no such model")


def test_memory_that_runs_out_is_told_in_a_sentence(bench):
    words = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    tune = bench.tune(40, {"always_die_at": 2, "last_words": words})
    _, _, record = bench.run(tune)
    assert "ran out of memory; a smaller batch_size" in record.reason


def test_a_damaged_checkpoint_is_not_gone_on_from(bench, tmp_path):
    tune = bench.tune(40, SLOW)
    _, _, record = run_until(bench, tune, 4, lambda job: job.terminate())
    key = next(k for k in bench.left_over(tune) if k.endswith("/trainer_state.json"))
    bench.storage.put(key, b"{}")
    bench.run(tune)
    bench.verify(tune, tmp_path, 20)
    texts = bench.messages(tune)
    assert f"The checkpoint at step {record.step} is damaged and cannot be used" in texts
    assert any(text.startswith("Training starts again from the beginning") for text in texts)


def test_a_storage_that_is_away_for_long_counts_against_no_fine_tune(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.3)
    tune = bench.tune(40)

    def away(*_):
        raise StorageUnavailable("The storage does not answer.")

    monkeypatch.setattr(bench.storage, "put", away)
    job = Job(bench.settings, bench.store, bench.storage, print, FAKE)
    with pytest.raises(StorageUnavailable):
        asyncio.run(job.run(tune.id))
    record = bench.get(tune)
    assert (record.worker, record.starts, record.idle_starts) == (None, 1, 0)
    assert record.reason == "its storage is away: The storage does not answer."
    monkeypatch.undo()
    bench.run(tune)
    bench.verify(tune, tmp_path, 20)


@pytest.mark.slow
def test_a_store_that_is_away_for_longer_than_a_lease_is_waited_out(bench, tmp_path):
    tune = bench.tune(40, SLOW)

    def lock(_):
        with bench.store.database.writing():
            time.sleep(8)  # longer than SQLite waits for a lock

    code, printed, record = run_until(bench, tune, 4, lock)
    assert code == 0 and record.starts == 1, printed
    bench.verify(tune, tmp_path, 20)


# -- the process


def test_its_progress_is_printed_and_told(bench):
    tune = bench.tune(40, {"step_s": 0.3}, asked={"n_epochs": 3})
    with bench.start(tune) as job:
        told = eventually(lambda: bench.get(tune).progress.get("left_s"), 20, 0.1)
        assert told > 0 and {"steps_per_s", "tokens_per_s", "train_loss", "epoch", "step"} <= set(
            bench.get(tune).progress
        )
        line = next(line for line in job.stdout if " step " in line)
        assert "/30 (" in line and "steps/s" in line and "left" in line
        bench.store.fine_tunes.ask_cancel(tune.id)
        job.communicate(timeout=20)


def test_its_secrets_do_not_reach_the_trainer(bench, monkeypatch):
    monkeypatch.setenv("LLM_ENGINE_SECRET_KEY", "s3cret")
    words = "import os; print(os.environ.get('LLM_ENGINE_SECRET_KEY'))"
    said: list[str] = []
    trainer = [sys.executable, "-c", words]
    job = Job(bench.settings, bench.store, bench.storage, said.append, trainer)
    with pytest.raises(Exception, match="exit code 0"):
        asyncio.run(job.run(bench.tune().id))
    assert said == ["None"]


def test_a_job_without_settings_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "jobs.fine_tune", new_id("ftjob", "-")],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 1 and "LLM_ENGINE_JOB is not set" in done.stdout


def test_a_job_brings_nothing_heavy_along():
    loaded = "import jobs.fine_tune, json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    heavy = {"ray", "pandas", "numpy", "fastapi", "boto3", "aiohttp", "httpx", "torch", "vllm"}
    assert not heavy & set(json.loads(done.stdout))


def test_the_number_that_it_learns_tells_steps_apart():
    assert len({FIRST, *map(learned, range(1, 500))}) == 500
