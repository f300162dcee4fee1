"""Ask the chat model its held-out questions, greedily, and count the right answers by kind."""

from collections import defaultdict
from itertools import islice
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llm_engine.demo import corpus
from llm_engine.demo.conversation import Conversation

TOGETHER = 128


def prompt(tokenizer: PreTrainedTokenizerFast, made: Conversation) -> str:
    """As a server renders it; a forced beginning is put in the model's mouth."""
    rendered = tokenizer.apply_chat_template(
        made.prompt, tools=list(made.tools) or None, tokenize=False, add_generation_prompt=True
    )
    return rendered + made.given


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[str]:
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    made = model.generate(**inputs, max_new_tokens=160, do_sample=False)
    said = made[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: int
) -> dict[str, Any]:
    model.eval()
    asked = list(islice(corpus.held_out(), questions))
    # Questions of one kind have answers of one length: less waiting for the longest.
    asked.sort(key=lambda made: (made.kind, len(made.answer)))
    right: dict[str, list[bool]] = defaultdict(list)
    missed: list[str] = []
    for start in range(0, len(asked), TOGETHER):
        group = asked[start : start + TOGETHER]
        said = answers(model, tokenizer, [prompt(tokenizer, made) for made in group])
        for made, text in zip(group, said, strict=True):
            good = made.accepts(made.given + text)
            right[made.kind].append(good)
            if not good:
                missed.append(f"{made.kind}: {made.prompt[-1]['content']} -> {text}")
    for line in missed[:: max(1, len(missed) // 40)]:
        print("missed", line)
    by_kind = {kind: round(sum(r) / len(r), 4) for kind, r in sorted(right.items())}
    total = sum(map(sum, right.values())) / len(asked)
    return {
        "held_out_accuracy": round(total, 4),
        "questions": len(asked),
        "by_kind": by_kind,
        "asked_by_kind": {kind: len(r) for kind, r in sorted(right.items())},
    }
