"""Quality of other libraries: one likelihood estimate for all trained weights, and differences of paired runs."""

import json
import sys

import numpy as np
import pytest
import torch

import aezoo
from aezoo.models.variational.vae import VAE
from benchmarks import peer_runs, peers, peers_quality
from benchmarks.common import read_csv
from benchmarks.peer_scripts import aezoo_quality
from benchmarks.peer_scripts.job import Job


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Fake runs that return the initial weights, for pythae with a worse decoder; records calls."""
    calls = []

    def train(python, job, timeout):
        calls.append(job)
        if len(calls) in failing:
            raise peer_runs.RunFailure("killed by SIGKILL")
        options = dict(option.split("=") for option in job.options)
        with np.load(job.weights) as file:
            weights = {f"w{i}": file[name].copy() for i, name in enumerate(file.files)}
        weights[f"w{len(weights) - 1}"] += 1.0 * (job.party == "pythae_quality")
        if options["model"] == "vamp_vae":
            weights["pseudo_inputs"] = np.full((100, 784), 0.5, np.float32)
        np.savez(options["out"], **weights)
        return {"versions": {"torch": "2.13"}}

    failing: set[int] = set()
    monkeypatch.setattr(peers_quality, "train", train)
    monkeypatch.setattr(peers_quality, "python_for", lambda party, folder: sys.executable)

    def run(*words):
        few = ["--seeds", "2", "--importance-samples", "2", "--elbo-samples", "2", "--results", str(tmp_path)]
        code = peers.main(["quality", *few, *words])
        (path,) = tmp_path.glob("peers-quality-*.csv")
        return code, read_csv(path)[1]

    run.calls, run.failing = calls, failing
    return run


@pytest.mark.slow
def test_both_peers_get_equal_jobs_per_seed(fake, capsys):
    code, rows = fake("--models", "iwae", "vamp_vae")
    assert code == 0 and len(rows) == 8
    for first, second in zip(fake.calls[::2], fake.calls[1::2], strict=True):
        assert (first.party, second.party) == ("aezoo_quality", "pythae_quality")
        assert first.options[:-1] == second.options[:-1]
        assert (first.seed, first.epochs, first.batch, first.lr) == (
            second.seed,
            second.epochs,
            second.batch,
            second.lr,
        )
    for row in rows:
        if row["party"] == "pythae":
            same = [r for r in rows if (r["model"], r["seed"], r["party"]) == (row["model"], row["seed"], "aezoo")]
            gap = float(same[0]["log_likelihood"]) - float(row["log_likelihood"])
            assert float(row["tighter_by"]) == pytest.approx(gap, abs=0.02) and gap > 1
    assert "iwae: aezoo -" in capsys.readouterr().out


@pytest.mark.slow
def test_failed_run_is_reported_and_only_it_is_retried(fake):
    fake.failing.add(2)
    code, rows = fake("--models", "vae", "--seeds", "1")
    assert code == 1 and rows[1]["error"] == "killed by SIGKILL"
    code, rows = fake("--models", "vae", "--seeds", "1", "--again", "failed")
    assert code == 0 and len(fake.calls) == 3 and not rows[1]["error"]


@pytest.mark.slow
def test_failed_row_of_different_run_is_ignored(fake):
    fake.failing.add(1)
    assert fake("--models", "vae", "--seeds", "1")[0] == 1
    assert fake("--models", "iwae", "--seeds", "1")[0] == 0


@pytest.mark.slow
def test_difference_is_written_after_either_peer_finishes(fake):
    fake.failing.add(1)
    rows = fake("--models", "vae", "--seeds", "1")[1]
    assert rows[0]["error"] and not rows[1]["tighter_by"]
    ours, theirs = fake("--models", "vae", "--seeds", "1", "--again", "failed")[1]
    gap = float(ours["log_likelihood"]) - float(theirs["log_likelihood"])
    assert float(theirs["tighter_by"]) == pytest.approx(gap, abs=0.02)


@pytest.mark.slow
def test_rows_of_other_settings_are_ignored(fake, capsys):
    fake("--models", "vae", "iwae", "--seeds", "1")
    for flag, value in (("--epochs", "7"), ("--latent-dim", "7"), ("--batch", "50"), ("--elbo-samples", "3")):
        before, _ = len(fake.calls), capsys.readouterr()
        _, rows = fake("--models", "vae", "--seeds", "1", flag, value)
        assert len(fake.calls) == before + 2
        mean = float(rows[-2]["log_likelihood"])
        assert capsys.readouterr().out.splitlines()[-2].startswith(f"vae: aezoo {mean:.2f}, pythae ")


def test_likelihood_estimate_uses_importance_weights(tmp_path):
    asked = peers_quality.parse_arguments(["--importance-samples", "5", "--elbo-samples", "3"])
    torch.manual_seed(5)
    model = aezoo.create_model("vae", (784,), hidden_dims=(200, 200), latent_dim=20).eval()
    np.savez(tmp_path / "t.npz", **{f"w{i}": p.detach().numpy() for i, p in enumerate(model.parameters())})
    x = (torch.rand(50, 784) < 0.2).float()
    found = peers_quality.evaluate("iwae", 20, tmp_path / "t.npz", x, asked)
    torch.manual_seed(0)
    elbo = torch.stack([model.log_likelihood(x, 1) for _ in range(3)]).mean()
    bound = model.log_likelihood(x, 5).mean()
    assert found == {
        "elbo": pytest.approx(float(elbo), rel=1e-6),
        "log_likelihood": pytest.approx(float(bound), rel=1e-6),
    }
    assert found["elbo"] < found["log_likelihood"]


@pytest.mark.slow
def test_noise_seeds_match_zoo_training_steps(tmp_path, monkeypatch):
    asked = peers_quality.parse_arguments(["--latent-dim", "3", "--batch", "2000", "--epochs", "2"])
    _, data, weights = peers_quality.prepare(tmp_path, asked, 3)
    seen, loss = [], VAE.loss

    def watched(self, x, y=None):
        seen.append(torch.initial_seed())
        return loss(self, x, y)

    monkeypatch.setattr(VAE, "loss", watched)
    options = ("model=vae", f"out={tmp_path / 'trained.npz'}")
    aezoo_quality.fit(
        Job("", str(data), str(weights), (784,), (200, 200), 3, True, 4000, 2000, 2, seed=3, options=options)
    )
    with np.load(data) as file:
        assert seen == file["noise_seeds"].flatten().tolist() and len(set(seen)) == 4


@pytest.mark.slow
def test_zoo_peer_starts_from_given_weights(tmp_path):
    asked = peers_quality.parse_arguments(["--latent-dim", "5"])
    _, data, weights = peers_quality.prepare(tmp_path, asked, 3)
    out = tmp_path / "trained.npz"
    options = ("model=ciwae", "n_samples=2", "beta=0.5", f"out={out}")
    job = Job("aezoo_quality", str(data), str(weights), (784,), (200, 200), 5, True, 4000, 1000, 1, options=options)
    found = peer_runs.train(sys.executable, job, 300)
    assert json.dumps(found) and found["versions"]["aezoo"] == aezoo.__version__
    with np.load(weights) as before, np.load(out) as after:
        moved = [np.abs(after[f"w{i}"] - before[name]).max() for i, name in enumerate(before.files)]
    # four steps of Adam move each weight by at most four times the learning rate
    assert min(moved) > 0 and max(moved) < 4.1e-3
