"""Laws of models on frozen features: the network is saved and not trained, codes do not depend on the decoder."""

import copy
from typing import Any

import pytest
import timm
import torch
from representative_models import others_slow
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchvision import models as torchvision_models
from two_ranks import on_two_ranks

import aezoo
from aezoo.metrics.localisation import per_region_overlap

SHAPE = (1, 12, 13)
NAMES = ("fre", "padim", "patchcore", "student_teacher", "reverse_distillation")
SMALL: dict[str, dict[str, Any]] = {
    "fre": {"latent_dim": 5},
    "padim": {"n_features": 20, "sigma": 1.0},
    "patchcore": {"memory_size": 30, "sigma": 1.0},
    "student_teacher": {},
    "reverse_distillation": {"latent_dim": 6, "sigma": 1.0},
}


def images(n: int = 6, seed: int = 7, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(name: str, shape: tuple[int, ...] = SHAPE, **settings: Any) -> Any:
    torch.manual_seed(0)
    return aezoo.create_model(name, shape, **(SMALL[name] | settings)).double()


@pytest.mark.parametrize("name", NAMES)
def test_training_does_not_change_frozen_network(name: str) -> None:
    model, x = small(name).train(), images()
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameter_groups(), 0.1)
    model.loss(x)["loss"].backward()
    optimizer.step()
    assert not any(module.training for module in model.backbone.modules()) and before
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    assert all(p.grad is None for p in model.backbone.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_image_decoder_does_not_affect_code_map_or_score(name: str) -> None:
    model, x = small(name).eval(), images()
    wanted = model.encode(x), model.anomaly_map(x), model.score(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.decoder.parameters():
            p += 1
    assert not torch.allclose(other(x), model(x))
    assert all(map(torch.equal, (other.encode(x), other.anomaly_map(x), other.score(x)), wanted))
    named = {key: p for key, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(model.loss(x)["nll"], [*named.values()], allow_unused=True)
    reached = {key.partition(".")[0] for key, g in zip(named, found, strict=True) if g is not None and g.any()}
    assert reached == {"decoder"}


def weights_of(kind: str, path: Any) -> str:
    """Save weights of timm's or torchvision's network, which have different names; return the `features` argument."""
    torch.manual_seed(3)
    make = timm.create_model if kind == "timm" else torchvision_models.get_model
    torch.save(make("resnet18").state_dict(), path)
    return f"{kind}:resnet18,pretrained={path},out_indices=1:2"


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
@pytest.mark.parametrize("name", others_slow(NAMES, ("padim",)))
def test_saved_model_contains_the_weights_of_its_network(name: str, kind: str, tmp_path: Any) -> None:
    features = weights_of(kind, tmp_path / "weights.pth")
    torch.manual_seed(0)
    model = aezoo.create_model(name, (3, 32, 32), features=features, **SMALL[name]).train()
    x = images(4, shape=(3, 32, 32)).float()
    random = aezoo.create_model(name, (3, 32, 32), features=model.hparams["features"], **SMALL[name])
    assert not torch.equal(random.maps(x)[0], model.maps(x)[0])
    assert str(tmp_path) not in str(model.hparams)
    model.loss(x)
    folder = aezoo.save_model(model.eval(), tmp_path / "saved")
    (tmp_path / "weights.pth").unlink()
    loaded = aezoo.load_model(folder)
    for part in ("encode", "score", "anomaly_map"):
        assert torch.equal(getattr(loaded, part)(x), getattr(model, part)(x)), part


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("timm:resnet18.a1_in1k,pretrained=/nowhere/w.pth", "/nowhere/w.pth names 0 files of weights"),
        ("torchvision:resnet18,pretrained=/nowhere/w.pth", "no weights of resnet18 in /nowhere/w.pth"),
        ("vgg16", "features takes random, timm:NAME or torchvision:NAME, got 'vgg16'"),
        ("timm:resnet81", "timm has no model 'resnet81'"),
    ],
)
@pytest.mark.parametrize("name", others_slow(NAMES, ("padim",)))
def test_missing_network_is_refused_in_one_line(name: str, features: str, message: str) -> None:
    with pytest.raises(aezoo.AezooError, match=message) as caught:
        aezoo.create_model(name, (3, 32, 32), features=features)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", others_slow(NAMES, ("padim",)))
def test_vectors_and_volumes_are_refused(name: str) -> None:
    for shape in ((9,), (2, 16), (1, 4, 5, 6)):
        with pytest.raises(aezoo.AezooError, match="need images"):
            aezoo.create_model(name, shape)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_of_frozen_features_equal_one_process(name: str, shifted: Any) -> None:
    model, x = shifted(small(name)).train(), images(12)
    model.loss(images(12, seed=1))
    whole = copy.deepcopy(model)
    terms = whole.loss(x)
    together = on_two_ranks(model, x)
    for term, value in terms.items():
        torch.testing.assert_close(together.terms[term], value, rtol=1e-9, atol=1e-12)
    for own in together.copies:
        for buffer_name, buffer in own.named_buffers():
            torch.testing.assert_close(buffer, whole.get_buffer(buffer_name), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_keeps_statistics_in_float32(name: str) -> None:
    model = small(name).float().bfloat16()
    assert all(model.get_buffer(buffer).dtype == torch.float32 for buffer in model.exact_buffers)
    assert model.encode(images(2).bfloat16()).dtype == torch.bfloat16


def products(n: int, seed: int, with_defects: bool = False) -> tuple[Tensor, Tensor]:
    """Images of stripes, and masks of squares with turned stripes, which the first half has with `with_defects`."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.arange(28.0)[:, None].expand(28, 28)
    phase = torch.rand(n, 1, 1, generator=rng) * 6.28
    x, turned = (0.5 + 0.4 * torch.sin(grid + phase) for grid in (rows, rows.T))
    masks = torch.zeros(n, 28, 28, dtype=torch.bool)
    for i in range(n // 2 if with_defects else 0):
        top, left = torch.randint(2, 18, (2,), generator=rng).tolist()
        masks[i, top : top + 8, left : left + 8] = True
    x = torch.where(masks, turned, x) + 0.02 * torch.randn(x.shape, generator=rng)
    return x.clamp(0, 1)[:, None], masks


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fitted_model_finds_and_locates_defects(name: str) -> None:
    torch.manual_seed(0)
    settings = {"sigma": 1.0} if "sigma" in SMALL[name] else {}
    model = aezoo.create_model(name, (1, 28, 28), lr=3e-3, **settings).train()
    optimizer, x = torch.optim.Adam(model.parameter_groups(), 3e-3), products(64, 0)[0]
    for _ in range(2 if name in ("padim", "patchcore") else 100):
        optimizer.zero_grad()
        model.loss(x)["loss"].backward()
        optimizer.step()
    test, masks = products(40, 1, with_defects=True)
    model.eval()
    with torch.no_grad():
        scores, maps = model.score(test).numpy(), model.anomaly_map(test).numpy()
    assert roc_auc_score(masks.numpy().any((1, 2)), scores) > 0.95
    assert roc_auc_score(masks.numpy().ravel(), maps.ravel()) > 0.9
    assert per_region_overlap(maps, masks.numpy()) > 0.6
