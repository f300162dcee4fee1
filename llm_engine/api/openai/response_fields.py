"""The shape of a request to /v1/responses, as `fields` has those of the other inference routes."""

from typing import Annotated, Any, Literal, Required

from pydantic import Discriminator, Field, TypeAdapter

from llm_engine.api.openai.fields import (
    INT32_MAX,
    INT64_MAX,
    Count,
    ExtraArguments,
    FunctionName,
    JsonObjectFormat,
    LogitBias,
    Metadata,
    Name,
    Penalty,
    Probability,
    Stop,
    StructuredOutputs,
    Text,
    TextFormat,
    Unsupported,
    _Common,
    _Open,
)

_MOST_ITEMS = 10_000
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class FunctionTool(_Open, total=False):
    type: Required[Literal["function"]]  # nothing here searches, runs code or uses computers
    name: Required[FunctionName]
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class NamedFunction(_Open, total=False):
    type: Required[Literal["function"]]
    name: Required[Text]


class AllowedFunctions(_Open, total=False):
    type: Required[Literal["allowed_tools"]]
    mode: Required[Literal["auto", "required"]]
    tools: Required[Annotated[list[NamedFunction], Field(fail_fast=True, min_length=1)]]


ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[NamedFunction | AllowedFunctions, Discriminator("type")]
)


class SchemaFormat(_Open, total=False):
    type: Required[Literal["json_schema"]]
    name: Required[FunctionName]
    description: str | None
    schema: Required[dict[str, Any]]
    strict: bool | None


class TextOptions(_Open, total=False):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Discriminator("type")] | None
    verbosity: Literal["medium"] | None


class Reasoning(_Open, total=False):
    effort: Effort | None
    # What there is of reasoning is told as it is; nobody sums it up.
    summary: Literal["auto"] | None
    generate_summary: Literal["auto"] | None


class StreamOptions(_Open, total=False):
    include_obfuscation: Literal[False] | None


class ConversationReference(_Open, total=False):
    id: Required[Name]


class ResponseRequest(_Common, total=False):
    # The items are checked by `api/responses/items.py`, which also completes them.
    input: Required[
        Text
        | Annotated[
            list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=_MOST_ITEMS)
        ]
    ]
    instructions: str | None
    max_output_tokens: Count | None
    temperature: Annotated[float, Field(ge=0, le=2)] | None
    top_p: Probability | None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None
    include: (
        Annotated[
            list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]],
            Field(fail_fast=True, max_length=8),
        ]
        | None
    )
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=128)] | None
    tool_choice: ToolChoice | None
    parallel_tool_calls: bool | None
    text: TextOptions | None
    reasoning: Reasoning | None
    truncation: Literal["auto", "disabled"] | None

    background: bool | None
    store: bool | None
    stream: bool | None
    stream_options: StreamOptions | None
    previous_response_id: Name | None
    conversation: Name | ConversationReference | None

    # vLLM's sampling extras, as in chats.
    stop: Stop | None
    presence_penalty: Penalty | None
    frequency_penalty: Penalty | None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None
    logit_bias: LogitBias | None
    seed: Annotated[int, Field(ge=-(2**63), le=INT64_MAX)] | None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None
    min_p: Probability | None
    structured_outputs: StructuredOutputs | None
    chat_template_kwargs: dict[str, Any] | None
    vllm_xargs: ExtraArguments | None

    # Labels and hints: no value of theirs may change the answer, so they are accepted as they are.
    metadata: Metadata | None
    safety_identifier: str | None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None
    prompt_cache_retention: Literal["in_memory", "24h"] | None
    max_tool_calls: Count | None  # of tools that run here, of which there are none

    service_tier: Literal["auto", "default"] | None

    prompt: Unsupported
    context_management: Unsupported
    moderation: Unsupported
    # vLLM's: another form of input, and of answer.
    previous_input_messages: Unsupported
    enable_response_messages: Literal[False] | None
    mm_payload: Unsupported
    return_mm_kwargs: Unsupported


VLLM_RESPONSES = frozenset(
    """
    cache_salt ignore_eos include_reasoning include_stop_str_in_output media_io_kwargs
    mm_processor_kwargs session_id skip_special_tokens stop_token_ids watermarking
""".split()
)
RESPONSES = TypeAdapter(ResponseRequest)
