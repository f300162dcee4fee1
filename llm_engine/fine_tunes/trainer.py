"""Training, in a process of its own: a spec in, events out, an adapter on disk.

Run as `python -m llm_engine.fine_tunes.trainer`: one line of JSON on stdin is the spec; each event
is a line of JSON on stdout, and everything else goes to stderr. When stdin ends, or the parent
dies, so does this. SIGTERM: it keeps a checkpoint and ends with `stopped`. The job's child and each
worker of Ray Train come through `train`.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_engine.config import BUILTIN
from llm_engine.fine_tunes.card import card
from llm_engine.fine_tunes.data import Example
from llm_engine.fine_tunes.plan import DPO, TrainingPlan, resolve
from llm_engine.fine_tunes.trainer_data import (
    Encoder,
    Refused,
    Tokens,
    examples_in,
    write_rows,
)

Tell = Callable[[dict[str, Any]], None]

TRAINING, VALIDATION = "training_file", "validation_file"
#: Libraries that would phone home, draw bars, or ask a hub for a folder.
_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
    "DO_NOT_TRACK": "1",
}
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Spec:
    weights: str  # builtin:chat, a folder, or a Hugging Face id
    train: Path
    method: str
    asked: dict[str, Any]
    seed: int
    out: Path
    limits: dict[str, int]
    valid: Path | None = None
    parent: Path | None = None
    resume: Path | None = None
    checkpoint_every_s: float = 60.0
    cpus: float = 0  # of a worker; 0: not told, and torch decides
    gpus: float = 0
    #: For the model card.
    name: str | None = None
    base: str | None = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Spec":
        known = {key: given[key] for key in cls.__slots__ if given.get(key) is not None}
        paths = {key: Path(known[key]) for key in ("train", "valid", "parent", "resume", "out")
                 if key in known}  # fmt: skip
        return cls(**(known | paths))

    @property
    def source(self) -> str:
        """Where the weights are."""
        kind, _, name = self.weights.partition(":")
        return str(BUILTIN[name]) if kind == "builtin" else self.weights


def train(spec: dict[str, Any], tell: Tell, stopping: Any) -> None:
    """Tells `done`, `stopped` or `failed` last. With torch.distributed's variables set it is one
    of several workers, of which the first alone tells."""
    first = os.environ.get("RANK", "0") == "0"
    say: Tell = tell if first else lambda _: None
    try:
        _Run(Spec.of(spec), say, stopping, first).run()
    except Refused as refused:
        say({"event": "failed"} | refused.problem.plain())
    except _Stopped:
        say({"event": "stopped", "step": 0, "path": None})


class _Stopped(Exception):
    """Before there was anything to keep."""


class _Run:
    def __init__(self, spec: Spec, tell: Tell, stopping: Any, first: bool) -> None:
        self._spec = spec
        self._tell = tell
        self._stopping = stopping
        self._first = first
        self._workers = int(os.environ.get("WORLD_SIZE", "1"))

    def run(self) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if os.path.isdir(self._spec.source):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        spec = self._spec
        self._take_processors()
        spec.out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(spec.out / "unfinished", ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix="rows-", dir=spec.out))
        try:
            self._train(scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _take_processors(self) -> None:
        """As many as are reserved: threads that have to wait for a processor hold up all others."""
        if self._spec.cpus and not self._spec.gpus:
            count = max(1, int(self._spec.cpus))
            os.environ["RAYON_NUM_THREADS"] = str(count)

            import torch

            torch.set_num_threads(count)

    def _train(self, scratch: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        from llm_engine.fine_tunes.trainer_run import plan_of

        spec = self._spec
        config = AutoConfig.from_pretrained(spec.source).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(spec.source)
        going_on = plan_of(spec.resume)
        longest = going_on.max_length if going_on else self._longest(config)
        made = self._rows(tokenizer, longest, spec.train, scratch / "train.arrow", TRAINING)
        held = None
        if spec.valid is not None:
            held = self._rows(tokenizer, longest, spec.valid, scratch / "valid.arrow", VALIDATION)
        self._tell(
            {"event": "counted", "examples": made.examples,
             "validation_examples": held.examples if held else 0,
             "tokens_per_epoch": made.tokens, "too_long": made.too_long,
             "n_too_long": made.n_too_long}
        )  # fmt: skip
        plan = going_on or self._plan(config, made, held, longest)
        self._tell({"event": "planned", "plan": plan.plain()})
        self._fit(plan, tokenizer, made, held)

    def _longest(self, config: Any) -> int:
        context = (
            getattr(config, "max_position_embeddings", None) or self._spec.limits["max_length"]
        )
        most = min(context, self._spec.limits["max_length"])
        asked = self._spec.asked.get("max_length", "auto")
        if asked == "auto":
            return most
        if asked > most:
            raise Refused(
                "invalid_hyperparameter",
                f"'max_length' of {asked} is more than the {most} tokens that this model and "
                "fine_tunes.max_length allow.",
                "max_length",
            )
        return asked

    def _rows(self, tokenizer: Any, longest: int, source: Path, path: Path, param: str) -> Tokens:
        spec = self._spec
        if tokenizer.chat_template is None and (spec.method == DPO or _are_chats(source)):
            raise Refused(
                "no_chat_template",
                "This base model has no chat template, so it cannot learn conversations; give it "
                "prompts and completions.",
                param,
            )
        made = write_rows(
            Encoder(tokenizer, spec.method, longest, param), self._until_stopped(source), path
        )
        if not made.rows:
            raise Refused(
                f"invalid_{param}",
                f"Nothing is left to learn: every example's question alone has {longest} tokens "
                "or more, the longest that this model can be trained on.",
                param,
            )
        return made

    def _until_stopped(self, source: Path) -> Iterator[Example]:
        for example in examples_in(source):
            # Several workers stop together, after their first step.
            if self._stopping.is_set() and self._workers == 1:
                raise _Stopped
            yield example

    def _plan(self, config: Any, made: Tokens, held: Tokens | None, longest: int) -> TrainingPlan:
        spec = self._spec
        asked = spec.asked
        if spec.parent is not None:
            asked = asked | self._parents(asked)
        return resolve(
            spec.method, asked, examples=made.examples,
            validation_examples=held.examples if held else 0, tokens_per_epoch=made.tokens,
            hidden_size=config.hidden_size, longest=longest, seed=spec.seed, rows=made.rows,
            workers=self._workers, bf16=spec.gpus > 0,
        )  # fmt: skip

    def _parents(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The shape of the adapter that is gone on from; it cannot be another."""
        assert self._spec.parent is not None
        config = json.loads((self._spec.parent / "adapter_config.json").read_text())
        modules = config["target_modules"]
        shape = {
            "lora_rank": config["r"],
            "lora_alpha": config["lora_alpha"],
            "lora_dropout": config["lora_dropout"],
            "target_modules": modules if isinstance(modules, str) else sorted(modules),
        }
        for name in ("lora_rank", "lora_alpha"):
            if asked.get(name, "auto") not in ("auto", shape[name]):
                raise Refused(
                    "invalid_hyperparameter",
                    f"'{name}' is {asked[name]}, but the adapter that this goes on from has "
                    f"{shape[name]}.",
                    name,
                )
        return shape

    def _fit(self, plan: TrainingPlan, tokenizer: Any, made: Tokens, held: Tokens | None) -> None:
        from llm_engine.fine_tunes.trainer_run import Place, run

        spec = self._spec
        model = self._model(plan)
        place = Place(spec.out, spec.resume, spec.checkpoint_every_s, spec.weights)
        result = run(plan, model, tokenizer, made, held, place, self._tell, self._stopping)
        if result.folder is None:
            path = None if result.checkpoint is None else str(result.checkpoint)
            return self._tell({"event": "stopped", "step": result.step, "path": path})
        final = spec.out / "result"
        if self._first:
            text = card(
                plan, result.metrics, weights=spec.weights, base=spec.base, name=spec.name,
                parent=spec.parent is not None, trained_tokens=result.tokens,
            )  # fmt: skip
            (result.folder / "README.md").write_text(text)
            facts = {"plan": plan.plain(), "metrics": result.metrics,
                     "trained_tokens": result.tokens}  # fmt: skip
            (result.folder / "metrics.json").write_text(json.dumps(facts, indent=1) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            result.folder.rename(final)
        self._tell(
            {"event": "done", "path": str(final), "trained_tokens": result.tokens,
             "metrics": result.metrics}
        )  # fmt: skip

    def _model(self, plan: TrainingPlan) -> Any:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        spec = self._spec
        if plan.bf16 and not torch.cuda.is_available():
            raise RuntimeError("fine_tunes.num_gpus asks for a GPU, and this node shows none")
        model = AutoModelForCausalLM.from_pretrained(
            spec.source,
            dtype=torch.bfloat16 if plan.bf16 else torch.float32,
            # One process with several GPUs lays the model over them.
            device_map="auto" if spec.gpus > 1 and self._workers == 1 else None,
        )
        model.config.use_cache = False
        if spec.parent is None:
            return model
        return PeftModel.from_pretrained(model, str(spec.parent), is_trainable=True)


def _are_chats(source: Path) -> bool:
    with source.open("rb") as file:
        return "messages" in json.loads(file.readline() or b"{}")


# -- the process


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    _die_with_parent()
    line = sys.stdin.readline()
    if not line.strip():
        raise SystemExit("the spec, one line of JSON, is expected on stdin")
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    threading.Thread(target=_watch_stdin, daemon=True).start()

    def tell(event: dict[str, Any]) -> None:
        answers.write(json.dumps(event) + "\n")
        answers.flush()

    train(json.loads(line), tell, stopping)


def _die_with_parent() -> None:
    """The kernel sees to it, where it is Linux; elsewhere the end of stdin does."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        pass


def _watch_stdin() -> None:
    while os.read(0, 4096):  # not by sys.stdin, which is locked while it waits: at the exit, too
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
