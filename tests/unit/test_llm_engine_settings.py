"""What becomes of each field of Model.create and Model.update."""

import time

import pytest

from llm_engine.api.llm_engine_api import settings
from llm_engine.errors import InvalidRequest
from llm_engine.records import EndpointRecord
from llm_engine.statuses import EndpointState


def new(**fields):
    return settings.new({"name": "it", "model_name": "org/model", "num_shards": 1, **fields})


def record_of(made) -> EndpointRecord:
    wanted, extras = made
    now = time.time()
    return EndpointRecord(
        "ep-1", wanted.name, "me", "api", wanted.model_dump(mode="json"),
        EndpointState.READY, now, now, now, extras=extras, settled=True,
    )  # fmt: skip


def changed(before, **fields):
    """As the client sends it: all that was not given is null."""
    nulls = dict.fromkeys(settings.EndpointChange.model_fields)
    always = {"metadata": {}, "trust_remote_code": False, "force_bundle_recreation": False}
    return settings.changed(nulls | always | fields, record_of(before))


def refused(fields, make=new) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        make(**fields)
    assert caught.value.status == 400
    return caught.value


def test_the_clients_defaults_make_an_endpoint_that_may_sleep():
    wanted, extras = new()
    assert wanted.model == "org/model" and wanted.public and wanted.vllm_args == {}
    scaling = wanted.autoscaling
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_queue_depth) == (0, 1, 2)
    assert wanted.num_gpus is None
    assert extras == {
        "scale": {"inference_framework_image_tag": "latest", "model_name": "org/model"}
    }


@pytest.mark.parametrize(
    ("fields", "model"),
    [
        ({"model_name": "builtin:chat"}, "builtin:chat"),
        ({"model_name": "/models/one"}, "/models/one"),
        ({"model_name": "gpt2"}, "gpt2"),
        ({"model_name": "llama 2!", "checkpoint_path": "/weights"}, "/weights"),
        ({"model_name": "llama-2-7b", "checkpoint_path": "org/model"}, "org/model"),
        ({"checkpoint_path": ""}, "org/model"),
    ],
)
def test_the_checkpoint_is_loaded_or_else_what_the_name_says(fields, model):
    assert new(**fields)[0].model == model


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("checkpoint_path", "s3://bucket/x", "object storage"),
        ("checkpoint_path", "gs://bucket/x", "object storage"),
        ("checkpoint_path", "azure://bucket/x", "object storage"),
        ("checkpoint_path", "https://me.blob.core.windows.net/x", "object storage"),
        ("checkpoint_path", "https://example.com/x", "folder"),
        ("checkpoint_path", "/models/x.tar", "archive"),
        ("checkpoint_path", "relative/path/to", "whole path"),
        ("model_name", "two words", "Hugging Face id"),
        ("model_name", "line\nbreak", "pattern"),
        ("model_name", "", "at least 1"),
        ("model_name", "builtin:embed", "embeddings"),
        ("source", "s3", "hugging_face"),
        ("inference_framework", "text_generation_inference", "not supported"),
        ("inference_framework", "sglang", "not supported"),
        ("endpoint_type", "sync", "streaming"),
        ("nodes_per_worker", 2, "one node"),
        ("nodes_per_worker", 0, "greater than or equal to 1"),
        ("pipeline_parallel_size", 2, "num_shards"),
        ("served_model_name", "other", "endpoint's name"),
        ("max_workers", 0, "delete"),
        ("max_workers", 251, "too high, max 250"),
        ("max_workers", -1, "greater than or equal to 0"),
        ("max_workers", True, "integer"),
        ("max_workers", "2", "integer"),
        ("min_workers", 2, "above max_workers"),
        ("per_worker", 0, "greater than or equal to 1"),
        ("cpus", "many", "incorrectly formatted"),
        ("cpus", 0, "positive"),
        ("cpus", -1, "positive"),
        ("cpus", "-" * 5000, "incorrectly formatted"),
        ("cpus", True, "incorrectly formatted"),
        ("memory", "24Gib", "incorrectly formatted"),
        ("memory", ["1Gi"], "incorrectly formatted"),
        ("storage", "0Gi", "positive"),
        ("gpu_type", "nvidia-hopper-h200", "nvidia-hopper-h100"),
        ("gpu_type", "nvidia-tesla-t4", "gpus is 0 or null"),
        ("quantize", "bitsandbytes", "not supported for vllm"),
        ("quantize", "gptq", "not supported for vllm"),
        ("labels", {"user_id": "me"}, "user_id"),
        ("labels", {"endpoint_name": "me"}, "endpoint_name"),
        ("labels", {"team": "-no-"}, "pattern"),
        ("labels", {"team": 1}, "string"),
        ("metadata", {"_llm": {}}, "reserved"),
        ("metadata", {"a": "x" * 20_000}, "16384 bytes"),
        ("metadata", {"a": ["b\0"]}, "U+0000"),
        ("billing_tags", {"\0": 1}, "U+0000"),
        ("chat_template_override", "x" * 10_001, "at most 10000"),
        ("chat_template", "\0", "U+0000"),
        ("rope_scaling", {"type": "linear"}, "no such option"),
        ("swap_space", 4.0, "no such option"),
        ("limit_mm_per_prompt", "image", "image=2"),
        ("limit_mm_per_prompt", "{", "image=2"),
        ("gpu_memory_utilization", 1.5, "less than or equal to 1"),
        ("max_model_len", 0, "greater than or equal to 1"),
        ("high_priority", True, "no effect"),
        ("prewarm", True, "no effect"),
        ("optimize_costs", True, "no effect"),
        ("post_inference_hooks", ["callback"], "no effect"),
        ("default_callback_url", "http://example.com", "no effect"),
        ("default_callback_auth", {"kind": "basic"}, "no effect"),
        ("surprise", 1, "Unknown parameter"),
        ("force_bundle_recreation", True, "Unknown parameter"),  # of updates only
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(field, value, word):
    error = refused({field: value})
    assert field in error.message and word in error.message


@pytest.mark.parametrize(
    "name", ["", "a/../b", "..", "/a", "a b", "a\nb", "a\0", "ü", "x" * 201, "a?b", "a#b", "a&b"]
)
def test_names_that_cannot_stand_in_an_address_are_refused(name):
    assert "name" in refused({"name": name}).message


def test_what_is_nested_without_end_is_refused():
    deep: dict = {}
    for _ in range(900):
        deep = {"a": deep}
    for field in ("metadata", "billing_tags", "mm_processor_kwargs"):
        assert "nested too deeply" in refused({field: deep}).message


@pytest.mark.parametrize("field", ["high_priority", "prewarm", "optimize_costs"])
def test_what_asks_for_nothing_is_accepted(field):
    assert new(**{field: False, "post_inference_hooks": [], "nodes_per_worker": 1})


@pytest.mark.parametrize(
    ("fields", "num_gpus", "args"),
    [
        ({}, None, {}),
        ({"num_shards": 4}, None, {"tensor_parallel_size": 4}),
        ({"num_shards": 2, "gpus": 2}, 2, {"tensor_parallel_size": 2}),
        ({"tensor_parallel_size": 2}, None, {"tensor_parallel_size": 2}),
        ({"tensor_parallel_size": 2, "gpus": 2}, 2, {"tensor_parallel_size": 2}),
        ({"gpus": 1, "gpu_type": "nvidia-ampere-a10"}, 1, {}),
        ({"gpus": 0}, 0, {}),
    ],
)
def test_shards_are_gpus(fields, num_gpus, args):
    wanted, _ = new(**fields)
    assert (wanted.num_gpus, wanted.vllm_args) == (num_gpus, args)


@pytest.mark.parametrize(
    "fields",
    [
        {"gpus": 2},
        {"num_shards": 2, "gpus": 1},
        {"num_shards": 2, "gpus": 0},
        {"num_shards": 2, "tensor_parallel_size": 4},
    ],
)
def test_shards_that_are_not_gpus_are_refused(fields):
    assert "num_shards" in refused(fields).message


@pytest.mark.parametrize(
    ("cpus", "number"),
    [(4, 4), ("4", 4), (1.5, 1.5), ("500m", 0.5), ("1e1", 10), (".5", 0.5), ("1k", 1000)],
)
def test_cpus_are_kubernetes_quantities(cpus, number):
    assert new(cpus=cpus)[0].num_cpus == number


@pytest.mark.parametrize("value", ["24Gi", "512Mi", "1G", 4096, 1.5])
def test_memory_and_storage_are_kept_as_they_were_written(value):
    kept = new(memory=value, storage=value)[1]["scale"]
    assert kept["memory"] == kept["storage"] == value


def test_what_describes_is_kept():
    told = {
        "labels": {"team": "a", "product": ""},
        "metadata": {"x": [1]},
        "billing_tags": {"cost": 3},
        "inference_framework_image_tag": "0.9",
    }
    assert new(**told)[1]["scale"] == {"model_name": "org/model", **told}


@pytest.mark.parametrize(
    ("fields", "args"),
    [
        ({"max_model_len": 1024, "enforce_eager": False},
         {"max_model_len": 1024, "enforce_eager": False}),
        ({"trust_remote_code": False}, {}),
        ({"trust_remote_code": True}, {"trust_remote_code": True}),
        ({"quantize": "awq"}, {"quantization": "awq"}),
        ({"quantize": "awq", "quantization": "awq"}, {"quantization": "awq"}),
        ({"quantization": "fp8"}, {"quantization": "fp8"}),
        ({"cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8"}),
        ({"max_gpu_memory_utilization": 0.5}, {"gpu_memory_utilization": 0.5}),
        ({"chat_template_override": "{{ x }}"}, {"chat_template": "{{ x }}"}),
        ({"limit_mm_per_prompt": "image=2,video=1"},
         {"limit_mm_per_prompt": {"image": 2, "video": 1}}),
        ({"limit_mm_per_prompt": '{"image": 2}'}, {"limit_mm_per_prompt": {"image": 2}}),
        ({"disable_log_requests": True}, {}),
        ({"disable_log_requests": False}, {"enable_log_requests": True}),
        ({"served_model_name": "it", "pipeline_parallel_size": 1}, {}),
    ],
)  # fmt: skip
def test_vllm_options_become_arguments(fields, args):
    assert new(**fields)[0].vllm_args == args


@pytest.mark.parametrize(
    "fields",
    [
        {"quantize": "awq", "quantization": "fp8"},
        {"chat_template": "a{{ x }}", "chat_template_override": "b{{ x }}"},
        {"gpu_memory_utilization": 0.4, "max_gpu_memory_utilization": 0.5},
    ],
)
def test_two_fields_that_contradict_each_other_are_refused(fields):
    message = refused(fields).message
    assert all(field in message for field in fields)


def test_an_update_of_nulls_changes_nothing():
    before = new(
        checkpoint_path="/weights", quantize="awq", chat_template_override="{{ x }}",
        labels={"team": "a"}, metadata={"x": 1}, billing_tags={"y": 2}, trust_remote_code=True,
        memory="1Gi", storage="2Gi", gpus=1, gpu_type="nvidia-tesla-t4", cpus="500m",
        min_workers=1, max_workers=3, per_worker=9, public_inference=False, max_model_len=99,
    )  # fmt: skip
    assert changed(before) == before


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({"min_workers": 1, "max_workers": 2}, lambda s, _: s.autoscaling.max_replicas == 2),
        ({"per_worker": 7}, lambda s, _: s.autoscaling.target_queue_depth == 7),
        ({"public_inference": False}, lambda s, _: s.public is False),
        ({"checkpoint_path": "/new"}, lambda s, _: s.model == "/new"),
        ({"checkpoint_path": ""}, lambda s, _: s.model == "org/model"),
        ({"model_name": "org/two"}, lambda s, _: s.model == "/weights"),
        ({"quantize": ""}, lambda s, _: "quantization" not in s.vllm_args),
        ({"chat_template_override": ""}, lambda s, _: "chat_template" not in s.vllm_args),
        ({"num_shards": 2, "gpus": 2}, lambda s, _: s.tensor_parallel_size == s.num_gpus == 2),
        ({"labels": {}}, lambda _, kept: kept["labels"] == {}),
        ({"metadata": {"z": 1}}, lambda _, kept: kept["metadata"] == {"z": 1}),
        ({"memory": ""}, lambda _, kept: "memory" not in kept),
    ],
)
def test_an_update_changes_what_it_names_and_an_empty_string_clears(fields, read):
    before = new(
        checkpoint_path="/weights", quantize="awq", chat_template_override="{{ x }}", gpus=1,
        labels={"team": "a"}, metadata={"x": 1}, memory="1Gi",
    )  # fmt: skip
    wanted, extras = changed(before, **fields)
    assert read(wanted, extras["scale"])


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"name": "other"}, "renamed"),
        ({"inference_framework": "lightllm"}, "vllm"),
        ({"endpoint_type": "async"}, "streaming"),
        ({"nodes_per_worker": 2}, "one node"),
        ({"force_bundle_recreation": True}, "no effect"),
        ({"min_workers": 3}, "above max_workers, which is 1"),
        ({"num_shards": 2}, "must equal number of GPUs"),
        ({"gpus": 0}, "gpu_type"),
        ({"checkpoint_path": "s3://x"}, "object storage"),
    ],
)
def test_an_update_refuses_what_cannot_change(fields, word):
    before = new(gpus=1, gpu_type="nvidia-tesla-t4")
    assert word in refused(fields, lambda **given: changed(before, **given)).message
    same = {"name": "it", "inference_framework": "vllm", "endpoint_type": "streaming"}
    assert changed(before, **same, nodes_per_worker=1) == before


def test_an_update_keeps_what_another_dialect_has_set():
    wanted, extras = new()
    spec = wanted.model_copy(update={"fallback": "other", "max_queue": 7, "num_gpus": 0.5})
    after, kept = changed((spec, extras | {"elsewhere": 1}), per_worker=3)
    assert (after.fallback, after.max_queue, after.num_gpus) == ("other", 7, 0.5)
    assert kept["elsewhere"] == 1
