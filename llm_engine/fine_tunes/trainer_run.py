"""TRL's trainers over rows of tokens, and what watches them: steps told, checkpoints kept.

A checkpoint is a folder with all that serving needs and all that training needs to go on; it is
written under another name and renamed. On processors, the same seed gives the same weights, and
going on from a checkpoint gives what an uninterrupted run would have. Runs in the trainer's
process; the one file that knows TRL.
"""

import contextlib
import inspect
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llm_engine.fine_tunes.plan import DPO, TrainingPlan, steps_per_epoch
from llm_engine.fine_tunes.trainer_data import IGNORED, Refused, Tokens

Tell = Callable[[dict[str, Any]], None]

ADAPTER = "default"  # as PEFT calls it
STATE = "fine_tune.json"  # of a checkpoint: what Trainer's own files do not tell
#: Tokens of a forward pass: larger batches go through in several.
PASS_TOKENS = 8192
#: From so many parameters on, activations are computed twice rather than kept.
LARGE = 300_000_000
#: Looks at the validation file between epochs' ends: at most so many, and so much of the work.
MOST_LOOKS, LOOKS_SHARE = 10, 0.3
#: DPO alone is content when both answers become unlikely, and then the model babbles; so the
#: preferred one's own likelihood counts as well. With this weight in "The Llama 3 Herd of Models".
LIKELY = 1.0
#: TRL's words for what is measured, and ours.
_METRICS = {
    "loss": "loss",
    "mean_token_accuracy": "mean_token_accuracy",
    "rewards/accuracies": "reward_accuracy",
    "rewards/margins": "reward_margin",
}


class Stopping(Protocol):
    def is_set(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run lies on disk, and how often it is kept."""

    out: Path
    resume: Path | None
    checkpoint_every_s: float
    weights: str  # what the adapter says it belongs to

    @property
    def unfinished(self) -> Path:
        return self.out / "unfinished"


@dataclass(frozen=True, slots=True)
class Result:
    folder: Path | None  # None: it was stopped
    step: int
    checkpoint: Path | None
    tokens: int
    metrics: dict[str, float]


class _Lean:
    """What our two trainers change in TRL's: only what is ours is kept, and a step does not walk
    through all modules of the model five times, which takes a tenth of it where they are small."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        model = self.model  # type: ignore[attr-defined]
        self._trained = [p for p in model.parameters() if p.requires_grad]
        train = model.train
        model.train = lambda mode=True: model if model.training is mode else train(mode)
        model.zero_grad = self._forget_gradients

    def _forget_gradients(self, set_to_none: bool = True) -> None:
        for parameter in self._trained:
            parameter.grad = None

    def _clip_grad_norm(self, model: Any) -> Any:
        most = self.args.max_grad_norm  # type: ignore[attr-defined]
        return torch.nn.utils.clip_grad_norm_(self._trained, most)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """We write our own."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """One adapter, not also the one that DPO compares with; no pickled settings."""
        assert output_dir is not None
        self.model.save_pretrained(output_dir, selected_adapters=[ADAPTER])  # type: ignore[attr-defined]
        self.processing_class.save_pretrained(output_dir)  # type: ignore[attr-defined]


class _Supervised(_Lean, SFTTrainer):
    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        forward = type(self.model.get_base_model()).forward
        self._can_keep = "logits_to_keep" in inspect.signature(forward).parameters

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's own, but on processors, where its way of sparing memory costs half the speed."""
        other = self.args.device.type != "cpu" or self.aux_loss_enabled or return_outputs
        if other or not self._can_keep:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")[:, 1:]
        # The vocabulary's product is the dearest: only where some row of the pass speaks.
        at = (labels != IGNORED).any(0).nonzero().squeeze(1)
        labels = labels[:, at]
        spoken = labels != IGNORED
        logits = model(**inputs, use_cache=False, logits_to_keep=at).logits[spoken]
        wanted = labels[spoken]
        loss = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
        count = wanted.numel() if num_items_in_batch is None else num_items_in_batch
        loss = loss / max(1, int(count))
        if num_items_in_batch is not None:  # of all workers, whose gradients are averaged
            loss = loss * self.accelerator.num_processes
        self._count(inputs, logits.detach().argmax(-1) == wanted)
        return loss

    def _count(self, inputs: Any, right: Any) -> None:
        """What TRL's `log` reports."""
        read = inputs["attention_mask" if "attention_mask" in inputs else "input_ids"]
        size = read.sum() if "attention_mask" in inputs else torch.tensor(read.numel())
        numbers = torch.stack([right.sum(), torch.tensor(right.numel()), size])
        hits, all_of_them, tokens = self.accelerator.gather(numbers).view(-1, 3).sum(0).tolist()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append(hits / max(1, all_of_them))
        if mode == "train":
            self._total_train_tokens += tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


class _Preferring(_Lean, DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # it is rows of tokens already


def run(
    plan: TrainingPlan,
    model: Any,
    tokenizer: Any,
    train: Tokens,
    valid: Tokens | None,
    place: Place,
    tell: Tell,
    stopping: Stopping,
) -> Result:
    """`model`: a PeftModel that goes on, or a model that gets a new adapter. Raises Refused."""
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    watch = Watch(plan, train, valid, place, tell, stopping)
    with _modules_as_asked():
        trainer = _trainer(plan, model, tokenizer, train, valid, place, workers, watch)
    trainer.remove_callback(PrinterCallback)  # Watch tells
    resume = None if place.resume is None else str(place.resume)
    trainer.train(resume_from_checkpoint=resume)
    if watch.stopped:
        return Result(None, trainer.state.global_step, watch.kept, watch.tokens, watch.metrics)
    made = place.unfinished / "result"
    if trainer.is_world_process_zero():
        trainer.save_model(str(made))
        _name_base(made, place.weights)
    return Result(made, trainer.state.global_step, watch.kept, watch.tokens, watch.metrics)


def pass_size(per_worker: int, longest: int, sequences: int) -> int:
    """Examples of a forward pass: the most that divide a worker's part of a step evenly."""
    fits = max(1, PASS_TOKENS // max(1, longest * sequences))
    return next(n for n in range(min(per_worker, fits), 0, -1) if per_worker % n == 0)


def _trainer(
    plan: TrainingPlan,
    model: Any,
    tokenizer: Any,
    train: Tokens,
    valid: Tokens | None,
    place: Place,
    workers: int,
    watch: "Watch",
) -> Any:
    on_gpu = plan.bf16
    per_worker = plan.batch_size // workers
    sequences = 2 if plan.method == DPO else 1
    together = pass_size(per_worker, train.longest, sequences)
    size = sum(parameter.numel() for parameter in model.parameters())
    settings: dict[str, Any] = {
        "output_dir": str(place.unfinished),
        "per_device_train_batch_size": together,
        "per_device_eval_batch_size": pass_size(64, (valid or train).longest, sequences),
        "gradient_accumulation_steps": per_worker // together,
        "num_train_epochs": plan.n_epochs,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": plan.lr_scheduler,
        "warmup_steps": math.ceil(plan.warmup_ratio * plan.total_steps),
        "weight_decay": plan.weight_decay,
        "max_grad_norm": 1.0,
        "seed": plan.seed,
        "data_seed": plan.seed,
        "bf16": plan.bf16,
        "use_cpu": not on_gpu,
        "ddp_backend": None if on_gpu or workers == 1 else "gloo",
        "ddp_find_unused_parameters": None if workers == 1 else False,
        "gradient_checkpointing": size >= LARGE,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": on_gpu,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is none is for us to tell
        "save_strategy": "no",  # Watch says when
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,  # the rows are cut already
    }
    shared: dict[str, Any] = {
        "train_dataset": Dataset.from_file(str(train.path)),
        "eval_dataset": None if valid is None else Dataset.from_file(str(valid.path)),
        "processing_class": tokenizer,
        "callbacks": [watch],
        "peft_config": None if hasattr(model, "peft_config") else lora(plan),
    }
    if plan.method == DPO:
        losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, LIKELY]}
        return _Preferring(model, args=DPOConfig(beta=plan.beta, **losses, **settings), **shared)
    ready = {"dataset_kwargs": {"skip_prepare_dataset": True}, "padding_free": plan.packing}
    return _Supervised(model, args=SFTConfig(**ready, **settings), **shared)


@contextlib.contextmanager
def _modules_as_asked() -> Iterator[None]:
    """Modules that the model hasn't got, or that PEFT has no adapter for: as PEFT says it. Another
    try would meet them again. Raises Refused."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Target module"):
            raise
        raise Refused("invalid_hyperparameter", str(error), "target_modules") from error


def lora(plan: TrainingPlan) -> LoraConfig:
    return LoraConfig(
        r=plan.lora_rank,
        lora_alpha=plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        target_modules=plan.target_modules,
        task_type="CAUSAL_LM",
    )


def _name_base(folder: Path, weights: str) -> None:
    """The adapter belongs to these weights, wherever they lay while it was trained."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": weights}, indent=2) + "\n")


class Watch(TrainerCallback):
    """Tells each step, looks at the validation file, keeps checkpoints, and stops when asked."""

    def __init__(
        self,
        plan: TrainingPlan,
        train: Tokens,
        valid: Tokens | None,
        place: Place,
        tell: Tell,
        stopping: Stopping,
    ) -> None:
        self._plan = plan
        self._place = place
        self._tell = tell
        self._stopping = stopping
        self._per_epoch = steps_per_epoch(plan, train.rows)
        self._validates = valid is not None
        self._looks = looks(plan, self._per_epoch)
        self._pending: dict[str, Any] | None = None  # a step that may yet be validated
        self._kept_at = time.monotonic()
        before = _state_of(place.resume)
        self._tokens_before = self.tokens = before["tokens"]
        self.metrics: dict[str, float] = before["metrics"]
        self.kept: Path | None = None
        self.stopped = False

    # -- Trainer's moments, in the order of a step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._kept_at = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._flush()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        asked, due = self._agreed(args)
        if self._at_epoch_end(state):
            return  # what is to be done is done in on_epoch_end
        if asked:
            self.stopped = control.should_training_stop = control.should_save = True
        elif due:
            control.should_save = True
        control.should_evaluate = self._validates and state.global_step in self._looks

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        state.log_history.clear()  # it would grow with every step, and into every checkpoint
        if "eval_loss" in logs:
            found = _measured(logs, "eval_", "valid_")
            if self._pending is not None:
                self._pending |= found
        elif "loss" in logs:
            self._flush()
            found = _measured(logs, "", "train_")
            if not math.isfinite(found["train_loss"]):
                raise Refused(
                    "training_diverged",
                    f"The loss was no number at step {state.global_step}: the learning rate of "
                    f"{self._plan.learning_rate:.3g} is too high for this data.",
                    "learning_rate_multiplier",
                )
            self.tokens = self._tokens_before + int(logs.get("num_tokens", 0))
            self._pending = {
                "event": "step",
                "step": state.global_step,
                "total_steps": state.max_steps,
                "epoch": round(state.epoch, 4),
                "learning_rate": logs["learning_rate"],
                "tokens": self.tokens,
            } | found
        else:
            return
        self.metrics |= found

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._at_epoch_end(state):
            return  # stopped within the epoch: it is kept already
        control.should_save = True
        control.should_evaluate = self._validates
        if self._agreed(args)[0] and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        made = Path(args.output_dir) / f"checkpoint-{step}"
        if args.world_size > 1:
            torch.distributed.barrier()  # each worker has written its part
        self.kept = self._place.out / f"checkpoint-{step}"
        self._kept_at = time.monotonic()
        pending = self._pending or {}
        self._flush()
        if not state.is_world_process_zero:
            return
        _name_base(made, self._place.weights)
        facts = {"step": step, "tokens": self.tokens, "metrics": self.metrics,
                 "plan": self._plan.plain()}  # fmt: skip
        (made / STATE).write_text(json.dumps(facts, indent=1) + "\n")
        shutil.rmtree(self.kept, ignore_errors=True)
        made.rename(self.kept)
        epoch_end = self._at_epoch_end(state)
        metrics = {k: v for k, v in pending.items() if k.startswith(("train_", "valid_"))}
        if epoch_end:  # the whole validation file, as always here
            metrics |= {f"full_{k}": v for k, v in metrics.items() if k.startswith("valid_")}
        if epoch_end or not self.stopped:  # else `stopped` tells of it
            self._tell(
                {"event": "checkpoint", "step": step, "path": str(self.kept),
                 "epoch_end": epoch_end, "metrics": metrics}
            )  # fmt: skip

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._flush()

    # -- their parts

    def _flush(self) -> None:
        if self._pending is not None:
            self._tell(self._pending)
            self._pending = None

    def _at_epoch_end(self, state: Any) -> bool:
        return state.global_step % self._per_epoch == 0

    def _agreed(self, args: Any) -> tuple[bool, bool]:
        """Whether to stop, and whether to keep a checkpoint: the first worker says, for all."""
        stop = self._stopping.is_set()
        due = time.monotonic() - self._kept_at >= self._place.checkpoint_every_s
        if args.world_size > 1:
            said = torch.tensor([stop, due], dtype=torch.uint8, device=args.device)
            torch.distributed.broadcast(said, 0)
            stop, due = map(bool, said.tolist())
        return stop, due


def looks(plan: TrainingPlan, per_epoch: int) -> frozenset[int]:
    """Steps within epochs after which the validation file is looked at."""
    if not plan.validation_examples:
        return frozenset()
    seen = plan.examples * plan.n_epochs
    # A look costs a third of training on the same examples: there is no way back.
    count = min(MOST_LOOKS, int(3 * LOOKS_SHARE * seen / plan.validation_examples))
    if count < 1:
        return frozenset()
    every = max(1, math.ceil(plan.total_steps / count))
    return frozenset(s for s in range(every, plan.total_steps, every) if s % per_epoch)


def _measured(logs: dict[str, Any], theirs: str, ours: str) -> dict[str, float]:
    return {
        f"{ours}{name}": float(logs[f"{theirs}{key}"])
        for key, name in _METRICS.items()
        if f"{theirs}{key}" in logs
    }


def _state_of(checkpoint: Path | None) -> dict[str, Any]:
    if checkpoint is None:
        return {"tokens": 0, "metrics": {}, "plan": None}
    return json.loads((checkpoint / STATE).read_text())


def plan_of(checkpoint: Path | None) -> TrainingPlan | None:
    """The plan that a checkpoint belongs to: a run keeps to it, whatever the settings say now."""
    plan = _state_of(checkpoint)["plan"]
    return None if plan is None else TrainingPlan(**plan)
