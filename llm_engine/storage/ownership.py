"""Whose a storage is: one store's, whose records name what lies in it.

    store    the identity of the store, written by the first platform that cleans up there

What no record names is deleted after a while. Seen from a second store, from an empty one, or from
another platform's, that would be everything.
"""

from llm_engine.errors import StoreUnavailable
from llm_engine.storage.base import Storage

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
    found = b"".join(storage.read(KEY)).decode(errors="replace").strip()
    return None if found == store else found
