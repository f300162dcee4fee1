"""The project's own demo models: a small chat model, a small embedding model, and their makers.

They let a newcomer get sensible answers with no model hub. Knows nothing about serving.
"""

from pathlib import Path

CHAT = Path(__file__).parent / "chat"
EMBED = Path(__file__).parent / "embed"
#: Training files that fine-tune the chat model in a minute or two; see `lessons`.
EXAMPLES = Path(__file__).parent / "examples"
