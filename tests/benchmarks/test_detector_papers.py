"""Detectors in the settings of their papers: data, training, rows and their table."""

import struct
from statistics import mean

import numpy as np
import pytest
import torch

import aezoo
from aezoo.errors import AezooError
from benchmarks import detector_papers, report_detector_papers
from benchmarks.common import read_csv
from benchmarks.detector_papers import PAPERS, Phase

RNG = np.random.default_rng(0)


@pytest.fixture
def tables(tmp_path):
    """A folder with a set of 300 normal rows and 30 anomalies far from them, named as ADBench's shuttle."""
    folder = tmp_path / "sets"
    folder.mkdir()
    x, y = RNG.normal(0, 1, (330, 9)), np.arange(330) >= 300
    x[y] += 6
    x[:, 8] = 5.0  # a column without variance
    np.savez(folder / "32_shuttle.npz", X=x, y=y.astype(int))
    return folder


def test_half_of_each_class_is_held_out(tables):
    first = detector_papers.halves(tables / "32_shuttle.npz", 0)
    assert len(first.train) == len(first.test) == 165 and first.anomalous.sum() == 15
    whole = torch.cat([first.train, first.test])
    assert whole.min() == 0 and whole.max() == 1 and whole.isfinite().all()
    assert not torch.equal(first.train, detector_papers.halves(tables / "32_shuttle.npz", 1).train)


def test_local_contrast_removes_brightness_and_contrast():
    x = torch.rand(3, 1, 4, 4)
    found = detector_papers.local_contrast(x)
    torch.testing.assert_close(found.abs().mean((1, 2, 3)), torch.ones(3))
    torch.testing.assert_close(found, detector_papers.local_contrast(5 * x - 2))


def test_ae1svm_loss_weighs_the_mean_squared_error_by_alpha(tables, monkeypatch):
    (paper,) = (paper for paper in PAPERS if paper.data == "adbench:shuttle")
    models = []
    monkeypatch.setattr(detector_papers, "train", lambda model, *_: models.append(model))
    samples = detector_papers.halves(tables / "32_shuttle.npz", 0)
    detector_papers.measure(paper, samples, 0)
    (model,), x = models, samples.train[:16]
    terms = model.loss(x)
    # alpha mse + SVM of the authors' code, up to a factor and a constant
    squares = (model(x) - x).square().mean()
    constant = terms["nll"] - x[0].numel() / 2 * squares
    expected = x[0].numel() / 2 / paper.alpha * (paper.alpha * squares + terms["svm"]) + constant
    torch.testing.assert_close(terms["loss"], expected)


def test_svdd_phase_keeps_the_decoder():
    model, x = aezoo.create_model("deep_svdd", (6,), latent_dim=2, hidden_dims=(4,)), torch.rand(40, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    detector_papers.train(model, x, Phase(2, 1e-2, "svdd"), 10)
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"encoder"}


def test_deep_svdd_on_mnist_has_the_network_of_its_authors(monkeypatch):
    (paper,) = (paper for paper in PAPERS if paper.model == "deep_svdd")
    models = []
    monkeypatch.setattr(detector_papers, "train", lambda model, *_: models.append(model))
    x = torch.rand(30, 1, 28, 28)
    samples = detector_papers.Samples(x, x, np.arange(30) < 5)
    detector_papers.measure(paper, samples, 0)
    model = models[-1]
    # 5 x 5 kernels of 8 and 4 channels, 2 x 2 pooling twice, 32 numbers; nothing but weights is trained
    shapes = [(*weight.shape,) for weight in model.encoder.parameters()]
    assert shapes == [(8, 1, 5, 5), (4, 8, 5, 5), (32, 4 * 7 * 7)]
    model.eval()
    assert model(x).shape == x.shape and not model.encoder(torch.zeros_like(x)).any()
    codes = model.encoder(x)
    torch.testing.assert_close(model.centre_D.sign(), codes.mean(0).sign())
    torch.testing.assert_close(model.score(x), (codes - model.centre_D).square().sum(1))


def test_rows_are_written_once_and_merged(tables, tmp_path, capsys):
    words = ["--adbench", str(tables), "--seeds", "2", "--epochs", "1", "--results", str(tmp_path / "out")]
    detector_papers.main(words)
    (path,) = (tmp_path / "out").glob("detector-papers-*.csv")
    head, rows = read_csv(path)
    assert [(row["model"], row["data"], row["seed"]) for row in rows] == [("ae1svm", "shuttle", s) for s in "01"]
    assert str(tables) not in str(head) and {row["train_rows"] for row in rows} == {"165"}
    before = path.read_text()
    detector_papers.main(words)
    assert path.read_text() == before
    (merged,) = report_detector_papers.merge_seeds(rows)
    assert float(merged["auroc"]) == pytest.approx(mean(float(row["auroc"]) for row in rows))
    difference = float(merged["auroc"]) - 0.9748
    assert f"| {difference:+.4f} | the authors' notebooks" in report_detector_papers.tables(rows)
    with pytest.raises(SystemExit):
        detector_papers.main(["--adbench", str(tables), "--only", "deep_svdd", "--results", str(tmp_path)])
    assert "with the data of one of the models" in capsys.readouterr().err


def test_one_digit_is_normal(tmp_path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 40), ("t10k", 20)):
        images = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + images.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels.tobytes())
    samples = detector_papers.one_digit(str(tmp_path), "3", True)
    assert samples.train.shape == (4, 1, 28, 28) and samples.train.min() == 0 and samples.train.max() == 1
    assert np.flatnonzero(~samples.anomalous).tolist() == [3, 13]
    with pytest.raises(AezooError, match="give the folder that contains MNIST/raw with --root"):
        detector_papers.one_digit(str(tmp_path / "elsewhere"), "3", True)
