"""Encryption of what must be kept and never shown: the keys of external models.

Fernet (AES-128-CBC with HMAC-SHA-256, from `cryptography`) under a key that is derived from the
operator's secret; the secret itself never goes into the store.
"""

import base64
import contextlib
import hashlib
import os
import secrets
import tempfile
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from llm_engine.config import ENV_SECRET, Settings
from llm_engine.errors import Conflict, InternalError


class Safe:
    """Seals and opens. Where there is no secret and no place for one, it refuses to seal."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._fernet: Fernet | None = None

    def seal(self, text: str) -> bytes:
        """Raises Conflict where no secret is configured and none can be kept beside the store."""
        return self._open().encrypt(text.encode())

    def reveal(self, sealed: bytes) -> str:
        """Raises InternalError where it was sealed under another secret."""
        try:
            return self._open().decrypt(sealed).decode()
        except InvalidToken:
            raise InternalError(
                "The key of this model was encrypted under another secret. Operators: put back "
                f"the old {ENV_SECRET}, or register the key again.",
                code="secret_changed",
            ) from None

    def _open(self) -> Fernet:
        if self._fernet is None:
            key = base64.urlsafe_b64encode(hashlib.sha256(self._secret()).digest())
            self._fernet = Fernet(key)
        return self._fernet

    def _secret(self) -> bytes:
        configured = self._settings.store.secret_key
        if configured is not None:
            if not configured.get_secret_value():
                raise _no_secret("the one that is configured is empty")
            return configured.get_secret_value().encode()
        kind, _, path = self._settings.store_url.partition(":///")
        if not kind.startswith("sqlite"):
            raise _no_secret("none is configured")
        return _kept_beside(Path(path).expanduser())


def _no_secret(why: str) -> Conflict:
    return Conflict(
        f"Keys of external models cannot be kept without a secret, and {why}. Operators: set "
        f"{ENV_SECRET} to the same value on every node.",
        code="no_secret_key",
    )


def _kept_beside(database: Path) -> bytes:
    """A secret in a file of its own, made the first time; whoever comes second reads it."""
    path = database.with_suffix(".secret")
    if not path.exists():
        database.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".secret-") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)  # whole from the first moment on
    return path.read_bytes()
