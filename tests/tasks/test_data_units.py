"""Commands in Python with models trained on scaled tables use the units of the table or refuse."""

import json
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pandas
import pytest
import torch

import aezoo
from aezoo.errors import AezooError
from aezoo.io.checkpoint import load_run
from aezoo.training.data_units import DataUnits

NAMES = ["age", "income", "temperature"]
MEAN, DEVIATION = np.array([50.0, 40000.0, 37.0]), np.array([15.0, 10000.0, 0.5])


@pytest.fixture(scope="module")
def z():
    return np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def frame(z):
    return pandas.DataFrame(z * DEVIATION + MEAN, columns=NAMES)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = aezoo.create_model("vae", (3,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian").eval()
    scaling = {"offset": torch.from_numpy(MEAN), "factor": torch.from_numpy(DEVIATION)}
    model.data_units = DataUnits(scaling, None, tuple(NAMES), is_table=True)
    return model


def test_dataframe_is_scaled_as_the_training_table(model, frame, z):
    found, scaled = aezoo.reconstruct(model, frame), aezoo.reconstruct(model, z)
    assert np.allclose(found.mse, scaled.mse, rtol=1e-4)
    row = found.columns[1]
    assert row["column"] == "income" and row["deviation"] == pytest.approx(frame["income"].std(ddof=0), rel=1e-3)
    scores, expected = (aezoo.detect(model, x, fit_on=x, score="mse").table for x in (frame, z))
    assert np.allclose(scores["score"], expected["score"], rtol=1e-3)
    assert (scores["is_anomaly"] == expected["is_anomaly"]).all()
    assert aezoo.generate(model, n=400).table.mean()["income"] == pytest.approx(40000, abs=20000)


def test_datamodule_of_another_scale_gives_the_same(model, frame):
    of_units = aezoo.reconstruct(model, frame).mse
    for scale in ("auto", "standard", "none"):
        data = aezoo.DataModule.from_arrays(frame, scale=scale, val_fraction=0.1, test_fraction=0.5)
        rows = data.columns.values(data.tensors("test")[0])[:, 0].round(2)
        index = [int(np.flatnonzero(frame["age"].round(2) == age)[0]) for age in rows]
        assert np.allclose(aezoo.reconstruct(model, data).mse, of_units[index], rtol=1e-3), scale
        baseline = aezoo.detect(model, data, score="mse").summary()
        assert "pca" in baseline


def test_wrong_columns_and_unscaled_arrays_are_refused(model, frame, z):
    with pytest.raises(AezooError, match="in another order, 'temperature' where 'age' was"):
        aezoo.reconstruct(model, frame[NAMES[::-1]])
    with pytest.raises(AezooError, match=r"in the units of the data .*give a DataFrame"):
        aezoo.detect(model, frame.to_numpy())
    # standardised values far from 0 are accepted
    aezoo.reconstruct(model, z * 100)
    with pytest.raises(AezooError, match=r"takes a model, not a str: give aezoo.load_model\('runs/vae/0'\)"):
        aezoo.reconstruct("runs/vae/0", frame)


@pytest.mark.slow
def test_units_come_from_training_and_from_checkpoints(frame, tmp_path):
    data = aezoo.DataModule.from_arrays(frame, scale="standard", batch_size=8)
    model = aezoo.create_model("vae", (3,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian")
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = aezoo.load_model(tmp_path / "a.ckpt")
    for one in (model.eval(), loaded):
        assert one.data_units.columns == tuple(NAMES) and one.data_units.is_table
        assert np.allclose(one.data_units.scaling["offset"], frame.mean(), rtol=0.1)
    assert np.allclose(aezoo.reconstruct(loaded, frame).mse, aezoo.reconstruct(model, frame).mse)


@pytest.mark.parametrize("scale", ["auto", "unit", "standard", "none"])
def test_saved_model_keeps_units_of_the_data(frame, tmp_path, scale):
    pixels = np.arange(9 * 16, dtype=np.uint8).reshape(9, 4, 4)
    for x in (frame, pixels, pixels / 9):
        data = aezoo.DataModule.from_arrays(x, scale=scale)
        data.setup()
        model = aezoo.create_model("dense_ae", data.input_shape, latent_dim=2, hidden_dims=(4,))
        model.data_units = data.units
        model, (found, trained) = aezoo.load_model(aezoo.save_model(model, tmp_path)), load_run(tmp_path)
        for units in (model.data_units, found.data_units):
            assert units.has_scaling(data.units.scaling)
            assert replace(units, scaling={}) == replace(data.units, scaling={})
        assert trained["settings"] == {} and trained["columns"] == data.units.columns
    config = json.loads((tmp_path / "config.json").read_text())
    units = config["data"]
    for change in (
        {"columns": ["a"]}, {"columns": "abc"}, {"white": 2}, {"levels": 0}, {"dtype": "os.system"},
        {"dtype": "float32", "offset": [1, 2, 3], "factor": [1, 2, 3]},
        {"dtype": "float32", "offset": 0.0, "factor": None},
        {"dtype": "float32", "offset": 0.0, "factor": float("nan")},
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config | {"data": units | change}))
        with pytest.raises(AezooError, match=r"is damaged: its units of the data .*save the model again"):
            aezoo.load_model(tmp_path)
    for data in ([], 3, {}, "x"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"data": data}))
        with pytest.raises(AezooError, match="is damaged: its units"):
            aezoo.load_model(tmp_path)


def test_files_of_samples_are_in_units_and_arrays_in_scale(model, frame, z, tmp_path):
    found = aezoo.reconstruct(model, frame, out=tmp_path)
    assert np.allclose(found.x_hat, aezoo.reconstruct(model, z).x_hat, atol=1e-4)
    assert np.allclose(np.load(tmp_path / "reconstructions.npy"), found.x_hat * DEVIATION + MEAN)
    with pytest.raises(AezooError, match="n_shown"):
        aezoo.reconstruct(model, z * 0, out=tmp_path, n_shown=-1)
    assert np.load(tmp_path / "reconstructions.npy").std(0)[1] > 1  # reconstructions of the earlier call
    assert not list(tmp_path.glob(".tmp*"))
