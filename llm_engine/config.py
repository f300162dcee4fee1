"""Settings: one YAML file, one frozen object. Every default of the system is written here, once;
those of rows, bytes and batches in `config_data`.

Knows nothing of Ray or vLLM: `vllm_args` goes to vLLM as it stands and vLLM judges it.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator

from llm_engine.config_data import (
    ENV_SECRET,
    ENV_STORAGE,
    ENV_STORE,
    MASK,
    BatchSettings,
    FileSettings,
    FineTuneSettings,
    ResponseSettings,
    Section,
    StorageSettings,
    StoreSettings,
)
from llm_engine.errors import ConfigError

#: Models that come with llm-engine: usable as `model: builtin:<name>` with no network.
BUILTIN = {
    "chat": Path(__file__).parent / "demo" / "chat",
    "embed": Path(__file__).parent / "demo" / "embed",
}
DEMO_ADAPTERS = 4
#: A model that is a base with an adapter worked into its weights: its id follows.
MERGED = "merged:"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENV_KEYS = "LLM_ENGINE_API_KEYS"
ENV_KEY = "LLM_ENGINE_API_KEY"  # a client's
#: What engines and trainers have no business with: a model's code may be anybody's.
SECRETS = (ENV_KEY, ENV_KEYS, ENV_STORE, ENV_SECRET)
ENV_CONFIG = "LLM_ENGINE_CONFIG"


class GatewaySettings(Section):
    """The one address that clients use."""

    host: str = Field(
        "127.0.0.1",
        description="Where HTTP listens. Anything but loopback needs an API key.",
    )
    port: int = Field(8000, ge=1, le=65535, description="Where HTTP listens.")
    api_keys: tuple[SecretStr, ...] = Field(
        (),
        description=f"Bearer keys; {ENV_KEYS} (comma-separated) adds to them. None: no key asked.",
    )
    max_body_bytes: int = Field(
        16 * 2**20, ge=1024, description="Larger requests to a model get 413. Bytes."
    )
    request_timeout_s: float = Field(
        600, gt=0, description="Longest wait for the first byte of an answer. Seconds."
    )
    idle_timeout_s: float = Field(
        120, gt=0, description="Longest silence within a stream before it is ended. Seconds."
    )
    retry_after_s: int = Field(5, ge=1, description="What 429 and 503 answers advise. Seconds.")
    max_in_flight: int = Field(
        2048, ge=1, description="Requests one ingress replica carries; more get 429."
    )
    min_replicas: int = Field(1, ge=1, description="Ingress replicas, at least.")
    max_replicas: int = Field(4, ge=1, description="Ingress replicas, at most.")
    target_in_flight: int = Field(
        128, ge=1, description="Requests in flight per ingress replica that autoscaling aims at."
    )
    allowed_upstreams: tuple[str, ...] = Field(
        (),
        description="Hosts (*.corp.example), addresses or networks (10.1.0.0/16) of a private "
        "network that external models may lie in. Public ones always may.",
    )
    resources_timeout_s: float = Field(
        10,
        ge=0,
        description="How long an endpoint may wait for GPUs or CPUs that the cluster hasn't got "
        "before it counts as failed. Where nodes come by autoscaling: longer than they take.",
    )
    num_cpus: float = Field(0.1, ge=0, description="Ray CPUs an ingress replica reserves.")
    drain_timeout_s: float = Field(
        300, ge=0, description="Longest wait for running answers when an ingress stops. Seconds."
    )

    @field_validator("api_keys")
    @classmethod
    def _real_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(key.get_secret_value() in ("", MASK) for key in keys):
            raise ValueError("an empty or masked key is no key; put the real one")
        return keys

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK


class AutoscalingSettings(Section):
    min_replicas: int = Field(
        1, ge=0, description="Engine replicas, at least. 0: none while nobody asks."
    )
    max_replicas: int = Field(1, ge=1, le=1000, description="Engine replicas, at most.")
    target_queue_depth: float = Field(
        16, gt=0, description="Requests running and waiting in an engine that autoscaling aims at."
    )
    upscale_delay_s: float = Field(
        5, ge=0, description="How long queues must be longer before replicas are added. Seconds."
    )
    downscale_delay_s: float = Field(
        120, ge=0, description="How long they must be shorter before replicas go. Seconds."
    )
    idle_delay_s: float = Field(
        300,
        ge=0,
        description="With min_replicas 0: how long without a request until the last "
        "replica goes. Seconds.",
    )
    wake_timeout_s: float = Field(
        300,
        gt=0,
        description="With min_replicas 0: how long a request is held while the first "
        "replica starts. Then 503. Seconds.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})"
            )
        return self


class EndpointSettings(Section):
    """One model being served."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,199}$",
        description="What clients put in `model`.",
    )
    model: str = Field(
        min_length=1,
        description="builtin:chat, builtin:embed, a folder, or a Hugging Face id. With `endpoints "
        "create` also a fine-tuned model (ft:...), which is worked into the weights of its base.",
    )
    task: Literal["generate", "embed"] = Field(
        "generate", description="`generate` text, or `embed` it as vectors."
    )
    engine: Literal["vllm", "fake"] = Field(
        "vllm", description="`fake` has no weights: it is for overhead measurements and tests."
    )
    vllm_args: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM's own engine and server arguments, by long name: {max_model_len: 4096}.",
    )
    env: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables of the engine process. Not for secrets (HF_TOKEN): Ray "
        "Serve shows them to operators; put those into the nodes' environment, which engines get.",
    )
    fallback: str | None = Field(
        None,
        max_length=200,
        description="The model that answers when this one can't, before the first byte.",
    )
    public: bool = Field(True, description="Whoever has a key may use it; else only its owner.")
    autoscaling: AutoscalingSettings = Field(
        AutoscalingSettings(), description="How many replicas, by the engines' own queues."
    )
    max_queue: int = Field(
        256, ge=1, description="Requests a replica holds, running and waiting; more get 429."
    )
    max_adapters: int | None = Field(
        None,
        ge=0,
        le=128,
        description="Adapters (LoRA) that a replica computes with at a time; where more are asked "
        "for, they take turns. 0: none. Unset: 4 for builtin:chat, else 0.",
    )
    max_adapter_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(
        16, description="Largest rank of an adapter; memory is taken for it, whatever they have."
    )
    num_gpus: float | None = Field(
        None, ge=0, description="Per replica. Unset: tensor_parallel_size on GPU nodes, else 0."
    )
    num_cpus: float = Field(0.5, gt=0, description="Ray CPUs a replica reserves.")
    max_surge_percent: int = Field(
        100,
        ge=0,
        le=100,
        description="New replicas that start before old ones stop in an update. 0 where no "
        "spare GPUs are: the endpoint is then away while it changes.",
    )
    start_timeout_s: float = Field(
        1800, gt=0, description="Longest wait for an engine to load and answer. Seconds."
    )
    drain_timeout_s: float = Field(
        300, ge=0, description="Longest wait for running requests when a replica stops. Seconds."
    )

    @property
    def tensor_parallel_size(self) -> int:
        return int(self.vllm_args.get("tensor_parallel_size", 1))

    @property
    def adapter_slots(self) -> int:
        if self.max_adapters is None:
            return DEMO_ADAPTERS if self.model == "builtin:chat" else 0
        return self.max_adapters

    @property
    def priorities(self) -> bool:
        """Whether its engines heed the `priority` of a request."""
        policy = self.vllm_args.get("scheduling_policy", "priority")
        return self.engine == "vllm" and self.task == "generate" and policy == "priority"

    @field_validator("vllm_args")
    @classmethod
    def _long_names(cls, args: dict[str, Any]) -> dict[str, Any]:
        ours = dict.fromkeys(("host", "port", "uds", "api_key", "middleware"), "") | {
            "model": "model",
            "served_model_name": "name",
            "max_num_queued_reqs": "max_queue",
            "enable_lora": "max_adapters",
            "max_loras": "max_adapters",
            "max_cpu_loras": "max_adapters",
            "max_lora_rank": "max_adapter_rank",
            "lora_modules": "",
        }
        clean = {key.replace("-", "_"): value for key, value in args.items()}
        for key in ours.keys() & clean.keys():
            instead = f"; set `{ours[key]}` of the endpoint" if ours[key] else ""
            raise ValueError(f"'{key}' is set by llm-engine{instead}")
        ranks = clean.get("tensor_parallel_size", 1)
        if type(ranks) is not int or ranks < 1:
            raise ValueError(f"tensor_parallel_size must be a whole number from 1, not {ranks!r}")
        return clean

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError("a name's parts between '/' must not be empty, '.' or '..'")
        if name.endswith("/events"):
            raise ValueError("'/events' at the end is the path of an endpoint's events")
        return name

    @model_validator(mode="after")
    def _adapters_of_what_generates(self) -> Self:
        if self.max_adapters and self.task != "generate":
            raise ValueError("max_adapters is for endpoints that generate")
        if self.max_adapters and self.model.startswith(MERGED):
            raise ValueError("max_adapters is for base models: fine-tunes are made of those")
        return self

    @model_validator(mode="after")
    def _not_its_own_fallback(self) -> Self:
        if self.fallback == self.name:
            raise ValueError(f"'{self.name}' cannot be its own fallback")
        return self

    @model_validator(mode="after")
    def _known_builtin(self) -> Self:
        kind, _, name = self.model.partition(":")
        if kind == "builtin" and name not in BUILTIN:
            raise ValueError(
                f"no built-in model '{name}'; "
                f"there are {', '.join(f'builtin:{known}' for known in BUILTIN)}"
            )
        return self


class ClusterSettings(Section):
    """The Ray that `llm-engine up` starts; for any other only `state_dir` counts."""

    state_dir: Path = Field(
        Path("~/.llm-engine"),
        description="Ray's files, logs, the token and the pid file; the "
        "store and the files, where they have no URL.",
    )
    num_cpus: int | None = Field(
        None, ge=1, description="Ray's logical CPUs. Unset: the machine's, and at least 4."
    )
    object_store_bytes: int = Field(
        100 * 2**20, ge=75 * 2**20, description="Ray's shared memory; tokens never go there. Bytes."
    )
    ray_port: int = Field(6379, ge=0, le=65535, description="Ray's own; 0 picks a free one.")
    dashboard_port: int = Field(8265, ge=1, le=65535, description="Ray's dashboard.")
    dashboard_agent_port: int = Field(
        0, ge=0, le=65535, description="0 picks a free one: two Rays on a host must not share it."
    )

    @field_validator("state_dir")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().absolute()


class Settings(Section):
    gateway: GatewaySettings = GatewaySettings()
    endpoints: tuple[EndpointSettings, ...] = (
        EndpointSettings(name="demo-chat", model="builtin:chat"),
        EndpointSettings(name="demo-embed", model="builtin:embed", task="embed"),
    )
    cluster: ClusterSettings = ClusterSettings()
    store: StoreSettings = StoreSettings()
    storage: StorageSettings = StorageSettings()
    files: FileSettings = FileSettings()
    batches: BatchSettings = BatchSettings()
    fine_tunes: FineTuneSettings = FineTuneSettings()
    responses: ResponseSettings = ResponseSettings()

    @property
    def storage_url(self) -> str:
        """s3://... or a folder's absolute path."""
        url = self.storage.url or str(self.cluster.state_dir / "storage")
        return url if url.startswith("s3://") else str(Path(url).expanduser().absolute())

    @property
    def cache_dir(self) -> Path:
        """Of this node."""
        return (self.storage.cache_dir or self.cluster.state_dir / "cache").expanduser().absolute()

    @property
    def store_url(self) -> str:
        return self.store.url or f"sqlite:///{self.cluster.state_dir}/llm-engine.db"

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        names = [endpoint.name for endpoint in self.endpoints]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two endpoints are named '{name}'; names must differ")
        for each in self.endpoints:
            if each.model.startswith("ft:"):  # whose weights only the store knows
                raise ValueError(
                    f"endpoint '{each.name}' cannot be declared with a fine-tuned model; once all "
                    f"runs: llm-engine endpoints create {each.name} --model {each.model}"
                )
        return self

    def check_exposure(self) -> None:
        """Refuse to listen beyond loopback without a key; raises ConfigError."""
        if not self.gateway.is_loopback and not self.gateway.api_keys:
            raise ConfigError(
                f"gateway.host is {self.gateway.host}, which other machines can reach, and there "
                f"is no API key. Set gateway.api_keys or {ENV_KEYS}, or listen on 127.0.0.1."
            )


def load(path: Path | str | None = None, environ: dict[str, str] | None = None) -> Settings:
    """Settings from a YAML file, or the defaults where `path` is None.

    Keys in the environment are added. Raises ConfigError with every mistake and its path.
    """
    environ = dict(os.environ) if environ is None else environ
    raw: Any = {}
    if path is not None:
        try:
            raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
    return parse(raw or {}, environ, where=str(path or "configuration"))


def parse(raw: Any, environ: dict[str, str], where: str = "configuration") -> Settings:
    """Settings from what YAML or JSON gave; see `load`."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a mapping at the top, got {type(raw).__name__}")
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(dict(item)) for item in error.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None
    extra = [key.strip() for key in environ.get(ENV_KEYS, "").split(",") if key.strip()]
    if extra:
        known = [key.get_secret_value() for key in settings.gateway.api_keys]
        keys = tuple(SecretStr(key) for key in dict.fromkeys([*known, *extra]))
        gateway = settings.gateway.model_copy(update={"api_keys": keys})
        settings = settings.model_copy(update={"gateway": gateway})
    told = {"url": environ.get(ENV_STORE), "secret_key": environ.get(ENV_SECRET)}
    if any(told.values()):
        told["secret_key"] = SecretStr(told["secret_key"]) if told["secret_key"] else None
        given = {key: value for key, value in told.items() if value}
        store = settings.store.model_copy(update=given)
        settings = settings.model_copy(update={"store": store})
    if environ.get(ENV_STORAGE):
        storage = settings.storage.model_copy(update={"url": environ[ENV_STORAGE]})
        settings = settings.model_copy(update={"storage": storage})
    return settings


def dump(settings: Settings, *, reveal: bool = False) -> dict[str, Any]:
    """Plain data that `parse` reads back; keys are masked unless `reveal`."""
    data = settings.model_dump(mode="json")
    data["gateway"]["api_keys"] = [
        key.get_secret_value() if reveal else MASK for key in settings.gateway.api_keys
    ]
    secret, url = settings.store.secret_key, settings.store.url
    if secret is not None:
        data["store"]["secret_key"] = secret.get_secret_value() if reveal else MASK
    if url is not None and not reveal:
        url = re.sub(r"(://[^:/@]*):.*@", rf"\1:{MASK}@", url)
        data["store"]["url"] = re.sub(r"([?&]password=)[^&]*", rf"\1{MASK}", url)
    if not reveal:
        for endpoint in data["endpoints"]:
            endpoint["env"] = dict.fromkeys(endpoint["env"], MASK)
    return data


def _explain(item: dict[str, Any]) -> str:
    path = ""
    for part in item["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), _names_at(item["loc"][:-1]), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"unknown key '{path}'{hint}"
    message = item["msg"].removeprefix("Value error, ")
    given = item.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{path}: {message}{shown}" if path else message


def _names_at(location: tuple[Any, ...]) -> list[str]:
    """The valid keys of the section that an error's location points into."""
    section: Any = Settings
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        arguments = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)]
        section = next((a for a in [annotation, *arguments] if _is_section(a)), None)
        if section is None:
            return []
    return list(section.model_fields)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
