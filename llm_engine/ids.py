"""Ids of records: a prefix that tells the kind, then 26 digits that sort by time."""

import secrets
import threading
import time

_TAIL_BITS = 56
_STEP_BITS = 32  # how far the next id of the same millisecond may be away

_lock = threading.Lock()
_last = (0, 0)  # milliseconds, tail


def new_id(prefix: str, separator: str = "_") -> str:
    """'ep_' + 12 hex digits of unix milliseconds + 14 random ones, as UUIDv7 cuts it (RFC 9562).

    A process makes them in ascending order, also within a millisecond (its section 6.2, method 2),
    and when the clock goes back.
    """
    global _last
    now = time.time_ns() // 1_000_000
    with _lock:
        if now > _last[0]:
            # The first bit is room for those that follow in the same millisecond.
            _last = (now, secrets.randbits(_TAIL_BITS - 1))
        else:
            tail = _last[1] + 1 + secrets.randbits(_STEP_BITS)
            _last = (_last[0] + (tail >> _TAIL_BITS), tail % (1 << _TAIL_BITS))
        at, tail = _last
    return f"{prefix}{separator}{at:012x}{tail:014x}"
