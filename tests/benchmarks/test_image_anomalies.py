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
    assert {row["method"] for row in rows} == {*image_anomalies.METHODS, *image_anomalies.VECTOR_MODELS}
    assert str(tmp_path) not in str(head)
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
    words = ["--data", "digits", "--classes", "3", "--seeds", "1", "--results", str(tmp_path)]
    image_anomalies.main([*words, "--seconds", "1", "--models", "padim", "conv_ae", "knn"])
    (path,) = tmp_path.glob("image-anomalies-*.csv")
    found = {row["method"]: row for row in read_csv(path)[1]}
    assert {name: row["stopped"] for name, row in found.items()} == {
        "padim": "one epoch",
        "conv_ae": "capped",
        "knn": "",
    }
    assert {(row["train_rows"], row["test_rows"]) for row in found.values()} == {("147", "180")}
    assert all(float(row["auroc"]) > 0.6 for row in found.values())
    # a longer limit repeats what was capped, and only that
    image_anomalies.main([*words, "--seconds", "300", "--models", "padim", "conv_ae", "knn"])
    again = {row["method"]: row for row in read_csv(path)[1]}
    assert again["conv_ae"]["stopped"] == "converged" and int(again["conv_ae"]["steps"]) % 200 == 0
    assert again["padim"] == found["padim"] and again["knn"] == found["knn"]


def test_published_figures_have_a_source():
    text = report_image_anomalies.published_table([])
    assert text.count("anomalib 2.7") == len(report_image_anomalies.PUBLISHED)
    assert "| patchcore | Wide ResNet-50 | 0.980 | 0.980 |" in text


def test_seeds_are_merged_and_classes_averaged():
    shared = {"data": "d", "method": "vae", "aupr": "0.5", "seconds": "2", "stopped": "converged"}
    rows = [
        shared | {"normal": normal, "seed": str(seed), "auroc": value}
        for normal, values in {"a": ("0.6", "0.8", "0.9"), "b": ("1.0", "1.0", "0.9")}.items()
        for seed, value in enumerate(values)
    ]
    rows[-1] |= {"stopped": "capped"}
    (row,) = report_image_anomalies.means(rows)
    assert (row["classes"], row["seeds"], row["ended"]) == ("2", "3", "5 converged, 1 capped")
    assert float(row["auroc"]) == pytest.approx(0.9) and float(row["aupr"]) == 0.5
    assert "| vae | 0.8 | 1 |" in report_image_anomalies.tables(rows)
