"""`llm-engine fine-tunes`: one function a command. What they do is in the fine_tune_*.py files."""

from typing import Annotated

import typer

from llm_engine.cli.files import After
from llm_engine.cli.options import ApiKey, Config, Json, Url, connect, hint

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a model on your examples, from a file to a model that is served.",
    epilog="Example:  llm-engine fine-tunes create examples.jsonl --model demo-chat --watch",
)

JobId = Annotated[str, typer.Argument(metavar="ID", help="As `fine-tunes list` shows it.")]
_DETAILS = "Details"


@app.command(
    epilog="Examples:  llm-engine fine-tunes create examples.jsonl --suffix support --watch\n\n"
    "llm-engine fine-tunes create pairs.jsonl --method dpo --model demo-chat --epochs 3"
)
def create(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="JSON lines with messages, or with prompt and completion; a CSV with prompt and "
            "response; or the id of a file that the gateway has.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="The base, or a fine-tuned model to go on from. Else the first endpoint that can "
            "chat.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="METHOD", help="supervised, or dpo: each example has a better and a worse one."
        ),
    ] = "supervised",
    validation: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Examples that are measured and not trained on."),
    ] = None,
    suffix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Becomes part of the new model's name.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Times that all examples are seen.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Examples of a step.", rich_help_panel=_DETAILS),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Else as the model's size has it.", rich_help_panel=_DETAILS
        ),
    ] = None,
    learning_rate_multiplier: Annotated[
        float | None,
        typer.Option(metavar="X", help="So many times that rate.", rich_help_panel=_DETAILS),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Of dpo: how close it stays to the base.", rich_help_panel=_DETAILS
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other hyperparameter: lora_rank=8. Again for more.",
            rich_help_panel=_DETAILS,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="The same gives the same model.", rich_help_panel=_DETAILS
        ),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="To find it again. Again for more.", rich_help_panel=_DETAILS
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch/--no-wait", help="Follow it to its end, or return at once.")
    ] = False,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Start a fine-tune. Local files are looked at and uploaded first.

    Watched, exit code 0: the new model answers. 1: it failed or was cancelled.

    Ctrl-C stops only the watching.
    """
    from llm_engine.cli import batch_input, chat, fine_tune_input, fine_tune_results

    named = {
        "n_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "learning_rate_multiplier": learning_rate_multiplier,
        "beta": beta,
    }
    numbers = fine_tune_input.numbers_of(method, named, sets or [])
    labels = batch_input.parse_metadata(metadata or [])
    with connect(url, api_key, config) as gateway:
        fields = {
            "model": model or chat.pick_model(gateway),
            "suffix": suffix,
            "seed": seed,
            "metadata": labels or None,
        }
        row = fine_tune_input.create(gateway, file, validation, method, numbers, fields)
        if watch:
            fine_tune_results.follow(gateway, row, json, hint(url, config))
        else:
            fine_tune_results.accepted(row, json, hint(url, config))


@app.command(name="list", epilog="Example:  llm-engine fine-tunes list --limit 5")
def list_(
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, max=100, help="So many, newest first.")
    ] = 20,
    after: After = None,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Show your fine-tunes, newest first."""
    from llm_engine.cli import fine_tune_results
    from llm_engine.cli.client import list_path
    from llm_engine.cli.fine_tune_watch import JOBS

    with connect(url, api_key, config) as gateway:
        page = gateway.get(list_path(JOBS, limit=limit, after=after))
        fine_tune_results.show_all(gateway, page, json, hint(url, config))


@app.command(epilog="Example:  llm-engine fine-tunes get ftjob-0198c5f2a7b3c1d2 --watch")
def get(
    job: JobId,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Show all of a fine-tune: how far it is, what it waits for, its numbers, its checkpoints."""
    from llm_engine.cli import fine_tune_results
    from llm_engine.cli.client import item_path
    from llm_engine.cli.fine_tune_watch import JOBS

    with connect(url, api_key, config) as gateway:
        row = gateway.get(item_path(JOBS, job))
        if watch:
            fine_tune_results.follow(gateway, row, json, hint(url, config))
        else:
            fine_tune_results.show_one(gateway, row, json, hint(url, config))


@app.command(epilog="Example:  llm-engine fine-tunes events ftjob-0198c5f2a7b3c1d2")
def events(
    job: JobId,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, max=1000, help="So many, the newest.")
    ] = 50,
    after: Annotated[
        str | None, typer.Option(metavar="ID", help="Earlier ones than this event.")
    ] = None,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Show what a fine-tune has told, the newest last."""
    from llm_engine.cli import fine_tune_results
    from llm_engine.cli.client import item_path, query
    from llm_engine.cli.fine_tune_watch import JOBS

    with connect(url, api_key, config) as gateway:
        page = gateway.get(item_path(JOBS, job, "/events") + query(limit=limit, after=after))
    fine_tune_results.show_events(page, json, hint(url, config))


@app.command(epilog="Example:  llm-engine fine-tunes cancel ftjob-0198c5f2a7b3c1d2")
def cancel(
    job: JobId, json: Json = False, url: Url = None, api_key: ApiKey = None, config: Config = None
) -> None:
    """Stop a fine-tune for good. Checkpoints that it has made stay models."""
    _change(job, "cancel", json, url, api_key, config)


@app.command(epilog="Example:  llm-engine fine-tunes pause ftjob-0198c5f2a7b3c1d2")
def pause(
    job: JobId, json: Json = False, url: Url = None, api_key: ApiKey = None, config: Config = None
) -> None:
    """Let a fine-tune rest: it keeps a checkpoint, and gives its place to others."""
    _change(job, "pause", json, url, api_key, config)


@app.command(epilog="Example:  llm-engine fine-tunes resume ftjob-0198c5f2a7b3c1d2")
def resume(
    job: JobId, json: Json = False, url: Url = None, api_key: ApiKey = None, config: Config = None
) -> None:
    """Let a fine-tune that rests go on from its last checkpoint."""
    _change(job, "resume", json, url, api_key, config)


@app.command(epilog="Example:  llm-engine fine-tunes delete ft:demo-chat:ann:support:0198c5f2")
def delete(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A fine-tuned model or a checkpoint; or the ID of its fine-tune."
        ),
    ],
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Forget the model that a fine-tune has made, and its weights. The fine-tune stays listed."""
    from llm_engine.cli import console, fine_tune_results
    from llm_engine.cli.client import item_path

    with connect(url, api_key, config) as gateway:
        name = fine_tune_results.model_of(gateway, model)
        row = gateway.send("DELETE", item_path("models", name))
    if json:
        return console.print_json(row)
    console.say(f"{name} is deleted.")


def _change(job: str, word: str, json: bool, url: Url, api_key: ApiKey, config: Config) -> None:
    from llm_engine.cli import console
    from llm_engine.cli.client import item_path
    from llm_engine.cli.fine_tune_watch import JOBS

    with connect(url, api_key, config) as gateway:
        row = gateway.send("POST", item_path(JOBS, job, f"/{word}"))
    if json:
        return console.print_json(row)
    console.say(f"{row['id']} is {row['status'].replace('_', ' ')}.")
