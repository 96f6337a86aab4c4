"""Chunks written by litdata's own writer, on a disk."""

import io
import itertools
import json
import os
import pickle
import subprocess
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from litdata_chunks import write_chunks
from PIL import Image
from quiet_trainer import quiet_trainer

import aezoo
from aezoo.data import ArrayDataset, DataModule, stream
from aezoo.data.loaders import SHUFFLE_GROUP, EpochSampler, sample_blocks
from aezoo.errors import AezooError

# otherwise early versions query the registry for a newer one
os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

pytestmark = [
    # on machines with one core
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    # litdata ignores it at import; the buffer is copied
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]
RNG = np.random.default_rng(0)
ALL = {"val_fraction": 0, "test_fraction": 0}


def write(root, items, chunk_size=4):
    return str(write_chunks(root, items, chunk_size))


def images(n, shape=(8, 8, 3)):
    return [RNG.integers(0, 256, shape, dtype=np.uint8) for _ in range(n)]


def encoded(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def dicts(arrays):
    return [{"image": Image.fromarray(array), "label": i % 2} for i, array in enumerate(arrays)]


def classes(root, names=("cat", "dog")):
    (root / "classes.json").write_text(json.dumps(names))


def chw(arrays):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def read_all(data):
    return [data.tensors(stage) for stage in data.splits()]


def refused(match, root, **plain):
    with pytest.raises(AezooError, match=match) as caught:
        read_all(DataModule("stream", root=str(root), **plain))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("memory", ["auto", "off"])
def test_images_and_labels(tmp_path, memory):
    arrays = images(10)
    root = write(tmp_path / "set", dicts(arrays))
    classes(tmp_path / "set")
    for data in (DataModule("stream", root=root, memory=memory, **ALL), DataModule(root, memory=memory, **ALL)):
        assert (data.input_shape, data.num_classes, data.source.class_names) == ((3, 8, 8), 2, ("cat", "dog"))
        x, y = data.tensors("train")
        assert torch.equal(x, chw(arrays))
        assert y.tolist() == [0, 1] * 5
        next(iter(data.train_dataloader()))
        assert isinstance(data._stored_split("train", torch.device("cpu")), ArrayDataset) == (memory == "auto")


@pytest.mark.parametrize("kind", ["pil", "jpeg", "png", "tensor", "numpy", "bytes"])
def test_every_encoding_of_an_image(tmp_path, kind):
    arrays, number = images(6), itertools.count()

    def jpeg(array):
        path = tmp_path / f"{next(number)}.jpg"
        path.write_bytes(encoded(array, "JPEG"))
        image = Image.open(path)
        image.load()
        return image

    make = {
        "pil": lambda a: {"x": Image.fromarray(a)},
        "jpeg": lambda a: {"x": jpeg(a)},
        "png": lambda a: {"x": encoded(a)},
        "tensor": lambda a: (torch.from_numpy(a).permute(2, 0, 1).contiguous(), 3),
        "numpy": lambda a: a,
        "bytes": lambda a: (encoded(a), "text"),
    }[kind]
    plain = {"label_column": "none"} if kind == "bytes" else {}
    data = DataModule("stream", root=write(tmp_path / "set", map(make, arrays)), **plain, **ALL)
    assert data.input_shape == (3, 8, 8)
    x, y = data.tensors("train")
    if kind == "jpeg":
        arrays = [np.asarray(Image.open(io.BytesIO(encoded(a, "JPEG")))) for a in arrays]
    assert torch.equal(x, chw(arrays))
    assert data.dataset("train")[0][0].dtype == torch.uint8
    assert (y is None) == (kind != "tensor") and data.num_classes is None


def test_vectors_sequences_and_layouts(tmp_path):
    for name, shape, wanted in (("v", (5,), (5,)), ("s", (2, 7), (2, 7)), ("i", (6, 6), (1, 6, 6))):
        arrays = [RNG.random(shape, dtype=np.float32) for _ in range(6)]
        data = DataModule("stream", root=write(tmp_path / name, [{"x": a} for a in arrays]), **ALL)
        assert data.input_shape == wanted
        assert torch.equal(data.tensors("train")[0], torch.from_numpy(np.stack(arrays)).reshape(6, *wanted))
    arrays = [RNG.random(5, dtype=np.float32) * 4 - 2 for _ in range(6)]
    root = write(tmp_path / "wide", [(a,) for a in arrays])
    refused(r"wide, item 0 \(chunk-0-0.bin\) has values from -\d.* to 1.*--data.scale none", root, **ALL)
    x, _ = DataModule("stream", root=root, scale="none", **ALL).tensors("train")
    assert torch.equal(x, torch.from_numpy(np.stack(arrays)))
    refused("scale standard needs a data set in memory", root, scale="standard")


def test_size_and_channels(tmp_path):
    arrays = [a.repeat(2, 1) for a in images(5)]
    for name, make in (("pil", Image.fromarray), ("png", encoded)):
        root = write(tmp_path / name, [{"x": make(a)} for a in arrays])
        x, _ = DataModule("stream", root=root, size=8, channels=1, **ALL).tensors("train")
        wanted = [np.asarray(Image.fromarray(a[:, 4:12]).convert("L")) for a in arrays]
        assert torch.equal(x[:, 0], torch.from_numpy(np.stack(wanted)) / 255)
    root = write(tmp_path / "tensor", [(torch.from_numpy(a).permute(2, 0, 1).contiguous(),) for a in arrays])
    assert DataModule("stream", root=root, size=4, channels=1, **ALL).tensors("train")[0].shape == (5, 1, 4, 4)


def test_stored_and_random_splits_are_used(tmp_path):
    arrays = images(30)
    for name, part in (("train", slice(0, 20)), ("validation", slice(20, 25)), ("test", slice(25, 30))):
        write(tmp_path / "own" / name, dicts(arrays[part]))
    classes(tmp_path / "own")
    data = DataModule(str(tmp_path / "own"))
    assert data.num_classes == 2
    assert [
        torch.equal(x, chw(a))
        for (x, _), a in zip(read_all(data), (arrays[:20], arrays[20:25], arrays[25:]), strict=True)
    ]
    data = DataModule("stream", root=write(tmp_path / "one", dicts(arrays)))
    parts = read_all(data)
    assert [len(x) for x, _ in parts] == [24, 3, 3]
    x = torch.cat([x for x, _ in parts])
    assert sorted(x.flatten(1).tolist()) == sorted(chw(arrays).flatten(1).tolist())


def epochs(data, numbers=(0, 1, 2)):
    """The batches of some epochs, as bytes, in order."""
    loader, found = data.train_dataloader(), []
    for number in numbers:
        loader.sampler.set_epoch(number)
        found.append([(x.numpy().tobytes(), y.tolist()) for x, y in loader])
    return found


@pytest.mark.slow
def test_batches_are_equal_for_any_worker_count(tmp_path):
    root = write(tmp_path / "set", dicts(images(90)), chunk_size=3)
    settings = {"root": root, "batch_size": 8, "seed": 3}
    held = epochs(DataModule("stream", memory="on", **settings))
    assert held[0] != held[1] != held[2]
    for num_workers in (0, 1, 2):
        assert epochs(DataModule("stream", memory="off", num_workers=num_workers, **settings)) == held
    assert epochs(DataModule("stream", memory="off", num_workers=0, **settings | {"seed": 4})) != held
    few = DataModule("stream", memory="off", num_workers=0, num_labels=10, **settings)
    assert [[x for x, _ in epoch] for epoch in epochs(few)] == [[x for x, _ in epoch] for epoch in held]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_chunks_are_shuffled_in_groups_and_split_over_ranks(world):
    n_chunks, each = 3 * SHUFFLE_GROUP, 5
    blocks = torch.arange(n_chunks * each) // each
    orders = []
    for epoch in (0, 1):
        shards = []
        for rank in range(world):
            sampler = EpochSampler(len(blocks), shuffle=True, seed=2, rank=rank, world=world, blocks=blocks)
            sampler.set_epoch(epoch)
            shards.append(list(sampler))
        order = [row for rows in zip(*shards, strict=True) for row in rows]
        assert sorted(order) == [*range(len(blocks))]
        groups = [
            {int(blocks[row]) for row in order[i : i + SHUFFLE_GROUP * each]}
            for i in range(0, len(order), SHUFFLE_GROUP * each)
        ]
        assert [len(group) for group in groups] == [SHUFFLE_GROUP] * 3
        # within a group the items of its chunks are mixed, and the chunks are not adjacent
        first = [int(blocks[row]) for row in order[: SHUFFLE_GROUP * each]]
        assert len({*first[:SHUFFLE_GROUP]}) > SHUFFLE_GROUP // 3
        assert groups[0] != {*range(min(groups[0]), min(groups[0]) + SHUFFLE_GROUP)}
        orders.append(order)
    assert orders[0] != orders[1]
    assert set(orders[0][: SHUFFLE_GROUP * each]) != set(orders[1][: SHUFFLE_GROUP * each])


def test_shuffle_blocks_follow_selected_rows(tmp_path):
    root = write(tmp_path / "set", dicts(images(12)), chunk_size=5)
    classes(tmp_path / "set")
    data = DataModule("stream", root=root, memory="off", **ALL)
    assert sample_blocks(data.dataset("train")).tolist() == [0] * 5 + [1] * 5 + [2] * 2
    data = DataModule("stream", root=root, memory="off", train_classes=["dog"], **ALL)
    assert sample_blocks(data.dataset("train")).tolist() == [0, 0, 1, 1, 1, 2]
    assert sample_blocks(DataModule(**ALL).dataset("train")) is None


class SaveAt(pl.Callback):
    """Saves within an epoch."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step and self.path:
            trainer.save_checkpoint(self.path)


@pytest.mark.slow
@pytest.mark.parametrize("later", [{"num_workers": 0}, {"num_workers": 2}, {"memory": "on"}], ids=str)
def test_mid_epoch_resume_is_exact(tmp_path, later):
    root, ckpt = write(tmp_path / "set", dicts(images(60)), chunk_size=3), tmp_path / "11.ckpt"

    def run(save=None, ckpt_path=None, **plain):
        torch.manual_seed(0)
        data = DataModule("stream", root=root, **{"batch_size": 8, "memory": "off", "num_workers": 0, **ALL} | plain)
        model = aezoo.create_model("vae", data.input_shape, latent_dim=2, hidden_dims=(8,))
        trainer = quiet_trainer(max_epochs=3, callbacks=[SaveAt(11, save)])
        trainer.fit(model, data, ckpt_path=ckpt_path)
        assert trainer.global_step == 24
        return model.state_dict()

    whole, resumed = run(save=ckpt), run(ckpt_path=ckpt, **later)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    other = run(seed=1)
    assert not all(torch.equal(value, other[name]) for name, value in whole.items())


def test_pickled_dataset_reads_equal_samples(tmp_path):
    data = DataModule("stream", root=write(tmp_path / "set", dicts(images(9))), memory="off", **ALL)
    dataset = data.dataset("train")
    wanted = [dataset[i][0] for i in range(9)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(copy[i][0], wanted[i]) for i in (8, 0, 4))
    batch, y = copy.__getitems__([7, 0, 3])
    assert torch.equal(batch, torch.stack([wanted[i] for i in (7, 0, 3)])) and y.tolist() == [1, 0, 1]


def test_inconsistent_items_are_reported(tmp_path):
    first = dicts(images(5))
    for name, odd, message in (
        (
            "size",
            {"image": Image.fromarray(images(1, (9, 8, 3))[0]), "label": 0},
            "is 3x9x8, but the first item is 3x8x8",
        ),
        (
            "grey",
            {"image": Image.fromarray(images(1, (8, 8))[0]), "label": 0},
            "is grey and the first item is coloured",
        ),
    ):
        root = write(tmp_path / name, [*first, odd])
        refused(rf"{name}, item 5 \(chunk-0-1.bin\) {message}", root, **ALL)
        refused(rf"{name}, item 5 \(chunk-0-1.bin\) {message}", root, memory="off", **ALL)
    pngs = [{"image": encoded(a)} for a in images(5)]
    refused("item 5 .* is not a readable image", write(tmp_path / "png", [*pngs, {"image": b"<html>"}]), **ALL)
    refused("item 0 .* million pixels", tmp_path / "png", max_pixels=10)
    vectors = [{"x": np.zeros(3, np.float32)}] * 5
    root = write(tmp_path / "nan", [*vectors, {"x": np.array([0, np.nan, 0], np.float32)}])
    refused("item 5 .* has NaN or infinity", root, **ALL)
    refused(
        r"item 5 .* is 4, but the first item is 3",
        write(tmp_path / "long", [*vectors, {"x": np.zeros(4, np.float32)}]),
        **ALL,
    )


def test_labels(tmp_path):
    items = [{"x": np.full(3, 0.5, np.float32), "label": name} for name in ("dog", "cat", "dog", "cow")]
    root = tmp_path / "texts"
    write(root, items)
    refused("item 0 .* is of class 'dog', which classes.json does not name", root, **ALL)
    classes(root)
    refused("item 3 .* is of class 'cow'", root, **ALL)
    classes(root, ["cat", "cow", "dog"])
    assert DataModule("stream", root=str(root), **ALL).tensors("train")[1].tolist() == [2, 0, 2, 1]
    assert DataModule("stream", root=str(root), label_column="none", **ALL).tensors("train")[1] is None
    refused("has no label 'y'", root, label_column="y")
    (root / "classes.json").write_text("{")
    refused("classes.json is not valid JSON", root)
    (root / "classes.json").write_text('["cat", "cat"]')
    refused("classes.json is not a list of two or more names", root)
    numbers = tmp_path / "numbers"
    write(numbers, [(np.full(3, 0.5, np.float32), n) for n in (0, -1, 2)])
    classes(numbers)
    refused("item 2 .* has the label 2", numbers, **ALL)
    classes(numbers, ["a", "b", "c"])
    assert DataModule("stream", root=str(numbers), **ALL).tensors("train")[1].tolist() == [0, -1, 2]


def test_zero_dimensional_tensor_labels_are_read(tmp_path):
    # as from other sources, and as in docs/data.md
    root = write(tmp_path / "set", [(torch.full((3,), 0.5), torch.tensor(n)) for n in (1, 0, 1)])
    classes(tmp_path / "set")
    data = DataModule("stream", root=root, **ALL)
    assert data.tensors("train")[1].tolist() == [1, 0, 1]
    root = write(tmp_path / "wide", [(torch.full((3,), 0.5), n) for n in (torch.tensor(1), torch.tensor([[1, 2]]))])
    refused(r"item 1 .* has the label tensor\(\[\[1, 2\]\]\): give a number", tmp_path / "wide", **ALL)


def test_columns_by_their_names(tmp_path):
    first, second = images(4), images(4)
    items = [
        {"a": Image.fromarray(a), "b": Image.fromarray(b), "m": 0, "n": 1} for a, b in zip(first, second, strict=True)
    ]
    root = write(tmp_path / "set", items)
    refused("item 0 .* has 2 image.*: choose one of a, b with --data.column", root)
    refused("has no image.* called 'm'", root, column="m")
    data = DataModule("stream", root=root, column="b", label_column="n", **ALL)
    x, y = data.tensors("train")
    assert torch.equal(x, chw(second)) and y.tolist() == [1] * 4
    assert DataModule("stream", root=root, column="a", **ALL).tensors("train")[1] is None
    pairs = write(
        tmp_path / "pairs", [(Image.fromarray(a), Image.fromarray(b)) for a, b in zip(first, second, strict=True)]
    )
    assert torch.equal(DataModule("stream", root=pairs, column="1", **ALL).tensors("train")[0], chw(second))


@pytest.mark.slow
def test_invalid_or_missing_chunks_are_refused(tmp_path):
    refused("does not exist: give one that litdata.optimize wrote", tmp_path / "nowhere")
    refused("is an address, and only s3:// addresses are opened", "gs://bucket/set")
    (tmp_path / "empty").mkdir()
    refused("no index.json in", tmp_path / "empty")
    root = tmp_path / "set"
    write(root, dicts(images(12)))
    chunk, index = root / "chunk-0-1.bin", root / "index.json"
    content, told = chunk.read_bytes(), json.loads(index.read_text())
    chunk.write_bytes(content[:-9])
    refused(rf"chunk-0-1.bin has {len(content) - 9} of {len(content)} bytes: copy it again", root)
    chunk.unlink()
    refused("chunk-0-1.bin is missing", root)
    chunk.write_bytes(content[:8] + bytes([255]) * (len(content) - 8))
    refused(r"set, item 4 \(chunk-0-1.bin\) cannot be read", root, **ALL)
    chunk.write_bytes(content)
    for change, message in (
        ("{", "is not an index of litdata"),
        ('{"chunks": []}', "is not an index of litdata"),
        (told | {"chunks": []}, "lists no items"),
        (told | {"config": told["config"] | {"format": "mds"}}, "for another reader"),
        (
            told | {"config": told["config"] | {"compression": "zstd", "compression_level": None}},
            "compressed as a whole",
        ),
        (told | {"chunks": [told["chunks"][0] | {"filename": "../x.bin"}]}, "not in its folder"),
        (told | {"chunks": [told["chunks"][0] | {"chunk_size": -5}]}, "lists -5 items"),
        (told | {"chunks": [told["chunks"][0] | {"chunk_size": 10**15}]}, "lists 10+ items in the"),
        (told | {"chunks": [told["chunks"][0] | {"chunk_size": float("inf")}]}, "is not an index of litdata"),
    ):
        index.write_text(change if isinstance(change, str) else json.dumps(change))
        refused(message, root)
    refused("on_error skip does not apply to stream", root, on_error="skip")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_items_are_refused(tmp_path):
    canary = tmp_path / "canary"
    root = tmp_path / "set"
    write(root, [{"x": np.zeros(3, np.float32), "o": Bomb(canary)} for _ in range(4)])
    canary.unlink(missing_ok=True)
    refused("lists items of pickle, which may be pickled and run code: write only .* Python's own numbers", root)
    index = root / "index.json"
    told = json.loads(index.read_text())
    told["config"]["data_format"][1] = "image:pickle"
    index.write_text(json.dumps(told))
    refused("lists items of image:pickle", root)
    from aezoo.data import stream

    reader = stream._reader(str(root))
    with pytest.raises(Exception, match="Python objects"):
        reader[0]
    assert not canary.exists()


@pytest.mark.slow
def test_missing_litdata_package_names_extra():
    code = (
        "import sys; sys.modules['litdata'] = None\nfrom aezoo.data import DataModule\nDataModule('stream', root='x')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "AezooError: " in done.stderr and "pip install '.[stream]' in a checkout of aezoo" in done.stderr


# ---- packed items ----------------------------------------------------------------------------------------------------


def write_packed(root, items, level):
    from litdata.streaming.cache import Cache

    root.mkdir()
    cache = Cache(str(root), chunk_size=4, compression="zstd", compression_level=level)
    for i, item in enumerate(items):
        cache[i] = item
    cache.done()
    cache.merge()


@pytest.mark.parametrize("level", ["sample", "batch"])
def test_packed_items_are_read_within_the_limit(tmp_path, level):
    items = [RNG.random(300).astype(np.float32) for _ in range(8)]
    write_packed(tmp_path / "set", items, level)
    (x, _), *_ = read_all(DataModule("stream", root=str(tmp_path / "set"), max_bytes=10**5, **ALL))
    assert torch.equal(x, torch.from_numpy(np.stack(items)))


@pytest.mark.parametrize("level", ["sample", "batch"])
def test_packed_items_beyond_the_limit_are_refused_unread(tmp_path, level):
    zeros = np.zeros(2**20, np.float32)
    write_packed(tmp_path / "set", [zeros] * 4, level)
    assert sum(file.stat().st_size for file in (tmp_path / "set").iterdir()) < 10**5
    refused(r"item 0 .* more than the limit of .* --data\.max_bytes", tmp_path / "set", max_bytes=10**6)


@pytest.mark.parametrize("size", [0, 255, 256, 70_000, 2**24])
def test_declared_size_of_packed_content(size):
    import zstandard

    packed = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(size))
    assert stream._unpacked_size(packed) == size
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(size))
    assert stream._unpacked_size(unknown) in (-1, size)
    assert stream._unpacked_size(packed[:4]) == stream._unpacked_size(b"text that is not packed") == -1
