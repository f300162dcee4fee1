"""The real trainer on the demo model: its process, its events, and what adapters have learned."""

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

from llm_engine.demo import EXAMPLES, lessons
from llm_engine.fine_tunes import data, trainer

WAIT_S = 280
#: Threads that meet in every operation of a small model wait more than they work.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def prepared(source: Path | bytes, to: Path, method: str = "supervised") -> Path:
    """A training file as the job hands it to the trainer."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    reader = data.read([content], to.name, method, 100_000, fewest=1)
    with to.open("w") as file:
        file.writelines(json.dumps(example) + "\n" for example in reader)
    assert reader.verdict() is None, reader.verdict()
    return to


def shipped(name: str, folder: Path, part: str = "train") -> Path:
    method = "dpo" if name == "polite" else "supervised"
    source = EXAMPLES / f"{name}.{part}.jsonl"
    return prepared(source, folder / f"{name}.{part}.jsonl", method)


def few(count: int, to: Path, made: Iterable[dict[str, Any]] | None = None, **more: Any) -> Path:
    """The first of a lesson's lines."""
    lines = islice(lessons.support() if made is None else made, count)
    return prepared(b"".join(json.dumps(x | more).encode() + b"\n" for x in lines), to,
                    "supervised" if made is None else "dpo")  # fmt: skip


def spec(train: Path, out: Path, **more: Any) -> dict[str, Any]:
    given = {key: str(value) if isinstance(value, Path) else value for key, value in more.items()}
    return {
        "weights": "builtin:chat", "train": str(train), "out": str(out), "method": "supervised",
        "asked": {}, "seed": 7, "limits": {"max_length": 2048}, "checkpoint_every_s": 1e6,
    } | given  # fmt: skip


class Child:
    """The trainer's process, as the job runs it; but its imports, which take seconds, are made once
    for all of them. `tests/jobs` has it with its own."""

    def __init__(self, spec: dict[str, Any], **environment: str) -> None:
        asked, self._asking = os.pipe()
        hearing, told = os.pipe()
        self._said = tempfile.TemporaryFile("w+")
        theirs = [Connection(asked, writable=False), Connection(told, readable=False),
                  Connection(os.dup(self._said.fileno()))]  # fmt: skip
        self.process = _forking().Process(target=_train, args=(theirs, environment))
        self.process.start()
        for each in theirs:
            each.close()
        os.write(self._asking, json.dumps(spec).encode() + b"\n")  # open: at its end it dies
        self._hearing = open(hearing)

    def events(self) -> Iterator[dict[str, Any]]:
        yield from map(json.loads, self._hearing)

    def leave(self) -> None:
        """The end of its stdin, as when its job dies."""
        if self._asking is not None:
            os.close(self._asking)
            self._asking = None

    def end(self, wait_s: float = 60) -> int:
        """Its exit code; what it said on stderr is in `said` then."""
        self.process.join(wait_s)
        assert self.process.exitcode is not None, f"it still runs after {wait_s} s"
        self.leave()
        self._hearing.close()
        with self._said as file:
            file.seek(0)
            self.said = file.read()
        return self.process.exitcode

    def stop(self) -> None:
        self.process.terminate()

    def finish(self) -> list[dict[str, Any]]:
        """All events; the last one is an end."""
        events = list(self.events())
        code = self.end(WAIT_S)
        ended = events and events[-1]["event"] in ("done", "stopped", "failed")
        assert ended and code == 0, self.said[-3000:]
        return events


@cache
def _forking() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llm_engine.fine_tunes.trainer_run"])
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def _train(ends: list[Connection], environment: dict[str, str]) -> None:
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    os.environ.update(environment)
    trainer.main()


def trained(spec: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    return Child(spec, **environment).finish()


def stopped_at(spec: dict[str, Any], step: int) -> dict[str, Any]:
    """Told to stop when it tells that step; what it told last."""
    child = Child(spec)
    for event in child.events():
        if event["event"] == "step" and event["step"] == step:
            child.stop()
        last = event
    child.end()
    return last


def steps(events: list[dict[str, Any]], name: str = "train_loss") -> list[float]:
    return [event[name] for event in events if event["event"] == "step"]


def weights(folder: Path | str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


def same_weights(one: Path | str, other: Path | str) -> bool:
    import torch

    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


class Speaker:
    """The demo model, with an adapter or without."""

    def __init__(self, adapter: Path | str | None = None) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from llm_engine.demo import CHAT

        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(CHAT)
        self.model = AutoModelForCausalLM.from_pretrained(CHAT, dtype=torch.float32)
        if adapter is not None:
            self.model = PeftModel.from_pretrained(self.model, str(adapter)).merge_and_unload()
        self.model.eval()

    def prompt(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def say(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        from llm_engine.demo.measure import TOGETHER, answers

        prompts = [self.prompt(messages) for messages in conversations]
        said: list[str] = []
        for at in range(0, len(prompts), TOGETHER):
            said += answers(self.model, self.tokenizer, prompts[at : at + TOGETHER])
        return said

    def likelihood(self, messages: list[dict[str, str]], answer: str) -> float:
        """The logarithm of the chance that this is what it says."""
        import torch

        asked = self.tokenizer(self.prompt(messages))["input_ids"]
        said = self.tokenizer(answer + self.tokenizer.eos_token)["input_ids"]
        with torch.inference_mode():
            logits = self.model(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1]
        chances = torch.log_softmax(logits.float(), -1)
        return chances[torch.arange(len(said)), torch.tensor(said)].sum().item()


def share(right: Callable[[Any, str], bool], rows: list[Any], said: list[str]) -> float:
    return sum(map(right, rows, said)) / len(rows)
