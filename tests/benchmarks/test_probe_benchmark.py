"""The probe benchmark: its rows, which are measured once, and its figures compared with references."""

import csv

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import aezoo
from aezoo.errors import AezooError
from benchmarks import parallel, probe, probe_row

TINY = ["--rows", "60", "--steps", "2", "--code-size", "8", "--batch-size", "20", "--accelerator", "cpu"]


def rows_of(folder):
    (path,) = folder.glob("probe-digits-fp32-pt*-cpu*.csv")
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# command: python -m benchmarks.probe --data digits")
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Rows are measured in this process: separate processes are tested with the other benchmarks."""

    def run_rows(module, specs, timeout, jobs, accelerator):
        assert module == "probe_row"
        for spec in specs:
            try:
                yield spec, probe_row.measure(spec)
            except AezooError as error:
                yield spec, {"error": str(error)}

    monkeypatch.setattr(parallel, "run_rows", run_rows)


def run(folder, *more):
    probe.main(["--data", "digits", *TINY, "--results", str(folder), *more])


@pytest.mark.slow
def test_every_seed_is_a_row_and_rows_are_kept(tmp_path, capsys):
    run(tmp_path, "--models", "mae", "conv_ae", "--seeds", "2")
    rows = rows_of(tmp_path)
    assert [(row["model"], row["seed"]) for row in rows] == [
        ("raw pixels", "0"), ("pca", "0"), ("mae", "0"), ("conv_ae", "0"), ("mae", "1"), ("conv_ae", "1"),
    ]  # fmt: skip
    assert [row["numbers"] for row in rows[:4]] == ["64", "8", "128", "8"]  # 16 tokens of 8
    for row in rows:
        assert tuple(row) == (*probe.COLUMNS[:-1], "processor", "error") and not row["error"]
        assert all(0 <= float(row[name]) <= 1 for name in ("probe", "knn"))
        assert bool(row["pooled_probe"]) == bool(row["pooled_knn"]) == (row["model"] == "mae")
    assert rows[2]["mse"] != rows[4]["mse"]
    told = capsys.readouterr().out
    assert "[6/6] conv_ae, seed 1" in told
    assert "raw pixels" in told.split("[6/6]")[1]  # the medians
    run(tmp_path, "--models", "mae", "conv_ae", "--seeds", "2")
    assert rows_of(tmp_path) == rows and "seed 0:" not in capsys.readouterr().out


def test_failed_row_is_excluded_from_medians(tmp_path, capsys):
    run(tmp_path, "--models", "msssim_vae", "--seeds", "1", "--code-size", "3")
    rows = rows_of(tmp_path)
    assert len(rows) == 3
    table = [{**row, "model": "m", "seed": str(i), "probe": str(p), "error": e} for i, (row, p, e) in enumerate(
        [(rows[0], 0.5, ""), (rows[0], 0.7, ""), (rows[0], 0.6, ""), (rows[0], 0.1, "AezooError: x")])]  # fmt: skip
    like = {**rows[0]}
    (found,) = probe.medians(table, like)
    assert (found["seeds"], found["probe"]) == (3, 0.6)
    assert probe.medians(table, like | {"steps": "7"}) == []


def test_pixel_probe_matches_scikit_learn():
    spec = {"data": {"name": "digits", "root": ""}, "rows": 300, "row": {"model": "raw pixels", "seed": 0}}
    x, y, x_test, y_test = probe_row.samples(spec)
    assert x.shape == (300, 1, 8, 8) and len(x_test) > 100
    again, *_ = probe_row.samples(spec)
    assert torch.equal(x, again)
    found = probe_row.measure(spec)
    a, b = x.flatten(1).double().numpy(), x_test.flatten(1).double().numpy()
    scaler = StandardScaler().fit(a)
    linear = LogisticRegression(max_iter=1000).fit(scaler.transform(a), y)
    assert found["probe"] == pytest.approx(linear.score(scaler.transform(b), y_test), abs=0.01)
    assert found["knn"] == pytest.approx(KNeighborsClassifier(5).fit(a, y).score(b, y_test), abs=0.01)
    assert found["numbers"] == 64


def test_pooled_code_is_mean_over_positions(monkeypatch):
    seen = []
    monkeypatch.setattr(
        probe_row, "probe_accuracies", lambda a, y, b, y_test: seen.append(b) or {"probe": 0.5, "knn": 0.5}
    )
    models = []
    create = aezoo.create_model
    monkeypatch.setattr(aezoo, "create_model", lambda *a, **k: models.append(create(*a, **k)) or models[-1])
    arguments = probe.parse_arguments(["--data", "digits", "--models", "simmim", *TINY])
    spec = probe.plan(arguments)[2]
    probe_row.measure(spec)
    x_test = probe_row.samples(spec)[2]
    with torch.no_grad():
        tokens = models[0].eval().encode(x_test)
    whole, mean = seen
    assert whole.shape == (len(x_test), 8 * 16)
    np.testing.assert_allclose(whole, tokens.flatten(1).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, tokens.mean((2, 3)).numpy(), rtol=1e-4, atol=1e-5)


def test_default_probe_models_exist_misspelt_refused():
    specs = probe.plan(probe.parse_arguments(["--seeds", "1"]))
    assert [spec["row"]["model"] for spec in specs] == [*probe.BASELINES, *probe.MODELS]
    sizes = {spec["row"]["model"]: spec["hyperparameters"] for spec in specs}
    assert sizes["mae"] == {"width": 64} and sizes["vae"] == {"latent_dim": 64} and sizes["pca"] == {}
    with pytest.raises(AezooError, match="did you mean 'mae'"):
        probe.plan(probe.parse_arguments(["--models", "maee"]))
    with pytest.raises(AezooError, match="no classes"):
        probe.main(["--data", "celeba", "--steps", "1"])
