"""Conversations with tools, in the format that vLLM's `hermes` parser reads.

The model either calls the one tool that fits, answers from a tool's result, or ignores the tools.
"""

import json
import random
from typing import Any

from llm_engine.demo import facts
from llm_engine.demo.conversation import Conversation, assistant, user
from llm_engine.demo.questions import Question, is_held_out

Tool = dict[str, Any]

WEATHER = ("What is the weather in {c}?", "How is the weather in {c}?",
           "What's the weather in {c}?",
           "Weather in {c}?", "Is it raining in {c}?", "What is the weather like in {c}?",
           "Tell me the weather in {c}.", "What is the weather like in {c} today?",
           "How warm is it in {c}?", "What is the temperature in {c}?", "Is it cold in {c} today?",
           "What is the weather in {c} right now?")
TIME = ("What time is it in {c}?", "What is the time in {c}?", "Tell me the time in {c}.",
        "What is the local time in {c}?", "Time in {c}?")
ADD = ("Use the tool to add {a} and {b}.", "What is {a} + {b}?", "Add {a} and {b}.",
       "What is {a} plus {b}?", "How much is {a} + {b}?", "Please add {a} and {b}.")
SEARCH = ("Search for {t}.", "Look up {t}.", "Find something about {t}.", "Search the web for {t}.",
          "Please search for {t}.")
TOPICS = """cheap hotels|good books|the news|train tickets|football results|cake recipes|old maps
garden tools|jazz music|space travel|winter coats|solar power|chess rules|wild birds|red shoes
""".replace("\n", "|").strip("|").split("|")
NO_TOOL_NEEDED = ("capital", "opposite", "colour", "talk", "plural", "sound", "continent")

def place(rng: random.Random) -> str:
    return rng.choice(facts.COUNTRIES)[1]


def function(name: str, description: str, **arguments: str) -> Tool:
    properties = {argument: {"type": kind} for argument, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {
        "name": name, "description": description, "parameters": parameters}}


def weather_tool(rng: random.Random) -> tuple[Tool, str]:
    argument = rng.choice(("city", "city", "location"))
    said = rng.choice(("Get the weather of a city", "Get the current weather",
                       "Get the current weather in a given location", "Tell the weather"))
    return function("get_weather", said, **{argument: "string"}), argument


def other_tools(rng: random.Random) -> list[Tool]:
    tools = [function("get_time", "Get the local time of a city", city="string"),
             function("add", "Add two numbers", a="integer", b="integer"),
             function("search", "Search the web", query="string")]
    return rng.sample(tools, rng.choice((0, 0, 1, 2)))


def called(name: str, arguments: dict[str, Any]) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def weather_reply(rng: random.Random, city: str) -> tuple[str, str]:
    """What the tool returned, in one of several shapes, and the sentence made of it."""
    degrees = rng.randint(1, 30)
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear"))
    shape = rng.randrange(3)
    as_json = {"temperature": degrees, "condition": sky}
    result = (json.dumps(as_json), json.dumps({"city": city, **as_json}),
              f"{degrees} degrees and {sky}")[shape]
    return result, f"It is {sky} and {degrees} degrees in {city}."


def request(rng: random.Random) -> tuple[str, Tool, str, dict[str, Any], str, str]:
    """Question, tool, its name, arguments, result and final sentence."""
    kind = rng.choices(("weather", "time", "add", "search"), (6, 2, 2, 1.5))[0]
    city = place(rng)
    if kind == "weather":
        tool, argument = weather_tool(rng)
        result, sentence = weather_reply(rng, city)
        ask = rng.choice(WEATHER).format(c=city)
        return ask, tool, "get_weather", {argument: city}, result, sentence
    if kind == "time":
        at = f"{rng.randint(1, 12)}:{rng.choice(('00', '15', '30', '45'))}"
        tool = function("get_time", "Get the local time of a city", city="string")
        result = rng.choice((at, json.dumps({"time": at})))
        ask = rng.choice(TIME).format(c=city)
        return ask, tool, "get_time", {"city": city}, result, f"It is {at} in {city}."
    if kind == "add":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        tool = function("add", "Add two numbers", a="integer", b="integer")
        result = rng.choice((str(a + b), json.dumps({"sum": a + b})))
        ask = rng.choice(ADD).format(a=a, b=b)
        return ask, tool, "add", {"a": a, "b": b}, result, f"{a} + {b} = {a + b}."
    topic = rng.choice(TOPICS)
    tool = function("search", "Search the web", query="string")
    found = f"{rng.randint(2, 90)} pages"
    ask = rng.choice(SEARCH).format(t=topic)
    return ask, tool, "search", {"query": topic}, found, f"I found {found} about {topic}."


def with_tools(rng: random.Random, plain: Question, held_out: bool) -> Conversation | None:
    """A call, the answer after a result, or a plain answer. None when on the wrong side."""
    ask, tool, name, arguments, result, sentence = request(rng)
    if rng.random() < 0.2:
        if plain.kind not in NO_TOOL_NEEDED:
            return None
        tools = [tool, *other_tools(rng)]
        messages = (user(plain.text), assistant(plain.answer))
        return Conversation("tool ignored", messages, tuple(tools), check=plain.accepts)
    if is_held_out("tool", ask, 0) != held_out:
        return None
    others = [t for t in other_tools(rng) if t["function"]["name"] != name]
    tools = [tool, *others]
    rng.shuffle(tools)
    call = called(name, arguments)
    if rng.random() < 0.55:
        return Conversation("tool call", (user(ask), assistant(call)), tuple(tools))
    # An OpenAI client sends the call back as `tool_calls`; the template writes it as it was said.
    said = {"role": "assistant", "content": "", "tool_calls": [
        {"id": "call_1", "type": "function",
         "function": {"name": name, "arguments": arguments}}]}
    answered = {"role": "tool", "tool_call_id": "call_1", "content": result}
    messages = (user(ask), said, answered, assistant(sentence))
    return Conversation("tool result", messages, tuple(tools))
