"""The real trainer on the demo model: its process, its events, and what adapters have learned."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llm_engine.demo import EXAMPLES, lessons
from llm_engine.fine_tunes import data

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
    """The trainer's process, as the job runs it."""

    def __init__(self, spec: dict[str, Any], **environment: str) -> None:
        self._said = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llm_engine.fine_tunes.trainer"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            env=os.environ | ENVIRONMENT | environment, text=True,
        )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(spec) + "\n")
        self.process.stdin.flush()  # and it stays open: at its end the trainer dies

    def events(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        yield from map(json.loads, self.process.stdout)

    def end(self, wait_s: float = 60) -> int:
        """Its exit code; what it said on stderr is in `said` then."""
        assert self.process.stdin is not None and self.process.stdout is not None
        code = self.process.wait(wait_s)
        self.process.stdin.close()
        self.process.stdout.close()
        with self._said as file:
            file.seek(0)
            self.said = file.read()
        return code

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def finish(self) -> list[dict[str, Any]]:
        """All events; the last one is an end."""
        events = list(self.events())
        code = self.end(WAIT_S)
        ended = events and events[-1]["event"] in ("done", "stopped", "failed")
        assert ended and code == 0, self.said[-3000:]
        return events


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
