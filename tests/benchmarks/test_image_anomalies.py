"""The benchmark of image anomalies: its methods compared with the zoo's models and SciPy, its rows, and its table."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist, mahalanobis

from aezoo.errors import AezooError
from benchmarks import image_anomalies, report_image_anomalies
from benchmarks.common import read_csv

RNG = np.random.default_rng(0)


def test_methods_match_their_definitions():
    train, x = RNG.normal(2, 1, (40, 5)) @ RNG.normal(0, 1, (5, 5)), RNG.normal(0, 1, (6, 5))
    found = {name: method(train)(x) for name, method in image_anomalies.METHODS.items()}
    inverse = np.linalg.inv(np.cov(train.T) + 0.01 * np.eye(5))
    np.testing.assert_allclose(found["gaussian"], [mahalanobis(row, train.mean(0), inverse) for row in x])
    np.testing.assert_allclose(found["nearest"], cdist(x, train).min(1))
    np.testing.assert_allclose(found["mean"], cdist(x, train.mean(0)[None])[:, 0])
    directions = np.linalg.svd(train - train.mean(0))[2][:2]
    off = x - train.mean(0)
    np.testing.assert_allclose(found["fre"], np.square(off - off @ directions.T @ directions).sum(1))


def test_features_give_a_row_for_each_method_once(tmp_path, capsys):
    (tmp_path / "net").mkdir()
    x, y = RNG.normal(0, 1, (60, 8)), np.arange(60) < 20
    x[y] += 4
    np.savez(tmp_path / "net/bottle.npz", X=x, y=y)
    words = ["--features", str(tmp_path), "--seeds", "1", "--results", str(tmp_path / "out")]
    image_anomalies.main(words)
    (path,) = (tmp_path / "out").glob("image-anomalies-*.csv")
    head, rows = read_csv(path)
    assert {row["method"] for row in rows} == image_anomalies.METHODS.keys() and str(tmp_path) not in str(head)
    assert {(row["train_rows"], row["test_rows"]) for row in rows} == {("28", "32")}
    assert all(float(row["auroc"]) > 0.95 for row in rows)
    before = path.read_text()
    image_anomalies.main(words)
    assert path.read_text() == before
    with pytest.raises(AezooError, match="has no folders with"):
        image_anomalies.main(["--features", str(tmp_path / "net"), "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        image_anomalies.main([])
    assert "give --features DIR or --data NAME" in capsys.readouterr().err


@pytest.mark.slow
def test_models_are_trained_on_one_class(tmp_path):
    words = ["--data", "digits", "--classes", "3", "--models", "padim", "--seeds", "1", "--results", str(tmp_path)]
    image_anomalies.main(words)
    (path,) = tmp_path.glob("image-anomalies-*.csv")
    (row,) = read_csv(path)[1]
    assert row["epochs"] == "1" and 50 < int(row["train_rows"]) < 200 and float(row["auroc"]) > 0.6


def test_published_figures_have_a_source():
    text = report_image_anomalies.published_table([])
    assert text.count("anomalib 2.7") == len(report_image_anomalies.PUBLISHED)
    assert "| patchcore | Wide ResNet-50 | 0.980 | 0.980 |" in text


def test_seeds_are_merged_and_classes_averaged():
    rows = [
        {"data": "d", "normal": normal, "method": "fre", "epochs": "", "seed": str(seed), "auroc": value, "aupr": "0.5"}
        for normal, values in {"a": ("0.6", "0.8", "0.9"), "b": ("1.0", "1.0", "0.9")}.items()
        for seed, value in enumerate(values)
    ]
    first, second = report_image_anomalies.merge_seeds(rows)
    assert (first["auroc"], first["auroc_low"], first["auroc_high"], first["seeds"]) == ("0.8", "0.6", "0.9", "3")
    assert second["auroc"] == "1.0" and "| d | fre | 2 | 0.900 |" in report_image_anomalies.tables(rows)
