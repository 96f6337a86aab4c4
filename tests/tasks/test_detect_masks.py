"""detect with masks of defects: how well anomaly maps locate them."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import aezoo
from aezoo.metrics.localisation import per_region_overlap
from aezoo.tasks.detect import detect


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Grey noise; a defect is a bright square."""
    root, rng = tmp_path_factory.mktemp("mvtec"), np.random.default_rng(0)
    for split, kind, n in (("train", "good", 12), ("test", "good", 4), ("test", "spot", 4)):
        for i in range(n):
            values, mask = rng.integers(60, 120, (10, 11), dtype=np.uint8), np.zeros((10, 11), np.uint8)
            if kind == "spot":
                mask[i : i + 3, 2:6] = 255
                values[mask > 0] = 250
                save(root / f"ground_truth/spot/{i}_mask.png", mask)
            save(root / f"{split}/{kind}/{i}.png", values)
    return aezoo.DataModule("folder", root=str(root), layout="mvtec")


def test_maps_are_compared_with_masks(data, tmp_path):
    model = aezoo.create_model("linear_ae", (1, 10, 11), latent_dim=2)
    found = detect(model, data, normal="good", baselines=False, score="mse,deviance", maps=True, out=str(tmp_path))
    masks = data.source.pixel_masks(data.dataset("test").paths).numpy()
    x = data.tensors("test")[0]
    errors = np.load(tmp_path / "maps.npy")[:, 0]
    assert np.allclose(errors, (model(x) - x).abs()[:, 0].detach(), atol=1e-6)
    first, second = found.rows
    assert first["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), errors.ravel())) and first["auroc"]
    assert first["pro"] == pytest.approx(per_region_overlap(errors, masks))
    assert second["pixel_auroc"] is None and "pixel_auroc" in (tmp_path / "detect.csv").read_text()


def test_own_map_of_model_is_compared(data):
    model = aezoo.create_model("draem", (1, 10, 11), hidden_dims=(4,), segmentation_dims=(4,), latent_dim=3)
    model.anomaly_map = lambda x: (x[:, 0] > 0.9).float()
    row = detect(model, data, baselines=False).rows[0]
    assert (row["pixel_auroc"], row["pro"], "auroc" in row) == (1, 1, False)


def test_data_without_masks_have_no_such_figures(data):
    model = aezoo.create_model("linear_ae", (1, 10, 11), latent_dim=2)
    assert "pro" not in detect(model, torch.rand(6, 1, 10, 11), baselines=False).rows[0]
