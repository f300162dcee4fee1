"""Real training on the demo model: it learns, goes on where it stopped, and does the same twice."""

import json
import math
import os
import signal
import socket
from itertools import islice
from pathlib import Path

import pytest

from llm_engine.demo import lessons
from tests.support.training import (
    Child,
    Speaker,
    few,
    prepared,
    same_weights,
    share,
    shipped,
    spec,
    steps,
    stopped_at,
    trained,
    weights,
)

pytestmark = [pytest.mark.slow, pytest.mark.alone]

FOLDER = {
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "README.md",
}  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The shipped example, with every hyperparameter as it comes."""
    folder = tmp_path_factory.mktemp("desk")
    train, valid = shipped("support", folder), shipped("support", folder, "valid")
    return trained(
        spec(train, folder / "out", valid=valid, name="ft:demo-chat:me::1", base="demo-chat")
    )


@pytest.fixture(scope="module")
def few_lines(tmp_path_factory):
    return few(40, tmp_path_factory.mktemp("few") / "few.jsonl")


def end(events):
    return events[-1]


# -- it learns


def test_the_shipped_example_teaches_its_task(desk, record_property):
    rows = list(islice(lessons.support(held_out=True), 150))
    asked = [row["messages"][:-1] for row in rows]

    def right(row, said):
        return said == row["messages"][-1]["content"]

    before = share(right, rows, Speaker().say(asked))
    after = share(right, rows, Speaker(end(desk)["path"]).say(asked))
    record_property("held_out_accuracy", after)
    assert before <= 0.02 and after >= 0.9


def test_it_keeps_most_of_what_the_model_knew(desk, record_property):
    from llm_engine.demo.measure import accuracy

    speaker = Speaker(end(desk)["path"])
    kept = accuracy(speaker.model, speaker.tokenizer, 150)["held_out_accuracy"]
    record_property("own_questions_still_right", kept)
    assert kept >= 0.7


def test_the_shipped_preferences_make_the_preferred_answer_likelier(tmp_path, record_property):
    events = trained(spec(shipped("polite", tmp_path), tmp_path / "out", method="dpo"))
    rows = list(islice(lessons.polite(held_out=True), 60))

    def wins(speaker):
        def likely(row, kind):
            asked = row["input"]["messages"]
            return speaker.likelihood(asked, row[kind][0]["content"])

        return sum(likely(r, "preferred_output") > likely(r, "non_preferred_output") for r in rows)

    before, after = wins(Speaker()), wins(Speaker(end(events)["path"]))
    record_property("win_rate", after / len(rows))
    assert before <= 3 and after >= 0.9 * len(rows)
    assert end(events)["metrics"]["train_reward_accuracy"] == 1.0


# -- what it tells and leaves


def test_it_tells_what_it_does(desk):
    counted, planned, *_, done = desk
    plan = planned["plan"]
    assert counted | {"tokens_per_epoch": 0} == {
        "event": "counted", "examples": lessons.TRAINING, "validation_examples": lessons.VALIDATION,
        "tokens_per_epoch": 0, "too_long": [], "n_too_long": 0,
    }  # fmt: skip
    told = [event for event in desk if event["event"] == "step"]
    assert [event["step"] for event in told] == list(range(1, plan["total_steps"] + 1))
    for event in told:
        assert event["total_steps"] == plan["total_steps"]
        assert 0 <= event["train_mean_token_accuracy"] <= 1 and event["train_loss"] >= 0
    assert [event["tokens"] for event in told] == sorted(event["tokens"] for event in told)
    tokens = counted["tokens_per_epoch"] * plan["n_epochs"]
    assert told[-1]["tokens"] == done["trained_tokens"] == tokens
    assert told[-1]["epoch"] == plan["n_epochs"]
    looked = [event for event in told if "valid_loss" in event]
    assert plan["n_epochs"] <= len(looked) <= plan["n_epochs"] + 10
    assert looked[-1] is told[-1] and done["metrics"]["valid_loss"] < looked[0]["valid_loss"]


def test_every_epoch_leaves_a_checkpoint_that_can_be_served(desk):
    kept = [event for event in desk if event["event"] == "checkpoint"]
    plan = desk[1]["plan"]
    per_epoch = plan["total_steps"] // plan["n_epochs"]
    assert [e["step"] for e in kept] == [per_epoch * n for n in range(1, plan["n_epochs"] + 1)]
    for event in kept:
        assert event["epoch_end"]
        assert event["metrics"]["full_valid_loss"] == event["metrics"]["valid_loss"]
        assert {file.name for file in Path(event["path"]).iterdir()} >= FOLDER - {"README.md"}
    assert same_weights(kept[-1]["path"], end(desk)["path"])


def test_gone_on_from_the_last_step_it_only_ends(few_lines, tmp_path):
    given = {"asked": {"n_epochs": 1, "batch_size": 8}, "valid": few_lines}
    whole = trained(spec(few_lines, tmp_path / "whole", **given))
    (kept,) = [event for event in whole if event["event"] == "checkpoint"]
    again = trained(spec(few_lines, tmp_path / "again", **given, resume=kept["path"]))
    assert steps(again) == [] and same_weights(end(again)["path"], end(whole)["path"])
    for name in ("trained_tokens", "metrics"):
        assert end(again)[name] == end(whole)[name]


def test_the_result_is_whole(desk):
    folder = Path(end(desk)["path"])
    assert {file.name for file in folder.iterdir()} == FOLDER | {"metrics.json"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "builtin:chat"
    assert config["r"] == desk[1]["plan"]["lora_rank"]
    card = (folder / "README.md").read_text()
    for text in ("ft:demo-chat:me::1", "base_model: builtin:chat", "examples: 700", "lora_rank",
                 "60 more to validate", "loss on the validation file"):  # fmt: skip
        assert text in card
    assert json.loads((folder / "metrics.json").read_text())["plan"] == desk[1]["plan"]
    assert not [path for path in folder.parent.iterdir() if path.name.startswith("rows-")]


# -- twice, and in two parts


def test_a_seed_makes_it_repeatable(few_lines, tmp_path):
    asked = {"n_epochs": 2, "batch_size": 4, "lora_dropout": 0.1}
    one, two = (
        trained(spec(few_lines, tmp_path / name, asked=asked, seed=3)) for name in ("one", "two")
    )
    other = trained(spec(few_lines, tmp_path / "other", asked=asked, seed=4))
    assert steps(one) == steps(two) != steps(other)
    assert same_weights(end(one)["path"], end(two)["path"])


@pytest.mark.parametrize("step", [7, 10], ids=["within an epoch", "at an epoch's end"])
def test_stopped_and_gone_on_is_as_if_never_stopped(few_lines, tmp_path, step):
    asked = {"n_epochs": 2, "batch_size": 4, "lora_dropout": 0.1}
    valid = {"valid": few_lines}
    whole = trained(spec(few_lines, tmp_path / "whole", asked=asked, **valid))
    last = stopped_at(spec(few_lines, tmp_path / "first", asked=asked, **valid), step)
    assert last["event"] == "stopped" and step <= last["step"] < 20
    rest = trained(
        spec(few_lines, tmp_path / "second", asked=asked, **valid, resume=last["path"],
             limits={"max_length": 64})  # the settings have changed: the run keeps to its plan
    )  # fmt: skip
    assert rest[1]["plan"] == whole[1]["plan"]
    assert steps(rest) == steps(whole)[last["step"] :]
    assert steps(rest, "tokens") == steps(whole, "tokens")[last["step"] :]
    assert same_weights(end(rest)["path"], end(whole)["path"])
    assert end(rest)["trained_tokens"] == end(whole)["trained_tokens"]


def test_checkpoints_come_by_the_clock_and_any_of_them_will_do(few_lines, tmp_path):
    asked = {"n_epochs": 1, "batch_size": 4}
    whole = trained(spec(few_lines, tmp_path / "whole", asked=asked, checkpoint_every_s=1e-3))
    kept = [event for event in whole if event["event"] == "checkpoint"]
    assert [event["step"] for event in kept] == list(range(1, 11))
    assert [event["epoch_end"] for event in kept] == [False] * 9 + [True]
    rest = trained(spec(few_lines, tmp_path / "rest", asked=asked, resume=kept[2]["path"]))
    assert same_weights(end(rest)["path"], end(whole)["path"])


def test_stopped_before_the_first_step(few_lines, tmp_path):
    child = Child(spec(few_lines, tmp_path / "out"))
    for event in child.events():
        if event["event"] == "counted":
            child.stop()
        last = event
    assert last["event"] == "stopped"
    assert last["step"] == 0 or last["path"]
    assert child.end() == 0


def test_it_dies_with_whoever_started_it(few_lines, tmp_path):
    child = Child(spec(few_lines, tmp_path / "out", asked={"n_epochs": 50}))
    for event in child.events():
        if event["event"] == "step":
            child.leave()
            break
    assert child.end(20) == 1


# -- other data, other beginnings


def test_a_fine_tune_of_a_fine_tune_goes_on_from_it(desk, tmp_path):
    parent = end(desk)["path"]
    lines = few(12, tmp_path / "more.jsonl")
    asked = {"n_epochs": 1, "batch_size": 4, "learning_rate": 1e-5}
    fresh = trained(spec(lines, tmp_path / "fresh", asked=asked))
    events = trained(spec(lines, tmp_path / "out", asked=asked, parent=parent))
    assert steps(events)[0] < 0.1 < steps(fresh)[0]
    assert weights(end(events)["path"]).keys() == weights(parent).keys()


def test_preferences_go_on_from_a_fine_tune_and_compare_with_it(desk, tmp_path):
    parent = end(desk)["path"]
    lines = few(16, tmp_path / "pairs.jsonl", lessons.polite())
    given = {"method": "dpo", "parent": parent,
             "asked": {"n_epochs": 1, "batch_size": 4, "learning_rate": 1e-4}}  # fmt: skip
    whole = trained(spec(lines, tmp_path / "whole", **given, checkpoint_every_s=1e-3))
    assert abs(steps(whole, "train_reward_margin")[0]) < 1e-4  # nothing has moved yet
    kept = [event for event in whole if event["event"] == "checkpoint"]
    assert not [file for file in Path(kept[0]["path"]).iterdir() if file.is_dir()]
    rest = trained(spec(lines, tmp_path / "rest", **given, resume=kept[1]["path"]))
    assert same_weights(end(rest)["path"], end(whole)["path"])


def test_packed_examples_see_only_themselves(few_lines, tmp_path):
    asked = {"n_epochs": 1, "batch_size": 8}
    apart = trained(spec(few_lines, tmp_path / "apart", asked=asked))
    packed = trained(spec(few_lines, tmp_path / "packed", asked=asked | {"packing": True}))
    assert steps(packed) == pytest.approx(steps(apart), rel=1e-3)
    assert steps(packed, "tokens") == steps(apart, "tokens")


def test_a_step_that_is_too_large_goes_in_several_passes(tmp_path):
    """Half the examples are so long that only a few fit into a pass."""
    turns = [{"role": "user", "content": "What is the capital of France? " * 80},
             {"role": "assistant", "content": "Paris."}]  # fmt: skip
    short = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    lines = [{"messages": turns}, {"messages": short}] * 16
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    path = prepared(content, tmp_path / "long.jsonl")
    events = trained(spec(path, tmp_path / "out", asked={"n_epochs": 1, "batch_size": 32}))
    counted, planned, step, *_ = events
    assert counted["tokens_per_epoch"] > 8192 and planned["plan"]["total_steps"] == 1
    assert step["tokens"] == counted["tokens_per_epoch"] and math.isfinite(step["train_loss"])


def test_prompts_and_completions_are_learned_as_plain_text(tmp_path):
    table = b"prompt,response\n" + b"".join(
        f"Colour {n}:, it is {word}\n".encode()
        for n, word in enumerate(["red", "blue", "green", "white"] * 6)
    )
    path = prepared(table, tmp_path / "table.csv")
    events = trained(spec(path, tmp_path / "out", asked={"n_epochs": 6, "batch_size": 4}))
    assert steps(events)[-1] < steps(events)[0] / 2


def test_two_workers_train_one_adapter(few_lines, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    given = spec(few_lines, tmp_path / "out", asked={"n_epochs": 1, "batch_size": 4},
                 checkpoint_every_s=1e-3)  # fmt: skip
    both = [
        Child(given, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
              MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(2)
    ]  # fmt: skip
    events = both[0].finish()
    assert list(both[1].events()) == []  # the first alone tells
    assert both[1].end() == 0
    alone = trained(spec(few_lines, tmp_path / "alone", asked={"n_epochs": 1, "batch_size": 4}))
    assert end(events)["event"] == "done" and len(steps(events)) == len(steps(alone)) == 10
    assert end(events)["trained_tokens"] == end(alone)["trained_tokens"]
    assert end(events)["metrics"]["train_loss"] == pytest.approx(
        end(alone)["metrics"]["train_loss"], rel=0.5
    )


# -- what cannot be


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"asked": {"max_length": 4096}}, "invalid_hyperparameter", "max_length"),
        ({"limits": {"max_length": 8}}, "invalid_training_file", "training_file"),
        ({"asked": {"target_modules": ["nonsense"]}}, "invalid_hyperparameter", "target_modules"),
        ({"asked": {"target_modules": ["norm"]}}, "invalid_hyperparameter", "target_modules"),
    ],
    ids=["longer than the context", "nothing left to learn", "no such module", "not that module"],
)  # fmt: skip
def test_what_the_asker_got_wrong_is_told(few_lines, tmp_path, more, code, param):
    failed = end(trained(spec(few_lines, tmp_path / "out", **more)))
    assert (failed["event"], failed["code"], failed["param"]) == ("failed", code, param)
    assert failed["message"]


def test_a_parent_of_another_rank_is_told(desk, few_lines, tmp_path):
    given = spec(few_lines, tmp_path / "out", parent=end(desk)["path"], asked={"lora_rank": 32})
    failed = end(trained(given))
    assert (failed["code"], failed["param"]) == ("invalid_hyperparameter", "lora_rank")


def test_weights_that_are_not_there_are_a_crash(few_lines, tmp_path):
    child = Child(spec(few_lines, tmp_path / "out", weights=str(tmp_path / "nothing")))
    assert list(child.events()) == []
    assert child.end() == 1 and "nothing" in child.said


def test_a_killed_trainer_leaves_whole_checkpoints_only(few_lines, tmp_path):
    out = tmp_path / "out"
    child = Child(spec(few_lines, out, asked={"n_epochs": 50, "batch_size": 2},
                       checkpoint_every_s=1e-3))  # fmt: skip
    for event in child.events():
        if event["event"] == "checkpoint" and event["step"] == 5:
            os.kill(child.process.pid, signal.SIGKILL)
            break
    child.end()
    kept = sorted(out.glob("checkpoint-*"))
    assert len(kept) >= 5
    for folder in kept:
        assert {file.name for file in folder.iterdir()} >= FOLDER - {"README.md"}
        assert json.loads((folder / "fine_tune.json").read_text())["step"]
