"""Stands in for the trainer's process: its protocol, and no learning.

    echo SPEC | python -m tests.support.fake_trainer

What it "learns" is one number that depends on every step in order: who goes on from the wrong place
ends with another one. `asked` tells it to misbehave: {"fake": {"step_s", "die_at", "fail", ...}}.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

FIRST, PRIME = 1, 1_000_003


def learn(value: int, step: int) -> int:
    return (value * 31 + step * 7 + 5) % PRIME


def learned(steps: int) -> int:
    """What comes of so many steps without any interruption."""
    value = FIRST
    for step in range(1, steps + 1):
        value = learn(value, step)
    return value


def loss_of(value: int) -> float:
    return round(value / PRIME, 6)


def tell(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


class Trainer:
    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.fake: dict[str, Any] = spec["asked"].get("fake", {})
        self.out = Path(spec["out"])
        self.stopping = False
        self.kept = 0  # the last step that was
        rows = Path(spec["train"]).read_text().splitlines()
        self.examples = [json.loads(row) for row in rows]
        epochs = spec["asked"].get("n_epochs", 2)
        batch = spec["asked"].get("batch_size", 4)
        self.per_epoch = -(-len(self.examples) // batch)
        self.total = self.per_epoch * epochs
        self.step, self.value = 0, FIRST
        if spec["resume"]:
            state = json.loads((Path(spec["resume"]) / "trainer_state.json").read_text())
            self.step, self.value = state["step"], state["value"]

    def run(self) -> None:
        fake, spec = self.fake, self.spec
        if "fail" in fake:
            tell("failed", **fake["fail"])
            return
        valid = len(Path(spec["valid"]).read_text().splitlines()) if spec["valid"] else 0
        tokens = 10 * len(self.examples)
        tell("counted", examples=len(self.examples), validation_examples=valid,
             tokens_per_epoch=tokens, too_long=fake.get("too_long", []),
             n_too_long=len(fake.get("too_long", [])))  # fmt: skip
        plan = {"method": spec["method"], "n_epochs": self.total // self.per_epoch,
                "batch_size": spec["asked"].get("batch_size", 4), "seed": spec["seed"],
                "learning_rate_multiplier": 1.0, "examples": len(self.examples),
                "max_length": spec["limits"]["max_length"], "total_steps": self.total}  # fmt: skip
        tell("planned", plan=plan)
        print("a line that is no event", flush=True)
        saved_at = time.monotonic()
        while self.step < self.total:
            if self.stopping:
                kept = self.step == self.kept
                path = None if kept else str(self.save())
                return tell("stopped", step=self.step, path=path)
            time.sleep(fake.get("step_s", 0.005))
            self.one_step(valid)
            ends = self.step % self.per_epoch == 0
            if ends or time.monotonic() - saved_at > spec["checkpoint_every_s"]:
                tell("checkpoint", step=self.step, path=str(self.save()), epoch_end=ends,
                     metrics={"step": self.step, "train_loss": loss_of(self.value)})  # fmt: skip
                saved_at = time.monotonic()
            self.misbehave()
        done = self.save("done")
        (done / "README.md").write_text(f"# {spec['name']}\n")
        tell("done", path=str(done), trained_tokens=10 * len(self.examples) * self.total
             // self.per_epoch, metrics={"train_loss": loss_of(self.value)})  # fmt: skip

    def one_step(self, valid: int) -> None:
        self.step += 1
        self.value = learn(self.value, self.step)
        measured = {}
        if valid and self.step % self.per_epoch == 0:
            measured = {"valid_loss": 0.5, "valid_mean_token_accuracy": 0.75}
        loss = float("nan") if self.step == self.fake.get("nan_at") else loss_of(self.value)
        tell("step", step=self.step, total_steps=self.total, epoch=self.step / self.per_epoch,
             train_loss=loss, train_mean_token_accuracy=0.5, learning_rate=1e-3,
             tokens=40 * self.step, **measured)  # fmt: skip

    def misbehave(self) -> None:
        fake = self.fake
        if self.step == fake.get("die_at") and not self.spec["resume"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.step == fake.get("always_die_at"):
            print(fake.get("last_words", "ValueError: no luck"), file=sys.stderr, flush=True)
            sys.exit(3)
        if self.step == fake.get("hang_at"):
            time.sleep(3600)

    def save(self, name: str | None = None) -> Path:
        folder = self.out / (name or f"checkpoint-{self.step}")
        unfinished = folder.with_name("unfinished")
        unfinished.mkdir(parents=True)
        state = {"step": self.step, "value": self.value}
        files = {
            "adapter_model.safetensors": f"weights {self.value}\n" * 100,
            "adapter_config.json": json.dumps({"r": 8, "peft_type": "LORA"}),
            "tokenizer.json": "{}",
            "chat_template.jinja": "{{ messages }}",
            "trainer_state.json": json.dumps(state),
            "optimizer.pt": "moments",
        }
        for file, content in files.items():
            (unfinished / file).write_text(content)
        self.kept = self.step
        return unfinished.rename(folder)


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    trainer = Trainer(json.loads(sys.stdin.readline()))

    def stop(*_: object) -> None:
        trainer.stopping = True

    def die_with_the_job() -> None:
        sys.stdin.read()
        os._exit(1)

    if not trainer.fake.get("deaf"):
        signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=die_with_the_job, daemon=True).start()
    trainer.run()


if __name__ == "__main__":
    main()
