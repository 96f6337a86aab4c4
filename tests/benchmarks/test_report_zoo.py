"""The pages of the zoo: their contents, models worse than PCA, and those without an explanation."""

import pytest

from aezoo import registry
from benchmarks import report, report_zoo
from benchmarks.common import ResultsCSV
from benchmarks.quality import LEFT_OUT
from benchmarks.quality_table import KEY
from benchmarks.report_pca import NOT_EXPLAINED

BUDGET = "converged: 10x200 steps, least 0.0005"
NAMES = [name for name in registry.list_models() if name not in LEFT_OUT]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Converged rows of two data sets: one with all models, one with a few, limited in time."""
    folder = tmp_path_factory.mktemp("results")
    shared = {
        "size": 16,
        "code_size": 16,
        "budget": BUDGET,
        "batch_size": 128,
        "splits": "54000 6000 10000",
        "features": "a classifier",
    }
    shared |= {
        "most_seconds": 300.0,
        "pca_mse": 0.02,
        "pca_mse_at_bits": 0.025,
        "pca_mse_at_l0": 0.03,
        "probe_rows": 10,
    }
    for dataset, names in (("mnist", NAMES), ("digits", ["vae", "topk_sae", "vq_vae"])):
        table = ResultsCSV(folder / f"quality-{dataset}-fp32-pt2.13-cpu2.csv", KEY, f"quality --data {dataset}")
        rows = []
        for i, name in enumerate(names):
            kind = {"topk_sae": "active", "vq_vae": "bits"}.get(name, "numbers")
            row = shared | {"dataset": dataset, "model": name, "kind": kind, "stopped": "converged"}
            seeds = range(3 if name == "vae" else 1)
            rows += [row | {"seed": seed, "mse": 0.01 + 0.0002 * i + 0.001 * seed} for seed in seeds]
        if dataset == "digits":
            rows[-1] |= {"stopped": "capped", "mse": 0.1}
        table.replace_all(rows)
    return folder


def test_pages_are_short_and_name_their_conditions(results):
    pages = report.zoo_pages(results)
    assert {*pages} == {"zoo.md", "zoo-pca.md", "zoo-mnist.md", "zoo-digits.md"}
    page = pages["zoo-mnist.md"]
    for said in (
        BUDGET,
        "at most 300 s of one core",
        "54000 6000 10000",
        "a classifier",
        "quality --data mnist",
        "Seeds: 1 or 3",
        "No GPU",
    ):
        assert said in page
    numbers = page.partition("## Codes of 16 active")[0].partition("## Codes of 128 bits")[0]
    lines = [line for line in numbers.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == 41 and lines[0].startswith("| PCA, 16 numbers |") and len(page) < 15_000
    assert "**vae**" in numbers and f"{len(NAMES) - 2} models." in numbers
    assert "| **vq_vae** |" in page.partition("## Codes of 128 bits")[2]
    assert all(name in pages["zoo.md"] for name in LEFT_OUT)


def test_models_behind_pca_are_explained_or_counted(results, monkeypatch):
    monkeypatch.setattr(report_zoo, "REASONS", {"vae": "the prior"})
    assert report_zoo.reason({"model": "vae", "ended": "converged"}) == "the prior"
    assert report_zoo.reason({"model": "vae", "ended": "capped 1, converged 2"}).startswith("the budget")
    assert report_zoo.reason({"model": "aae", "ended": "converged"}) == NOT_EXPLAINED
    page = report.zoo_pages(results)["zoo-pca.md"]
    floors = {"vq_vae": 0.025, "topk_sae": 0.03, "vae": 1.0}
    late = [name for i, name in enumerate(NAMES) if 0.01 + 0.0002 * i > floors.get(name, 0.02)]
    assert f"Not explained: {len(late)}: " in page and all(f"| {name} |" in page for name in late)


def test_reasons_are_those_of_existing_models():
    assert {*report_zoo.REASONS} <= {*registry.list_models()} and {*report_zoo.TEXTBOOK} <= {*NAMES}
