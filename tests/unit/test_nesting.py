"""JSON that would cost far more than its text, as it is read item by item."""

import io
import tracemalloc

import ijson
import pytest

from llm_engine import nesting
from llm_engine.api.sference import inline
from llm_engine.config import Settings
from llm_engine.errors import InvalidRequest
from llm_engine.nesting import TooMuch, watched


def test_levels_are_counted_before_their_paths_fill_the_memory():
    tracemalloc.start()
    try:
        with pytest.raises(TooMuch):
            list(watched(io.BytesIO(b"[" * 60_000), "item"))
        with pytest.raises(InvalidRequest, match="object"):
            inline.read(io.BytesIO(b'{"requests": [' + b"[" * 60_000), Settings(), str)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * 2**20


def test_values_are_counted_by_the_item_and_not_by_its_keys(monkeypatch):
    monkeypatch.setattr(nesting, "MOST_VALUES", 20)
    small = b'{"a": [1, 2, 3, 4, 5]}'
    many = b"[" + b", ".join([small] * 50) + b"]"
    assert len(list(ijson.items(watched(io.BytesIO(many), "item"), "item"))) == 50
    large = b"{" + b", ".join(b'"%d": [1, 2, 3, 4, 5]' % key for key in range(50)) + b"}"
    with pytest.raises(TooMuch):
        list(watched(io.BytesIO(b"[" + large + b"]"), "item"))
    with pytest.raises(InvalidRequest) as refused:
        inline.read(io.BytesIO(b'{"requests": [' + large + b"]}"), Settings(), str)
    assert refused.value.param == "requests[0]"
