"""The figures of `aezoo info`: those of the CSVs, with their comparisons."""

import inspect
import json
from pathlib import Path

import pytest
from golden import own_models

import aezoo
from benchmarks import report, report_info
from benchmarks.causes import CAUSES
from benchmarks.report_info import ERROR, Entry, Measure, compare

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PREFIXES = ("quality-", "causes-", "tasks-", "adbench-", "disentangle-", "dictionaries-", "bits-")


@pytest.fixture(scope="module")
def files():
    return {path.stem: report._read(path)[1] for path in RESULTS.glob("*.csv") if path.stem.startswith(PREFIXES)}


def entry(model, value, column="mse", data="mnist5k", setting="1 epoch", label=None, **row):
    return Entry(model, label or model, data, setting, {column: str(value), **row})


def test_the_file_matches_the_results(files):
    assert report_info.path().read_text(encoding="utf-8") == report_info.text(files) + "\n", (
        "run python -m benchmarks.report"
    )


def test_figures_are_those_of_the_csv(files):
    found = report_info.figures(files)["vae"]
    rows = [
        row
        for row in report.merge_seeds(files["quality-mnist5k-fp32-pt2.13-cpu2"])
        if row["model"] == "vae" and row["code_size"] == "16" and row["budget"] == "epochs=20"
    ]
    assert found["row"]["figures"]["mse {}"] == pytest.approx(float(rows[0]["mse"]), rel=1e-3)
    (generation,) = [of for of in found["compared"] if of["use"] == "generation"]
    # only converged trainings have an FID
    (digits,) = [row for row in report.merge_seeds(files["quality-digits-fp32-pt2.13-cpu2"]) if row["model"] == "vae"]
    assert generation["measure"] == "FID {}" and generation["data"] == "digits"
    assert generation["value"] == pytest.approx(float(digits["fid"]), rel=1e-3)
    assert all(value < generation["value"] for _, value in generation["better"])


def test_rivals_share_data_and_setting_and_are_strictly_better():
    rows = [entry("a", 0.2), entry("b", 0.1), entry("c", 0.2), entry("d", 0.3), entry("", 0.15, label="PCA")]
    rows += [entry("e", 0.01, setting="2 epochs"), entry("f", 0.01, data="digits"), entry("g", "")]
    rows += [entry("b", 0.05, label="b"), entry("a", 0.2, data="digits")]
    found = compare("a", "reconstruction", ERROR, rows)
    assert found["better"] == [["b", 0.05], ["PCA", 0.15]]
    assert (found["value"], found["n_better"], found["n_rivals"], found["data"]) == (0.2, 2, 4, "mnist5k")
    higher = compare("a", "x", Measure("quality", "mse", "mse {}", higher=True), rows)
    assert higher["better"] == [["d", 0.3]]
    assert compare("h", "x", ERROR, rows) is None
    many = compare("d", "x", ERROR, [entry("d", 9.0), *(entry(f"m{i}", i / 10) for i in range(8))])
    assert [name for name, _ in many["better"]] == ["m0", "m1", "m2"] and many["n_better"] == 8


def test_densities_are_compared_under_one_likelihood():
    measure = Measure("quality", "log_likelihood", "log p(x) {} nats")
    rows = [entry("a", -100, "log_likelihood", likelihood="bernoulli")]
    rows += [entry("b", -90, "log_likelihood", likelihood="bernoulli")]
    rows += [entry("c", 500, "log_likelihood", likelihood="gaussian")]
    found = compare("a", "generation", measure, rows)
    assert found["better"] == [["b", -90.0]] and "likelihood bernoulli" in found["setting"]


def test_compression_is_compared_at_no_more_bits():
    measure = report_info.MEASURES["compression"][0]
    rows = [entry("a", 20, "psnr", bits_per_dim="1.0"), entry("b", 30, "psnr", bits_per_dim="2.0")]
    rows += [entry("c", 25, "psnr", bits_per_dim="0.9")]
    found = compare("a", "compression", measure, rows)
    assert found["better"] == [["c", 25.0]] and "at 1 bits/dim or fewer" in found["setting"]


def test_new_rows_replace_old_ones(files, tmp_path):
    changed = dict(files)
    stem = "quality-mnist5k-fp32-pt2.13-cpu2"
    changed[stem] = [row | ({"fid": "3.5"} if row["model"] in ("vae", "aae") else {}) for row in files[stem]]
    before, after = report_info.figures(files), report_info.figures(changed)
    (now,) = [of for of in after["vae"]["compared"] if of["use"] == "generation"]
    assert now["measure"] == "FID {}" and now["value"] == 3.5
    assert after["beta_vae"] == before["beta_vae"]
    assert after["vae"]["row"]["figures"]["FID {}"] == 3.5


def test_models_behind_pca_get_flags_that_help():
    row = {"dataset": "digits", "kind": "numbers", "size": "16", "budget": "b", "seed": "0", "pca_mse": "0.01"}
    row |= {"stopped": "converged", "batch_size": "9", "code_size": "16"}
    runs = [row | {"model": name, "mse": "0.02"} for name in ("vae", "iwae", "jmvae", "dense_ae")]
    runs.append(row | {"model": "hvae", "mse": "0.009"})
    without = [row | {"model": name, "mse": "0.006"} for name in ("vae", "jmvae", "hvae")]
    without.append(row | {"model": "iwae", "mse": "0.015"})
    found = report_info.figures({"quality-digits-fp32": runs, "causes-digits-fp32": without})
    helped = {name: of["pca"] for name, of in found.items() if "pca" in of}
    assert helped.keys() == {"vae", "jmvae"}
    assert helped["vae"] == {
        "data": "digits", "ratio": 2.0, "without": 0.6, "cause": CAUSES["vae"].words,
        "flags": "--model.likelihood gaussian:0.05",
    }  # fmt: skip
    assert helped["jmvae"]["flags"] == "--model.likelihood gaussian:0.05 and samples of one part"


def test_every_tag_and_measure_is_known():
    from aezoo.training.traits import TAGS

    assert set(report_info.MEASURES) <= set(TAGS)
    assert {of.table for measures in report_info.MEASURES.values() for of in measures} <= set(report_info.TABLES)
    assert {of["use"] for model in json.loads(report_info.path().read_text()).values() for of in model["compared"]} <= {
        *TAGS, "reconstruction",
    }  # fmt: skip


@pytest.mark.slow
def test_models_with_labels_are_named():
    def learns(name):
        cls = aezoo.model_class(name)
        return cls.reads_labels or "num_classes" in inspect.signature(cls).parameters

    assert {name for name in own_models() if learns(name)} == report_info.WITH_LABELS
