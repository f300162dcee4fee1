"""vLLM behind its own OpenAI server: the one file that starts vLLM.

Run as `python -m llm_engine.engine.vllm`; see `server` for how it is told what to serve. Uses
vLLM's launcher functions rather than its command line, so that the port is bound before the
model loads; tests/unit/test_upgrades.py fails when an upgrade moves them.
"""

import json
import os
import socket
from dataclasses import replace
from typing import Any

from llm_engine.config import MERGED
from llm_engine.engine.adapters import AdapterSource
from llm_engine.engine.merged import prepare
from llm_engine.engine.server import EngineSpec, run

#: What an engine without a GPU gets unless vllm_args or env say otherwise.
CPU_ARGS: dict[str, Any] = {
    # One process less than the default executor, and 0.4 GB with it. vLLM turns the short name
    # "uni" into "mp" on CPU; the class path stays.
    "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
    "enforce_eager": True,
    # A fixed size instead of a share of memory: several engines live on one laptop.
    "kv_cache_memory_bytes": 2**30,
}
#: All that fine-tunes of the demo model train. Left to itself vLLM makes room for the output layer,
#: too, and computes with it at every step, whether or not anybody asks for an adapter.
BUILTIN_CHAT_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
CPU_ENV = {
    # "auto" pins every engine of a small machine to the same core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
BUILTIN_ARGS: dict[str, Any] = {"max_num_seqs": 64}
BUILTIN_CPU_ARGS: dict[str, Any] = {"kv_cache_memory_bytes": 64 * 2**20}
BUILTIN_CHAT_ARGS: dict[str, Any] = {
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
}
#: Adapters that an engine on GPUs keeps in the host's memory, for each slot on them.
HOST_ADAPTERS = 4
ALWAYS_ARGS: dict[str, Any] = {
    "disable_uvicorn_access_log": True,
    "enable_prompt_tokens_details": True,  # usage tells cached_tokens
    "enable_scale_out": True,  # /v1/responses/render, which counts tokens; the port is private
    # vLLM's own API key leaves /metrics, /health and others open; this covers every path.
    "middleware": ["llm_engine.engine.vllm_plugin.VllmGuard"],
}
ALWAYS_ENV = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    # Longer than the ingress keeps an idle connection, so that it is never closed under a request.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
}


def main() -> None:
    run(serve)


def serve(spec: EngineSpec, listener: socket.socket) -> None:
    for name, value in ALWAYS_ENV.items():
        os.environ.setdefault(name, value)
    on_cpu = _on_cpu()
    if on_cpu:
        for name, value in CPU_ENV.items():
            os.environ.setdefault(name, value)
    if spec.model.startswith(MERGED):
        folder, base = prepare(spec.model, AdapterSource(**(spec.adapters or {})))
        spec = replace(spec, model=str(folder), builtin=base.startswith("builtin:"))
    if os.path.isdir(spec.model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder needs no hub, nor its time-outs

    import uvloop
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.entrypoints.launchers.launcher import validate_api_server_args

    args = parse_args(spec, on_cpu)
    validate_api_server_args(args)
    host, port = listener.getsockname()[:2]
    args.host, args.port = host, port
    uvloop.run(entry.run_server_worker(f"http://{host}:{port}", listener, args))


def parse_args(spec: EngineSpec, on_cpu: bool) -> Any:
    """vLLM's own parser judges the arguments; raises ValueError with its message."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> None:
            raise ValueError(f"vLLM refuses vllm_args: {message}")

    merged = effective_args(spec, on_cpu)
    args = make_arg_parser(Parser(prog="vllm_args")).parse_args(to_command_line(merged))
    validate_parsed_serve_args(args)
    return args


def effective_args(spec: EngineSpec, on_cpu: bool) -> dict[str, Any]:
    """Defaults, then what the endpoint says, then what must be so."""
    merged = dict(ALWAYS_ARGS)
    merged |= CPU_ARGS if on_cpu else {}
    if spec.builtin:
        merged |= BUILTIN_ARGS
        merged |= BUILTIN_CPU_ARGS if on_cpu else {}
        merged |= BUILTIN_CHAT_ARGS if spec.task == "generate" else {}
    if spec.task == "generate":
        merged["scheduling_policy"] = "priority"  # batches stand behind everybody else
    if spec.task == "embed":
        merged |= {"runner": "pooling", "convert": "embed"}
    if spec.max_adapters:
        merged |= adapter_args(spec, on_cpu)
        merged |= {"lora_target_modules": BUILTIN_CHAT_TARGETS} if spec.builtin else {}
    if on_cpu and spec.tensor_parallel_size > 1:
        del merged["distributed_executor_backend"]  # several ranks need several processes
    merged |= spec.vllm_args
    return merged | {
        "model": spec.model,
        "served_model_name": spec.name,
        "max_num_queued_reqs": spec.max_queue,
    }


def adapter_args(spec: EngineSpec, on_cpu: bool) -> dict[str, Any]:
    slots = spec.max_adapters
    if on_cpu:
        # vLLM's kernels for CPUs (torch_ops/lora_ops.py) take -1, which stands for no adapter, as
        # an index: beside a request with an adapter, one without is computed with the last slot's.
        # So there is one more than is ever used, see VllmHost.
        return _lora(spec, slots + 1, slots + 1)
    return _lora(spec, slots, slots * HOST_ADAPTERS)


def _lora(spec: EngineSpec, slots: int, in_memory: int) -> dict[str, Any]:
    return {
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": in_memory,
        "max_lora_rank": spec.max_adapter_rank,
    }


def to_command_line(args: dict[str, Any]) -> list[str]:
    """{"max_model_len": 1024, "enforce_eager": True} gives --max-model-len=1024 --enforce-eager."""
    line: list[str] = []
    for key, value in args.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            line.append(flag)
        elif value is False:
            line.append("--no-" + flag[2:])
        elif isinstance(value, dict):
            line.append(f"{flag}={json.dumps(value)}")
        elif isinstance(value, list | tuple) and key == "middleware":
            line += [f"{flag}={item}" for item in value]  # one flag an item
        elif isinstance(value, list | tuple):
            line += [flag, *(str(item) for item in value)]
        elif value is not None:
            line.append(f"{flag}={value}")
    return line


def _on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


if __name__ == "__main__":
    main()
