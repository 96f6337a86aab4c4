"""Models on a hub: pushing, loading, and refused addresses; the hub is a local server."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_server import OWNER, STRANGER, ask
from huggingface_hub import constants

import aezoo
from aezoo import registry
from aezoo.cli.main import main
from aezoo.data import DataModule
from aezoo.io import hub_files
from aezoo.io.checkpoint import load_run
from aezoo.io.hub import write_card

ADDRESS = "hf://user/digits"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return aezoo.create_model("vae", input_shape=(1, 8, 8), latent_dim=3).eval()


def files_of(hub, name="user/digits", branch="main"):
    return hub.commits[name][branch][-1][2]


def head_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_pushed_model_roundtrips_exactly(hub, model):
    url = aezoo.push_to_hub(model, "user/digits")
    sha, message, files = hub.commits["user/digits"]["main"][-1]
    assert url == f"{hub.address}/user/digits/commit/{sha}" and message == "vae, pushed with aezoo"
    assert set(files) == {".gitattributes", "config.json", "model.safetensors", "README.md"}
    assert len(hub.commits["user/digits"]["main"]) == 2  # the initial commit of the repository, and one for the model
    loaded = aezoo.load_model(ADDRESS)
    assert not loaded.training and type(loaded) is type(model)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_only_config_and_weights_are_fetched(hub, model):
    aezoo.push_to_hub(model, "user/digits")
    hub.put("user/digits", {"pytorch_model.bin": b"\x80\x04.", "last.ckpt": b"PK", "old/config.json": b"{}"})
    hub.asked.clear()
    folder = hub_files.fetch(ADDRESS)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == set(hub_files.FILES)
    resolved = [path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path]
    assert set(resolved) == set(hub_files.FILES)


def test_hub_model_passes_checkpoint_checks(hub, model):
    aezoo.push_to_hub(model, "user/digits")
    config = files_of(hub)["config.json"].decode()
    hub.put("user/digits", {"config.json": config.replace('"latent_dim": 3', '"latent_dim": 4').encode()})
    with pytest.raises(aezoo.AezooError, match=r"do not fit vae|does not describe a vae"):
        aezoo.load_model(ADDRESS)
    hub.put("user/digits", {"config.json": config.replace('"lr"', '"_class_path": "os.system", "lr"').encode()})
    with pytest.raises(aezoo.AezooError, match="specifies other code"):
        aezoo.load_model(ADDRESS)


def test_revision_is_given_after_at_sign(hub, model):
    first = aezoo.push_to_hub(model, "user/digits").rpartition("/")[2]
    key, weight = next(iter(model.named_parameters()))
    with torch.no_grad():
        weight.add_(1)
    aezoo.push_to_hub(model, "user/digits", revision="v2", commit_message="better")
    assert hub.commits["user/digits"]["v2"][-1][1] == "better"
    for address, same in ((ADDRESS, False), (f"{ADDRESS}@v2", True), (f"{ADDRESS}@{first}", False)):
        assert torch.equal(aezoo.load_model(address).state_dict()[key], weight) is same
    with pytest.raises(aezoo.AezooError, match="has no revision 'v3'"):
        aezoo.load_model(f"{ADDRESS}@v3")


def test_model_card_shows_loading_and_given_metadata_only(hub, model):
    aezoo.push_to_hub(model, "user/digits", private=True)
    card = files_of(hub)["README.md"].decode()
    assert hub.private["user/digits"]
    assert head_of(card) == {"library_name": "aezoo", "tags": ["aezoo", "autoencoder", "variational", "vae"]}
    assert "aezoo.load_model('hf://user/digits')" in card and "| metric |" not in card
    call = next(line for line in card.splitlines() if line.startswith("aezoo.create_model("))
    assert call == "aezoo.create_model('vae', input_shape=(1, 8, 8), latent_dim=3, hidden_dims=(400,))"
    again = eval(call, {"aezoo": aezoo})
    assert dict(again.hparams) == dict(model.hparams)


def test_plugin_model_card_names_package(model, tmp_path, monkeypatch):
    found = replace(registry.find("vae"), owner="nice-ae")
    monkeypatch.setattr(registry, "find", lambda name: found)
    write_card(aezoo.save_model(model, tmp_path), "user/digits", metrics={"a|b\\": 2.5})
    card = (tmp_path / "README.md").read_text()
    assert (
        "`vae` of nice-ae, saved by aezoo" in card
        and "pip install '.[hub]' in a checkout of aezoo; pip install nice-ae\n" in card
    )
    assert "| a/b | 2.5 |" in card


def test_existing_model_card_is_kept_unless_replaced(hub, model, capsys):
    aezoo.push_to_hub(model, "user/digits")
    hub.put("user/digits", {"README.md": b"mine"})
    aezoo.push_to_hub(model, "user/digits", license="mit", metrics={"val/loss": 98.25})
    assert files_of(hub)["README.md"] == b"mine" and "is kept" in capsys.readouterr().err
    aezoo.push_to_hub(model, "user/digits", license="mit", metrics={"val/loss": 98.25}, replace_card=True)
    card = files_of(hub)["README.md"].decode()
    assert head_of(card)["license"] == "mit" and "| val/loss | 98.25 |" in card


def test_scaling_is_folded_in_as_save_model_does(hub):
    model = aezoo.create_model("topk_sae", input_shape=(6,), latent_dim=12, k=2, likelihood="gaussian").eval()
    torch.nn.init.normal_(model.encoder.bias)
    aezoo.push_to_hub(model, "user/sae", scaling=2.0)
    saved = aezoo.load_model(aezoo.save_model(model, "saved", 2.0))
    x = torch.randn(4, 6)
    assert torch.equal(aezoo.load_model("hf://user/sae")(x), saved(x)) and not torch.allclose(saved(x), model(x))


@pytest.mark.slow
def test_commands_accept_hub_address_and_write_to_runs(hub, model, capsys):
    aezoo.push_to_hub(model, "user/digits")
    np.save("new.npy", np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32))
    assert load_run(ADDRESS)[1]["folder"] == Path("runs/user_digits")
    main(["reconstruct", "--ckpt_path", ADDRESS, "--input", "new.npy", "--device", "cpu"])
    assert (Path("runs/user_digits/reconstruct")).is_dir() and "runs/user_digits" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["test", "fit"])
def test_commands_requiring_checkpoint_refuse_hub_model(hub, command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--ckpt_path", ADDRESS])
    assert end.value.code == 2 and "is a saved model, " in capsys.readouterr().err
    assert not hub.asked


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv", [["-c", ADDRESS], ["--model", "vae", "--data", ADDRESS], [f"--model={ADDRESS}"], ["--resume", ADDRESS]]
)
def test_fit_makes_no_hub_request(hub, model, argv, capsys):
    aezoo.push_to_hub(model, "user/digits")
    hub.asked.clear()
    with pytest.raises(SystemExit) as end:
        main(["fit", *argv])
    *_, line = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("aezoo: ") and not hub.asked


@pytest.mark.slow
@pytest.mark.parametrize(
    "address",
    ["hf://digits", "hf://a/../c", "hf://user/", "hf:///digits", "hf://user/a--b", "hf://../digits", "hf://u/-x",
     "hf://user/x.git", f"hf://user/{'x' * 96}", "hf://user/é"],
)  # fmt: skip
def test_invalid_hub_name_is_refused_without_request(hub, model, address):
    with pytest.raises(aezoo.AezooError, match="give user/name"):
        aezoo.load_model(address)
    with pytest.raises(aezoo.AezooError, match="give user/name"):
        aezoo.push_to_hub(model, address.removeprefix("hf://"))
    assert not hub.asked


@pytest.mark.parametrize(("model", "setting"), [("pixelcnn", "tokenizer"), ("perceptual_vae", "features")])
def test_model_setting_in_file_fetches_nothing(hub, model, setting):
    with pytest.raises(aezoo.AezooError, match=r"is not downloaded, since this setting"):
        aezoo.create_model(model, input_shape=(1, 8, 8), **{setting: ADDRESS}).loss(torch.rand(2, 1, 8, 8))
    assert not hub.asked


def test_activation_network_in_file_is_not_fetched(hub, model):
    aezoo.push_to_hub(model, "user/digits")
    hub.asked.clear()
    with pytest.raises(aezoo.AezooError, match=r"is not downloaded, since this setting"):
        DataModule("activations", of="digits", network=ADDRESS)
    assert not hub.asked


def test_an_empty_revision_is_refused(hub):
    with pytest.raises(aezoo.AezooError, match="has no revision after the @"):
        aezoo.load_model(f"{ADDRESS}@")


def test_missing_or_private_repository_is_reported(hub, model, monkeypatch):
    with pytest.raises(aezoo.AezooError, match=r"has no repository user/digits, or it is private"):
        aezoo.load_model(ADDRESS)
    aezoo.push_to_hub(model, "user/digits", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(aezoo.AezooError, match=r"has no repository user/digits, or it is private: .* `hf auth login`"):
        aezoo.load_model(ADDRESS)


@pytest.mark.slow
def test_push_requires_login_and_write_access(hub, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with pytest.raises(aezoo.AezooError, match=r"no permission to write to user/digits on .* \(403\)"):
        aezoo.push_to_hub(model, "user/digits")
    monkeypatch.delenv("HF_TOKEN")
    hub.asked.clear()
    with pytest.raises(aezoo.AezooError, match="not logged in to the hub: run `hf auth login`"):
        aezoo.push_to_hub(model, "user/digits")
    assert not hub.asked and not hub.commits
    aezoo.push_to_hub(model, "user/digits", token=OWNER)
    assert "config.json" in files_of(hub)


def test_empty_token_is_treated_as_none(hub, model):
    aezoo.push_to_hub(model, "user/digits", token="")
    assert "config.json" in files_of(hub)


def test_offline_push_error_does_not_mention_cache(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for writes, words in (
        (True, "HF_HUB_OFFLINE disables"),
        (False, "user/digits is not in the cache, and HF_HUB_OFF"),
    ):
        assert hub_files._error_line(ConnectionError(), "user/digits", None, writes).startswith(words)


def test_incomplete_cached_model_is_refused(hub, model, monkeypatch):
    aezoo.push_to_hub(model, "user/digits")
    weights = hub_files.fetch(ADDRESS) / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink(missing_ok=True)
    ask(monkeypatch, "http://127.0.0.1:9")  # no server
    with pytest.raises(aezoo.AezooError, match=r"cannot reach 127.0.0.1:\d+, and user/digits is not in the cache"):
        aezoo.load_model(ADDRESS)


@pytest.mark.parametrize("files", [{"README.md": b"words"}, {"config.json": b"{}"}])
def test_repository_without_aezoo_model_is_refused(hub, files):
    hub.put("user/digits", files)
    with pytest.raises(aezoo.AezooError, match=r"is not an aezoo model, it has no .*model.safetensors"):
        aezoo.load_model(ADDRESS)


def test_model_of_different_library_is_refused(hub):
    hub.put("user/digits", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"\0" * 16})
    with pytest.raises(aezoo.AezooError, match=r"has no model name: it was not written by aezoo.save_model"):
        aezoo.load_model(ADDRESS)


def test_offline_hub_uses_cache_or_reports(hub, model, monkeypatch):
    aezoo.push_to_hub(model, "user/digits")
    aezoo.load_model(ADDRESS)
    ask(monkeypatch, "http://127.0.0.1:9")  # no server
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(aezoo.load_model(ADDRESS)(x), model(x))
    with pytest.raises(aezoo.AezooError, match=r"cannot reach 127.0.0.1:\d+, and user/other is not in the cache"):
        aezoo.load_model("hf://user/other")
    with pytest.raises(aezoo.AezooError, match=r"cannot reach 127.0.0.1:\d+: check the network"):
        aezoo.push_to_hub(model, "user/digits")


@pytest.mark.slow
def test_subprocess_uses_cache_from_environment(hub, model, tmp_path):
    aezoo.push_to_hub(model, "user/digits")
    aezoo.load_model(ADDRESS)
    hub.asked.clear()
    own = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    code = f"import aezoo; print(aezoo.load_model('{ADDRESS}').code_shape); aezoo.load_model('hf://user/other')"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | own, capture_output=True, text=True)
    assert done.stdout.strip() == "(3,)" and not hub.asked, done.stderr
    assert "user/other is not in the cache, and HF_HUB_OFFLINE disables access" in done.stderr.splitlines()[-1]


def test_missing_huggingface_hub_names_extra_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (lambda: aezoo.load_model(ADDRESS), lambda: aezoo.push_to_hub(model, "user/digits")):
        with pytest.raises(aezoo.AezooError, match=r"pip install '\.\[hub\]'"):
            use()
