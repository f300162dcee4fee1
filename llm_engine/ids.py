"""Ids of records: a prefix that tells the kind, then 26 digits that sort by time."""

import secrets
import time


def new_id(prefix: str, separator: str = "_") -> str:
    """'ep_' + 12 hex digits of unix milliseconds + 14 random ones, as UUIDv7 cuts it (RFC 9562)."""
    return f"{prefix}{separator}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(7)}"
