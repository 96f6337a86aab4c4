"""Sparse sums of known atoms: their statistics, samples by index, and the benchmark."""

import csv
import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

import aezoo
from aezoo import registry
from aezoo.cli.main import main
from aezoo.data import DataModule
from aezoo.data.in_memory import Scale
from aezoo.data.synthetic_dictionary import GROUP_SIZE, uniform
from aezoo.errors import AezooError
from benchmarks import dictionaries, dictionaries_row, parallel, processes

SMALL = {"dictionary_samples": 1000, "dictionary_atoms": 24, "dictionary_dim": 10, "dictionary_active": 3.0}


def dictionary(**given):
    return DataModule("synthetic_dictionary", **{**SMALL, **given})


def test_samples_are_sums_of_the_atoms_with_the_codes_as_weights():
    source = dictionary(dictionary_correlation=0.5).source
    rows = torch.arange(300)
    f, x = source.codes(rows), source.samples(rows)
    assert f.shape == (300, 24) and x.shape == (300, 10) and x.dtype == f.dtype == torch.float32
    assert torch.allclose(x.double(), f.double() @ source.atoms.double(), atol=1e-6)
    assert torch.allclose(source.atoms.norm(dim=1), torch.ones(24), atol=1e-6)
    on = f[f > 0]
    assert 0.5 < float(on.min()) < 0.51 and 1.49 < float(on.max()) < 1.5


@pytest.mark.parametrize(("active", "correlation"), [(3.0, 0.0), (0.7, 0.35), (12.0, 0.8)])
def test_supports_have_requested_mean_and_correlation(active, correlation):
    source = dictionary(dictionary_active=active, dictionary_correlation=correlation).source
    n = 40_000
    on = (source.codes(torch.arange(n)) > 0).double().numpy()
    chance = active / 24
    # five standard deviations of a proportion; groups activated together have a smaller one
    slack = 5 * np.sqrt(chance * (1 - chance) / n)
    assert np.abs(on.mean(0) - chance).max() < slack
    assert on.sum(1).mean() == pytest.approx(active, abs=24 * slack)
    found = np.corrcoef(on.T)
    group = np.arange(24) // GROUP_SIZE
    same = (group[:, None] == group) & ~np.eye(24, dtype=bool)
    other = group[:, None] != group
    assert found[same].mean() == pytest.approx(correlation, abs=0.02)
    assert np.abs(found[same] - correlation).max() < 0.06
    assert abs(found[other].mean()) < 0.003 and np.abs(found[other]).max() < 0.04


def test_coefficients_are_uniform_and_independent():
    f = dictionary(dictionary_active=24.0).source.codes(torch.arange(20_000)).numpy()
    assert stats.kstest(f[:, 0], "uniform", args=(0.5, 1)).pvalue > 1e-3
    assert stats.kstest(f[0], "uniform", args=(0.5, 1)).pvalue > 1e-3
    # independent of the random number that activates an atom
    few = dictionary().source.codes(torch.arange(5000)).numpy()
    assert stats.kstest(few[few > 0], "uniform", args=(0.5, 1)).pvalue > 1e-3
    assert np.abs(np.corrcoef(f.T) - np.eye(24)).max() < 0.04
    assert all(abs(np.corrcoef(f[:-lag, 3], f[lag:, 3])[0, 1]) < 0.04 for lag in (1, 2, 7))


def test_noise_is_gaussian_with_requested_deviation():
    rows = torch.arange(20_000)
    clean = dictionary().source
    noisy = dictionary(dictionary_noise=0.3).source
    assert torch.equal(clean.codes(rows), noisy.codes(rows)) and torch.equal(clean.atoms, noisy.atoms)
    noise = (noisy.samples(rows) - clean.samples(rows)).double().numpy()
    assert stats.kstest(noise[:, 0] / 0.3, "norm").pvalue > 1e-3
    assert np.cov(noise.T) == pytest.approx(0.09 * np.eye(10), abs=0.004)


def test_atoms_are_spread_evenly_over_the_sphere():
    atoms = dictionary(dictionary_atoms=20_000, dictionary_dim=3).source.atoms.double().numpy()
    # Archimedes: each coordinate of a uniform point on the sphere is uniform
    assert all(stats.kstest(atoms[:, k], "uniform", args=(-1, 2)).pvalue > 1e-3 for k in range(3))
    assert np.abs(atoms.mean(0)).max() < 0.02


def test_sample_depends_on_seed_and_index_only():
    source = dictionary(dictionary_noise=0.1, dictionary_correlation=0.4).source
    rows = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    x, f = source.samples(rows), source.codes(rows)
    for i in (0, 7, 4999):
        assert torch.equal(source.samples([int(rows[i])])[0], x[i])
        assert torch.equal(source.codes([int(rows[i])])[0], f[i])
    again = dictionary(dictionary_noise=0.1, dictionary_correlation=0.4, dictionary_samples=77).source
    assert torch.equal(again.samples(rows), x)
    other = dictionary(dictionary_noise=0.1, dictionary_correlation=0.4, seed=1).source
    assert not torch.equal(other.atoms, source.atoms) and not torch.equal(other.codes(rows), f)
    assert source.samples([]).shape == (0, 10) and source.codes([]).shape == (0, 24)


def test_random_numbers_match_splitmix64():
    # Vigna's splitmix64.c with the state 1234567, https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    import aezoo.data.synthetic_dictionary as module

    kept = module.mix
    try:
        module.mix = lambda *_: 1234567
        found = uniform(0, 0, np.arange(1, 6))
    finally:
        module.mix = kept
    assert found == pytest.approx([z / 2**64 for z in first], abs=2.0**-52)


def test_splits_are_disjoint_index_ranges():
    data = dictionary(val_fraction=0.2, test_fraction=0.05)
    rows = [data.source.rows(stage) for stage in ("train", "val", "test")]
    assert [len(part) for part in rows] == [750, 200, 50] == [len(data.dataset(s)) for s in ("train", "val", "test")]
    assert torch.equal(torch.cat(rows), torch.arange(1000))
    everything = torch.cat([data.tensors(stage)[0] for stage in ("train", "val", "test")])
    assert torch.equal(everything, data.source.samples(torch.arange(1000)))
    assert len(everything.unique(dim=0)) == len(everything[everything.any(1)].unique(dim=0)) + 1
    assert dictionary(val_fraction=0.0).source.split("val") is None
    assert data.describe() == "synthetic_dictionary: 750 train, 200 val, 50 test, 10, no classes"


@pytest.mark.slow
def test_held_samples_and_workers_give_the_same_batches():
    seen = []
    for memory, num_workers in (("on", 0), ("off", 0), ("off", 2)):
        data = dictionary(memory=memory, num_workers=num_workers, batch_size=100, dictionary_noise=0.1)
        seen.append([batch[0] for batch in data.train_dataloader()])
    assert all(torch.equal(one, other) for batches in seen[1:] for one, other in zip(seen[0], batches, strict=True))
    dataset = dictionary().dataset("val")
    assert torch.equal(dataset[3][0], dataset.__getitems__([3])[0][0])
    assert torch.equal(dataset[-1][0], dataset[len(dataset) - 1][0])
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3][0], dataset[3][0])


def test_memory_is_independent_of_sample_count():
    source = dictionary(dictionary_samples=10**9).source
    assert source.samples(torch.tensor([999_999_999])).shape == (1, 10)
    assert len(pickle.dumps(source.split("train"))) < 20_000


def test_streams_show_one_code_in_several_spaces():
    source = dictionary(dictionary_streams=3).source
    assert source.input_shape == (3, 10) and source.atoms.shape == (24, 3, 10)
    assert torch.allclose(source.atoms.norm(dim=2), torch.ones(24, 3), atol=1e-6)
    rows = torch.arange(200)
    f, x = source.codes(rows), source.samples(rows)
    assert torch.allclose(x, torch.einsum("bn,nsd->bsd", f, source.atoms), atol=1e-5)
    assert torch.equal(f, dictionary().source.codes(rows))
    assert all(not torch.equal(source.atoms[:, a], source.atoms[:, b]) for a, b in pairwise(range(3)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": "unit"}, "use auto"),
        ({"scale": "standard"}, "use auto"),
        ({"dictionary_active": 25.0}, "at most --data.dictionary_atoms 24"),
        ({"dictionary_active": 0.0}, "above 0"),
        ({"dictionary_correlation": 1.0}, "not including, 1"),
        ({"dictionary_correlation": -0.1}, "from 0"),
        ({"dictionary_noise": float("nan")}, "dictionary_noise"),
        ({"dictionary_atoms": 0}, "at least 1"),
        ({"dictionary_samples": 2}, "too few"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(given, message):
    with pytest.raises(AezooError, match=message) as caught:
        dictionary(**given)
    assert "\n" not in str(caught.value)


def test_negative_index_is_refused():
    with pytest.raises(AezooError, match="-1 is out of range"):
        dictionary().source.samples([3, -1])


def test_values_are_not_scaled():
    data = dictionary()
    x, _ = data.tensors("train")
    assert float(x.min()) < 0 and Scale(x, "auto").offset is not None
    assert getattr(data.source, "scaling", None) is None and data.source.value_range is None


# ---- the benchmark ---------------------------------------------------------------------------------------------------

TINY = ["--steps", "3", "--atoms", "8", "--dim", "4", "--active", "2", "--samples", "200", "--accelerator", "cpu"]


def rows_of(folder):
    (path,) = folder.glob("dictionaries-fp32-pt*-cpu*.csv")
    lines = path.read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_every_sparse_model_has_rows_and_valid_options():
    specs = dictionaries.plan(dictionaries.parse_arguments(["--seeds", "3", "--active", "5.2", "--atoms", "32"]))
    names = [name for name in registry.list_models(family="sparse") if name != "temporal_sae"]
    assert [spec["row"]["model"] for spec in specs] == [name for name in names for _ in range(3)]
    assert {spec["hyperparameters"]["latent_dim"] for spec in specs} == {32}
    for spec in specs[::3]:
        data = DataModule("synthetic_dictionary", **spec["data"])
        model = aezoo.create_model(spec["model"], data.input_shape, **spec["hyperparameters"])
        assert model.code_shape == (32,) and not model.likelihood.unit_interval
        assert (getattr(model, "k", 5) or 5) == 5  # a transcoder without TopK has no k
    assert set(dictionaries.OPTIONS) <= set(names)
    for argv, message in ((["--models", "vae"], "vae has no sparse code"), (["--active", "65"], "at most --atoms 64")):
        with pytest.raises(AezooError, match=message):
            dictionaries.plan(dictionaries.parse_arguments(argv))


def in_this_process(module, specs, *_):
    """Replaces processes, which take seconds to start; arguments are passed as JSON, as for these."""
    assert module == "dictionaries_row"
    for spec in specs:
        try:
            yield spec, dictionaries_row.measure(json.loads(json.dumps(spec)))
        except AezooError as error:
            yield spec, processes.error_columns(error)


def test_rows_are_kept_failures_are_rows_and_medians_are_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parallel, "run_rows", in_this_process)
    argv = [*TINY, "--models", "topk_sae", "--seeds", "2", "--results", str(tmp_path)]
    dictionaries.main(argv)
    rows = rows_of(tmp_path)
    assert [(row["model"], row["seed"], row["options"]) for row in rows] == [
        ("topk_sae", seed, "likelihood=gaussian k=2") for seed in ("0", "1")
    ]
    for row in rows:
        assert tuple(row) == (*dictionaries.COLUMNS[:-1], "processor", "error")
        assert {column for column, cell in row.items() if not cell} == {"error"}
        assert 0 < float(row["mcc"]) <= 1 and 0 < float(row["l0"]) <= 2
    table = capsys.readouterr().out.splitlines()[-3:-1]
    middle = sum(float(row["mcc"]) for row in rows) / 2
    assert table[0].split() == ["model", "seeds", *dictionaries.SHOWN]
    assert table[1].split()[:2] == ["topk_sae", "2"] and float(table[1].split()[2]) == pytest.approx(middle, rel=1e-3)
    dictionaries.main(argv)
    assert rows_of(tmp_path) == rows and "seed 0" not in capsys.readouterr().out
    dictionaries.main([*argv, "--lr", "-1"])
    assert rows_of(tmp_path)[:2] == rows
    assert [row["error"][:12] for row in rows_of(tmp_path)[2:]] == ["AezooError: "] * 2
    assert len(capsys.readouterr().out.splitlines()) == 4  # two failures, the head of the table and the file


def test_true_dictionary_decoder_scores_perfect_recovery():
    data = dictionary(dictionary_atoms=6, dictionary_dim=6, dictionary_active=1.5)
    model = aezoo.create_model("sparse_ae_l1", (6,), latent_dim=6, likelihood="gaussian").eval()
    x, f = data.tensors("test")[0], data.source.codes(data.source.rows("test"))
    linear, back = model.encoder[1], model.decoder[1]
    with torch.no_grad():
        back.weight.copy_(data.source.atoms.T)
        linear.weight.copy_(torch.linalg.inv(data.source.atoms.T))
        back.bias.zero_()
        linear.bias.fill_(-1e-4)
    found = dictionaries_row.scores(model, x, data.source.atoms)
    assert set(found) == set(dictionaries.SCORES)
    assert found["mcc"] == pytest.approx(1, abs=1e-5) and found["uniqueness"] == 1 and found["fvu"] < 1e-4
    assert found["l0"] == pytest.approx(float((f > 0).sum(1).float().mean()), abs=0.01)
    with torch.no_grad():
        back.bias.fill_(5.0)  # does not change the directions
        assert torch.allclose(dictionaries_row.directions(model, f)[2], f[:, 2].max() * data.source.atoms[2], atol=1e-4)
        linear.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        dictionaries_row.scores(model, x, data.source.atoms)


def test_transcoder_is_scored_on_target_streams():
    data = dictionary(dictionary_streams=2, dictionary_atoms=6, dictionary_dim=6)
    model = aezoo.create_model("transcoder", data.input_shape, latent_dim=6, targets=(1,)).eval()
    x, atoms = data.tensors("test")[0], data.source.atoms
    found = dictionaries_row.scores(model, x, atoms)
    other = atoms.clone()
    other[:, 0] = torch.randn(6, 6)
    assert dictionaries_row.scores(model, x, other)["mcc"] == found["mcc"]
    with torch.no_grad():
        error = (model(x) - x)[:, 1].double()
    spread = (x[:, 1] - x[:, 1].mean(0)).double()
    assert found["fvu"] == pytest.approx(float(error.square().sum() / spread.square().sum()), rel=1e-5)


@pytest.mark.slow
def test_fit_command_trains_on_this_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [f"--trainer.limit_{stage}_batches=1" for stage in ("train", "val", "test")]
    few += [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]
    shape = [f"--data.{key}={value}" for key, value in SMALL.items()]
    main(["fit", "--model=topk_sae", "--model.latent_dim=24", "--model.k=3", "--data.name=synthetic_dictionary",
              *shape, *few, "--projector.n=0", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"])  # fmt: skip
    assert list(tmp_path.rglob("*.ckpt"))
