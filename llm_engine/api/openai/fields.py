"""The shape of each OpenAI inference request: fields, types and ranges, declared once.

OpenAI's published limits, narrowed to what vLLM can honour (`Unsupported`, `Literal`). Unknown
keys pass: vLLM's own fields (min_tokens, structured_outputs, ...) are judged by vLLM.
"""

from typing import Annotated, Any, Literal, Required

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, TypeAdapter
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1

#: A field that vLLM would silently ignore although it changes the answer: only null is let in.
#: `problems.WHY` says what to do instead.
Unsupported = None


def _at_most(limit: int) -> BeforeValidator:
    """Before the items are checked: each wrong one of a million would cost an error object."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise PydanticCustomError("too_long", "too many properties", {"max_length": limit})
        return value

    return BeforeValidator(check)


Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=INT64_MAX)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Probability = Annotated[float, Field(ge=0, le=1)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
# Stricter than vLLM (which takes 16): a client tested here must work against OpenAI too.
Stop = Text | Annotated[list[Text], Field(fail_fast=True, max_length=4)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
    _at_most(1024),
]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    _at_most(16),
]

_OPEN = ConfigDict(extra="allow", strict=True)


class _Open(TypedDict, total=False):
    __pydantic_config__ = _OPEN  # type: ignore[misc]


# -- messages


class TextPart(_Open, total=False):
    type: Required[Literal["text"]]
    text: Required[str]


class RefusalPart(_Open, total=False):
    type: Required[Literal["refusal"]]
    refusal: Required[str]


class Link(_Open, total=False):
    url: Required[Text]


class ImagePart(_Open, total=False):
    type: Required[Literal["image_url"]]
    image_url: Required[Link]


class OtherPart(_Open, total=False):
    # vLLM checks their fields, and whether the model takes them at all.
    type: Required[
        Literal["input_audio", "audio_url", "video_url", "image_embeds", "audio_embeds",
                "video_embeds", "thinking", "tool_reference"]
    ]  # fmt: skip


Part = Annotated[TextPart | RefusalPart | ImagePart | OtherPart, Discriminator("type")]
Content = str | Annotated[list[Part], Field(fail_fast=True, min_length=1)]


class SystemMessage(_Open, total=False):
    role: Required[Literal["system", "developer"]]
    content: Required[Content]
    name: str


class UserMessage(_Open, total=False):
    role: Required[Literal["user"]]
    content: Required[Content]
    name: str


class CalledFunction(_Open, total=False):
    name: Required[Text]
    arguments: Required[str]


class ToolCall(_Open, total=False):
    id: Required[Text]
    type: Required[Literal["function"]]
    function: Required[CalledFunction]


class AssistantMessage(_Open, total=False):
    role: Required[Literal["assistant"]]
    content: Content | None
    name: str
    refusal: str | None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None
    audio: Unsupported
    function_call: Unsupported


class ToolMessage(_Open, total=False):
    role: Required[Literal["tool"]]
    tool_call_id: Required[Text]
    content: Required[Content]


class FunctionMessage(_Open, total=False):
    role: Required[Literal["function"]]
    name: Required[Text]
    content: Required[str | None]


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage,
    Discriminator("role"),
]


# -- tools and output formats


class Function(_Open, total=False):
    name: Required[FunctionName]
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class Tool(_Open, total=False):
    type: Required[Literal["function"]]  # vLLM has no custom (free text) tools
    function: Required[Function]


class FunctionReference(_Open, total=False):
    name: Required[Text]


class NamedTool(_Open, total=False):
    type: Required[Literal["function"]]
    function: Required[FunctionReference]


class AllowedTools(_Open, total=False):
    mode: Required[Literal["auto", "required"]]
    tools: Required[Annotated[list[NamedTool], Field(fail_fast=True, min_length=1)]]


class AllowedToolsChoice(_Open, total=False):
    type: Required[Literal["allowed_tools"]]
    allowed_tools: Required[AllowedTools]


ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[NamedTool | AllowedToolsChoice, Discriminator("type")]
)


class JsonSchema(_Open, total=False):
    name: Required[FunctionName]
    description: str | None
    schema: Required[dict[str, Any]]
    strict: bool | None


class TextFormat(_Open, total=False):
    type: Required[Literal["text"]]


class JsonObjectFormat(_Open, total=False):
    type: Required[Literal["json_object"]]


class JsonSchemaFormat(_Open, total=False):
    type: Required[Literal["json_schema"]]
    json_schema: Required[JsonSchema]


class StructuralTagFormat(_Open, total=False):
    type: Required[Literal["structural_tag"]]  # vLLM's; its fields are checked there


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat, Discriminator("type")
]


class StructuredOutputs(_Open, total=False):
    """vLLM's own form of response_format; checked here because it fails at a wrong type."""

    json: str | dict[str, Any] | None
    regex: Text | None
    choice: Annotated[list[str], Field(fail_fast=True, min_length=1)] | None
    grammar: Text | None
    json_object: bool | None
    structural_tag: Text | None


class StreamOptions(_Open, total=False):
    include_usage: bool | None
    include_obfuscation: bool | None
    continuous_usage_stats: bool | None


# -- requests


class _Common(_Open, total=False):
    model: Required[Name]
    user: str | None  # a label for the operator's logs; changes no answer
    # vLLM's: a higher number waits longer. One may stand back, and not push to the front.
    priority: Annotated[int, Field(ge=0, le=1000)]

    # Would let one tenant name another's engine request.
    request_id: Unsupported
    # Point the engine at other hosts' caches: between engines, never from outside.
    kv_transfer_params: Unsupported
    ec_transfer_params: Unsupported


class ExtraArguments(_Open, total=False):
    """vllm_xargs: what an operator's own vLLM extensions read. vLLM keeps its own in there too."""

    kv_transfer_params: Unsupported
    ec_transfer_params: Unsupported
    kv_cache_report_mode: Unsupported


class _Generate(_Common, total=False):
    temperature: Annotated[float, Field(ge=0, le=2)] | None
    top_p: Probability | None
    n: Annotated[int, Field(ge=1, le=128)] | None
    stream: bool | None
    stream_options: StreamOptions | None
    stop: Stop | None
    presence_penalty: Penalty | None
    frequency_penalty: Penalty | None
    logit_bias: LogitBias | None
    seed: Annotated[int, Field(ge=-(2**63), le=INT64_MAX)] | None
    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None

    # vLLM's sampling extras, checked here because a wrong value may surface late or unnamed.
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None
    min_p: Probability | None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None
    min_tokens: Annotated[int, Field(ge=0, le=INT64_MAX)]  # null is refused by vLLM
    # Hugging Face's name; rewritten to logit_bias.
    suppress_tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=1024)] | None

    vllm_xargs: ExtraArguments | None

    # Only for vLLM's /render routes, which are not served here.
    mm_payload: Unsupported
    return_mm_kwargs: Unsupported
    return_token_offsets: Unsupported

    # Removed from vLLM, which now ignores them: the answer would be unconstrained.
    guided_json: Unsupported
    guided_regex: Unsupported
    guided_choice: Unsupported
    guided_grammar: Unsupported
    guided_decoding_backend: Unsupported
    guided_whitespace_pattern: Unsupported


class ChatRequest(_Generate, total=False):
    messages: Required[Annotated[list[Message], Field(fail_fast=True, min_length=1)]]
    max_completion_tokens: Count | None
    max_tokens: Count | None
    logprobs: bool | None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None
    tools: Annotated[list[Tool], Field(fail_fast=True, min_length=1, max_length=128)] | None
    tool_choice: ToolChoice | None
    parallel_tool_calls: bool | None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None
    chat_template_kwargs: dict[str, Any] | None

    # Kept, to be retrieved; `metadata` is what it can be found by.
    store: bool | None
    metadata: Metadata | None

    # Labels and hints: no value of theirs may change the answer, so they are accepted as they are.
    safety_identifier: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: Literal["in_memory", "24h"] | None
    prompt_cache_options: dict[str, Any] | None
    prediction: dict[str, Any] | None

    # Only the value that asks for what happens anyway.
    service_tier: Literal["auto", "default"] | None
    verbosity: Literal["medium"] | None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True, min_length=1)] | None

    audio: Unsupported
    functions: Unsupported
    function_call: Unsupported
    web_search_options: Unsupported
    moderation: Unsupported


class CompletionRequest(_Generate, total=False):
    prompt: Required[  # at most 1,024 of them: vLLM's VLLM_MAX_COMPLETION_PROMPTS
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=1024)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=1024)]
    ]
    # 0 with echo: score the prompt, generate nothing.
    max_tokens: Annotated[int, Field(ge=0, le=INT64_MAX)] | None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None
    echo: bool | None
    best_of: Annotated[int, Field(ge=1, le=20)] | None
    suffix: Literal[""] | None
    prompt_embeds: Unsupported  # a pickled tensor


class EmbeddingRequest(_Common, total=False):
    input: Required[
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=2048)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=2048)]
    ]
    encoding_format: Literal["float", "base64"] | None
    dimensions: Annotated[int, Field(ge=1, le=INT32_MAX)] | None


# Fields of vLLM's own that pass as they are: vLLM honours them or refuses them by name.
# tests/unit/test_openai_fields.py compares them with the installed vLLM.
_VLLM_ANY = frozenset(
    """
    add_special_tokens cache_salt truncate_prompt_tokens truncation_side
""".split()
)
_VLLM_GENERATE = _VLLM_ANY | frozenset(
    """
    allowed_token_ids bad_words ignore_eos include_stop_str_in_output length_penalty
    logprob_token_ids prompt_logprobs repetition_detection return_token_ids
    return_tokens_as_token_ids routed_experts_prompt_start session_id skip_special_tokens
    spaces_between_special_tokens stop_token_ids stream_interval
    thinking_token_budget use_beam_search watermarking
""".split()
)
VLLM_CHAT = _VLLM_GENERATE | frozenset(
    """
    add_generation_prompt chat_template continue_final_message documents echo include_reasoning
    media_io_kwargs mm_processor_kwargs return_prompt_text
""".split()
)
VLLM_COMPLETION = _VLLM_GENERATE
VLLM_EMBEDDING = _VLLM_ANY | frozenset(
    """
    embed_dtype endianness mm_processor_kwargs padding use_activation
""".split()
)

CHAT = TypeAdapter(ChatRequest)
COMPLETION = TypeAdapter(CompletionRequest)
EMBEDDING = TypeAdapter(EmbeddingRequest)
