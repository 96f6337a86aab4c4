"""The quality benchmark: its rows, which are measured once, and its figures compared with references."""

import csv
import math
import shutil
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from aezoo import DataModule, create_model, registry
from aezoo.errors import AezooError
from aezoo.tasks.embed_codes import probe_accuracies
from benchmarks import codes, convergence, quality, quality_row
from benchmarks.common import read_csv
from benchmarks.convergence import Budget, Convergence
from benchmarks.quality_table import dataset_name

SHORT = ["--interval", "12", "--patience", "2", "--least", "0.5"]
DIGITS = ["--data", "digits", "--models", "dense_ae", "vae", *SHORT, "--accelerator", "cpu"]

OFF = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}


def rows_of(folder):
    (path,) = folder.glob("quality-digits-fp32-pt*-cpu*.csv")
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# command: python -m benchmarks.quality --data digits --models dense_ae vae --interval")
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    quality.main([*DIGITS, "--seeds", "1", "--jobs", "2", "--results", str(folder)])
    return folder


@pytest.mark.slow
def test_every_run_is_a_row_with_filled_columns(results):
    rows = {row["model"]: row for row in rows_of(results)}
    assert rows.keys() == {"dense_ae", "vae"} and tuple(rows["vae"]) == (*quality.COLUMNS[:-1], "processor", "error")
    never = {"l0", "bits", "error", "note", "pca_mse_at_l0"}
    bound = {"bits_per_dim", "log_likelihood", "fid"}
    for name, empty in (("dense_ae", never | bound), ("vae", never)):
        assert {column for column, cell in rows[name].items() if not cell} == empty, name
    vae = {name: float(cell) for name, cell in rows["vae"].items() if name in ("loss", "bits_per_dim", "mse", "psnr")}
    assert vae["bits_per_dim"] == pytest.approx(vae["loss"] / 64 / math.log(2), rel=1e-4)
    assert vae["psnr"] == pytest.approx(-10 * math.log10(vae["mse"]), rel=1e-4)
    assert {row["stopped"] for row in rows.values()} == {"converged"} and "digits" in rows["vae"]["features"]
    # ended by two evaluations without an improvement of half the total one
    assert int(rows["vae"]["steps"]) % 12 == 0 and rows["vae"]["patience"] == "24"
    assert float(rows["vae"]["epochs"]) == int(rows["vae"]["steps"]) / math.ceil(1437 / 128)


@pytest.mark.slow
def test_pca_baseline_matches_svd_of_training_split(results):
    data = DataModule("digits")
    (train, _), (test, _) = ((x.flatten(1).double().numpy(), y) for x, y in map(data.tensors, ("train", "test")))
    directions = np.linalg.svd(train - train.mean(0), full_matrices=False)[2]
    for row in rows_of(results):
        kept = directions[: int(row["size"])]
        rest = test - train.mean(0) - (test - train.mean(0)) @ kept.T @ kept
        assert float(row["pca_mse"]) == pytest.approx(np.square(rest).mean(), rel=1e-4)
        assert float(row["pca_psnr"]) == pytest.approx(10 * math.log10(1 / np.square(rest).mean()), rel=1e-4)


@pytest.mark.slow
def test_best_weights_are_restored_and_capped_run_says_so():
    torch.manual_seed(0)
    data, model = DataModule("digits", batch_size=64), create_model("vae", (1, 8, 8), latent_dim=4)
    rule = Convergence(*data.tensors("val"), 64, Budget(interval=20, patience=100, seconds=1.0))
    pl.Trainer(max_epochs=-1, callbacks=[rule], **OFF).fit(model, data)
    found = rule.columns
    assert found["stopped"] == "capped" and found["monitor"] == "loss" and 1 <= found["seconds"] < 60
    assert found["best_step"] <= found["steps"] and found["seconds_to_best"] <= found["seconds"]
    assert rule.evaluate(model) == found["val"]


@pytest.mark.parametrize(
    ("values", "steps", "best"),
    [
        ([9, 5, 4, 4.5, 3.9], 400, 400),  # improvements below 0.1 of the total do not count, but their weights are kept
        ([9, 8, 7, 6, 5, 4, 3, 2, 2, 2], 900, 700),
        ([9, 10, 11], 200, 1),
        ([9, 5, math.nan], 200, 100),
    ],
)
def test_run_ends_without_significant_improvement(values, steps, best):
    model = create_model("linear_ae", (4,), latent_dim=1)
    rule = Convergence(torch.zeros(4, 4), None, 2, Budget(interval=100, patience=2, least=0.1))
    left = iter(values)
    rule.evaluate = lambda model: next(left)
    trainer = SimpleNamespace(global_step=0, num_training_batches=100, should_stop=False)
    rule.on_train_start(trainer, model)
    while not trainer.should_stop:
        trainer.global_step += 1
        rule.on_train_batch_end(trainer, model)
    assert (trainer.global_step, rule.columns["best_step"]) == (steps, best)
    assert rule.columns["stopped"] == ("diverged" if math.isnan(values[-1]) else "converged")


def test_evaluations_start_after_schedule_has_ended():
    vae = create_model("annealed_vae", (4,), latent_dim=1, capacity_steps=70)
    stacked = create_model("stacked_dae", (4,), latent_dim=1, hidden_dims=(3,), phase_epochs=5)
    assert [convergence.schedule_end(model, 10) for model in (vae, stacked)] == [70, 2 * 5 * 10]
    assert convergence.schedule_end(create_model("vae", (4,), latent_dim=1), 10) == 0


def test_opponent_is_not_part_of_what_is_monitored():
    one = dict.fromkeys(("loss", "nll", "elbo", "discriminator", "perceptual"), torch.tensor(2.0))
    for names, monitor in (
        (("loss", "nll", "elbo"), "loss"),
        (("loss", "nll", "elbo", "discriminator"), "-elbo"),
        (("loss", "nll", "discriminator"), "nll"),
        (("loss", "nll", "discriminator", "perceptual"), "loss"),
    ):
        name, value = convergence.monitored({name: one[name] for name in names})
        assert (name, float(value)) == (monitor, -2.0 if monitor == "-elbo" else 2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "numbers", "bits"),
    [
        *((name, "numbers", 16, None) for name in ("vae", "conv_ae", "autoencoder_kl", "nexus", "conditional_vae")),
        *((name, "bits", None, 128) for name in ("vq_vae", "rq_vae", "qlae", "vq_vae_2", "categorical_vae", "titok")),
        ("fsq_vae", "bits", None, 126.5),
        ("topk_sae", "active", 512, None),
    ],
)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (1, 32, 32)])
def test_codes_of_a_kind_have_one_size(name, kind, numbers, bits, shape):
    row, _ = quality.code_columns(name, 16, shape, {})
    assert row["kind"] == kind and numbers in (None, row["code_size"])
    assert row.get("bits") == (bits if bits is None else pytest.approx(bits, abs=0.2))


def test_models_that_are_left_out_exist_and_have_reason(capsys):
    assert {*quality.LEFT_OUT} <= {*registry.list_models()}
    with pytest.raises(AezooError, match="no model is left"):
        quality.main(["--data", "digits", "--models", "ijepa"])
    assert "ijepa is left out at code size 16: it has no decoder" in capsys.readouterr().err


def test_limited_rows_are_same_for_every_seed():
    options = {"name": "digits", "root": "data", "batch_size": 32}
    whole, first, second = (
        quality_row.open_data(options | extra, seed) for extra, seed in (({}, 0), ({"rows": 99}, 0), ({"rows": 99}, 1))
    )
    for stage in ("train", "test"):
        (x, y), (all_x, all_y) = first.tensors(stage), whole.tensors(stage)
        assert len(x) == len(x.unique(dim=0)) == 99
        places = (x[:, None] == all_x).flatten(2).all(2).float().argmax(1)
        assert torch.equal(all_x[places], x) and torch.equal(all_y[places], y)
        assert torch.equal(second.tensors(stage)[0], x)
    assert dataset_name({"name": "shapes", "root": "data", "size": 32, "rows": 99}) == "shapes-32-99rows"


def test_sparse_code_is_compared_with_pca_of_equal_l0():
    model, data = create_model("topk_sae", (1, 8, 8), latent_dim=40, k=5, likelihood="gaussian"), DataModule("digits")
    row = quality_row._code_figures(model, data, 100)
    assert row["l0"] == 5 and row["code_size"] == 40
    train, test = (data.tensors(stage)[0].flatten(1).numpy() for stage in ("train", "test"))
    assert row["pca_mse_at_l0"] == codes.pca(train, test, 5)[0] > codes.pca(train, test, 6)[0]


def test_code_too_large_for_logistic_regression_is_not_probed(monkeypatch):
    model, data = create_model("linear_ae", (1, 8, 8), latent_dim=4), DataModule("digits")
    assert "probe" in quality_row._code_figures(model, data, 100)
    monkeypatch.setattr(quality_row, "_MAX_PROBE_DIM", 3)
    assert "probe" not in quality_row._code_figures(model, data, 100)


@pytest.mark.slow
def test_existing_rows_are_kept_and_new_seed_is_added(results, capsys):
    before = rows_of(results)
    quality.main([*DIGITS, "--seeds", "1", "--results", str(results)])
    assert rows_of(results) == before and "seed" not in capsys.readouterr().out
    quality.main([*DIGITS[:3], "dense_ae", *DIGITS[5:], "--seeds", "2", "--results", str(results)])
    rows = rows_of(results)
    assert rows[:2] == before and [(row["model"], row["seed"]) for row in rows[2:]] == [("dense_ae", "1")]
    assert "[1/1] dense_ae" in capsys.readouterr().out
    same = next(row for row in before if row["model"] == "dense_ae")
    assert {rows[2][name] for name in quality.BASELINE} == {same[name] for name in quality.BASELINE}
    assert rows[2]["mse"] != same["mse"]


@pytest.mark.slow
def test_failed_run_is_a_row_with_error(results, tmp_path, monkeypatch):
    plan = quality.plan
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    before = rows_of(tmp_path)

    def with_a_fault(*arguments):
        (spec,) = (spec for spec in plan(*arguments) if spec["model"] == "dense_ae" and spec["seed"] == 2)
        return [spec | {"hyperparameters": {"hidden_dims": [0]}}]

    monkeypatch.setattr(quality, "plan", with_a_fault)
    quality.main([*DIGITS, "--seeds", "3", "--results", str(tmp_path)])
    *others, failed = rows_of(tmp_path)
    assert others == before and (failed["model"], failed["seed"]) == ("dense_ae", "2")
    assert failed["error"].startswith("AezooError: ") and not failed["mse"] and failed["pca_mse"]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Fake runs of 10 s per epoch; records what was run, with the code sizes of baselines as a list."""
    asked, failing = [], set()

    def run_rows(module, specs, *_):
        for spec in specs:
            name = spec.get("model") or [*spec["sizes"]]
            asked.append(name)
            if ("baselines" if isinstance(name, list) else name) in failing:
                yield spec, {"error": "killed by SIGKILL", "out_of_memory": True}
            elif isinstance(name, list):
                figures = {"0": {"pixels_probe": 0.25, "pixels_knn": 0.5}}
                yield spec, {"baselines": {str(n): figures.get(str(n), {"pca_mse": n / 100}) for n in spec["sizes"]}}
            else:
                mse = {"dense_ae": 0.5, "vae": 0.3, "linear_ae": 0.4}[name]
                stopped = "capped" if spec["row"]["most_seconds"] < 10 else "converged"
                yield spec, {"mse": mse, "stopped": stopped, "seconds": 10.0}

    monkeypatch.setattr(quality, "run_rows", run_rows)

    def run(*words):
        asked.clear()
        base = ["--data", "digits", "--seeds", "1", "--models", "dense_ae", "vae", "--code-sizes", "8"]
        quality.main([*base, "--results", str(tmp_path), *words])
        (path,) = tmp_path.glob("*.csv")
        return [*asked], read_csv(path)[1]

    run.failing, run.path = failing, lambda: next(tmp_path.glob("*.csv"))
    return run


def test_rows_are_keyed_by_what_changes_their_figures(fake):
    # the first run of a command measures the baselines and the feature space of FID
    assert fake()[0] == [[0, 8], "dense_ae", "vae"]
    assert fake()[0] == []
    for words in (("--importance-samples", "10"), ("--patience", "3"), ("--least", "0.1")):
        asked, rows = fake(*words)
        assert asked == [[], "dense_ae", "vae"] and not fake(*words)[0] and not fake()[0]
    assert len(rows) == 8 and len({(row["model"], row["budget"], row["importance_samples"]) for row in rows}) == 8


def test_run_that_was_cut_is_measured_again_with_more_time(fake):
    assert [row["stopped"] for row in fake("--most-seconds", "7")[1]] == ["capped"] * 2
    assert fake("--most-seconds", "7")[0] == fake("--most-seconds", "5")[0] == []
    asked, rows = fake("--most-seconds", "20")
    assert asked == [[], "dense_ae", "vae"]
    assert [(row["stopped"], row["most_seconds"]) for row in rows] == [("converged", "20")] * 2
    assert fake("--most-seconds", "90")[0] == []


def test_further_seeds_are_only_those_of_the_best(fake):
    three = ("--models", "dense_ae", "vae", "linear_ae")
    fake.failing.add("linear_ae")
    fake(*three)
    assert fake(*three, "--seeds", "3", "--top", "1")[0] == [[], "vae", "vae"]
    assert fake(*three, "--seeds", "3", "--top", "5")[0] == [[], "dense_ae", "dense_ae"]
    assert fake(*three, "--seeds", "3", "--top", "5")[0] == []


def test_remeasured_row_replaces_failed_row(fake):
    fake.failing.update({"vae", "dense_ae"})
    assert [row["error"] for row in fake()[1]] == ["killed by SIGKILL"] * 2
    fake.failing.clear()
    asked, rows = fake("--again", "failed")
    assert asked == [[], "dense_ae", "vae"] and [row["error"] for row in rows] == ["", ""]


def test_failed_baselines_are_remeasured_by_next_run(fake):
    fake.failing.add("baselines")
    _, rows = fake()
    assert not any(row["pca_mse"] or row["pixels_knn"] for row in rows)
    fake.failing.clear()
    asked, rows = fake()
    assert asked == [[0, 8]]
    assert [(row["pca_mse"], row["pixels_knn"]) for row in rows] == [("0.08", "0.5")] * 2
    assert fake()[0] == []


def test_inapplicable_baselines_are_not_requested(fake):
    # as many numbers as a digit has pixels
    fake("--code-sizes", "64", "8")
    assert fake("--code-sizes", "64", "8")[0] == []


def test_same_named_data_files_have_separate_tables(tmp_path):
    paths = [tmp_path / folder / "x.npy" for folder in ("a", "b", "c")]
    for path, value in zip(paths, (0, 1, 1), strict=True):
        path.parent.mkdir()
        np.save(path, np.full((4, 3), value, np.float32))
    asked = [{"name": name, "root": root, "size": None} for path in paths for name, root in ((str(path), "data"),)]
    first, second, moved = map(dataset_name, asked)
    assert first != second == moved and first.startswith("x-")
    assert dataset_name({"name": "array", "root": str(paths[0]), "size": None}) == first
    folders = [dataset_name({"name": "folder", "root": str(path.parent), "size": None}) for path in paths]
    assert len({*folders}) == 3
    (tmp_path / "a" / "y.npy").touch()
    assert dataset_name({"name": str(tmp_path / "a"), "root": "data", "size": None}) != folders[0]


def test_unsuitable_models_are_skipped_with_reason(capsys):
    arguments = quality.parse_arguments(["--models", "conv_ae", "vae", "topk_sae", "--code-sizes", "8", "20"])
    data = {"name": "array", "root": "tables/some table.npy", "batch_size": 4, "size": None}
    specs = quality.plan(arguments, data, (30,))
    found = [(spec["seed"], spec["model"], spec["row"]["size"]) for spec in specs]
    runs = (("vae", 8), ("vae", 20), ("topk_sae", 8), ("topk_sae", 20))
    assert found == [(seed, *run) for seed in range(3) for run in runs]
    assert specs[0]["row"]["dataset"].startswith("some-table-")
    said = capsys.readouterr().err
    assert "conv_ae is left out at code size 8: convolutions take" in said and "vae is left out" not in said
    with pytest.raises(AezooError, match="no model is left"):
        quality.plan(quality.parse_arguments(["--models", "conv_ae"]), data, (30,))
    with pytest.raises(AezooError, match="did you mean 'dense_ae'"):
        quality.plan(quality.parse_arguments(["--models", "dens_ae"]), data, (30,))


def test_code_size_replaces_latent_map_by_vector():
    assert quality.code_size_arguments("conv_ae", 12) == {"latent_dim": 12, "latent_map": False}
    assert (
        quality.code_size_arguments("vae", 12) == {"latent_dim": 12} and quality.code_size_arguments("vae", None) == {}
    )


def test_seed_changes_order_but_not_splits():
    first, second = (quality_row.open_data({"name": "digits"}, seed) for seed in (0, 1))
    assert first.tensors("test")[0].equal(second.tensors("test")[0])
    x, y = (next(iter(data.train_dataloader()))[0] for data in (first, second))
    assert x.shape == y.shape and not x.equal(y)


def test_active_units_of_known_code_are_counted():
    # variances 0.0361, 0.009, 0 and 4: as posterior means, two exceed 0.01; as other codes, one exceeds 0.04
    sign = np.tile([1.0, -1.0], 10)
    code = np.stack([0.19 * sign + 5, math.sqrt(0.009) * sign, 0 * sign + 3, 2 * sign], axis=1)
    assert codes.active_units(code, posterior=True) == 2
    assert codes.active_units(code, posterior=False) == 1
    assert codes.active_units(100 * code, posterior=False) == 1
    code[:, 0] *= 1.1
    assert codes.active_units(code, posterior=False) == 2
    assert codes.active_units(np.ones((5, 3)), posterior=False) == 0


def test_l0_counts_entries_in_use():
    assert codes.l0(np.array([[0.0, 2.0, -1.0], [0.0, 0.0005, 0.5]])) == 1.5


def test_probe_reads_separable_classes_not_random_labels():
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    code = np.eye(3)[y] * 10 + rng.normal(size=(300, 3))
    apart = probe_accuracies(code[:200], y[:200], code[200:], y[200:])
    assert apart["probe"] > 0.99 and apart["knn"] > 0.99
    noise = rng.normal(size=(300, 3))
    chance = probe_accuracies(noise[:200], y[:200], noise[200:], y[200:])
    assert chance["probe"] < 0.55 and chance["knn"] < 0.55


@pytest.mark.parametrize("wrong", [["--patience", "0"], ["--most-seconds", "-1"], ["--code-sizes", "x"]])
def test_invalid_numeric_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        quality.parse_arguments(wrong)
    assert wrong[1] in capsys.readouterr().err
