"""Train the demo chat model from nothing, on two processor cores, in a few minutes.

    python -m llm_engine.demo.train_chat --out DIR

Writes an ordinary transformers folder, with `accuracy.json` measured on held-out questions.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_engine.demo import CHAT, corpus, training
from llm_engine.demo.card import chat_card
from llm_engine.demo.conversation import Conversation
from llm_engine.demo.measure import accuracy

VOCABULARY = 2048
LONGEST = 2048
BATCH_TOKENS = 2048
STEPS = 4000
CHUNK = 4096  # conversations tokenised, sorted by length and shuffled together
Batch = tuple[torch.Tensor, torch.Tensor]
IGNORED = -100  # what cross_entropy skips


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,  # a size that vLLM's attention on a processor supports
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # the quickest to train on rows this short
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return LlamaForCausalLM(config)


def new_tokenizer() -> PreTrainedTokenizerFast:
    texts = []
    for made in islice(corpus.training(corpus.SEED + 2), 20000):
        texts += [part for m in made.messages for part in (m["role"], m["content"])]
        texts += [json.dumps(tool) for tool in made.tools] + ["system", "# Tools"]
    bare = training.train_tokenizer(texts, VOCABULARY, training.TOOL_MARKS)
    tokenizer = training.as_transformers(bare, training.END_OF_TURN, LONGEST)
    tokenizer.chat_template = (Path(__file__).parent / "chat_template.jinja").read_text()
    return tokenizer


class Reader:
    """Turns conversations into token rows and into labels that cover only what is to be said."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.opening = tokenizer.encode("<|im_start|>assistant\n")
        self.end = tokenizer.convert_tokens_to_ids(training.END_OF_TURN)

    def render(self, made: Conversation) -> str:
        return self.tokenizer.apply_chat_template(
            list(made.messages), tools=list(made.tools) or None, tokenize=False
        )

    def rows(self, conversations: list[Conversation]) -> tuple[list[list[int]], list[list[int]]]:
        texts = [self.render(made) for made in conversations]
        encoded = self.tokenizer.backend_tokenizer.encode_batch(texts)
        rows = [e.ids[:-1] for e in encoded]  # without the line end after the last turn
        labels = [self.labels(r, m) for r, m in zip(rows, conversations, strict=True)]
        return rows, labels

    def labels(self, ids: list[int], made: Conversation) -> list[int]:
        """What should follow each token; IGNORED where the model is not the one speaking."""
        wanted = [IGNORED] * len(ids)
        size, i = len(self.opening), 0
        given = len(self.tokenizer.encode(made.given)) if made.given else 0
        while i < len(ids):
            if ids[i : i + size] != self.opening:
                i += 1
                continue
            i += size
            stop = ids.index(self.end, i)
            for j in range(i + given, stop + 1):
                wanted[j - 1] = ids[j]
            i = stop + 1
        return wanted


def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def loss_of(model: LlamaForCausalLM, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum over spoken tokens. Padding is on the right, attention looks left: no mask needed."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(inputs, use_cache=False).last_hidden_state
        spoken = labels != IGNORED  # the vocabulary product is paid only where it counts
        logits = model.lm_head(hidden[spoken])
    return torch.nn.functional.cross_entropy(logits.float(), labels[spoken], reduction="sum")


def share_of_loss(
    model: LlamaForCausalLM, worker: int, halves: list[Batch], spoken: int
) -> torch.Tensor:
    return loss_of(model, *halves[worker]) / spoken


def batches(reader: Reader, pad: int) -> Iterator[list[Batch]]:
    """Token rows and labels, in two halves: one for each worker."""
    stream, shuffle = corpus.training(), torch.Generator().manual_seed(corpus.SEED)
    while True:
        rows, labels = reader.rows(list(islice(stream, CHUNK)))
        for batch in training.batches_by_length(rows, BATCH_TOKENS, shuffle):
            halves = [half for half in (batch[::2], batch[1::2]) if half]
            yield [
                (
                    padded([rows[i] for i in half], pad),
                    padded([labels[i] for i in half], IGNORED),
                )
                for half in (halves * 2)[:2]
            ]


def train(model: LlamaForCausalLM, reader: Reader, steps: int) -> float:
    optimisers = training.optimisers(model, rate=4e-3, table_rate=4e-3)
    schedules = [training.schedule(o, steps) for o in optimisers]
    workers, average = training.Workers(model), 8.0
    with training.progress() as bar:
        task = bar.add_task("training", total=steps, loss=average)
        stream = batches(reader, reader.tokenizer.pad_token_id)
        for step, halves in enumerate(islice(stream, steps), 1):
            spoken = sum(int((labels != IGNORED).sum()) for _, labels in halves)
            loss = workers.gradients(partial(share_of_loss, halves=halves, spoken=spoken))
            workers.step(optimisers)
            for plan in schedules:
                plan.step()
            average += (loss - average) * max(0.02, 1 / step)
            bar.update(task, advance=1, loss=average)
            if step % 200 == 0 or step == steps:
                bar.console.print(f"step {step}: loss {average:.4f}")
    return average


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    ends = tokenizer.convert_tokens_to_ids([training.END_OF_TURN, training.END_OF_TEXT])
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=CHAT, help="folder to write (replaced)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--questions", type=int, default=1500, help="held-out questions to ask")
    options = parser.parse_args()
    torch.manual_seed(corpus.SEED)
    began = time.monotonic()
    tokenizer = new_tokenizer()
    model = new_model(tokenizer)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(tokenizer)} tokens in the vocabulary")
    loss = train(model, Reader(tokenizer), options.steps)
    seconds = round(time.monotonic() - began)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as scratch:
        folder = Path(scratch) / "model"
        save(model, tokenizer, folder)
        report = accuracy(model, tokenizer, options.questions)
        report |= {"parameters": size, "loss": round(loss, 4), "training_seconds": seconds}
        (folder / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "README.md").write_text(chat_card(report))
        training.replace_folder(folder, options.out)
    print(json.dumps(report, indent=2))
    print(f"written to {options.out} after {seconds} s of training")


if __name__ == "__main__":
    main()
