"""Pretrained weights by tag: found, verified by hashes, loaded, refused; used by every command."""

import hashlib
import json

import numpy as np
import pytest
import torch
from hub_server import ask
from safetensors.torch import load_file, save_file

import aezoo
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.io import tag_files
from aezoo.io.checkpoint import load_run
from aezoo.training import tags
from aezoo.training.data_statistics import DataStatistics

SHAPE = (1, 8, 8)


def entry(folder, source="", **changes):
    """An entry for the saved model in a folder."""
    sha256 = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    common = {"source": source or folder.name, "sha256": sha256, "license": "MIT", "input_shape": SHAPE, "bytes": 2000}
    figure = {"metric": "psnr", "value": 20.123, "seeds": [0]}
    return common | {"input_range": [0, 1], "data": {"name": "digits"}, "figures": [figure]} | changes


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder for weights instead of the package's, with `write` for its entries."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tags, "_OWN", folder / "tags.json")
    monkeypatch.setattr(tags, "entry_points", lambda group: ())
    tags.all_tags.cache_clear()
    yield folder
    tags.all_tags.cache_clear()


def write(home, entries):
    (home / "tags.json").write_text(json.dumps(entries))
    tags.all_tags.cache_clear()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return aezoo.create_model("vae", SHAPE, latent_dim=3, hidden_dims=(8,)).eval()


@pytest.fixture
def tag(home, model):
    """`vae.tiny` and `dense_ae.tiny`, both stored in float16, the second with codes and scores."""
    other = aezoo.create_model("dense_ae", SHAPE, latent_dim=2, hidden_dims=(8,)).eval()
    scores = {"deviance": torch.arange(1000).double()}
    other.data_statistics = DataStatistics(torch.randn(50, 2), scores)
    for name, each in (("vae.tiny", model), ("dense_ae.tiny", other)):
        file = aezoo.save_model(each, home / name) / "model.safetensors"
        save_file({key: value if "scores" in key else value.half() for key, value in load_file(file).items()}, file)
    write(home, {name: entry(home / name) for name in ("vae.tiny", "dense_ae.tiny")})
    return "vae.tiny"


# ---- lookup ----------------------------------------------------------------------------------------------------------


def test_tags_are_listed_by_pattern_and_family(tag):
    assert aezoo.list_models(pretrained=True) == ["dense_ae.tiny", "vae.tiny"]
    assert aezoo.list_models("vae", pretrained=True) == aezoo.list_models("vae.*", pretrained=True) == ["vae.tiny"]
    assert aezoo.list_models("v*", family="classic", pretrained=True) == []
    assert aezoo.list_models(family="classic", pretrained=True) == ["dense_ae.tiny"]
    assert "vae.tiny" not in aezoo.list_models()


@pytest.mark.parametrize("name", ["vae.tiny", "variational.tiny", "VAE.tiny"])
def test_tag_loads_in_float32(tag, model, name):
    loaded = aezoo.load_model(name)
    assert not loaded.training and loaded.input_shape == SHAPE
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[key], value.half().float())


def test_path_wins_over_a_tag(tag, tmp_path):
    other = aezoo.create_model("dense_ae", SHAPE)
    aezoo.save_model(other, tmp_path / "vae.tiny")
    assert type(aezoo.load_model("vae.tiny")) is type(other)


def test_results_of_a_tag_go_to_a_folder_of_its_name(tag):
    trained = load_run("variational.tiny")[1]
    assert trained["folder"].as_posix() == "runs/vae.tiny" and trained["data"] == {"name": "digits"}


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae.tny", "variational.tny", "va.tiny"])
def test_unknown_tag_suggests_the_nearest(tag, name):
    with pytest.raises(AezooError, match=r"no checkpoint at .*: did you mean 'vae.tiny'\?"):
        aezoo.load_model(name)


def test_unknown_tag_of_create_model_lists_those_of_the_model(tag):
    with pytest.raises(AezooError, match=r"vae has no weights 'minst', it has tiny: did you mean 'vae.tiny'"):
        aezoo.create_model("vae", pretrained="minst")
    with pytest.raises(AezooError, match=r"wae_mmd has no pretrained weights: `aezoo list --pretrained`"):
        aezoo.create_model("wae_mmd", pretrained="tiny")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_changed_file_is_refused(tag, home, file):
    path = home / tag / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(AezooError, match=f"{file} is refused: its SHA-256 is .* install aezoo again"):
        aezoo.load_model(tag)


def test_missing_file_is_named(tag, home):
    (home / tag / "model.safetensors").unlink()
    with pytest.raises(AezooError, match=r"cannot read .*model.safetensors of vae.tiny: .* install aezoo again"):
        aezoo.load_model(tag)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vae", {}),
        ("vae.tiny", {"sha256": {}}),
        ("vae.tiny", {"sha256": {"config.json": "12"}}),
        ("vae.tiny", {"source": "../elsewhere"}),
        ("vae.tiny", {"source": "/etc"}),
        ("vae.tiny", {"source": "hf://user/digits"}),
        ("vae.tiny", {"input_shape": "no"}),
        ("vae.tiny", {"colour": "red"}),
        ("vae.tiny", {"data": {}}),
        ("vae.tiny", {"license": None}),
        ("vae.tiny", {"figures": [{"metric": "mse"}]}),
    ],
)
def test_damaged_entry_is_refused(tag, home, name, changes):
    write(home, {name: entry(home / tag) | changes})
    with pytest.raises(AezooError, match=r"tags.json of aezoo does not list pretrained weights"):
        aezoo.list_models(pretrained=True)


# ---- create_model ----------------------------------------------------------------------------------------------------


def test_create_model_takes_the_weights_own_hyperparameters(tag, model):
    x = torch.rand(2, *SHAPE)
    expected = aezoo.load_model(tag)(x)
    for given in ({}, {"latent_dim": 3}, {"input_shape": SHAPE}, {"lr": 1e-5, "beta": 2.0}):
        created = aezoo.create_model("variational", pretrained="tiny", **given)
        assert torch.equal(created(x), expected) and not created.training
    assert created.hparams["lr"] == 1e-5 and created.hparams["latent_dim"] == 3


def test_create_model_refuses_what_the_weights_do_not_fit(tag):
    with pytest.raises(AezooError, match="trained with latent_dim 3, not 5"):
        aezoo.create_model("vae", pretrained="tiny", latent_dim=5)
    with pytest.raises(AezooError, match=r"vae.tiny is for samples of shape 1x8x8, not 1x28x28"):
        aezoo.create_model("vae", (1, 28, 28), pretrained="tiny")
    with pytest.raises(AezooError, match="no hyperparameter 'latent'"):
        aezoo.create_model("vae", pretrained="tiny", latent=5)


def test_untrained_models_keep_their_default_shape():
    assert aezoo.create_model("linear_ae").input_shape == (1, 28, 28)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_are_kept_by_save_and_load(tmp_path):
    model = aezoo.create_model("dense_ae", SHAPE, latent_dim=2)
    model.data_statistics = DataStatistics(torch.randn(5, 2), {"nll": torch.rand(4).double()})
    kept = aezoo.load_model(aezoo.save_model(model, tmp_path)).data_statistics
    assert torch.equal(kept.codes, model.data_statistics.codes)
    assert torch.equal(kept.scores["nll"], model.data_statistics.scores["nll"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"codes": torch.zeros(5, 3)}, "codes are those of another model"),
        ({"codes": torch.zeros(1, 2)}, "codes are those of another model"),
        ({"codes": torch.full((5, 2), torch.nan)}, "not finite"),
        ({"scores.nll": torch.zeros(2, 2)}, "no scores"),
        ({"scores.nll": torch.zeros(0)}, "no scores"),
        ({"other": torch.zeros(2)}, "no scores"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path, tensors, message):
    file = aezoo.save_model(aezoo.create_model("dense_ae", SHAPE, latent_dim=2), tmp_path) / "model.safetensors"
    save_file(load_file(file) | {f"data_statistics.{key}": value for key, value in tensors.items()}, file)
    with pytest.raises(AezooError, match=message):
        aezoo.load_model(tmp_path)


def test_generate_fits_a_prior_to_the_codes_of_the_weights(tag):
    model = aezoo.load_model("dense_ae.tiny")
    found = aezoo.generate(model, n=3, n_components=2)
    assert found.samples.shape == (3, *SHAPE) and "fitted to 50 codes stored with the weights" in found.source
    model.data_statistics = None
    with pytest.raises(AezooError, match="fitted to the codes of training samples"):
        aezoo.generate(model, n=3)


def test_detect_calibrates_on_the_scores_of_the_weights(tag):
    model = aezoo.load_model("dense_ae.tiny")
    x = torch.rand(4, *SHAPE)
    found = aezoo.detect(model, x, baselines=False)
    scores = model.anomaly_score(x).detach().double().numpy()
    # the stored scores are 0, 1, ..., 999
    expected = [(1 + sum(each >= score for each in range(1000))) / 1001 for score in scores]
    assert found.p_values == pytest.approx(expected)
    assert found.threshold == pytest.approx(900, rel=1e-4) and "1,000 held-out samples" in found.text
    quantile = aezoo.detect(model, x, quantile=0.5, baselines=False)
    assert quantile.threshold == pytest.approx(499.5)
    # given samples take precedence
    given = aezoo.detect(model, x, calibrate_on=torch.rand(20, *SHAPE), baselines=False)
    assert "20 held-out samples" in given.text


# ---- on the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tag, home, hub):
    """`vae.remote`, with files on the hub."""
    sha = hub.put("user/digits", {file.name: file.read_bytes() for file in (home / tag).iterdir()})
    whole = entry(home / tag, "hf://user/digits", revision=sha)
    write(home, {"vae.remote": whole})
    return hub


def test_tag_on_the_hub_is_fetched_once_and_kept(remote, model):
    loaded = aezoo.load_model("vae.remote")
    assert torch.equal(loaded.state_dict()["encoder.1.weight"], model.state_dict()["encoder.1.weight"].half().float())
    asked = sum("/resolve/" in path for path in remote.asked)
    aezoo.load_model("vae.remote")
    assert loaded.input_shape == SHAPE and sum(path.endswith(".safetensors") for path in remote.asked) <= asked


def test_wrong_hash_on_the_hub_is_refused(remote, home):
    changed = json.loads((home / "tags.json").read_text())
    changed["vae.remote"]["sha256"]["model.safetensors"] = "0" * 64
    write(home, changed)
    with pytest.raises(AezooError, match=r"model.safetensors is refused: its SHA-256 is .*, expected 0000"):
        aezoo.load_model("vae.remote")


def test_without_a_network_the_message_says_which_files_go_where(remote, home, monkeypatch, tmp_path):
    ask(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(
        AezooError, match=r"copy .*model.safetensors.* of hf://user/digits@.* to FOLDER/vae.remote"
    ) as error:
        aezoo.load_model("vae.remote")
    assert tag_files.VARIABLE in str(error.value)
    (tmp_path / "kept").mkdir()
    (home / "vae.tiny").rename(tmp_path / "kept" / "vae.remote")
    monkeypatch.setenv(tag_files.VARIABLE, str(tmp_path / "kept"))
    assert aezoo.load_model("vae.remote").input_shape == SHAPE
    (tmp_path / "kept" / "vae.remote" / "config.json").write_text("{}")
    with pytest.raises(AezooError, match=r"config.json is refused"):
        aezoo.load_model("vae.remote")


# ---- plug-ins --------------------------------------------------------------------------------------------------------


class Point:
    """An entry point without a distribution."""

    dist, group = None, tags.GROUP

    def __init__(self, name, value):
        self.name, self.value = name, value
        self.module, _, self.attr = value.partition(":")


@pytest.fixture
def plugin(tag, home, tmp_path, monkeypatch):
    """A package with weights; returns the folder of its files."""
    package = tmp_path / "site" / "aezoo_weights_of_others"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    point = Point("others", "aezoo_weights_of_others:pretrained.json")
    monkeypatch.setattr(tags, "entry_points", lambda group: (point, point) if group == tags.GROUP else ())
    (home / "vae.tiny").rename(package / "tiny")
    write(home, {})
    (package / "pretrained.json").write_text(json.dumps({"vae.others": entry(package / "tiny")}))
    return package


def test_plugin_brings_weights_without_being_imported(plugin):
    assert aezoo.list_models(pretrained=True) == ["vae.others"]
    assert aezoo.load_model("vae.others").input_shape == SHAPE


def test_two_packages_with_one_tag_are_refused(plugin, home):
    write(home, json.loads((plugin / "pretrained.json").read_text()))
    with pytest.raises(AezooError, match=r"two packages have weights named 'vae.others': aezoo and aezoo_weights"):
        aezoo.list_models(pretrained=True)


def test_plugin_without_its_file_is_named(plugin):
    (plugin / "pretrained.json").unlink()
    with pytest.raises(AezooError, match=r"aezoo_weights_of_others:pretrained.json, which is not a file of a package"):
        aezoo.list_models(pretrained=True)


# ---- commands --------------------------------------------------------------------------------------------------------


def test_list_and_info_show_tags(tag, capsys):
    main(["list", "--pretrained"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tag", "data", "figure", "size", "licence"]
    assert lines[2].split() == ["vae.tiny", "digits", "psnr", "20.12", "0.00", "MB", "MIT"]
    main(["list", "classic", "--pretrained"])
    assert "dense_ae.tiny" in (out := capsys.readouterr().out) and "vae.tiny" not in out
    main(["info", "vae"])
    assert "vae.tiny" in capsys.readouterr().out
    main(["info", "variational.tiny"])
    assert "1x8x8, from 0 to 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["info", "vae.tny"])
    assert "did you mean 'vae.tiny'?" in capsys.readouterr().err


def test_commands_take_a_tag(tag, tmp_path, capsys):
    np.save("x.npy", np.random.default_rng(0).random((6, *SHAPE), np.float32))
    main(["generate", "--ckpt_path", "dense_ae.tiny", "--n", "2", "--n_components", "2"])
    main(["reconstruct", "--ckpt_path", "variational.tiny", "--input", "x.npy"])
    main(["detect", "--ckpt_path", "dense_ae.tiny", "--input", "x.npy", "--baselines", "false"])
    assert "1,000 held-out samples" in capsys.readouterr().out
    for command, name in (("generate", "dense_ae.tiny"), ("reconstruct", "vae.tiny"), ("detect", "dense_ae.tiny")):
        assert any((tmp_path / "runs" / name / command).iterdir())


def test_command_without_samples_names_training_data_of_tag(tag, capsys):
    with pytest.raises(SystemExit):
        main(["reconstruct", "--ckpt_path", "vae.tiny"])
    assert "vae.tiny was trained on digits: give --data digits, or --input FILE" in capsys.readouterr().err


def test_lightning_commands_refuse_a_tag_in_one_line(tag, capsys):
    for command in ("test", "fit"):
        with pytest.raises(SystemExit):
            main([command, "--ckpt_path", "vae.tiny", "--data", "digits"])
        error = capsys.readouterr().err.strip()
        assert "vae.tiny are pretrained weights, which have no checkpoint" in error and "\n" not in error
