"""Metrics of sparse codes against NumPy, scikit-learn and all permutations, for any batch size."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import cosine_similarity, paired_cosine_distances
from torch import distributed, multiprocessing
from torchmetrics import MetricCollection

from aezoo import create_model, metrics
from aezoo.data import DataModule
from aezoo.data.source import Options
from aezoo.data.synthetic_dictionary import SyntheticDictionary
from aezoo.errors import AezooError

N, X, LATENTS = 501, 7, 12
GENERATOR = torch.Generator().manual_seed(0)
# non-zero means and unequal variances, so that an omitted mean or a mean per batch changes the metrics
SAMPLES = torch.randn(N, X, generator=GENERATOR) * torch.arange(1.0, 8) + 30 * torch.rand(X, generator=GENERATOR)
SAMPLES[100:200] += 20
HATS = 0.7 * SAMPLES + torch.randn(N, X, generator=GENERATOR)
CODES = torch.randn(N, LATENTS, generator=GENERATOR).relu() * (torch.rand(N, LATENTS, generator=GENERATOR) < 0.3)
CODES[:, [2, 9]] = 0
CODES[:400, 5] = 0
x, hat, f = (part.double().numpy() for part in (SAMPLES, HATS, CODES))
EXPECTED = {
    "l0": (f != 0).sum(1).mean(),
    "dead_share": (~(f != 0).any(0)).mean(),
    "fvu": 1 - r2_score(x, hat, multioutput="variance_weighted"),
    "cosine": 1 - paired_cosine_distances(x, hat).mean(),
    "shrinkage": (np.linalg.norm(hat, axis=1) / np.linalg.norm(x, axis=1)).mean(),
    "reconstruction_bias": (hat**2).sum() / (hat * x).sum(),
}


def batches(size):
    return zip(CODES.split(size), SAMPLES.split(size), HATS.split(size), strict=True)


@pytest.mark.parametrize("size", [N, 500, 128, 7, 1])
def test_metrics_do_not_depend_on_batch_size(size):
    together = metrics.sparse_metrics((X,), (LATENTS,))
    for code, samples, hats in batches(size):
        together.update(code=code, x=samples, x_hat=hats)
    found = together.compute()
    assert set(found) == set(EXPECTED)
    for name, value in EXPECTED.items():
        assert found[name].dtype == torch.float64 and found[name].ndim == 0
        assert float(found[name]) == pytest.approx(float(value), rel=1e-12), name


def test_mean_of_fvu_over_batches_is_biased():
    """Other libraries report this mean, which depends on the batch size; `FVU` accumulates sums instead."""
    means = []
    for size in (N, 100, 10):
        of_batches = [1 - r2_score(one.numpy(), other.numpy(), multioutput="variance_weighted")
                      for _, one, other in batches(size) if len(one) > 1]  # fmt: skip
        means.append(float(np.mean(of_batches)))
    exact = float(EXPECTED["fvu"])
    assert means[0] == pytest.approx(exact, rel=1e-5)
    assert means[1] > 1.2 * exact and means[2] > 1.3 * exact
    # relative to E||x||^2, without subtracting the mean, the value is less than half
    assert float(((x - hat) ** 2).sum() / (x**2).sum()) < exact / 2


def test_fvu_accumulates_in_float64():
    n = 20_000
    samples = 1000 + torch.randn(n, 4, generator=GENERATOR)
    hats = samples + 0.1 * torch.randn(n, 4, generator=GENERATOR)
    expected = 1 - r2_score(samples.double().numpy(), hats.double().numpy(), multioutput="variance_weighted")
    fvu = metrics.FVU(4)
    for one, other in zip(samples.split(64), hats.split(64), strict=True):
        fvu.update(one, other)
    assert float(fvu.compute()) == pytest.approx(expected, rel=1e-8)
    narrow = (samples - hats).square().sum() / (samples.square().sum() - samples.sum(0).square().sum() / n)
    assert abs(float(narrow) / expected - 1) > 1e-3
    low = metrics.FVU(4)
    low.update(samples.bfloat16(), hats.bfloat16())
    assert low.compute().dtype == torch.float64


def test_perfect_reconstruction_has_ideal_metrics():
    found = metrics.sparse_metrics((X,), (LATENTS,))
    found.update(code=CODES, x=SAMPLES, x_hat=SAMPLES)
    # Cosine and Shrinkage then have equal states, and must not be merged into one compute group
    found.update(code=CODES, x=SAMPLES, x_hat=-2 * SAMPLES)
    ends = {name: float(value) for name, value in found.compute().items()}
    assert ends["cosine"] == pytest.approx(0) and ends["shrinkage"] == pytest.approx(1.5)
    assert ends["reconstruction_bias"] == pytest.approx((1 + 4) / (1 - 2))
    for name, value in (("fvu", 0), ("cosine", 1), ("shrinkage", 1), ("reconstruction_bias", 1)):
        one = metrics.sparse_metrics((X,), (LATENTS,))[name]
        one.update(SAMPLES, SAMPLES)
        assert float(one.compute()) == pytest.approx(value, abs=1e-12)


def test_bias_metric_is_optimal_rescaling():
    bias = metrics.ReconstructionBias()
    bias.update(SAMPLES, HATS)
    gamma = float(bias.compute())
    errors = [((x - hat / (gamma * s)) ** 2).sum() for s in (0.99, 1, 1.01)]
    assert errors[1] < min(errors[0], errors[2])


def test_zero_samples_give_finite_metrics():
    samples, hats = torch.tensor([[0.0, 0], [3, 4]]), torch.tensor([[1.0, 0], [0, 0]])
    for metric, value in ((metrics.Cosine(), 0.0), (metrics.Shrinkage(), 0.0)):
        metric.update(samples, hats)
        assert float(metric.compute()) == value
    cosine = metrics.Cosine()
    cosine.update(torch.tensor([[0.0, 0], [3, 4]]), torch.tensor([[1.0, 0], [6, 8]]))
    assert float(cosine.compute()) == pytest.approx(0.5)
    for metric in (metrics.Shrinkage(), metrics.ReconstructionBias(), metrics.FVU(2)):
        metric.update(torch.zeros(3, 2), torch.zeros(3, 2))
        assert math.isnan(float(metric.compute()))


def test_threshold_applies_to_absolute_activations():
    code = torch.tensor([[0.0, 0.2, -0.2, 0.5], [0.0, 0.1, 0, -0.6]])
    for threshold, l0, dead in ((0.0, 2.5, 0.25), (0.15, 2.0, 0.25), (0.3, 1.0, 0.75)):
        number, share = metrics.L0(threshold=threshold), metrics.DeadShare(4, threshold=threshold)
        number.update(code)
        share.update(code)
        assert float(number.compute()) == l0 and float(share.compute()) == dead


def test_maps_are_flattened():
    fvu, l0 = metrics.FVU(12), metrics.L0()
    images = torch.rand(9, 3, 2, 2, generator=GENERATOR)
    fvu.update(images, images * 0.9)
    l0.update(images > 0.5)
    flat = images.flatten(1).numpy()
    assert float(fvu.compute()) == pytest.approx(
        1 - r2_score(flat, flat * 0.9, multioutput="variance_weighted"), rel=1e-5
    )
    assert float(l0.compute()) == pytest.approx((flat > 0.5).sum(1).mean())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_forward_returns_batch_value_and_accumulates():
    fvu = metrics.FVU(X)
    first = fvu(SAMPLES[:50], HATS[:50])
    assert float(first) == pytest.approx(1 - r2_score(x[:50], hat[:50], multioutput="variance_weighted"), rel=1e-9)
    fvu(SAMPLES[50:], HATS[50:])
    assert float(fvu.compute()) == pytest.approx(float(EXPECTED["fvu"]), rel=1e-12)
    fvu.reset()
    with pytest.raises(AezooError, match="no samples"):
        fvu.compute()


def _rank(rank, store, folder):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    together = metrics.sparse_metrics((X,), (LATENTS,))
    rows = slice(0, 120) if rank == 0 else slice(120, N)
    for code, samples, hats in zip(CODES[rows].split(50), SAMPLES[rows].split(50), HATS[rows].split(50), strict=True):
        together.update(code=code, x=samples, x_hat=hats)
    torch.save(together.compute(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_match_single_process_metrics(tmp_path):
    multiprocessing.start_processes(_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="fork")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert {name: float(value) for name, value in found.items()} == pytest.approx(
            {name: float(value) for name, value in EXPECTED.items()}, rel=1e-12
        )


def test_sparse_metrics_are_reported_for_sparse_models():
    for name, reported in (("topk_sae", True), ("linear_ae", False)):
        data = DataModule("synthetic_dictionary", dictionary_samples=500, batch_size=64)
        model = create_model(name, (32,), latent_dim=20, likelihood="gaussian", **({"k": 4} if reported else {}))
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=3)
        trainer.fit(model, data)
        assert ("val/fvu" in trainer.callback_metrics) is reported
        found = trainer.test(model, data, verbose=False)[0]
        assert ({f"test/{key}" for key in EXPECTED} <= set(found)) is reported
        if reported:
            samples, _ = data.tensors("test")
            with torch.no_grad():
                code = model.encode(samples)
                error = (samples - model.decode(code)).double()
            off = (samples - samples.mean(0)).double()
            assert found["test/fvu"] == pytest.approx(float(error.square().sum() / off.square().sum()), rel=1e-5)
            assert found["test/l0"] == pytest.approx(float((code != 0).sum(1).double().mean()))
            assert found["test/dead_share"] == pytest.approx(float((code == 0).all(0).double().mean()))


# ---- a known dictionary ---------------------------------------------------------------------------------------------


def recovery(atoms, directions):
    metric = metrics.Recovery(atoms)
    metric.update(directions)
    return {name: float(value) for name, value in metric.compute().items()}


ATOMS = torch.nn.functional.normalize(torch.randn(6, 4, generator=GENERATOR), dim=1)


def test_true_atoms_score_1_up_to_order_sign_scale():
    order = torch.randperm(6, generator=GENERATOR)
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1])[:, None] * torch.rand(6, 1, generator=GENERATOR)
    assert recovery(3 * ATOMS, ATOMS[order] * signs) == pytest.approx({"mcc": 1, "uniqueness": 1}, abs=1e-6)


@pytest.mark.parametrize("latents", [6, 4, 7])
def test_mcc_uses_optimal_matching(latents):
    directions = torch.randn(latents, 4, generator=GENERATOR)
    cosine = np.abs(cosine_similarity(ATOMS.double().numpy(), directions.double().numpy()))
    if latents <= 6:
        best = max(sum(cosine[i, j] for j, i in enumerate(p)) for p in permutations(range(6), latents))
    else:
        best = max(sum(cosine[i, j] for i, j in enumerate(p)) for p in permutations(range(latents), 6))
    found = recovery(ATOMS, directions)
    assert found["mcc"] == pytest.approx(best / 6, abs=1e-6)
    assert found["uniqueness"] == len(set(cosine.argmax(0))) / latents
    # the nearest latent of each atom, without one-to-one matching, gives an upper bound
    assert found["mcc"] <= cosine.max(1).mean() + 1e-9


def test_duplicated_latents_lower_uniqueness_and_mcc():
    alike = ATOMS[[0, 0, 0, 3, 3, 3]]
    found = recovery(ATOMS, alike)
    assert found["uniqueness"] == pytest.approx(2 / 6) and found["mcc"] < 0.9
    lost = recovery(ATOMS, torch.cat([ATOMS[:3], torch.zeros(3, 4)]))
    assert lost["mcc"] == pytest.approx(0.5, abs=1e-6)


def test_similarity_averages_dictionaries_and_joins_streams():
    metric = metrics.Recovery(ATOMS)
    metric.update(ATOMS)
    metric.update(torch.zeros(6, 4))
    assert float(metric.compute()["mcc"]) == pytest.approx(0.5)
    source = SyntheticDictionary(Options("synthetic_dictionary", dictionary_streams=2))
    assert recovery(source.atoms, source.atoms.flip(0))["mcc"] == pytest.approx(1, abs=1e-6)


# ---- refusals, precision and collections ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.FVU(0), "at least 1"),
        (lambda: metrics.DeadShare(2.5), "at least 1"),
        (lambda: metrics.FVU(3).update(SAMPLES, HATS), "made for 3 numbers per row, got 7"),
        (lambda: metrics.Cosine().update(SAMPLES, HATS[:5]), "of one shape"),
        (lambda: metrics.L0().update(SAMPLES[0]), "of one shape"),
        (lambda: metrics.Recovery(torch.zeros(3, 4)), "none of them zeros"),
        (lambda: metrics.Recovery(ATOMS).update(torch.ones(3, 5)), "got 5"),
        (lambda: metrics.Recovery(ATOMS).compute(), "no samples"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(call, message):
    with pytest.raises(AezooError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_device_without_float64_takes_float32():
    together = metrics.sparse_metrics((X,), (LATENTS,)).set_dtype(torch.float32)
    together.update(code=CODES, x=SAMPLES, x_hat=HATS)
    found = together.compute()
    assert found["fvu"].dtype == torch.float32
    assert float(found["fvu"]) == pytest.approx(float(EXPECTED["fvu"]), rel=1e-3)


def test_metrics_form_a_collection():
    together = MetricCollection([metrics.Cosine(), metrics.Shrinkage(), metrics.ReconstructionBias()])
    together.update(SAMPLES, SAMPLES)
    together.update(SAMPLES, 3 * SAMPLES)
    assert {name: round(float(value), 6) for name, value in together.compute().items()} == {
        "Cosine": 1.0, "Shrinkage": 2.0, "ReconstructionBias": 2.5,
    }  # fmt: skip
