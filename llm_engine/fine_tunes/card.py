"""The model card of an adapter: what it was made of, how, and how well that went. Pure."""

from typing import Any

from llm_engine.fine_tunes.plan import TrainingPlan

_WORDS = {
    "train_loss": "loss of the last step",
    "train_mean_token_accuracy": "share of tokens guessed right, last step",
    "valid_loss": "loss on the validation file",
    "valid_mean_token_accuracy": "share of tokens guessed right, validation file",
    "reward_accuracy": "share of pairs whose preferred answer gained on the other, last step",
    "valid_reward_accuracy": "the same, validation file",
}
#: What the card tells in words.
_TOLD = ("method", "examples", "validation_examples", "tokens_per_epoch")


def card(
    plan: TrainingPlan,
    metrics: dict[str, float],
    *,
    weights: str,
    base: str | None,
    name: str | None,
    parent: bool,
    trained_tokens: int,
) -> str:
    how = "preferences (DPO)" if plan.method == "dpo" else "answers (supervised)"
    served = f", the model of the endpoint `{base}`" if base else ""
    upon = " It goes on from an earlier adapter of that model." if parent else ""
    held = f"; {plan.validation_examples:,} more to validate" if plan.validation_examples else ""
    rows = "\n".join(
        f"| {key} | {_shown(value)} |"
        for key, value in plan.plain().items()
        if key not in _TOLD and value is not None
    )
    measured = "\n".join(
        f"| {_WORDS.get(key, key)} | {_shown(value)} |" for key, value in metrics.items()
    )
    return f"""---
base_model: {weights}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- llm-engine
---
# {name or "LoRA adapter"}

A LoRA adapter of `{weights}`{served}, trained on {how} by llm-engine.{upon}

- examples: {plan.examples:,}, of {plan.tokens_per_epoch:,} tokens{held}
- trained tokens: {trained_tokens:,}

| hyperparameter | value |
|---|---|
{rows}

| measured | value |
|---|---|
{measured}
"""


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
