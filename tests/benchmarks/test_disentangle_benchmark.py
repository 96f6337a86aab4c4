"""The disentanglement benchmark: its rows, which are measured once, and its figures compared with references."""

import csv

import pytest
import torch

import aezoo
from aezoo.errors import AezooError
from benchmarks import disentangle, disentangle_row

TINY = ["--models", "vae", "--steps", "3", "--rows", "400", "--size", "8", "--code-size", "4", "--accelerator", "cpu"]


def rows_of(folder):
    (path,) = folder.glob("disentangle-shapes-8-fp32-pt*-cpu*.csv")
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# command: python -m benchmarks.disentangle --models vae --steps 3")
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    disentangle.main([*TINY, "--seeds", "2", "--results", str(folder)])
    return folder


@pytest.mark.slow
def test_every_seed_is_a_row_and_every_column_is_filled(results):
    rows = rows_of(results)
    assert [(row["model"], row["seed"], row["code_size"]) for row in rows] == [("vae", "0", "4"), ("vae", "1", "4")]
    for row in rows:
        assert tuple(row) == (*disentangle.COLUMNS[:-1], "processor", "error")
        assert {column for column, cell in row.items() if not cell} == {"net", "error"}
        assert all(0 <= float(row[name]) <= 1 for name in disentangle.SCORES)
        assert float(row["elbo"]) < 0 < float(row["mse"])
    assert rows[0]["elbo"] != rows[1]["elbo"]


@pytest.mark.slow
def test_rows_are_kept_and_failures_recorded_per_seed(results, capsys):
    before = rows_of(results)
    disentangle.main([*TINY, "--seeds", "2", "--results", str(results)])
    assert rows_of(results) == before and "seed" not in capsys.readouterr().out
    disentangle.main([*TINY, "--seeds", "2", "--net", "convolution", "--results", str(results)])
    kept, failed = rows_of(results)[:2], rows_of(results)[2:]
    assert kept == before and [row["seed"] for row in failed] == ["0", "1"]
    assert all(row["error"].startswith("AezooError: ") and not row["mig"] for row in failed)


def test_default_models_exist_and_misspelt_are_refused():
    specs = disentangle.plan(disentangle.parse_arguments(["--seeds", "2", "--net", "conv"]))
    assert {"vae", "beta_vae"} <= {spec["model"] for spec in specs} <= set(disentangle.MODELS)
    assert specs[0]["hyperparameters"] == {"latent_dim": 10, "net": "conv"} and len(specs[0]["seeds"]) == 2
    assert disentangle.plan(disentangle.parse_arguments(["--models", "BetaVAE"]))[0]["model"] == "beta_vae"
    with pytest.raises(AezooError, match="did you mean 'beta_vae'"):
        disentangle.plan(disentangle.parse_arguments(["--models", "betta_vae"]))
    with pytest.raises(SystemExit):
        disentangle.parse_arguments(["--rows", "399"])


@pytest.mark.slow
def test_samples_come_from_test_split_for_any_seed():
    data = aezoo.DataModule("shapes", size=8, memory="off")
    data.seed = 5
    x, factors = disentangle_row.samples(data, 500)
    again, _ = disentangle_row.samples(aezoo.DataModule("shapes", size=8, memory="off"), 500)
    assert torch.equal(x, again) and x.shape == (500, 1, 8, 8) and factors.shape == (500, 5)
    assert torch.equal((x * 255).round().byte(), data.source.render(factors))
    numbers = data.source.index(factors)
    assert torch.isin(numbers, data.source.rows("test")).all() and len(numbers.unique()) == 500
    # all shapes, in random order
    assert factors[:, 0].bincount().min() > 120 and factors[:50, 0].unique().numel() == 3


def test_metrics_match_model_posterior():
    model = aezoo.create_model("vae", (1, 8, 8), latent_dim=3, hidden_dims=(8,))
    x = torch.rand(700, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    z, kl, figures = disentangle_row.evaluate(model, x)
    with torch.no_grad():
        mu, log_var = model.posterior(x)
        q = torch.distributions.Normal(mu, (0.5 * log_var).exp())
        assert torch.allclose(z, mu, atol=1e-6)
        exact = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
        assert torch.allclose(kl, exact, atol=1e-5)
        assert figures["mse"] == pytest.approx(float((model(x) - x).square().mean()), rel=1e-4)
        # the weights are untrained, so -log p(x|z) differs little between a draw and the mean
        at_mean = -float(model.nll(model.decoder(mu), x).mean() + exact.sum(1).mean())
        assert figures["elbo"] == pytest.approx(at_mean, rel=0.05)
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        disentangle_row.evaluate(model, x)


@pytest.mark.slow
def test_true_factors_score_near_one():
    data = aezoo.DataModule("shapes", size=8, memory="off")
    _, factors = disentangle_row.samples(data, 3000)
    found = disentangle_row.scores(factors.float(), factors)
    assert set(found) | {"udr"} == set(disentangle.SCORES)
    # 20 bins for 40 and 32 values; the shape is guessed correctly by chance one time in three
    assert 0.85 < found.pop("mig") < 0.95 and 0.9 < found.pop("sap") < 0.95
    assert all(0.99 < value <= 1 for value in found.values()), found
