"""Idempotency-Key: a request that is sent again makes nothing twice."""

import hashlib

from fastapi import Request

from llm_engine.errors import InvalidRequest
from llm_engine.records import Principal
from llm_engine.store.idempotency import LONGEST_KEY, Once


def once(request: Request, who: Principal, route: str, *asked: bytes | str | None) -> Once | None:
    """For `store.idempotency`; None where the request has no key. `asked`: all that it asks for,
    piece by piece. Raises InvalidRequest for a key that is too long."""
    key = request.headers.get("idempotency-key", "")
    if not key:
        return None
    if len(key) > LONGEST_KEY:
        raise InvalidRequest(
            f"An Idempotency-Key has at most {LONGEST_KEY} characters.", code="invalid_value"
        )
    return Once(who.owner, route, key, digest(*asked))


def digest(*asked: bytes | str | None) -> bytes:
    """SHA-256 of these pieces, none of which can run into the next."""
    whole = hashlib.sha256()
    for piece in asked:
        data = piece.encode() if isinstance(piece, str) else piece
        whole.update(b"-" if data is None else b"%d:%b" % (len(data), data))
    return whole.digest()
