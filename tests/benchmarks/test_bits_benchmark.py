"""The benchmark of errors at equal bits: plans and counts; and the recipe of Keras with Keras' own figures."""

import csv
import math

import numpy as np
import pytest
import torch
import yaml

import aezoo
from aezoo import registry
from aezoo.bases.token_prior import IndexPrior
from aezoo.cli import recipes
from aezoo.errors import AezooError
from benchmarks import bits, bits_row, parallel, plots_bits, report
from benchmarks.common import ResultsCSV

TINY = ["--data", "digits", "--rows", "80", "--epochs", "2", "--batch-size", "20", "--accelerator", "cpu"]


def rows_of(folder):
    (path,) = folder.glob("bits-digits-fp32-pt*-cpu*.csv")
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# command: python -m benchmarks.bits --data digits")
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Rows are measured in this process: separate processes are tested with the other benchmarks."""

    def run_rows(module, specs, timeout, jobs, accelerator):
        assert module == "bits_row"
        for spec in specs:
            try:
                yield spec, bits_row.measure(spec)
            except (AezooError, FloatingPointError) as error:
                yield spec, {"error": str(error)}

    monkeypatch.setattr(parallel, "run_rows", run_rows)


def run(folder, *more):
    bits.main([*TINY, "--results", str(folder), *more])


def plan(*argv, shape=(1, 28, 28)):
    data = {"name": "mnist5k", "root": "", "size": None, "rows": None, "batch_size": 128}
    return bits.plan(bits.parse_arguments(argv), data, shape)


# ---- planned runs ----------------------------------------------------------------------------------------------------


def test_time_limit_makes_a_separate_row(tmp_path):
    words = ("--models", "fsq_vae", "--bits", "6", "--seeds", "1")
    (whole,), (cut,) = plan(*words), plan(*words, "--most-seconds", "5")
    table = ResultsCSV(tmp_path / "bits.csv", bits.KEY, "it")
    # older rows do not have this column
    table.put({name: value for name, value in whole["row"].items() if name != "most_seconds"})
    assert not table.needs(whole["row"]) and table.needs(cut["row"])


def test_every_discrete_model_is_planned():
    models = {name: registry.model_class(name) for name in registry.list_models(family="quantised")}
    wanted = {name for name, cls in models.items() if cls.discrete_code and not issubclass(cls, IndexPrior)}
    assert {spec["row"]["model"] for spec in plan("--seeds", "1")} == wanted


@pytest.mark.parametrize("wanted", [6, 8, 10])
def test_all_plans_have_requested_bits(wanted):
    """Counted from the options, for the 7 x 7 positions of two stages (and 4 x 4 of a third)."""
    seen = set()
    for spec in plan("--bits", str(wanted), "--seeds", "1"):
        model, given = spec["row"]["model"], spec["hyperparameters"]
        size = math.log2(given.get("codebook_size", 1))
        found = {
            "vq_vae": 49 * given.get("n_groups", 1) * size,
            "rq_vae": 49 * given.get("levels", 0) * size if model == "rq_vae" else 0,
            "vq_vae_2": (49 + 16) * size,
            "titok": given.get("n_tokens", 0) * size,
            "fsq_vae": 49 * math.log2(math.prod(given["levels"])) if model == "fsq_vae" else 0,
            "fsp_vae": 49 * math.log2(math.prod(given["levels"])) if model == "fsp_vae" else 0,
            "qlae": given.get("latent_dim", 0) * math.log2(given.get("n_values", 1)),
            "lfq_vae": 49 * given.get("latent_dim", 0),
            "bsq_vae": 49 * given.get("latent_dim", 0),
        }.get(model, 49 * size)
        assert spec["row"]["bits"] == pytest.approx(found)
        assert found == pytest.approx(49 * wanted, rel=0.012 if model in ("fsq_vae", "fsp_vae") else 0.004), model
        assert given.get("hidden_dims") == (None if model == "titok" else (32, 64))
        seen.add((model, spec["row"]["options"]))
    assert len(seen) == len(bits.settings(wanted, 49))
    ways = {word for model, options in seen if model == "vq_vae" for word in options.split()[1:]}
    estimators = {"estimator=rotation", "estimator=gumbel", "estimator=diveq"}
    assert ways == {"update=gradient", "cosine=True", "n_groups=2", *estimators}


def test_published_fsq_levels_have_expected_bits():
    for wanted, levels in bits.FSQ_LEVELS.items():
        assert math.log2(math.prod(levels)) == pytest.approx(wanted, abs=0.11)


def test_plan_is_ordered_by_seed_and_checks_names():
    seeds = [spec["row"]["seed"] for spec in plan("--models", "vq_vae", "lfq_vae", "--seeds", "2")]
    assert seeds == sorted(seeds) and len(seeds) == 2 * 2 * 8
    with pytest.raises(AezooError, match="did you mean 'fsq_vae'"):
        plan("--models", "fsq_vea")
    with pytest.raises(AezooError, match="vae is not a quantised model"):
        plan("--models", "vae")


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_are_measured_once_with_model_metrics(tmp_path, monkeypatch, capsys):
    models, create = [], aezoo.create_model
    monkeypatch.setattr(aezoo, "create_model", lambda *a, **k: models.append(create(*a, **k)) or models[-1])
    run(tmp_path, "--models", "rq_vae", "gumbel_vq_vae", "--bits", "4", "--seeds", "2")
    rows = rows_of(tmp_path)
    assert [(row["model"], row["seed"]) for row in rows] == [
        ("rq_vae", "0"), ("gumbel_vq_vae", "0"), ("rq_vae", "1"), ("gumbel_vq_vae", "1"),
    ]  # fmt: skip
    data = aezoo.DataModule("digits", batch_size=20)
    x_test = bits_row.open_data({"name": "digits", "rows": 80, "batch_size": 20}, 0).tensors("test")[0]
    assert len(x_test) == 80 <= len(data.tensors("test")[0])
    for row, model in zip(rows, models, strict=True):
        assert tuple(row) == (*bits.COLUMNS[:-1], "processor", "error") and not row["error"]
        assert (row["steps"], row["epochs"], row["bits_per_place"], row["bits"]) == ("8", "2", "4", "16")
        with torch.no_grad():
            indices = model.eval().encode_indices(x_test)
            error = (model.likelihood.mean(model.decoder(model.codes(indices))) - x_test).square().mean()
        assert float(row["mse"]) == pytest.approx(float(error), rel=1e-3)
        used, shares = 0.0, []
        for index, size in zip(indices.unbind(1), model.index_sizes, strict=True):
            p = np.bincount(index.flatten().numpy(), minlength=size) / index.numel()
            used += 4 * float(-(p[p > 0] * np.log2(p[p > 0])).sum())  # 2 x 2 positions
            shares.append((p > 0).mean())
        assert float(row["used_bits"]) == pytest.approx(used, rel=1e-3, abs=1e-4)
        assert float(row["usage"]) == pytest.approx(np.mean(shares), rel=1e-3)
    assert rows[0]["mse"] != rows[2]["mse"]
    # schedules take half of the training
    assert models[1].hparams["temperature_steps"] == 4
    assert "[4/4] gumbel_vq_vae codebook_size=16, seed 1" in capsys.readouterr().out
    run(tmp_path, "--models", "rq_vae", "gumbel_vq_vae", "--bits", "4", "--seeds", "2")
    assert rows_of(tmp_path) == rows and "seed 0:" not in capsys.readouterr().out


class Codebooks:
    """Two grids, with one and two codebooks."""

    index_shape = (3,)

    def codebooks(self, indices):
        return {
            "top": (torch.zeros(1, 1, 2, 2), (8,)),
            "bottom": (torch.zeros(1, 2, 5), (4, 16)),
        }


def test_used_bits_sum_over_places_and_codebooks():
    figures = {"usage_top": 0.5, "usage_0_bottom": 0.25, "usage_1_bottom": 1.0}
    figures |= {"perplexity_top": 4.0, "perplexity_0_bottom": 2.0, "perplexity_1_bottom": 8.0}
    found = bits_row.codebook_figures(Codebooks(), figures)
    assert found["used_bits"] == pytest.approx(4 * 2 + 5 * 1 + 5 * 3)
    assert found["usage"] == pytest.approx(1.75 / 3) and found["perplexity"] == pytest.approx(14 / 3)
    assert bits_row.codebook_figures(Codebooks(), {"usage_top": 0.5}) == {}  # codebooks too large to count


@pytest.mark.slow
def test_report_shows_medians_per_bits_and_picture(tmp_path, capsys):
    table = ResultsCSV(tmp_path / "bits-digits-fp32-pt2.13-cpu2.csv", bits.KEY, "bits it")
    for bits_per_place, mse in ((10, 0.01), (6, 0.04)):
        for options, factor in ((f"codebook_size={2**bits_per_place}", 1), ("latent_dim=6 estimator=rotation", 2)):
            for seed in range(3):
                row = {"model": "vq_vae", "options": options, "dataset": "digits", "seed": seed}
                row |= {"bits_per_place": bits_per_place, "bits": 49.0 * bits_per_place, "budget": "epochs=1"}
                table.put(row | {"mse": factor * mse * (1 + seed), "usage": 0.5, "rows": "all", "batch_size": 128})
    report.main(["--results", str(tmp_path)])
    lines = [
        line for line in (tmp_path / "errors-at-equal-bits.md").read_text().splitlines() if line.startswith("| vq_vae")
    ]
    assert [line.split("|")[2].strip() for line in lines] == [
        "codebook_size=64", "latent_dim=6 estimator=rotation", "codebook_size=1024", "latent_dim=6 estimator=rotation",
    ]  # fmt: skip
    assert "| 3 | 294 | 0.08 (0.04 to 0.12) |" in lines[0] and "| 3 | 490 | 0.02 (0.01 to 0.03) |" in lines[2]
    assert (tmp_path / "pictures" / "bits.png").read_bytes().startswith(b"\x89PNG")
    assert plots_bits.bits([]) is None


def test_series_is_named_by_distinguishing_options():
    def way(options):
        return plots_bits.variant_text({"model": "vq_vae", "options": options})

    assert way("codebook_size=64") == "vq_vae"
    assert way("codebook_size=64 estimator=diveq update=gradient") == "vq_vae diveq gradient"
    assert way("codebook_size=64 cosine=True") == "vq_vae cosine"
    assert way("codebook_size=8 n_groups=2") == "vq_vae n_groups=2"


# ---- Keras' recipe ---------------------------------------------------------------------------------------------------


def test_keras_recipe_matches_parameters_and_scaled_loss():
    """https://keras.io/examples/generative/vq_vae/, whose summary of 48,913 parameters has 64 codes."""
    settings = yaml.safe_load(recipes.recipes()["mnist_keras_vq_vae"].read_text())["model"]["init_args"]
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    counts = [
        sum(
            p.numel()
            for p in registry.create_model("vq_vae", (1, 28, 28), **settings | {"codebook_size": k}).parameters()
        )
        for k in (64, 128)
    ]
    assert counts == [48_913, 49_937]
    torch.manual_seed(0)
    model = registry.create_model("vq_vae", (1, 28, 28), **settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x = torch.rand(5, 1, 28, 28)
    with torch.no_grad():
        z = model.encoder(x)
        flat = z.movedim(1, -1).flatten(0, -2).numpy()
        codes = model.quantiser.code_KD.numpy()
        nearest = codes[((flat[:, None] - codes) ** 2).sum(-1).argmin(1)]
        q = torch.from_numpy(nearest).unflatten(0, (5, 7, 7)).movedim(-1, 1)
        y = model.decoder(q).numpy()
        terms = model.loss(x)
    variance = 0.30811**2  # of MNIST's training pixels
    vq = (1 + 0.25) * float(((flat - nearest) ** 2).mean())
    keras = float(((x.numpy() - y) ** 2).mean()) / variance + vq
    constant = 392 * math.log(2 * math.pi * variance / 2)
    assert float(terms["loss"]) == pytest.approx(784 * keras + constant, rel=1e-3)
    assert float(terms["codebook"] + terms["commitment"] / 4) == pytest.approx(784 * vq, rel=1e-4)
    # the line `# target:` states what Keras prints in these units
    assert [784 * 0.2127 + constant, 784 * 0.0444 + constant, 784 * 0.1682] == pytest.approx(
        [-307.5, -439.5, 131.9], abs=0.06
    )
