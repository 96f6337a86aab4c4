"""Latency of one sample: how calls are timed, and one real row."""

import csv

import pytest

from benchmarks import latency


def test_calls_are_timed_one_by_one_in_turns(monkeypatch):
    order, clock = [], [0]
    monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: clock[0])

    def call(name, nanoseconds):
        def timed(i):
            order.append((name, i))
            clock[0] += nanoseconds + i

        return timed

    found = latency.times_of({"slow": call("slow", 5000), "fast": call("fast", 1000)}, 150)
    assert found == {"slow": [(5000 + i) / 1000 for i in range(150)], "fast": [(1000 + i) / 1000 for i in range(150)]}
    # each is warmed up, then they alternate
    turns = [name for (name, _), (before, _) in zip(order, [("", 0), *order], strict=False) if name != before]
    assert turns == ["slow", "fast", "slow", "fast", "slow", "fast"]


@pytest.mark.slow
def test_row_has_times_of_file_and_model_and_is_kept(tmp_path, capsys):
    words = ["--results", str(tmp_path), "--models", "dense_ae", "--features", "3", "--calls", "20"]
    latency.main(words)
    (path,) = tmp_path.glob("latency-*.csv")
    (row,) = csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#"))
    assert row["score"] == "deviance" and row["calls"] == "20" and not row["error"]
    for way in ("file", "model"):
        assert 0 < float(row[f"{way}_us"]) <= float(row[f"{way}_us_p99"])
    before = path.read_text()
    latency.main(words)
    assert path.read_text() == before
