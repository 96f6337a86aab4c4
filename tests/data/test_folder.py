"""Image folders as users have them, including broken files."""

import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from aezoo.data import ArrayDataset, DataModule, image_folders
from aezoo.data.folder import move_rows_to_front
from aezoo.data.image_folders import find_images
from aezoo.data.images import read_header
from aezoo.errors import AezooError

RNG = np.random.default_rng(0)


def save(path, shape=(8, 8, 3), values=None, **plain):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = RNG.integers(0, 256, shape, dtype=np.uint8) if values is None else values
    Image.fromarray(values).save(path, **plain)
    return values


def pictures(root, n=10, shape=(8, 8, 3), suffix="png"):
    return [save(root / f"{i:02}.{suffix}", shape) for i in range(n)]


def read_all(data):
    return [data.tensors(stage) for stage in ("train", "val", "test")]


def refused(match, root, **plain):
    with pytest.raises(AezooError, match=match) as caught:
        DataModule("folder", root=str(root), **plain).setup()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flat_folder_without_labels(tmp_path):
    images = pictures(tmp_path)
    for data in (DataModule("folder", root=str(tmp_path)), DataModule(str(tmp_path))):
        assert (data.input_shape, data.num_classes) == ((3, 8, 8), None)
        assert [len(data.dataset(stage)) for stage in ("train", "val", "test")] == [8, 1, 1]
        x = torch.cat([data.tensors(stage)[0] for stage in ("train", "val", "test")])
        wanted = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        assert sorted(x.flatten(1).tolist()) == sorted(wanted.flatten(1).tolist())
        assert len(next(iter(data.train_dataloader()))) == 1


def test_class_folders_nested_to_any_depth(tmp_path):
    for name, n in (("dog", 10), ("cat", 20)):
        for i in range(n):
            save(
                tmp_path / name / f"part{i % 3}" / f"{i}.png",
                values=np.full((4, 4), 9 if name == "cat" else 200, np.uint8),
            )
    data = DataModule("folder", root=str(tmp_path))
    assert (data.input_shape, data.num_classes, data.source.class_names) == ((1, 4, 4), 2, ("cat", "dog"))
    for stage, counts in (("train", [16, 8]), ("val", [2, 1]), ("test", [2, 1])):
        x, y = data.tensors(stage)
        assert y.bincount().tolist() == counts
        assert torch.equal(y == 0, x[:, 0, 0, 0] < 0.5)


def test_single_folder_or_stray_files_give_no_classes(tmp_path):
    pictures(tmp_path / "images")
    assert DataModule("folder", root=str(tmp_path)).num_classes is None
    pictures(tmp_path / "more")
    assert DataModule("folder", root=str(tmp_path)).num_classes == 2
    save(tmp_path / "stray.png")
    assert DataModule("folder", root=str(tmp_path)).num_classes is None


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    pictures(tmp_path / "far" / "cats", 4)
    pictures(tmp_path / "set" / "dogs", 4)
    (tmp_path / "set" / "cats").symlink_to(tmp_path / "far" / "cats")
    (tmp_path / "set" / "dogs" / "back").symlink_to(tmp_path / "set")
    files, names = find_images(tmp_path / "set")
    assert names == ("cats", "dogs") and [label for _, label in files["train"]].count(0) == 4


def test_images_come_in_the_order_of_their_folders_names(tmp_path):
    for name in ("a/z", "a-b/y", "a b/x", "a/deep/c", "a/b", "A/q", "a/deep-er/d"):
        save(tmp_path / f"{name}.PNG")
    files, names = find_images(tmp_path)
    assert [path for path, _ in files["train"]] == sorted(tmp_path.rglob("*.PNG"))
    assert [names[k] for _, k in files["train"]] == [p.relative_to(tmp_path).parts[0] for p, _ in files["train"]]


def test_dangling_links_are_reported_as_unreadable(tmp_path):
    pictures(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    os.mkfifo(tmp_path / "pipe.png")  # opening a pipe that nothing writes to would block
    refused(r"cannot read .*gone.png \(No such file or directory\): check the file", tmp_path)
    with pytest.warns(UserWarning, match="2 of 12 files skipped as broken: .*gone.png, .*round.png"):
        DataModule("folder", root=str(tmp_path), on_error="skip").setup()


def test_unreadable_folder_is_reported(tmp_path, monkeypatch):
    pictures(tmp_path / "shut")

    def look(folder, scandir=os.scandir):
        if Path(folder).name == "shut":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", look)
    refused(r"cannot read the folder .*shut \(Permission denied\): check its permissions", tmp_path)


def test_slow_folder_scan_is_reported(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    pictures(tmp_path, 2)
    find_images(tmp_path)
    assert not caplog.records
    said, scandir, inform = threading.Event(), os.scandir, image_folders.rank_zero_info
    monkeypatch.setattr(image_folders, "_QUIET_SECONDS", 0)
    monkeypatch.setattr(image_folders, "rank_zero_info", lambda text: (inform(text), said.set()))
    monkeypatch.setattr(os, "scandir", lambda folder: scandir(folder) if said.wait(5) else None)
    find_images(tmp_path)
    (record,) = caplog.records
    assert record.getMessage() == f"looking for images at any depth of {tmp_path}"


def test_split_folders(tmp_path):
    for split, n in (("train", 6), ("Validation", 2), ("testing", 3)):
        for name in ("a", "b"):
            pictures(tmp_path / split / name, n)
    data = DataModule("folder", root=str(tmp_path))
    assert data.describe() == "folder: 12 train, 4 val, 6 test, 3x8x8, 2 classes"
    save(tmp_path / "other" / "x.png")
    with pytest.warns(UserWarning, match="1 images outside the folders of the splits"):
        DataModule("folder", root=str(tmp_path))


def test_val_is_split_from_train_if_only_test_exists(tmp_path):
    pictures(tmp_path / "train", 10)
    pictures(tmp_path / "test", 4)
    data = DataModule("folder", root=str(tmp_path))
    assert [len(data.dataset(stage)) for stage in ("train", "val", "test")] == [9, 1, 4]


def test_resize_crop_and_grey(tmp_path):
    save(tmp_path / "wide.png", values=np.repeat(np.uint8([[0] * 10 + [255] * 20 + [0] * 10]), 20, axis=0))
    for i in range(9):
        save(tmp_path / f"{i}.png", (12 + i, 17))
    data = DataModule("folder", root=str(tmp_path), size=10, val_fraction=0, test_fraction=0)
    assert data.input_shape == (1, 10, 10)
    wide = data.tensors("train")[0][-1]
    # the middle square of 40 x 20 is white, with smoothed edges
    assert (wide[..., 1:-1] == 1).all()
    assert (wide > 0.8).all()
    coloured = DataModule("folder", root=str(tmp_path), size=10, channels=3, val_fraction=0, test_fraction=0)
    assert coloured.tensors("train")[0].shape == (10, 3, 10, 10)


def test_mixed_image_sizes_name_two_files_and_remedy(tmp_path):
    pictures(tmp_path, 5)
    save(tmp_path / "odd.png", (19, 7, 3))
    message = refused("images of 2 sizes", tmp_path)
    assert "odd.png is 19x7" in message
    assert "--data.size 7" in message
    DataModule("folder", root=str(tmp_path), size=7).setup()


def test_mixed_grey_and_colour_needs_channels_option(tmp_path):
    pictures(tmp_path, 5)
    save(tmp_path / "grey.png", (8, 8))
    refused("grey.png is grey and .*00.png is coloured: choose --data.channels", tmp_path)
    for channels in (1, 3):
        data = DataModule("folder", root=str(tmp_path), channels=channels)
        assert data.tensors("train")[0].shape[1] == channels


def test_transparency_is_dropped_with_warning(tmp_path):
    pictures(tmp_path, 5, (8, 8, 4))
    data = DataModule("folder", root=str(tmp_path))
    with pytest.warns(UserWarning, match="transparency is dropped from 5 images"):
        data.setup()
    assert data.input_shape == (3, 8, 8)


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_multi_image_file_reads_first_with_warning(tmp_path, suffix):
    for i in range(5):
        first, *others = (Image.fromarray(np.full((8, 8), 40 * i + 9 * j, np.uint8)) for j in range(3))
        first.save(tmp_path / f"{i}.{suffix}", save_all=True, append_images=others)
    data = DataModule("folder", root=str(tmp_path), channels=1)
    with pytest.warns(UserWarning, match="5 files contain several images, and only the first is read"):
        data.setup()


@pytest.mark.parametrize(("mode", "suffix"), [("P", "png"), ("P", "gif"), ("L", "png"), ("RGB", "png")])
def test_transparent_colour_is_dropped_with_warning(tmp_path, mode, suffix):
    for i in range(5):
        image = Image.fromarray(np.tile(np.uint8([0, 40 * i + 50]), (8, 4))).convert(mode)
        image.save(tmp_path / f"{i}.{suffix}", transparency=(0, 0, 0) if mode == "RGB" else 0)
    with pytest.warns(UserWarning, match="transparency is dropped from 5 images"):
        DataModule("folder", root=str(tmp_path)).setup()


def test_exif_rotation_is_applied(tmp_path):
    values = np.zeros((6, 9), np.uint8)
    values[0, :] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(3):
        save(tmp_path / f"{i}.png", values=values + np.uint8(i), exif=exif)
    data = DataModule("folder", root=str(tmp_path), val_fraction=0, test_fraction=0)
    assert data.input_shape == (1, 9, 6)
    x = data.tensors("train")[0][0, 0]
    # turned clockwise by 90 degrees: the first row becomes the last column
    assert (x[:, -1] == 1).all()
    assert (x[:, :-1] == 0).all()


@pytest.mark.parametrize("memory", ["on", "off"])
def test_sixteen_bit_images_are_scaled(tmp_path, memory):
    values = RNG.integers(0, 65536, (4, 5), dtype=np.uint16)
    save(tmp_path / "0.png", values=values)
    low = save(tmp_path / "1.png", (4, 5))
    data = DataModule("folder", root=str(tmp_path), val_fraction=0, test_fraction=0, memory=memory)
    x = data.tensors("train")[0]
    assert torch.equal(x[0, 0], torch.from_numpy(values.astype(np.float32)) / 65535)
    assert torch.equal(x[1, 0], torch.from_numpy(low) / 255)
    assert DataModule("folder", root=str(tmp_path), size=3, channels=3).input_shape == (3, 3, 3)


def test_decompression_bomb_is_refused_by_header(tmp_path, monkeypatch):
    pictures(tmp_path, 4)
    Image.new("L", (3000, 1000)).save(tmp_path / "zz.png")
    message = refused("zz.png has 3 million pixels, more than the limit of 1", tmp_path, max_pixels=1_000_000, size=8)
    assert "--data.max_pixels" in message
    # Pillow's own limit comes first, as a warning or an error
    for own in (1_000_000, 2_000_000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            refused("zz.png has", tmp_path, max_pixels=1_000_000, size=8)


def broken(root):
    good = root / "good"
    save(good / "a.jpg", (64, 64, 3))
    save(good / "a.png", (64, 64, 3))
    for name, data, message in (
        ("cut.jpg", (good / "a.jpg").read_bytes()[:-900], "cut.jpg is not a readable image"),
        ("cut.png", (good / "a.png").read_bytes()[:-5000], "cut.png is not a readable image"),
        ("empty.png", b"", "empty.png is not a readable image (0 bytes, empty)"),
        ("page.png", b"\n<html>not found</html>", "looks like HTML: a failed download?"),
        ("noise.jpg", b"noise" * 30, "noise.jpg is not a readable image (150 bytes)"),
    ):
        (root / name).write_bytes(data)
        yield root / name, message


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    ("note", "shape"),
    [
        (b"", (4, 8)),
        (chunk(b"tEXt", b"date:create\0today"), (4, 8)),
        (chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"), (8, 4)),
        (chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'), (8, 4)),
    ],
    ids=["nothing", "a date", "eXIf", "XMP"],
)
def test_png_header_is_read_without_decoding(tmp_path, monkeypatch, note, shape):
    path, loads = tmp_path / "a.png", []
    save(path, (4, 8, 3))
    plain = path.read_bytes()
    path.write_bytes(plain[:-12] + note + plain[-12:])
    load = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda image: loads.append(image) or load(image))
    assert read_header(path, 100).shape == shape
    assert len(loads) == (shape == (8, 4))  # the chunk is after the pixels
    cut = tmp_path / "cut.png"
    cut.write_bytes(plain[:-30])
    assert read_header(cut, 100).shape == (4, 8)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["on", "off"])
def test_corrupt_files_are_named_or_skipped_with_a_count(tmp_path, memory):
    cases = list(broken(tmp_path / "all"))
    assert len(cases) == 5
    for path, message in cases:
        single = tmp_path / path.name.replace(".", "_")
        pictures(single, 12, (64, 64, 3))
        (single / path.name).write_bytes(path.read_bytes())
        with pytest.raises(AezooError) as caught:
            # samples that are not held in memory are decoded when used
            read_all(DataModule("folder", root=str(single), memory=memory))
        assert message in str(caught.value)
        assert str(single / path.name) in str(caught.value)
        assert "--data.on_error skip" in str(caught.value)
        assert "\n" not in str(caught.value)
    pictures(tmp_path / "all", 12, (64, 64, 3))
    data = DataModule("folder", root=str(tmp_path / "all"), on_error="skip", memory=memory)
    with pytest.warns(UserWarning, match="5 of 19 files skipped as broken"):
        data.setup()
    assert sum(len(data.dataset(stage)) for stage in ("train", "val", "test")) == 14
    assert data.tensors("train")[0].isfinite().all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_deleted_file_is_reported_in_one_line(tmp_path, num_workers):
    pictures(tmp_path, 10)
    data = DataModule("folder", root=str(tmp_path), memory="off", num_workers=num_workers, batch_size=2)
    batches = iter(data.train_dataloader())
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(AezooError, match=r"^cannot read \S+.png \(No such file or directory\): check the file and"):
        list(batches)


@pytest.mark.slow
def test_resident_and_lazy_folder_samples_match(tmp_path):
    for name in ("a", "b"):
        pictures(tmp_path / name, 20)
    resident = DataModule("folder", root=str(tmp_path), size=6)
    assert isinstance(resident.dataset("train"), ArrayDataset)
    lazy = DataModule("folder", root=str(tmp_path), size=6, num_workers=2, batch_size=5, memory="off")
    assert not isinstance(lazy.dataset("train"), ArrayDataset)
    for stage in ("train", "val", "test"):
        for ours, theirs in zip(resident.tensors(stage), lazy.tensors(stage), strict=True):
            assert torch.equal(ours, theirs)
    x, y = next(iter(lazy.train_dataloader()))
    assert (x.dtype, x.shape, y.dtype) == (torch.uint8, (5, 3, 6, 6), torch.int64)
    dataset = lazy.dataset("train")
    batch, samples = dataset.__getitems__([3, 0, 31]), [dataset[i] for i in (3, 0, 31)]
    assert torch.equal(batch[0], torch.stack([x for x, _ in samples]))
    assert batch[1].tolist() == [y for _, y in samples]


@pytest.mark.parametrize("shape", [(9, 3, 8, 8), (9, 1, 1, 1), (9, 3, 65, 1)])
@pytest.mark.parametrize("n", [9, 5, 0])
def test_rows_are_moved_in_place(shape, n):
    x, order = torch.rand(shape), torch.randperm(9)[:n]
    wanted = x[order]
    move_rows_to_front(x, order)
    assert torch.equal(x[:n], wanted)


@pytest.mark.slow
def test_held_images_share_the_tensor_they_were_decoded_into(tmp_path):
    for name in ("a", "b"):
        pictures(tmp_path / name, 20)
    data = DataModule("folder", root=str(tmp_path), memory="on")
    (storage,) = {data.dataset(stage).x.untyped_storage().data_ptr() for stage in ("train", "val", "test")}
    held = data.dataset("train").x.untyped_storage()
    assert (held.data_ptr(), held.nbytes()) == (storage, 40 * 3 * 8 * 8)


_PEAKS = """
import os, re, sys
from pathlib import Path
from aezoo.data import DataModule

os.cpu_count = lambda: 2  # one thread per core decodes, each into a separate image

def most():  # not ru_maxrss, which starts at that of the parent process
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def peak(memory, on_error):
    data = DataModule("folder", root=sys.argv[1], memory=memory, on_error=on_error)
    before = most()
    data.setup()
    return most() - before

print(peak("off", "skip"), peak("on", "skip"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="a process cannot tell what it took at most")
def test_decoding_memory_is_that_of_the_samples(tmp_path):
    for i in range(120):  # 90 MiB
        Image.new("RGB", (512, 512), (i, 0, 0)).save(tmp_path / f"{i}.png", compress_level=1)
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:-40])
    run = subprocess.run([sys.executable, "-c", _PEAKS, tmp_path], capture_output=True, text=True, check=True)
    looked_at, held = map(float, run.stdout.split()[-2:])
    assert looked_at < 40  # only images that are being decoded
    assert 40 < held < 130


def test_empty_missing_and_wrong_folders(tmp_path):
    refused("no images in .*looked for .bmp .* at any depth", tmp_path)
    refused("the image folder .*nowhere does not exist: give its path with --data.root", tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    refused("file is a file", tmp_path / "file")
    (tmp_path / "._a.png").write_bytes(b"finder")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "a.png").write_bytes(b"finder")
    refused("no images", tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(AezooError, match="every file is broken"):
        DataModule("folder", root=str(tmp_path), on_error="skip")
    refused("scale standard does not apply to image files", tmp_path, scale="standard")


def test_empty_class_folders_warn(tmp_path):
    for name in ("a", "b"):
        pictures(tmp_path / name, 5)
    for name in (*"cdefg", ".git"):
        (tmp_path / name).mkdir()
    with pytest.warns(UserWarning, match=r": 5 class folders contain no images: c, d, e, \.\.\.$"):
        assert DataModule("folder", root=str(tmp_path)).num_classes == 2


def test_constant_images_are_refused(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png", values=np.full((4, 4), 7, np.uint8))
    refused("constant data", tmp_path)
