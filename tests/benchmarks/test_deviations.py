"""Training with formulas of the authors' code instead of ours."""

import pytest
import torch

import aezoo
from aezoo.errors import AezooError
from benchmarks import deviations
from benchmarks.common import read_csv


@pytest.mark.slow
def test_variant_writes_rows_and_prints_means(tmp_path, capsys):
    argv = ["memory_ae", "--steps", "2", "--seeds", "1", "--results", str(tmp_path)]
    before = deviations.MemoryAE.address
    deviations.main(argv)
    assert deviations.MemoryAE.address is before
    commands, rows = read_csv(next(tmp_path.glob("deviations-*.csv")))
    assert commands == ["python -m benchmarks.deviations memory_ae --steps 2 --seeds 1"]
    assert [(row["variant"], row["seed"], row["steps"]) for row in rows] == [("aezoo", "0", "2"), ("authors", "0", "2")]
    assert rows[0]["nll"] != rows[1]["nll"]
    assert f"memory_ae, digits, authors, 2 steps: mse {float(rows[1]['mse']):.5g}" in capsys.readouterr().out


@pytest.mark.parametrize("name", deviations.CASES)
def test_formulas_are_patched_and_restored(name):
    for variant in deviations.CASES[name].variants.values():
        before = [getattr(owner, attribute) for owner, attribute, _ in variant.formulas]
        with deviations.replaced(variant):
            assert all(getattr(owner, attribute) is formula for owner, attribute, formula in variant.formulas)
        assert [getattr(owner, attribute) for owner, attribute, _ in variant.formulas] == before
        assert variant.options or before


def test_values_of_auxk_are_equal_if_only_gradients_differ():
    torch.manual_seed(0)
    model = aezoo.create_model("topk_sae", (1, 8, 8), latent_dim=64, k=4, likelihood="gaussian")
    model.dead_N[:40] = True
    x = torch.rand(5, 1, 8, 8)
    pi_BN = model.pre_activations(x)
    x_hat = model.reconstruct(pi_BN, 4)[1]
    ours = model.aux(x, x_hat, pi_BN)
    for formula in (deviations.aux_with_bias, deviations.aux_through_error, deviations.aux_without_share):
        torch.testing.assert_close(formula(model, x, x_hat, pi_BN), ours)


def test_an_unknown_model_is_refused():
    with pytest.raises(AezooError, match="no deviation of vae is measured here: take of memory_ae, "):
        deviations.main(["vae"])
