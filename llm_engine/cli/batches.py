"""`llm-engine batches`: one function a command. What they do is in the batch_*.py files here."""

from typing import Annotated

import typer

from llm_engine.cli.files import After, Force
from llm_engine.cli.options import ApiKey, Config, Json, Url, connect, hint

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run many requests at once, from a JSONL file to a file of results.",
    epilog="Example:  llm-engine batches create questions.jsonl --watch -o results.jsonl",
)

BatchId = Annotated[str, typer.Argument(metavar="ID", help="As `batches list` shows it.")]


@app.command(
    epilog="Examples:  llm-engine batches create questions.jsonl --watch -o results.jsonl\n\n"
    "llm-engine batches create file-0198c5f2a7b3c1d2 --window 7d --metadata team=search"
)
def create(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="JSON lines with custom_id, method, url and body; or the id of a file that the "
            "gateway has.",
        ),
    ],
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="/v1/chat/completions, ... Else the first line's url."),
    ] = None,
    window: Annotated[
        str,
        typer.Option(
            metavar="SPAN", help="When it must be done: 1h, 4h, 24h, 7d. What is not, expires."
        ),
    ] = "24h",
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="To find it again. Again for more."),
    ] = None,
    own_engines: Annotated[
        bool,
        typer.Option(
            "--own-engines", help="On engines that start for it alone, not the live replicas."
        ),
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch/--no-wait", help="Follow it to its end, or return at once.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Watch, and put the results there: a file or a folder; - is stdout. Rows that "
            "failed go beside it: results.jsonl, results.errors.jsonl.",
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Start a batch. A local FILE is looked at and uploaded first.

    Watched, exit code 0: it is completed, though some rows may have failed.

    1: it failed, expired or was cancelled. Ctrl-C stops only the watching.
    """
    from llm_engine.cli import batch_input, batch_results

    results = batch_results.Results(output, force, json, hint(url, config))
    labels = batch_input.parse_metadata(metadata or [])
    with connect(url, api_key, config) as gateway:
        row = batch_input.create(gateway, file, endpoint, window, labels, own_engines)
        if watch or output is not None:
            results.follow(gateway, row)
        else:
            results.accepted(row)


@app.command(name="list", epilog="Example:  llm-engine batches list --limit 5")
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
    """Show your batches, newest first."""
    from llm_engine.cli import batch_results
    from llm_engine.cli.client import list_path

    with connect(url, api_key, config) as gateway:
        page = gateway.get(list_path("batches", limit=limit, after=after))
        batch_results.show_all(gateway, page, json, hint(url, config))


@app.command(epilog="Example:  llm-engine batches get batch_0198c5f2a7b3c1d2 --watch")
def get(
    batch: BatchId,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Show all of a batch: how far it is, what it waits for, its errors, where its results are."""
    from llm_engine.cli import batch_results
    from llm_engine.cli.client import item_path

    with connect(url, api_key, config) as gateway:
        row = gateway.get(item_path("batches", batch))
        if watch:
            batch_results.Results(None, False, json, hint(url, config)).follow(gateway, row)
        else:
            batch_results.show_one(gateway, row, as_json=json, hint=hint(url, config))


@app.command(epilog="Example:  llm-engine batches cancel batch_0198c5f2a7b3c1d2")
def cancel(
    batch: BatchId,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Stop a batch. The rows that are done become its results."""
    from llm_engine.cli import console
    from llm_engine.cli.client import item_path

    with connect(url, api_key, config) as gateway:
        row = gateway.send("POST", item_path("batches", batch, "/cancel"))
    if json:
        return console.print_json(row)
    console.say(f"{row['id']} is {row['status']}; what is done of it is kept.")


@app.command(
    epilog="Examples:  llm-engine batches download batch_0198c5f2a7b3c1d2 -o results.jsonl\n\n"
    "llm-engine batches download batch_0198c5f2a7b3c1d2 --errors -o -"
)
def download(
    batch: BatchId,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A file or a folder; - is stdout. Else here, named after the batch.",
        ),
    ] = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="The rows that failed, in place of the others.")
    ] = False,
    force: Force = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Fetch the results of a batch that has ended: one JSON line a row, in the input's order."""
    from llm_engine.cli import batch_results
    from llm_engine.cli.client import item_path

    with connect(url, api_key, config) as gateway:
        row = gateway.get(item_path("batches", batch))
        where = hint(url, config)
        batch_results.fetch(gateway, row, output, errors=errors, force=force, hint=where)
