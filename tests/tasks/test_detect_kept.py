"""Calibration stored with the weights: the same decisions without training data, and only for the same weights."""

import csv

import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer
from safetensors.torch import load_file, save_file

import aezoo
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.sklearn import AutoencoderDetector
from aezoo.tasks.detect import Detector, detect
from aezoo.tasks.detectors import _MAX_STATE
from aezoo.training.data_statistics import DataStatistics

NAMES = ("deviance", "mahalanobis", "nap", "combined", "deep_svdd")


def drawn(n, seed):
    return (np.random.default_rng(seed).normal(size=(n, 6)) * [3, 2, 1, 1, 1, 0.5] + 1).astype(np.float32)


def model(seed=0):
    torch.manual_seed(seed)
    return aezoo.create_model(
        "dense_ae", (6,), latent_dim=2, hidden_dims=(5,), activation="relu", likelihood="gaussian"
    )


@pytest.mark.parametrize("score", NAMES)
def test_kept_calibration_gives_the_same_decisions(tmp_path, score):
    first = model()
    given = {"score": score, "svdd_epochs": 1, "baselines": False, "contamination": 0.2}
    x = drawn(50, 3)
    before = detect(first, x, fit_on=drawn(200, 1), calibrate_on=drawn(99, 2), **given)
    first.data_statistics = before.statistics
    again = aezoo.load_model(aezoo.save_model(first, tmp_path))
    after = detect(again, x, **given)
    assert np.array_equal(after.scores, before.scores) and np.array_equal(after.p_values, before.p_values)
    assert after.threshold == before.threshold and 0 < after.is_anomaly.sum() < 50
    assert "99 held-out samples" in after.summary() and after.statistics is None
    # given data take precedence
    other = detect(again, x, fit_on=drawn(200, 4), calibrate_on=drawn(60, 5), **given)
    assert other.threshold != before.threshold and "60 held-out samples" in other.summary()


def test_few_training_samples_are_kept_alike(tmp_path):
    """With fewer training samples than features, nap only stores the directions that these span."""
    first, x = model(), drawn(20, 3)
    before = detect(first, x, score="nap", fit_on=drawn(9, 1), calibrate_on=drawn(30, 2), baselines=False)
    first.data_statistics = before.statistics
    again = aezoo.load_model(aezoo.save_model(first, tmp_path))
    assert np.array_equal(detect(again, x, score="nap", baselines=False).p_values, before.p_values)


def flags(home, *more):
    quick = ["--n_shown", "0", "--baselines", "false", "--out", str(home / "out")]
    main(["detect", "--ckpt_path", str(home), *quick, *more])
    rows = [*csv.DictReader((home / "out" / "scores.csv").read_text().splitlines())]
    return [(row["score"], row["p_value"], row["is_anomaly"]) for row in rows]


def test_command_line_stores_calibration_next_to_the_weights(tmp_path, capsys):
    x = drawn(400, 1)
    np.savez(tmp_path / "data.npz", x_train=x[:200], x_val=x[200:300], x_test=x[300:])
    np.save(tmp_path / "new.npy", x[300:])
    home = aezoo.save_model(model(), tmp_path / "model")
    data = ["--data", str(tmp_path / "data.npz"), "--data.scale", "none", "--score", "combined,deviance"]
    before = flags(home, *data)
    assert f"{home / 'calibration.safetensors'} stores the calibration" in capsys.readouterr().out
    (tmp_path / "data.npz").unlink()
    assert flags(home, "--input", str(tmp_path / "new.npy"), "--score", "combined") == before
    assert "100 held-out samples" in capsys.readouterr().out
    # also in another folder, and in one file
    again = aezoo.save_model(aezoo.load_model(home), tmp_path / "again")
    assert sorted(path.name for path in again.iterdir()) == ["config.json", "model.safetensors"]
    assert flags(again, "--input", str(tmp_path / "new.npy"), "--score", "combined") == before
    assert aezoo.load_model(again).data_statistics.scores.keys() == {"combined", "deviance"}


def test_calibration_of_other_weights_is_not_used(tmp_path, capsys):
    first = model()
    first.data_statistics = detect(first, drawn(9, 3), calibrate_on=drawn(30, 2), baselines=False).statistics
    home = aezoo.save_model(model(seed=1), tmp_path)
    aezoo.io.calibration.write(home, first)
    assert aezoo.load_model(home).data_statistics is None
    assert "calibration.safetensors belongs to other weights and is ignored" in capsys.readouterr().err
    aezoo.io.calibration.write(aezoo.save_model(model(), tmp_path), first)
    assert len(aezoo.load_model(home).data_statistics.scores["deviance"]) == 30


def test_training_removes_the_calibration():
    found = model()
    found.data_statistics = DataStatistics(None, {"deviance": torch.rand(9)})
    data = aezoo.DataModule.from_arrays(drawn(40, 1), scale="none", batch_size=20, val_fraction=0)
    quiet_trainer(max_steps=1).fit(found, data)
    assert found.data_statistics is None


def test_damaged_calibration_is_refused_in_one_line(tmp_path):
    first, train, held_out = model(), drawn(60, 1), drawn(30, 2)
    found = detect(first, train, score="mahalanobis,combined", fit_on=train, calibrate_on=held_out, baselines=False)
    first.data_statistics = found.statistics
    home = aezoo.save_model(first, tmp_path)
    whole = load_file(home / "model.safetensors")
    prefix = "data_statistics.states."
    cases = {
        "mahalanobis.mean": torch.zeros(3, dtype=torch.float64),
        "mahalanobis.n": torch.zeros(2, dtype=torch.int64),
        "combined.code_mean": torch.zeros(7, dtype=torch.float64),
        "combined.values": torch.zeros(2),
    }
    for key, value in cases.items():
        assert prefix + key in whole
        save_file(whole | {prefix + key: value}, home / "model.safetensors")
        with pytest.raises(AezooError, match=r"is not for the score .* of this model .*: run detect with") as refused:
            detect(aezoo.load_model(home), train, score=key.partition(".")[0])
        assert "\n" not in str(refused.value)
    del whole[prefix + "combined.sorted"]
    save_file(whole, home / "model.safetensors")
    with pytest.raises(AezooError, match="is not for the score combined of this model"):
        detect(aezoo.load_model(home), train, score="combined")
    save_file(whole | {prefix + "combined.mean": torch.full((6,), torch.nan)}, home / "model.safetensors")
    with pytest.raises(AezooError, match="the statistics of its scores are not finite"):
        aezoo.load_model(home)
    (home / "calibration.safetensors").write_bytes(b"no tensors")
    save_file(whole, home / "model.safetensors")
    with pytest.raises(AezooError, match=r"cannot read .*calibration.safetensors: .*; delete it"):
        aezoo.load_model(home)


def test_large_states_and_training_scores_are_not_kept(monkeypatch):
    detector = Detector(model(), "mahalanobis").fit(drawn(50, 1))
    assert not detector.statistics().scores
    detector.fit(drawn(50, 1), calibrate_on=drawn(30, 2))
    assert detector.statistics().scores.keys() == detector.statistics().states.keys() == {"mahalanobis"}
    monkeypatch.setattr("aezoo.tasks.detectors._MAX_STATE", 8)
    assert _MAX_STATE == 2**28 and not detector.statistics().scores


def test_estimator_and_detect_decide_alike(tmp_path):
    """For raw values in a file, in the units of X, with the calibration in the estimator's model."""
    x = np.float64(drawn(700, 1)) * [1, 100, 1e-3, 1, 1, 1] + [1e6, 5, 0, 0, 0, 0]
    x[600:] += np.random.default_rng(9).normal(size=(100, 6)) * x.std(0) * 3
    # 99 of 500 samples are held out, so that the threshold is the score of one of them
    estimator = AutoencoderDetector(random_state=0, max_epochs=3, calibration_fraction=0.198).fit(x[:500])
    assert estimator.n_calibration_ == 99
    home = aezoo.save_model(estimator.autoencoder_, tmp_path / "model")
    np.save(tmp_path / "new.npy", x)
    found = flags(home, "--input", str(tmp_path / "new.npy"), "--score", "combined")
    assert [row[2] == "True" for row in found] == (estimator.predict(x) == -1).tolist()
    assert [float(row[1]) for row in found[500:]] == pytest.approx(estimator.p_values(x[500:]))
    by_rate = flags(home, "--input", str(tmp_path / "new.npy"), "--score", "combined", "--fdr", "0.05")
    assert [row[2] == "True" for row in by_rate] == (estimator.predict(x, fdr=0.05) == -1).tolist()
