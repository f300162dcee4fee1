"""The engine seam: what a replica needs of an engine, whatever runs the model.

An engine is a *process*: it can die, hang or be killed without taking its replica along. A new
engine is one module with a `main()` that serves OpenAI's routes through `server.run`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from llm_engine.records import Load

HEADER_SECRET = "x-engine-secret"
HEADER_BATCH = "x-engine-batch"  # how many texts a request asks for that belongs to a batch
HEADER_ADAPTER = "x-engine-adapter"  # the id of the adapter that `model` names in a request
PATH_LOAD = "/-/load"
PATH_FORGET = "/-/forget"  # POST {"adapters": [...]}: they have been deleted


class AdapterProblem(StrEnum):
    """What an engine gives as the `type` of an error for which the adapter is to blame."""

    MISSING = "adapter_missing"
    BROKEN = "adapter_broken"  # and would be in every engine
    STORAGE = "adapter_storage"  # its bytes cannot be had now
    ELSEWHERE = "adapter_elsewhere"  # this engine serves other weights, or no adapters

    @property
    def status(self) -> int:
        return {"adapter_missing": 404, "adapter_broken": 500}.get(self.value, 503)


@dataclass(frozen=True, slots=True)
class EngineAddress:
    host: str
    port: int
    secret: str  # every request to the port must carry it in HEADER_SECRET
    max_model_len: int  # tokens


class Engine(ABC):
    @abstractmethod
    async def start(self) -> EngineAddress:
        """Load the model and answer one request with it. Raises EngineError with the cause."""

    @abstractmethod
    async def load(self) -> Load:
        """What it is doing now. Raises EngineError if it does not answer."""

    @abstractmethod
    async def forget(self, adapters: Collection[str]) -> None:
        """They have been deleted: out of its memory. Raises EngineError if it does not answer."""

    @abstractmethod
    async def check_health(self) -> None:
        """Raises EngineError with the cause once the engine is dead."""

    @property
    @abstractmethod
    def loaded_at(self) -> float:
        """When the model was in memory, in unix seconds; 0 before."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether its process runs; False before `start`."""

    @abstractmethod
    async def stop(self) -> None:
        """End the process and all that it started; safe to call twice."""
