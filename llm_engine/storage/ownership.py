"""Whose a storage is: one store's, whose records name what lies in it.

    store    the identity of the store, written by the first platform that cleans up there

What no record names is deleted after a while. Seen from a second store, from an empty one, or from
another platform's, that would be everything.
"""

from llm_engine.errors import StoreUnavailable
from llm_engine.storage.base import NoSuchObject, Storage

KEY = "store"


def claim(storage: Storage, store: str | None) -> str | None:
    """None where it is this store's, from now on at the latest; else the other one's identity.

    `store`: what Database.identity tells. Raises StoreUnavailable where that is nothing yet, and
    StorageUnavailable.
    """
    if store is None:
        raise StoreUnavailable("The store has no tables yet.")
    if storage.create(KEY, store.encode()):
        return None
    found = owner(storage)
    return None if found == store else found


def owner(storage: Storage) -> str | None:
    """The identity of the store; None: nobody has claimed it. Raises StorageUnavailable."""
    try:
        return b"".join(storage.read(KEY)).decode(errors="replace").strip()
    except NoSuchObject:
        return None
