"""`status` and `models`: what a gateway says of itself, as tables."""

from llm_engine.cli import console
from llm_engine.cli.client import Gateway


def show_status(gateway: Gateway, *, as_json: bool) -> None:
    health, rows = gateway.get("/health"), gateway.rows("/v1/endpoints")
    if as_json:
        return console.print_json({"address": gateway.url, "health": health, "endpoints": rows})
    out = console.console()
    ready = sum(row["status"] == "READY" for row in rows)
    style = "green" if health.get("status") == "healthy" else "yellow"
    out.print(f"{gateway.url} is {health.get('status')}: {ready} of {len(rows)} endpoints ready",
              style=style, soft_wrap=True)  # fmt: skip
    if not rows:
        return
    table = console.table(
        ["endpoint", "state", "replicas", "running", "waiting", "context", "model", "reason"]
    )
    for row in rows:
        loads = [replica.get("load") or {} for replica in row.get("replicas", [])]
        table.add_row(
            row["id"],
            console.coloured(row["status"]),
            f"{row['replicas_ready']}/{row['replicas_wanted']}",
            str(sum(load.get("running", 0) for load in loads)),
            str(sum(load.get("waiting", 0) for load in loads)),
            str(row["max_model_len"] or "-"),
            row["model"],
            row["status_reason"] or "",
        )
    out.print(table)


def show_models(gateway: Gateway, *, as_json: bool) -> None:
    rows = gateway.rows("/v1/models")
    if as_json:
        return console.print_json(rows)
    if not rows:
        return console.say(f"{gateway.url} serves no model.")
    table = console.table(["model", "state", "context", "owned by"])
    for row in rows:
        table.add_row(
            row["id"],
            console.coloured(row.get("status") or "-"),
            str(row.get("max_model_len") or "-"),
            row.get("owned_by") or "-",
        )
    console.console().print(table)
