"""From the fields of Model.create and Model.update to the settings of an endpoint.

What is accepted is honoured, describes only (and is kept), or says what happens anyway; all else
is refused by name. docs/llm-engine-dialect.md has the table. No I/O.
"""

import re
from typing import Any

import orjson

from llm_engine.api.cold import check
from llm_engine.api.llm_engine_api import quantities, vllm_options
from llm_engine.api.llm_engine_api.fields import EndpointChange, NewEndpoint
from llm_engine.api.llm_engine_api.vllm_options import refuse
from llm_engine.config import EndpointSettings
from llm_engine.records import EndpointRecord

Values = dict[str, Any]

#: Under this key of an endpoint's extras lies what only describes it.
EXTRAS = "scale"
MOST_WORKERS = 250
MOST_DESCRIPTION = 16 * 1024  # bytes of JSON
GPU_TYPES = frozenset(
    """
    nvidia-tesla-t4 nvidia-ampere-a10 nvidia-ampere-a100 nvidia-ampere-a100e nvidia-hopper-h100
    nvidia-hopper-h100-1g20gb nvidia-hopper-h100-3g40gb
""".split()
)
QUANTIZATIONS = ("awq", "bitsandbytes")

#: The client's own defaults, for callers that leave the fields out.
_DEFAULTS: Values = {
    "inference_framework_image_tag": "latest",
    "min_workers": 0,
    "max_workers": 1,
    "per_worker": 2,
}
#: Would have no effect here; null, false and nothing ask for none.
_NO_EFFECT = {
    "high_priority": "there is no pool of prewarmed nodes.",
    "prewarm": "workers start when min_workers or a request ask for them.",
    "optimize_costs": "resources are not resized while an endpoint runs.",
    "force_bundle_recreation": "there are no bundles; change a field to start new workers.",
    "post_inference_hooks": "hooks are not supported.",
    "default_callback_url": "callbacks are not supported.",
    "default_callback_auth": "callbacks are not supported.",
}
_DESCRIBING = ("inference_framework_image_tag", "memory", "storage", "gpu_type", "labels",
               "metadata", "billing_tags")  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9._-]{1,96})?")
_OBJECTS = re.compile(r"(s3|gs|azure)://|https?://[^/]*\.blob\.core\.windows\.net/")


def new(data: Values) -> tuple[EndpointSettings, Values]:
    """Settings and extras of a new endpoint. Raises InvalidRequest."""
    values = _DEFAULTS | check(NewEndpoint, data).given()
    spec = {"name": values["name"], "autoscaling": {}, "vllm_args": {}}
    return _merge(spec, {}, values)


def changed(data: Values, record: EndpointRecord) -> tuple[EndpointSettings, Values]:
    """Settings and extras after an update. Raises InvalidRequest.

    null, and what the client always sends (`metadata: {}`, `trust_remote_code: false`), changes
    nothing; "" clears.
    """
    values = check(EndpointChange, data).given()
    if values.get("metadata") == {}:
        del values["metadata"]
    return _merge(record.spec, record.extras, values)


def own_engine(base: EndpointSettings | None, values: Values, replicas: int) -> EndpointSettings:
    """Of engines that serve one batch and nobody else: like `base`, where there is one, with what
    its model_config says. Their name is the job's to give. Raises InvalidRequest."""
    if base is None:
        spec: Values = {"name": "batch", "vllm_args": {}, "autoscaling": {}}
    else:
        spec = base.model_dump(mode="json")
    spec["public"] = False
    spec["autoscaling"] |= {"min_replicas": replicas, "max_replicas": replicas}
    role = values.pop("response_role", None)
    settings, _ = _merge(spec, {}, values)
    if role is None:
        return settings
    return settings.model_copy(update={"vllm_args": settings.vllm_args | {"response_role": role}})


def _merge(spec: Values, extras: Values, values: Values) -> tuple[EndpointSettings, Values]:
    described = dict(extras.get(EXTRAS, {}))
    spec = spec | {"autoscaling": dict(spec["autoscaling"])}
    _check_fixed(spec["name"], values)
    _check_text(values)
    _set_model(spec, described, values)
    _set_workers(spec["autoscaling"], values)
    _describe(described, values)
    _check_quantize(values)
    spec["vllm_args"] = vllm_options.merge(spec["vllm_args"], values)
    _set_resources(spec, described, values)
    if "public_inference" in values:
        spec["public"] = values["public_inference"]
    return check(EndpointSettings, spec), extras | {EXTRAS: described}


def _check_fixed(name: str, values: Values) -> None:
    """What can have one value only."""
    only = {
        "name": (name, "an endpoint cannot be renamed."),
        "served_model_name": (name, "a model is called by its endpoint's name."),
        "source": ("hugging_face", "only 'hugging_face' is supported."),
        "inference_framework": ("vllm", "it is not supported: only 'vllm' is."),
        "endpoint_type": ("streaming", "only 'streaming' is supported."),
        "nodes_per_worker": (1, "a worker lies on one node here."),
        "pipeline_parallel_size": (1, "a worker's GPUs are split by num_shards only."),
    }
    for field, (value, why) in only.items():
        if field in values and values[field] != value:
            raise refuse(field, why)
    for field, why in _NO_EFFECT.items():
        if values.get(field):
            raise refuse(field, f"it would have no effect: {why}")


def _check_text(values: Values) -> None:
    """PostgreSQL cannot store U+0000, nor answers show what is nested without end."""
    for field, value in values.items():
        try:
            orjson.dumps(value)
        except orjson.JSONEncodeError:
            raise refuse(field, "it is nested too deeply.") from None
    for field, value in values.items():
        left = [value]
        while left:
            item = left.pop()
            if isinstance(item, dict):
                left += [*item, *item.values()]
            elif isinstance(item, list):
                left += item
            elif isinstance(item, str) and "\0" in item:
                raise refuse(field, "it holds the character U+0000.")


# -- the model


def _set_model(spec: Values, described: Values, values: Values) -> None:
    """The checkpoint is what is loaded; without one, the model's name says what."""
    if not values.keys() & {"model_name", "checkpoint_path"}:
        return
    described |= {k: values[k] for k in ("model_name", "checkpoint_path") if k in values}
    if not described.get("checkpoint_path"):
        described.pop("checkpoint_path", None)
    field = "checkpoint_path" if "checkpoint_path" in described else "model_name"
    model = described.get(field, spec.get("model"))
    _check_model(field, model)
    spec["model"] = model


def _check_model(field: str, model: str) -> None:
    if _OBJECTS.match(model):
        raise refuse(
            field,
            "models cannot be read from object storage yet. Use a folder that every node can "
            "read, or a Hugging Face id.",
        )
    if model == "builtin:embed":
        raise refuse(field, "'builtin:embed' makes embeddings, which this API has not.")
    if model.endswith((".tar", ".tar.gz")):
        raise refuse(field, "expected a folder, not an archive.")
    if not (model.startswith(("/", "builtin:")) or _HUB_ID.fullmatch(model)):
        raise refuse(
            field,
            "expected 'builtin:chat', a folder (its whole path), or a Hugging Face id such as "
            "'org/model'.",
        )


def _check_quantize(values: Values) -> None:
    method = values.get("quantize")
    if method and method != "awq":
        raise refuse("quantize", f"{method!r} is not supported for vllm; 'awq' is.")


# -- how many, and on what


def _set_workers(scaling: Values, values: Values) -> None:
    least, most = values.get("min_workers"), values.get("max_workers")
    if most == 0:
        raise refuse("max_workers", "an endpoint without workers answers nobody; delete it.")
    if most is not None and most > MOST_WORKERS:
        raise refuse("max_workers", f"requested max workers {most} too high, max {MOST_WORKERS}.")
    scaling |= {
        theirs: values[ours]
        for theirs, ours in (
            ("min_replicas", "min_workers"),
            ("max_replicas", "max_workers"),
            ("target_queue_depth", "per_worker"),
        )
        if ours in values
    }
    least, most = scaling["min_replicas"], scaling["max_replicas"]
    if least > most:
        raise refuse("min_workers", f"{least} is above max_workers, which is {most}.")


def _set_resources(spec: Values, described: Values, values: Values) -> None:
    if values.get("cpus", "") != "":
        spec["num_cpus"] = float(quantities.parse("cpus", values["cpus"]))
    if not values.keys() & {"num_shards", "tensor_parallel_size", "gpus", "gpu_type"}:
        return
    gpus = values.get("gpus", spec.get("num_gpus"))
    shards = _shards(spec["vllm_args"], values)
    # Without a GPU one shard runs on CPUs.
    if gpus is not None and gpus != shards and (gpus, shards) != (0, 1):
        raise refuse(
            "num_shards", f"num shard ({shards}) must equal number of GPUs ({gpus:g}); set both."
        )
    if described.get("gpu_type") and not gpus:
        raise refuse("gpu_type", "it is set, but gpus is 0 or null.")
    spec["num_gpus"] = gpus
    if shards != spec["vllm_args"].get("tensor_parallel_size", 1):
        spec["vllm_args"] = spec["vllm_args"] | {"tensor_parallel_size": shards}


def _shards(args: Values, values: Values) -> int:
    """The client always sends num_shards: its default says nothing beside the other field."""
    shards, ranks = values.get("num_shards"), values.get("tensor_parallel_size")
    if ranks is not None:
        if shards not in (None, 1, ranks):
            raise refuse("tensor_parallel_size", f"num_shards says {shards}. Set only one of them.")
        return ranks
    return shards or args.get("tensor_parallel_size", 1)


# -- what describes


def _describe(described: Values, values: Values) -> None:
    for field in ("memory", "storage"):
        if values.get(field, "") != "":
            quantities.parse(field, values[field])
    if values.get("gpu_type") and values["gpu_type"] not in GPU_TYPES:
        raise refuse("gpu_type", f"expected one of {', '.join(sorted(GPU_TYPES))}.")
    for key in ("user_id", "endpoint_name"):
        if key in values.get("labels", {}):
            raise refuse("labels", f"cannot specify '{key}'.")
    for key in ("_llm", "_CONVERTED_FROM_ARTIFACT_LIKE"):
        if key in values.get("metadata", {}):
            raise refuse("metadata", f"the key '{key}' is reserved.")
    for field in ("metadata", "billing_tags"):
        if len(orjson.dumps(values.get(field))) > MOST_DESCRIPTION:
            raise refuse(field, f"it is larger than {MOST_DESCRIPTION} bytes.")
    for field in _DESCRIBING:
        if values.get(field) == "":
            described.pop(field, None)
        elif field in values:
            described[field] = values[field]
