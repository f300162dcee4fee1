"""Texts that mean the same, for the embedding model: phrasings of one question, and its answer.

Pure Python and deterministic; uses the same held-out split as the chat model's corpus.
"""

import random
from dataclasses import dataclass

from llm_engine.demo import generated
from llm_engine.demo.conversation import dressed
from llm_engine.demo.questions import KNOWN, Question

Meaning = tuple[str, str]  # kind, key


@dataclass(frozen=True)
class Meanings:
    """Every question of the tables, by meaning: the wordings to learn and those kept out."""

    learned: dict[Meaning, list[Question]]
    kept_out: dict[Meaning, list[Question]]


def meanings() -> Meanings:
    learned: dict[Meaning, list[Question]] = {}
    kept_out: dict[Meaning, list[Question]] = {}
    for kind in KNOWN:
        for question in kind.every():
            side = kept_out if question.held_out else learned
            side.setdefault((question.kind, question.key), []).append(question)
    return Meanings(learned, kept_out)


def wording(rng: random.Random, questions: list[Question]) -> str:
    """One way to say it: usually a question as typed, now and then the answer's sentence."""
    question = rng.choice(questions)
    return question.answer if rng.random() < 0.15 else dressed(rng, question)


def training_pairs(rng: random.Random, known: Meanings, size: int) -> list[tuple[str, str]]:
    """Pairs of different meanings; half of them of one kind, so that the subject must count."""
    keys = list(known.learned)
    kind = rng.choice(keys)[0]
    alike = [key for key in keys if key[0] == kind]
    chosen = set(rng.sample(alike, min(len(alike), size // 2)))
    for key in rng.sample(keys, size):
        if len(chosen) == size:
            break
        chosen.add(key)
    pairs = []
    for key in sorted(chosen):
        first, second = (wording(rng, known.learned[key]) for _ in range(2))
        pairs.append((first, second))
    return pairs


def small_talk() -> dict[Meaning, list[str]]:
    """Greetings and thanks also have several wordings."""
    return {("talk", answer): list(asked) for answer, asked in generated.TALK.items()}
