"""Training files: every form is read, and what is wrong is told with its line."""

import json
import tracemalloc

import pytest

from llm_engine.errors import InvalidRequest
from llm_engine.fine_tunes import data
from llm_engine.fine_tunes.data import MOST_TOLD, check_header, read

PREFERENCE = {
    "input": {"messages": [{"role": "user", "content": "Hi"}]},
    "preferred_output": [{"role": "assistant", "content": "Hello!"}],
    "non_preferred_output": [{"role": "assistant", "content": "What."}],
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def user(text="Hi"):
    return {"role": "user", "content": text}


def said(text="Hello!", **more):
    return {"role": "assistant", "content": text} | more


def chat(*messages, **more):
    return {"messages": list(messages or (user(), said()))} | more


def jsonl(*rows):
    return b"".join(
        row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows
    )


def reading(content, method="supervised", *, piece=7, rows=100, fewest=1, **more):
    pieces = (content[at : at + piece] for at in range(0, len(content), piece))
    return read(pieces, "file", method, rows, fewest=fewest, **more)


def examples(content, method="supervised", **more):
    reader = reading(content, method, **more)
    found = list(reader)
    assert reader.verdict() is None, reader.problems
    assert reader.examples == len(found)
    return found


def problems(content, method="supervised", **more):
    reader = reading(content, method, **more)
    list(reader)
    return [(p.code, p.line) for p in reader.problems]


def refusal(row, method="supervised"):
    """The message of the one problem of a file of one line."""
    reader = reading(jsonl(row), method)
    assert list(reader) == []
    (problem,) = reader.problems
    assert problem.line == 1 and problem.param == "training_file"
    return problem.message


# -- conversations


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_lines_of_messages_with_their_numbers(piece):
    content = b"\xef\xbb\xbf" + jsonl(chat(), b"\r\n", chat(user("a"), said("b")))
    first, second = examples(content, piece=piece)
    assert first == {"messages": [user(), said()], "line": 1}
    assert (second["messages"], second["line"]) == ([user("a"), said("b")], 3)


def test_weights_are_kept():
    (row,) = examples(jsonl(chat(user(), said("a", weight=0), user(), said("b", weight=1))))
    assert [message.get("weight") for message in row["messages"]] == [None, 0, None, 1]


def test_tools_calls_and_results_come_as_templates_want_them():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    given = chat(
        user(), {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"}, said("It is 2."),
        tools=[TOOL], parallel_tool_calls=False,
    )  # fmt: skip
    (row,) = examples(jsonl(given))
    assert row["tools"] == [TOOL] and "parallel_tool_calls" not in row
    assert row["messages"][1] == {
        "role": "assistant", "content": "",
        "tool_calls": [{"id": "c1", "type": "function",
                        "function": {"name": "f", "arguments": {"x": 1}}}],
    }  # fmt: skip


def test_deprecated_functions_become_tools():
    given = chat(
        user(), {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "2"}, said(),
        functions=[TOOL["function"]],
    )  # fmt: skip
    (row,) = examples(jsonl(given))
    assert row["tools"] == [TOOL]
    assert row["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert row["messages"][2]["role"] == "tool"


def test_parts_of_text_and_developers():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (row,) = examples(jsonl(chat({"role": "developer", "content": parts}, user(), said())))
    assert row["messages"][0] == {"role": "system", "content": "a\nb"}


def test_nulls_are_as_if_left_out():
    (row,) = examples(jsonl(chat(user(), said(weight=None, tool_calls=None, refusal=None))))
    assert row["messages"][1] == said()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (b"{broken\n", "not valid JSON"),
        (b'{"messages": "\xff"}\n', "not valid JSON"),
        ({"message": []}, "neither 'messages'"),
        ({}, "neither 'messages'"),
        (chat(tool=[TOOL]), "'tool' is not known"),
        ({"messages": "Hi"}, "'messages' must be a list"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": ["Hi", "Hello"]}, "'messages[0]' must be an object"),
        (chat({"role": "human", "content": "Hi"}, said()), "'messages[0].role' must be one of"),
        (chat({"content": "Hi"}, said()), "'messages[0].role'"),
        (chat({"role": ["user"], "content": "Hi"}, said()), "'messages[0].role'"),
        (chat({"role": "user"}, said()), "'messages[0].content'"),
        (chat(user(5), said()), "'messages[0].content'"),
        (chat(user([{"type": "image_url", "image_url": {}}]), said()), "only text"),
        (chat(user(), said(wieght=0)), "'messages[1].wieght' is not known"),
        (chat(user() | {"weight": 1}, said()), "'messages[0].weight' is not known"),
        (chat(user(), said(weight=2)), "'messages[1].weight' must be 0 or 1"),
        (chat(user(), said(weight=0.5)), "'messages[1].weight' must be 0 or 1"),
        (chat(user(), said(weight="1")), "'messages[1].weight' must be 0 or 1"),
        (chat(user(), said(weight=True)), "'messages[1].weight' must be 0 or 1"),
        (chat(user(), said(weight=0)), "No assistant message has a weight of 1"),
        (chat(user(), said(" ")), "No assistant message"),
        (chat(user(), said(), user()), "last message must be the assistant's"),
        (chat(user()), "last message must be the assistant's"),
        (chat(user(), said(name=3)), "'messages[1].name'"),
        (chat(user(), said(tool_calls=[{"function": {"name": "f", "arguments": "{"}}])), "JSON"),
        (chat(user(), said(tool_calls=[{"function": {"name": "f", "arguments": "[]"}}])), "object"),
        (chat(user(), said(tool_calls=[{}])), "'messages[1].tool_calls[0]'"),
        (chat(user(), said(tool_calls="f")), "'messages[1].tool_calls'"),
        (chat(tools=[{"type": "function"}]), "'tools[0]'"),
        (chat(tools={}), "'tools' must be a list"),
        (chat(functions=[5]), "'functions[0]'"),
        (chat(parallel_tool_calls=1), "'parallel_tool_calls'"),
        (PREFERENCE, "for the method 'dpo'"),
        ({"prompt": "a", "completion": 5}, "'completion' must be a string"),
        ({"prompt": None, "completion": "b"}, "'prompt' must be a string"),
        ({"prompt": "a", "completion": " "}, "'completion' is empty"),
    ],
)
def test_a_bad_line_is_told(row, told):
    assert told in refusal(row)


# -- prompts and answers


@pytest.mark.parametrize(
    "names", [("prompt", "completion"), ("prompt", "response"), ("input", "output")]
)
def test_pairs_in_json_lines_and_in_tables(names):
    wanted = [{"prompt": "a", "completion": "b", "line": 1},
              {"prompt": "c", "completion": "d", "line": 2}]  # fmt: skip
    lines = jsonl(*(dict(zip(names, pair, strict=True)) | {"n": 1} for pair in ("ab", "cd")))
    assert examples(lines) == wanted
    table = f"n,{names[1]},{names[0]}\r\n1,b,a\r\n2,d,c\r\n".encode()
    assert [row | {"line": row["line"] - 1} for row in examples(table)] == wanted


def test_a_table_as_pandas_writes_it():
    table = b'\xef\xbb\xbf,prompt,response\n0,"a, ""b""\nc",d\n\n1,e,"f\n"\n'
    assert examples(table) == [
        {"prompt": 'a, "b"\nc', "completion": "d", "line": 2},
        {"prompt": "e", "completion": "f\n", "line": 5},
    ]


@pytest.mark.parametrize(
    ("table", "code", "line"),
    [
        (b"question,answer\na,b\n", "invalid_file_format", 1),
        (b"just some text\n", "invalid_file_format", 1),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "invalid_encoding", 1),
        (b'[{"messages": []}]', "invalid_file_format", 1),
        (b"prompt,response\na,b\nc\n", "invalid_example", 3),
        (b"prompt,response\na,\n", "invalid_example", 2),
        (b"prompt,response\na,b\nc,\xff\n", "invalid_encoding", 3),
    ],
)
def test_a_bad_table_is_told(table, code, line):
    assert problems(table)[0] == (code, line)


def test_a_quote_that_is_never_closed_is_told_and_not_held(monkeypatch):
    monkeypatch.setattr(data, "LONGEST_LINE", 1000)
    content = b'prompt,response\na,b\n"c,' + b"d,e\n" * 5000
    assert problems(content, piece=100) == [("invalid_csv", 3)]


def test_a_line_that_is_too_long_is_told_and_not_held(monkeypatch):
    monkeypatch.setattr(data, "LONGEST_LINE", 1000)
    long = chat(user("x" * 5000), said())
    assert problems(jsonl(chat(), long, chat())) == [("line_too_long", 2)]
    assert problems(b"prompt,response\n" + b"x" * 5000)[0][0] == "invalid_csv"


# -- preferences


@pytest.mark.parametrize("word", ["output", "completion"])
def test_preferences_in_both_spellings(word):
    row = {
        "input": PREFERENCE["input"] | {"tools": [TOOL], "parallel_tool_calls": True},
        f"preferred_{word}": PREFERENCE["preferred_output"],
        f"non_preferred_{word}": PREFERENCE["non_preferred_output"],
    }
    assert examples(jsonl(row), "dpo") == [
        {"prompt": [user()], "tools": [TOOL], "chosen": [said("Hello!")],
         "rejected": [said("What.")], "line": 1}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (chat(), "lacks 'input'"),
        (PREFERENCE | {"preferred_output": None, "non_preferred_output": None}, "list of one"),
        ({k: v for k, v in PREFERENCE.items() if k != "input"}, "lacks 'input'"),
        (PREFERENCE | {"input": "Hi"}, "'input' must be an object"),
        (PREFERENCE | {"input": {"messages": [said()]}}, "must not be the assistant's"),
        (PREFERENCE | {"input": {}}, "'input.messages'"),
        (PREFERENCE | {"preferred_output": "Hello!"}, "list of one message"),
        (PREFERENCE | {"preferred_output": [said(), said()]}, "list of one message"),
        (PREFERENCE | {"preferred_output": [user()]}, "must be assistant"),
        (PREFERENCE | {"preferred_output": [said("")]}, "is empty"),
        (PREFERENCE | {"preferred_output": PREFERENCE["non_preferred_output"]}, "are the same"),
        (PREFERENCE | {"extra": 1}, "'extra' is not known"),
    ],
)
def test_a_bad_preference_is_told(row, told):
    assert told in refusal(row, "dpo")


def test_a_table_cannot_hold_preferences():
    assert problems(b"prompt,response\na,b\n", "dpo") == [("invalid_file_format", 1)]


# -- whole files


def test_every_problem_is_told_with_its_line_and_the_last_ones_are_counted():
    reader = reading(jsonl(chat(), *[{"messages": 5}] * 60, chat()))
    assert len(list(reader)) == 2
    assert [problem.line for problem in reader.problems] == list(range(2, 2 + MOST_TOLD))
    verdict = reader.verdict()
    assert (verdict.code, verdict.param, verdict.line) == (
        "invalid_training_file", "training_file", 2,
    )  # fmt: skip
    assert "Line 2: 'messages' must be" in verdict.message and "And 10 more" in verdict.message


def test_forms_are_not_mixed():
    assert problems(jsonl(chat(), {"prompt": "a", "completion": "b"})) == [("mixed_formats", 2)]


def test_there_must_be_enough_examples():
    one = reading(jsonl(chat()), fewest=10)
    list(one)
    assert one.verdict().plain() == {
        "code": "invalid_n_examples",
        "message": "Training file has 1 example(s), but must have at least 10 examples",
        "param": "training_file",
        "line": None,
    }
    for content in (b"", b"\n\n", b"prompt,response\n"):
        empty = reading(content, param="validation_file")
        assert list(empty) == []
        assert empty.verdict().code == "invalid_n_examples"
        assert empty.verdict().message.startswith("Validation file has 0 example(s)")


def test_there_must_not_be_too_many():
    assert problems(jsonl(*[chat()] * 100)) == []
    assert problems(jsonl(*[chat()] * 101)) == [("too_many_examples", 101)]
    assert problems(b"prompt,response\n" + b"a,b\n" * 101) == [("too_many_examples", 102)]


def test_memory_is_flat():
    line = jsonl(chat(user("x" * 2000), said()))

    def peak(count):
        tracemalloc.start()
        assert sum(1 for _ in reading(line * 50, rows=10**6, piece=65536)) == 50  # warm
        tracemalloc.reset_peak()
        reader = read((line for _ in range(count)), "f", "supervised", 10**6)
        assert sum(1 for _ in reader) == count
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(3000) < peak(300) + 200_000


# -- the check while a request waits


@pytest.mark.parametrize(
    "first",
    [
        b"prompt,response\na,b",
        b"\xef\xbb\xbf,prompt,response,extra\n0,a,b,c\n",
        b"input,output\n",
        b'{"prompt": "a", "response": "b"}\n{"pro',
        b'{"messages": []}\n',
    ],
)
def test_good_headers_pass(first):
    check_header(first, "f")


@pytest.mark.parametrize(
    ("first", "told"),
    [
        (b"question,answer\n", "Required column headers (one subset of [['prompt', 'response'], "
         "['input', 'output']]) not found in training dataset"),
        (b"", "Required column headers"),
        (b'{"a": 1}\n', "Required column headers"),
        (b'"prompt,response', "Cannot parse the training dataset as CSV."),
        (b"{broken\n", "Cannot parse the training dataset as JSONL."),
    ],
)  # fmt: skip
def test_bad_headers_are_refused_in_scales_words(first, told):
    with pytest.raises(InvalidRequest) as raised:
        check_header(first, "f")
    assert raised.value.message.startswith(told)
    assert raised.value.param == "training_file"
