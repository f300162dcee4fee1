"""What is used of Ray and vLLM beyond their public interfaces. An upgrade that moves it fails here.

Read from source, so that no test pays for importing vLLM; tests/serve runs all of it for real.
"""

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

import ray.serve._private.replica as serve_replica
from ray.serve._private.client import ServeControllerClient
from ray.serve.context import _get_global_client


def functions(module: str) -> dict[str, list[str]]:
    """The functions of a vLLM module, by name, with their parameters' names."""
    nodes = ast.walk(ast.parse(source_of(module)))
    made = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {n.name: [a.arg for a in n.args.args + n.args.kwonlyargs] for n in made}


def source_of(module: str) -> str:
    root = Path(importlib.util.find_spec("vllm").origin).parent
    return root.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text()


def test_vllms_launcher():
    entry = functions("vllm.entrypoints.launchers.api_server.entry")
    assert entry["run_server_worker"][:3] == ["listen_address", "sock", "args"]
    arguments = functions("vllm.entrypoints.launchers.cli_args")
    assert arguments["make_arg_parser"] == ["parser"]
    assert arguments["validate_parsed_serve_args"] == ["args"]
    assert functions("vllm.entrypoints.launchers.launcher")["validate_api_server_args"] == ["args"]
    assert "get_num_unfinished_requests" in functions("vllm.v1.engine.async_llm")


def test_vllm_finds_our_plugins():
    groups = {"vllm.general_plugins": "register", "vllm.stat_logger_plugins": "LoadLogger"}
    for group, name in groups.items():
        [entry] = [
            e for e in importlib.metadata.entry_points(group=group) if e.name == "llm_engine"
        ]
        assert entry.attr == name


def test_rays_grpc_port_is_opened_by_the_function_that_we_narrow():
    source = Path(serve_replica.__file__).read_text()
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in source


def test_serve_tells_its_http_host():
    assert callable(_get_global_client) and isinstance(ServeControllerClient.http_config, property)


def test_vllm_takes_and_gives_back_adapters():
    models = functions("vllm.entrypoints.openai.models.serving")
    assert models["resolve_lora"] == ["self", "lora_name"]
    source = source_of("vllm.entrypoints.openai.models.serving")
    assert "self.lora_requests: dict[str, LoRARequest] = {}" in source
    assert "self.lora_resolver_lock: dict[str, Lock]" in source
    assert "get_supported_resolvers()" in source, "it takes them from the registry when it is made"
    assert "state.openai_serving_models =" in source_of(
        "vllm.entrypoints.launchers.api_server.app_state"
    )
    client = functions("vllm.v1.engine.async_llm")
    assert {"list_loras", "remove_lora", "errored", "dead_error"} <= client.keys()
    assert client["remove_lora"] == ["self", "lora_id"]


def test_vllms_cpu_kernels_for_adapters():
    """What we put in their place, and why one slot stays empty: -1 is taken as an index."""
    wrapper = functions("vllm.lora.punica_wrapper.punica_cpu")
    assert wrapper["add_lora_linear"][:7] == [
        "self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices",
    ]  # fmt: skip
    base = source_of("vllm.lora.punica_wrapper.punica_base")
    assert "def update_metadata" in base and "self.no_lora = no_lora" in base
    kernels = source_of("vllm.lora.ops.torch_ops.lora_ops")
    assert "selected_loras = lora_b_weights[lora_indices_tensor]" in kernels
