"""`endpoints` and `keys`: what becomes of options and files. Against a gateway: tests/api."""

import json
import sys
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest

from llm_engine.cli import endpoints, keys
from llm_engine.config import EndpointSettings
from llm_engine.errors import LLMEngineError
from llm_engine.records import Scope
from tests.support.cli import run, write_configuration


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_configuration(tmp_path)
    return tmp_path


def wanted(file=None, vllm_args=(), env=(), private=None, **options):
    return endpoints.wanted(file, list(vllm_args), list(env), private, **options)


# What is wanted.


def test_only_what_is_given_is_sent():
    assert wanted(model=None, min_replicas=None) == {}
    assert wanted(min_replicas=0, max_queue=8) == {
        "autoscaling": {"min_replicas": 0},
        "max_queue": 8,
    }
    assert wanted(private=True) == {"public": False} and wanted(private=False) == {"public": True}
    assert wanted(fallback="") == {"fallback": None}


def test_options_win_over_the_file_key_by_key():
    Path("e.yaml").write_text(
        "model: a\nmax_queue: 3\nautoscaling: {min_replicas: 1, max_replicas: 2}\n"
        "vllm_args: {max_model_len: 1, seed: 2}\nenv: {A: '1'}\n"
    )
    told = wanted(
        Path("e.yaml"), ["max_model_len=9"], ["B=2"], model="b", max_replicas=4, task=None
    )
    assert told == {
        "model": "b",
        "max_queue": 3,
        "autoscaling": {"min_replicas": 1, "max_replicas": 4},
        "vllm_args": {"max_model_len": 9, "seed": 2},
        "env": {"A": "1", "B": "2"},
    }


def test_every_option_is_a_setting_that_the_gateway_knows():
    told = wanted(
        None, ["seed=1"], ["A=b"], True, name="n", model="m", task="embed", min_replicas=1,
        max_replicas=2, target_queue_depth=3.0, max_queue=4, num_gpus=0.5, num_cpus=1.0,
        fallback="f",
    )  # fmt: skip
    settings = EndpointSettings.model_validate(told)
    assert (settings.autoscaling.target_queue_depth, settings.public) == (3, False)


@pytest.mark.parametrize(
    "text, pair",
    [
        ("max_model_len=4096", ("max_model_len", 4096)),
        ("--max-model-len=4096", ("max_model_len", 4096)),
        ("enforce_eager=true", ("enforce_eager", True)),
        ("seed=null", ("seed", None)),
        ("quantization=", ("quantization", None)),
        ("hf_overrides={a: [1, b=c]}", ("hf_overrides", {"a": [1, "b=c"]})),
        ("dtype=bfloat16", ("dtype", "bfloat16")),
    ],
)
def test_a_vllm_argument_is_read_as_yaml(text, pair):
    assert endpoints.parse_vllm_arg(text) == pair


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--vllm-arg", "seed"], "--vllm-arg takes KEY=VALUE, not 'seed'."),
        (["--vllm-arg", "=1"], "--vllm-arg takes KEY=VALUE, not '=1'."),
        (["--vllm-arg", "a=[1"], "--vllm-arg a: '[1' is not valid YAML"),
        (["--vllm-arg", "a=2027-01-01"], "--vllm-arg a: it cannot be sent as JSON"),
        (["--vllm-arg", "a=.nan"], "--vllm-arg a: it cannot be sent as JSON"),
        (["--env", "A"], "--env takes KEY=VALUE, not 'A'."),
        (["--file", "none.yaml"], "cannot read none.yaml: No such file or directory."),
        (["--file", "list.yaml"], "list.yaml: expected a mapping"),
        (["--file", "broken.yaml"], "broken.yaml is not valid YAML"),
        (["--file", "masked.yaml"], "masked.yaml: env.TOKEN is masked: put the real value"),
        (["--file", "wrong.yaml", "--env", "A=b"], "wrong.yaml: env: expected a mapping."),
        ([], "nothing is to change"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_a_sentence(words, sentence):
    Path("list.yaml").write_text("- a\n")
    Path("broken.yaml").write_text("a: [\n")
    Path("masked.yaml").write_text("env: {TOKEN: '**********'}\n")
    Path("wrong.yaml").write_text("env: [a]\n")
    result = run("endpoints", "update", "e", *words)
    assert result.exit_code == 1 and sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_a_new_endpoint_needs_a_name_and_a_model():
    assert "name is missing: give a NAME" in run("endpoints", "create").stderr
    assert "model is missing: give --model" in run("endpoints", "create", "e").stderr


# How many.


def test_a_range_of_replicas():
    assert endpoints.replica_range(2, None, None) == {"min_replicas": 2, "max_replicas": 2}
    assert endpoints.replica_range(None, 0, 4) == {"min_replicas": 0, "max_replicas": 4}
    assert endpoints.replica_range(None, None, 4) == {"max_replicas": 4}


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "say how many"),
        (["1", "--max", "2"], "give either N, or --min and --max."),
        (["0"], "`--min 0` lets it sleep"),
    ],
)
def test_a_range_that_is_none_is_refused(words, sentence):
    result = run("endpoints", "scale", "e", *words)
    assert result.exit_code == 1 and sentence in result.stderr


# Asked before it is too late.


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_a_delete_without_a_terminal_needs_yes():
    result = run("endpoints", "delete", "e", given="y\n")
    assert result.exit_code == 1 and "without a terminal, --yes must say so" in result.stderr


@pytest.mark.parametrize(
    "answer, sure", [("y\n", 1), ("Yes\n", 1), ("\n", 0), ("no\n", 0), ("", 0)]
)
def test_a_delete_at_a_terminal_asks(answer, sure, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    if sure:
        endpoints.confirm_delete("e")
    else:
        with pytest.raises(LLMEngineError, match="'e' is not deleted"):
            endpoints.confirm_delete("e")
    shown = capsys.readouterr()
    assert "Delete the endpoint 'e'?" in shown.err and shown.out == ""


# Keys.


def at(*parts: int) -> float:
    return datetime(*parts, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("30d", 1000 + 30 * 86400),
        ("12h", 1000 + 12 * 3600),
        ("45m", 1000 + 45 * 60),
        ("8w", 1000 + 56 * 86400),
        ("2027-01-01", at(2027, 1, 1)),
        ("2027-01-01T06:30", at(2027, 1, 1, 6, 30)),
        ("2027-01-01T06:30+02:00", at(2027, 1, 1, 4, 30)),
    ],
)
def test_when_a_key_expires(text, expected):
    assert keys.parse_expiry(text, 1000) == expected


@pytest.mark.parametrize("text", ["", "30", "d", "1.5h", "tomorrow", "2027-13-01", "9999999999d"])
def test_an_expiry_that_is_none_is_refused(text):
    result = run("keys", "create", "--owner", "o", "--expires", text)
    assert result.exit_code == 1 and "--expires takes a time from now" in result.stderr


def test_a_key_is_active_until_it_expires_or_is_revoked():
    row = {"revoked_at": None, "expires_at": None}
    assert keys.state(row, 10) == "active"
    assert keys.state(row | {"expires_at": 11}, 10) == "active"
    assert keys.state(row | {"expires_at": 10}, 10) == "expired"
    assert keys.state({"revoked_at": 5, "expires_at": 10}, 10) == "revoked"


def test_help_names_every_scope():
    text = " ".join(run("keys", "create", "--help").stdout.split())
    assert all(scope in text for scope in Scope)


def test_json_of_a_key_can_be_parsed(capsys):
    keys.show_new({"id": "key_1", "key": "sk-le-x"}, quiet=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["key"] == "sk-le-x"
