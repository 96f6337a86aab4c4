"""generate with a prior over indices: options, refused combinations, and the steps from two fits to samples."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import aezoo
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.tasks.generate import generate

TOKENIZER = {"net": "mlp", "hidden_dims": [16], "places": 4, "latent_dim": 3, "codebook_size": 8}
SMALL = {"pixelcnn": {"width": 16, "depth": 2}, "index_transformer": {"width": 16, "depth": 1}}


def small(name):
    torch.manual_seed(0)
    model = aezoo.create_model(name, (1, 8, 8), tokenizer={"model": "vq_vae", **TOKENIZER}, **SMALL[name])
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize("name", SMALL)
def test_temperature_and_top_k_match_model_draws(name, tmp_path):
    model = small(name)
    for asked, said in (
        ({}, "the model's own prior"),
        ({"temperature": 0.5}, "the model's own prior, at temperature 0.5"),
        ({"top_k": 3}, "the model's own prior, from the 3 likeliest of each index"),
        (
            {"temperature": 2.0, "top_k": 2},
            "the model's own prior, at temperature 2, from the 2 likeliest of each index",
        ),
    ):
        found = generate(model, n=6, seed=5, out=str(tmp_path), **asked)
        torch.manual_seed(5)
        assert np.allclose(found.samples, model.sample(6, **asked), atol=1e-6)
        assert found.source == f"samples from {said}"
        assert np.array_equal(np.load(tmp_path / "samples.npy"), found.samples)
    greedy = generate(model, n=5, top_k=1, batch_size=2).samples
    assert np.allclose(greedy, greedy[:1], atol=1e-6)
    assert np.allclose(greedy, generate(model, n=5, temperature=0.0).samples, atol=1e-6)
    assert not np.allclose(greedy, generate(model, n=5).samples, atol=1e-3)


@pytest.mark.parametrize("asked", [{"temperature": 0.5}, {"top_k": 3}])
def test_temperature_without_index_prior_is_refused(asked):
    for name in ("vae", "vq_vae"):
        model = aezoo.create_model(name, (1, 8, 8), net="mlp", hidden_dims=(8,))
        with pytest.raises(AezooError, match="leave them out, or use pixelcnn or index_transformer"):
            generate(model, **asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prior": "gmm", "top_k": 3}, "leave out prior"),
        ({"interpolate": True, "temperature": 0.5}, "leave out prior, interpolate"),
        ({"temperature": -0.5}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_k": -3}, "top_k must be at least 0"),
    ],
)
def test_unsupported_sampling_options_are_refused(asked, message):
    with pytest.raises(AezooError, match=message):
        generate(small("index_transformer"), **asked)


def test_other_prior_works_and_interpolates_its_draws():
    model, x = small("pixelcnn"), torch.rand(40, 1, 8, 8)
    for prior in ("gmm", "knn"):
        found = generate(model, fit_on=x, prior=prior, n=3, n_components=2)
        assert found.samples.shape == (3, 1, 8, 8) and "pixelcnn" not in found.source
    assert generate(model, interpolate=True, walks=2, steps=3).samples.shape == (2, 3, 1, 8, 8)


def test_quantised_model_without_prior_suggests_index_prior():
    x = torch.rand(40, 1, 8, 8)
    model = aezoo.create_model("vq_vae", (1, 8, 8), **TOKENIZER)
    found = generate(model, fit_on=x, n=3, n_components=2)
    assert found.source.startswith("samples from gmm, fitted to 40 codes")
    assert "aezoo fit --model pixelcnn --model.tokenizer RUN" in found.source
    assert "pixelcnn" not in generate(model, fit_on=x, n=3, n_components=2, prior="gmm").source
    dense = aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=4)
    assert "pixelcnn" not in generate(dense, fit_on=x, n=3, n_components=2).source


# ---- the command line ------------------------------------------------------------------------------------------------


def fit(home, *flags):
    common = ["--data.name", "digits", "--trainer.default_root_dir", str(home / "runs"), "--seed_everything", "1"]
    silent = ["--samples.every_n_epochs", "0", "--reconstructions.every_n_epochs", "0"]
    main(["fit", *flags, *common, *silent])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a vq_vae's run and of a run of a prior on it."""
    home = tmp_path_factory.mktemp("home")
    given = [f"--model.{key}={value}" for key, value in TOKENIZER.items()]
    fit(home, "--model", "vq_vae", *given, "--trainer.max_epochs", "1")
    tokenizer = home / "runs" / "vq_vae-digits" / "0"
    fit(
        home, "--model", "index_transformer", "--model.tokenizer", str(tokenizer), "--model.width=16",
        "--model.depth=1", "--trainer.max_epochs", "2",
    )  # fmt: skip
    return tokenizer, home / "runs" / "index_transformer-digits" / "0"


@pytest.mark.slow
def test_prior_run_generates_without_tokenizer_run(runs, tmp_path, capsys):
    tokenizer, own = runs
    alone = tmp_path / "alone"
    shutil.copytree(own, alone)
    trained = aezoo.load_model(tokenizer).state_dict()
    hidden = tokenizer.rename(tokenizer.parent / "hidden")
    try:
        main([
            "generate", "--ckpt_path", str(alone), "--temperature", "0.9", "--top_k", "5", "--n", "4",
            "--out", str(tmp_path),
        ])  # fmt: skip
        model = aezoo.load_model(alone)
    finally:
        hidden.rename(tokenizer)
    assert "at temperature 0.9, from the 5 likeliest of each index" in capsys.readouterr().out
    assert np.load(tmp_path / "samples.npy").shape == (4, 1, 8, 8)
    for key, value in trained.items():
        assert torch.equal(model.tokenizer.state_dict()[key], value), key


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--ckpt_path", "--resume", "auto"])
def test_resumed_prior_fit_matches_uninterrupted_fit(runs, tmp_path, how, capsys):
    tokenizer, whole = runs
    home = tmp_path
    flags = ["--model", "index_transformer", "--model.tokenizer", str(tokenizer), "--model.width=16", "--model.depth=1"]
    fit(home, *flags, "--trainer.max_epochs", "1")
    run = home / "runs" / "index_transformer-digits" / "0"
    more = ["--trainer.max_epochs", "2"]
    if how == "auto":
        fit(home, *flags, "--resume", "auto", *more)
    else:  # the run has a copy of its tokenizer
        hidden = tokenizer.rename(tokenizer.parent / "hidden")
        try:
            fit(home, how, str(run), *more)
        finally:
            hidden.rename(tokenizer)
    assert "model.tokenizer is" not in capsys.readouterr().err
    one, other = (
        torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (whole, run)
    )
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(other[key], value), key
