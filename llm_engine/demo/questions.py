"""Single questions with their answers: each kind is a table of facts and a list of phrasings.

A question is known by (kind, key, phrasing); one combination in ten is kept out of training.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from llm_engine.demo import facts

HELD_OUT_ONE_IN = 10
UNKNOWN = "I do not know that."


@dataclass(frozen=True)
class Question:
    """One question: what it asks, the right sentence, the bare answer and the same as JSON."""

    kind: str
    key: str
    phrasing: int
    text: str
    answer: str
    short: str
    fields: tuple[tuple[tuple[str, ...], str | int], ...] = ()  # (possible names, value)
    follow: str = ""  # the same question asked after another of its kind
    check: Callable[[str], bool] | None = field(default=None, compare=False)

    @property
    def held_out(self) -> bool:
        return is_held_out(self.kind, self.key, self.phrasing)

    def accepts(self, said: str) -> bool:
        return self.check(said) if self.check else normal(said) == normal(self.answer)


def is_held_out(kind: str, key: str, phrasing: int) -> bool:
    """Decided by a checksum, so that it is the same in every run and on every machine."""
    return zlib.crc32(f"{kind}|{key}|{phrasing}".encode()) % HELD_OUT_ONE_IN == 0


def normal(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".!?")


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


@dataclass(frozen=True)
class Facts:
    """A kind of question answered from a table; {x} is what is asked about, {y} the answer."""

    name: str
    table: dict[str, str]
    answer: str
    phrasings: tuple[str, ...]
    follows: tuple[str, ...] = ("And {x}?", "What about {x}?")
    x_names: tuple[str, ...] = ("name",)
    y_names: tuple[str, ...] = ("answer",)
    weight: float = 1.0

    def question(self, key: str, phrasing: int, follow: int = 0) -> Question:
        value = self.table[key]
        bare = key.removeprefix("a ").removeprefix("an ").removeprefix("the ")
        an = article(key)
        words = {"x": key, "y": value, "X": upper_first(key), "a": an, "A": upper_first(an)}
        return Question(
            self.name,
            key,
            phrasing,
            upper_first(self.phrasings[phrasing].format(**words)),
            upper_first(self.answer.format(**words)),
            upper_first(value) + ".",
            (
                (self.x_names, bare),
                ((*self.y_names, "answer"), int(value) if value.isdigit() else value),
            ),
            self.follows[follow].format(**words),
        )

    def sample(self, rng: random.Random) -> Question:
        key = rng.choice(list(self.table))
        phrasing = rng.randrange(len(self.phrasings))
        return self.question(key, phrasing, rng.randrange(len(self.follows)))

    def every(self) -> Iterator[Question]:
        for key in self.table:
            for phrasing in range(len(self.phrasings)):
                yield self.question(key, phrasing)


def _country(column: int) -> dict[str, str]:
    return {row[0]: row[column] for row in facts.COUNTRIES}


def _animal(column: int) -> dict[str, str]:
    return {row[0]: row[column] for row in facts.ANIMALS}


def _after(names: list[str], step: int) -> dict[str, str]:
    return {name: names[(i + step) % len(names)] for i, name in enumerate(names)}


def _spelled(word: str) -> str:
    return "-".join(word.upper())


def about(row: list[str]) -> str:
    """A paragraph about one animal, for answers long enough to watch arriving."""
    name, plural, sound, young, legs, food, home = row
    some = upper_first(plural)
    return (
        f"{some} are animals with {legs} legs. {some} live in {home} and eat {food}. "
        f"The sound of {article(name)} is {sound}. A baby {name} is called a {young}."
    )


KNOWN: tuple[Facts, ...] = (
    Facts(
        "capital", _country(1), "The capital of {x} is {y}.",
        ("what is the capital of {x}?", "what's the capital of {x}?", "capital of {x}?",
         "tell me the capital of {x}.", "which city is the capital of {x}?",
         "name the capital of {x}.", "do you know the capital of {x}?", "{x}: what is its capital?",
         "what is the capital city of {x}?", "which city is {x}'s capital?",
         "I want to know the capital of {x}.", "what city is the capital of {x}?",
         "give me the capital of {x}.", "what is {x}'s capital?"),
        ("And of {x}?", "What about {x}?", "And {x}?", "And the capital of {x}?"),
        ("country", "name"), ("capital", "city"), 4.0,
    ),
    Facts(
        "country", {row[1]: row[0] for row in facts.COUNTRIES}, "{x} is the capital of {y}.",
        ("{x} is the capital of which country?", "which country has {x} as its capital?",
         "what country is {x} the capital of?", "of which country is {x} the capital?",
         "{x} is the capital of what?", "which country's capital is {x}?"),
        x_names=("capital", "city"), y_names=("country",), weight=2.5,
    ),
    Facts(
        "continent", _country(2), "{x} is in {y}.",
        ("which continent is {x} in?", "what continent is {x} in?", "where is {x}?",
         "on which continent is {x}?", "in what part of the world is {x}?",
         "{x} is on which continent?"),
        x_names=("country", "name"), y_names=("continent",), weight=2.0,
    ),
    Facts(
        "language", _country(3), "People in {x} speak {y}.",
        ("what language do people speak in {x}?", "which language is spoken in {x}?",
         "what language is spoken in {x}?", "what do people speak in {x}?",
         "what is the language of {x}?", "which language do they speak in {x}?"),
        ("And in {x}?", "What about {x}?"),
        ("country", "name"), ("language",), 2.0,
    ),
    Facts(
        "opposite", facts.OPPOSITES | {b: a for a, b in facts.OPPOSITES.items()},
        "The opposite of {x} is {y}.",
        ("what is the opposite of {x}?", "what's the opposite of {x}?", "opposite of {x}?",
         "tell me the opposite of {x}.", "what is the contrary of {x}?",
         "give me the opposite of {x}.", "which word is the opposite of {x}?",
         "what word means the opposite of {x}?"),
        ("And of {x}?", "What about {x}?", "And {x}?"), ("word",), ("opposite",), 2.5,
    ),
    Facts(
        "colour", facts.COLOURS, "{x} is {y}.",
        ("what colour is {x}?", "which colour is {x}?", "what is the colour of {x}?",
         "tell me the colour of {x}.", "{x} is what colour?", "what colour does {x} have?",
         "do you know what colour {x} is?", "say what colour {x} is."),
        ("And {x}?", "What about {x}?"), ("thing", "name"), ("colour",), 1.5,
    ),
    Facts(
        "day", _after(facts.DAYS, 1), "{y} comes after {x}.",
        ("what day comes after {x}?", "which day follows {x}?", "what is the day after {x}?",
         "what comes after {x}?", "which day is after {x}?", "if today is {x}, what is tomorrow?",
         "today is {x}. What day is tomorrow?"),
        ("And after {x}?",), ("day",), ("next",), 0.7,
    ),
    Facts(
        "day before", _after(facts.DAYS, -1), "{y} comes before {x}.",
        ("what day comes before {x}?", "what is the day before {x}?", "what comes before {x}?",
         "which day is before {x}?", "if today is {x}, what was yesterday?",
         "today is {x}. What day was yesterday?"),
        ("And before {x}?",), ("day",), ("previous",), 0.7,
    ),
    Facts(
        "month", _after(facts.MONTHS, 1), "{y} comes after {x}.",
        ("what month comes after {x}?", "which month follows {x}?", "what is the month after {x}?",
         "what comes after {x}?", "which month is after {x}?"),
        ("And after {x}?",), ("month",), ("next",), 0.7,
    ),
    Facts(
        "month before", _after(facts.MONTHS, -1), "{y} comes before {x}.",
        ("what month comes before {x}?", "what is the month before {x}?", "what comes before {x}?",
         "which month is before {x}?", "which month comes just before {x}?"),
        ("And before {x}?",), ("month",), ("previous",), 0.7,
    ),
    Facts(
        "sound", _animal(2), "The sound of {a} is {y}.",
        ("what sound does {a} make?", "which sound does {a} make?", "what does {a} say?",
         "what noise does {a} make?", "what is the sound of {a}?", "how does {a} sound?"),
        ("And {a}?", "What about {a}?"), ("animal",), ("sound",),
    ),
    Facts(
        "young", _animal(3), "A baby {x} is called a {y}.",
        ("what is a baby {x} called?", "what do you call a baby {x}?",
         "what is the name for a young {x}?", "what is a young {x} called?",
         "how do we call a baby {x}?"),
        ("And a baby {x}?",), ("animal",), ("young", "baby"),
    ),
    Facts(
        "legs", _animal(4), "{A} has {y} legs.",
        ("how many legs does {a} have?", "how many legs has {a}?", "count the legs of {a}.",
         "what is the number of legs of {a}?", "{a} has how many legs?"),
        ("And {a}?", "What about {a}?"), ("animal",), ("legs",), 0.7,
    ),
    Facts(
        "food", _animal(5), "{A} eats {y}.",
        ("what does {a} eat?", "what is the food of {a}?",
         "what should I feed {a}?", "which food does {a} eat?"),
        ("And {a}?", "What about {a}?"), ("animal",), ("food",),
    ),
    Facts(
        "about", {row[0]: about(row) for row in facts.ANIMALS}, "{y}",
        ("tell me about the {x}.", "what do you know about the {x}?", "describe {a}.",
         "write a few sentences about the {x}.", "write a paragraph about the {x}.",
         "tell me something about the {x}.", "what is {a}?"),
        ("And the {x}?", "And about the {x}?"), ("animal",), ("text",), 1.2,
    ),
    Facts(
        "plural", facts.PLURALS, "The plural of {x} is {y}.",
        ("what is the plural of {x}?", "what's the plural of {x}?", "plural of {x}?",
         "tell me the plural of {x}.", "one {x}, two what?", "give me the plural of {x}.",
         "how do you write {x} in the plural?"),
        ("And of {x}?", "What about {x}?", "And {x}?"), ("word",), ("plural",), 1.5,
    ),
    Facts(
        "spell", {w: _spelled(w) for w in facts.SPELLED}, "{X} is spelled {y}.",
        ("how do you spell {x}?", "spell {x}.", "can you spell {x}?", "spell the word {x}.",
         "how is {x} spelled?", "what are the letters of {x}?"),
        ("And {x}?", "What about {x}?"), ("word",), ("spelling",), 1.2,
    ),
    Facts(
        "backwards", {w: w[::-1] for w in facts.SPELLED[:24]}, "{X} backwards is {y}.",
        ("what is {x} backwards?", "write {x} backwards.", "spell {x} backwards.",
         "say {x} backwards.", "what is {x} in reverse?"),
        ("And {x}?", "What about {x}?"), ("word",), ("backwards",), 0.7,
    ),
    Facts(
        "amount", facts.AMOUNTS, "The answer is {y}.",
        ("how many {x}?", "tell me how many {x}.", "do you know how many {x}?",
         "how many {x}, please?", "I would like to know how many {x}.", "say how many {x}."),
        ("And how many {x}?",), ("question",), ("amount", "number"), 0.8,
    ),
)
