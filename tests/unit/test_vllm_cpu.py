"""Our product of adapters against vLLM's kernel, one token at a time."""

import pytest

torch = pytest.importorskip("torch")

from llm_engine.engine.vllm_cpu import own, product  # noqa: E402

SLOTS, RANK, INTO, OUT = 3, 8, 16, 24


def test_each_token_is_computed_with_its_adapter_and_with_no_other():
    torch.manual_seed(1)
    a, b = torch.randn(SLOTS, 1, RANK, INTO), torch.randn(SLOTS, 1, OUT, RANK)
    x, indices = torch.randn(7, INTO), torch.tensor([0, 2, -1, 1, 1, -1, 0])
    found = product(x, a, b, own(indices, SLOTS, RANK, x.dtype))
    for token, index, result in zip(x, indices, found, strict=True):
        wanted = b[index, 0] @ (a[index, 0] @ token) if index >= 0 else torch.zeros(OUT)
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
