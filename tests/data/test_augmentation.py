"""Augmentation: compared with torchvision, with random numbers that depend on seed, epoch and index only."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms.v2 import functional as F

from aezoo.data import DataModule
from aezoo.data.augmentation import Augmentation, jitter
from aezoo.data.loaders import EpochSampler, LazyLoader
from aezoo.data.resident import ResidentLoader
from aezoo.errors import AezooError
from aezoo.training.seeding import uniform

ALL = {"hflip": 0.5, "vflip": 0.3, "crop_padding": 2, "color_jitter": 0.4}


def pictures(n, channels=3, side=8, dtype=torch.uint8, seed=0):
    x = torch.randint(0, 256, (n, channels, side, side), generator=torch.Generator().manual_seed(seed))
    return x.to(torch.uint8) if dtype == torch.uint8 else x.float() / 255


def by_row(data, epoch, rank=0, world=1, skip=(-1, 0)):
    """The training images of an epoch by their index in the split, as returned by the loader."""
    data._rank_and_world = lambda: (rank, world)
    loader = data.train_dataloader()
    loader.sampler.skip = skip
    loader.sampler.set_epoch(epoch)
    x = torch.cat([batch[0] for batch in loader])
    order = EpochSampler(len(data.dataset("train")), shuffle=True, seed=data.seed, rank=rank, world=world,
                         blocks=data._blocks["train"])  # fmt: skip
    order.set_epoch(epoch)
    order.skip = skip
    rows = order.rows().tolist()
    assert len(rows) == len(x)
    return dict(zip(rows, x, strict=True))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[row], other[row]) for row in one)


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_draws_are_uniform_and_independent():
    rows = torch.arange(20_000)
    u = uniform(rows, 4, 3, 5).numpy()
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    others = [uniform(rows, 4, *numbers).numpy() for numbers in ((3, 6), (4, 5), (5, 3))]
    columns = np.concatenate([u, np.roll(u, 1, 0), *others], 1)
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(len(rows))


def test_draws_of_a_row_depend_only_on_that_row():
    whole = uniform(torch.arange(100), 7, 1, 2)
    assert torch.equal(uniform(torch.tensor([7, 99, 0]), 7, 1, 2), whole[[7, 99, 0]])
    assert torch.equal(uniform(torch.arange(100), 3, 1, 2), whole[:, :3])
    assert len(whole.unique()) == whole.numel()


# ---- operations, compared with torchvision's on each image -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_match_torchvision(dtype, channels):
    x, rows = pictures(50, channels, dtype=dtype), torch.arange(50) * 3
    u = uniform(rows, 7, 1, 2)
    found = Augmentation(**ALL).augment(x, rows, 1, 2)
    assert found.dtype == dtype and found.shape == x.shape
    for i, image in enumerate(x):
        padded = F.pad(image, [2, 2, 2, 2], padding_mode="reflect")
        image = F.crop(padded, int(u[i, 2] * 5), int(u[i, 3] * 5), 8, 8)
        image = F.horizontal_flip(image) if u[i, 0] < 0.5 else image
        image = F.vertical_flip(image) if u[i, 1] < 0.3 else image
        brightness, contrast, saturation = (0.6 + 0.8 * u[i, 4:]).tolist()
        image = image / 255 if dtype == torch.uint8 else image
        image = F.adjust_contrast(F.adjust_brightness(image, brightness), contrast)
        image = F.adjust_saturation(image, saturation)
        # bytes are rounded once, at the end
        wanted, allowed = (image * 255, 0.501) if dtype == torch.uint8 else (image, 1e-6)
        assert (found[i] - wanted).abs().max() <= allowed


def test_settings_occur_with_given_probability():
    x, rows = pictures(4000, 1, 4), torch.arange(4000)

    def share(change, **given):
        found = Augmentation(**given).augment(x, rows, 0, 0)
        changed, unchanged = change(x), (found == x).flatten(1).all(1)
        assert ((found == changed).flatten(1).all(1) | unchanged).all()
        return 1 - float(unchanged.float().mean())

    assert abs(share(F.horizontal_flip, hflip=0.3) - 0.3) < 0.03
    assert abs(share(F.vertical_flip, vflip=0.6) - 0.6) < 0.03
    assert share(F.horizontal_flip, hflip=1.0) > 0.99
    assert torch.equal(Augmentation().augment(x, rows, 0, 0), x)
    # a setting does not change the random numbers of another
    alone = Augmentation(hflip=0.5).augment(x, rows, 0, 0)
    both = Augmentation(hflip=0.5, vflip=1.0).augment(x, rows, 0, 0)
    assert torch.equal(both, F.vertical_flip(alone))
    corners = {tuple(image.flatten().tolist()) for image in
               Augmentation(crop_padding=1).augment(x[:1].expand(500, 1, 4, 4), torch.arange(500), 0, 0)}  # fmt: skip
    assert len(corners) == 9


def test_jitter_of_factor_one_changes_nothing():
    one = torch.ones(5, 1, 1, 1)
    for x in (pictures(5), pictures(5, dtype=torch.float32)):
        assert torch.equal(jitter(x, one, one, one), x)


# ---- dependence on (seed, epoch, index) only -------------------------------------------------------------------------


def data(**plain):
    x = pictures(90, 3)
    given = {"batch_size": 16, "num_workers": 0, "seed": 4, "test_fraction": 0.1, **ALL}
    return DataModule.from_arrays(x, torch.arange(90) % 3, **given | plain)


def test_training_images_depend_on_seed_epoch_and_index():
    first = by_row(data(), 0)
    assert same(first, by_row(data(), 0))
    for plain in ({"batch_size": 7}, {"memory": "off"}, {"memory": "off", "batch_size": 31}):
        assert same(first, by_row(data(**plain), 0))
    assert isinstance(data().train_dataloader(), ResidentLoader)
    assert isinstance(data(memory="off").train_dataloader(), LazyLoader)
    other = by_row(data(), 1)
    assert sum(torch.equal(first[row], other[row]) for row in first) < 5
    plain = data(**dict.fromkeys(ALL, 0))
    assert plain.train_dataloader().transform is None
    original = plain.dataset("train").x
    assert sum(torch.equal(first[row], original[row]) for row in first) < 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing():
    assert same(by_row(data(memory="off", num_workers=2), 3), by_row(data(), 3))


def test_two_ranks_see_the_same_images_as_one():
    whole = by_row(data(), 2)
    parts = [by_row(data(batch_size=5), 2, rank, 2) for rank in range(2)]
    assert parts[0].keys().isdisjoint(parts[1]) and len(parts[0]) + len(parts[1]) == len(whole)
    assert all(torch.equal(x, whole[row]) for part in parts for row, x in part.items())


@pytest.mark.parametrize("memory", ["on", "off"])
def test_a_resumed_epoch_continues_with_the_same_images(memory):
    whole, rest = by_row(data(), 1), by_row(data(memory=memory), 1, skip=(1, 32))
    assert len(rest) == len(whole) - 32 and all(torch.equal(x, whole[row]) for row, x in rest.items())


def test_only_training_batches_are_augmented():
    augmented, plain = data(), data(**dict.fromkeys(ALL, 0))
    for stage in augmented.splits():
        for one, other in zip(augmented.tensors(stage), plain.tensors(stage), strict=True):
            assert torch.equal(one, other)
    for name in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        one, other = (torch.cat([batch[0] for batch in getattr(of, name)()]) for of in (augmented, plain))
        assert torch.equal(one, other)
    one, other = (torch.cat([labels for _, labels in of.train_dataloader()]) for of in (augmented, plain))
    assert torch.equal(one, other)


def test_dynamic_binarisation_draws_from_augmented_images():
    flipped, plain = (DataModule("mnist5k", binarise="dynamic", hflip=p) for p in (1.0, 0.0))
    one, other = (torch.cat([batch[0] for batch in of.train_dataloader()]).float() for of in (flipped, plain))
    assert set(one.unique().tolist()) == {0.0, 255.0}
    assert (one.flip(-1).mean(0) - other.mean(0)).abs().max() < 12
    assert not torch.equal(one.flip(-1), other)


# ---- sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for i, image in enumerate(pictures(30)):
        (tmp_path / "folder").mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "folder" / f"{i:02}.png")
    return str(tmp_path / "folder")


def test_folders_arrays_and_own_sets_are_augmented(folder):
    for given in ({"name": "folder", "root": folder}, {"name": "digits"}, {"name": "mnist5k", "train_classes": [3, 8]}):
        shared = {"num_workers": 0, "batch_size": 16}
        held, read = (by_row(DataModule(**given, **shared, **ALL, memory=memory), 1) for memory in ("on", "off"))
        assert same(held, read)
        plain = by_row(DataModule(**given, **shared), 1)
        assert sum(torch.equal(held[row], plain[row]) for row in plain) < 0.2 * len(plain)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_streams_are_augmented(tmp_path):
    from litdata.streaming.cache import Cache

    cache = Cache(str(tmp_path), chunk_size=4)
    for i, image in enumerate(pictures(40)):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        cache[i] = {"image": Image.open(buffer)}
    cache.done()
    cache.merge()
    given = {"name": "stream", "root": str(tmp_path), "num_workers": 0}
    one, other = by_row(DataModule(**given, **ALL, batch_size=8), 1), by_row(DataModule(**given, **ALL, memory="on"), 1)
    assert same(one, other)
    plain = by_row(DataModule(**given), 1)
    assert not any(torch.equal(one[row], plain[row]) for row in plain)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "given", "words"),
    [
        ((40, 5), {"hflip": 0.5}, r"--data.hflip is for images, and a sample of array has shape \(5,\): drop it"),
        ((40, 2, 30), {"vflip": 0.5}, r"--data.vflip is for images, and a sample of array has shape \(2, 30\)"),
        ((40, 1, 4, 4, 4), {"crop_padding": 1}, r"--data.crop_padding is for images"),
        ((40, 3, 8, 8), {"hflip": 1.5}, "--data.hflip is 1.5: give a probability from 0 to 1"),
        ((40, 3, 8, 8), {"color_jitter": -0.1}, "--data.color_jitter is -0.1: give a number from 0 to 1"),
        ((40, 3, 8, 6), {"crop_padding": 6}, "an image of 8x6 can be reflected by at most 5 pixels"),
        ((40, 3, 8, 8), {"crop_padding": -1}, "give pixels, such as 4, or 0"),
        ((40, 4, 8, 8), {"color_jitter": 0.4}, "a sample has 4 channels"),
        ((40, 1, 8, 8), {"color_jitter": 0.4, "binarise": "threshold"}, "contradict each other"),
        ((40, 1, 8, 8), {"hflip": 0.5, "missing": "keep"}, "--data.missing keep and --data.hflip contradict"),
    ],
)
def test_unsupported_augmentation_is_refused(shape, given, words):
    with pytest.raises(AezooError, match=words) as caught:
        DataModule.from_arrays(torch.rand(shape), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", ["standard", "none"])
def test_color_jitter_needs_black_and_white(scale):
    unbounded = DataModule.from_arrays(torch.randn(40, 1, 8, 8), scale=scale, color_jitter=0.4)
    with pytest.raises(AezooError, match=r"color_jitter needs values from 0 to 1: set --data.scale unit"):
        unbounded.setup()
    DataModule.from_arrays(torch.randn(40, 1, 8, 8), scale="unit", color_jitter=0.4).setup()
    DataModule.from_arrays(torch.randn(40, 1, 8, 8), scale=scale, hflip=0.5).setup()
