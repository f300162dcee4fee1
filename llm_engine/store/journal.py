"""What has become of keys, endpoints, models, batches and fine-tunes: an event for each step, in
the same transaction."""

import time

import sqlalchemy as sa

from llm_engine.store import tables

MOST_EVENTS = 500  # of one record; the oldest go


def note(connection: sa.Connection, subject: str, kind: str, message: str | None = None) -> None:
    connection.execute(
        tables.events.insert().values(subject=subject, at=time.time(), kind=kind, message=message)
    )
    events = tables.events.c
    oldest_kept = (
        sa.select(events.id)
        .where(events.subject == subject)
        .order_by(events.id.desc())
        .offset(MOST_EVENTS)
        .limit(1)
        .scalar_subquery()
    )
    connection.execute(
        tables.events.delete().where(events.subject == subject, events.id <= oldest_kept)
    )
