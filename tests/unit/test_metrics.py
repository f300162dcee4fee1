"""The numbers of many replicas become one."""

from llm_engine.metrics import EngineTotals, IngressMetrics, Merger, render
from llm_engine.records import Load


def counted(requests: int, in_flight: int = 0) -> IngressMetrics:
    made = IngressMetrics()
    for _ in range(requests):
        made.requests.labels("m", "/v1/chat/completions", 200).inc()
        made.first_token.labels("m").observe(0.02)
    made.in_flight.labels("m").inc(in_flight)
    return made


def line(text: bytes, start: str) -> float:
    [found] = [x for x in text.decode().splitlines() if x.startswith(start)]
    return float(found.split()[-1])


def test_replicas_are_summed_and_the_gone_ones_keep_their_counts():
    merger = Merger()
    merger.put("a", counted(3, in_flight=2).samples())
    merger.put("b", counted(4, in_flight=1).samples())
    merger.put("b", counted(5, in_flight=1).samples())  # a later report replaces the earlier
    text = render(merger.total())
    assert line(text, "llm_engine_requests_total{") == 8
    assert line(text, "llm_engine_time_to_first_token_seconds_count{") == 8
    assert line(text, "llm_engine_requests_in_flight{") == 3
    merger.retire("a")
    text = render(merger.total())
    assert line(text, "llm_engine_requests_total{") == 8, "a counter must never go back"
    assert line(text, "llm_engine_requests_in_flight{") == 1


def test_what_engines_count_is_there_by_model():
    totals = EngineTotals(Load(running=2, waiting=1, generated_tokens=9), replicas=1)
    text = render({}, (), {"m": totals})
    assert line(text, 'llm_engine_generated_tokens_total{model="m"}') == 9
    assert line(text, 'llm_engine_queue_waiting{model="m"}') == 1
