"""`llm-engine files`: one function a command. How bytes move is in transfer.py."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_engine.cli.options import ApiKey, Config, Json, Url, connect, hint, seconds_of
from llm_engine.errors import LLMEngineError

if TYPE_CHECKING:
    from llm_engine.cli.client import Gateway

Row = dict[str, Any]
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Keep files in the gateway's storage: inputs of batches, and their results.",
    epilog="Example:  llm-engine files upload questions.jsonl",
)

FileId = Annotated[str, typer.Argument(metavar="ID", help="As `files list` shows it.")]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="A file or a folder; - is stdout. Else here, under its own name.",
    ),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace a file that is there.")]
Limit = Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="So many, newest first.")]
After = Annotated[
    str | None, typer.Option(metavar="ID", help="Older ones than this: the next page.")
]


@app.command(epilog="Example:  llm-engine files upload questions.jsonl --expires 30d")
def upload(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Any size; it is read as it goes.")],
    purpose: Annotated[
        str,
        typer.Option(
            metavar="PURPOSE",
            help="batch, fine-tune, assistants, vision, user_data or evals.",
        ),
    ] = "batch",
    expires: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="Gone after 1h to 30d. Else as its purpose has it."),
    ] = None,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Bring a file to the gateway. Its id is stdout's last word."""
    from llm_engine.cli import console, transfer

    expires_s = parse_span(expires) if expires is not None else None
    with connect(url, api_key, config) as gateway:
        row = transfer.upload(gateway, file, purpose, expires_s)
    if json:
        return console.print_json(row)
    until = f", until {console.moment(row['expires_at'])}" if row.get("expires_at") else ""
    size = console.bytes_(row["bytes"])
    console.say(f"{row['filename']} ({size}) is kept{until}: {row['id']}")


@app.command(name="list", epilog="Example:  llm-engine files list --purpose batch_output")
def list_(
    purpose: Annotated[
        str | None, typer.Option(metavar="PURPOSE", help="Only those: batch, batch_output, ...")
    ] = None,
    limit: Limit = 100,
    after: After = None,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Show your files, newest first."""
    from llm_engine.cli.client import list_path

    with connect(url, api_key, config) as gateway:
        page = gateway.get(list_path("files", purpose=purpose, limit=limit, after=after))
        show_all(gateway, page, json, hint(url, config))


@app.command(epilog="Example:  llm-engine files get file-0198c5f2a7b3c1d2e3f4a5b6c7")
def get(
    file: FileId, json: Json = False, url: Url = None, api_key: ApiKey = None, config: Config = None
) -> None:
    """Show what is known of a file."""
    from llm_engine.cli import console
    from llm_engine.cli.client import item_path

    with connect(url, api_key, config) as gateway:
        row = gateway.get(item_path("files", file))
    if json:
        return console.print_json(row)
    facts = {
        "file": row["id"],
        "name": row["filename"],
        "purpose": row["purpose"],
        "size": f"{row['bytes']} bytes",
        "created": console.moment(row["created_at"]),
        "expires": console.moment(row.get("expires_at")) or "never",
    }
    console.console().print(console.facts(facts))


@app.command(
    epilog="Examples:  llm-engine files download file-0198c5f2a7b3c1d2 -o results.jsonl\n\n"
    "llm-engine files download file-0198c5f2a7b3c1d2 -o - | head"
)
def download(
    file: FileId,
    output: Output = None,
    force: Force = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Fetch a file's bytes."""
    from llm_engine.cli import console, transfer
    from llm_engine.cli.client import item_path

    with connect(url, api_key, config) as gateway:
        row = gateway.get(item_path("files", file))
        target = transfer.place(output, row["filename"], force=force)
        transfer.download(gateway, row, target)
    if target != transfer.STDOUT:
        console.say(f"{target} ({console.bytes_(row['bytes'])})")


@app.command(epilog="Example:  llm-engine files delete file-0198c5f2a7b3c1d2")
def delete(
    files: Annotated[
        list[str], typer.Argument(metavar="ID...", help="As `files list` shows them.")
    ],
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Forget files and their bytes for good. Exit code 1 if one of them could not be."""
    from llm_engine.cli import console
    from llm_engine.cli.client import Refused, item_path

    rows: list[Row] = []
    with connect(url, api_key, config) as gateway:
        for file in files:
            try:
                rows.append(gateway.send("DELETE", item_path("files", file)))
            except Refused as error:
                console.complain(str(error))
    if json:
        console.print_json(rows)
    else:
        for row in rows:
            console.say(f"{row['id']} is deleted.")
    raise typer.Exit(0 if len(rows) == len(files) else 1)


def parse_span(text: str) -> int:
    """Seconds."""
    span = seconds_of(text)
    if span is None:
        raise LLMEngineError(f"--expires takes a span of time (12h, 30d), not '{text}'.")
    return span


def show_all(gateway: "Gateway", page: Row, as_json: bool, hint: str) -> None:
    from llm_engine.cli import console

    rows = page["data"]
    if as_json:
        return console.print_json(rows)
    if not rows:
        return console.say(f"{gateway.url} keeps no such file of yours.")
    table = console.table(["id", "name", "purpose", "size", "created", "expires"])
    for row in rows:
        table.add_row(
            row["id"],
            console.plain(row["filename"]),
            row["purpose"],
            console.bytes_(row["bytes"]),
            console.moment(row["created_at"]),
            console.moment(row.get("expires_at")) or "never",
        )
    console.console().print(table)
    if page.get("has_more"):
        console.say(f"There are more: llm-engine files list --after {rows[-1]['id']}{hint}", "dim")
