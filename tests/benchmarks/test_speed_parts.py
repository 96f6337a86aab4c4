"""Every part of aezoo.speed has a measured gain, or a reason why it could not be measured."""

import pytest

from aezoo.speed.parts import PARTS
from benchmarks import speed_parts
from benchmarks.common import results_folder


def row(part, gain, workload="conv_vae_28"):
    gains = {name: str(gain) for name in ("gain", "gain_low", "gain_high")}
    return {"part": part, "workload": workload, "kind": "train", "compile": "off", "file": "cpu", **gains}


def test_every_part_has_a_gain_or_a_reason():
    rows = speed_parts.read_rows(results_folder())
    for part in PARTS:
        measured = any(one["part"] == part for one in rows)
        assert speed_parts.earning(part, rows) if measured else part in speed_parts.NOT_MEASURED, part


def test_page_is_written_from_the_results():
    assert speed_parts.PAGE.read_text(encoding="utf-8") == speed_parts.page(speed_parts.read_rows(results_folder()))


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([], "not measured: needs a GPU"),
        ([0.99, 1.049], "below 1.05 wherever it was measured: delete it"),
        (
            [1.02, 1.05, 1.2],
            "1.200 (1.200 to 1.200) conv_vae_28, train, cpu; 1.050 (1.050 to 1.050) conv_vae_28, train, cpu",
        ),
    ],
)
def test_verdict_compares_gains_with_the_minimum(gains, words):
    rows = [row("graph_capture", gain) for gain in gains] + [row("malloc", 2.0)]
    assert speed_parts.verdict("graph_capture", rows) == words


def test_gain_is_the_median_of_paired_rounds():
    # a slow round slows both down; the fastest epochs over all rounds would give 1.0
    enabled, disabled = [[1.0, 3.0], [4.0, 5.0], [2.0, 2.0]], [[1.0, 1.0], [6.0, 8.0], [3.0, 4.0]]
    found = speed_parts._gain(enabled, disabled)
    assert (found["gain"], found["rounds"]) == (1.5, 3)
    assert (found["with_ms"], found["without_ms"]) == (2000.0, 3000.0)
