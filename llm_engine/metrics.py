"""Every metric name and label, declared once; and how the numbers of many replicas become one.

An ingress replica counts what it relays. Prometheus scrapes one address behind which any replica
may answer, so each sends its samples to the router, and whoever is scraped prints the sum.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from llm_engine.records import EndpointStatus, Load
from llm_engine.statuses import EndpointState

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0
)  # fmt: skip
GAPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
MOST_GONE = 100  # replicas remembered one by one
#: (name, labels) -> value, of one replica: plain data that crosses a Ray handle.
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class IngressMetrics:
    """What one ingress replica counts. `model` is a known model's name, else "unknown"."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        on = {"registry": self.registry}
        self.requests = Counter(
            "llm_engine_requests",
            "Requests answered, by HTTP status.",
            ["model", "path", "status"],
            **on,
        )
        self.in_flight = Gauge(
            "llm_engine_requests_in_flight", "Requests being answered.", ["model"], **on
        )
        self.retries = Counter(
            "llm_engine_retries", "Requests moved to another replica.", ["model"], **on
        )
        self.fallbacks = Counter(
            "llm_engine_fallbacks",
            "Requests that another model answered.",
            ["model", "answered_by"],
            **on,
        )
        self.upstream_tokens = Counter(
            "llm_engine_upstream_tokens",
            "Tokens that external models say they have read (prompt) and made (completion).",
            ["model", "kind"],
            **on,
        )
        self.disconnects = Counter(
            "llm_engine_client_disconnects", "Clients that left early.", ["model"], **on
        )
        self.duration = Histogram(
            "llm_engine_request_duration_seconds",
            "From the request's arrival to its last byte.",
            ["model"],
            buckets=SECONDS,
            **on,
        )
        self.first_token = Histogram(
            "llm_engine_time_to_first_token_seconds",
            "From the request's arrival to the first byte of a streamed answer.",
            ["model"],
            buckets=SECONDS,
            **on,
        )
        self.inter_token = Histogram(
            "llm_engine_inter_token_latency_seconds",
            "Mean gap between stream events that left together.",
            ["model"],
            buckets=GAPS,
            **on,
        )

    def samples(self) -> Samples:
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }


@dataclass(frozen=True, slots=True)
class EngineTotals:
    """Of one endpoint: the gauges of its replicas now, and counters that outlive replicas."""

    load: Load
    replicas: int


class Merger:
    """Sums of many replicas' samples. A replica that is gone keeps its counters in the sum."""

    def __init__(self) -> None:
        self._live: dict[str, Samples] = {}
        self._gone: dict[str, Samples] = {}  # may come back: then they must not count twice
        self._past: Samples = {}  # the sum of those that left long ago

    def put(self, replica: str, samples: Samples) -> None:
        self._gone.pop(replica, None)
        self._live[replica] = samples

    def retire(self, replica: str) -> None:
        samples = self._live.pop(replica, {})
        self._gone[replica] = {
            key: value for key, value in samples.items() if not key[0].endswith("_in_flight")
        }
        while len(self._gone) > MOST_GONE:
            _add(self._past, self._gone.pop(next(iter(self._gone))))

    def total(self) -> Samples:
        total = dict(self._past)
        for samples in (*self._gone.values(), *self._live.values()):
            _add(total, samples)
        return total


def _add(total: Samples, samples: Samples) -> None:
    for key, value in samples.items():
        total[key] = total.get(key, 0) + value


def render(
    samples: Samples,
    endpoints: Iterable[EndpointStatus] = (),
    engines: Mapping[str, EngineTotals] | None = None,
) -> bytes:
    """The Prometheus text of merged samples, and of what the router knows of the engines."""
    registry = CollectorRegistry()
    registry.register(_Merged(samples, list(endpoints), dict(engines or {})))
    return generate_latest(registry)


class _Merged:
    """A collector over numbers that were counted elsewhere."""

    def __init__(
        self, samples: Samples, endpoints: list[EndpointStatus], engines: dict[str, EngineTotals]
    ) -> None:
        self._samples, self._endpoints, self._engines = samples, endpoints, engines

    def collect(self) -> Iterable[Metric]:
        for family in IngressMetrics().registry.collect():
            merged = Metric(family.name, family.documentation, family.type)
            names = (
                family.name,
                *(f"{family.name}{s}" for s in ("_total", "_bucket", "_sum", "_count")),
            )
            for (name, labels), value in self._samples.items():
                if name in names:
                    merged.samples.append(Sample(name, dict(labels), value))
            yield merged
        yield self._engine("llm_engine_queue_waiting", "gauge", "Requests queued in engines.",
                           lambda t: t.load.waiting)  # fmt: skip
        yield self._engine("llm_engine_queue_running", "gauge", "Requests being generated.",
                           lambda t: t.load.running)  # fmt: skip
        yield self._engine("llm_engine_kv_cache_usage", "gauge", "Mean share of KV cache in use.",
                           lambda t: t.load.kv_cache_usage)  # fmt: skip
        yield self._engine("llm_engine_replicas_ready", "gauge", "Replicas that take requests.",
                           lambda t: t.replicas)  # fmt: skip
        yield self._engine("llm_engine_prompt_tokens", "counter", "Prompt tokens read by engines.",
                           lambda t: t.load.prompt_tokens)  # fmt: skip
        yield self._engine("llm_engine_generated_tokens", "counter", "Tokens made by engines.",
                           lambda t: t.load.generated_tokens)  # fmt: skip
        state = Metric("llm_engine_endpoint_ready", "1 while the endpoint is READY.", "gauge")
        for endpoint in self._endpoints:
            ready = float(endpoint.state is EndpointState.READY)
            state.samples.append(Sample(state.name, {"model": endpoint.name}, ready))
        yield state

    def _engine(self, name, kind, text, value) -> Metric:
        metric = Metric(name, text, kind)
        suffix = "_total" if kind == "counter" else ""
        for model, totals in sorted(self._engines.items()):
            metric.samples.append(Sample(name + suffix, {"model": model}, float(value(totals))))
        return metric
