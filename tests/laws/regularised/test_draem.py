"""Laws of DRAEM: its noise, its simulated anomalies, its loss against torchvision and torchmetrics, and its map."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.ops import sigmoid_focal_loss

import aezoo
from aezoo.callbacks import plotting
from aezoo.models.regularised.draem import perlin
from aezoo.nets.unet import UNet
from aezoo.tasks.detect import detect

SHAPE = (2, 12, 13)


CPU = torch.device("cpu")


def images(n: int = 6) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(7))


def draem(**settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"hidden_dims": (4, 6), "segmentation_dims": (4, 6), "latent_dim": 5, **settings}
    return aezoo.create_model("draem", settings.pop("input_shape", SHAPE), **settings)


def noise_by_hand(seed: int, n: int, grid: tuple[int, int]) -> np.ndarray:
    """Perlin noise, pixel by pixel from the same draws."""
    torch.manual_seed(seed)
    halvings = min(5, int(math.log2(max(1, min(grid) // 4))))
    side = 2**halvings + 1
    angles = 2 * np.pi * torch.rand(n, side * side).double().numpy().reshape(n, side, side)
    cells = 2.0 ** np.floor(torch.rand(n, 2).numpy() * (halvings + 1))
    turns = np.pi * (torch.rand(n, 1, 1).flatten().double().numpy() - 0.5)
    found = np.zeros((n, *grid))
    for k, y, x in np.ndindex(*found.shape):
        i, j = (y + 0.5) / grid[0] - 0.5, (x + 0.5) / grid[1] - 0.5
        c, s = math.cos(turns[k]), math.sin(turns[k])
        place = (np.array([c * i - s * j, s * i + c * j]) + 0.5) * cells[k]
        low = np.floor(place).astype(int)
        fade = [6 * t**5 - 15 * t**4 + 10 * t**3 for t in place - low]

        def corner(du: int, dv: int, k: int = k, low: Any = low, place: Any = place) -> float:
            angle = angles[k, (low[0] + du) % side, (low[1] + dv) % side]
            return float(np.dot(place - low - (du, dv), (math.cos(angle), math.sin(angle))))

        near, far = (corner(0, dv) + fade[0] * (corner(1, dv) - corner(0, dv)) for dv in (0, 1))
        found[k, y, x] = math.sqrt(2) * (near + fade[1] * (far - near))
    return found


@pytest.mark.parametrize("grid", [(17, 16), (9, 40), (3, 3)])
def test_perlin_noise_matches_reference(grid: tuple[int, int]) -> None:
    torch.manual_seed(3)
    found = perlin(5, grid, CPU)
    torch.testing.assert_close(found.double(), torch.from_numpy(noise_by_hand(3, 5, grid)), rtol=1e-4, atol=1e-4)
    assert float(found.abs().max()) <= 1


@pytest.mark.slow
def test_noise_has_cells_of_several_sizes() -> None:
    torch.manual_seed(0)
    noise = perlin(400, (64, 64), CPU)
    steps = (noise.diff(dim=2).abs().mean((1, 2)) / noise.abs().mean((1, 2))).log2()
    assert float(steps.quantile(0.95) - steps.quantile(0.05)) > 3  # grids have 1 to 16 cells per side
    assert 0.03 < float((noise > 0.5).float().mean()) < 0.1
    assert abs(float(noise.mean())) < 0.01


def test_damage_blends_colour_over_region() -> None:
    model, x = draem(), images(400)
    found, seen = model.simulate_defects(x), []
    changed = (found != x).any(1)
    hit = changed.flatten(1).any(1)
    assert 0.25 < float(hit.float().mean()) < 0.5  # half of the samples, without those whose noise is low everywhere
    for before, after, mask in zip(x[hit], found[hit], changed[hit], strict=True):
        opacity = []
        for c in range(SHAPE[0]):
            old, new = before[c][mask].double().numpy(), after[c][mask].double().numpy()
            if len(old) > 2:
                slope, height = np.polyfit(old, new, 1)
                np.testing.assert_allclose(new, slope * old + height, atol=1e-5)
                colour = height / (1 - slope)
                assert float(before.min()) - 1e-3 <= colour <= float(before.max()) + 1e-3
                opacity.append(1 - slope)
        assert all(0.1 - 1e-4 <= b <= 1 + 1e-4 for b in opacity)
        assert len(opacity) < 2 or opacity[0] == pytest.approx(opacity[1], abs=1e-3)
        seen += opacity[:1]
    assert min(seen) < 0.3 and max(seen) > 0.8


def test_damage_blends_other_sample_over_region() -> None:
    model = draem(source="samples")
    x = torch.arange(8.0)[:, None, None, None].expand(8, *SHAPE).contiguous() / 8
    found, seen = model.simulate_defects(x), set()
    for k in range(8):
        values = (found[k][found[k] != x[k]] * 8).unique()
        assert len(values) <= 1  # constant opacity
        if len(values):
            b = (float(values) - k) / ((k - 1) % 8 - k)
            assert 0.1 - 1e-5 <= b <= 1 + 1e-5
            seen.add(k)
    assert seen


def test_samples_are_shifted() -> None:
    model, x = draem(source="samples"), images(40)
    found = model.simulate_defects(x)
    places = [
        (int(np.searchsorted(np.sort(x[k - 1, 0].flatten()), 0)), k)
        for k in range(40)
        if bool((found[k] != x[k]).any())
    ]
    assert places
    k = places[0][1]
    mask = (found[k] != x[k]).any(0)
    straight = (found[k] - x[k])[:, mask] / (x[k - 1] - x[k])[:, mask]
    assert float(straight.std()) > 1e-3  # without a shift the opacity would be constant


def test_loss_terms_match_torchvision_and_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = draem(ssim_weight=0.3, segmentation_weight=0.7).eval(), images()
    damaged = x.clone()
    damaged[:, :, 2:5, 3:7] = 0.5
    monkeypatch.setattr(model, "simulate_defects", lambda _: damaged)
    terms = model.loss(x)
    params = model.decoder(model.encoder(damaged))
    x_hat, x_dim = model.likelihood.mean(params), math.prod(SHAPE)
    torch.testing.assert_close(terms["nll"], model.nll(params, x).mean())
    ssim = structural_similarity_index_measure(x_hat, x, data_range=1.0, sigma=1.5)
    torch.testing.assert_close(terms["structure"], x_dim * (1 - ssim), rtol=1e-3, atol=1e-3)
    truth = torch.zeros(len(x), *SHAPE[1:])
    truth[:, 2:5, 3:7] = 1
    focal = sigmoid_focal_loss(model.log_odds(damaged, params), truth, alpha=-1, gamma=2, reduction="mean")
    torch.testing.assert_close(terms["segmentation"], x_dim * focal)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.3 * terms["structure"] + 0.7 * terms["segmentation"])


def test_invisible_damage_is_not_segmented(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = draem(ssim_weight=0.0).eval(), torch.zeros(4, *SHAPE)
    monkeypatch.setattr(model, "log_odds", lambda x, params: torch.full((len(x), *SHAPE[1:]), -9.0))
    torch.manual_seed(1)
    assert float(model.loss(x)["segmentation"]) < 1e-3  # a black sample has only the colour black


def test_terms_train_expected_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = draem(), images()
    monkeypatch.setattr(model, "simulate_defects", lambda x: x.flip(3))
    ways = {}
    for name in ("nll", "structure", "segmentation"):
        grads = torch.autograd.grad(model.loss(x)[name], [*model.parameters()], allow_unused=True)
        reached = [
            key.split(".")[0] for (key, _), g in zip(model.named_parameters(), grads, strict=True) if g is not None
        ]
        ways[name] = set(reached)
    alone = {"encoder", "decoder"}
    assert ways == {"nll": alone, "structure": alone, "segmentation": alone | {"segmentation"}}  # as in the paper


def test_no_anomalies_and_zero_weights_equal_unet_ae(monkeypatch: pytest.MonkeyPatch) -> None:
    model = draem(ssim_weight=0.0, segmentation_weight=0.0)
    monkeypatch.setattr(model, "simulate_defects", lambda x: x)
    plain = aezoo.create_model(
        "unet_ae", SHAPE, hidden_dims=(4, 6), latent_dim=5, activation="relu", likelihood="gaussian"
    )
    for part in ("encoder", "decoder"):
        getattr(plain, part).load_state_dict(getattr(model, part).state_dict())
    x = images()
    assert model.loss(x)["loss"].item() == plain.loss(x)["loss"].item()


@pytest.mark.parametrize("window", [1, 3, 21])
def test_the_score_is_the_largest_mean_under_the_window(window: int) -> None:
    model, x = draem(window=window).eval(), images()
    found = model.anomaly_map(x)
    assert found.shape == (len(x), *SHAPE[1:])
    pad = window // 2
    means = F.pad(found, (pad,) * 4).unfold(1, window, 1).unfold(2, window, 1).mean((3, 4))
    torch.testing.assert_close(model.score(x), means.flatten(1).amax(1))


def test_anomaly_map_reads_sample_and_reconstruction() -> None:
    model, x = draem().eval(), images()
    seen: list[Tensor] = []
    model.segmentation.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    found = model.anomaly_map(x)
    torch.testing.assert_close(seen[0], torch.cat([x, model(x)], 1))
    torch.testing.assert_close(found, model.segmentation(seen[0]).sigmoid()[:, 0])


def test_unet_skip_connections_reach_decoder() -> None:
    net = UNet((1, 9, 10), 2, (3, 4, 5), "relu")
    assert net(torch.rand(2, 1, 9, 10)).shape == (2, 2, 9, 10)
    for p in net.down[1:].parameters():
        torch.nn.init.zeros_(p)
    x = torch.rand(2, 1, 9, 10)
    assert not torch.equal(*net(x))  # through the finest map only


def test_detect_writes_the_models_own_map(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, labels = draem(input_shape=(1, 12, 13)).eval(), images(20)[:, :1], []
    figure = plotting.mosaic_figure
    monkeypatch.setattr(plotting, "mosaic_figure", lambda *args: labels.append(args[1]) or figure(*args))
    detect(model, x, baselines=False, maps=True, out=str(tmp_path), n_shown=2)
    maps = torch.from_numpy(np.load(tmp_path / "maps.npy"))
    torch.testing.assert_close(maps, model.anomaly_map(x)[:, None].expand_as(x))
    assert labels[0][2].startswith("anomaly, 0 to ")


def test_non_image_inputs_are_refused() -> None:
    for shape in ((30,), (1, 2, 9), (1, 8, 8, 8)):
        with pytest.raises(aezoo.AezooError, match="draem takes images"):
            draem(input_shape=shape)
    with pytest.raises(aezoo.AezooError, match="use color or samples"):
        draem(source="dtd")
    with pytest.raises(aezoo.AezooError, match="odd"):
        draem(window=4)
    with pytest.raises(aezoo.AezooError, match="segmentation_dims"):
        draem(segmentation_dims=())


@pytest.mark.slow
def test_training_detects_patches_missed_by_autoencoder() -> None:
    x = aezoo.DataModule("mnist5k", train_classes=[3]).tensors("train")[0]
    x, normal = x[:256], x[256:]
    damaged = normal.clone()
    for k in range(len(normal)):
        i, j = 4 + k % 16, 4 + k // 16 % 16
        damaged[k, 0, i : i + 5, j : j + 5] = (k % 5) / 4
    truth, aucs = [0] * len(normal) + [1] * len(normal), {}
    for name in ("draem", "unet_ae"):
        torch.manual_seed(0)
        model = aezoo.create_model(name, x.shape[1:], likelihood="gaussian")
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(20):
            for batch in x[torch.randperm(len(x))].split(32):
                optimizer.zero_grad()
                model.loss(batch)["loss"].backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            aucs[name] = roc_auc_score(truth, torch.cat([model.score(normal), model.score(damaged)]))
    assert aucs["draem"] > aucs["unet_ae"] + 0.1, aucs
