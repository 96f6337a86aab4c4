"""Metrics of quality: compared with closed forms, scipy's matrix root and explicit loops over the definitions."""

import csv

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.decomposition import PCA
from torch import nn

import aezoo
from aezoo.data.source import ArrayDataset
from aezoo.errors import AezooError
from aezoo.tasks import fidelity, fidelity_features
from aezoo.tasks.generate import generate
from aezoo.tasks.samples import SampleSet


@pytest.fixture(scope="module")
def digits():
    return aezoo.DataModule("digits")


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=4).eval()


def identity(size):
    """A model whose code is the sample itself."""
    model = aezoo.create_model("linear_ae", (size,), latent_dim=size, likelihood="gaussian")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.eye(size) if weight.ndim == 2 else torch.zeros(size))
    return model.eval()


def test_fid_is_the_closed_form_of_two_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4000, 5)), rng.normal(size=(3000, 5)) @ rng.normal(size=(5, 5)) + 2
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert fidelity.fid(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-6)
    # N(0, 1) and N(3, 4) in each of two independent dimensions: 2 (3^2 + (1 - 2)^2)
    x, y = rng.normal(0, 1, (200_000, 2)), rng.normal(3, 2, (200_000, 2))
    assert fidelity.fid(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(20, rel=0.01)
    assert fidelity.fid(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(0, abs=1e-6)


def test_kid_is_the_unbiased_discrepancy_of_the_cubic_kernel():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 4)), rng.normal(size=(40, 4)) + 0.5
    k = {(i, j): (u @ v.T / 4 + 1) ** 3 for i, u in enumerate((a, b)) for j, v in enumerate((a, b))}
    within = sum((k[i, i].sum() - np.trace(k[i, i])) / (40 * 39) for i in (0, 1))
    expected = within - 2 * k[0, 1].mean()
    assert fidelity.kid(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-6)
    many = torch.from_numpy(rng.normal(size=(60, 4)))
    assert fidelity.kid(many, torch.from_numpy(b), seed=1) == fidelity.kid(many, torch.from_numpy(b), seed=1)


def test_precision_recall_limits_are_one_and_zero():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    assert fidelity.precision_recall(x, x) == (1, 1)
    assert fidelity.precision_recall(x, x + 100) == (0, 0)
    # half of the modes: all generated samples are real, half of the real ones are generated
    both = torch.cat([x, x + 100])
    assert fidelity.precision_recall(both, x) == (1, 0.5)
    assert fidelity.precision_recall(x, both) == (0.5, 1)


def test_precision_recall_match_paper_definition():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(50, 3)), rng.normal(size=(40, 3)) + 1

    def share(points, members):
        count = 0
        for point in points:
            for i, member in enumerate(members):
                others = sorted(np.linalg.norm(member - other) for j, other in enumerate(members) if j != i)
                if np.linalg.norm(point - member) <= others[2]:  # k = 3
                    count += 1
                    break
        return count / len(points)

    found = fidelity.precision_recall(torch.from_numpy(real), torch.from_numpy(fake))
    assert found == pytest.approx((share(fake, real), share(real, fake)))
    assert 0 < found[0] < 1 and 0 < found[1] < 1 and found[0] != found[1]


def test_nearest_training_sample_is_found_across_batches():
    rng = np.random.default_rng(0)
    train = rng.random((70, 1, 5, 5)).astype(np.float32)
    x = np.concatenate([train[[69, 3]], rng.random((6, 1, 5, 5)).astype(np.float32)])
    found = fidelity.nearest_samples(torch.from_numpy(x), SampleSet.from_data(train), batch_size=16)
    every = np.linalg.norm((x[:, None] - train[None]).reshape(8, 70, -1).astype(np.float64), axis=2)
    assert found.rows.tolist() == every.argmin(1).tolist()
    assert np.allclose(found.distances, every.min(1), atol=1e-6) and found.distances[:2].max() < 1e-6


def test_copies_are_closer_to_training_set_than_samples():
    rng = np.random.default_rng(0)
    fake, held = rng.random(30), rng.random(50)
    expected = np.mean([[f < h for h in held] for f in fake])
    assert fidelity.closer_probability(fake, held) == pytest.approx(expected)
    x = rng.normal(size=(600, 4)).astype(np.float32)
    copies = generate(identity(4), x[400:], fit_on=x[:400], prior="knn", n_neighbours=1, n=1, quality=200).figures
    fresh = generate(identity(4), x[400:], fit_on=x[:400], prior="gaussian", n=1, quality=200).figures
    assert copies[0]["closer"] > 0.75 and fresh[0]["closer"] == pytest.approx(0.5, abs=0.07)
    assert fresh[0]["n"] == fresh[1]["n"] == 200 and fresh[1]["closer"] == 0.5
    # samples of the true distribution are as good as real ones
    assert fresh[0]["fid"] < 0.3 and abs(fresh[0]["precision"] - fresh[1]["precision"]) < 0.15


def test_metrics_do_not_depend_on_batch_size():
    x = np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32)
    one, many = (
        generate(identity(4), x[80:], fit_on=x[:80], n=5, quality=40, batch_size=size).figures for size in (7, 256)
    )
    for row, same in zip(one, many, strict=True):
        assert [row[name] for name in ("fid", "kid", "distance")] == pytest.approx(
            [same[name] for name in ("fid", "kid", "distance")], rel=1e-4
        )


@pytest.mark.slow
def test_labels_train_a_reported_small_classifier(tmp_path, dense, digits, monkeypatch):
    monkeypatch.setattr(fidelity_features, "cached_file", lambda name: tmp_path / name)
    found = generate(dense, digits, fit_on=digits, n=4, quality=100, out=str(tmp_path))
    assert found.features.startswith("a small classifier of digits (train) (accuracy 0.9")
    generated, real = found.figures
    assert generated["fid"] > 5 * real["fid"] and generated["precision"] < 0.7 < real["precision"]
    assert "a small classifier" in found.summary() and "held out" in found.summary()
    with (tmp_path / "quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["samples"] for row in rows] == ["generated", "real, held out"]
    assert float(rows[0]["fid"]) == pytest.approx(generated["fid"])


def test_features_without_labels_are_principal_components():
    x = torch.rand(90, 1, 6, 6)
    features = fidelity_features.choose_features(SampleSet.from_data(x), torch.device("cpu"), 0, False)
    assert "36 principal components of raw values (no labels" in features.name
    reference = PCA(36).fit_transform(x.flatten(1).numpy())
    assert np.allclose(features.extract(x).abs().numpy(), np.abs(reference), atol=1e-4)


def test_fractional_labels_are_not_classes():
    data = SampleSet(ArrayDataset(torch.rand(20, 5), torch.rand(20)))
    assert "principal" in fidelity_features.choose_features(data, torch.device("cpu"), 0, False).name


@pytest.mark.slow
def test_classifier_learns_from_few_labels(monkeypatch):
    monkeypatch.setattr(fidelity_features, "_MAX_LEARNED", 6)
    monkeypatch.setattr(fidelity_features, "STEPS", 3)
    monkeypatch.setattr("aezoo.nets.blocks.classifier.STEPS", 3)
    y = torch.full((3000,), -1)
    y[[3, 700, 1500]] = torch.tensor([0, 1, 2])
    x = np.random.default_rng(0).normal(size=(3000, 4)).astype(np.float32)
    found = generate(identity(4), fit_on=SampleSet(ArrayDataset(torch.from_numpy(x), y)), n=2, quality=5)
    assert found.features == "a small classifier of the data" and np.isfinite(found.figures[0]["fid"])


def test_non_finite_samples_are_refused():
    x = torch.randn(20, 4)
    broken = aezoo.create_model("vae", (4,), latent_dim=2, likelihood="gaussian")
    broken.decoder.apply(lambda part: [weight.data.fill_(torch.nan) for weight in part.parameters(recurse=False)])
    with pytest.raises(AezooError, match="some samples are NaN or infinite: the model is broken"):
        generate(broken, fit_on=x, n=2, quality=5)


def test_training_samples_are_not_used_as_held_out_reference():
    x = np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32)
    train = SampleSet.from_data(x[:80])
    same = generate(identity(4), train, fit_on=train, n=2, quality=50)
    assert [(row["samples"], row["n"]) for row in same.figures] == [("generated", 50)]
    assert "held-out" not in same.source
    new = generate(identity(4), x[80:], fit_on=train, n=2, quality=50)
    assert [row["n"] for row in new.figures] == [40, 40] and "held-out" in new.source


# ---- Inception -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """The path where torchvision would store the weights."""
    from torchvision.models import Inception_V3_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / Inception_V3_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.slow
def test_inception_is_used_if_available_with_its_scaling(stored):
    from torchvision.models import Inception_V3_Weights, inception_v3
    from torchvision.models.feature_extraction import create_feature_extractor
    from torchvision.transforms.functional import normalize

    x = torch.rand(3, 1, 40, 340, generator=torch.Generator().manual_seed(0))
    data = SampleSet(ArrayDataset(x))
    assert "Inception-v3" not in fidelity_features.choose_features(data, torch.device("cpu"), 0, False).name
    torch.manual_seed(0)
    network = inception_v3(weights=None, init_weights=False, transform_input=True)  # as with pretrained weights
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one batch sets the scale, so that random weights distinguish images
    with torch.no_grad():
        network(4 * torch.rand(2, 3, 299, 299) - 2)
    network.eval()
    torch.save(network.state_dict(), stored)
    features = fidelity_features.choose_features(data, torch.device("cpu"), 0, False)
    official = Inception_V3_Weights.IMAGENET1K_V1.transforms()
    colour = nn.functional.interpolate(x[:2].expand(-1, 3, -1, -1), (299, 299), mode="bilinear", antialias=True)
    pooled = create_feature_extractor(network, {"avgpool": "f"}, suppress_diff_warning=True)
    with torch.no_grad():
        expected = pooled(normalize(colour, official.mean, official.std))["f"].flatten(1)
        found = features.extract(x[:2])
        # values out of range are clipped, as in an 8-bit file
        extreme = torch.cat([x[:1].round(), 9 * x[:1].round() - 4])
        black_and_white, beyond = features.extract(extreme)
    assert features.name == "Inception-v3 of torchvision" and found.shape == (2, 2048)
    assert expected.std() > 0.1 and torch.allclose(found, expected, atol=1e-3)
    assert torch.allclose(black_and_white, beyond, atol=1e-4)
    assert len(list(stored.parent.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"no weights"], ids=["empty", "foreign"])
def test_broken_weights_of_inception_are_named_in_one_line(stored, content):
    stored.write_bytes(content)
    with pytest.raises(
        AezooError, match=rf"{stored.name} contains no weights of inception_v3 \(\w+\): remove it"
    ) as caught:
        fidelity_features.choose_features(SampleSet.from_data(torch.rand(5, 3, 8, 8)), torch.device("cpu"), 0, False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "x",
    [9 * torch.rand(9, 3, 8, 8), torch.rand(9, 2, 8, 8), torch.rand(9, 8)],
    ids=["no range", "two channels", "vectors"],
)
def test_non_image_data_do_not_use_inception(stored, x):
    stored.write_bytes(b"never read")
    assert "principal" in fidelity_features.choose_features(SampleSet.from_data(x), torch.device("cpu"), 0, False).name
