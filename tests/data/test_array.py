"""Arrays from files and from Python: axes, scaling, labels, and invalid arrays."""

import errno
import pickle
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch

from aezoo.data import DataModule
from aezoo.data.array import to_channels_first
from aezoo.data.readers import CsvTable, read_arrays
from aezoo.errors import AezooError

RNG = np.random.default_rng(0)


def vectors(n=40, d=5):
    return RNG.random((n, d), dtype=np.float32)


def everything(data):
    """The rows of all splits, sorted."""
    return ordered(torch.cat([data.tensors(stage)[0] for stage in ("train", "val", "test")]))


def ordered(x):
    x = torch.as_tensor(np.asarray(x)).flatten(1).float()
    return torch.tensor(sorted(x.tolist()))


def write(path, x, y):
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".npz":
        np.savez(path, x=x, y=y)
    elif path.suffix == ".pt":
        torch.save({"x": torch.from_numpy(x), "y": torch.from_numpy(y)}, path)
    elif path.suffix == ".csv":
        lines = [",".join(["a", "b", "Label", "c"])]
        lines += [f"{row[0]!r},{row[1]!r},{label},{row[2]!r}" for row, label in zip(x.tolist(), y, strict=True)]
        path.write_text("\n".join(lines) + "\n")
    else:
        import pandas

        frame = pandas.DataFrame(x, columns=["a", "b", "c"])
        frame["label"] = y
        frame.to_parquet(path)


@pytest.mark.parametrize("suffix", ["npy", "npz", "pt", "csv", "parquet"])
def test_every_file_format_is_read(tmp_path, suffix):
    x, y = vectors(40, 3), np.arange(40) % 4
    path = tmp_path / f"d.{suffix}"
    write(path, x, y)
    for data in (DataModule("array", root=str(path)), DataModule(str(path))):
        assert data.input_shape == (3,)
        assert data.num_classes == (None if suffix == "npy" else 4)
        assert torch.equal(everything(data), ordered(x))
        if suffix != "npy":
            xs, ys = data.tensors("train")
            rows = [int(np.flatnonzero((x == row.numpy()).all(1))[0]) for row in xs]
            assert ys.tolist() == [int(y[row]) for row in rows]


def test_named_splits_are_kept(tmp_path):
    x, y = RNG.integers(0, 256, (30, 6, 6), dtype=np.uint8), np.arange(30) % 3
    np.savez(
        tmp_path / "s.npz", x_train=x[:20], y_train=y[:20], x_val=x[20:25], y_val=y[20:25], x_test=x[25:], y_test=y[25:]
    )
    data = DataModule("array", root=str(tmp_path / "s.npz"))
    assert data.describe() == "array: 20 train, 5 val, 5 test, 1x6x6, 3 classes"
    assert torch.equal(data.tensors("test")[0], torch.from_numpy(x[25:])[:, None] / 255)
    assert data.tensors("val")[1].tolist() == y[20:25].tolist()
    # a missing split is taken from the training part
    data = DataModule.from_arrays(x[:20], y[:20], x_test=x[20:], y_test=y[20:])
    assert [len(data.dataset(stage)) for stage in ("train", "val", "test")] == [18, 2, 10]


def test_pt_file_contents_are_recognised(tmp_path):
    x, y = torch.rand(20, 3), torch.arange(20) % 2
    for content, classes in ((x, None), ((x, y), 2), ({"features": x}, None), ({"x": x, "y": y}, 2)):
        torch.save(content, tmp_path / "d.pt")
        data = DataModule(str(tmp_path / "d.pt"))
        assert data.num_classes == classes
        assert torch.equal(everything(data), ordered(x))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_any_column_of_a_table_can_contain_the_labels(tmp_path, kind):
    import pandas

    x = vectors(20, 2)
    frame = pandas.DataFrame(x, columns=["a", "b"])
    frame.insert(1, "fraud", ["yes", "no"] * 10)
    path = tmp_path / f"d.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    with pytest.raises(AezooError, match=r"say by --data\.label_column which"):
        DataModule(str(path))
    data = DataModule(str(path), label_column="fraud", scale="none")
    assert (data.input_shape, data.num_classes, data.source.class_names) == ((2,), 2, ("no", "yes"))
    assert data.source.columns == ("a", "b")
    assert torch.equal(everything(data), ordered(x))
    frame["fraud"] = frame["fraud"].eq("yes").astype(int)
    frame = frame.rename(columns={"fraud": "Label"})
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    with pytest.raises(AezooError, match=r"no column 'frauds' \(--data.label_column\): there are 'a', 'Label', 'b'"):
        DataModule(str(path), label_column="frauds")
    without = DataModule(str(path), label_column="none")
    assert (without.input_shape, without.num_classes) == ((2,), None)
    other = DataModule(str(path), label_column="b")
    assert (other.source.columns, other.num_classes) == (("a", "Label"), None)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("labels", [["b", None, "a", "a", "b", None], [7, 3, None, 3, 7, 7], [1, -1, None, -1, 1, 1]])
def test_empty_label_cells_mean_unlabelled_rows(tmp_path, kind, labels):
    import pandas

    frame = pandas.DataFrame({"a": np.arange(6.0) / 5, "label": labels})
    path = tmp_path / f"d.{kind}"

    def read(**plain):
        frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
        return DataModule(str(path), scale="none", val_fraction=0, test_fraction=0, **plain)

    data = read()
    names = sorted({label for label in labels if label is not None})
    assert data.num_classes == 2
    assert data.source.class_names == tuple(map(str, names))
    x, y = data.tensors("train")
    expected = [-1 if label is None else names.index(label) for label in labels]
    assert y[x[:, 0].argsort()].tolist() == expected
    frame["label"] = [0.5, None, 1.25, 2, 3, 4]
    with pytest.raises(AezooError, match="some labels are empty, others have fractions: fill or remove"):
        read()
    frame["label"] = pandas.Series([None] * 6, dtype="float64")
    with pytest.raises(AezooError, match=r"all labels are empty: fill them, or give --data\.label_column none"):
        read()
    assert read(label_column="none").num_classes is None


def test_label_column_needs_named_columns(tmp_path):
    np.save(tmp_path / "x.npy", vectors())
    with pytest.raises(AezooError, match=r"no column 'y' .*columns have names in .csv and .parquet"):
        DataModule(str(tmp_path / "x.npy"), label_column="y")
    with pytest.raises(AezooError, match="no column 'y'"):
        DataModule.from_arrays(vectors(), label_column="y")


def test_csv_without_header_and_with_other_separators(tmp_path):
    x = vectors(20, 2)
    for separator in ",;\t":
        path = tmp_path / "d.csv"
        path.write_text("\n".join(separator.join(map(repr, row)) for row in x.tolist()))
        data = DataModule(str(path))
        assert (data.input_shape, data.num_classes) == ((2,), None)
        assert torch.equal(everything(data), ordered(x))


@pytest.mark.parametrize("whole", [False, True], ids=["decimals", "whole numbers"])
def test_numeric_csv_header_is_not_a_sample(tmp_path, whole):
    path, x = tmp_path / "d.csv", np.arange(1, 61).reshape(20, 3)
    x = x if whole else x + 0.5
    rows = [",".join(map(repr, row)) for row in x.tolist()]
    path.write_text("\n".join(["0,1,2", *rows]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = everything(DataModule(str(path), scale="none"))
    assert torch.equal(found, ordered(x))
    # the header could be a sample, so a warning says how to write it
    assert ["write 0.0 for its 0" in str(warning.message) for warning in said].count(True) == whole
    for first in ("0.0,1,2", "0,1,3", "1,2,3"):
        path.write_text("\n".join([first, *rows]))
        expected = np.vstack([np.array(first.split(","), float), x])
        assert torch.equal(everything(DataModule(str(path), scale="none")), ordered(expected))


def test_long_integer_labels_stay_distinct(tmp_path):
    numbers = [10**17, 10**17 + 1, 2**70]
    (tmp_path / "d.csv").write_text("\n".join(["a,label", *(f"{i},{numbers[i % 3]}" for i in range(30))]))
    data = DataModule(str(tmp_path / "d.csv"))
    assert data.source.class_names == tuple(sorted(map(str, numbers)))
    (tmp_path / "d.csv").write_text("a,label\n1,inf\n2,3\n")
    with pytest.raises(AezooError, match="the labels contain NaN or infinity"):
        DataModule(str(tmp_path / "d.csv"))
    with pytest.raises(AezooError, match=r"^a label is 1e\+300: give integers or strings$"):
        DataModule.from_arrays(vectors(), np.array([1e300, 1.0] * 20))


def test_decimal_comma_is_reported(tmp_path):
    (tmp_path / "d.csv").write_text("a;b\n1,5;2\n")
    with pytest.raises(AezooError, match="a: '1,5' is not a number: write a decimal point instead of the comma"):
        read_arrays(tmp_path / "d.csv")


def test_single_column_csv_starting_at_0_has_no_header(tmp_path):
    (tmp_path / "d.csv").write_text("\n".join(map(str, range(20))))
    assert everything(DataModule(str(tmp_path / "d.csv"), scale="none"))[:, 0].tolist() == list(range(20))


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "expected"),
    [
        ((20, 30), "f4", "auto", (30,)),
        ((20, 30), "u1", "auto", (30,)),
        ((20, 3, 128), "f4", "auto", (3, 128)),
        ((20, 3, 128), "u1", "auto", (1, 3, 128)),
        ((20, 28, 28), "f4", "auto", (1, 28, 28)),
        ((20, 27, 35), "f4", "image", (1, 27, 35)),
        ((20, 28, 28), "f4", "sequence", (28, 28)),
        ((20, 3, 8, 9), "f4", "auto", (3, 8, 9)),
        ((20, 8, 9, 3), "f4", "auto", (3, 8, 9)),
        ((20, 8, 9, 1), "u1", "auto", (1, 8, 9)),
        ((20, 8, 9, 4), "u1", "auto", (4, 8, 9)),
        ((20, 3, 9, 3), "f4", "auto", (3, 9, 3)),
        ((20, 3, 9, 3), "f4", "image_last", (3, 3, 9)),
        ((20, 8, 9, 2), "f4", "auto", (8, 9, 2)),
        ((20, 2, 5, 6, 7), "f4", "auto", (2, 5, 6, 7)),
        ((20, 5, 6, 7, 1), "f4", "auto", (1, 5, 6, 7)),
        ((20, 5, 6, 7), "f4", "volume", (1, 5, 6, 7)),
    ],
)
def test_layout_determines_input_shape(shape, dtype, layout, expected):
    x = (RNG.random(shape) * (255 if dtype == "u1" else 1)).astype(dtype)
    data = DataModule.from_arrays(x, layout=layout)
    assert data.input_shape == expected
    assert data.tensors("train")[0].shape[1:] == expected
    assert data.tensors("train")[0].is_contiguous()


def test_channels_last_moves_values_not_only_shapes():
    x = torch.arange(2 * 5 * 6 * 3).reshape(2, 5, 6, 3)
    moved = to_channels_first(x, "auto")
    assert moved[1, 2, 3, 4] == x[1, 3, 4, 2]


def test_scale_auto():
    raw = RNG.integers(0, 256, (40, 4, 4), dtype=np.uint8)
    data = DataModule.from_arrays(raw)
    assert data.dataset("train").x.dtype == torch.uint8
    assert torch.equal(everything(data), ordered(raw) / 255)

    unit = vectors()
    assert torch.equal(everything(DataModule.from_arrays(unit)), ordered(unit))

    wide = unit * np.array([1, 10, 100, -3, 1e9]) + 7
    data = DataModule.from_arrays(wide)
    x = data.tensors("train")[0]
    assert torch.equal(x.amin(0), torch.zeros(5))
    assert torch.equal(x.amax(0), torch.ones(5))
    assert data.source.value_range == (0.0, 1.0)
    # all splits use the statistics of the training split
    val = DataModule.from_arrays(wide[:30], x_val=wide[30:], test_fraction=0).tensors("val")[0]
    low, high = wide[:30].min(0), wide[:30].max(0)
    assert torch.allclose(val, torch.from_numpy((wide[30:] - low) / (high - low)).float(), atol=1e-6)
    assert val.max() > 1 or val.min() < 0

    image = (RNG.random((40, 3, 4, 5)) * 6 - 3) * np.array([1, 0.1, 0.5])[None, :, None, None]
    x = DataModule.from_arrays(image).tensors("train")[0]
    # one scale for all channels
    assert (x.min(), x.max()) == (0, 1)
    assert x[:, 1].max() - x[:, 1].min() < 0.2


def test_scale_unit_standard_none():
    x = vectors() * 0.5
    unit = DataModule.from_arrays(x, scale="unit").tensors("train")[0]
    assert torch.equal(unit.amax(0), torch.ones(5))

    data = DataModule.from_arrays(x * 100, scale="standard")
    z = data.tensors("train")[0]
    assert torch.allclose(z.mean(0), torch.zeros(5), atol=1e-5)
    assert torch.allclose(z.std(0, correction=0), torch.ones(5), atol=1e-5)
    assert data.source.value_range is None

    raw = RNG.integers(0, 256, (40, 4, 4), dtype=np.uint8)
    assert torch.equal(everything(DataModule.from_arrays(raw, scale="none")), ordered(raw))
    assert torch.equal(everything(DataModule.from_arrays(x * 9, scale="none")), ordered(x * 9))
    z = DataModule.from_arrays(raw, scale="standard").tensors("train")[0]
    assert abs(z.mean()) < 1e-5
    assert abs(z.std(correction=0) - 1) < 1e-5


def test_constant_feature_is_scaled_to_zero():
    x = vectors() * 10
    x[:, 2] = 4.0
    for scale in ("auto", "standard"):
        z = DataModule.from_arrays(x, scale=scale).tensors("train")[0]
        assert z.isfinite().all()
        assert (z[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i1", "i2", "i4", "i8", "u2", "u4", "?"])
def test_every_real_dtype_becomes_float32(dtype):
    x = (RNG.integers(0, 90, (40, 5)) % (2 if dtype == "?" else 90)).astype(dtype)
    z = DataModule.from_arrays(x, scale="none").tensors("train")[0]
    assert z.dtype == torch.float32
    assert torch.equal(everything(DataModule.from_arrays(x, scale="none")), ordered(x.astype("f4")))


def test_large_close_values_stay_distinct():
    x = 1e9 + np.arange(40.0)[:, None] * np.ones(3)
    assert len(everything(DataModule.from_arrays(x)).unique()) == 40


def test_labels_of_any_kind():
    x = vectors(20)
    cases = {
        (3, 7): [3, 7] * 10, ("cat", "dog"): ["dog", "cat"] * 10, (-1, 1): [1, -1] * 10, (0, 1): [True, False] * 10,
    }  # fmt: skip
    for names, y in cases.items():
        data = DataModule.from_arrays(x, np.array(y))
        assert data.num_classes == 2
        assert data.source.class_names == tuple(map(str, names))
        xs, ys = data.tensors("train")
        rows = [int(np.flatnonzero((x == row.numpy()).all(1))[0]) for row in xs]
        assert [str(names[int(label)]) for label in ys] == [
            str(int(y[r]) if y[r] in (True, False) else y[r]) for r in rows
        ]
    data = DataModule.from_arrays(x, np.linspace(0, 0.9, 20))
    assert data.num_classes is None
    assert data.tensors("train")[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("y", "names", "numbers"),
    [
        (["dog", "cat", None, "dog"], ("cat", "dog"), [1, 0, -1, 1]),
        ([7, 3, 3, 7], ("3", "7"), [1, 0, 0, 1]),
        ([True, False, False, True], ("0", "1"), [1, 0, 0, 1]),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "category", "nullable", "objects"])
def test_pandas_label_dtypes_are_supported(y, names, numbers, kind):
    import pandas

    held = pandas.Series(y)
    held = {"category": held.astype("category"), "nullable": held.convert_dtypes(), "objects": held.astype(object)}.get(
        kind, held
    )
    if kind == "objects":
        names = ("False", "True") if y[0] is True else names
    data = DataModule.from_arrays(np.arange(4.0)[:, None] / 3, held, scale="none", val_fraction=0, test_fraction=0)
    assert data.source.class_names == names
    x, labels = data.tensors("train")
    assert labels[x[:, 0].argsort()].tolist() == numbers


def test_dataframe_column_names_are_used():
    import pandas

    frame = pandas.DataFrame(vectors(20, 2), columns=["a", "b"])
    data = DataModule.from_arrays(frame, x_val=frame[:5])
    assert data.source.columns == ("a", "b")
    with pytest.raises(AezooError, match="x_val has the columns of the training data in another order, 'b' where 'a'"):
        DataModule.from_arrays(frame, x_val=frame[["b", "a"]])
    frame.iloc[3, 1] = np.nan
    with pytest.raises(AezooError, match="x has NaN or infinity in 1 of 20 rows, the first is row 3, in 'b'"):
        DataModule.from_arrays(frame).setup()
    assert DataModule.from_arrays(pandas.DataFrame(vectors(20, 2))).source.columns == ()


def test_input_arrays_are_not_modified():
    x = RNG.integers(0, 256, (20, 4, 4), dtype=np.uint8)
    wide, tensor = vectors(20) * 9, torch.rand(20, 3, requires_grad=True)
    copies = x.copy(), wide.copy(), tensor.detach().clone()
    for values in (x, wide, tensor):
        data = DataModule.from_arrays(values)
        for (batch,) in data.train_dataloader():
            data.on_after_batch_transfer((batch,), 0)[0].mul_(0)
    assert np.array_equal(x, copies[0])
    assert np.array_equal(wide, copies[1])
    assert torch.equal(tensor, copies[2])


@pytest.mark.parametrize("dtype", ["u1", "f4"])
def test_later_writes_to_source_change_nothing(tmp_path, dtype):
    x = RNG.integers(0, 2, (400, 3)).astype(dtype)
    np.save(tmp_path / "d.npy", x)
    whole = {"val_fraction": 0.0, "test_fraction": 0.0, "scale": "none"}
    data, handed = DataModule(str(tmp_path / "d.npy"), **whole), x.astype("f4")
    from_array = DataModule.from_arrays(handed, **whole)
    assert data.dataset("train").x[7].tolist() == from_array.dataset("train").x[7].tolist() == x[7].tolist()
    with (tmp_path / "d.npy").open("r+b") as file:
        file.seek(128)
        file.write(b"\7" * x.nbytes)
    handed[:] = 7
    assert np.array_equal(data.dataset("train").x, x)
    assert np.array_equal(from_array.dataset("train").x, x)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["npy", "npz", "csv"])
def test_file_contents_are_not_kept_in_memory_twice(tmp_path, suffix):
    x = vectors(2000, 100)
    path = tmp_path / f"d.{suffix}"
    if suffix == "csv":
        np.savetxt(path, x, "%.3f", delimiter=",")
    else:
        np.save(path, x) if suffix == "npy" else np.savez(path, x=x)
    # tracemalloc counts the memory of NumPy and Python; the split samples are torch tensors
    tracemalloc.start()
    try:
        data = DataModule(str(path))
        data.setup()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < x.nbytes / 2
    # a .npy file is not read as a whole, and the cells of a table are not held as strings all at once
    assert peak < {"npy": 0.5, "npz": 2.5, "csv": 7}[suffix] * x.nbytes


def test_invalid_data_are_refused_on_every_setup():
    data = DataModule.from_arrays(vectors(20), x_val=np.full((3, 5), np.nan))
    for _ in range(2):
        with pytest.raises(AezooError, match="x_val has NaN or infinity in 3 of 3 rows, the first is row 0"):
            data.setup()


def test_first_nan_row_is_found_in_any_chunk(monkeypatch):
    monkeypatch.setattr("aezoo.data.in_memory._CHUNK", 8)
    for row in (0, 3, 4, 18):
        x = vectors(19)
        x[row:, 1] = np.inf
        refused(f"NaN or infinity in {19 - row} of 19 rows, the first is row {row}:", x)


def test_missing_values_are_kept_and_scaled_on_request():
    x = vectors(40, 3) * 7 - 2
    x[:10, 0], x[5:20, 2] = np.nan, np.nan
    settings = {"missing": "keep", "val_fraction": 0, "test_fraction": 0}
    for scale, low, size in (
        ("unit", np.nanmin(x, 0), np.nanmax(x, 0) - np.nanmin(x, 0)),
        ("standard", np.nanmean(x, 0), np.nanstd(x, 0)),
        ("none", 0, 1),
    ):
        found = DataModule.from_arrays(x, scale=scale, **settings).tensors("train")[0]
        np.testing.assert_allclose(found.numpy(), (x - low) / size, rtol=1e-5, atol=1e-6)
    share = (x - np.nanmin(x)) / np.ptp(x[~np.isnan(x)])
    data = DataModule.from_arrays(share, **settings)
    assert np.array_equal(data.tensors("train")[0].numpy(), share.astype(np.float32), equal_nan=True)
    assert data.source.white == 1
    images = np.where(RNG.random((20, 4, 4)) < 0.2, np.nan, RNG.normal(size=(20, 4, 4)))
    found = DataModule.from_arrays(images, **settings).tensors("train")[0][:, 0].numpy()
    assert np.nanmin(found) == 0 and np.nanmax(found) == 1 and np.array_equal(np.isnan(found), np.isnan(images))


def test_unusable_missing_values_are_refused():
    x = vectors(40, 3)
    x[3] = np.nan
    refused("no value at all in row 3: remove such rows", x, missing="keep")
    x[3], x[:, 1] = 0, np.nan
    refused("column 2 has no value in the training split: leave it out", x, missing="keep")
    x[:, 1], x[2, 2] = np.inf, np.nan
    refused("x has infinity in 40 of 40 rows, the first is row 0: fill or remove them$", x, missing="keep")
    refused("missing keep and --data.binarise threshold contradict", x, missing="keep", binarise="threshold")


def test_csv_text_is_not_held_in_memory(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n" + "".join(f"{i}.125,{i}.5\n" for i in range(50_000)))
    tracemalloc.start()
    n_rows = sum(1 for _ in CsvTable(path, "").rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_rows == 50_000 and peak < 0.2 * path.stat().st_size


def test_invalid_utf8_after_the_first_lines_of_a_csv_is_named(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\n" + b"1,2\n" * 50_000 + b"\xff,2\n")
    with pytest.raises(AezooError, match=r"x.csv is not UTF-8 text .*: save it as CSV in UTF-8"):
        read_arrays(path)


def test_an_empty_cell_of_a_csv_file_is_missing(tmp_path):
    (tmp_path / "x.csv").write_text("a,b,label\n1,2,0\n,4,1\n5, ,0\n")
    assert np.array_equal(read_arrays(tmp_path / "x.csv")["x"], [[1, 2], [np.nan, 4], [5, np.nan]], equal_nan=True)
    with pytest.raises(
        AezooError, match=r"in 2 of 3 rows, the first is row 1, in 'a', 'b': fill .* --data.missing keep"
    ):
        DataModule(str(tmp_path / "x.csv")).setup()


def test_read_only_and_strided_arrays():
    x = np.broadcast_to(vectors(20, 1), (20, 3))
    assert torch.equal(everything(DataModule.from_arrays(x)), ordered(x.copy()))
    x = vectors(40)[::-2, ::-1]
    assert torch.equal(everything(DataModule.from_arrays(x)), ordered(x.copy()))


def refused(match, x, y=None, **plain):
    with pytest.raises(AezooError, match=match) as caught:
        DataModule.from_arrays(x, y, **plain).setup()
    assert "\n" not in str(caught.value)


def test_invalid_arrays_are_refused():
    bad = vectors()
    bad[17, 2] = np.nan
    bad[30, 0] = np.inf
    refused("x has NaN or infinity in 2 of 40 rows, the first is row 17", bad)
    refused("x has NaN or infinity in 2 of 40 rows, the first is row 17", torch.from_numpy(bad))
    refused("x_val has NaN or infinity in 1 of 20 rows, the first is row 10", bad[:17], x_val=bad[20:])
    refused("Python objects", np.array([{}, []], dtype=object))
    refused("complex numbers", vectors() * 1j)
    refused("complex numbers", torch.zeros(3, 2, dtype=torch.complex64))
    refused("contains text", np.array([["a", "b"]]))
    refused("rows of unequal shape", [[1.0, 2.0], [1.0]])
    refused("sparse", torch.eye(4).to_sparse())
    refused(r"x is empty \(shape \(0, 5\)\)", np.zeros((0, 5)))
    refused("takes .* axes", np.zeros(5))
    refused("layout vector takes", np.zeros((5, 3, 3)), layout="vector")
    refused("x has 40 samples but 39 labels", vectors(), np.zeros(39))
    refused("labels contain NaN", vectors(), np.full(40, np.nan))
    refused("labels are given for train only", vectors(), np.arange(40) % 2, x_val=vectors())
    refused(r"x_val has samples of shape \(4,\)", vectors(), x_val=vectors(40, 4))
    refused("some splits are uint8", vectors(), x_val=np.zeros((5, 5), np.uint8))
    refused("are for images", vectors(), size=8)
    refused("cannot become 3", RNG.random((20, 7, 8, 9)), channels=3)
    with pytest.raises(AezooError, match="drop name"):
        DataModule.from_arrays(vectors(), name="digits")


class Canary:
    def __reduce__(self):
        return (open, ("canary", "w"))


def broken_files(folder):
    """(file, expected message)"""
    np.save(folder / "objects.npy", np.array([Canary()]), allow_pickle=True)
    yield "objects.npy", "pickle"
    (folder / "pickle.npy").write_bytes(pickle.dumps(Canary()))
    yield "pickle.npy", "pickle"
    with zipfile.ZipFile(folder / "zip.npy", "w") as file:
        file.writestr("a", "b")
    yield "zip.npy", "is a zip archive, not a .npy file"
    np.savez(folder / "objects.npz", x=np.array([Canary()], dtype=object))
    yield "objects.npz", "pickle"
    torch.save(Canary(), folder / "canary.pt")
    yield "canary.pt", "contains more than tensors"
    np.save(folder / "cut.npy", vectors())
    (folder / "cut.npy").write_bytes((folder / "cut.npy").read_bytes()[:-50])
    yield "cut.npy", "cut.npy"
    (folder / "cut.npz").write_bytes(b"PK\x03\x04 and so on")
    yield "cut.npz", "cut.npz"
    (folder / "cut.pt").write_bytes(b"nothing")
    yield "cut.pt", "cut.pt is damaged"
    (folder / "cut.parquet").write_bytes(b"PAR1")
    yield "cut.parquet", "cut.parquet cannot be read"
    np.savez(folder / "names.npz", images=vectors(), other=vectors())
    yield "names.npz", "found images, other: name the arrays x and y"
    torch.save([1, 2, 3], folder / "list.pt")
    yield "list.pt", "contains a list"
    (folder / "empty.csv").write_text("")
    yield "empty.csv", "is empty"
    (folder / "header.csv").write_text("a,b\n")
    yield "header.csv", "only a header"
    (folder / "text.csv").write_text("a,b\n1,2\n3,x\n")
    yield (
        "text.csv",
        "row 1, column 2 of the features, b: 'x' is not a number: encode or drop the column, or say by",
    )
    (folder / "gap.csv").write_text("a,b\n1,2\n3,N/A\n")
    gap = "leave it empty for aezoo impute, or fill it, or say by --data.label_column"
    yield "gap.csv", f"row 1, column 2 of the features, b: 'N/A' is not a number: {gap}"
    (folder / "hole.csv").write_text("1,,3\n4,5,6\n")
    yield "hole.csv", "x has NaN or infinity in 1 of 2 rows, the first is row 0: fill or remove them"
    (folder / "index.csv").write_text(",0,1\n0,4.5,5.5\n")
    yield "index.csv", "as pandas writes its index: save the table without it, frame.to_csv(path, index=False)"
    (folder / "names.csv").write_text(",a,b\n5,4.5,5.5\n2,1.5,2.5\n")
    yield "names.csv", "the first column has no name and numbers the rows"
    (folder / "first.csv").write_text(",0,1\n0.5,4.5,5.5\n")
    yield "first.csv", "x has NaN or infinity in 1 of 2 rows, the first is row 0: fill or remove them"
    (folder / "ragged.csv").write_text("a,b\n1,2\n3\n")
    yield "ragged.csv", "row 1: 1 columns, the first line has 2"
    (folder / "latin.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    yield "latin.csv", "not UTF-8 text"
    (folder / "d.xyz").write_bytes(b"")
    yield "d.xyz", "the array source reads .npy .npz"
    yield "absent.npy", "does not exist: give a file of arrays"
    yield ".", "is a folder: give a file of arrays"


@pytest.mark.slow
def test_broken_and_hostile_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = list(broken_files(tmp_path))
    assert len(cases) == 24
    for name, message in cases:
        with pytest.raises(AezooError) as caught:
            DataModule("array", root=str(tmp_path / name)).setup()
        assert message in str(caught.value), (name, str(caught.value))
        assert name.strip(".") in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_parquet_with_text(tmp_path):
    import pandas

    pandas.DataFrame({"a": [1.0, 2.0], "city": ["x", "y"]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(AezooError, match="columns city contain no numbers"):
        DataModule(str(tmp_path / "t.parquet"))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_with_gaps_names_their_columns(tmp_path, kind):
    import pandas

    frame = pandas.DataFrame(vectors(20, 3), columns=["a", "b", "c"])
    frame.loc[4, "c"] = frame.loc[[7, 9], "a"] = float("nan")
    path = tmp_path / f"d.{kind}"
    frame.to_csv(path, index=False, na_rep="nan") if kind == "csv" else frame.to_parquet(path)
    with pytest.raises(AezooError, match="in 3 of 20 rows, the first is row 4, in 'a', 'c': fill or remove them"):
        DataModule(str(path)).setup()


def test_parquet_of_several_kinds_of_numbers(tmp_path):
    import pandas

    x = vectors(20, 3)
    frame = pandas.DataFrame({"a": x[:, 0], "b": x[:, 1] > 0, "c": pandas.array([3, 5] * 10, dtype="Int64")})
    frame.to_parquet(tmp_path / "d.parquet")
    found = read_arrays(tmp_path / "d.parquet")["x"]
    assert np.array_equal(found, np.stack([x[:, 0], x[:, 1] > 0, [3, 5] * 10], 1))
    assert torch.equal(everything(DataModule.from_arrays(frame, scale="none")), ordered(found))
    frame.loc[4, "c"] = pandas.NA
    frame.to_parquet(tmp_path / "d.parquet")
    for read in (lambda: DataModule(str(tmp_path / "d.parquet")), lambda: DataModule.from_arrays(frame)):
        with pytest.raises(AezooError, match="in 1 of 20 rows, the first is row 4, in 'c': fill or remove them"):
            read().setup()
    with pytest.raises(AezooError, match="x: the columns 'b' contain no numbers: encode or drop them"):
        DataModule.from_arrays(frame.assign(b="text"))


@pytest.mark.parametrize("suffix", ["npy", "npz", "csv"])
def test_unreadable_file_is_reported(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"d.{suffix}"
    path.write_text("1,2")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(AezooError, match=r"^cannot read .* \(Permission denied\): check its permissions$"):
        read_arrays(path)


def test_parquet_without_pandas(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    (tmp_path / "t.parquet").write_bytes(b"")
    with pytest.raises(AezooError, match=r"pip install '\.\[parquet\]'"):
        DataModule(str(tmp_path / "t.parquet"))
