"""Conversations: items in the order in which they were added, which responses read and add to."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import sqlalchemy as sa

from llm_engine.errors import Conflict, NotFound
from llm_engine.responses import Conversation, Item
from llm_engine.store import tables
from llm_engine.store.database import Database

table = tables.conversations.c
items = tables.conversation_items.c


class Placed(NamedTuple):
    """An item at its place in a conversation."""

    serial: int
    data: Item


class Conversations:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, record: Conversation, first: list[Item]) -> None:
        """`first`: items, each with an id. Raises Conflict where one is there twice."""
        with self._database.writing() as connection:
            connection.execute(tables.conversations.insert().values(asdict(record)))
            _check_new(connection, record.id, first)
            _insert(connection, record.id, first)

    def get(self, conversation: str) -> Conversation:
        """Raises NotFound."""
        with self._database.reading() as connection:
            return _one(connection, conversation)

    def change(self, conversation: str, metadata: dict[str, str]) -> Conversation:
        """Raises NotFound."""
        with self._database.writing() as connection:
            _one(connection, conversation)
            mine = tables.conversations.update().where(table.id == conversation)
            connection.execute(mine.values(metadata=metadata))
            return _one(connection, conversation)

    def delete(self, conversation: str) -> None:
        """With its items. Raises NotFound."""
        with self._database.writing() as connection:
            _one(connection, conversation, lock=True)  # no response adds to it meanwhile
            connection.execute(
                tables.conversation_items.delete().where(items.conversation == conversation)
            )
            connection.execute(tables.conversations.delete().where(table.id == conversation))

    def add_items(self, conversation: str, new: list[Item], most: int) -> list[Item]:
        """Raises NotFound; Conflict where an id is there already, or there were over `most`."""
        with self._database.writing() as connection:
            _one(connection, conversation, lock=True)
            counted = sa.select(sa.func.count()).where(items.conversation == conversation)
            if (connection.execute(counted).scalar() or 0) + len(new) > most:
                raise Conflict(
                    f"A conversation has at most {most} items "
                    "(responses.max_conversation_items). Begin another one.",
                    param="items",
                    code="conversation_full",
                    status=400,
                )
            _check_new(connection, conversation, new)
            _insert(connection, conversation, new)
        return new

    def items(
        self,
        conversation: str,
        *,
        limit: int,
        most_bytes: int,
        after: str | None = None,
        newest_first: bool = False,
        until: int | None = None,
    ) -> tuple[list[Placed], bool]:
        """As many as are no more than `limit` and, as JSON, no more than `most_bytes`, but at least
        one; and whether there are more. `until`: of those with no higher serial. Raises NotFound,
        also where there is no item `after`."""
        size = sa.func.length(sa.cast(items.data, sa.Text))
        wanted = sa.select(items.serial, size).where(items.conversation == conversation)
        wanted = wanted.order_by(items.serial.desc() if newest_first else items.serial)
        if until is not None:
            wanted = wanted.where(items.serial <= until)
        with self._database.reading() as connection:
            _one(connection, conversation)
            if after is not None:
                place = _item(connection, conversation, after).serial
                wanted = wanted.where(
                    items.serial < place if newest_first else items.serial > place
                )
            serials, more = _fitting(connection, wanted.limit(limit + 1), limit, most_bytes)
            if not serials:
                return [], False
            wanted = wanted.with_only_columns(items.serial, items.data)
            wanted = wanted.where(items.serial.between(min(serials), max(serials)))
            found = [Placed(*row) for row in connection.execute(wanted)]
        return found, more

    def item(self, conversation: str, item: str) -> Item:
        """Raises NotFound."""
        with self._database.reading() as connection:
            _one(connection, conversation)
            return _item(connection, conversation, item).data

    def delete_item(self, conversation: str, item: str) -> Conversation:
        """The conversation without it. Raises NotFound."""
        with self._database.writing() as connection:
            found = _one(connection, conversation)
            place = _item(connection, conversation, item)
            connection.execute(
                tables.conversation_items.delete().where(items.serial == place.serial)
            )
        return found


def _check_new(connection: sa.Connection, conversation: str, new: list[Item]) -> None:
    """What a client adds is added, all of it."""
    names = Counter(item["id"] for item in new)
    names.update(_known(connection, conversation, list(names)))
    for name, count in names.items():
        if count > 1:
            raise Conflict(
                f"The conversation would have two items with the id '{name}'. Leave the id out: "
                "each item then gets one of its own.",
                param="items",
                code="duplicate_item",
                status=400,
            )


def append(connection: sa.Connection, conversation: str, new: Iterable[Item]) -> None:
    """Those whose id is not there yet. Nothing where the conversation is gone."""
    wanted = sa.select(table.id).where(table.id == conversation).with_for_update()
    if connection.execute(wanted).one_or_none() is None:
        return
    by_id = {item["id"]: item for item in new}
    for known in _known(connection, conversation, list(by_id)):
        by_id.pop(known)
    _insert(connection, conversation, by_id.values())


def _insert(connection: sa.Connection, conversation: str, new: Iterable[Item]) -> None:
    rows = [{"conversation": conversation, "item": item["id"], "data": item} for item in new]
    if rows:
        connection.execute(tables.conversation_items.insert(), rows)


def _known(connection: sa.Connection, conversation: str, ids: list[str]) -> Sequence[str]:
    """Of these, those that are in the conversation."""
    there = sa.select(items.item).where(items.conversation == conversation, items.item.in_(ids))
    return connection.execute(there).scalars().all()


def _fitting(
    connection: sa.Connection, sizes: sa.Select[tuple[int, int]], limit: int, most_bytes: int
) -> tuple[list[int], bool]:
    """As `items`, by serial and size: nothing large is read only to be left out."""
    fitting: list[int] = []
    with connection.execute(sizes) as rows:
        for serial, size in rows:
            most_bytes -= size
            if len(fitting) == limit or (fitting and most_bytes < 0):
                return fitting, True
            fitting.append(serial)
    return fitting, False


def no_conversation(conversation: str) -> NotFound:
    return NotFound(
        f"Conversation with id '{conversation[:100]}' not found.", param="conversation_id"
    )


def _one(connection: sa.Connection, conversation: str, lock: bool = False) -> Conversation:
    if "\0" in conversation:  # PostgreSQL knows no such text
        raise no_conversation(conversation)
    wanted = sa.select(tables.conversations).where(table.id == conversation)
    row = connection.execute(wanted.with_for_update() if lock else wanted).one_or_none()
    if row is None:
        raise no_conversation(conversation)
    return Conversation(**row._mapping)


def _item(connection: sa.Connection, conversation: str, item: str) -> Any:
    row = None
    if "\0" not in item:
        wanted = sa.select(items.serial, items.data).where(
            items.conversation == conversation, items.item == item
        )
        row = connection.execute(wanted).one_or_none()
    if row is None:
        raise NotFound(f"Item with id '{item[:100]}' not found.", param="item_id")
    return row
