"""Keys: who asks. All known keys are in memory, by digest; the store is asked only for one that
was made a moment ago, so that an outage of the store is never a 401."""

import asyncio
import base64
import binascii
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Collection
from enum import StrEnum

from llm_engine.api.http import Call
from llm_engine.endpoints import OPERATOR
from llm_engine.errors import InvalidKey, StoreUnavailable
from llm_engine.ids import new_id
from llm_engine.records import KeyRecord, Principal, Scope
from llm_engine.services import Services
from llm_engine.signing import TICKET

logger = logging.getLogger("llm_engine.api")

PREFIX = "sk-le-"
#: An unknown key is asked for in the store at most once in so long.
ASK_AGAIN_S = 2.0
MOST_REMEMBERED = 10_000


class Scheme(StrEnum):
    """Where a dialect's clients put their key."""

    BEARER = "bearer"  # Authorization: Bearer KEY
    BASIC = "basic"  # Authorization: Basic base64(KEY:)
    API_KEY = "api-key"  # Authorization: Api-Key KEY
    HEADER = "x-api-key"  # X-Api-Key: KEY


class Keyring:
    """Keys from the configuration, which may do everything, and those in the directory."""

    def __init__(self, services: Services) -> None:
        self._services = services
        configured = services.settings.gateway.api_keys
        self._bootstrap = {digest(key.get_secret_value().encode()) for key in configured}
        self._operator = Principal(OPERATOR, frozenset({Scope.ADMIN}))
        self._unknown: OrderedDict[bytes, float] = OrderedDict()

    async def identify(self, call: Call, schemes: Collection[Scheme]) -> Principal:
        """Raises InvalidKey, or StoreUnavailable where nobody can tell."""
        key = credential(call, schemes)
        if key is None:
            if self._bootstrap:
                raise InvalidKey(_HOW[next(iter(schemes))])
            return self._operator
        return await self.check(key)

    async def check(self, key: bytes) -> Principal:
        """Whose it is. Raises as `identify`."""
        hashed = digest(key)
        if hashed in self._bootstrap:
            return self._operator
        if key.startswith(TICKET.encode()):
            return await self._ticket(key)
        record = self._services.catalog.directory.keys.get(hashed)
        if record is None and key.startswith(PREFIX.encode()):
            record = await self._ask_store(hashed)
        if record is not None:
            return _principal(record)
        if not self._bootstrap:
            return self._operator  # no key is asked, so none can be wrong
        raise InvalidKey("Incorrect API key provided.")

    async def _ticket(self, key: bytes) -> Principal:
        """A batch's job: it may ask models what its owner may ask them, and nothing else."""
        signer = await self._services.signer()
        ticket = signer.read_ticket(key.decode("latin-1"))
        return Principal(
            ticket.owner,
            frozenset({Scope.INFERENCE}),
            batch=ticket.batch,
            priority=ticket.priority,
            sees_all=ticket.sees_all,
        )

    async def _ask_store(self, hashed: bytes) -> KeyRecord | None:
        now = time.monotonic()
        if now - self._unknown.get(hashed, -ASK_AGAIN_S) < ASK_AGAIN_S:
            return None
        try:
            found = await asyncio.to_thread(self._services.store.keys.find, [hashed])
        except StoreUnavailable:
            raise StoreUnavailable(
                "This API key cannot be checked now: it is not among the keys in memory, and the "
                "store does not answer. Retry later.",
                retry_after=self._services.settings.gateway.retry_after_s,
            ) from None
        if found:
            return found[0]
        self._unknown[hashed] = now
        self._unknown.move_to_end(hashed)
        while len(self._unknown) > MOST_REMEMBERED:
            self._unknown.popitem(last=False)
        return None


def make_key(
    owner: str, name: str, scopes: Collection[Scope], expires_at: float | None
) -> tuple[KeyRecord, str]:
    """A new key's record, and the key: 192 random bits that nobody can look up again."""
    key = PREFIX + secrets.token_urlsafe(24)
    record = KeyRecord(
        id=new_id("key"),
        owner=owner,
        name=name,
        digest=digest(key.encode()),
        prefix=key[: len(PREFIX) + 4],
        scopes=tuple(sorted(scopes)),
        created_at=time.time(),
        expires_at=expires_at,
    )
    return record, key


def digest(key: bytes) -> bytes:
    """A key is random enough to need no salt, nor a slow hash."""
    return hashlib.sha256(key).digest()


def credential(call: Call, schemes: Collection[Scheme]) -> bytes | None:
    """The key that came along. Raises InvalidKey for a scheme that the dialect doesn't know."""
    header = call.header(b"x-api-key") if Scheme.HEADER in schemes else None
    authorization = call.header(b"authorization")
    if not authorization:
        return header
    name, _, value = authorization.partition(b" ")
    scheme = name.lower().decode("latin-1")
    if scheme not in schemes or scheme == Scheme.HEADER:
        if header is not None:
            return header
        raise InvalidKey(_HOW[next(iter(schemes))])
    if scheme != Scheme.BASIC:
        return value.strip()
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[0]
    except (binascii.Error, ValueError):
        raise InvalidKey("The Basic authorization is not base64.") from None


def _principal(record: KeyRecord) -> Principal:
    if record.revoked_at is not None:
        raise InvalidKey("This API key has been revoked.")
    if record.expires_at is not None and record.expires_at <= time.time():
        raise InvalidKey("This API key has expired.")
    return Principal(record.owner, frozenset(record.scopes), record.id)


_HOW = {
    Scheme.BEARER: "You didn't provide an API key. Send it in an Authorization header: "
    "'Authorization: Bearer YOUR_KEY'.",
    Scheme.BASIC: "No authentication was passed in. Send your API key as the user of Basic "
    "authorization, or as 'Authorization: Bearer YOUR_KEY'.",
    Scheme.API_KEY: "No API key was passed in. Send it in an Authorization header: "
    "'Authorization: Api-Key YOUR_KEY'.",
    Scheme.HEADER: "No API key was passed in. Send it in an X-Api-Key header.",
}
