"""The benchmark of anomaly detectors on tables: data sets, settings, stored rows, and the page."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest

from aezoo import registry
from aezoo.bases.frozen_features import FrozenFeatureAutoencoder
from aezoo.errors import AezooError
from benchmarks import adbench, adbench_data, adbench_detectors, parallel, report, report_adbench
from benchmarks.adbench_detectors import parse_detector
from benchmarks.common import ROOT, read_csv

SEEDS = ["--seeds", "2", "--settings", "unsupervised", "--detectors", "default", "vae"]


def rows_of_set(n=200, d=5, share=0.1, seed=0):
    """Normal rows around 0, anomalies around 4; the first column is the row number."""
    generator = np.random.default_rng(seed)
    y = (np.arange(n) < share * n).astype(int)
    x = generator.normal(size=(n, d)) + 4 * y[:, None]
    x[:, 0] = np.arange(n)
    return x, y


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "sets"
    where.mkdir()
    for i, name in enumerate(["3_wine", "12_Apple", "7_cover"]):
        x, y = rows_of_set(seed=i)
        np.savez(where / f"{name}.npz", X=x, y=y)
    return where


# ---- sets ------------------------------------------------------------------------------------------------------------


def test_sets_have_names_without_number_in_alphabetical_order(folder):
    assert [*adbench_data.sets_in(folder)] == ["Apple", "cover", "wine"]
    np.savez(folder / "9_wine.npz", X=np.zeros((4, 2)), y=[0, 0, 1, 1])
    with pytest.raises(AezooError, match=r"3_wine\.npz are both the set wine"):
        adbench_data.sets_in(folder)


def test_folders_and_files_that_are_no_sets_are_refused(tmp_path):
    with pytest.raises(AezooError, match=r"no \.npz in"):
        adbench_data.sets_in(tmp_path)
    np.savez(tmp_path / "a.npz", X=np.zeros((4, 2)))
    with pytest.raises(AezooError, match="contains no array y"):
        adbench_data.sets_in(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"PK none")
    with pytest.raises(AezooError, match=r"cannot read .*fix or remove"):
        adbench_data.sets_in(tmp_path)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.zeros((4, 2)), [0, 0, 1], "got float64"),
        (np.full((4, 2), np.nan), [0, 0, 1, 1], "not finite"),
        (np.zeros((4, 2)), [0, 0, 2, 1], "y must be 0"),
        (np.zeros((4, 2)), [0, 0, 0, 1], "at least two of each"),
        (np.array([["a"], ["b"]]), [0, 1], "X must be numbers"),
        (np.array([[object()], [1]], dtype=object), [0, 1], "cannot read X and y"),
    ],
)
def test_arrays_that_are_no_set_are_refused_without_the_folder(tmp_path, x, y, words):
    np.savez(tmp_path / "bad.npz", X=x, y=y)
    with pytest.raises(AezooError, match=words) as error:
        adbench_data.read_set(tmp_path / "bad.npz")
    assert "bad.npz" in str(error.value) and str(tmp_path) not in str(error.value)


def test_every_third_set_is_for_choosing():
    at_hand = [
        *("cover", "donors", "fault", "Hepatitis", "http", "InternetAds", "Ionosphere", "landsat", "ALOI", "musk"),
        *("Lymphography", "mammography", "mnist", "optdigits", "PageBlocks", "pendigits", "Pima", "annthyroid"),
        *("satimage-2", "shuttle", "skin", "smtp", "SpamBase", "vertebral", "Waveform", "WBC", "Wilt", "wine"),
        *("WPBC", "yeast", "breastw", "Cardiotocography", "celeba"),
    ]
    assert len(at_hand) == 33 and (*sorted(at_hand, key=str.lower)[::3][:10],) == adbench.TUNING


def test_large_sets_keep_the_share_of_anomalies_or_twenty():
    x, y = rows_of_set(n=5000, share=0.1)
    kept, labels = adbench_data.subsample(x, y, 1000, seed=0)
    assert len(kept) == 1000 and labels.sum() == 100 and (np.diff(kept[:, 0]) > 0).all()
    assert np.array_equal(y[kept[:, 0].astype(int)], labels)
    assert adbench_data.subsample(*rows_of_set(n=5000, share=0.006), 1000, seed=0)[1].sum() == 20
    assert adbench_data.subsample(*rows_of_set(n=5000, share=0.002), 1000, seed=0)[1].sum() == 10  # all of them
    assert not np.array_equal(kept, adbench_data.subsample(x, y, 1000, seed=1)[0])


# ---- settings --------------------------------------------------------------------------------------------------------


def split_of(setting, level=0.0, seed=0, share=0.1):
    """A split of rows whose first column is the row number; standardisation keeps its order."""
    return adbench_data.split(*rows_of_set(share=share), setting, level, seed, max_rows=1000)


def test_splits_are_stratified_and_the_same_for_a_seed():
    found = split_of("unsupervised")
    assert len(found.train) == 140 and len(found.test) == 60
    assert found.train_labels.sum() == 14 and found.test_labels.sum() == 6
    assert np.allclose(found.train.mean(0), 0) and np.allclose(found.train.std(0), 1)
    assert not np.allclose(found.test.mean(0), 0)
    again, other = split_of("unsupervised"), split_of("unsupervised", seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    assert not np.array_equal(found.test[:, 1], other.test[:, 1])
    # no row is in both parts
    together = np.concatenate([found.train[:, 0], found.test[:, 0]])
    assert len(np.unique(together.round(6))) == 200


@pytest.mark.parametrize(("setting", "level"), [("clean", 0.0), ("contamination", 0.3), ("noise", 0.5)])
def test_the_test_rows_of_a_seed_are_the_same_in_all_settings(setting, level):
    usual, found = split_of("unsupervised", seed=3), split_of(setting, level, seed=3)
    assert np.array_equal(usual.test_labels, found.test_labels)
    if setting != "noise":
        # standardised by other training rows, which keeps the order of the row numbers
        assert np.array_equal(usual.test[:, 0].argsort(), found.test[:, 0].argsort())


def test_no_anomaly_is_in_clean_training():
    found = split_of("clean")
    assert found.train_labels.sum() == 0 and len(found.train) == 126 and found.test_labels.sum() == 6
    # anomalies are around 4 in units of normal rows, by which mean and scale are computed
    assert np.abs(found.train[:, 1:]).max() < 4.5 and np.allclose(found.train.mean(0), 0)
    assert found.test[found.test_labels == 1][:, 1:].mean() > 3


@pytest.mark.parametrize("level", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("share", [0.03, 0.4])
def test_contamination_resamples_anomalies_of_training(level, share):
    found = split_of("contamination", level, share=share)
    clean, usual = split_of("clean", share=share), split_of("unsupervised", share=share)
    n_normal = len(clean.train)
    assert (found.train_labels == 0).sum() == n_normal
    assert found.train_labels.mean() == pytest.approx(level, abs=1 / n_normal)
    anomalies = found.train[found.train_labels == 1][:, 0]
    n_known = int(usual.train_labels.sum())
    assert len(np.unique(anomalies.round(9))) <= min(n_known, len(anomalies))
    if len(anomalies) <= n_known:
        assert len(np.unique(anomalies.round(9))) == len(anomalies)
    # none of them is a test row
    assert not np.isin(anomalies.round(6), found.test[:, 0].round(6)).any()


@pytest.mark.parametrize(("level", "n"), [(0.1, 1), (0.5, 5)])
def test_irrelevant_columns_are_uniform_and_independent(level, n):
    x, y = rows_of_set(n=2000)
    generator = np.random.default_rng(0)
    noisy = adbench_data.add_irrelevant_columns(x, level, generator)
    assert noisy.shape == (2000, 5 + n)
    old = [next((j for j in range(5) if np.array_equal(noisy[:, i], x[:, j])), None) for i in range(5 + n)]
    assert sorted(j for j in old if j is not None) == [0, 1, 2, 3, 4]
    for i in (i for i, j in enumerate(old) if j is None):
        column = noisy[:, i]
        assert abs(np.corrcoef(column, y)[0, 1]) < 0.1
        within = [(x[:, j].min() <= column.min()) and (column.max() <= x[:, j].max()) for j in range(5)]
        # standard deviation of a uniform distribution
        assert any(within) and column.std() == pytest.approx(np.ptp(column) / np.sqrt(12), rel=0.05)
    found = split_of("noise", level)
    assert found.train.shape == (140, 5 + n) and found.test.shape == (60, 5 + n)


# ---- detectors -------------------------------------------------------------------------------------------------------


def test_detectors_have_settings_of_estimator_or_model():
    found = parse_detector("variational:beta=2,latent_dim=3,hidden_dims=[8,4],lr=1e-3")
    assert found["settings"] == {"model": "vae", "latent_dim": 3, "lr": 0.001,
                                 "model_params": {"beta": 2, "hidden_dims": [8, 4]}}  # fmt: skip
    assert parse_detector("default") == {"party": "aezoo", "name": "default", "settings": {}}
    found = parse_detector("pyod.KNN:n_neighbors=3,method=mean")
    assert found == {"party": "pyod", "name": "KNN", "settings": {"n_neighbors": 3, "method": "mean"}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vea", "did you mean 'vae'"),
        ("pyod.Forest", "PyOD has pyod.AutoEncoder"),
        ("default:betta=1", "neither AutoencoderDetector nor dense_ae has betta"),
        ("vae:beta", "settings are KEY=VALUE"),
        ("vae:hidden_dims=[1", "is not a value"),
    ],
)
def test_unknown_detectors_and_settings_are_refused(text, words):
    with pytest.raises(AezooError, match=words):
        parse_detector(text)


def test_models_of_anomaly_detection_are_among_the_detectors():
    classes = {name: registry.model_class(name) for name in registry.list_models(family="regularised")}
    own_score = {
        name
        for name, cls in classes.items()
        if "score" in vars(cls) and name != "draem" and not issubclass(cls, FrozenFeatureAutoencoder)  # needs images
    }
    assert own_score and own_score <= {*adbench_detectors.ZOO}
    for name in adbench_detectors.ZOO:
        assert registry.create_model(name, (6,)).input_shape == (6,)


def test_missing_pyod_is_reported_with_the_install_command(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AezooError, match=r'pip install "pyod>=3\.6,<4", or give --detectors zoo'):
        adbench.main([str(folder), "--detectors", "pyod.KNN"])
    specs = adbench.plan(adbench.parse_arguments([str(folder), "--detectors", "zoo", "--seeds", "1"]), "noise")
    assert len(specs) == 3 * 2 * 15


def test_sets_are_chosen_by_name_or_by_their_use(folder, monkeypatch):
    def chosen(*names):
        arguments = adbench.parse_arguments([str(folder), "--sets", *names, "--detectors", "vae", "--seeds", "1"])
        return [spec["row"]["dataset"] for spec in adbench.plan(arguments, "clean")]

    monkeypatch.setattr(adbench, "TUNING", ("cover",))
    assert chosen("tuning") == ["cover"] and chosen("judging") == ["Apple", "wine"]
    assert chosen("wine", "tuning", "wine") == ["wine", "cover"]
    with pytest.raises(AezooError, match="no set 'win' in"):
        chosen("win")
    monkeypatch.setattr(adbench, "TUNING", ("pear",))
    with pytest.raises(AezooError, match="--sets tuning: none of them is in"):
        chosen("tuning")


# ---- rows ------------------------------------------------------------------------------------------------------------


def fake_row(module, spec, timeout, variables, warm):
    """A row without training; `vae` fails on the data set cover."""
    row = spec["row"]
    if row["detector"] == "vae" and row["dataset"] == "cover":
        return {"error": "ValueError: no"}
    figures = {"auroc": 0.9 if row["detector"] == "default" else 0.7, "aupr": 0.4, "test_rows": 60}
    return figures | {"test_anomalies": 6, "fit_seconds": 2.0, "fit_cpu_seconds": 1.0, "version": "aezoo 1"}


def test_interrupted_run_continues(folder, tmp_path, monkeypatch):
    measured = []

    def dies(module, spec, *rest, **options):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(tuple(spec["row"].values()))
        return fake_row(module, spec, *rest, **options)

    monkeypatch.setattr(parallel.processes, "run_row", dies)
    words = [f"{folder}/", *SEEDS, "--results", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        adbench.main(words)
    (path,) = tmp_path.glob("adbench-unsupervised-fp32-*.csv")
    assert 4 <= len(read_csv(path)[1]) <= 5
    before = [*measured]

    def goes_on(module, spec, *rest, **options):
        measured.append(tuple(spec["row"].values()))
        return fake_row(module, spec, *rest, **options)

    monkeypatch.setattr(parallel.processes, "run_row", goes_on)
    kept = read_csv(path)[1]
    adbench.main(words)
    (command,), rows = read_csv(path)
    assert command == f"python -m benchmarks.adbench FOLDER {' '.join(SEEDS)}"
    assert rows[: len(kept)] == kept and len(rows) == 3 * 2 * 2
    assert len(measured) == len(before) + 12 - len(kept) and str(tmp_path) not in path.read_text()
    measured.clear()
    adbench.main(words)
    assert not measured
    adbench.main([*words, "--again", "failed"])
    assert [name for name, *_ in measured] == ["cover", "cover"]


@pytest.mark.slow
def test_rows_of_real_detectors_in_their_processes(folder, tmp_path):
    detectors = ["--detectors", "default:max_epochs=60", "dense_ae:max_epochs=0"]
    words = [str(folder), "--sets", "wine", "--seeds", "1", "--settings", "clean", "noise", *detectors]
    adbench.main([*words, "--results", str(tmp_path)])
    (path,) = tmp_path.glob("adbench-clean-*.csv")
    good, failed = read_csv(path)[1]
    assert tuple(good) == (*adbench.COLUMNS[:-1], "processor", "error")
    assert {name for name, cell in good.items() if not cell} == {"error"}
    assert (good["train_rows"], good["train_anomalies"], good["test_rows"], good["test_anomalies"]) == (
        *("126", "0", "60", "6"),
    )
    # far from the normal rows, anomalies must have high scores
    assert float(good["auroc"]) > 0.9 and float(good["aupr"]) > 0.5 and float(good["fit_cpu_seconds"]) > 0
    assert failed["error"].startswith("AezooError: max_epochs must be at least 1") and not failed["auroc"]
    (path,) = tmp_path.glob("adbench-noise-*.csv")
    assert [row["setting"] for row in read_csv(path)[1]] == ["noise=0.1"] * 2 + ["noise=0.5"] * 2


@pytest.mark.slow
def test_a_killed_process_resumes(folder, tmp_path):
    words = [str(folder), "--sets", "wine", "cover", "--seeds", "1", "--settings", "clean", "--detectors"]
    words += ["default:max_epochs=1", "--results", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.adbench", *words], cwd=ROOT)
    until = time.monotonic() + 300
    while not [*tmp_path.glob("adbench-clean-*.csv")] and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    (path,) = tmp_path.glob("adbench-clean-*.csv")
    first = read_csv(path)[1]
    assert len(first) == 1
    adbench.main(words)
    rows = read_csv(path)[1]
    assert rows[:1] == first and len(rows) == 2 and not any(row["error"] for row in rows)


@pytest.mark.slow
def test_a_fit_that_takes_too_long_is_a_row(folder, tmp_path):
    words = [str(folder), "--sets", "wine", "--seeds", "1", "--settings", "clean", "--timeout", "2"]
    adbench.main([*words, "--detectors", "default:max_epochs=1000000", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("adbench-clean-*.csv")
    assert [row["error"] for row in read_csv(path)[1]] == ["no result after 2 s"]


def test_a_score_that_is_not_finite_is_an_error(folder, monkeypatch):
    from benchmarks import adbench_row

    spec = {"file": str(folder / "3_wine.npz"), "kind": "clean", "level": 0.0}
    spec |= {"detector": parse_detector("default"), "row": {"seed": 0, "max_rows": 1000}}
    answers = iter([np.nan, 0.0])

    def fits(x):
        assert len(x) == 126
        return lambda test: np.full(len(test), next(answers))

    monkeypatch.setattr(adbench_row, "detector", lambda **_: (fits, "x 1"))
    with pytest.raises(FloatingPointError, match="not finite"):
        adbench_row.measure(spec)
    # equal scores: AUROC of a random score, and the share of anomalies as AUPR
    found = adbench_row.measure(spec)
    assert found["auroc"] == 0.5 and found["aupr"] == pytest.approx(0.1)


# ---- the page --------------------------------------------------------------------------------------------------------


def test_failed_fits_are_chance_unfinished_are_left_out(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel.processes, "run_row", fake_row)
    adbench.main([str(folder), *SEEDS, "--results", str(tmp_path)])
    adbench.main([str(folder), *SEEDS[2:-2], "rae", "--sets", "wine", "--seeds", "1", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("*.csv")
    table = report_adbench.table_of(read_csv(path)[1])
    assert table.sets == ["Apple", "cover", "wine"] and table.detectors == ["default", "vae"]
    assert table.unfinished == {"rae": 5} and table.seeds == ["0", "1"]
    assert table.values["auroc"].tolist() == [[0.9, 0.7], [0.9, 0.5], [0.9, 0.7]]
    assert table.values["aupr"][1].tolist() == [0.4, 0.1]


def test_the_page_has_means_ranks_and_tests_of_the_judging_sets(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel.processes, "run_row", fake_row)
    monkeypatch.setattr(report_adbench, "TUNING", ("Apple",))
    adbench.main([str(folder), *SEEDS, "--results", str(tmp_path)])
    report.main(["--results", str(tmp_path)])
    page = (tmp_path / "adbench.md").read_text()
    assert page.startswith("# Anomaly detection on tables\n\n[All results](RESULTS.md)\n\n")
    assert "3 sets, 2 of them judge; seeds 0, 1; aezoo 1;" in page
    # fits took 2 s of wall time and 1 s of processor time
    assert "by the clock, fits took 2 times their processor time" in page
    # on the two judging sets: AUROC of vae is (0.5 + 0.7) / 2, AUPR (0.1 + 0.4) / 2; p = 2 / 2^2, since both differ
    assert "| default | 0.9 | 0.4 | 1 | 1.25 |  | 0.9 | 0.4 |  | 0.9 | 1 (2) |  |" in page
    assert "| vae | 0.6 | 0.25 | 2 | 1.75 | 0.5 | 0.633 | 0.3 | 0.25 | 0.7 | 1 (2) | 2 |" in page
    assert "| Apple (tuning) | " in page and "| wine | " in page
    (link,) = re.findall(r"!\[.*\]\((.*\.png)\)", page)
    assert (tmp_path / link).read_bytes().startswith(b"\x89PNG")


def test_levels_of_a_setting_are_averaged_and_shown(folder, tmp_path, monkeypatch):
    def by_level(module, spec, *rest, **options):
        return fake_row(module, spec, *rest, **options) | {"auroc": 1 - spec["level"], "error": None}

    monkeypatch.setattr(parallel.processes, "run_row", by_level)
    words = [str(folder), "--settings", "contamination", "--detectors", "default", "--seeds", "1"]
    adbench.main([*words, "--results", str(tmp_path)])
    page = report.pages(tmp_path, tmp_path)[0]["adbench.md"]
    assert "| AUROC, contamination=0.1 | AUROC, contamination=0.2 | AUROC, contamination=0.3 |" in page
    assert re.search(r"^\| default \| 0\.8 \| .* \| 0\.9 \| 0\.8 \| 0\.7 \|$", page, flags=re.MULTILINE)
    assert "; seed 0, which does not show how far seeds differ;" in page and "\n## adbench-contamination-" in page


def test_without_complete_rows_the_report_says_so(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel.processes, "run_row", fake_row)
    for detector, dataset in (("default", "Apple"), ("vae", "wine")):
        words = [str(folder), *SEEDS[:-2], detector, "--sets", dataset]
        adbench.main([*words, "--results", str(tmp_path)])
    report.main(["--results", str(tmp_path)])
    assert "no detector has all its rows" in capsys.readouterr().out
    assert not (tmp_path / "adbench.md").exists()
