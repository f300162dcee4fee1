"""LoRA as a page of PEFT's documentation has it: a plain loop over padded batches. The other side.

Run as `python -m benchmarks.bare_training`: a line of JSON on stdin tells the model's folder, the
file of examples, the batch size, the steps and the rate; each step is a line of JSON on stdout.
"""

import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    train(json.loads(sys.stdin.readline()), answers)


def train(asked: dict[str, Any], answers: Any) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

    from llm_engine.fine_tunes.trainer_data import Encoder, examples_in

    torch.manual_seed(asked["seed"])
    device = "cuda" if asked["gpu"] else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    encoder = Encoder(tokenizer, "supervised", asked["max_length"], "training_file")
    examples = list(examples_in(Path(asked["train"])))
    rows = [row for rows in encoder.encode(examples) for row in rows]
    model = AutoModelForCausalLM.from_pretrained(
        asked["model"], dtype=torch.bfloat16 if asked["gpu"] else torch.float32
    ).to(device)
    config = LoraConfig(
        r=asked["rank"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=asked["rate"], weight_decay=0.001, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimiser, 3, asked["steps"])

    def batches():
        size = asked["batch_size"]
        while True:
            order = torch.randperm(len(rows)).tolist()
            for at in range(0, len(order), size):
                yield [rows[i] for i in order[at : at + size]]

    def padded(batch: list[dict[str, list[int]]], name: str, filler: int) -> Any:
        parts = [torch.tensor(row[name]) for row in batch]
        return pad_sequence(parts, batch_first=True, padding_value=filler).to(device)

    tokens = 0
    for step, batch in enumerate(islice(batches(), asked["steps"]), 1):
        ids, labels = padded(batch, "input_ids", 0), padded(batch, "labels", -100)
        seen = padded([{"one": [1] * len(row["input_ids"])} for row in batch], "one", 0)
        with torch.autocast(device, torch.bfloat16, enabled=asked["gpu"]):
            loss = model(input_ids=ids, attention_mask=seen, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        tokens += sum(len(row["input_ids"]) for row in batch)
        told = {"event": "step", "step": step, "tokens": tokens, "train_loss": loss.item()}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
