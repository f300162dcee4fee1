"""The vLLM options of this API, which date from vLLM 0.6, and what became of them in vLLM 0.32.

tests/unit/test_llm_engine_options.py compares the tables with the installed vLLM.
"""

from typing import Any

import orjson

from llm_engine.errors import InvalidRequest

#: Still called so.
SAME = frozenset(
    """
    attention_backend block_size chat_template code_revision config_format disable_sliding_window
    dtype enable_auto_tool_choice enable_prefix_caching enforce_eager gpu_memory_utilization
    limit_mm_per_prompt load_format max_model_len max_num_batched_tokens max_num_seqs
    mm_processor_kwargs num_gpu_blocks_override quantization revision seed skip_tokenizer_init
    tokenizer tokenizer_mode tokenizer_revision tool_call_parser trust_remote_code
""".split()
)
#: Called otherwise now, or by this API's own name.
RENAMED = {
    "cache_dtype": "kv_cache_dtype",
    "chat_template_override": "chat_template",
    "max_gpu_memory_utilization": "gpu_memory_utilization",
    "quantize": "quantization",
}
#: vLLM has them no more: what to do instead.
GONE = {
    "max_seq_len_to_capture": "CUDA graphs no longer depend on a sequence length.",
    "override_neuron_config": "There is no Neuron backend.",
    "quantization_param_path": "Scaling factors of the KV cache come with the checkpoint.",
    "rope_scaling": "Put it into the checkpoint's config.json.",
    "swap_space": "Preempted requests are computed again instead of being swapped out.",
}


def merge(args: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """vllm_args with the options among `values`, which holds no null. "" takes one away.

    Raises InvalidRequest, with the field's name.
    """
    merged, by = dict(args), dict[str, str]()
    for field, value in values.items():
        if field in GONE:
            raise refuse(field, f"vLLM has no such option any more. {GONE[field]}")
        name = field if field in SAME else RENAMED.get(field)
        if name is None or (field == "trust_remote_code" and value is False):
            continue  # the client always sends trust_remote_code: false; it is the default
        value = _limits(value) if name == "limit_mm_per_prompt" else value
        if name in by and merged.get(name, "") != value:
            raise refuse(field, f"it says something else than '{by[name]}'. Set only one of them.")
        by[name] = field
        if value == "":
            merged.pop(name, None)
        else:
            merged[name] = value
    if values.get("disable_log_requests") is False:
        merged["enable_log_requests"] = True
    elif values.get("disable_log_requests") is True:
        merged.pop("enable_log_requests", None)
    return merged


def refuse(field: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{field}': {why}", param=field, code="invalid_value")


def within(where: str, error: InvalidRequest) -> InvalidRequest:
    """The same, of a field of the object `where`."""
    param = f"{where}.{error.param}" if error.param else where
    message = error.message.replace(f"'{error.param}'", f"'{param}'")
    return InvalidRequest(message, param=param, code=error.code)


def _limits(text: str) -> dict[str, Any] | str:
    """'image=2,video=1', as vLLM 0.6 had it, or the JSON object that it is today."""
    if not text:
        return text
    try:
        if text.lstrip().startswith("{"):
            limits = orjson.loads(text)
        else:
            pairs = (part.split("=") for part in text.split(","))
            limits = {name.strip(): int(count) for name, count in pairs}
    except ValueError:
        raise refuse(
            "limit_mm_per_prompt", "expected 'image=2,video=1' or '{\"image\": 2}'."
        ) from None
    return limits
