"""Windows of time series: values, splits in time, labels, time stamps, and scores per step."""

import csv

import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer

import aezoo
from aezoo import AezooError, DataModule
from aezoo.cli.task_commands import read
from aezoo.data.windows import Spans, windows


def write_series(path, n=200, labels=True, time="Timestamp"):
    """A file of two channels in very different units; returns values, labels and time stamps."""
    rng = np.random.default_rng(0)
    x = np.stack([np.sin(0.3 * np.arange(n)), 1000 + 100 * rng.normal(size=n)], 1).round(4)
    y = (np.arange(n) % 50 == 49).astype(int)
    stamps = [f"2024-01-{1 + i // 24:02d} {i % 24:02d}:00:00" for i in range(n)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", time, *(["label"] if labels else []), "b"])
        for (a, b), flag, stamp in zip(x.tolist(), y, stamps, strict=True):
            writer.writerow([a, stamp, *([flag] if labels else []), b])
    return x, y, stamps


@pytest.mark.parametrize("step", [1, 3])
def test_series_is_cut_within_its_splits(tmp_path, step):
    x, y, _ = write_series(tmp_path / "series.csv")
    data = DataModule(str(tmp_path / "series.csv"), window_length=10, window_step=step, scale="none", val_fraction=0.2)
    assert data.input_shape == (2, 10)
    # 200 steps, of which the last 20 are for test and the 40 before for validation
    for stage, start, end in (("train", 0, 140), ("val", 140, 180), ("test", 180, 200)):
        found, labels = data.tensors(stage)
        firsts = range(start, end - 9, step)
        assert len(found) == len(firsts)
        for window, label, first in zip(found, labels, firsts, strict=True):
            assert np.allclose(window, x[first : first + 10].T, rtol=1e-6) and label == y[first : first + 10].max()
        assert data.source.spans[stage].first.tolist() == [*firsts]


def test_each_channel_is_scaled_separately(tmp_path):
    x, _, _ = write_series(tmp_path / "series.csv")
    data = DataModule(str(tmp_path / "series.csv"), window_length=1, scale="standard", val_fraction=0, test_fraction=0)
    found = data.tensors("train")[0][:, :, 0].numpy()
    assert np.allclose(found, (x - x.mean(0)) / x.std(0), atol=1e-5)
    assert data.units.scaling["offset"].shape == (2, 1)
    unit = DataModule(str(tmp_path / "series.csv"), window_length=8).tensors("train")[0]
    assert unit.amin((0, 2)).tolist() == [0, 0] and unit.amax((0, 2)).tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["npy", "parquet", "1-D"])
def test_series_of_other_kinds_of_files(tmp_path, kind):
    x, y, stamps = write_series(tmp_path / "series.csv")
    path = tmp_path / f"other.{kind if kind == 'parquet' else 'npy'}"
    if kind == "parquet":
        import pandas as pd

        pd.DataFrame({"date": pd.to_datetime(stamps), "a": x[:, 0], "b": x[:, 1], "label": y}).to_parquet(path)
    else:
        np.save(path, x if kind == "npy" else x[:, 0])
    data = DataModule(str(path), window_length=5, scale="none")
    found = data.tensors("train")[0].numpy()
    expected = np.stack([x[i : i + 5].T for i in range(len(found))])
    assert np.allclose(found, expected if kind != "1-D" else expected[:, :1], rtol=1e-6)
    if kind == "parquet":
        assert data.source.spans["train"].ends["start"][1] == "2024-01-01 01:00:00"
        assert data.tensors("train")[1].tolist() == [y[i : i + 5].max() for i in range(len(found))]
    else:
        assert data.source.spans["test"].ends["start"][0] == 180


def test_windows_of_arrays_with_separate_test_series(tmp_path):
    x, x_test = np.random.default_rng(0).normal(size=(50, 3)), np.random.default_rng(1).normal(size=(20, 3))
    data = DataModule.from_arrays(x, x_test=x_test, window_length=6, scale="none", val_fraction=0.2)
    assert [len(data.tensors(stage)[0]) for stage in ("train", "val", "test")] == [35, 5, 15]
    assert np.allclose(data.tensors("test")[0][2], x_test[2:8].T)


def test_score_of_a_step_is_the_mean_over_its_windows():
    rng = np.random.default_rng(0)
    for first in (np.arange(30), np.arange(5, 40, 3), np.array([0, 2, 40])):
        spans, scores = Spans(first, 4), rng.normal(size=len(first)) * 1e6
        steps, found = spans.step_scores(scores)
        assert steps.tolist() == sorted({s for start in first for s in range(start, start + 4)})
        for step, score in zip(steps, found, strict=True):
            assert score == pytest.approx(scores[(first <= step) & (step < first + 4)].mean())


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"window_length": 30},
            "val: a series of 20 steps has no window of 30: give more steps, or a lower --data.window_length",
        ),
        (
            {"window_length": 5, "layout": "image"},
            "--data.window_length makes sequences of a series: drop --data.layout image",
        ),
        ({"window_length": 19, "max_bytes": 20_000}, "windows of 19 steps take"),
        ({"window_length": -1}, "--data.window_length is -1: give a whole number of at least 0"),
        ({"window_length": 5, "window_step": 0}, "--data.window_step is 0: give a whole number of at least 1"),
    ],
)
def test_series_that_cannot_be_cut_are_refused(tmp_path, settings, line):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(200, 1)))
    with pytest.raises(AezooError) as refusal:
        DataModule(str(tmp_path / "x.npy"), **settings)
    assert line in str(refusal.value) and "\n" not in str(refusal.value)


def test_labels_without_order_and_wrong_shapes_are_refused(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 2))
    with pytest.raises(AezooError, match="labels of the steps of a series must be numbers"):
        DataModule.from_arrays(x, np.repeat(["bad", "good"], 30), window_length=4)
    with pytest.raises(AezooError, match=r"a series of shape \(.*, 2, 3\): give steps"):
        windows(np.zeros((20, 2, 3)), 4)
    write_series(tmp_path / "t.csv")
    with pytest.raises(AezooError, match="is not a number"):  # rows with time stamps, read as samples
        DataModule(str(tmp_path / "t.csv"))


def test_input_file_is_cut_and_scaled_as_the_training_data(tmp_path):
    _, y, stamps = write_series(tmp_path / "series.csv")
    data = DataModule(str(tmp_path / "series.csv"), window_length=10, window_step=2, scale="standard")
    data.setup()
    samples = read(str(tmp_path / "series.csv"), data.units, {"window_length": 10, "window_step": 2})
    train = data.tensors("train")[0]
    assert torch.allclose(samples.rows(range(len(train))), train, atol=1e-5) and len(samples) == 96
    assert samples.fields["start"][3] == stamps[6] and samples.fields["end"][3] == stamps[15]
    assert samples.labels.tolist() == [y[i : i + 10].max() for i in range(0, 191, 2)]
    part = samples.subset(torch.tensor([5, 3]))
    assert part.fields["start"] == [stamps[10], stamps[6]]


def test_saved_model_contains_the_scale_of_each_channel(tmp_path):
    x, _, _ = write_series(tmp_path / "series.csv")
    data = DataModule(str(tmp_path / "series.csv"), window_length=10, scale="standard")
    data.setup()
    model = aezoo.create_model("dense_ae", data.input_shape, likelihood="gaussian", latent_dim=2, hidden_dims=(4,))
    model.data_units = data.units
    aezoo.save_model(model, tmp_path / "saved")
    units = aezoo.load_model(tmp_path / "saved").data_units
    assert np.allclose(units.values(data.tensors("train")[0][3].numpy()), x[3:13].T, rtol=1e-5)


@pytest.mark.slow
def test_detect_finds_the_steps_of_a_burst(tmp_path):
    rng = np.random.default_rng(0)
    x = np.sin(0.4 * np.arange(1500)) + 0.05 * rng.normal(size=1500)
    x[1400:1410] += rng.normal(size=10)
    data = DataModule.from_arrays(x, window_length=16, test_fraction=0.2, scale="standard", batch_size=32)
    model = aezoo.create_model("dense_ae", data.input_shape, likelihood="gaussian", latent_dim=4, lr=3e-3)
    quiet_trainer(max_epochs=15).fit(model, data)
    found = aezoo.detect(model, data, contamination=0.01, baselines=False, out=str(tmp_path), explain=True)
    rows = [*csv.DictReader((tmp_path / "steps.csv").read_text().splitlines())]
    assert [int(row["step"]) for row in rows] == [*range(1200, 1500)]
    scores = np.array([float(row["score"]) for row in rows])
    assert 1400 <= 1200 + scores.argmax() < 1410 and scores[200:210].min() > 3 * np.median(scores)
    window = next(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert (window["start"], window["end"]) == ("1200", "1215")
    # the value that contributes most to the highest score is a step of the burst
    strangest = int(found.scores.argmax())
    place = int(found.explain(strangest).contributions.argmax())
    assert 1400 <= 1200 + strangest + place < 1410
