"""A fine-tuned model as a model of its own: its base with the adapter worked into the weights, made
once on each node, in a folder that engines share.

    <cache>/merged/<adapter id>/        the weights, the tokenizer, and BASE; put there all at once
    <cache>/merged/<adapter id>.lock    held by whoever makes it, shared by engines that serve it

Blocking. Imports torch only to make one, not to find it.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from llm_engine.config import BUILTIN, MERGED
from llm_engine.engine.adapter_cache import AdapterCache
from llm_engine.engine.adapters import AdapterSource

logger = logging.getLogger("llm_engine.engine")

#: In a merged folder: the name of the model that the adapter was trained on.
BASE = "llm-engine-base.txt"
#: Locks that this process holds until it ends.
_held: list[int] = []


def prepare(model: str, source: AdapterSource) -> tuple[Path, str]:
    """The folder of `merged:<adapter id>`, and the model that it was made of. Raises ValueError
    where it cannot be made."""
    adapter = model.removeprefix(MERGED)
    folder = Path(source.folder).with_name("merged") / adapter
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    _held.append(lock)
    fcntl.flock(lock, fcntl.LOCK_EX)  # waits for whoever makes it
    if not folder.exists():
        _make_room(folder.parent, source.max_bytes)
        _make(adapter, folder, source)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return folder, (folder / BASE).read_text()


def _make(adapter: str, folder: Path, source: AdapterSource) -> None:
    cache = AdapterCache.of(source)
    unfinished = folder.with_name(f".{adapter}.{secrets.token_hex(4)}")
    opened = cache.open(adapter)
    try:
        logger.info("working the adapter %s into %s", adapter, opened.manifest.weights)
        _merge(opened.manifest.weights, opened.path, unfinished)
        (unfinished / BASE).write_text(opened.manifest.weights)
        unfinished.rename(folder)
    finally:
        opened.close()
        shutil.rmtree(unfinished, ignore_errors=True)


def _merge(base: str, adapter: Path, folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = base.removeprefix("builtin:")
    path = str(BUILTIN[name]) if base.startswith("builtin:") else os.path.expanduser(base)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    model.save_pretrained(folder)
    own = (adapter / "tokenizer_config.json").exists()
    AutoTokenizer.from_pretrained(str(adapter) if own else path).save_pretrained(folder)


def _make_room(parent: Path, most: int) -> None:
    """Those that no engine serves go, where there are more bytes of them than `most`."""
    found = [path for path in parent.iterdir() if path.is_dir()]
    sizes: dict[Path, int] = {}
    for path in found:
        with contextlib.suppress(FileNotFoundError):  # another process has just moved it
            sizes[path] = sum(file.stat().st_size for file in path.iterdir())
    total = sum(sizes.values())
    for path in sorted(sizes):  # ids begin with their time
        if total <= most:
            return
        adapter = path.name.removeprefix(".").partition(".")[0]  # of one that is being made, too
        lock = os.open(parent / f"{adapter}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]
        finally:
            os.close(lock)
