"""How a model is trained: what was asked, checked; and "auto" turned into numbers. Pure.

What "auto", or nothing, becomes:

learning_rate   5e-5 * 10 * (2000 / hidden_size) ** 0.781, the fit of "LoRA Without Regret"
                (Schulman et al., Thinking Machines, 2025; `hyperparam_utils` of tinker-cookbook)
                over Llama models, which says 2.8e-4 for 8B and goes on well down to our demo
                model's 3.1e-3. The same study holds alpha at 32, so that the rate suits any rank.
                A tenth of that for DPO, whose gradients push two answers apart without end.
batch_size      a 128th of the examples, from 1 to 32, as a power of two: LoRA learns worse from
                larger batches than full training does (the same study).
n_epochs        3; more where that is less than 100 steps, 25 at most; fewer where the model would
                see more than 25,000 examples. (OpenAI's own rule, but for steps.)
the others      as Scale's documentation has them: cosine, warm-up 0.03, weight decay 0.001.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from llm_engine.errors import InvalidRequest

AUTO = "auto"
SUPERVISED, DPO = "supervised", "dpo"
METHODS = (SUPERVISED, DPO)

EPOCHS, MOST_EPOCHS = 3, 25
FEWEST_STEPS, MOST_SEEN = 100, 25_000
LARGEST_BATCH = 32
RANK, ALPHA = 16, 32.0
BETA = 0.1
DPO_RATE = 0.1
#: Packing pays where many examples fit into the longest row, and there are many of them.
PACKED_EXAMPLES, PACKED_SHARE = 2_000, 0.25
ALL_LINEAR = "all-linear"
#: Of builtin:chat, what its engines serve adapters of: BUILTIN_CHAT_TARGETS of `engine.vllm`, in
#: whose modules some of these lie together.
BUILTIN_CHAT_MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingPlan:
    method: str
    n_epochs: int
    batch_size: int  # examples of an optimizer step, over all workers
    learning_rate_multiplier: float
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    lr_scheduler: str
    beta: float | None  # of DPO
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str | list[str]
    max_length: int  # longer examples are cut
    packing: bool  # examples of a step lie end to end in one row, each seeing only itself
    seed: int
    bf16: bool
    examples: int
    validation_examples: int
    tokens_per_epoch: int
    total_steps: int

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def auto_learning_rate(method: str, hidden_size: int) -> float:
    rate = 5e-5 * 10 * (2000 / hidden_size) ** 0.781
    return float(f"{rate * (DPO_RATE if method == DPO else 1):.3g}")


def auto_batch_size(examples: int) -> int:
    return min(LARGEST_BATCH, 2 ** int(math.log2(max(1, examples / 128))))


def auto_epochs(examples: int, batch_size: int) -> int:
    enough = math.ceil(FEWEST_STEPS / math.ceil(max(1, examples) / batch_size))
    if enough > EPOCHS:
        return min(enough, MOST_EPOCHS)
    return max(1, min(EPOCHS, MOST_SEEN // max(1, examples)))


def resolve(
    method: str,
    asked: Mapping[str, Any],
    *,
    examples: int,
    validation_examples: int,
    tokens_per_epoch: int,
    hidden_size: int,
    longest: int,
    seed: int,
    rows: int | None = None,
    workers: int = 1,
    bf16: bool = False,
) -> TrainingPlan:
    """`asked` has been through `check_hyperparameters`. `longest`: tokens that the settings and the
    model's context allow; `rows`: what the trainer makes of the examples, where that is more."""

    def given(name: str, otherwise: Any) -> Any:
        value = asked.get(name)
        return otherwise if value in (None, AUTO) else value

    rows = examples if rows is None else rows
    # Each worker takes as many examples of a step as the others.
    batch_size = -(-given("batch_size", auto_batch_size(examples)) // workers) * workers
    n_epochs = given("n_epochs", auto_epochs(examples, batch_size))
    multiplier = float(given("learning_rate_multiplier", 1.0))
    rate = given("learning_rate", auto_learning_rate(method, hidden_size))
    max_length = given("max_length", longest)
    often_short = tokens_per_epoch / max(1, rows) <= PACKED_SHARE * max_length
    packing = given("packing", bf16 and examples >= PACKED_EXAMPLES and often_short)
    plan = TrainingPlan(
        method=method,
        n_epochs=n_epochs,
        batch_size=batch_size,
        learning_rate_multiplier=multiplier,
        learning_rate=rate * multiplier,
        warmup_ratio=given("warmup_ratio", 0.03),
        weight_decay=given("weight_decay", 0.001),
        lr_scheduler=given("lr_scheduler", "cosine"),
        beta=given("beta", BETA) if method == DPO else None,
        lora_rank=given("lora_rank", RANK),
        lora_alpha=given("lora_alpha", ALPHA),
        lora_dropout=given("lora_dropout", 0.0),
        target_modules=given("target_modules", ALL_LINEAR),
        max_length=max_length,
        packing=packing and method == SUPERVISED,
        seed=seed,
        bf16=bf16,
        examples=examples,
        validation_examples=validation_examples,
        tokens_per_epoch=tokens_per_epoch,
        total_steps=0,
    )
    return replace(plan, total_steps=steps_per_epoch(plan, rows) * n_epochs)


def steps_per_epoch(plan: TrainingPlan, rows: int) -> int:
    return math.ceil(rows / plan.batch_size)


# -- what was asked


def check_hyperparameters(
    method: str, asked: Mapping[str, Any] | None, where: str = "hyperparameters"
) -> dict[str, Any]:
    """By TrainingPlan's names: numbers as numbers, "auto" as it is; nulls are left out.

    Raises InvalidRequest, whose `param` is `where` with the name.
    """
    if method not in METHODS:
        raise InvalidRequest(
            f"There is no method '{str(method)[:40]}'; there are {', '.join(METHODS)}.",
            param="method",
        )
    checked: dict[str, Any] = {}
    for name, value in (asked or {}).items():
        param = f"{where}.{name}"
        check = _CHECKS.get(name)
        if check is None or (name == "beta" and method != DPO):
            known = ", ".join(n for n in _CHECKS if n != "beta" or method == DPO)
            raise InvalidRequest(
                f"Unknown hyperparameter '{str(name)[:80]}' of method '{method}'. There are: "
                f"{known}.",
                param=param,
                code="unknown_parameter",
            )
        if value is None:
            continue
        checked[name] = AUTO if value == AUTO else check(value, param)
    return checked


Check = Callable[[Any, str], Any]
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
_MODULE = re.compile(r"[A-Za-z0-9_.]{1,100}")
_MOST_MODULES = 64


def _refuse(param: str, expected: str, value: Any) -> InvalidRequest:
    return InvalidRequest(
        f"'{param}' must be {expected}, not {repr(value)[:80]}.", param=param, code="invalid_value"
    )


def _number(value: Any, param: str, expected: str) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)  # Scale's own notebook sends {"epochs": "1"}
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refuse(param, expected, value)
    return value


def _whole(low: int, high: int) -> Check:
    def check(value: Any, param: str) -> int:
        expected = f'a whole number from {low} to {high}, or "auto"'
        number = _number(value, param, expected)
        if number != int(number) or not low <= number <= high:
            raise _refuse(param, expected, value)
        return int(number)

    return check


def _real(low: float, high: float, *, above: bool = False, below: bool = False) -> Check:
    """`above`: low itself is too low; `below`: high itself is too high."""

    def check(value: Any, param: str) -> float:
        words = (f"above {low:g}" if above else f"from {low:g}"), ("below" if below else "to")
        expected = f'a number {words[0]} {words[1]} {high:g}, or "auto"'
        number = float(_number(value, param, expected))
        too_low = number <= low if above else number < low
        too_high = number >= high if below else number > high
        if too_low or too_high:
            raise _refuse(param, expected, value)
        return number

    return check


def _one_of(*words: str) -> Check:
    def check(value: Any, param: str) -> str:
        if value not in words:
            raise _refuse(param, f"one of {', '.join(words)}", value)
        return value

    return check


def _yes_or_no(value: Any, param: str) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise _refuse(param, 'true, false or "auto"', value)
    return value


def _modules(value: Any, param: str) -> str | list[str]:
    if value == ALL_LINEAR:
        return value
    names = [value] if isinstance(value, str) else value
    if (
        not isinstance(names, list)
        or not 0 < len(names) <= _MOST_MODULES
        or not all(isinstance(name, str) and _MODULE.fullmatch(name) for name in names)
    ):
        raise _refuse(param, f'"{ALL_LINEAR}" or a list of module names', value)
    return names


_CHECKS: dict[str, Check] = {
    "n_epochs": _whole(1, 50),
    "batch_size": _whole(1, 256),
    "learning_rate_multiplier": _real(0, 1_000, above=True),
    "learning_rate": _real(0, 1, above=True),
    "warmup_ratio": _real(0, 1, below=True),
    "weight_decay": _real(0, 1),
    "lr_scheduler": _one_of("cosine", "linear", "constant"),
    "beta": _real(0, 2, above=True),
    "lora_rank": _whole(1, 512),
    "lora_alpha": _real(0, 4096, above=True),
    "lora_dropout": _real(0, 1, below=True),
    "target_modules": _modules,
    "max_length": _whole(8, 10_000_000),
    "packing": _yes_or_no,
    "validation_split": _real(0, 0.5, above=True),
}
