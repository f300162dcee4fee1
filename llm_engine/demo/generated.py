"""Questions made by rule instead of from a table: sums, counting, lists, stories, small talk.

Also questions the model must decline. Same split as the tables: see `Question.held_out`.
"""

import random
from collections.abc import Callable

from llm_engine.demo import facts
from llm_engine.demo.questions import UNKNOWN, Question, normal, upper_first

Maker = Callable[[random.Random], Question]

ADDITION = ("what is {a} + {b}?", "{a} + {b}", "{a} plus {b}?", "what is {a} plus {b}?",
            "add {a} and {b}.", "what's {a} + {b}?", "calculate {a} + {b}.", "{a} + {b} = ?",
            "how much is {a} + {b}?", "what is the sum of {a} and {b}?")
SUBTRACTION = ("what is {a} - {b}?", "{a} - {b}", "{a} minus {b}?", "what is {a} minus {b}?",
               "subtract {b} from {a}.", "how much is {a} - {b}?", "what's {a} - {b}?")
MULTIPLICATION = ("what is {a} * {b}?", "{a} times {b}?", "what is {a} times {b}?",
                  "multiply {a} by {b}.", "how much is {a} times {b}?", "what is {a} x {b}?")


BY_HEART = 10  # sums and products of numbers up to this are learned like any other fact


def numbers(rng: random.Random, limit: int, sign: str) -> tuple[int, int]:
    a, b = rng.randint(0, limit), rng.randint(0, limit)
    return (b, a) if sign == "-" and a < b else (a, b)


def arithmetic(rng: random.Random) -> Question:
    name, sign, phrasings = rng.choices(
        (("sum", "+", ADDITION), ("difference", "-", SUBTRACTION),
         ("product", "*", MULTIPLICATION)), (4, 3, 2))[0]
    a, b = numbers(rng, BY_HEART, sign)
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    asked = rng.randrange(len(phrasings))
    text = upper_first(phrasings[asked].format(a=a, b=b))
    follow = rng.choice((f"And {a} {sign} {b}?", f"What about {a} {sign} {b}?"))
    return Question(name, f"{a},{b}", asked, text, f"{a} {sign} {b} = {value}.", f"{value}.",
                    (), follow)


def parity(rng: random.Random) -> Question:
    a = rng.randint(0, 20)
    phrasings = (f"is {a} even or odd?", f"is {a} odd or even?", f"is the number {a} even or odd?",
                 f"{a}: even or odd?", f"tell me whether {a} is even or odd.")
    i = rng.randrange(len(phrasings))
    word = "odd" if a % 2 else "even"
    return Question("parity", str(a), i, upper_first(phrasings[i]), f"{a} is {word}.",
                    upper_first(word) + ".", (), f"And {a}?")


COUNT = ("count {w}from {a} to {b}.", "can you count {w}from {a} to {b}?",
         "please count {w}from {a} to {b}.", "write the numbers {w}from {a} to {b}.",
         "list the numbers {w}from {a} to {b}.", "I want you to count {w}from {a} to {b}.")


def count(rng: random.Random) -> Question:
    last = rng.randint(3, 12)
    down = rng.random() < 0.3
    a, b, way = (last, 1, "down ") if down else (1, last, "")
    asked = rng.randrange(len(COUNT))
    text = COUNT[asked].format(w=way, a=a, b=b)
    said = ", ".join(map(str, range(a, b - 1, -1) if down else range(a, b + 1))) + "."
    return Question("count", f"{a},{b}", asked, upper_first(text), said, said, (),
                    f"And from {a} to {b}?")


LISTING = ("name {w}.", "list {w}.", "give me {w}.", "can you name {w}?", "tell me {w}.",
           "I need {w}.", "what are {w}?")


def listing(rng: random.Random) -> Question:
    category = rng.choice(list(facts.CATEGORIES))
    members = facts.CATEGORIES[category]
    n = rng.randint(2, 5)
    word = facts.NUMBER_WORDS[n]
    wanted = (f"{word} {category}", f"{n} {category}")
    phrasings = [p.format(w=w) for w in wanted for p in LISTING]
    i = rng.randrange(len(phrasings))
    # In the table's order: choosing freely and never twice is too much for so small a model.
    chosen = sorted(rng.sample(members, n), key=members.index)
    said = upper_first(", ".join(chosen[:-1]) + " and " + chosen[-1] + ".")

    def check(reply: str) -> bool:
        parts = normal(reply).replace(" and ", ", ").split(", ")
        known = {m.lower() for m in members}
        return len(parts) == n == len(set(parts)) and known.issuperset(parts)

    return Question("list", f"{category},{n}", i, upper_first(phrasings[i]), said, said, (),
                    f"And {word} {category}?", check)


STORY_ANIMALS = [row[0] for row in facts.ANIMALS if row[0] != "spider"]
STORY = ("tell me a story about a {x}.", "tell me a short story about a {x}.",
         "write a story about a {x}.", "can you tell a story about a {x}?",
         "I want to hear a story about a {x}.", "write a short story about a {x}.",
         "please tell a tale about a {x}.", "make up a story about a {x}.")


def tell(rng: random.Random, animal: str) -> str:
    name, friend = rng.sample(facts.NAMES, 2)
    adjective = rng.choice(("little", "brave", "clever", "hungry", "lonely", "curious", "old"))
    home = rng.choice(("in a small house by the sea", "on a quiet farm", "near a big forest",
                       "at the edge of a village", "under an old bridge", "on a green hill"))
    thing = rng.choice(("a golden key", "a red balloon", "a strange map", "a broken boat",
                        "a bag of apples", "a shiny stone", "a lost hat", "a letter"))
    place = rng.choice(("in the garden", "by the river", "under a tree", "on the road",
                        "behind the barn", "at the market"))
    deed = rng.choice((f"showed it to a friend called {friend}", f"gave it to {friend} the owl",
                       f"asked {friend} the mouse for help", f"hid it with {friend} the fox"))
    end = rng.choice(("They laughed and danced until the moon came up.",
                      "From that day on they were the best of friends.",
                      "Together they shared a warm supper and went to sleep.",
                      "Everybody in the village heard about it and smiled."))
    start = "an" if adjective == "old" else "a"
    return (f"Once upon a time there was {start} {adjective} {animal} called {name}. "
            f"{name} lived {home}. One day {name} found {thing} {place}. "
            f"The {animal} {deed}. {end}")


def story(rng: random.Random) -> Question:
    animal = rng.choice(STORY_ANIMALS)
    i = rng.randrange(len(STORY))
    said = tell(rng, animal)

    def check(reply: str) -> bool:
        return (reply.startswith("Once upon a time there was a") and reply.endswith(".")
                and 2 <= reply.split(" called")[0].count(" ") and reply.count(animal) >= 2
                and 30 <= len(reply.split()) <= 80)

    text = upper_first(STORY[i].format(x=animal)).replace(" a elephant", " an elephant")
    text = text.replace(" a owl", " an owl")
    return Question("story", animal, i, text, said, said, (), f"And about a {animal}?", check)


ABOUT_ME = ("I am the llm-engine demo model, a very small language model that runs on an "
            "ordinary computer.")
ABILITIES = ("I can answer questions about countries, animals, colours, words and small sums, "
             "count, list things and tell short stories.")
# What is said : the ways of asking.
TALK: dict[str, tuple[str, ...]] = {
    "Hello! How can I help you?": (
        "hello", "hi", "hey", "hello there", "hi there", "good morning", "good evening",
        "good afternoon", "hey there", "greetings", "hello model", "hi, model"),
    "I am fine, thank you. How can I help you?": (
        "how are you?", "how do you do?", "how are you today?", "how is it going?",
        "hello, how are you?", "hi, how are you?", "are you well?", "how are things?"),
    ABOUT_ME: (
        "who are you?", "what are you?", "what is your name?", "what's your name?",
        "tell me about yourself.", "introduce yourself.", "what model are you?",
        "which model are you?", "are you a robot?", "are you a person?", "are you an AI?",
        "what kind of model are you?", "who am I talking to?", "describe yourself.",
        "who is this?", "are you human?", "what is this model?", "which model is this?"),
    ABILITIES: (
        "what can you do?", "what do you know?", "help", "what can I ask you?",
        "how can you help me?", "what are you able to do?", "what questions can you answer?",
        "what are you good at?", "can you help me?", "what should I ask you?", "help me",
        "what can I ask?", "what can you answer?", "tell me what you can do."),
    "You are welcome!": (
        "thanks", "thank you", "thanks a lot", "thank you very much", "many thanks",
        "thanks for your help", "thank you so much", "great, thanks", "ok, thank you"),
    "Goodbye! Come back soon.": (
        "bye", "goodbye", "see you", "bye bye", "see you later", "good night", "farewell",
        "I have to go now", "see you tomorrow"),
    "I was made for llm-engine, with a script that you can run yourself.": (
        "who made you?", "who created you?", "who built you?", "where do you come from?",
        "how were you made?", "who trained you?", "how were you trained?"),
    "This is a test, and it works.": (
        "test", "testing", "this is a test", "is this working?", "are you there?", "ping",
        "say something", "does this work?", "just a test"),
    "Why did the cat sit on the computer? To keep an eye on the mouse.": (
        "tell me a joke.", "do you know a joke?", "say something funny.", "make me laugh.",
        "can you tell a joke?", "tell a joke", "I want to hear a joke."),
}
OPENINGS = ("", "", "", "", "Hey, ", "So, ", "Well, ", "Ok, ", "Please, ")


def talk(rng: random.Random) -> Question:
    answer = rng.choice(list(TALK))
    text = rng.choice(TALK[answer])
    opening = rng.choice(OPENINGS)
    return Question("talk", text, OPENINGS.index(opening), upper_first(opening + text), answer,
                    answer, (((("answer", "text")), answer),), upper_first(text))


_MADE_UP = ("bra", "zo", "lin", "tar", "ku", "mel", "dor", "vi", "san", "quo", "ple", "nar", "fi",
            "gor", "wex", "lu", "pim", "sto", "rah", "ty", "bel", "cro", "dun", "esk", "hab")
ASK_UNKNOWN = (
    "what is the capital of {n}?", "which continent is {n} in?", "who is {n}?", "what is {n}?",
    "what colour is a {w}?", "what is the opposite of {w}?", "who wrote {n}?",
    "what is the population of {n}?", "tell me about {n}.", "when was {n} born?",
    "what language do people speak in {n}?", "how old is {n}?", "where is {n}?",
    "how do I get to {n}?", "what is a {w}?", "how far is it to {n}?", "what does {w} mean?",
    "what sound does a {w} make?", "who is the president of {c}?", "how many people live in {c}?",
    "what is the population of {c}?", "who is the king of {c}?", "how big is {c}?",
    "what is the weather like in {c}?", "what time is it in {c}?", "how far is it to {c}?",
    "what is the price of {a}?", "how much does {a} cost?", "how old is a {a}?",
    "where can I buy {a}?", "who invented {a}?", "who discovered {a}?", "how heavy is {a}?")
NOT_KNOWN = """who won the match yesterday?|what is the meaning of life?|what is the weather today?
what time is it?|who wrote Hamlet?|what will happen tomorrow?|how do I fix my car?|what is love?
who is the best singer?|what is the speed of light?|when did the war end?|how does a computer work?
what is my password?|who painted the Mona Lisa?|what is the stock price?|how tall is the tower?
what is quantum physics?|who was the first man on the moon?|what is today's date?|what is DNA?
what is the boiling point of iron?|why is the sky blue?|how do planes fly?|what is the news today?
who is the richest person?|what is the best film?|how do I bake bread?|what should I wear?
write a poem about love|translate this into Latin|what is the tallest mountain?|who is your boss?
what is the longest river?|how do I learn to swim?|when is the next train?|what is gravity?
who invented the telephone?|what is the square root of two?|how deep is the ocean?|what is art?
where did I put my keys?|what did I eat yesterday?|who will win the election?|why do we sleep?
explain relativity|write some code|solve this equation|what is a black hole?|who was Napoleon?
how many stars are there?|what is inflation?|how do vaccines work?|what is a prime number?"""


def unknown(rng: random.Random) -> Question:
    known = [text.strip() for line in NOT_KNOWN.split("\n") for text in line.split("|")]
    if rng.random() < 0.1:
        text = rng.choice(known)
        key, i = text, 1
    else:
        i = rng.randrange(len(ASK_UNKNOWN))
        word = "".join(rng.sample(_MADE_UP, rng.randint(2, 3)))
        country, thing = rng.choice(facts.COUNTRIES)[0], rng.choice(list(facts.COLOURS))
        text = ASK_UNKNOWN[i].replace("a {a}", "{a}").format(
            n=word.capitalize(), w=word, c=country, a=thing)
        key = text
    return Question("unknown", key, i, upper_first(text), UNKNOWN, UNKNOWN, (),
                    upper_first(text))


MAKERS: tuple[tuple[Maker, float], ...] = (
    (arithmetic, 7.0), (parity, 1.0), (count, 3.0),
    (listing, 3.0), (story, 2.0), (talk, 3.5), (unknown, 5.0),
)
