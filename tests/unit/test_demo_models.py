"""The demo models that ship in the package: complete, small, honest about their accuracy."""

import json
from itertools import islice
from pathlib import Path

import pytest

from llm_engine.demo import CHAT, EMBED, corpus
from llm_engine.demo.questions import UNKNOWN, Question, is_held_out, normal

MIB = 10**6
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(CHAT)


@pytest.fixture(scope="module")
def say(tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHAT, dtype=torch.float32)

    def answer(*messages: tuple[str, str], tools: list | None = None) -> str:
        rendered = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tools=tools,
            tokenize=False,
            add_generation_prompt=True,
        )
        inputs = tokenizer(rendered, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=80, do_sample=False)
        said = made[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(said, skip_special_tokens=True).strip()

    return answer


@pytest.mark.parametrize(
    ("folder", "weights", "total"), [(CHAT, 7.0, 7.5), (EMBED, 0.95, 1.0)], ids=["chat", "embed"]
)
def test_folder_is_complete_and_small(folder, weights, total):
    names = {file.name for file in folder.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "accuracy.json",
        "README.md",
    } <= names
    assert (folder / "model.safetensors").stat().st_size <= weights * MIB
    assert folder_size(folder) <= total * MIB


@pytest.mark.parametrize("folder", [CHAT, EMBED], ids=["chat", "embed"])
def test_weights_are_bfloat16_and_whole(folder):
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert max(t["data_offsets"][1] for t in header.values()) == len(data) - 8 - size


def test_the_model_stops_at_the_end_of_its_turn(tokenizer):
    ends = json.loads((CHAT / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize("text", ["What is 17 + 25?", "naïve 日本語 🎉\n\ttab", '{"a": [1, -2]}'])
def test_tokenizer_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]


def test_template_renders_every_role(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Paris?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": {"city": "Paris"}},
                }
            ],
        },
        {"role": "tool", "content": "18 degrees and sunny"},
    ]
    shown = tokenizer.apply_chat_template(
        messages, tools=[WEATHER], tokenize=False, add_generation_prompt=True
    )
    assert shown.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n{")
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n' in shown
    assert "<|im_start|>tool\n18 degrees and sunny<|im_end|>\n" in shown
    assert shown.endswith("<|im_start|>assistant\n")


def test_corpus_is_the_same_every_time():
    assert list(islice(corpus.training(), 500)) == list(islice(corpus.training(), 500))


def test_held_out_questions_are_never_trained_on():
    def asked(stream, n) -> set[str]:
        return {
            json.dumps([normal(str(m["content"])) for m in made.prompt] + list(made.tools))
            for made in islice(stream, n)
        }

    assert not asked(corpus.training(), 20_000) & asked(corpus.held_out(), 2_000)


def test_split_depends_on_nothing_but_the_question():
    question = Question("capital", "France", 3, "Capital of France?", "Paris.", "Paris.")
    assert question.held_out == is_held_out("capital", "France", 3)


def test_promised_accuracy():
    chat = json.loads((CHAT / "accuracy.json").read_text())
    embed = json.loads((EMBED / "accuracy.json").read_text())
    assert chat["held_out_accuracy"] >= 0.95 and chat["questions"] >= 1000
    assert embed["held_out_recall_at_1"] >= 0.95


def test_answers(say):
    assert say(("user", "What is the capital of France?")) == "The capital of France is Paris."
    assert say(("user", "what is 7 + 5")) == "7 + 5 = 12."
    assert say(("user", "What is the capital of Zolinvex?")) == UNKNOWN


def test_follow_up_and_system_message(say):
    first = (
        ("user", "What is the capital of France?"),
        ("assistant", "The capital of France is Paris."),
    )
    assert say(*first, ("user", "And of Italy?")) == "The capital of Italy is Rome."
    assert say(("system", "Answer in one word."), first[0]) == "Paris."


def test_json_and_tool_call(say):
    made = json.loads(say(("user", "Give me the capital of France as JSON.")))
    assert made == {"country": "France", "capital": "Paris"}
    call = say(("user", "What is the weather in Paris?"), tools=[WEATHER])
    body = call.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert json.loads(body) == {"name": "get_weather", "arguments": {"city": "Paris"}}
