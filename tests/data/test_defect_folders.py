"""Folders in the layouts of MVTec AD and VisA: splits, labels, masks, and missing or damaged files."""

import numpy as np
import pytest
import torch
from PIL import Image

from aezoo.data import DataModule
from aezoo.errors import AezooError

RNG = np.random.default_rng(0)


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def picture(path, shape=(12, 12, 3)):
    save(path, RNG.integers(0, 256, shape, dtype=np.uint8))


def mask(shape=(12, 12), value=255):
    values = np.zeros(shape, np.uint8)
    values[2:5, 6:] = value
    return values


def mvtec(root):
    for i in range(6):
        picture(root / f"train/good/{i:03}.png")
    for kind in ("good", "crack", "dent"):
        for i in range(2):
            picture(root / f"test/{kind}/{i:03}.png")
            if kind != "good":
                save(root / f"ground_truth/{kind}/{i:03}_mask.png", mask())
    return root


def visa(root):
    lines = ["object,split,label,image,mask"]
    for i in range(6):
        split = "train" if i < 4 else "test"
        for name in ("candle", "pcb1"):
            lines.append(f"{name},{split},normal,{name}/Data/Images/Normal/{i}.JPG,")
            picture(root / f"{name}/Data/Images/Normal/{i}.JPG")
    for i in range(3):
        lines.append(f"candle,test,anomaly,candle/Data/Images/Anomaly/{i}.JPG,candle/Data/Masks/Anomaly/{i}.png")
        picture(root / f"candle/Data/Images/Anomaly/{i}.JPG")
        # masks contain the number of the kind of defect, not white
        save(root / f"candle/Data/Masks/Anomaly/{i}.png", mask(value=i + 1))
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return root / "candle"


def opened(root, layout, **settings):
    return DataModule("folder", root=str(root), layout=layout, **settings)


def refused(match, root, layout, **settings):
    with pytest.raises(AezooError, match=match) as caught:
        opened(root, layout, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("layout", "make", "counts"), [("mvtec", mvtec, (2, 4)), ("visa", visa, (2, 3))])
def test_splits_labels_and_masks(tmp_path, layout, make, counts):
    data = opened(make(tmp_path), layout, val_fraction=0.25)
    assert (data.input_shape, data.num_classes, data.source.class_names) == ((3, 12, 12), 2, ("good", "defect"))
    assert not data.tensors("train")[1].any() and not data.tensors("val")[1].any()
    x, y = data.tensors("test")
    assert (int((y == 0).sum()), int(y.sum())) == counts
    assert len(data.tensors("train")[0]) + len(data.tensors("val")[0]) == (6 if layout == "mvtec" else 4)
    found = data.source.pixel_masks(data.dataset("test").paths)
    assert found.shape == (len(x), 12, 12)
    wanted = torch.from_numpy(mask() > 0)
    for marked, label in zip(found, y, strict=True):
        assert torch.equal(marked, wanted & bool(label))


def test_mask_is_resized_and_cropped_like_its_picture(tmp_path):
    root = mvtec(tmp_path)
    # the middle 20 columns are kept, and blocks of 2 x 2 become one pixel
    values = np.zeros((20, 30), np.uint8)
    values[4:8, 9:] = 255
    for path in (root / "train").rglob("*.png"):
        picture(path, (20, 30, 3))
    for path in (root / "test").rglob("*.png"):
        save(path, np.repeat(values[..., None], 3, 2))
    for path in (root / "ground_truth").rglob("*.png"):
        save(path, values)
    data = opened(root, "mvtec", size=10, channels=1)
    x, y = data.tensors("test")
    found = data.source.pixel_masks(data.dataset("test").paths)
    assert torch.equal(found[y == 1], x[y == 1][:, 0] > 0.5) and found[y == 1].any() and not found[y == 0].any()


@pytest.mark.filterwarnings("ignore:.*outside the folders of the splits")
@pytest.mark.parametrize("layout", ["auto", "mvtec"])
def test_only_these_layouts_have_masks(tmp_path, layout):
    data = opened(mvtec(tmp_path), layout)
    assert (data.source.pixel_masks(data.dataset("test").paths) is None) == (layout == "auto")


def test_missing_files_are_named(tmp_path):
    root = mvtec(tmp_path / "bottle")
    refused("give one class, such as --data.root .*bottle", tmp_path, "mvtec")
    refused("no .*1cls.csv", root, "visa")
    (root / "ground_truth/dent/001_mask.png").unlink()
    refused("001_mask.png is missing: download the set again", root, "mvtec")
    (root / "train/dent").mkdir()
    refused("contains dent besides good", root, "mvtec")


def test_damaged_split_of_visa_is_refused(tmp_path):
    root = visa(tmp_path)
    table = tmp_path / "split_csv/1cls.csv"
    before = table.read_text()
    for change, match in {
        ("Images/Anomaly/0.JPG", "Images/Anomaly/9.JPG"): "9.JPG is missing",
        ("candle/Data/Masks/Anomaly/1.png", "../1.png"): "not inside",
        ("candle/Data/Masks/Anomaly/1.png", ""): "names the file ''",
        ("candle,test,anomaly", "candle,tets,anomaly"): "line 14 of .* has the split 'tets'",
        ("image,mask", "image"): "has no columns",
        ("candle,train", "candles,train"): "no training images of candle",
    }.items():
        table.write_text(before.replace(*change))
        refused(match, root, "visa")
    table.write_bytes(b"\xff\xfe\x00")
    refused("has no columns", root, "visa")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"not a picture", "is not a readable image"),
        (mask((12, 11)), "is 12x11, its picture 12x12"),
        (np.zeros((12, 12), np.uint8), "marks no pixel"),
    ],
    ids=["broken", "size", "empty"],
)
def test_damaged_mask_is_refused_when_read(tmp_path, content, match):
    data = opened(mvtec(tmp_path), "mvtec")
    path = tmp_path / "ground_truth/dent/001_mask.png"
    path.write_bytes(content) if isinstance(content, bytes) else save(path, content)
    with pytest.raises(AezooError, match=match) as caught:
        data.source.pixel_masks(data.dataset("test").paths)
    assert "\n" not in str(caught.value)


def test_layout_of_another_kind_of_source_is_refused(tmp_path):
    refused("layout image is for arrays", mvtec(tmp_path), "image")
    with pytest.raises(AezooError, match="layout mvtec is for folders of images, not for x"):
        DataModule.from_arrays(torch.rand(20, 4), layout="mvtec")
