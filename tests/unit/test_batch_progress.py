"""How fast a batch goes is told from its last half minute, in one line that a person reads."""

from llm_engine.batches.progress import Progress
from tests.support.batches import batch_record


def test_rates_come_from_the_last_half_minute():
    now = [0.0]
    progress = Progress(lambda: now[0])
    for second in range(1, 121):
        now[0] = float(second)
        for _ in range(10 if second <= 60 else 2):
            progress.count(tokens=5)
        progress.look()
    assert 1.9 < progress.rows_per_s < 2.1
    assert 9.5 < progress.tokens_per_s < 10.5


def test_the_line_says_all_that_one_wants_to_know():
    now = [0.0]
    progress = Progress(lambda: now[0])
    record = batch_record(id="batch_1", total=50_000, completed=1_231, failed=3)
    now[0] = 10.0
    for _ in range(550):
        progress.count(tokens=33)
    progress.look()
    line = progress.line(record)
    assert line == (
        "batch_1 1,234/50,000 rows (2 %), 55 rows/s, 1,815 tokens/s, 3 failed, about 15 min left"
    )
    told = progress.plain(record, in_flight=8)
    assert told["rows_per_s"] == 55 and told["in_flight"] == 8
    assert 880 < told["eta_s"] < 890


def test_before_the_first_row_nothing_is_promised():
    progress = Progress()
    record = batch_record(id="batch_1", total=5, reason="the model is starting")
    assert progress.line(record) == (
        "batch_1 0/5 rows (0 %), 0.00 rows/s, 0 tokens/s, waiting: the model is starting"
    )
    assert "eta_s" not in progress.plain(record, 0)
