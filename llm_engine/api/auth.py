"""API keys: who may come in. Keys are compared by digest and never logged."""

import hashlib
import hmac
from collections.abc import Iterable

from pydantic import SecretStr

from llm_engine.errors import InvalidKey


class Keyring:
    """The keys that are accepted; an empty one lets everybody in."""

    def __init__(self, keys: Iterable[SecretStr]) -> None:
        self._digests = tuple(_digest(key.get_secret_value().encode()) for key in keys)

    def check(self, authorization: bytes | None) -> None:
        """Raises InvalidKey unless the header holds `Bearer <a known key>`."""
        if not self._digests:
            return
        if not authorization:
            raise InvalidKey(
                "You didn't provide an API key. Send it in an Authorization header: "
                "'Authorization: Bearer YOUR_KEY'."
            )
        scheme, _, key = authorization.partition(b" ")
        digest = _digest(key.strip())
        # Every digest is compared, so that the time taken tells nothing.
        known = [hmac.compare_digest(digest, each) for each in self._digests]
        if scheme.lower() != b"bearer" or not any(known):
            raise InvalidKey("Incorrect API key provided.")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
