"""`llm-engine keys`: API keys that the gateway keeps. A key itself is told once and never again."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_engine.cli.options import ApiKey, Config, Json, Url, connect, seconds_of
from llm_engine.errors import LLMEngineError

if TYPE_CHECKING:
    from llm_engine.cli.client import Gateway

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Create and revoke API keys. Needs a key with the scope `admin`.",
    epilog="Example:  llm-engine keys create --owner alice --expires 30d",
)


@app.command(
    epilog="Example:  KEY=$(llm-engine keys create --owner alice --scope inference "
    "--expires 30d --quiet)"
)
def create(
    owner: Annotated[
        str, typer.Option(metavar="OWNER", help="Whose it is: owners see what is theirs.")
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="To tell it from others.")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCOPE",
            help="inference (the default), files (with batches and fine-tunes), models, endpoints, "
            "metrics, or admin: all of it. Again for more.",
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN", help="30d, 12h, or a date: 2027-01-01 (0:00 UTC). Unset: never."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the key.")] = False,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Make a key. It is shown now and never again; it is stdout's last line."""
    import time

    given = {
        "owner": owner,
        "name": name,
        "scopes": scope or None,
        "expires_at": parse_expiry(expires, time.time()) if expires is not None else None,
    }
    body = {key: value for key, value in given.items() if value is not None}
    with connect(url, api_key, config) as gateway:
        show_new(gateway.send("POST", "/v1/keys", body), quiet=quiet, as_json=json)


@app.command(name="list", epilog="Example:  llm-engine keys list --json")
def list_(
    json: Json = False, url: Url = None, api_key: ApiKey = None, config: Config = None
) -> None:
    """Show every key but its secret: whose it is, what it may do, whether it is good."""
    with connect(url, api_key, config) as gateway:
        show_all(gateway, as_json=json)


@app.command(epilog="Example:  llm-engine keys revoke key_0198c5f2a7b3c1d2e3f4a5b6c7")
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")],
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """End a key for good. Whoever uses it gets 401."""
    from urllib.parse import quote

    from llm_engine.cli import console

    with connect(url, api_key, config) as gateway:
        row = gateway.send("DELETE", f"/v1/keys/{quote(key, safe='')}")
    if json:
        return console.print_json(row)
    console.say(f"{row['id']} ({row['prefix']}…, of {row['owner']}) is revoked.")


def parse_expiry(text: str, now: float) -> float:
    """Unix seconds. A date begins at 0:00 UTC; a time without a zone is UTC, too."""
    text = text.strip()
    if (span := seconds_of(text)) is not None:
        return now + span
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise LLMEngineError(
            f"--expires takes a time from now (45m, 12h, 30d, 8w) or a date (2027-01-01), "
            f"not '{text}'."
        ) from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def state(row: dict[str, Any], now: float) -> str:
    if row["revoked_at"] is not None:
        return "revoked"
    expired = row["expires_at"] is not None and row["expires_at"] <= now
    return "expired" if expired else "active"


def show_new(row: dict[str, Any], *, quiet: bool, as_json: bool) -> None:
    from llm_engine.cli import console

    if as_json:
        return console.print_json(row)
    if not quiet:
        until = console.moment(row["expires_at"]) or "it is revoked"
        console.say(f"{row['id']} of {row['owner']}: {', '.join(row['scopes'])}, until {until}.")
        console.say("This key is shown only now; keep it safe.", "yellow", stderr=True)
    print(row["key"])


def show_all(gateway: "Gateway", *, as_json: bool) -> None:
    import time

    from llm_engine.cli import console

    rows = gateway.rows("/v1/keys")
    now = time.time() + gateway.skew_s
    if as_json:
        return console.print_json([row | {"state": state(row, now)} for row in rows])
    if not rows:
        return console.say(f"{gateway.url} keeps no key. `llm-engine keys create` makes one.")
    table = console.table(["id", "owner", "name", "key", "scopes", "created", "expires", "state"])
    for row in rows:
        table.add_row(
            row["id"],
            row["owner"],
            console.plain(row["name"]),
            f"{row['prefix']}…",
            ", ".join(row["scopes"]),
            console.moment(row["created_at"]),
            console.moment(row["expires_at"]) or "never",
            console.coloured(state(row, now)),
        )
    console.console().print(table)
