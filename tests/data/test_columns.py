"""Tables return in their own columns and units, in files, results and pictures."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import aezoo
from aezoo.callbacks import Samples, plotting
from aezoo.cli.main import main
from aezoo.data.columns import Columns
from aezoo.metrics.similarity import ValueErrors
from aezoo.tasks import samples as task_samples

NAMES = ("price", "score", "built")


def houses(n=40):
    """Columns with units far from [0, 1], the last one constant; one has the name of a column of results."""
    x = np.random.default_rng(0).normal(size=(n, 3)) * [1e5, 1e-6, 0] + [3e5, 2e-6, 1970]
    x[:, 0] = x[:, 0].round()
    return x


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("scale", ["auto", "unit", "standard", "none"])
@pytest.mark.parametrize("kind", ["frame", "csv", "no header", "bytes"])
def test_values_return_in_the_units_of_the_table(tmp_path, kind, scale):
    import pandas

    x = houses() if kind != "bytes" else np.random.default_rng(0).integers(0, 256, (40, 3), dtype=np.uint8)
    frame = pandas.DataFrame(x, columns=[*NAMES])
    if kind == "bytes" and scale in ("unit", "standard"):
        frame = frame.astype(float)
    path = tmp_path / "houses.csv"
    frame.to_csv(path, index=False, header=kind != "no header")
    data = aezoo.DataModule(str(path), scale=scale) if kind in ("csv", "no header") else None
    data = data or aezoo.DataModule.from_arrays(frame, scale=scale)
    columns = data.columns
    assert columns.names == (NAMES if kind != "no header" else ("0", "1", "2"))
    parts = [columns.values(data.tensors(stage)[0]) for stage in ("train", "val", "test")]
    found = np.concatenate(parts)[np.concatenate(parts)[:, 0].argsort(kind="stable")]
    given = x[x[:, 0].argsort(kind="stable")].astype(float)
    assert np.allclose(found[:, 0], given[:, 0], rtol=1e-6) and np.allclose(found[:, 2].mean(), given[:, 2].mean())
    assert np.allclose(np.sort(found[:, 1]), np.sort(given[:, 1]), rtol=1e-5, atol=1e-12)
    assert aezoo.DataModule.from_arrays(x).columns is None


def test_errors_by_column_are_those_of_the_units():
    data = aezoo.DataModule.from_arrays(_frame(), scale="standard")
    columns, x = data.columns, data.tensors("train")[0]
    x_hat = x + torch.tensor([0.5, -2.0, 0.0])
    deviation = houses()[:, :2].std(0)
    found = ValueErrors()
    for part in range(0, len(x), 7):
        found.add(x[part : part + 7], x_hat[part : part + 7])
    rows = {row["column"]: row for row in columns.summary(found)}
    # the deviation of the training split only, so not exact
    assert rows["price"]["mae"] == pytest.approx(0.5 * deviation[0], rel=0.3)
    assert rows["price"]["r2"] == pytest.approx(1 - 0.25, abs=1e-5)
    assert rows["score"]["r2"] == pytest.approx(1 - 4, abs=1e-5) and np.isnan(rows["built"]["r2"])
    row = columns.error_row((x_hat - x)[0].numpy())
    assert row["largest_error"] == "score" and row["error_score"] == pytest.approx(-2 * rows["score"]["deviation"])
    gap = x_hat.clone()
    gap[0] = torch.nan
    found = ValueErrors()
    found.add(x, gap)
    assert columns.summary(found)[0]["mae"] == pytest.approx(rows["price"]["mae"], rel=1e-5)
    assert columns.error_row(np.full(3, np.nan))["largest_error"] == ""


def _frame():
    import pandas

    return pandas.DataFrame(houses(), columns=[*NAMES])


@pytest.mark.slow
def test_bars_carry_names_and_values_of_the_table():
    columns = Columns(NAMES, {"offset": torch.tensor([1e5, 0, 0]), "factor": torch.tensor([2e5, 1, 1])}, 3)
    panel = {"original": torch.tensor([0.5, 0.25, torch.nan]), "error": torch.tensor([0.5, 0.25, 0.0])}
    axes = plotting.panel_figure([panel], columns=columns).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(NAMES)
    assert [text.get_text().strip() for text in axes.texts] == ["200000", "0.25", "missing", "100000", "0.25", "0"]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.25, 0.0, 0.5, 0.25, 0.0]
    many = Columns((), {}, 100)
    given = torch.zeros(100)
    output = torch.arange(100.0)
    shown = plotting.panel_figure([{"original": given, "output": output}], columns=many)
    assert [label.get_text() for label in shown.axes[0].get_yticklabels()] == [str(i) for i in range(76, 100)]
    assert "24 of 100 columns" in shown.get_suptitle()


@pytest.mark.slow
def test_results_of_a_table_have_its_columns(tmp_path):
    data = aezoo.DataModule.from_arrays(_frame())
    model = aezoo.create_model("vae", (3,), latent_dim=2, hidden_dims=(4,)).eval()
    samples = task_samples.SampleSet.from_data(data)
    given = data.columns.values(data.tensors("test")[0])
    found = aezoo.reconstruct(model, data, out=str(tmp_path), n_shown=1)
    table = rows_of(tmp_path / "reconstructions.csv")
    assert list(table[0]) == list(NAMES) and len(table) == len(samples)
    assert float(table[0]["price"]) == pytest.approx(data.columns.values(found.x_hat)[0, 0])
    assert [row["column"] for row in rows_of(tmp_path / "columns.csv")] == list(NAMES)
    errors = rows_of(tmp_path / "errors.csv")
    aezoo.detect(model, data, baselines=False, out=str(tmp_path), n_shown=1)
    scores = rows_of(tmp_path / "scores.csv")
    for i, row in enumerate([errors[1], scores[1]]):
        assert float(row["price"]) == given[1, 0] and float(row["score"]) != float(row["score_value"]), i
        error = float(table[1]["price"]) - given[1, 0]
        assert float(row["error_price"]) == pytest.approx(error, abs=1) and row["largest_error"] in NAMES
    aezoo.embed(model, data, fit_on=data, nearest=1, n_shown=0, out=str(tmp_path))
    (row, *_) = rows_of(tmp_path / "neighbours.csv")
    train = data.columns.values(data.tensors("train")[0])
    assert float(row["query_price"]) == given[0, 0] and float(row["price"]) == train[int(row["neighbour"]), 0]
    aezoo.generate(model, data, n=5, out=str(tmp_path))
    assert list(rows_of(tmp_path / "samples.csv")[4]) == list(NAMES)
    aezoo.generate(model, data, interpolate=True, walks=2, steps=3, out=str(tmp_path))
    walks = rows_of(tmp_path / "interpolation.csv")
    assert [(row["walk"], row["step"]) for row in walks] == [(w, s) for w in "12" for s in "123"]
    aezoo.denoise(model, data, out=str(tmp_path))
    assert list(rows_of(tmp_path / "denoised.csv")[0]) == list(NAMES)


@pytest.mark.slow
def test_the_command_line_writes_tables_in_their_units(tmp_path, capsys):
    lines = [",".join(map(repr, row)) for row in houses().tolist()]
    (tmp_path / "new.csv").write_text("\n".join([",".join(NAMES), *lines]))
    flags = ["--data", str(tmp_path / "new.csv"), "--trainer.max_epochs", "1", "--model.latent_dim", "2"]
    main(["fit", "--model", "vae", *flags, "--trainer.default_root_dir", str(tmp_path / "runs")])
    (run,) = (path.parent for path in (tmp_path / "runs").rglob("config.yaml"))
    given = ["--ckpt_path", str(run), "--out", str(tmp_path / "out")]
    (tmp_path / "new.csv").write_text("\n".join(lines))  # the names are those of training
    capsys.readouterr()
    main(["reconstruct", *given, "--input", str(tmp_path / "new.csv")])
    said = capsys.readouterr().out
    assert "values in reconstructions.npy are in the units of the training data" in said
    written = np.load(tmp_path / "out" / "reconstructions.npy")
    assert np.allclose(
        written[:, 0], [float(row["price"]) for row in rows_of(tmp_path / "out" / "reconstructions.csv")]
    )
    by_column = said[said.index("column ") :].splitlines()[1:4]
    assert [line.split()[0] for line in by_column] == list(NAMES)
    errors = rows_of(tmp_path / "out" / "errors.csv")
    assert [float(row["price"]) for row in errors] == houses()[:, 0].tolist()
    (tmp_path / "new.csv").unlink()
    main(["generate", *given, "--n", "3"])  # the run contains the columns
    assert list(rows_of(tmp_path / "out" / "samples.csv")[2]) == list(NAMES)


def test_training_pictures_have_the_column_names():
    picture = Samples()
    picture._trainer = SimpleNamespace(datamodule=aezoo.DataModule.from_arrays(_frame()))
    assert picture.columns.names == NAMES
    for other in (aezoo.DataModule.from_arrays(houses()), SimpleNamespace(columns=["a"]), None):
        picture._trainer = SimpleNamespace(datamodule=other)
        assert picture.columns is None
