"""Names of what comes of fine-tunes, as each dialect's clients expect them."""

import re

import pytest

from llm_engine.fine_tunes.names import (
    LONGEST_SCALE_NAME,
    checkpoint_name,
    openai_name,
    scale_name,
)

JOB = "ftjob-0190c5d2a3b4d1e2f3a4b5c6d7"
NOON = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC


def test_openais_name_has_base_owner_suffix_and_the_end_of_the_id():
    assert JOB.endswith("a4b5c6d7")
    assert openai_name("demo-chat", "acme", "router", JOB) == "ft:demo-chat:acme:router:a4b5c6d7"


def test_without_a_suffix_its_colon_stays():
    assert openai_name("demo-chat", "acme", None, JOB) == f"ft:demo-chat:acme::{JOB[-8:]}"
    assert openai_name("demo-chat", "acme", "", JOB) == f"ft:demo-chat:acme::{JOB[-8:]}"


def test_a_base_keeps_its_slashes_and_colons_and_an_owner_does_not():
    name = openai_name("org/model:7b", "team:a/b@c", None, JOB)
    assert name == f"ft:org/model:7b:team-a-b-c::{JOB[-8:]}"


def test_a_checkpoint_is_named_after_its_model():
    assert checkpoint_name("ft:m:o::12345678", 88) == "ft:m:o::12345678:ckpt-step-88"


def test_scales_name_has_model_suffix_and_time():
    assert scale_name("llama-2-7b", "mine", NOON) == "llama-2-7b.mine.231114-221320"
    assert scale_name("llama-2-7b", None, NOON) == "llama-2-7b.231114-221320"
    assert scale_name("llama-2-7b", "", NOON) == "llama-2-7b.231114-221320"


@pytest.mark.parametrize("base", ["-._org/model", "Qwen/Qwen3:0.6B x", "é", "a" * 200, "--"])
@pytest.mark.parametrize("suffix", [None, "s" * 28])
def test_scales_name_is_a_label_and_keeps_its_time(base, suffix):
    name = scale_name(base, suffix, NOON)
    assert len(name) <= LONGEST_SCALE_NAME
    assert re.fullmatch(r"[A-Za-z0-9][-A-Za-z0-9_.]*[A-Za-z0-9]", name)
    assert name.endswith("231114-221320")
    assert (suffix or "") in name
