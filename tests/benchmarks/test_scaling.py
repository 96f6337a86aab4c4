"""Scaling: exponents of time and memory, and measured rows of an axis of a model and of a command."""

import pytest

from benchmarks import report, report_scaling, scaling
from benchmarks.common import read_csv


def rows_of(power, memory=lambda n: 10.0):
    values = (10, 100, 1_000, 10_000)
    return [
        {"axis": "samples", "model": "vae", "unit": "epoch", "value": str(n)}
        | {"milliseconds": str(0.5 * n**power), "memory_mb": str(memory(n))}
        for n in reversed(values)
    ]


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_exponents_of_powers_are_found(power):
    (row,) = report_scaling.merge_values(rows_of(power, lambda n: 3 * n))
    assert (row["time_exponent"], row["memory_exponent"]) == (f"{power:.2f}", "1.00")
    assert row["values"] == "10 / 100 / 1,000 / 10,000"


def test_fixed_costs_and_failed_rows_do_not_affect_the_exponent():
    rows = rows_of(1)
    rows[-1]["milliseconds"] = "1e6"  # a fixed cost
    rows[1] |= {"error": "out of memory", "processor": "one"}
    (row,) = report_scaling.merge_values([*rows, {**rows[0], "value": "100000", "milliseconds": "50000"}])
    assert row["time_exponent"] == "1.00" and row["errors"] == "1000: out of memory"
    assert row["processor"] == "one"
    assert row["memory_exponent"] == "0.00"
    assert report_scaling.exponent([(1, 1), (2, 2)]) is None


@pytest.mark.slow
def test_axes_and_commands_are_measured_and_reported(tmp_path, capsys):
    given = [
        "--axes",
        "samples",
        "codebook",
        "reconstruct",
        "--most",
        "1000",
        "--repeats",
        "1",
        "--results",
        str(tmp_path),
    ]
    scaling.main(given)
    (path,) = tmp_path.glob("scaling-*.csv")
    _, rows = read_csv(path)
    assert not [row["error"] for row in rows if row["error"]]
    found = {(row["axis"], row["model"], row["unit"]) for row in rows}
    assert found >= {("samples", "vae", "epoch"), ("codebook", "vq_vae", "step"), ("reconstruct", "vae", "call")}
    assert all(float(row["milliseconds"]) > 0 and float(row["memory_mb"]) > 0 for row in rows)
    memory = {int(row["value"]): float(row["memory_mb"]) for row in rows if row["model"] == "vq_vae"}
    assert memory[65536] > 2 * memory[64]
    scaling.main(given)
    assert "[1/" not in capsys.readouterr().out.split(path.name)[1]  # nothing is measured again
    page = report.pages(tmp_path, tmp_path)[0]["scaling.md"]
    assert "exponent of time" in page and "codebook" in page
