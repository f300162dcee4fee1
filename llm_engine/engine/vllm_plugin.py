"""What vLLM loads into its processes by entry point: see [project.entry-points] in pyproject.toml.

`register` runs in every vLLM process, `LoadLogger` in the one that serves HTTP. Imports vLLM only
where vLLM has already been imported.
"""

import itertools
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_engine.engine import vllm_cpu
from llm_engine.engine.adapters import AdapterFailed, Host
from llm_engine.engine.base import AdapterProblem
from llm_engine.engine.server import Guard, die_when_parent_thread_does
from llm_engine.engine.steps import StepTimes
from llm_engine.records import Load

logger = logging.getLogger("vllm.llm_engine")  # where vLLM's own words go

#: Counters and gauges of the engine in this process; LoadLogger writes, VllmGuard reads.
latest = Load()
_steps = StepTimes()


def register() -> None:
    """Ask the kernel for AMX tiles, find adapters, and tie worker processes to the life of their
    parent.

    vLLM's bf16 CPU attention uses AMX instructions; a process that has not asked for permission
    (arch_prctl ARCH_REQ_XCOMP_PERM) dies of SIGILL at its first short prompt.
    """
    import torch

    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    initialise = getattr(torch.cpu, "_init_amx", None)
    if supported is not None and initialise is not None and supported():
        initialise()
    if multiprocessing.parent_process() is None:
        register_resolver()
        return
    die_when_parent_thread_does()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        vllm_cpu.install()


class Resolver:
    """Where vLLM finds an adapter's files. It gives each a number of its own."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}  # by adapter, while it is being loaded
        self._numbers = itertools.count(1)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        from vllm.lora.request import LoRARequest

        folder = self.folders.get(lora_name)
        if folder is None:
            return None
        number = next(self._numbers)
        return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=folder)


resolver = Resolver()


def register_resolver() -> None:
    """In the process that serves HTTP."""
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    LoRAResolver.register(Resolver)
    LoRAResolverRegistry.register_resolver("llm_engine", resolver)


def load_logger() -> type:
    """The class that vLLM tells of every engine step (its own `StatLoggerBase` seam)."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class LoadLogger(StatLoggerBase):
        def __init__(self, vllm_config, engine_index=0):
            global latest
            slots = latest.slots + vllm_config.scheduler_config.max_num_seqs  # of each rank
            latest = replace(latest, slots=slots)

        def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0):
            global latest
            running, waiting = latest.running, latest.waiting
            usage = latest.kv_cache_usage
            prompt, generated = latest.prompt_tokens, latest.generated_tokens
            if scheduler_stats is not None:
                running = scheduler_stats.num_running_reqs
                waiting = scheduler_stats.num_waiting_reqs
                waiting += scheduler_stats.num_skipped_waiting_reqs
                usage = scheduler_stats.kv_cache_usage
            if iteration_stats is not None:
                prompt += iteration_stats.num_prompt_tokens
                generated += iteration_stats.num_generation_tokens
                gaps = iteration_stats.inter_token_latencies_iter
                if gaps and not iteration_stats.num_prompt_tokens:
                    _steps.seen(len(gaps), min(gaps))
            latest = replace(
                latest,
                running=running,
                waiting=waiting,
                kv_cache_usage=usage,
                prompt_tokens=prompt,
                generated_tokens=generated,
            )

        def log_engine_initialized(self):
            pass

    return LoadLogger


class VllmHost:
    """Adapters in and out of the vLLM behind an ASGI application.

    vLLM finds them with a resolver (its own seam), which knows the folders of those that are being
    loaded and no others: what it has resolved it would keep for good, under every name ever asked
    for, and it would read an adapter's files again at any later step. `unload` ends that.
    """

    def __init__(self, app: Any) -> None:
        self._models = app.state.openai_serving_models
        self._client = app.state.engine_client

    @property
    def kept(self) -> int:
        """Less than fit, where one slot must stay empty: see `vllm.adapter_args`."""
        from vllm.platforms import current_platform

        lora = self._client.vllm_config.lora_config
        return lora.max_cpu_loras - 1 if current_platform.is_cpu() else lora.max_cpu_loras

    async def load(self, adapter: str, folder: Path) -> None:
        await self._evict_strangers()
        resolver.folders[adapter] = str(folder)
        try:
            found = await self._models.resolve_lora(adapter)
        finally:
            del resolver.folders[adapter]
        if self._client.errored:
            raise self._client.dead_error
        if adapter not in self._models.lora_requests:
            self._models.lora_resolver_lock.pop(adapter, None)
            logger.error("vLLM cannot load the adapter %s: %s", adapter, found.error.message)
            raise AdapterFailed(
                AdapterProblem.BROKEN, "its adapter cannot be loaded: see the engine's log."
            )

    async def unload(self, adapter: str) -> None:
        request = self._models.lora_requests.pop(adapter, None)
        self._models.lora_resolver_lock.pop(adapter, None)
        if request is not None:
            await self._client.remove_lora(request.lora_int_id)

    async def _evict_strangers(self) -> None:
        """Adapters that a request has brought back which ended after its adapter was unloaded."""
        known = {request.lora_int_id for request in self._models.lora_requests.values()}
        for number in set(await self._client.list_loras()) - known:
            await self._client.remove_lora(number)


class VllmGuard(Guard):
    def problem(self, error: Exception) -> dict[str, Any]:
        """In the words that vLLM has for the same error before a stream."""
        from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

        said = create_error_response(error).model_dump()
        if said["error"]["code"] >= 500:
            logger.error("a stream broke off", exc_info=error)
        return said

    def host(self, app: Any) -> tuple[Host, int]:
        host = VllmHost(app)
        return host, host.kept

    def load(self, app: Any) -> Load:
        """The last engine step's counters, with the queue as it is this moment."""
        unfinished = app.state.engine_client.get_num_unfinished_requests()
        # The step's gauges lag when nothing runs any more: an abort needs no step.
        running = min(latest.running, unfinished)
        step_s, request_s = _steps.line()
        return replace(
            latest,
            running=running,
            waiting=unfinished - running,
            step_s=step_s,
            request_s=request_s,
        )


def __getattr__(name: str) -> type:
    # vLLM wants the class itself behind the entry point; building it at first use keeps vLLM
    # from being imported by whoever merely imports this module.
    if name == "LoadLogger":
        return load_logger()
    raise AttributeError(name)
