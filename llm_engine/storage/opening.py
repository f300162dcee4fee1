"""From a URL to the storage behind it."""

from pathlib import Path

from llm_engine.config import Settings
from llm_engine.storage.base import Storage
from llm_engine.storage.local import LocalStorage


def open_storage(settings: Settings) -> Storage:
    """The platform's own. Connects to nothing yet; raises ConfigError for a URL that can't be."""
    return LocalStorage(Path(settings.storage_url))
