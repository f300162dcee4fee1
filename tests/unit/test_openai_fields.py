"""The list of vLLM's own request fields, against the installed vLLM."""

import ast
import importlib.util
from pathlib import Path

import pytest

from llm_engine.api.openai import fields


def _fields_of(folder: Path, file: str, *classes: str) -> set[str]:
    tree = ast.parse((folder / file).read_text())
    return {
        line.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and not line.target.id.startswith("_")
    }


def test_knows_every_field_of_vllm() -> None:
    """Read as text: importing vLLM takes seconds. A field that is unknown here might be taken for
    a misspelling of another."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    folder = Path(spec.origin).parent / "entrypoints"
    chat_fields = _fields_of(folder, "openai/chat_completion/protocol.py", "ChatCompletionRequest")
    completion = _fields_of(folder, "openai/completion/protocol.py", "CompletionRequest")
    embedding = _fields_of(
        folder,
        "pooling/base/protocol.py",
        *("PoolingBasicRequestMixin", "CompletionRequestMixin"),
        *("EncodingRequestMixin", "EmbedRequestMixin"),
    )
    for found, listed, shape in [
        (chat_fields, fields.VLLM_CHAT, fields.ChatRequest),
        (completion, fields.VLLM_COMPLETION, fields.CompletionRequest),
        (embedding, fields.VLLM_EMBEDDING, fields.EmbeddingRequest),
    ]:
        assert found, "vLLM moved its request classes"
        assert found - shape.__annotations__.keys() <= listed
        assert listed <= found
