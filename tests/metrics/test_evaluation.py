"""The metrics of `Evaluation` against numpy and scipy."""

import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.utils.data import DataLoader

import aezoo
from aezoo.metrics import Evaluation, Means

CPU = torch.device("cpu")


def ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 with their Gaussian window (11 x 11, sigma 1.5) and constants, averaged over the image."""

    def blur(a: np.ndarray) -> np.ndarray:
        return gaussian_filter(a, 1.5, mode="mirror", truncate=3.5)

    mu_x, mu_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mu_x**2, blur(y * y) - mu_y**2, blur(x * y) - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    return float((((2 * mu_x * mu_y + c1) * (2 * cov + c2)) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))).mean())


@pytest.mark.parametrize(
    "shape", [(30,), (3, 17), (1, 28, 28), (3, 9, 12), (1, 8, 8), (1, 6, 6), (1, 5, 8), (1, 4, 4, 4)]
)
def test_uneven_batches_match_whole_set_metrics(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.rand(23, *shape)
    x_hat = x + 0.2 * torch.randn_like(x)  # outside [0, 1] too
    nll = torch.rand(23)
    evaluation = Evaluation(shape, CPU)
    for rows in (slice(0, 10), slice(10, 20), slice(20, 23)):
        evaluation.add({"nll": nll[rows].mean(), "elbo": -nll[rows].mean()}, x[rows], x_hat[rows])
    found = {name: value.item() for name, value in evaluation.compute().items()}
    a, b = x.double().numpy(), x_hat.double().numpy()
    mse = ((a - b) ** 2).mean()
    expected = {"nll": nll.mean().item(), "elbo": -nll.mean().item(), "mse": mse, "psnr": 10 * np.log10(1 / mse)}
    expected["bits_per_dim"] = expected["nll"] / (math.prod(shape) * math.log(2))
    if len(shape) == 3 and min(shape[1:]) > 5:
        expected["ssim"] = np.mean([ssim(c, d) for u, v in zip(a, b, strict=True) for c, d in zip(u, v, strict=True)])
    assert found == pytest.approx(expected, rel=1e-4)


def test_perfect_reconstruction_has_ideal_figures() -> None:
    evaluation, x = Evaluation((1, 12, 12), CPU), torch.rand(3, 1, 12, 12)
    evaluation.add({}, x, x)
    found = evaluation.compute()
    assert found["mse"] == 0
    assert found["ssim"] == pytest.approx(1)
    assert found["psnr"] == math.inf
    assert "bits_per_dim" not in found


def test_missing_values_are_excluded_from_metrics() -> None:
    x, known = torch.rand(8, 1, 12, 12), torch.ones(8, 1, 12, 12, dtype=torch.bool)
    known[:4, :, :5] = False
    x_hat = x + 0.2 * torch.randn_like(x)
    evaluation = Evaluation((1, 12, 12), CPU, gaps=True)
    for rows in (slice(0, 3), slice(3, 5), slice(5, 8)):
        evaluation.add({"elbo": torch.tensor(-50.0)}, x.where(known, torch.nan)[rows], x_hat[rows])
    found = {name: value.item() for name, value in evaluation.compute().items()}
    mse = ((x - x_hat) ** 2)[known].mean().item()
    assert found["mse"] == pytest.approx(mse) and found["psnr"] == pytest.approx(-10 * math.log10(mse))
    assert found["bits_per_dim"] == pytest.approx(50 * 8 / int(known.sum()) / math.log(2), rel=1e-6)
    whole = [ssim(a[0].numpy(), b[0].numpy()) for a, b in zip(x[4:], x_hat[4:], strict=True)]
    assert found["ssim"] == pytest.approx(np.mean(whole), rel=1e-4)
    assert set(found) == {"elbo", "bits_per_dim", "mse", "psnr", "ssim"}


def test_codebook_metrics_are_named_after_their_codebook() -> None:
    """Over two batches: usage is the share of codes that occur, perplexity the exponential of their entropy."""
    evaluation, x = Evaluation((4,), CPU), torch.rand(3, 4)
    top = torch.tensor([[0, 1], [1, 2], [2, 2], [0, 0], [3, 3], [0, 0]])[:, None]
    only = torch.tensor([0, 0, 1, 1, 1, 1])[:, None, None]
    for rows in (slice(0, 3), slice(3, 6)):
        evaluation.add({}, x, x, codebooks={"top": (top[rows], (8,)), "": (only[rows], (4,))})
    found = {name: value.item() for name, value in evaluation.compute().items()}
    share_top, share_only = np.array([5, 2, 3, 2]) / 12, np.array([2, 4]) / 6
    expected = {"usage_top": 4 / 8, "perplexity_top": np.exp(-(share_top * np.log(share_top)).sum())}
    expected |= {"usage": 2 / 4, "perplexity": np.exp(-(share_only * np.log(share_only)).sum())}
    assert {name: found.get(name) for name in expected} == pytest.approx(expected, rel=1e-5)


def test_half_precision_inputs_are_measured_in_float32() -> None:
    evaluation, x = Evaluation((1, 12, 12), CPU), torch.rand(3, 1, 12, 12)
    evaluation.add({}, x.bfloat16(), x.bfloat16() + 0.5)
    assert evaluation.compute()["mse"].item() == pytest.approx(0.25, rel=1e-2)


def test_means_weight_by_samples_without_gradient_and_reset() -> None:
    means = Means()
    assert means.compute() == {}
    means.add({"a": torch.tensor(1.0, requires_grad=True), "b": torch.tensor(4.0)}, 30)
    means.add({"a": torch.tensor(5.0), "b": torch.tensor(4.0, dtype=torch.float64)}, 10)
    found = means.compute()
    assert {name: value.item() for name, value in found.items()} == {"a": 2.0, "b": 4.0}
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())
    means.reset()
    assert means.compute() == {}


def test_means_of_many_batches_keep_precision() -> None:
    means = Means()
    for _ in range(10_000):
        means.add({"a": torch.tensor(0.1)}, 1000)
    assert means.compute()["a"].item() == pytest.approx(0.1, rel=1e-7)


def test_each_loader_has_its_own_metrics(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (DataLoader((scale * torch.rand(10, 6, generator=generator)), batch_size=4) for scale in (1, 0.5))
    torch.manual_seed(0)
    model = aezoo.create_model("vae", (6,), latent_dim=2, hidden_dims=(5,))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, first, [first, second])
    alone = [trainer.validate(model, loader, verbose=False)[0] for loader in (first, second)]
    both = trainer.validate(model, [first, second], verbose=False)
    assert both[0] == alone[0] | {name.replace("val/", "val_1/"): value for name, value in alone[1].items()}
    swapped = trainer.test(model, [second, first], verbose=False)[0]
    assert swapped["test/loss"] == alone[1]["val/loss"] and swapped["test_1/loss"] == alone[0]["val/loss"]
    found = trainer.predict(model, [first, second])
    assert [len(batches) for batches in found] == [3, 3]
