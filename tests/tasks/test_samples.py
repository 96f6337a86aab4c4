"""Samples: the same values from an array, a DataModule and a file, read in batches of any size."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import aezoo
from aezoo.cli.task_commands import read
from aezoo.data.source import ArrayDataset
from aezoo.errors import AezooError
from aezoo.tasks.samples import SampleSet, evaluation_mode

UNKNOWN = None


def all_of(samples, size=7):
    return torch.cat([*samples.batches(size)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_commands_support_every_model_dtype(dtype):
    x, narrow = torch.rand(20, 6), aezoo.create_model("vae", (6,), latent_dim=2, hidden_dims=(8,)).eval()
    wide = copy.deepcopy(narrow).to(dtype)
    calls = {
        "reconstruct": lambda model: aezoo.reconstruct(model, x).mse,
        "denoise": lambda model: aezoo.denoise(model, x, baselines=False, corrupt="gaussian:0.1").x_hat,
        "embed": lambda model: aezoo.embed(model, x, fit_on=x[:9], nearest=1).codes,
        "detect": lambda model: aezoo.detect(model, x, score="nll,sap,mahalanobis", baselines=False).scores,
        "elbo": lambda model: aezoo.detect(model, x[:3], score="elbo", n_draws=999, baselines=False).scores,
        "gaussian": lambda model: aezoo.generate(model, n=4, prior="gaussian", fit_on=x).samples,
        "interpolate": lambda model: aezoo.generate(model, x, interpolate=True, walks=2, steps=3).samples,
        "traverse": lambda model: aezoo.generate(model, x, traverse=True, walks=2, steps=3).samples,
        "around": lambda model: aezoo.generate(model, x, around=x[:2], steps=3).samples,
    }
    for command, call in calls.items():
        np.testing.assert_allclose(call(wide), call(narrow), rtol=0.05, atol=0.05, err_msg=command)


def test_bytes_are_divided_by_255_and_floats_kept():
    x = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    samples = SampleSet.from_data(x)
    assert samples.shape == (1, 8, 8) and len(samples) == 4 and samples.y is None
    assert torch.equal(all_of(samples), torch.from_numpy(x).float()[:, None] / 255)
    floats = torch.randn(5, 3)
    assert torch.equal(all_of(SampleSet.from_data(floats), 2), floats)
    assert SampleSet.from_data(samples) is samples


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_and_read_only_maps_are_not_copied(dtype, tmp_path, recwarn):
    x = np.eye(6, dtype=dtype)
    np.save(tmp_path / "x.npy", x)
    for values in x, np.load(tmp_path / "x.npy", mmap_mode="r"):
        samples = SampleSet.from_data(values)
        assert samples.dataset.x.data_ptr() == values.ctypes.data
        assert torch.equal(all_of(samples), torch.from_numpy(x).float() / (255 if dtype == np.uint8 else 1))
    assert not recwarn.list


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_samples_match_datamodule_split(split):
    data = aezoo.DataModule("digits")
    samples = SampleSet.from_data(data, split)
    x, y = data.tensors(split)
    assert torch.equal(all_of(samples), x) and torch.equal(samples.y, y)
    assert torch.equal(samples.rows([3, 1]), x[[3, 1]])


def test_folder_images_are_read_lazily(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 8, 8), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    samples = read(str(tmp_path), UNKNOWN, {"memory": "off"})
    expected = torch.from_numpy(pixels).float()[[0, 2, 4, 1, 3, 5], None] / 255
    assert torch.equal(all_of(samples, 4), expected)
    assert samples.y.tolist() == [0, 0, 0, 1, 1, 1] and samples.class_names == ("a", "b")
    alone = read(str(tmp_path), UNKNOWN, {"memory": "off", "num_workers": 0}).subset(torch.arange(6))
    monkeypatch.setattr(torch.utils.data.dataloader, "_MultiProcessingDataLoaderIter", None)
    assert torch.equal(all_of(alone, 4), expected)
    one = read(str(tmp_path / "a" / "0.png"), UNKNOWN, {})
    assert torch.equal(all_of(one), torch.from_numpy(pixels[:1]).float()[None] / 255)


def test_input_file_uses_training_statistics(tmp_path):
    x = np.random.default_rng(0).normal(50, 20, (200, 3))
    data = aezoo.DataModule.from_arrays(x, scale="standard")
    data.setup()
    scaling = data.units.scaling
    np.save(tmp_path / "x.npy", x[:20])
    given = all_of(read(str(tmp_path / "x.npy"), data.units))
    train = all_of(SampleSet.from_data(data, "train"))
    mean, deviation = scaling["offset"], scaling["factor"]
    assert torch.allclose(given, ((torch.from_numpy(x[:20]) - mean) / deviation).float())
    assert abs(float(train.mean())) < 1e-5 and abs(float(given.mean())) < 0.5


def trained_on(x, pixels, scale):
    """The image as a model sees it that is trained on x, and the data units."""
    data = aezoo.DataModule.from_arrays(x, x_test=pixels[None], scale=scale, val_fraction=0)
    return data.tensors("test")[0], data.units


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["auto", "unit", "standard", "none"])
@pytest.mark.parametrize("levels", [1, 255], ids=["bytes", "shares"])
def test_pictures_are_scaled_as_the_training_data_were(tmp_path, scale, levels):
    x = np.random.default_rng(0).integers(0, 200, (41, 8, 8), dtype=np.uint8)
    pixels, x = (x[0], x[1:]) if levels == 1 else (x[0] / 255, x[1:] / 255)
    seen, trained = trained_on(x, pixels, scale)
    bytes_ = np.rint(pixels * levels).astype(np.uint8)
    for name, values in (("8", bytes_), ("16", bytes_.astype(np.uint16) * 257)):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "a.png")
        assert torch.allclose(all_of(read(str(tmp_path / name / "a.png"), trained)), seen, atol=1e-5)
        for memory in ("on", "off"):
            assert torch.allclose(all_of(read(str(tmp_path / name), trained, {"memory": memory})), seen, atol=1e-5)
    np.save(tmp_path / "x.npy", bytes_[None])
    assert torch.allclose(all_of(read(str(tmp_path / "x.npy"), trained)), seen, atol=1e-5)


@pytest.mark.parametrize("scale", ["auto", "unit", "standard", "none"])
def test_pictures_need_known_data_range(tmp_path, scale):
    x = np.random.default_rng(0).normal(50, 20, (41, 8, 8))
    seen, trained = trained_on(x[1:], x[0], scale)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path):
        with pytest.raises(AezooError, match="value of white is not known") as refusal:
            read(str(path), trained)
        assert f"--input {path} " in str(refusal.value) and "\n" not in str(refusal.value)
    np.save(tmp_path / "x.npy", x[:1])
    assert torch.allclose(all_of(read(str(tmp_path / "x.npy"), trained)), seen)


def test_any_image_folder_is_accepted_as_input(tmp_path, capsys):
    for stage, values in (("train", [7, 7]), ("test", [9, 9, 9])):
        (tmp_path / stage).mkdir()
        for i, value in enumerate(values):
            Image.fromarray(np.full((4, 4), value, np.uint8)).save(tmp_path / stage / f"{i}.png")
    assert all_of(read(str(tmp_path / "test"), UNKNOWN)).shape == (3, 1, 4, 4)  # too few samples for training
    assert capsys.readouterr().err == ""
    assert len(read(str(tmp_path), UNKNOWN)) == 2
    assert f"--input {tmp_path} has a training split, and only that is used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.ones((4, 3)), "y": np.arange(3)}, "x has 4 samples but 3 labels: give one label per sample"),
        ({"x": np.ones((4, 3)), "y": np.arange(5)}, "x has 4 samples but 5 labels: give one label per sample"),
        (
            {"x_test": np.ones(3), "y": np.arange(5)},
            r"x_test has shape \(3,\): give samples \(N, \*shape\), one sample",
        ),
        ({"x": np.float32(3)}, r"x has shape \(\): give samples \(N, \*shape\), one sample"),
    ],
)
def test_invalid_arrays_are_refused_in_one_line(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(AezooError, match=words) as refusal:
        read(str(tmp_path / "x.npz"), UNKNOWN)
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["threshold", "static", "dynamic"])
def test_files_use_binarisation_of_training(tmp_path, rule):
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    x[:, 0], x[:, 1] = 0, 255
    for i, image in enumerate(x):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(40) % 2)
    np.save(tmp_path / "shares.npy", x / 255)
    for path in (tmp_path, tmp_path / "x.npz", tmp_path / "shares.npy", tmp_path / "a" / "0.png"):
        grey = read(str(path), UNKNOWN)
        found, again, other = (
            all_of(read(str(path), UNKNOWN, {"binarise": rule, "seed": seed, "memory": "off"})) for seed in (3, 3, 4)
        )
        p = all_of(grey)
        assert set(found.unique().tolist()) == {0.0, 1.0} and torch.equal(found, again)
        assert torch.equal(found[:, 0, :2], p[:, 0, :2])  # probabilities of 0 and 1
        if rule == "threshold":
            assert torch.equal(found, (p > 0.5).float())
        else:
            assert not torch.equal(found, other)
            assert abs(float((found - p).mean())) < 5 * float((p * (1 - p)).mean() / p.numel()) ** 0.5
        y = read(str(path), UNKNOWN, {"binarise": rule}).y
        assert y is None if grey.y is None else torch.equal(y, grey.y)


def test_scaling_precedes_binarisation(tmp_path):
    x = np.random.default_rng(0).random((40, 3)) * 90 + 10
    data = aezoo.DataModule.from_arrays(x, scale="unit", val_fraction=0, test_fraction=0)
    inside = data.tensors("train")[0]
    np.save(tmp_path / "x.npy", x)
    found = all_of(read(str(tmp_path / "x.npy"), data.units, {"binarise": "threshold"}))
    assert torch.equal(found, (inside > 0.5).float())
    np.save(tmp_path / "x.npy", x + 90)
    with pytest.raises(AezooError, match="binarise needs values from 0 to 1: give values in this range"):
        read(str(tmp_path / "x.npy"), data.units, {"binarise": "threshold"})


def test_subset_is_drawn_in_order_without_repeats():
    data = aezoo.DataModule("digits")
    samples = SampleSet.from_data(data, "train")
    few = samples.subsample(50, seed=1)
    x, y = data.tensors("train")
    places = [int((x == row).flatten(1).all(1).nonzero()[0]) for row in all_of(few)]
    assert len(few) == 50 and places == sorted(set(places)) and torch.equal(few.y, y[places])
    assert samples.subsample(10**6) is samples


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((0, 4)), "samples"),
        (np.zeros(4), "one sample as x[None]"),
        (np.array(["a"]), "text"),
        (np.full((2, 4), np.nan), "NaN"),
    ],
)
def test_invalid_samples_are_refused(x, words):
    with pytest.raises(AezooError, match=words.replace("[", r"\[").replace("]", r"\]")):
        SampleSet.from_data(x)


def test_samples_of_wrong_shape_or_range_are_refused():
    model = aezoo.create_model("dense_ae", (4,))
    with pytest.raises(AezooError, match="expects samples of shape 4, the data give 5"):
        SampleSet.from_data(torch.rand(3, 5)).check(model)
    scaling = {"offset": torch.zeros(4), "factor": torch.ones(4)}  # scaling for data of the model's own shape
    with pytest.raises(AezooError, match="expects samples of shape 4, the data give 5"):
        SampleSet(ArrayDataset(torch.rand(3, 5)), 255, scaling).check(model)
    with pytest.raises(AezooError, match=r"needs data in \[0, 1\]"):
        SampleSet.from_data(torch.rand(3, 4) * 255).check(model)
    assert not model.training


def test_task_keeps_random_state_and_modes():
    model = aezoo.create_model("vae", (4,))
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with evaluation_mode(model, seed=9):
        inside = torch.rand(2)
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and model.encoder.training and torch.equal(torch.rand(2), expected)
    torch.manual_seed(9)
    assert torch.equal(torch.rand(2), inside)


def test_subset_keeps_scaling_and_labels():
    whole = SampleSet(
        ArrayDataset(torch.arange(12, dtype=torch.uint8).view(6, 2), torch.arange(6)), 255, None, tuple("abcdef")
    )
    rows = torch.tensor([4, 1])
    part = whole.subset(rows)
    assert torch.equal(part.rows(range(2)), whole.rows(rows)) and part.y.tolist() == [4, 1]
    assert part.class_names == whole.class_names and len(part) == 2
