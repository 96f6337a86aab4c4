"""metrics.csv, curves.png and the comparisons at the end of a fit."""

import csv
import math
from pathlib import Path

import pytest
import torch
from callback_fakes import Fake, FakeVAE, digits
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from sklearn.decomposition import PCA
from torch.utils.data import DataLoader

import aezoo
from aezoo.callbacks import Checkpoints, CodeStatistics, EarlyStop, LearningCurves, Summary
from aezoo.callbacks.learning_curves import MetricsCSV, pca_error


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_each_epoch_has_a_line_whatever_the_logger(fit, events, tmp_path):
    fit(aezoo.create_model("dense_ae", input_shape=(1, 8, 8)), LearningCurves(), max_epochs=3)
    found = rows(tmp_path / "run" / "0")
    assert [(row["epoch"], row["step"]) for row in found] == [("0", "3"), ("1", "6"), ("2", "9")]
    for name in ("train/loss", "val/loss", "val/mse"):
        assert [float(row[name]) for row in found] == [event.value for event in events().Scalars(name)]
    assert (tmp_path / "run" / "0" / "pictures" / "curves.png").is_file()
    fit(Fake((4,)), LearningCurves(), logger=False, check_val_every_n_epoch=2, max_epochs=3)
    assert [bool(row["val/loss"]) for row in rows(tmp_path)] == [False, True, False]
    fit(Fake((4,)), LearningCurves(), logger=CSVLogger(tmp_path, name="csv", version="0"))
    assert "train/loss_epoch" in rows(tmp_path / "csv" / "0")[0] or "val/loss" in rows(tmp_path / "csv" / "0")[0]
    assert (tmp_path / "csv" / "0" / "pictures" / "curves.png").is_file()
    (tmp_path / "metrics.csv").unlink()
    fit(Fake((4,)), LearningCurves(), logger=False, fast_dev_run=True)
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.slow
def test_a_resumed_run_continues_its_curves(fit, tmp_path):
    def run(name, epochs, ckpt_path=None):
        curves, saver = LearningCurves(), Checkpoints()
        fit(
            aezoo.create_model("dense_ae", input_shape=(1, 8, 8)), curves, saver, max_epochs=epochs,
            logger=TensorBoardLogger(tmp_path, name=name, version=""), enable_checkpointing=True, ckpt_path=ckpt_path,
        )  # fmt: skip
        stored = torch.load(saver.last_model_path, weights_only=True)["callbacks"]["LearningCurves"]["rows"]
        return saver.last_model_path, curves.curves, stored, rows(tmp_path / name)

    last, first, kept, lines = run("run", 2)
    Path(last).rename(tmp_path / "two.ckpt")
    run("run", 5, str(tmp_path / "two.ckpt"))  # an abandoned branch
    _, curves, stored, found = run("run", 4, str(tmp_path / "two.ckpt"))
    assert curves.epochs == [1, 2, 3, 4] and curves.steps == 12
    assert curves.train[:2] == first.train and curves.val[:2] == first.val
    assert stored[:2] == kept and [row[0] for row in stored] == [0, 1, 2, 3]
    assert found[:2] == lines and [row["step"] for row in found] == ["3", "6", "9", "12"]


def test_table_is_rewritten_only_if_necessary(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsCSV(path)
    table.add({"epoch": 0, "step": 3, "b": 1.5})
    table.add({"epoch": 1, "step": 6, "b": 2.5})
    assert path.read_text() == "epoch,step,b\n0,3,1.5\n1,6,2.5\n"
    table.add({"epoch": 1, "step": 6, "b": 3.5, "a": 0.5})
    assert path.read_text() == "epoch,step,a,b\n0,3,,1.5\n1,6,0.5,3.5\n"
    with path.open("a") as file:
        file.write("2,9")  # as left by a killed run
    table = MetricsCSV(path)
    table.resume(6)
    table.add({"epoch": 2, "step": 9, "b": 4.5})
    table.add({"epoch": 3, "step": 12, "b": 5.5})
    assert path.read_text() == "epoch,step,a,b\n0,3,,1.5\n1,6,0.5,3.5\n2,9,,4.5\n3,12,,5.5\n"


@pytest.mark.parametrize("shape", [(100, 3, 4), (40, 60)])
def test_pca_error_is_that_of_scikit_learn(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) @ torch.randn(shape[-1], shape[-1], generator=generator) + 3
    fit, test = x[::2].flatten(1).numpy(), x[1::2].flatten(1).numpy()
    pca = PCA(5).fit(fit)
    expected = ((pca.inverse_transform(pca.transform(test)) - test) ** 2).mean()
    assert pca_error(x, 5) == pytest.approx(expected, rel=1e-4)
    for n_components in (0, 12 if len(shape) == 3 else 20):
        assert math.isnan(pca_error(x, n_components))
    x[1, 0] = math.nan
    assert math.isnan(pca_error(x, 5))


@pytest.mark.slow
def test_dead_units_and_pca_are_found_at_the_end_of_a_fit(fit):
    def history(model, *callbacks):
        with torch.no_grad():
            [*model.encoder.parameters()][-2][:2] = 0
        model.lr = 0.0
        curves = LearningCurves()
        fit(model, curves, *callbacks, max_epochs=1)
        return curves.curves

    assert (history(Fake((1, 6, 6))).dead_units, history(Fake((1, 6, 6))).units) == (2, 4)
    assert history(FakeVAE((1, 6, 6)), CodeStatistics()).dead_units >= 2
    model = aezoo.create_model("dense_ae", input_shape=(1, 6, 6), latent_dim=4, likelihood="gaussian")
    found = history(model)
    x = digits((1, 6, 6)).tensors[0]
    assert found.pca_mse == pca_error(x, 4) < found.mse
    sparse = aezoo.create_model("sparse_ae_l1", input_shape=(1, 6, 6))
    assert history(sparse, CodeStatistics()).units > 4
    assert math.isnan(history(Fake((1, 6, 6), denoising=True)).pca_mse)


@pytest.mark.slow
def test_the_summary_has_notes_and_commands(fit, capsys, monkeypatch, tmp_path):
    stop = EarlyStop(patience=1, min_delta=1e9)
    fit(FakeVAE((4,)), LearningCurves(), stop, Summary(), enable_checkpointing=True, max_epochs=5)
    out = capsys.readouterr().out
    assert "Note: stopped early: 1 epoch without improvement of val/loss after epoch " in out
    commands = [line.split()[2] for line in out.splitlines() if line.startswith("Next: aezoo")]
    assert commands == ["test", "generate", "reconstruct", "detect", "embed"]
    monkeypatch.chdir(tmp_path)
    fit(Fake((4,), denoising=True), LearningCurves(), Checkpoints(), Summary(), enable_checkpointing=True)
    out = capsys.readouterr().out
    assert "Note: 6 steps only: aezoo fit --ckpt_path run/0 --trainer.max_epochs 167 continues" in out
    assert "Next: aezoo denoise --ckpt_path" in out and "generate" not in out
    trainer = fit(Fake((4,)), LearningCurves(), Summary(), limit_val_batches=0)
    assert "Note: 6 steps only: --trainer.max_epochs 167 continues" in capsys.readouterr().out
    trainer.test(Fake((4,)), DataLoader(digits((4,)), 16), verbose=False)
    assert "Note:" not in capsys.readouterr().out
