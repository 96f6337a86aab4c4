"""A canary that only hostile code creates, one-line refusals, and a regular run."""

import os
import sys
from pathlib import Path

import pytest
import torch

from aezoo.cli.main import main

EVIL = """\
import os
os.mkdir({canary!r})
from aezoo.models.variational.vae import VAE
class Evil(VAE):
    pass
"""


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """A folder that only code from a hostile file creates; `evil` and `lightning_evil` create it when imported."""
    home, packages = tmp_path / "home", tmp_path / "packages"
    home.mkdir()
    packages.mkdir()
    for name in ("evil", "lightning_evil"):
        (packages / f"{name}.py").write_text(EVIL.format(canary=str(home / "canary")))
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.chdir(home)
    yield home / "canary"
    for name in ("evil", "lightning_evil"):
        sys.modules.pop(name, None)


@pytest.fixture
def refused(capsys, canary):
    """Run a command that must end with exit code 2, one line and no canary; returns the line."""

    def call(*argv):
        with pytest.raises(SystemExit) as end:
            main(list(argv))
        assert end.value.code == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("aezoo: ")
        assert len(line) < 700
        assert not canary.exists()
        return line

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run, which tests do not change."""
    root = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(root)
    try:
        off = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents")]
        flags = ["--model=vae", "--model.latent_dim=3", "--data.name=digits", "--trainer.limit_train_batches=2"]
        flags += ["--model.lr_schedule=cosine"]
        main(["fit", *flags, "--trainer.max_epochs=1", "--projector.n=0", *off])
    finally:
        os.chdir(before)
    return root / "runs" / "vae-digits" / "0"


@pytest.fixture
def honest(run):
    """The content of a checkpoint that loads."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
