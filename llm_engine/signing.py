"""What this platform signs: links that open one file for a while, and the tickets of its jobs.

HMAC-SHA-256 with a secret that lies in the store, so that what one gateway signs any other can
check. A ticket says on whose behalf a batch asks its models; nobody but a job gets one.
"""

import base64
import binascii
import hashlib
import hmac
import time
from dataclasses import dataclass

import orjson

from llm_engine.errors import InvalidKey

TICKET = "le-ticket-"


@dataclass(frozen=True, slots=True)
class Ticket:
    """A batch that asks for its owner."""

    batch: str
    owner: str
    sees_all: bool
    priority: int  # of its requests in an engine's queue; 0 is everybody else's, higher is later
    expires_at: float


class Signer:
    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def sign_link(self, file: str, expires_at: int) -> str:
        return self._sign(b"link", f"{file}:{expires_at}".encode())

    def check_link(self, file: str, expires_at: int, signature: str) -> None:
        """Raises InvalidKey."""
        if not _same(self.sign_link(file, expires_at), signature):
            raise InvalidKey("This link's signature is wrong.", code="invalid_signature")
        if expires_at <= time.time():
            raise InvalidKey("This link has expired. Ask for a new one.", code="link_expired")

    def ticket(self, ticket: Ticket) -> str:
        payload = base64.urlsafe_b64encode(orjson.dumps(ticket)).decode()
        return f"{TICKET}{payload}.{self._sign(b'ticket', payload.encode())}"

    def read_ticket(self, text: str) -> Ticket:
        """Raises InvalidKey."""
        payload, _, signature = text.removeprefix(TICKET).partition(".")
        if not _same(self._sign(b"ticket", payload.encode()), signature):
            raise InvalidKey("Incorrect API key provided.")
        try:
            found = Ticket(**orjson.loads(base64.urlsafe_b64decode(payload)))
        except (binascii.Error, orjson.JSONDecodeError, TypeError):
            raise InvalidKey("Incorrect API key provided.") from None
        if found.expires_at <= time.time():
            raise InvalidKey("This ticket has expired.")
        return found

    def _sign(self, purpose: bytes, content: bytes) -> str:
        made = hmac.new(self._secret, purpose + b"\0" + content, hashlib.sha256)
        return base64.urlsafe_b64encode(made.digest()).decode().rstrip("=")


def _same(ours: str, theirs: str) -> bool:
    return hmac.compare_digest(ours.encode(), theirs.encode())
