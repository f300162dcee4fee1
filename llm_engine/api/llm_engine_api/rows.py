"""Endpoints as this API shows them. Its client fails on a value that it does not know, and with it
on the whole list: whatever an endpoint is, its row must be one that the client can read."""

import math
from datetime import UTC, datetime
from typing import Any

from llm_engine.api.llm_engine_api.settings import EXTRAS, GPU_TYPES, QUANTIZATIONS
from llm_engine.endpoints import shown_state
from llm_engine.records import AdapterRecord, EndpointRecord, EndpointStatus

LONGEST_REASON = 500

Row = dict[str, Any]


def endpoint_row(record: EndpointRecord, live: EndpointStatus | None) -> Row:
    """`live`: what the controller last saw, if it has seen it at all."""
    described, args = record.extras.get(EXTRAS, {}), record.spec["vllm_args"]
    state, reason = shown_state(record, live)
    tag = described.get("inference_framework_image_tag")
    template = args.get("chat_template")
    return {
        "id": record.id,
        "name": record.name,
        "model_name": described.get("model_name", record.spec["model"]),
        "source": "hugging_face",
        "status": str(state),
        "inference_framework": "vllm",
        # The server always called it one thing and the client the other.
        "inference_framework_tag": tag,
        "inference_framework_image_tag": tag,
        "num_shards": args.get("tensor_parallel_size", 1),
        "quantize": _known(args.get("quantization"), QUANTIZATIONS),
        "checkpoint_path": described.get("checkpoint_path"),
        "chat_template_override": template if isinstance(template, str) else None,
        "spec": _spec(record, described, live)
        | {"status": str(state), "status_reason": reason and reason[:LONGEST_REASON]},
    }


def adapter_row(adapter: AdapterRecord, base: Row, problem: str | None) -> Row:
    """Of a fine-tuned model; what is not its own is its base's. `problem`: why that cannot serve
    it."""
    about = {"fine_tune_id": adapter.fine_tune or "", "base_model": adapter.base}
    status = "UPDATE_FAILED" if problem else base["status"]
    spec = base["spec"] | {
        "id": adapter.id,
        "name": adapter.name,
        "destination": adapter.id,
        "deployment_name": adapter.base,
        "created_by": adapter.owner,
        "created_at": _time(adapter.created_at),
        "last_updated_at": _time(adapter.created_at),
        "metadata": about,
        "labels": {},
        "billing_tags": None,
        "public_inference": False,
        "status": status,
        "status_reason": problem[:LONGEST_REASON] if problem else base["spec"]["status_reason"],
    }
    return base | {
        "id": adapter.id,
        "name": adapter.name,
        "status": status,
        "checkpoint_path": None,
        "spec": spec,
    }


def _spec(record: EndpointRecord, described: Row, live: EndpointStatus | None) -> Row:
    return {
        "id": record.id,
        "name": record.name,
        "endpoint_type": "streaming",
        "destination": record.id,
        "deployment_name": record.name,
        "bundle_name": record.spec["model"],
        "metadata": described.get("metadata", {}),
        "labels": described.get("labels", {}),
        "billing_tags": described.get("billing_tags"),
        "post_inference_hooks": None,
        "default_callback_url": None,
        "default_callback_auth": None,
        "created_by": record.owner,
        "created_at": _time(record.created_at),
        "last_updated_at": _time(record.updated_at),
        "deployment_state": _deployment(record, live),
        "resource_state": _resources(record, described),
        "public_inference": record.spec["public"],
    }


def _deployment(record: EndpointRecord, live: EndpointStatus | None) -> Row:
    scaling = record.spec["autoscaling"]
    ready, wanted = (live.replicas_ready, live.replicas_wanted) if live else (0, 0)
    return {
        "min_workers": scaling["min_replicas"],
        "max_workers": scaling["max_replicas"],
        "per_worker": max(1, round(scaling["target_queue_depth"])),
        "concurrent_requests_per_worker": record.spec["max_queue"],
        "available_workers": ready,
        "unavailable_workers": max(0, wanted - ready),
    }


def _resources(record: EndpointRecord, described: Row) -> Row:
    gpus = record.spec["num_gpus"]
    if gpus is None:  # the cluster's nodes decide, unless several were asked for
        ranks = record.spec["vllm_args"].get("tensor_parallel_size", 1)
        gpus = ranks if ranks > 1 else 0
    return {
        "cpus": record.spec["num_cpus"],
        "gpus": math.ceil(gpus),
        "memory": described.get("memory", "0"),  # the client wants one; none is reserved
        "storage": described.get("storage"),
        "gpu_type": _known(described.get("gpu_type"), GPU_TYPES),
        "nodes_per_worker": 1,
        "optimize_costs": False,
    }


def _known(value: Any, known: Any) -> str | None:
    return value if isinstance(value, str) and value in known else None


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
