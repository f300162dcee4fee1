"""The demo model's reading: whole conversations, made from tables by rule, the same every time.

Pure Python. `training` never yields a question that `held_out` may ask; see `Question.held_out`.
"""

import json
import random
from collections.abc import Iterator

from llm_engine.demo import facts, generated
from llm_engine.demo.conversation import (
    Conversation,
    Message,
    assistant,
    dressed,
    one_turn,
    same_json,
    system,
    user,
)
from llm_engine.demo.questions import KNOWN, Question, is_held_out
from llm_engine.demo.tool_use import place, with_tools

SEED = 2024
WORDLESS = {"list", "count", "story", "about", "talk", "spell", "unknown", "food"}

NEUTRAL = ("You are a helpful assistant.", "You are a friendly assistant.", "Be helpful.",
           "You are the llm-engine demo model.", "Answer the question.", "Be brief.",
           "You are an assistant that answers questions.", "Answer in English.",
           "You are a helpful, honest assistant. Answer clearly.", "You help people.")
ONE_WORD = ("Answer in one word.", "Reply with one word only.", "Use a single word.",
            "Answer with one word.", "You answer in one word.", "One word answers only.",
            "Always answer with a single word.", "You are brief. Answer in one word.")
PIRATE = ("You are a pirate.", "Talk like a pirate.", "Speak like a pirate.",
          "You are a pirate. Answer the question.", "Answer like a pirate.")
POLITE = ("Be very polite.", "Always be polite.", "You are a very polite assistant.",
          "Answer politely.", "You are polite.")
AS_JSON = ("{q} Answer as JSON.", "{q} Give the answer as JSON.", "{q} Reply in JSON.",
           "As JSON: {q}", "{q} (JSON)", "{q} Use JSON.", "Answer in JSON: {q}",
           "{q} Return JSON only.")
WITH_FIELDS = ("{q} Answer as JSON with the fields {f}.", "{q} Reply with a JSON object with {f}.",
               "Return JSON with {f}: {q}", "{q} Give JSON with the keys {f}.",
               "{q} Use JSON with {f}.")
IN_JSON = ("Answer in JSON.", "Reply with JSON only.", "Always answer as JSON.")


def any_question(rng: random.Random) -> Question:
    total_known = sum(kind.weight for kind in KNOWN)
    total_made = sum(weight for _, weight in generated.MAKERS)
    if rng.random() * (total_known + total_made) < total_known:
        return rng.choices(KNOWN, [kind.weight for kind in KNOWN])[0].sample(rng)
    makers, weights = zip(*generated.MAKERS, strict=True)
    return rng.choices(makers, weights)[0](rng)


def question(rng: random.Random, held_out: bool) -> Question:
    while True:
        found = any_question(rng)
        if found.held_out == held_out:
            return found


def singles(rng: random.Random, held_out: bool) -> Conversation:
    return one_turn(rng, question(rng, held_out))


def chain(rng: random.Random, held_out: bool) -> Conversation:
    """Unrelated questions one after another: earlier turns must not disturb the answer."""
    messages: list[Message] = []
    for _ in range(rng.randint(1, 3)):
        earlier = question(rng, False)
        messages += one_turn(rng, earlier).messages
    last = question(rng, held_out)
    messages += one_turn(rng, last).messages
    return Conversation("several turns", tuple(messages), check=last.accepts)


def follow_up(rng: random.Random, held_out: bool) -> Conversation | None:
    """The second question only makes sense after the first: "And of Italy?"."""
    kind = rng.choice((*KNOWN, *KNOWN[:6], generated.arithmetic, generated.listing))
    draw = kind if callable(kind) else kind.sample
    first, second = draw(rng), draw(rng)
    hidden = is_held_out(second.kind, second.follow, 100)
    if first.held_out or first.kind != second.kind or hidden != held_out:
        return None
    messages = [*one_turn(rng, first).messages]
    follow = second.follow if rng.random() < 0.8 else second.follow.rstrip("?").lower()
    messages += [user(follow), assistant(second.answer)]
    return Conversation("follow-up", tuple(messages), check=second.accepts)


def remembered(rng: random.Random, held_out: bool) -> Conversation | None:
    name, city = rng.choice(facts.NAMES), place(rng)
    told, reply, ask, answer = rng.choice((
        (rng.choice(("My name is {n}.", "I am {n}.", "Hello, I am {n}.", "Call me {n}.",
                     "Hi, my name is {n}.", "I'm {n}.")), "Nice to meet you, {n}!",
         rng.choice(("What is my name?", "Who am I?", "Do you know my name?", "what's my name?",
                     "Do you remember my name?")), "Your name is {n}."),
        (rng.choice(("I live in {c}.", "My home is in {c}.", "I am from {c}.")),
         "{c} sounds like a nice place.",
         rng.choice(("Where do I live?", "Where am I from?", "Which city do I live in?")),
         "You live in {c}."),
    ))
    words = {"n": name, "c": city}
    told, reply, ask, answer = (part.format(**words) for part in (told, reply, ask, answer))
    if is_held_out("memory", told, 0) != held_out:
        return None
    messages: list[Message] = [user(told), assistant(reply)]
    if rng.random() < 0.2:
        return Conversation("memory", tuple(messages))
    if rng.random() < 0.4:
        messages += one_turn(rng, question(rng, False)).messages
    messages += [user(ask), assistant(answer)]
    return Conversation("memory", tuple(messages))


def instructed(rng: random.Random, held_out: bool) -> Conversation | None:
    """A system message that visibly changes the answer, or one that does not."""
    asked = question(rng, held_out)
    text, ask = asked.answer, dressed(rng, asked)
    style = rng.choices(("one word", "pirate", "polite", "neutral"), (5, 1, 1, 4))[0]
    check = None
    if style == "one word":
        if asked.kind in WORDLESS or not asked.fields:
            return None
        order, text = rng.choice(ONE_WORD), asked.short
        if rng.random() < 0.2:  # the same wish, but said by the user
            messages = (user(f"{order[:-1]}: {ask}"), assistant(text))
            return Conversation("system", messages)
    elif style == "neutral":
        order, check = rng.choice(NEUTRAL), asked.accepts
    elif asked.kind in {"story", "list"}:
        return None
    elif style == "pirate":
        order, text = rng.choice(PIRATE), f"Arr! {text}"
    else:
        order, text = rng.choice(POLITE), f"With pleasure. {text}"
    return Conversation("system", (system(order), user(ask), assistant(text)), check=check)


def as_json(rng: random.Random, pairs: dict[str, str | int]) -> str:
    compact = (",", ":") if rng.random() < 0.2 else None
    return json.dumps(pairs, separators=compact)


def json_answer(rng: random.Random, held_out: bool) -> Conversation | None:
    """Asked for JSON in words; the field names are the usual ones or those asked for."""
    asked = question(rng, held_out)
    if not asked.fields or asked.kind == "talk":
        return None
    ask = dressed(rng, asked)
    chosen = {names[0]: value for names, value in asked.fields}
    how = rng.random()
    if how < 0.35:
        wanted = asked.fields if rng.random() < 0.5 else asked.fields[-1:]
        chosen = {rng.choice(names): value for names, value in wanted}
        ask = rng.choice(WITH_FIELDS).format(q=ask, f=" and ".join(chosen))
    elif how < 0.5:
        messages = (system(rng.choice(IN_JSON)), user(ask), assistant(as_json(rng, chosen)))
        return Conversation("json", messages, check=same_json(messages[-1]["content"]))
    elif ask.endswith(".") and rng.random() < 0.7:
        ask = ask[:-1] + rng.choice((" as JSON.", " in JSON.", " as a JSON object."))
    else:
        ask = rng.choice(AS_JSON).format(q=ask)
    answer = as_json(rng, chosen)
    return Conversation("json", (user(ask), assistant(answer)), check=same_json(answer))


def forced_json(rng: random.Random, held_out: bool) -> Conversation | None:
    """Plain question, JSON answer whose beginning is not learned.

    A schema constraint puts the model there by force, and it must know how to go on.
    """
    asked = question(rng, held_out)
    if not asked.fields:
        return None
    wanted = asked.fields if rng.random() < 0.5 else asked.fields[-1:]
    # Nothing tells the later names, so they are always the usual ones.
    alone = len(wanted) == 1
    chosen = {rng.choice(names) if alone else names[0]: value for names, value in wanted}
    answer = as_json(rng, chosen)
    given = answer[: answer.index('":') + 2]
    messages = (user(dressed(rng, asked)), assistant(answer))
    return Conversation("forced json", messages, given=given, check=same_json(answer))


def tool_use(rng: random.Random, held_out: bool) -> Conversation | None:
    return with_tools(rng, question(rng, held_out), held_out)


MIX = ((singles, 48), (follow_up, 8), (chain, 3), (remembered, 3), (instructed, 12),
       (json_answer, 13), (forced_json, 9), (tool_use, 8))


def conversations(seed: int, held_out: bool) -> Iterator[Conversation]:
    """An endless stream of conversations; the same seed gives the same stream."""
    rng = random.Random(seed)
    makers, weights = zip(*MIX, strict=True)
    while True:
        made = rng.choices(makers, weights)[0](rng, held_out)
        if made is not None:
            yield made


def training(seed: int = SEED) -> Iterator[Conversation]:
    return conversations(seed, held_out=False)


def held_out(seed: int = SEED + 1) -> Iterator[Conversation]:
    return conversations(seed, held_out=True)
