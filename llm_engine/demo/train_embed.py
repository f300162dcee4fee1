"""Train the demo embedding model from nothing, on two processor cores, in a few minutes.

    python -m llm_engine.demo.train_embed --out DIR

Two wordings of one question must land close together and far from other questions.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_engine.demo import EMBED, corpus, same_meaning, training
from llm_engine.demo.card import embed_card
from llm_engine.demo.conversation import dressed
from llm_engine.demo.same_meaning import Meanings

VOCABULARY = 1536
LONGEST = 512
PAIRS = 256
STEPS = 200
SHARPNESS = 20.0  # one over the temperature of the contrastive loss


def new_tokenizer(known: Meanings) -> PreTrainedTokenizerFast:
    rng = random.Random(corpus.SEED)
    texts = [
        text
        for questions in known.learned.values()
        for question in questions
        for text in (dressed(rng, question), question.answer)
    ]
    bare = training.train_tokenizer(texts, VOCABULARY, [])
    # vLLM pools the last token: a closing mark lets it look back over the whole sentence.
    end = bare.token_to_id(training.END_OF_TEXT)
    bare.post_processor = TemplateProcessing(
        single=f"$A {training.END_OF_TEXT}", special_tokens=[(training.END_OF_TEXT, end)]
    )
    return training.as_transformers(bare, training.END_OF_TEXT, LONGEST)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def embed(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> torch.Tensor:
    """What vLLM computes: the last token's state after the final norm, at length one."""
    tokenizer.padding_side = "right"
    inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    # Causal attention with padding on the right: no mask is needed for the real tokens.
    states = model.model(inputs["input_ids"], use_cache=False).last_hidden_state
    last = inputs["attention_mask"].sum(dim=1) - 1
    return torch.nn.functional.normalize(states[torch.arange(len(texts)), last], dim=-1)


def contrast(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Each text must pick its partner among all partners of the batch, in both directions."""
    scores = left @ right.T * SHARPNESS
    wanted = torch.arange(len(left))
    entropy = torch.nn.functional.cross_entropy
    return (entropy(scores, wanted) + entropy(scores.T, wanted)) / 2


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, known: Meanings, steps: int
) -> float:
    rng = random.Random(corpus.SEED)
    optimisers = training.optimisers(model, rate=3e-3, table_rate=3e-3)
    schedules = [training.schedule(o, steps) for o in optimisers]
    average = 5.0
    with training.progress() as bar:
        task = bar.add_task("training", total=steps, loss=average)
        for step in range(1, steps + 1):
            pairs = same_meaning.training_pairs(rng, known, PAIRS)
            both = embed(model, tokenizer, [a for a, _ in pairs] + [b for _, b in pairs])
            loss = contrast(both[: len(pairs)], both[len(pairs) :])
            loss.backward()
            for part in (*optimisers, *schedules):
                part.step()
            model.zero_grad(set_to_none=True)
            average += (loss.item() - average) * max(0.02, 1 / step)
            bar.update(task, advance=1, loss=average)
            if step % 200 == 0 or step == steps:
                bar.console.print(f"step {step}: loss {average:.4f}")
    return average


@torch.inference_mode()
def recall(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, known: Meanings
) -> dict[str, object]:
    """For every wording kept out: is the nearest of all questions the same question?"""
    rng = random.Random(corpus.SEED + 1)
    meanings = list(known.learned)
    shelf = embed(model, tokenizer, [known.learned[m][0].text for m in meanings])
    asked = [(m, q) for m, questions in known.kept_out.items() for q in questions
             if m in known.learned]
    found = embed(model, tokenizer, [dressed(rng, q) for _, q in asked]) @ shelf.T
    ranked = found.topk(5, dim=1).indices.tolist()
    first = [meanings[r[0]] == m for (m, _), r in zip(asked, ranked, strict=True)]
    in_five = [m in {meanings[i] for i in r} for (m, _), r in zip(asked, ranked, strict=True)]
    by_kind: dict[str, list[bool]] = {}
    for (meaning, _), right in zip(asked, first, strict=True):
        by_kind.setdefault(meaning[0], []).append(right)
    return {
        "held_out_recall_at_1": round(sum(first) / len(first), 4),
        "held_out_recall_at_5": round(sum(in_five) / len(in_five), 4),
        "questions": len(asked),
        "among": len(meanings),
        "by_kind": {kind: round(sum(r) / len(r), 4) for kind, r in by_kind.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=EMBED, help="folder to write (replaced)")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.manual_seed(corpus.SEED)
    torch.set_num_threads(1)  # operations this small gain nothing from more
    began = time.monotonic()
    known = same_meaning.meanings()
    tokenizer = new_tokenizer(known)
    model = new_model(tokenizer)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(known.learned)} questions")
    loss = train(model, tokenizer, known, options.steps)
    seconds = round(time.monotonic() - began)
    model.to(torch.bfloat16).eval()  # measured as it is saved
    report = recall(model, tokenizer, known)
    report |= {"parameters": size, "dimensions": model.config.hidden_size,
               "loss": round(loss, 4), "training_seconds": seconds}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "README.md").write_text(embed_card(report))
        training.replace_folder(folder, options.out)
    print(json.dumps(report, indent=2))
    print(f"written to {options.out} after {seconds} s of training")


if __name__ == "__main__":
    main()
