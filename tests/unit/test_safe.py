"""Sealing what must not be read in the store."""

import stat

import pytest
from pydantic import SecretStr

from llm_engine.config import parse
from llm_engine.errors import Conflict, InternalError
from llm_engine.safe import Safe


def safe_of(url, secret=None):
    environ = {"LLM_ENGINE_SECRET_KEY": secret} if secret else {}
    return Safe(parse({"store": {"url": url}}, environ))


def test_what_is_sealed_is_read_again_and_not_by_others():
    sealed = safe_of("postgresql://h/d", "one").seal("sk-key")
    assert b"sk-key" not in sealed
    assert safe_of("postgresql://h/d", "one").reveal(sealed) == "sk-key"
    with pytest.raises(InternalError, match="LLM_ENGINE_SECRET_KEY") as changed:
        safe_of("postgresql://h/d", "two").reveal(sealed)
    assert changed.value.code == "secret_changed"


def test_the_same_key_is_sealed_differently_each_time():
    safe = safe_of("postgresql://h/d", "one")
    assert safe.seal("sk-key") != safe.seal("sk-key")


def test_beside_sqlite_a_secret_is_made_once_and_readable_by_its_owner_alone(tmp_path):
    url = f"sqlite:///{tmp_path}/deep/llm-engine.db"
    sealed = safe_of(url).seal("sk-key")
    file = tmp_path / "deep" / "llm-engine.secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and len(file.read_text()) == 64
    assert [path.name for path in file.parent.iterdir()] == [file.name], "a file was left over"
    assert safe_of(url).reveal(sealed) == "sk-key"


def test_of_two_that_start_at_once_one_makes_the_secret(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    url = f"sqlite:///{tmp_path}/llm-engine.db"
    with ThreadPoolExecutor(8) as pool:
        sealed = list(pool.map(lambda _: safe_of(url).seal("x"), range(16)))
    assert {safe_of(url).reveal(each) for each in sealed} == {"x"}


def test_without_a_secret_nothing_is_sealed():
    with pytest.raises(Conflict, match="none is configured") as refused:
        safe_of("postgresql://h/d").seal("sk-key")
    assert refused.value.code == "no_secret_key"
    settings = parse({}, {})
    store = settings.store.model_copy(update={"secret_key": SecretStr("")})
    with pytest.raises(Conflict, match="empty"):
        Safe(settings.model_copy(update={"store": store})).seal("sk-key")
