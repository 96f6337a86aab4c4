"""Untrusted configurations: they cannot name other code, block or download; regular ones run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hostile import configs, files
from hostile.memory import memory

from aezoo.cli.main import main
from aezoo.security import policy, yaml_text

QUICK = ["--data.name=digits", "--trainer.fast_dev_run=true"]


def with_honest_parts(text):
    """A hostile text in a configuration that is otherwise valid."""
    head = "" if "model" in text.partition(":")[0] or "\nmodel" in text or text.startswith("\x00") else "model: vae\n"
    return head + text + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", configs.CLASSES)
def test_a_configuration_cannot_name_foreign_code(refused, canary, name):
    Path("hostile.yaml").write_text(with_honest_parts(configs.CLASSES[name]))
    assert "--allow " in refused("fit", "-c", "hostile.yaml", *QUICK)
    assert "evil" not in sys.modules and "lightning_evil" not in sys.modules


@pytest.mark.parametrize("name", configs.OTHERS)
def test_a_configuration_cannot_run_code_or_hang(refused, canary, name, honest):
    files.pickled(Path("bomb.ckpt"), files.with_bomb(honest, canary, "top"), "zip")
    Path("hostile.yaml").write_text(with_honest_parts(configs.OTHERS[name]))
    before = memory()
    refused("fit", "-c", "hostile.yaml", *QUICK)
    assert memory() - before < 2**27


@pytest.mark.slow
def test_regular_configuration_runs(canary, capsys):
    Path("honest.yaml").write_text(
        "common: &steps 1\n".replace("common", "seed_everything")
        + "model: {class_path: vae, init_args: {latent_dim: 2}}\n"
        "data: {name: digits}\n"
        "trainer:\n"
        "  fast_dev_run: true\n"
        "  max_epochs: *steps\n"
        "  strategy: {class_path: lightning.pytorch.strategies.SingleDeviceStrategy, init_args: {device: cpu}}\n"
        "  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: elsewhere}}\n"
        "  profiler: {class_path: lightning.pytorch.profilers.SimpleProfiler}\n"
        "  plugins: [{class_path: lightning.pytorch.plugins.TorchCheckpointIO}]\n"
        "  callbacks:\n"
        "  - class_path: lightning.pytorch.callbacks.Timer\n"
        "  - class_path: aezoo.callbacks.EMA\n"
    )
    main(["fit", "-c", "honest.yaml"])
    assert not canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["flag", "flag with =", "environment"])
def test_the_user_can_allow_a_package(refused, canary, monkeypatch, capsys, way):
    Path("mine.yaml").write_text("model: {class_path: evil.Evil, init_args: {latent_dim: 2}}")
    argv = ["fit", "-c", "mine.yaml", *QUICK]
    if way == "environment":
        monkeypatch.setenv("AEZOO_ALLOW", "another, evil")
        main(argv)
        monkeypatch.delenv("AEZOO_ALLOW")
    else:
        main([*argv, *(["--allow", "evil"] if way == "flag" else ["--allow=evil"])])
    assert canary.exists()
    canary.rmdir()
    # the permission ends with the command, even if the process continues
    del sys.modules["evil"]
    assert "--allow evil" in refused(*argv)
    assert "--allow evil" in refused(*argv, "--allow", "evi")


@pytest.mark.slow
def test_class_path_after_model_needs_no_other_flag(refused, canary, capsys):
    main(["fit", "--model", "evil.Evil", "--model.latent_dim", "2", *QUICK])
    canary.rmdir()
    # only that class is allowed
    Path("hostile.yaml").write_text(configs.CLASSES["look-alike"])
    assert "--allow lightning_evil" in refused("fit", "--model", "evil.Evil", "-c", "hostile.yaml", *QUICK)
    Path("hostile.yaml").write_text(configs.CLASSES["hook"].replace("evil.Evil", "evil.os.mkdir"))
    refused("fit", "--model", "evil.Evil", "-c", "hostile.yaml", *QUICK)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "os.system"], "not a subclass of aezoo.Autoencoder"),
        (["--model", "no_such_package.Model"], "cannot be imported"),
        (["--model", "evil.Missing"], "cannot be imported"),
        (["--model", "{class_path: lightning_evil.Evil}"], "--allow lightning_evil"),
        (["--model", "vae", "--trainer.callbacks", "lightning_evil.Evil"], "--allow lightning_evil"),
        (["--model", "vae", "--allow"], "--allow takes"),
        (["--model", "vae", "--allow", "../x"], "--allow takes"),
        (["--model", "vae", "--allow", "jsonargparse"], "--allow takes"),
    ],
)
def test_command_line_class_paths_are_checked(refused, canary, capsys, argv, words):
    if "evil.Missing" in argv:
        with pytest.raises(SystemExit):
            main(["fit", *argv])
        assert words in capsys.readouterr().err
    else:
        assert words in refused("fit", *argv)


@pytest.mark.slow
def test_installed_plugin_is_trusted(monkeypatch, canary, capsys):
    point = type("Point", (), {"module": "evil.sub", "group": "aezoo.models"})
    monkeypatch.setattr(policy, "entry_points", lambda group: [point] if group == "aezoo.models" else [])
    Path("mine.yaml").write_text("model: {class_path: evil.Evil, init_args: {latent_dim: 2}}")
    main(["fit", "-c", "mine.yaml", *QUICK])
    assert canary.exists()


@pytest.mark.parametrize("text", ["a: &x [1, 2]\nb: *x", "a: {b: [1, {c: 2}]}", "", "- 1", "x: '&a *b'"])
def test_yaml_within_limits_is_read_unchanged(text):
    assert yaml_text.load(text) == yaml.safe_load(text)


def test_yaml_alias_bomb_is_refused():
    yaml_text.check("a: &a 1\nb: [" + ", ".join(["*a"] * 16) + "]")
    with pytest.raises(yaml.YAMLError, match="more than 16 aliases"):
        yaml_text.check("a: &a 1\nb: [" + ", ".join(["*a"] * 17) + "]")


@pytest.mark.slow
def test_policy_is_enforced_in_new_process(canary, tmp_path):
    Path("hostile.yaml").write_text("model: {class_path: evil.Evil}")
    paths = os.pathsep.join([str(tmp_path / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "aezoo", "fit", "-c", "hostile.yaml"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 2 and "--allow evil" in done.stderr and "Traceback" not in done.stderr
    assert not canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["trainer: -1", "trainer: null", "data: 3", "progress: 7", "checkpoints: null"])
def test_invalid_config_section_is_refused(refused, tmp_path, text):
    (tmp_path / "odd.yaml").write_text(f"model: {{class_path: vae}}\n{text}\n")
    message = refused("fit", "-c", str(tmp_path / "odd.yaml"))
    assert text.partition(":")[0] in message and "one per line, or leave it out" in message


@pytest.mark.slow
@pytest.mark.parametrize("text", ["config: -1", "config: a.yaml", "fit: {config: {a: 1}}"])
def test_nested_config_file_is_refused(refused, tmp_path, text):
    (tmp_path / "odd.yaml").write_text(f"model: {{class_path: vae}}\n{text}\n")
    assert "give each file with --config" in refused("fit", "-c", str(tmp_path / "odd.yaml"))
