"""Data sets of Hugging Face, written by its own package; no network."""

import io
import pickle
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from aezoo.data import ArrayDataset, DataModule
from aezoo.errors import AezooError

pytestmark = [
    pytest.mark.usefixtures("cache"),
    # datasets' progress bar, which stays open if a set cannot be read
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    # on machines with one core
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]
RNG = np.random.default_rng(0)
NAMES = ["cat", "dog"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def images(n, shape=(8, 8, 3)):
    return [RNG.integers(0, 256, shape, dtype=np.uint8) for _ in range(n)]


def pictures(arrays, labels=None, names=NAMES):
    columns = {"text": ["x"] * len(arrays), "image": [Image.fromarray(array) for array in arrays]}
    features = {"text": datasets.Value("string"), "image": datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def saved(root, rows):
    (rows if isinstance(rows, datasets.DatasetDict) else datasets.DatasetDict(rows)).save_to_disk(str(root))
    return str(root)


def table(columns, features=None):
    return datasets.Dataset.from_dict(columns, features=None if features is None else datasets.Features(features))


def refused(match, root, **plain):
    with pytest.raises(AezooError, match=match) as caught:
        DataModule("hf", root=str(root), **plain).setup()
    assert "\n" not in str(caught.value)


def chw(arrays):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("memory", ["auto", "off"])
def test_saved_dataset_splits_are_used(tmp_path, memory):
    arrays = images(16)
    labels = [i % 2 for i in range(16)]
    parts = {"train": slice(0, 10), "validation": slice(10, 12), "test": slice(12, 16)}
    root = saved(tmp_path / "set", {name: pictures(arrays[part], labels[part]) for name, part in parts.items()})
    for data in (DataModule("hf", root=root, memory=memory), DataModule(root, memory=memory)):
        assert (data.input_shape, data.num_classes, data.source.class_names) == ((3, 8, 8), 2, ("cat", "dog"))
        for stage, part in zip(("train", "val", "test"), parts.values(), strict=True):
            x, y = data.tensors(stage)
            assert torch.equal(x, chw(arrays[part]))
            assert y.tolist() == labels[part]
        assert isinstance(data.dataset("train"), ArrayDataset) == (memory == "auto")
        assert data.source.white == 255


def test_splits_are_taken_out_of_one_set(tmp_path):
    arrays = images(40, (8, 8))
    rows = pictures(arrays, [i % 2 for i in range(40)])
    rows.save_to_disk(str(tmp_path / "set"))
    data = DataModule(str(tmp_path / "set"))
    parts = [data.tensors(stage) for stage in ("train", "val", "test")]
    assert [y.bincount().tolist() for _, y in parts] == [[16, 16], [2, 2], [2, 2]]
    x = torch.cat([x for x, _ in parts])
    assert len(x) == len(x.flatten(1).unique(dim=0)) == 40
    assert data.input_shape == (1, 8, 8)


@pytest.mark.slow
def test_both_read_paths_give_equal_batches(tmp_path):
    root = saved(tmp_path / "set", {"train": pictures(images(30), [i % 2 for i in range(30)])})
    ways = {"memory": "on"}, {"memory": "off", "num_workers": 0}, {"memory": "off", "num_workers": 2}
    epochs = []
    for way in ways:
        loader = DataModule("hf", root=root, batch_size=7, **way).train_dataloader()
        loader.sampler.set_epoch(3)
        epochs.append(list(loader))
    for epoch in epochs[1:]:
        for (x, y), (wanted, labels) in zip(epoch, epochs[0], strict=True):
            assert torch.equal(x, wanted)
            assert torch.equal(y, labels)


def test_pickled_dataset_reads_equal_samples(tmp_path):
    data = DataModule("hf", root=saved(tmp_path / "set", {"train": pictures(images(12))}), memory="off")
    dataset = data.dataset("train")
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(copy[i][0], dataset[i][0]) for i in range(len(dataset)))


def test_hub_parquet_folder_is_read_without_script(tmp_path):
    arrays, labels = images(14), [i % 2 for i in range(14)]
    for name, part in (("train", slice(0, 10)), ("test", slice(10, 14))):
        pictures(arrays[part], labels[part]).to_parquet(str(tmp_path / f"set/data/{name}-00000-of-00001.parquet"))
    (tmp_path / "set" / "run.py").write_text("raise SystemExit('a loading script was run')")
    data = DataModule("hf", root=str(tmp_path / "set"), val_fraction=0.2)
    assert data.source.class_names == ("cat", "dog")
    assert [len(data.dataset(stage)) for stage in ("train", "val", "test")] == [8, 2, 4]
    assert torch.equal(data.tensors("test")[0], chw(arrays[10:]))


@pytest.mark.parametrize("kind", ["lists", "texts", "nested texts", "many texts", "prefixes"])
def test_parquet_of_a_folder_that_expands_is_refused_unread(tmp_path, monkeypatch, kind):
    import pyarrow
    from pyarrow import parquet

    table, options = {}, {}
    if kind == "lists":
        column = pyarrow.array([[0.0] * 10**5] * 20)
    elif kind == "many texts":  # 8 MB each
        column = pyarrow.DictionaryArray.from_arrays(np.zeros(800, np.int32), ["x" * 10**4])
        table = dict.fromkeys("bcd", column)
    elif kind == "prefixes":
        column = pyarrow.array(["x" * 10**4] * 4000)
        options = {"use_dictionary": False, "column_encoding": {"a": "DELTA_BYTE_ARRAY"}}
    else:
        column = pyarrow.DictionaryArray.from_arrays(np.zeros(4000, np.int32), ["x" * 10**4])
        column = pyarrow.StructArray.from_arrays([column], ["bytes"]) if kind == "nested texts" else column
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "train.parquet"
    parquet.write_table(pyarrow.table({"a": column, **table}), file, compression="zstd", **options)
    assert file.stat().st_size < 10**5
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("it is read"))
    refused("train.parquet takes .* more than the limit", tmp_path / "set", max_bytes=10**7)


def test_hub_image_folder_is_read(tmp_path):
    arrays, root = images(6), tmp_path / "set"
    for i, array in enumerate(arrays):
        path = root / "train" / NAMES[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    data = DataModule("hf", root=str(root), val_fraction=0, test_fraction=0)
    x, y = data.tensors("train")
    assert torch.equal(x, chw(arrays[::2] + arrays[1::2]))
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    data = DataModule("hf", root=str(root))
    (root / "train" / "cat" / "4.png").unlink()
    with pytest.raises(AezooError, match=r"train, row 2 names .*4.png, which is not on this machine"):
        data.setup()


def test_size_channels_and_depth_as_in_a_folder(tmp_path):
    arrays = [array.repeat(2, 1) for array in images(5)]
    root = saved(tmp_path / "set", {"train": pictures(arrays)})
    data = DataModule("hf", root=root, size=8, channels=1, val_fraction=0, test_fraction=0)
    wanted = [np.asarray(Image.fromarray(array[:, 4:12]).convert("L")) for array in arrays]
    assert torch.equal(data.tensors("train")[0][:, 0], torch.from_numpy(np.stack(wanted)) / 255)
    deep = [RNG.integers(0, 2**16, (6, 6), dtype=np.uint16) for _ in range(5)]
    data = DataModule("hf", root=saved(tmp_path / "deep", {"train": pictures(deep)}), val_fraction=0, test_fraction=0)
    assert torch.equal(data.tensors("train")[0][:, 0], torch.from_numpy(np.stack(deep).astype(np.float32) / 65535))


def test_broken_and_odd_images_are_named(tmp_path):
    good = [{"bytes": png(array), "path": None} for array in images(4)]
    image = {"image": datasets.Image()}
    rows = {
        "broken": ([*good, {"bytes": b"<html>", "path": None}], r"broken, train, row 4 is not a readable image .*HTML"),
        "none": ([*good, None], r"none, train, row 4 has no image"),
        "mixed": (
            [*good, {"bytes": png(images(1, (9, 9, 3))[0]), "path": None}],
            r"mixed, train, row 4 is 9x9 .*--data.s",
        ),
    }
    for name, (column, message) in rows.items():
        root = saved(tmp_path / name, {"train": table({"image": column}, image)})
        refused(message, root, val_fraction=0, test_fraction=0)
        if name != "mixed":
            data = DataModule("hf", root=root, on_error="skip", val_fraction=0, test_fraction=0)
            with pytest.warns(UserWarning, match=f"1 of 5 files skipped as broken: .*{name}, train, row 4"):
                assert len(data.dataset("train")) == 4


def test_arrays_vectors_and_sequences(tmp_path):
    bytes_, floats = RNG.integers(0, 256, (10, 3, 6, 6), dtype=np.uint8), RNG.random((10, 4), dtype=np.float32)
    wide = RNG.random((10, 2, 5), dtype=np.float32)
    plain = {"val_fraction": 0, "test_fraction": 0}
    columns = {
        "images": (datasets.Array3D((3, 6, 6), "uint8"), bytes_, (3, 6, 6)),
        "vectors": (datasets.Sequence(datasets.Value("float32"), length=4), floats, (4,)),
        "lists": (datasets.Sequence(datasets.Value("float32")), floats, (4,)),
        "sequences": (datasets.Array2D((2, 5), "float32"), wide, (2, 5)),
        "nested": (datasets.Sequence(datasets.Sequence(datasets.Value("float32"))), wide, (2, 5)),
    }
    for name, (feature, values, shape) in columns.items():
        rows = table({"x": values.tolist(), "y": [7, 9] * 5}, {"x": feature, "y": datasets.Value("int64")})
        data = DataModule("hf", root=saved(tmp_path / name, {"train": rows}), **plain)
        assert (data.input_shape, data.num_classes, data.source.class_names) == (shape, 2, ("7", "9"))
        x, y = data.tensors("train")
        assert torch.equal(x, torch.from_numpy(values) / (255 if name == "images" else 1))
        assert y.tolist() == [0, 1] * 5
        assert data.dataset("train").x.dtype == (torch.uint8 if name == "images" else torch.float32)
    refused("takes 1.05 KiB of memory, more than the limit", tmp_path / "images", max_bytes=1000)


def test_arrays_of_unequal_shape_are_named(tmp_path):
    lists = {"x": datasets.Sequence(datasets.Value("float32"))}
    rows = [[1.0, 2.0]] * 1500
    for name, odd, message in (
        ("short", [1.0], r"short, train, row 1499 has shape \(1,\), the rows before it have \(2,\)"),
        ("none", None, "none, train, row 1499 has no value"),
        ("nan", [1.0, float("nan")], "NaN or infinity in 1 of 1500 rows, the first is row 1499"),
    ):
        root = saved(tmp_path / name, {"train": table({"x": [*rows[:-1], odd]}, lists)})
        refused(message, root, val_fraction=0, test_fraction=0)
    parts = {"train": table({"x": rows}, lists), "test": table({"x": [[1.0, 2.0, 3.0]] * 4}, lists)}
    refused(r"parts, test, row 0 has shape \(3,\)", saved(tmp_path / "parts", parts))


def test_missing_integers_are_reported(tmp_path):
    bytes_ = {"x": datasets.Sequence(datasets.Value("uint8"))}
    for name, feature, odd, message in (
        ("part", bytes_, [1, None], r"part, train, row 3 has missing values in column x"),
        ("all", {"x": datasets.Array2D((2, 2), "uint8")}, None, r"all, train, row 3 (has missing values|has no value)"),
    ):
        good = [[7, 8], [9, 10]] if name == "all" else [7, 8]
        rows = table({"x": [good, good, good, odd, good]}, feature)
        refused(message, saved(tmp_path / name, {"train": rows}), val_fraction=0, test_fraction=0)


def test_large_close_values_stay_distinct(tmp_path):
    values = [[1e9 + i, 1.0] for i in range(5)]
    rows = table({"x": values}, {"x": datasets.Sequence(datasets.Value("float64"))})
    data = DataModule("hf", root=saved(tmp_path / "set", {"train": rows}), val_fraction=0, test_fraction=0)
    assert data.tensors("train")[0][:, 0].tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_splits_whose_columns_differ(tmp_path):
    bytes_ = table({"x": [[7, 8]] * 6}, {"x": datasets.Sequence(datasets.Value("uint8"))})
    floats = table({"x": [[0.25, 0.5]] * 6}, {"x": datasets.Sequence(datasets.Value("float32"))})
    root = saved(tmp_path / "kinds", {"train": bytes_, "test": floats})
    refused("the column 'x' is of arrays of float32 for test and of arrays of uint8 for train", root)
    root = saved(tmp_path / "gone", {"train": pictures(images(6), [0, 1] * 3), "test": pictures(images(6))})
    refused("the column 'label' is missing for test", root)
    assert len(DataModule("hf", root=root, label_column="none").dataset("test")) == 6
    turned = pictures(images(6), [0, 1] * 3, NAMES[::-1])
    root = saved(tmp_path / "turned", {"train": pictures(images(6), [0, 1] * 3), "test": turned})
    refused("is of the classes dog, cat for test and of the classes cat, dog for train", root)


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize("columns", [None, ["label"]])
def test_saved_set_format_does_not_change_samples(tmp_path, form, columns):
    arrays = images(6)
    rows = pictures(arrays, [0, 1] * 3)
    rows.set_format(form, columns=columns)
    data = DataModule("hf", root=saved(tmp_path / "set", {"train": rows}), val_fraction=0, test_fraction=0)
    x, y = data.tensors("train")
    assert torch.equal(x, chw(arrays)) and y.tolist() == [0, 1] * 3


def test_columns_by_their_names(tmp_path):
    first, second = images(6), images(6)
    rows = table(
        {"a": list(map(Image.fromarray, first)), "b": list(map(Image.fromarray, second)), "fine": [0, 1] * 3,
         "coarse": [0] * 6, "text": ["x"] * 6},
        {"a": datasets.Image(), "b": datasets.Image(), "fine": datasets.ClassLabel(names=NAMES),
         "coarse": datasets.ClassLabel(names=["animal"]), "text": datasets.Value("string")},
    )  # fmt: skip
    root, plain = saved(tmp_path / "set", {"train": rows}), {"val_fraction": 0, "test_fraction": 0}
    refused(r"2 column\(s\) of images, a, b: choose one with --data.column", root)
    refused(r"2 columns of classes, fine, coarse: choose one with --data.label_column", root, column="b")
    refused("column 'text' contains neither", root, column="text")
    refused("column 'c' does not exist: choose from a, b", root, column="c")
    refused("no column of labels 'a'", root, column="b", label_column="a")
    data = DataModule("hf", root=root, column="b", label_column="fine", **plain)
    assert torch.equal(data.tensors("train")[0], chw(second))
    assert data.source.class_names == ("cat", "dog")
    assert DataModule("hf", root=root, column="b", label_column="none", **plain).num_classes is None


def test_missing_and_non_integer_labels_are_handled(tmp_path):
    plain = {"val_fraction": 0, "test_fraction": 0}
    data = DataModule("hf", root=saved(tmp_path / "some", {"train": pictures(images(4), [0, None, 1, -1])}), **plain)
    assert data.tensors("train")[1].tolist() == [0, -1, 1, -1]
    numbers = {"x": [[0.5, 0.25]] * 3, "label": [0.5, 1.5, 2.5]}
    data = DataModule("hf", root=saved(tmp_path / "fractions", {"train": table(numbers)}), **plain)
    assert data.num_classes is None
    rows = pictures(images(3)).add_column("label", [0.5, 1.5, 2.5])
    refused("the labels are not classes", saved(tmp_path / "no", {"train": rows}))
    rows = table({"x": [[0.5, 0.25]] * 3, "label": [1, None, 0]})
    refused("gap, train, row 1 has no label", saved(tmp_path / "gap", {"train": rows}))


def test_unknown_split_names_are_refused_or_warned(tmp_path):
    rows = pictures(images(6))
    root = saved(tmp_path / "two", {"left": rows, "right": rows})
    refused("splits left, right and none called train", root)
    plain = {"val_fraction": 0, "test_fraction": 0}
    assert len(DataModule("hf", root=saved(tmp_path / "one", {"left": rows}), **plain).dataset("train")) == 6
    with pytest.warns(UserWarning, match="the splits extra are not used"):
        DataModule("hf", root=saved(tmp_path / "more", {"train": rows, "extra": rows}), **plain)


def test_invalid_dataset_folders_are_refused(tmp_path):
    refused(r"no such folder: data: give a folder or a name of the hub", "data")
    refused("no such folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("cannot be read as a data set", tmp_path / "empty")
    (tmp_path / "file.parquet").touch()
    refused("is a file: give the folder", tmp_path / "file.parquet")
    refused(
        r"nobody/nothing is not a folder, .* in the cache of the hub .*check the name", "nobody/nothing", download=False
    )
    root = tmp_path / "cut"
    saved(root, {"train": pictures(images(4))})
    arrow = next(root.rglob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    refused("cut cannot be read as a data set", root)
    refused("no column.* of images or arrays, text", saved(tmp_path / "text", {"train": table({"text": ["a"]})}))
    refused(
        "scale standard does not apply to image files",
        saved(tmp_path / "x", {"train": pictures(images(4))}),
        scale="standard",
    )


def test_missing_datasets_package_names_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AezooError, match=r"pip install '\.\[hf\]' in a checkout of aezoo"):
        DataModule("hf", root="x")


@pytest.mark.slow
def test_optional_packages_are_imported_lazily():
    # torchmetrics imports transformers if installed, which imports huggingface_hub
    code = "import sys, torchmetrics\nbefore = {*sys.modules}\nfrom aezoo.data import DataModule\nDataModule()\n"
    code += "assert not {'datasets', 'litdata', 'huggingface_hub'} & ({*sys.modules} - before)"
    subprocess.run([sys.executable, "-c", code], check=True)
