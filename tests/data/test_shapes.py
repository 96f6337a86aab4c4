"""Procedural sprites: factors, images compared with a count of points inside, and splits."""

import math
import pickle

import numpy as np
import pytest
import torch

from aezoo.cli.main import main
from aezoo.data import DataModule
from aezoo.data.classes import labels_of
from aezoo.data.shapes import COMBINATIONS, RGB, Shapes
from aezoo.data.source import Options
from aezoo.errors import AezooError

SQUARE, ELLIPSE, HEART = range(3)


def shapes(size=64, channels=None, **plain):
    return Shapes(Options("shapes", size=size, channels=channels, memory="off", **plain))


def picture(source, *factors):
    return source.render(torch.tensor([factors]))[0, 0].double() / 255


def centre_of_mass(image):
    at = torch.arange(len(image), dtype=torch.float64) + 0.5
    return float((image.sum(0) * at).sum() / image.sum()), float((image.sum(1) * at).sum() / image.sum())


def points_inside(shape, scale, orientation, x, y, size, fine=16):
    """Share of a fine grid's points in each pixel that lie inside the shape, in the complex plane with y down."""
    at = (np.arange(size * fine) + 0.5) / fine
    centre = [((place - 15.5) / 64 + 0.5) * size for place in (x, y)]
    z = (at[None, :] - centre[0]) + 1j * (at[:, None] - centre[1])
    z = z * np.exp(-2j * math.pi * orientation / 40) / ((0.5 + 0.1 * scale) * size / 4)
    if shape == SQUARE:
        inside = np.maximum(abs(z.real), abs(z.imag)) <= math.sqrt(0.5)
    elif shape == ELLIPSE:
        inside = z.real**2 + (2 * z.imag) ** 2 <= 1
    else:
        # unit: half the side of the square; turned so that the two discs are right of and above a level square
        shift = (math.pi / 2 + 2 / 3) / (4 + math.pi)
        w = z * math.sqrt(2) * (1 + shift) * np.exp(1j * math.pi / 4) + shift * (1 - 1j)
        inside = np.maximum(abs(w.real), abs(w.imag)) <= 1
        inside |= (abs(w - 1) <= 1) | (abs(w + 1j) <= 1)
    return torch.from_numpy(inside.reshape(size, fine, size, fine).mean((1, 3)))


@pytest.mark.parametrize(("channels", "colours"), [(None, 1), (3, 36)])
def test_indices_and_factors_roundtrip(channels, colours):
    source = shapes(channels=channels)
    assert len(source) == 737_280 * colours == math.prod(source.factor_sizes)
    numbers = torch.cat([torch.arange(50), torch.randint(len(source), (5000,)), torch.tensor([len(source) - 1])])
    factors = source.factors(numbers)
    assert torch.equal(source.index(factors), numbers)
    digits = np.stack(np.unravel_index(numbers.numpy(), source.factor_sizes), 1)
    assert factors.dtype == torch.int64 and (factors.numpy() == digits).all()
    assert factors.shape[1] == len(source.factor_names) and source.factor_names[-5:] == (
        "shape", "scale", "orientation", "x", "y",
    )  # fmt: skip
    assert source.factors([41, 42]).tolist() == source.factors(torch.tensor([41, 42])).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SQUARE, ELLIPSE, HEART])
@pytest.mark.parametrize(("size", "off"), [(64, 0.015), (28, 0.04)])
def test_pixel_values_are_the_covered_share(shape, size, off):
    source = shapes(size)
    dice = torch.Generator().manual_seed(0)
    for _ in range(12):
        rest = [int(torch.randint(n, (), generator=dice)) for n in (6, 40, 32, 32)]
        share = points_inside(shape, *rest, size)
        error = picture(source, shape, *rest) - share
        # large errors at corners only, where the distance to one edge is a poor approximation
        assert float(error.abs().max()) < 0.25 and float(error.abs().sum()) < 0.1 * size, rest
        assert float(error.sum()) == pytest.approx(0, abs=off * float(share.sum())), rest


@pytest.mark.parametrize(("shape", "area"), [(SQUARE, 2), (ELLIPSE, math.pi / 2), (HEART, None)])
def test_area_grows_with_the_square_of_the_scale(shape, area):
    source = shapes()
    areas = torch.tensor([float(picture(source, shape, scale, 7, 3, 20).sum()) for scale in range(6)])
    scales = torch.linspace(0.5, 1, 6)
    assert torch.allclose(areas / scales**2, areas[-1:].expand(6), rtol=0.01)
    if area:
        assert areas[-1] == pytest.approx(area * 16**2, rel=0.01)


@pytest.mark.parametrize("shape", [SQUARE, ELLIPSE, HEART])
@pytest.mark.parametrize("size", [64, 32, 20])
def test_centre_of_mass_is_linear_in_position(shape, size):
    source = shapes(size)
    for x, y, scale, orientation in ((0, 31, 5, 11), (31, 0, 5, 3), (13, 14, 2, 39), (16, 15, 0, 0), (5, 6, 3, 20)):
        found = centre_of_mass(picture(source, shape, scale, orientation, x, y))
        meant = [size / 2 + (place - 15.5) * size / 64 for place in (x, y)]
        assert found == pytest.approx(meant, abs=0.06), (x, y, scale, orientation)


@pytest.mark.parametrize(("shape", "period"), [(SQUARE, 10), (ELLIPSE, 20), (HEART, 40)])
def test_shape_repeats_exactly_after_its_period(shape, period):
    source = shapes(28)
    images = source.render(torch.tensor([[shape, 5, o, 9, 20] for o in range(40)])).flatten(1)
    assert len(images.unique(dim=0)) == period
    assert torch.equal(images, images[:period].repeat(40 // period, 1))


def test_rotations_compose_and_match_array_rotation():
    # x = y = 15.5 would be the middle; the sprite at 15 is the mirror image of that at 16
    source = shapes()
    for shape in (SQUARE, ELLIPSE, HEART):
        for orientation in (0, 3, 8):
            start = picture(source, shape, 4, orientation, 15, 16)
            turned = picture(source, shape, 4, (orientation + 10) % 40, 15, 15)
            assert (torch.rot90(start, -1) - turned).abs().max() <= 1 / 255 + 1e-9
    angle = 2 * math.pi * torch.arange(41) / 40
    assert torch.allclose(angle[40].cos(), angle[0].cos()) and torch.allclose(
        angle[40].sin(), angle[0].sin(), atol=1e-6
    )


def test_at_64_pixels_a_step_of_x_is_one_pixel():
    source = shapes()
    for shape in (SQUARE, ELLIPSE, HEART):
        first = picture(source, shape, 5, 4, 0, 7)
        assert all(
            (picture(source, shape, 5, 4, x, 7).roll(-x, 1) - first).abs().max() <= 1 / 255 + 1e-9 for x in (1, 31)
        )


def test_colours_are_exact_and_edges_between_the_two():
    source, grey = shapes(32, 3), shapes(32)
    for hue in range(6):
        for background in range(6):
            factors = torch.tensor([[hue, background, HEART, 5, 3, 10, 11]])
            image = source.render(factors)[0]
            share = grey.render(factors[:, 2:])[0, 0]
            assert (image[:, share == 255] == 255 * RGB[hue][:, None]).all()
            assert (image[:, share == 0] == 128 * RGB[background][:, None]).all()
            low, high = (
                torch.minimum(255 * RGB[hue], 128 * RGB[background]),
                torch.maximum(255 * RGB[hue], 128 * RGB[background]),
            )
            edge = image[:, (share > 0) & (share < 255)]
            assert edge.shape[1] > 5 and ((edge >= low[:, None]) & (edge <= high[:, None])).all()
    number = source.index(torch.tensor([[2, 5, 1, 2, 3, 4, 5]]))
    assert int(number) % COMBINATIONS == int(grey.index(torch.tensor([[1, 2, 3, 4, 5]])))
    assert (source.factors(number + COMBINATIONS)[0, :2] == torch.tensor([3, 0])).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 33])
def test_image_depends_on_factors_only(size, channels):
    source = shapes(size, channels)
    numbers = torch.randint(len(source), (300,), generator=torch.Generator().manual_seed(1))
    images = source.render(source.factors(numbers))
    assert images.dtype == torch.uint8 and images.shape == (300, channels, size, size)
    assert torch.equal(images, shapes(size, channels).render(source.factors(numbers)))
    assert torch.equal(images.flip(0), source.render(source.factors(numbers.flip(0))))
    for i in (0, 7, 299):
        assert torch.equal(images[i : i + 1], source.render(source.factors(numbers[i : i + 1])))
    assert source.render(source.factors([])).shape == (0, channels, size, size)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [None, 3])
def test_splits_partition_samples_without_shared_images(channels):
    data = DataModule("shapes", size=8, channels=channels, memory="off", seed=3, val_fraction=0.2)
    source = data.source
    if channels == 3:
        # one pair of hues represents all: the order is that of grey images
        rows = {stage: source.rows(stage)[: len(data.dataset(stage)) // 36] for stage in ("train", "val", "test")}
    else:
        rows = {stage: source.rows(stage) for stage in ("train", "val", "test")}
    assert [round(len(part) / COMBINATIONS, 3) for part in rows.values()] == [0.7, 0.2, 0.1]
    assert torch.equal(torch.cat([*rows.values()]).sort().values, torch.arange(COMBINATIONS))
    turned = torch.tensor([10, 20, 40])
    pictures = {}
    for stage, part in rows.items():
        factors = shapes().factors(part)
        factors[:, 2] %= turned[factors[:, 0]]
        pictures[stage] = set(shapes().index(factors).tolist())
        assert torch.bincount(factors[:, 0]).float().std() < 0.01 * len(part)
    assert sum(map(len, pictures.values())) == 430_080 == len(set.union(*pictures.values()))


def test_split_provides_indices_and_labels():
    data = DataModule("shapes", size=16, channels=3, memory="off", batch_size=64, num_workers=0)
    dataset, numbers = data.dataset("val"), data.source.rows("val")
    assert len(dataset) == len(numbers) == len(dataset.labels)
    at = [0, 5, len(dataset) // 2, len(dataset) - 1]
    x, y = dataset.__getitems__(at)
    factors = data.source.factors(numbers[at])
    assert torch.equal(x, data.source.render(factors)) and torch.equal(y, factors[:, 2])
    assert torch.equal(dataset.labels[at], y) and torch.equal(labels_of(dataset)[at], y)
    for i, one in zip(at, x, strict=True):
        assert torch.equal(dataset[i][0], one)
    assert torch.equal(dataset[-1][0], x[-1])
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[5][0], x[1])


@pytest.mark.slow
@pytest.mark.parametrize("classes", [None, ["heart"]])
def test_held_samples_and_workers_give_the_same_batches(classes, monkeypatch):
    # fewer positions, since rendering all of them takes seconds
    monkeypatch.setattr("aezoo.data.shapes.SIZES", (3, 6, 40, 4, 4))
    monkeypatch.setattr("aezoo.data.shapes.NAMES", ("shape", "scale", "orientation", "x", "y"))
    monkeypatch.setattr("aezoo.data.shapes.COMBINATIONS", 3 * 6 * 40 * 16)
    seen = []
    for memory, num_workers in (("on", 0), ("off", 0), ("off", 2)):
        data = DataModule(
            "shapes", size=8, memory=memory, num_workers=num_workers, batch_size=512, train_classes=classes
        )
        seen.append([*data.train_dataloader()])
        assert data.describe().startswith("shapes: ") and "1x8x8, 3 classes" in data.describe()
        (x, y) = data.tensors("test")
        assert x.dtype == torch.float32 and x.min() == 0 and x.max() == 1 and set(y.tolist()) == {0, 1, 2}
        assert torch.equal(
            (x * 255).round().to(torch.uint8), data.source.render(data.source.factors(data.source.rows("test")))
        )
    for batches in seen[1:]:
        assert len(batches) == len(seen[0]) > 3
        for one, other in zip(seen[0], batches, strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
            assert classes is None or set(one[1].tolist()) == {HEART}


@pytest.mark.slow
def test_split_membership_is_determined_by_seed():
    first, again, other = (shapes(8, seed=seed).rows("val") for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_disabled_split_is_none():
    assert shapes(8, val_fraction=0.0).split("val") is None
    assert shapes(8, val_fraction=0.0).split("train") is not None


@pytest.mark.parametrize(
    ("plain", "message"),
    [({"size": 7}, "at least 8"), ({"scale": "unit"}, "use auto"), ({"scale": "standard"}, "use auto")],
)
def test_invalid_options_are_refused_in_one_line(plain, message):
    with pytest.raises(AezooError, match=message) as caught:
        DataModule("shapes", **plain)
    assert "\n" not in str(caught.value)


def test_out_of_range_factors_and_indices_are_refused():
    source = shapes(8)
    for wrong in ([COMBINATIONS], [-1], [3, -COMBINATIONS]):
        with pytest.raises(AezooError, match="sample"):
            source.factors(wrong)
    for wrong in ([3, 0, 0, 0, 0], [0, 0, 40, 0, 0], [0, 0, 0, 0, -1]):
        with pytest.raises(AezooError, match="is out of range"):
            source.render(torch.tensor([wrong]))


@pytest.mark.slow
def test_fit_command_trains_on_this_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    off = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]
    few = [f"--trainer.limit_{stage}_batches=1" for stage in ("train", "val", "test")]
    shape = [
        "--model",
        "vae",
        "--data.name",
        "shapes",
        "--data.size",
        "32",
        "--data.memory",
        "off",
        "--data.num_workers=0",
    ]
    main(["fit", *shape, *few, "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--projector.n=0", *off])
    assert list(tmp_path.rglob("*.ckpt"))
