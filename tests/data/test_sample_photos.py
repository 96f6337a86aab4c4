"""Crops of photographs: compared with slices, splits, and invalid sizes."""

import pytest
import torch

from aezoo.data import DataModule, sample_photos
from aezoo.data.sample_photos import PHOTOGRAPHS, crops, read_photograph, varied
from aezoo.errors import AezooError


def test_crops_are_slices_of_a_photograph_and_of_its_half():
    photograph = torch.arange(3 * 12 * 16, dtype=torch.float32).reshape(3, 12, 16).to(torch.uint8)
    found = crops(photograph, 6, 2)
    slices = [photograph[:, i : i + 6, j : j + 6] for i in (0, 3, 6) for j in (0, 3, 6, 9)]
    half = photograph.unflatten(1, (6, 2)).unflatten(3, (8, 2)).double().mean((2, 4))
    slices.append(half[:, :, :6].round().to(torch.uint8))
    assert torch.equal(found, torch.stack(slices))


def test_training_crops_vary_in_channel_order_and_side():
    x = torch.arange(13 * 3 * 4).reshape(13, 3, 2, 2)
    found = varied(x)
    orders = {(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}
    assert {tuple(order) for order in (found[:6, :, 0, 0] % 12 // 4).tolist()} == orders
    assert torch.equal(found[6], x[6].flip(2)) and torch.equal(found[12], x[12])
    assert torch.equal(found[7].flip(2), x[7][list((found[1, :, 0, 0] % 12 // 4).tolist())])


@pytest.mark.slow
def test_splits_share_no_photograph_and_keep_their_pixels():
    data = DataModule("sample_photos", size=96)
    assert data.input_shape == (3, 96, 96)
    splits = {stage: data.tensors(stage)[0] for stage in ("train", "val", "test")}
    # height and width of each photograph
    sizes = {
        "train": [(512, 512), (400, 600), (427, 640), (500, 741), (427, 640)],
        "val": [(300, 451)],
        "test": [(427, 640)],
    }
    for stage, step in {"train": 24, "val": 48, "test": 48}.items():
        n = 0
        for height, width in sizes[stage]:
            for h, w in ((height, width), (height // 2, width // 2)):
                n += len(range(0, h - 95, step)) * len(range(0, w - 95, step))
        assert len(splits[stage]) == n
    for stage, names in PHOTOGRAPHS.items():
        corner = read_photograph(names[0])[:, :96, :96].float() / 255
        assert torch.equal(splits[stage][0], corner)
    names = [name for of_stage in PHOTOGRAPHS.values() for name in of_stage]
    assert len(names) == len(set(names)) == 7


def test_sizes_and_missing_packages_are_refused_in_one_line(monkeypatch):
    with pytest.raises(AezooError, match="at most 256 pixels per side"):
        DataModule("sample_photos", size=300)
    monkeypatch.setattr(sample_photos, "find_spec", lambda name: None)
    with pytest.raises(AezooError, match=r"pip install '\.\[images\]'"):
        DataModule("sample_photos")
