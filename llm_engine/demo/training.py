"""What both training scripts share: the tokenizer, the optimisers, the schedule, safe replacement.

Imported by the training scripts only, so torch and transformers may be imported at the top.
"""

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
SPECIAL = [END_OF_TEXT, "<|im_start|>", END_OF_TURN]
TOOL_MARKS = ["<tool_call>", "</tool_call>"]


def train_tokenizer(texts: Iterable[str], vocabulary: int, marks: list[str]) -> Tokenizer:
    """Byte-level BPE: every string can be encoded; a digit is a token, so sums can be learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(marks),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Not "special": a client that hides special tokens must still see the tool calls.
    tokenizer.add_tokens(marks)
    return tokenizer


def as_transformers(tokenizer: Tokenizer, end: str, longest: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=END_OF_TEXT,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


class Workers:
    """One Python thread per core, each with its own half of every batch and its own gradients.

    Threads inside each operation would meet at a barrier hundreds of times a step; on a busy
    machine every meeting costs a time slice, so these meet once a step.
    """

    def __init__(self, model: torch.nn.Module, count: int = 2) -> None:
        self.model = model
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        torch.set_num_threads(1)
        self.replicas = [copy.deepcopy(model) for _ in range(count)]
        for replica in self.replicas:
            for mine, shared in zip(replica.parameters(), model.parameters(), strict=True):
                mine.data = shared.data  # one set of weights, several sets of gradients

    def gradients(self, loss_of: Callable[[Any, int], torch.Tensor]) -> float:
        """Run `loss_of(replica, number)` in every worker and add up what they found."""

        def one(number: int) -> float:
            replica = self.replicas[number]
            replica.zero_grad(set_to_none=True)
            loss = loss_of(replica, number)
            loss.backward()
            return loss.item()

        total = sum(self.pool.map(one, range(len(self.replicas))))
        for parts in zip(self.model.parameters(), *(r.parameters() for r in self.replicas),
                         strict=True):
            parts[0].grad = sum(part.grad for part in parts[1:])
        return total

    def step(self, optimisers: list[torch.optim.Optimizer]) -> None:
        list(self.pool.map(lambda optimiser: optimiser.step(), optimisers))


def optimisers(
    model: torch.nn.Module, rate: float, table_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices learns these facts in about half the steps; AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in named if p.ndim != 2 or "embed" in n]
    muons = [  # two, so that two workers can step at once
        torch.optim.Muon(
            half, lr=rate, weight_decay=0.01, momentum=0.95, ns_steps=4,
            adjust_lr_fn="match_rms_adamw",
        )
        for half in (matrices[::2], matrices[1::2])
    ]
    adam = torch.optim.AdamW(others, lr=table_rate, betas=(0.9, 0.98), weight_decay=0, fused=True)
    return [*muons, adam]


def schedule(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A short rise, a plateau, then a straight fall to nothing over the last half."""
    warm, fall = max(1, steps // 40), steps // 2

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm, max(0.0, (steps - step) / fall))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )


def batches_by_length(
    rows: list[list[int]], tokens: int, shuffle: torch.Generator
) -> Iterator[list[int]]:
    """Row numbers in batches of about `tokens` tokens, rows of one length together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches: list[list[int]] = [[]]
    for i in order:
        if (len(batches[-1]) + 1) * len(rows[i]) > tokens and batches[-1]:
            batches.append([])
        batches[-1].append(i)
    for b in torch.randperm(len(batches), generator=shuffle).tolist():
        yield batches[b]


def replace_folder(new: Path, final: Path) -> None:
    """Swap a finished folder in, so that nobody ever sees half a model."""
    for file in new.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner only
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)
