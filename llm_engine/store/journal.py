"""Every change of a record leaves an event, in the same transaction."""

import time

import sqlalchemy as sa

from llm_engine.store import tables


def note(connection: sa.Connection, subject: str, kind: str, message: str | None = None) -> None:
    connection.execute(
        tables.events.insert().values(subject=subject, at=time.time(), kind=kind, message=message)
    )
