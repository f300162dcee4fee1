"""`llm-engine endpoints`: one function a command. What they do is in endpoints.py and watch.py."""

from pathlib import Path
from typing import Annotated

import typer

from llm_engine.cli.options import ApiKey, Config, Json, Url, connect, hint
from llm_engine.errors import LLMEngineError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Create, change and delete endpoints while the gateway runs.",
    epilog="Example:  llm-engine endpoints create qwen --model Qwen/Qwen3-0.6B --watch",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="What clients put in `model`.")]
OptionalName = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="What clients put in `model`. Else the file's `name`."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A Hugging Face id, a folder of the nodes, builtin:chat, builtin:embed, or a "
        "fine-tuned model (ft:...).",
    ),
]
Task = Annotated[str | None, typer.Option(metavar="TASK", help="generate (text), or embed.")]
MinReplicas = Annotated[
    int | None, typer.Option(metavar="N", help="At least. 0: it sleeps while nobody asks.")
]
MaxReplicas = Annotated[int | None, typer.Option(metavar="N", help="At most.")]
TargetQueueDepth = Annotated[
    float | None,
    typer.Option(metavar="X", help="Requests in an engine that autoscaling aims at."),
]
MaxQueue = Annotated[
    int | None, typer.Option(metavar="N", help="Requests a replica holds; more get 429.")
]
NumGpus = Annotated[float | None, typer.Option(metavar="X", help="GPUs of a replica.")]
NumCpus = Annotated[float | None, typer.Option(metavar="X", help="Ray CPUs of a replica.")]
Fallback = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Answers when this one can't. An empty one: none."),
]
Private = Annotated[
    bool | None,
    typer.Option("--private/--public", help="For its owner only, or for whoever has a key."),
]
VllmArg = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="An argument of vLLM by its long name, its value as YAML: max_model_len=4096. "
        "Again for more; in an update null takes one away.",
    ),
]
Env = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="For the engine process. Not for secrets."),
]
File = Annotated[
    Path | None,
    typer.Option(
        "--file",
        "-f",
        metavar="FILE",
        help="YAML with keys as under `endpoints` of a configuration; - is stdin. Options win.",
    ),
]
Watch = Annotated[
    bool, typer.Option("--watch/--no-wait", help="Follow it to its end, or return at once.")
]


@app.command(
    epilog="Example:  llm-engine endpoints create qwen --model Qwen/Qwen3-0.6B "
    "--max-replicas 2 --vllm-arg max_model_len=4096 --watch"
)
def create(
    name: OptionalName = None,
    model: Model = None,
    task: Task = None,
    min_replicas: MinReplicas = None,
    max_replicas: MaxReplicas = None,
    target_queue_depth: TargetQueueDepth = None,
    max_queue: MaxQueue = None,
    num_gpus: NumGpus = None,
    num_cpus: NumCpus = None,
    fallback: Fallback = None,
    private: Private = None,
    vllm_arg: VllmArg = None,
    env: Env = None,
    file: File = None,
    watch: Watch = False,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Serve another model. Returns at once; with --watch when it is ready, or has failed (1)."""
    from llm_engine.cli import endpoints

    body = endpoints.wanted(
        file, vllm_arg or [], env or [], private, name=name, model=model, task=task,
        min_replicas=min_replicas, max_replicas=max_replicas,
        target_queue_depth=target_queue_depth, max_queue=max_queue, num_gpus=num_gpus,
        num_cpus=num_cpus, fallback=fallback,
    )  # fmt: skip
    for needed, how in (("name", "give a NAME"), ("model", "give --model")):
        if needed not in body:
            raise LLMEngineError(f"the endpoint's {needed} is missing: {how}, or --file with it.")
    with connect(url, api_key, config) as gateway:
        show = endpoints.Shown(gateway, json, hint(url, config))
        show.change(gateway.send("POST", "/v1/endpoints", body), watch=watch)


@app.command(name="list", epilog="Example:  llm-engine endpoints list --json")
def list_(
    json: Json = False, url: Url = None, api_key: ApiKey = None, config: Config = None
) -> None:
    """Show each endpoint's state, replicas and owner, and why it is not ready."""
    from llm_engine.cli import endpoints

    with connect(url, api_key, config) as gateway:
        endpoints.show_all(gateway, as_json=json)


@app.command(epilog="Example:  llm-engine endpoints get qwen")
def get(
    name: Name, json: Json = False, url: Url = None, api_key: ApiKey = None, config: Config = None
) -> None:
    """Show all of one endpoint: state, phases, replicas, load, settings, last events."""
    from llm_engine.cli import endpoints

    with connect(url, api_key, config) as gateway:
        endpoints.show_one(gateway, name, as_json=json)


@app.command(
    epilog="Example:  llm-engine endpoints update qwen --vllm-arg max_model_len=8192 --watch"
)
def update(
    name: Name,
    model: Model = None,
    task: Task = None,
    min_replicas: MinReplicas = None,
    max_replicas: MaxReplicas = None,
    target_queue_depth: TargetQueueDepth = None,
    max_queue: MaxQueue = None,
    num_gpus: NumGpus = None,
    num_cpus: NumCpus = None,
    fallback: Fallback = None,
    private: Private = None,
    vllm_arg: VllmArg = None,
    env: Env = None,
    file: File = None,
    watch: Watch = False,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Change what is given and leave the rest. In a file, null takes a setting away.

    An earlier version serves on until the new one has answered.
    """
    from llm_engine.cli import endpoints
    from llm_engine.cli.client import endpoint_path

    body = endpoints.wanted(
        file, vllm_arg or [], env or [], private, model=model, task=task,
        min_replicas=min_replicas, max_replicas=max_replicas,
        target_queue_depth=target_queue_depth, max_queue=max_queue, num_gpus=num_gpus,
        num_cpus=num_cpus, fallback=fallback,
    )  # fmt: skip
    if not body:
        raise LLMEngineError("nothing is to change: give an option, or --file.")
    with connect(url, api_key, config) as gateway:
        show = endpoints.Shown(gateway, json, hint(url, config))
        show.change(gateway.send("PATCH", endpoint_path(name), body), watch=watch)


@app.command(
    epilog="Examples:  llm-engine endpoints scale qwen 2\n\n"
    "llm-engine endpoints scale qwen --min 0 --max 4"
)
def scale(
    name: Name,
    replicas: Annotated[
        int | None, typer.Argument(metavar="N", help="So many, neither less nor more.")
    ] = None,
    least: Annotated[
        int | None, typer.Option("--min", metavar="A", help="At least. 0: it may sleep.")
    ] = None,
    most: Annotated[int | None, typer.Option("--max", metavar="B", help="At most.")] = None,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Change how many replicas there are. Running ones are not restarted."""
    from llm_engine.cli import endpoints
    from llm_engine.cli.client import endpoint_path

    body = {"autoscaling": endpoints.replica_range(replicas, least, most)}
    with connect(url, api_key, config) as gateway:
        show = endpoints.Shown(gateway, json, hint(url, config))
        show.scaled(gateway.send("PATCH", endpoint_path(name), body))


@app.command(epilog="Example:  llm-engine endpoints delete qwen --yes --watch")
def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    watch: Watch = False,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Stop an endpoint, once its replicas have finished what they have, and forget it."""
    from llm_engine.cli import endpoints
    from llm_engine.cli.client import endpoint_path

    if not yes:
        endpoints.confirm_delete(name)
    with connect(url, api_key, config) as gateway:
        show = endpoints.Shown(gateway, json, hint(url, config))
        row = gateway.send("DELETE", endpoint_path(name))
        show.change(row, watch=watch, deleting=True)


@app.command(epilog="Example:  llm-engine endpoints watch qwen")
def watch(name: Name, url: Url = None, api_key: ApiKey = None, config: Config = None) -> None:
    """Follow a start, an update or a delete, phase by phase, to its end.

    Exit code 0: it is ready, or gone as was asked. 1: it failed. Ctrl-C stops only the watching.
    """
    from llm_engine.cli import watch as watching

    with connect(url, api_key, config) as gateway:
        watching.follow(gateway, name, hint=hint(url, config))
