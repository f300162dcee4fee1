"""The bodies of this API: fields, types and ranges. null everywhere means "not given"."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

INT32_MAX = 2**31 - 1
#: What vLLM takes.
MOST_STOPS = 16

Line = Annotated[str, StringConstraints(max_length=1024, pattern=r"^[^\x00-\x1f\x7f]*$")]
Text = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Field(ge=1, le=INT32_MAX)]
Share = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Template = Annotated[str, StringConstraints(max_length=10_000)]
Label = Annotated[
    str,
    StringConstraints(max_length=63, pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"),
]
Quantity = Any  # `quantities` reads it
LabelKey = Annotated[
    str, StringConstraints(max_length=128, pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?$")
]

Labels = Annotated[dict[LabelKey, Label], Field(max_length=64)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    def given(self) -> dict[str, Any]:
        """What was said, without nulls."""
        return {field: value for field, value in self if value is not None}


class Completion(_Body):
    """Of completions-sync and completions-stream. The client allows less than we do."""

    prompt: Text
    max_new_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    stop_sequences: Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    return_token_log_probs: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    top_p: Share | None = None
    include_stop_str_in_output: bool | None = None
    guided_json: Annotated[dict[str, Any], Field(min_length=1)] | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    guided_grammar: Text | None = None
    skip_special_tokens: bool | None = None


class _VllmOptions(_Body):
    """`vllm_options` knows what becomes of them."""

    max_model_len: Count | None = None
    max_num_seqs: Count | None = None
    enforce_eager: bool | None = None
    trust_remote_code: bool | None = None
    pipeline_parallel_size: Count | None = None
    tensor_parallel_size: Count | None = None
    quantization: Line | None = None
    disable_log_requests: bool | None = None
    chat_template: Template | None = None
    tool_call_parser: Line | None = None
    enable_auto_tool_choice: bool | None = None
    load_format: Line | None = None
    config_format: Line | None = None
    tokenizer_mode: Line | None = None
    limit_mm_per_prompt: Line | None = None
    max_num_batched_tokens: Count | None = None
    tokenizer: Line | None = None
    dtype: Line | None = None
    seed: int | None = None
    revision: Line | None = None
    code_revision: Line | None = None
    rope_scaling: dict[str, Any] | None = None
    tokenizer_revision: Line | None = None
    quantization_param_path: Line | None = None
    max_seq_len_to_capture: int | None = None
    disable_sliding_window: bool | None = None
    skip_tokenizer_init: bool | None = None
    served_model_name: Line | None = None
    override_neuron_config: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    block_size: Count | None = None
    gpu_memory_utilization: Share | None = None
    swap_space: float | None = None
    cache_dtype: Line | None = None
    num_gpu_blocks_override: Count | None = None
    enable_prefix_caching: bool | None = None
    max_gpu_memory_utilization: Share | None = None
    attention_backend: Line | None = None


class _Endpoint(_VllmOptions):
    source: Line | None = None
    inference_framework_image_tag: Line | None = None
    num_shards: Count | None = None
    quantize: Line | None = None
    checkpoint_path: Line | None = None
    metadata: dict[str, Any] | None = None
    post_inference_hooks: list[str] | None = None
    cpus: Quantity | None = None
    gpus: Annotated[int, Field(ge=0, le=1024)] | None = None
    memory: Quantity | None = None
    gpu_type: Line | None = None
    storage: Quantity | None = None
    optimize_costs: bool | None = None
    min_workers: Annotated[int, Field(ge=0)] | None = None
    max_workers: Annotated[int, Field(ge=0)] | None = None
    per_worker: Annotated[int, Field(ge=1, le=100_000)] | None = None
    labels: Labels | None = None
    prewarm: bool | None = None
    high_priority: bool | None = None
    billing_tags: dict[str, Any] | None = None
    default_callback_url: str | None = None
    default_callback_auth: dict[str, Any] | None = None
    public_inference: bool | None = None
    chat_template_override: Template | None = None
    # Of a new endpoint only; in an update they may only say what is so already.
    inference_framework: Line | None = None
    endpoint_type: Line | None = None
    nodes_per_worker: Annotated[int, Field(ge=1)] | None = None


class BatchModel(_VllmOptions):
    """model_config of a batch."""

    model: Annotated[Line, StringConstraints(min_length=1, max_length=200)]
    checkpoint_path: Line | None = None
    num_shards: Count | None = None
    max_context_length: Count | None = None
    response_role: Line | None = None
    labels: Labels | None = None


class NewBatch(_Body):
    """Of both versions; they differ in what `content` may be."""

    model: BatchModel = Field(alias="model_config")
    output_data_path: Annotated[Line, StringConstraints(min_length=1)]
    input_data_path: Annotated[Line, StringConstraints(min_length=1)] | None = None
    content: Any = None
    labels: Labels | None = None
    data_parallelism: Annotated[int, Field(ge=1, le=64)] | None = None
    max_runtime_sec: Annotated[int, Field(ge=1, le=172_800)] | None = None
    priority: Line | None = None
    tool_config: dict[str, Any] | None = None
    cpus: Quantity | None = None
    gpus: Annotated[int, Field(ge=0, le=1024)] | None = None
    memory: Quantity | None = None
    gpu_type: Line | None = None
    storage: Quantity | None = None
    nodes_per_worker: Annotated[int, Field(ge=1)] | None = None


class BatchChange(_Body):
    job_id: str | None = None
    priority: Line | None = None


class FineTuneBody(_Body):
    model: Annotated[Line, StringConstraints(min_length=1, max_length=440)]
    training_file: Annotated[Line, StringConstraints(min_length=1)]
    validation_file: Annotated[Line, StringConstraints(min_length=1)] | None = None
    hyperparameters: dict[str, Any] | None = None
    wandb_config: dict[str, Any] | None = None
    suffix: (
        Annotated[str, StringConstraints(min_length=1, max_length=28, pattern=r"^[A-Za-z0-9-]+$")]
        | None
    ) = None


class ModelDownload(_Body):
    model_name: Line
    download_format: Line | None = None


class NewEndpoint(_Endpoint):
    name: str
    model_name: Annotated[Line, StringConstraints(min_length=1)]


class EndpointChange(_Endpoint):
    name: str | None = None
    model_name: Annotated[Line, StringConstraints(min_length=1)] | None = None
    force_bundle_recreation: bool | None = None
