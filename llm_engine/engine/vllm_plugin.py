"""What vLLM loads into its processes by entry point: see [project.entry-points] in pyproject.toml.

`register` runs in every vLLM process, `LoadLogger` in the one that serves HTTP. Imports vLLM only
where vLLM has already been imported.
"""

import multiprocessing
from dataclasses import replace
from typing import Any

from llm_engine.engine.server import Guard, die_when_parent_thread_does
from llm_engine.engine.steps import StepTimes
from llm_engine.records import Load

#: Counters and gauges of the engine in this process; LoadLogger writes, VllmGuard reads.
latest = Load()
_steps = StepTimes()


def register() -> None:
    """Ask the kernel for AMX tiles, and tie worker processes to the life of their parent.

    vLLM's bf16 CPU attention uses AMX instructions; a process that has not asked for permission
    (arch_prctl ARCH_REQ_XCOMP_PERM) dies of SIGILL at its first short prompt.
    """
    import torch

    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    initialise = getattr(torch.cpu, "_init_amx", None)
    if supported is not None and initialise is not None and supported():
        initialise()
    if multiprocessing.parent_process() is not None:
        die_when_parent_thread_does()


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


class VllmGuard(Guard):
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
