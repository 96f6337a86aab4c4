"""A third-party package, installed with pip into a separate environment that uses the packages of this one."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", folder, HERE / "plugin"], check=True)
    return folder


@pytest.fixture
def run(site, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*arguments, code=0):
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


@pytest.mark.slow
def test_plugin_is_listed_without_import(run):
    listing = " ".join(run("aezoo", "list", "--family", "plugin").split())
    assert "mirror_ae plugin representation Mirror autoencoder: tied weights" in listing
    assert "broken_ae plugin - " in listing
    assert "size of the code" in run("aezoo", "info", "mirror_ae")


@pytest.mark.slow
def test_plugin_brings_pretrained_weights(run):
    assert "mirror_ae.tiny  digits  mse 0.0445" in run("aezoo", "list", "mirror", "--pretrained")
    assert "mirror_ae.tiny" in run("aezoo", "info", "mirror_ae")
    output = run("aezoo", "reconstruct", "--ckpt_path", "mirror_ae.tiny", "--data", "digits", "--n_shown", "0")
    assert "runs/mirror_ae.tiny/reconstruct" in output


USE = """
import sys
import aezoo
from aezoo.cli.main import main

sys.stderr = sys.stdout

def command(words, code=0):
    try:
        main(words.split())
    except SystemExit as end:
        assert (end.code or 0) == code, end.code
    else:
        assert not code
    print("----")

command("fit --model.help mirror_ae")
command("fit --model mirror_ae --model.latent_dim 8 --trainer.max_epochs 1 --data digits")
model = aezoo.load_model("runs/mirror_ae-digits/0")
print(type(model).__name__, model.code_shape)
aezoo.save_model(model, "saved")
print(type(aezoo.load_model("saved")).__name__)
print("----")
command("test --ckpt_path runs/mirror_ae-digits/0")
command("fit --model broken_ae", code=2)
"""


@pytest.mark.slow
def test_plugin_trains_saves_loads_and_broken_one_is_named(run, tmp_path):
    (tmp_path / "use.py").write_text(USE)
    help_text, output, loaded, tested, refused, _ = run("use").split("----\n")
    assert "--model.latent_dim" in help_text and "size of the code" in help_text
    assert "the plug-in 'broken_ae' of package aezoo-mirror is broken" in output
    assert "a_package_that_nobody_has" in output
    assert loaded.split() == ["MirrorAE", "(8,)", "MirrorAE"]
    assert "test/loss" in tested and "is broken" in refused


@pytest.mark.slow
def test_the_plugins_own_test_passes(run):
    assert "1 passed" in run("pytest", "-q", "-p", "no:cacheprovider", str(HERE / "plugin" / "test_mirror_ae.py"))
