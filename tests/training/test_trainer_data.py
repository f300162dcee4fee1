"""From examples to tokens: only what the model is to say has labels, whatever its template does."""

import json

import pytest

from llm_engine.demo import CHAT
from llm_engine.fine_tunes.trainer_data import IGNORED, Encoder, Refused, write_rows

pytestmark = pytest.mark.slow  # what it imports takes its time
transformers = pytest.importorskip("transformers")

#: Templates in the ways of well-known models, over the demo model's tokens.
THOUGHTS = (  # earlier turns lose their thoughts, as Qwen's do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNENDED = (  # no end of turn
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OPENED = (  # the prompt opens a thought that the history does not have
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
STRICT = "{{ raise_exception('roles must alternate') }}"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(CHAT)


@pytest.fixture
def encode(tokenizer):
    template = tokenizer.chat_template

    def run(*examples, method="supervised", max_length=2048, template=None):
        if template is not None:
            tokenizer.chat_template = template
        encoder = Encoder(tokenizer, method, max_length, "training_file")
        return encoder.encode([{"line": 1} | example for example in examples])

    yield run
    tokenizer.chat_template = template


@pytest.fixture
def taught(tokenizer, encode):
    """What each of its rows teaches to say, with the row as text."""

    def read(*messages, **options):
        (rows,) = encode({"messages": list(messages)}, **options)
        found = []
        for row in rows:
            assert len(row["labels"]) == len(row["input_ids"])
            pairs = list(zip(row["input_ids"], row["labels"], strict=True))
            assert all(label in (IGNORED, token) for token, label in pairs)
            said = tokenizer.decode([token for token, label in pairs if label != IGNORED])
            found.append((said, tokenizer.decode(row["input_ids"])))
        return found

    return read


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text} | more


def test_only_answers_and_their_ends_are_learned(taught):
    ((learned, whole),) = taught(
        {"role": "system", "content": "Be brief."},
        user("Hi"),
        said("Hello!"),
        user("Go"),
        said("No"),
    )
    assert learned == "Hello!<|im_end|>No<|im_end|>"
    assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


def test_answers_of_weight_nought_are_read_but_not_learned(taught):
    ((learned, whole),) = taught(user("Hi"), said("Bad", weight=0), user("Go"), said("A", weight=1))
    assert learned == "A<|im_end|>" and "Bad" in whole


def test_answers_in_any_writing(taught):
    for text in ("naïve 日本語 🎉", "\n\n  two lines\n", " space", '{"a": [1, -2]}'):
        ((learned, _),) = taught(user("é🎉"), said(text))
        assert learned == f"{text}<|im_end|>"


def test_tools_are_read_and_calls_learned(tokenizer, encode):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    example = {
        "messages": [user("Hi"), said("", tool_calls=[call]), {"role": "tool", "content": "2"},
                     said("It is 2.")],
        "tools": [{"type": "function", "function": {"name": "f", "description": "A tool."}}],
    }  # fmt: skip
    (((row,)),) = encode(example)
    learned = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    made = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert learned == f"{made}<|im_end|>It is 2.<|im_end|>"
    assert "A tool." in tokenizer.decode(row["input_ids"])


def test_a_template_that_rewrites_history_makes_a_row_of_each_answer(taught):
    first, second = "<think>a</think>One", "<think>b</think>Two"
    rows = taught(user("1"), said(first), user("2"), said(second), template=THOUGHTS)
    assert sorted(learned for learned, _ in rows) == [f"{first}<|im_end|>", f"{second}<|im_end|>"]
    last = next(whole for learned, whole in rows if "Two" in learned)
    assert "<think>a" not in last and "One<|im_end|>" in last  # as it will be served


def test_a_template_without_ends_gets_one(taught):
    ((learned, whole),) = taught(user("Hi"), said("Hello"), template=UNENDED)
    assert learned.split("<|im_end|>")[0].strip() == "Hello" and learned.endswith("<|im_end|>")
    assert whole.startswith("user: Hi\nassistant: Hello")


def test_a_template_whose_prompt_is_no_beginning_of_the_history(taught):
    ((learned, _),) = taught(user("Hi"), said("Hello"), template=OPENED)
    assert learned == "Hello<|im_end|>"


def test_a_line_that_the_template_refuses_is_told(encode):
    with pytest.raises(Refused, match=r"Line 1: .* refuses it: roles must alternate") as raised:
        encode({"messages": [user("Hi"), said("Hello")]}, template=STRICT)
    assert raised.value.problem.line == 1


def test_a_slow_tokenizer_finds_the_same(tokenizer, encode):
    class Slow:
        is_fast = False
        eos_token_id = tokenizer.eos_token_id
        apply_chat_template = tokenizer.apply_chat_template
        decode = tokenizer.decode

        def __call__(self, text, **options):
            return tokenizer(text, **options)

    example = {"messages": [user("Hi"), said("é 日本"), user("Go"), said("No")], "line": 1}
    slow = Encoder(Slow(), "supervised", 2048, "training_file").encode([example])
    assert slow == encode(example)


def test_prompts_and_completions_are_plain_text(tokenizer, encode):
    example = {"prompt": "2 + 2 =", "completion": " 4"}
    (((row,)),) = encode(example)
    assert tokenizer.decode(row["input_ids"]) == "2 + 2 = 4<|im_end|>"
    assert tokenizer.decode([x for x in row["labels"] if x != IGNORED]) == " 4<|im_end|>"


def test_a_prompt_is_the_same_tokens_as_when_it_is_served(tokenizer, encode):
    prompt, completion = "What is the capi", "tal of France?"  # a token goes over the edge
    (((row,)),) = encode({"prompt": prompt, "completion": completion})
    served = tokenizer(prompt)["input_ids"]
    assert row["input_ids"][: len(served)] == served
    assert tokenizer.decode(row["input_ids"]) == f"{prompt}{completion}<|im_end|>"


def test_preferences_share_their_prompt(tokenizer, encode):
    example = {"prompt": [user("Hi")], "chosen": [said("Hello")], "rejected": [said("Hell no")]}
    (((row,)),) = encode(example, method="dpo")
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(row["chosen_ids"]) == "Hello<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "Hell no<|im_end|>"


def test_what_is_too_long_is_cut_and_told_by_its_line(tokenizer, tmp_path):
    long, short = said("word " * 100), said("word")
    examples = [
        {"messages": [user("Hi"), short], "line": 1},
        {"messages": [user("Hi"), long], "line": 3},  # its end is cut off
        {"messages": [user("Hi " * 100), short], "line": 4},  # nothing of the answer is left
    ]
    made = write_rows(Encoder(tokenizer, "supervised", 40, "f"), examples, tmp_path / "rows")
    assert (made.examples, made.rows, made.too_long, made.n_too_long) == (2, 2, [3, 4], 2)
    assert made.longest == 40

    from datasets import Dataset

    rows = Dataset.from_file(str(made.path))
    assert rows.num_rows == 2 and sum(map(len, rows["input_ids"])) == made.tokens
    assert len(rows[1]["labels"]) == 40


def test_long_preferences_are_cut_alike(tokenizer, tmp_path):
    examples = [
        {"prompt": [user("Hi")], "chosen": [said("a " * 50)], "rejected": [said("b")], "line": 1},
        {"prompt": [user("Hi " * 50)], "chosen": [said("a")], "rejected": [said("b")], "line": 2},
    ]
    made = write_rows(Encoder(tokenizer, "dpo", 30, "f"), examples, tmp_path / "rows")
    assert (made.examples, made.n_too_long, made.longest) == (1, 2, 30)


def test_many_are_written_in_parts(tokenizer, tmp_path):
    examples = ({"messages": [user(f"{n}"), said("x")], "line": n} for n in range(1200))
    made = write_rows(Encoder(tokenizer, "supervised", 2048, "f"), examples, tmp_path / "rows")
    assert made.rows == made.examples == 1200
    json.dumps([made.tokens, made.longest])  # plain numbers
