"""What the demo model can be taught by fine-tuning: two lessons, made from tables by rule.

    python -m llm_engine.demo.lessons          writes llm_engine/demo/examples/ anew

support   a message of a customer becomes {"team": ..., "urgent": ...}: new to the model. Among
          them lie questions that it knows, lest it forgets them.
polite    of two right answers, the polite one is preferred

Pure Python, the same every time. Training never has a combination that `held_out` may ask: of a
complaint and a thing, or of a question and its wording.
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llm_engine.demo import EXAMPLES
from llm_engine.demo.conversation import assistant, dressed, system, user
from llm_engine.demo.corpus import question, training
from llm_engine.demo.questions import is_held_out, upper_first

SEED = 5150
TRAINING, VALIDATION = 700, 60  # lines of each file
KNOWN_SHARE = 0.4

DESK = "You sort the messages of customers."
THINGS = ("lamp", "kettle", "bike", "chair", "radio", "mirror", "watch", "tent", "camera",
          "printer", "table", "clock", "phone", "jacket", "desk", "fan")
#: {x}: the thing; {X}: it begins the sentence.
COMPLAINTS = {
    "invoice": (
        "I was charged twice for my {x}.", "The price of my {x} is wrong on the bill.",
        "I paid for a {x} and got no bill.", "Why must I pay again for my {x}?",
        "I need a bill for my {x}.", "The money for the {x} was taken two times.",
    ),
    "shipping": (
        "My {x} has not arrived.", "Where is my {x}?", "My {x} came to the wrong house.",
        "When will my {x} come?", "The driver did not bring my {x}.",
        "I am waiting for my {x} since Monday.",
    ),
    "returns": (
        "I want to send my {x} back.", "How do I return a {x}?", "The {x} is too big for me.",
        "I do not want the {x} any more.", "This is not the {x} that I ordered.",
        "I want another {x}.",
    ),
    "repair": (
        "My {x} is broken.", "The {x} does not work.", "My {x} makes a strange sound.",
        "My {x} stopped after a day.", "How do I repair my {x}?", "A part of the {x} fell off.",
    ),
}  # fmt: skip
OPENINGS = ("", "", "Hello! ", "Hi, ", "Good morning. ", "Dear team, ")
URGENT = (" Please hurry!", " I need it today.", " It is urgent.", " I cannot wait.")
CALM = ("", "", " Thanks!", " There is no hurry.", " Take your time.")


def support_file(seed: int = SEED) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"known {seed}")
    new, known = support(seed=seed), training(seed)
    while True:
        if rng.random() < KNOWN_SHARE:
            made = next(known)
            line: dict[str, Any] = {"messages": list(made.messages)}
            yield line | ({"tools": list(made.tools)} if made.tools else {})
        else:
            yield next(new)


def support(held_out: bool = False, seed: int = SEED) -> Iterator[dict[str, Any]]:
    """An endless stream of lines of a training file."""
    rng = random.Random(f"support {seed} {held_out}")
    while True:
        team = rng.choice(tuple(COMPLAINTS))
        number = rng.randrange(len(COMPLAINTS[team]))
        thing = rng.choice(THINGS)
        if is_held_out(team, thing, number) != held_out:
            continue
        urgent = rng.random() < 0.4
        opening = rng.choice(OPENINGS)
        said = COMPLAINTS[team][number].format(x=thing)
        if opening.endswith(", ") and not said.startswith("I "):
            said = said[:1].lower() + said[1:]
        said = upper_first(opening + said + rng.choice(URGENT if urgent else CALM))
        answer = json.dumps({"team": team, "urgent": urgent})
        yield {"messages": [system(DESK), user(said), assistant(answer)]}


def polite(held_out: bool = False, seed: int = SEED) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"polite {seed} {held_out}")
    while True:
        asked = question(rng, held_out)
        if asked.kind in ("story", "list", "talk", "unknown"):
            continue
        yield {
            "input": {"messages": [user(dressed(rng, asked))]},
            "preferred_output": [assistant(f"With pleasure. {asked.answer}")],
            "non_preferred_output": [assistant(asked.answer)],
        }


def write(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, made in (("support", support_file()), ("polite", polite())):
        for part, count in (("train", TRAINING), ("valid", VALIDATION)):
            lines = (json.dumps(line) + "\n" for line in islice(made, count))
            (folder / f"{name}.{part}.jsonl").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=EXAMPLES, help="folder to write into")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
