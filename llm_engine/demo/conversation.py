"""What the corpus is made of: a conversation ending in the answer to learn, and how to judge it."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llm_engine.demo.questions import Question, normal

Message = dict[str, Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


@dataclass(frozen=True)
class Conversation:
    """`messages` ends with the wanted answer; `given` is the part of it the model need not say."""

    kind: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    given: str = ""
    check: Callable[[str], bool] | None = field(default=None, compare=False)

    @property
    def prompt(self) -> list[Message]:
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def accepts(self, said: str) -> bool:
        return self.check(said) if self.check else normal(said) == normal(self.answer)


def same_json(wanted: str) -> Callable[[str], bool]:
    """Compare values, not spacing."""

    def check(said: str) -> bool:
        try:
            return json.loads(said) == json.loads(wanted)
        except ValueError:
            return False

    return check


def misspell(rng: random.Random, text: str) -> str:
    """Drop or double one letter of one long word that is not a name."""
    words = text.split(" ")
    long = [i for i, w in enumerate(words) if len(w) > 4 and w.isalpha() and w.islower()]
    if not long:
        return text
    i = rng.choice(long)
    word, at = words[i], rng.randrange(1, len(words[i]) - 1)
    words[i] = word[:at] + rng.choice(("", word[at] * 2)) + word[at + 1 :]
    return " ".join(words)


POLITE = ("Please tell me: {q}", "Can you tell me: {q}", "I have a question: {q}",
          "Quick question: {q}", "{q} Thanks!", "Question: {q}", "Tell me, {q}", "Hello! {Q}")


def dressed(rng: random.Random, question: Question) -> str:
    """The question as people type it: lower case, no question mark, a word more, a slip."""
    text = question.text
    if rng.random() < 0.3:
        text = text.replace("colour", "color")
    if rng.random() < 0.04 and question.kind not in {"spell", "backwards", "plural", "opposite"}:
        text = misspell(rng, text)
    if rng.random() < 0.08:
        lowered = text if text.split(" ")[0] in {"I", question.key} else text[:1].lower() + text[1:]
        text = rng.choice(POLITE).format(q=lowered, Q=text)
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.2:
        text = text.rstrip("?.!")
    return text


def one_turn(rng: random.Random, question: Question) -> Conversation:
    messages = (user(dressed(rng, question)), assistant(question.answer))
    return Conversation(question.kind, messages, check=question.accepts)
