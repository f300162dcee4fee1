"""What every route receives: the settings, the picture of who serves what, the way to engines."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from llm_engine.api.relay import Pool
from llm_engine.config import Settings
from llm_engine.metrics import IngressMetrics
from llm_engine.routing import Balancer


async def _own_metrics_only() -> bytes | None:
    return None


async def _no_replicas() -> list[dict]:
    return []


@dataclass
class Services:
    settings: Settings
    balancer: Balancer
    pool: Pool = field(default_factory=Pool)
    metrics: IngressMetrics = field(default_factory=IngressMetrics)
    #: Whether answers must carry x-request-id themselves; Ray Serve adds it where it is around.
    tell_request_id: bool = True
    #: The merged metrics of all ingress replicas, or None where there is only this one.
    all_metrics: Callable[[], Awaitable[bytes | None]] = _own_metrics_only
    #: Every replica's own report, as plain data without secrets; for operators.
    describe_replicas: Callable[[], Awaitable[list[dict]]] = _no_replicas
