"""Saving and loading: every kind of path, and damaged, foreign or hostile files."""

import copy
import json
import os
import pickle
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.errors import AezooError
from aezoo.io import atomic_files
from aezoo.io.checkpoint import resolve_checkpoint
from aezoo.models.variational.vae import VAE

SHAPE = (1, 8, 8)
X = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))


def train(model, folder, version="0"):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=CSVLogger(folder, name="vae", version=version),
        callbacks=[ModelCheckpoint(monitor="val/loss", filename="best", save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        trainer.fit(model, DataLoader([X] * 3, batch_size=None), DataLoader([X], batch_size=None))
    return Path(str(trainer.log_dir))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model and its run folder, which tests do not change."""
    torch.manual_seed(0)
    model = aezoo.create_model("vae", input_shape=SHAPE, latent_dim=3, hidden_dims=(12, 7), beta=2.5)
    run = train(model, tmp_path_factory.mktemp("runs"))
    return model.eval(), run


@pytest.fixture
def model(trained):
    return trained[0]


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained[1], tmp_path / "runs" / "vae" / "0"))


@pytest.fixture
def file(run):
    return run / "checkpoints" / "last.ckpt"


@pytest.fixture
def saved(model, tmp_path):
    return aezoo.save_model(model, tmp_path / "saved")


@pytest.fixture
def refused():
    """Load a path that must be refused, and return the one-line error."""

    def load(path, match=None):
        with pytest.raises(AezooError, match=match) as caught:
            aezoo.load_model(path)
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 500
        return str(caught.value)

    return load


def same(model, other):
    assert type(other) is type(model)
    assert not other.training
    assert dict(other.hparams) == dict(model.hparams)
    with torch.no_grad():
        return torch.equal(model(X), other(X)) and torch.equal(model.score(X), other.score(X))


def edit(file, change):
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, file)


# ---- every kind of path ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kind_of_path_gives_the_same_model(model, run, saved):
    for path in (run / "checkpoints" / "last.ckpt", run, run / "checkpoints", run.parent, saved):
        assert same(model, aezoo.load_model(path)), path
        assert same(model, aezoo.load_model(str(path))), path


def test_run_folder_loads_best_checkpoint(model, run):
    edit(run / "checkpoints" / "last.ckpt", lambda c: c["state_dict"]["decoder.1.bias"].zero_())
    assert same(model, aezoo.load_model(run))
    assert resolve_checkpoint(run).name == "best.ckpt"
    assert resolve_checkpoint(run, prefer="last").name == "last.ckpt"
    (run / "checkpoints" / "best.ckpt").unlink()
    assert resolve_checkpoint(run).name == "last.ckpt"


def test_folder_of_runs_loads_newest_run(run):
    newer = Path(shutil.copytree(run, run.with_name("1")))
    now = time.time()
    os.utime(run / "checkpoints", (now - 60, now - 60))
    os.utime(newer / "checkpoints", (now, now))
    assert resolve_checkpoint(run.parent).parent.parent == newer
    os.utime(run / "checkpoints", (now + 60, now + 60))
    assert resolve_checkpoint(run.parent).parent.parent == run


def test_saved_model_can_be_resaved_and_moved(model, saved, tmp_path):
    aezoo.save_model(aezoo.load_model(saved), saved)
    moved = saved.rename(tmp_path / "moved")
    assert same(model, aezoo.load_model(moved))
    assert sorted(path.name for path in moved.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((moved / "config.json").read_text())
    assert config["model"] == "vae"
    assert config["aezoo_version"] == aezoo.__version__
    assert config["hyperparameters"]["hidden_dims"] == [12, 7]


def test_a_loaded_model_is_in_eval_mode_and_goes_on_training(saved, tmp_path):
    model = aezoo.load_model(saved)
    assert not model.training
    assert model.beta == 2.5
    before = model(X)
    train(model.train(), tmp_path)
    assert not torch.equal(before, model.eval()(X))


def test_large_model_whose_constructor_drops_layers_loads(tmp_path):
    # both networks first build the linear layers of both, 15 million parameters instead of 7.4 million
    model = aezoo.create_model("vae", (3, 64, 64), net="conv", hidden_dims=(150,))
    aezoo.save_model(model, tmp_path)
    assert aezoo.load_model(tmp_path).hidden_dims == (150,)


def test_tied_weights_are_saved(tmp_path):
    model = aezoo.create_model("linear_ae", input_shape=SHAPE)
    model.encoder[1].bias = nn.Parameter(model.decoder[0].bias[:16].detach())
    model.decoder[0].weight = nn.Parameter(model.encoder[1].weight.data.T)
    assert torch.equal(aezoo.load_model(aezoo.save_model(model, tmp_path))(X), model(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_load_in_saved_precision(model, run, tmp_path, dtype):
    other = copy.deepcopy(model).to(dtype)
    edit(run / "checkpoints" / "best.ckpt", lambda c: c.update(state_dict=other.state_dict()))
    for path in (aezoo.save_model(other, tmp_path / "saved"), run):
        state = aezoo.load_model(path).state_dict()
        assert {value.dtype for value in state.values()} == {dtype}
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_mixed_precision_weights_are_saved_exactly(model, tmp_path):
    sae = aezoo.create_model("jumprelu_sae", input_shape=(6,)).bfloat16()  # its thresholds stay in float32
    mixed = copy.deepcopy(model)
    mixed.encoder.bfloat16()
    for other, kinds in ((sae, {torch.float32, torch.bfloat16}), (mixed, {torch.float32})):
        state = aezoo.load_model(aezoo.save_model(other, tmp_path)).state_dict()
        assert {value.dtype for value in state.values() if value.is_floating_point()} == kinds
        assert all(torch.equal(value.float(), state[key].float()) for key, value in other.state_dict().items())


def test_map_location_is_respected(model, run, saved):
    for path in (run, saved):
        assert same(model, aezoo.load_model(path, map_location=torch.device("cpu")))
        assert aezoo.load_model(path, map_location="meta").device.type == "meta"
        with pytest.raises(AezooError, match=r"map_location ipu: .*; give cpu and move the model later"):
            aezoo.load_model(path, map_location="ipu")


def test_dangling_checkpoint_link_is_ignored(model, run):
    (run / "checkpoints" / "best-2.ckpt").symlink_to("gone.ckpt")
    assert same(model, aezoo.load_model(run))


def test_unloadable_file_is_not_saved_over_good_one(model, saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = (saved / "model.safetensors").read_bytes()
    other = aezoo.create_model("vae", input_shape=SHAPE, latent_dim=2)
    other.hparams["beta"] = torch.tensor(1.0)
    with pytest.raises(AezooError, match="vae cannot be saved: its hyperparameters: 'beta' is a Tensor"):
        aezoo.save_model(other, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    with pytest.raises(AezooError, match=r"only saved to local folders, not to hf://user/vae: use aezoo\.push_to_hub"):
        aezoo.save_model(model, "hf://user/vae")
    assert not Path("hf:").exists()


# ---- missing arguments and files -------------------------------------------------------------------------------------


class Fewer(VAE):
    """Sets most arguments of its parent itself, and renames one."""

    def __init__(self, input_shape, *, weight: float = 2.0, latent_dim: int = 3):
        super().__init__(input_shape, beta=weight, latent_dim=2 * latent_dim)
        self.save_hyperparameters()


@pytest.mark.slow
def test_checkpoint_stores_arguments_of_its_class(tmp_path):
    model = Fewer((4,), weight=0.5)
    assert dict(model.hparams) == {"input_shape": (4,), "weight": 0.5, "latent_dim": 3} == dict(model.hparams_initial)
    pl.Trainer(max_epochs=1, logger=False, default_root_dir=tmp_path, enable_progress_bar=False).fit(
        model, DataLoader(torch.rand(8, 4), 4), DataLoader(torch.rand(8, 4), 4)
    )
    (file,) = tmp_path.rglob("*.ckpt")
    loaded = Fewer.load_from_checkpoint(file, weights_only=True)
    assert loaded.beta == 0.5 and loaded.code_shape == (6,)


class HandsOn(VAE):
    """A model as in a notebook: one more argument, and one set for its parent."""

    def __init__(self, input_shape, *, extra: float = 1.0, **kwargs):
        super().__init__(input_shape, likelihood="gaussian", **kwargs)
        self.extra = extra


class HandsAllOn(VAE):
    """Forwards all arguments."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize(("cls", "more"), [(HandsOn, {"extra": 2.0}), (HandsAllOn, {})])
def test_hparams_include_forwarded_arguments(cls, more):
    model = cls((4,), latent_dim=3, **more)
    assert dict(model.hparams) == {"input_shape": (4,), "latent_dim": 3, **more}
    assert dict(copy.deepcopy(model).hparams) == dict(model.hparams)
    assert cls(**model.hparams).code_shape == (3,)


def test_missing_checkpoint_is_refused(refused, tmp_path):
    refused(tmp_path / "nothing.ckpt", "no checkpoint at .*nothing.ckpt")
    refused(tmp_path, "no .ckpt file in")


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "s3"])
def test_url_is_refused_before_any_request(refused, scheme):
    refused(
        f"{scheme}://example.org/model.ckpt", f"only be loaded from disk, not from {scheme}://example.org/model.ckpt"
    )


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "hyperparameter", "weight"])
def test_code_executing_file_is_refused(refused, tmp_path, monkeypatch, file, how, suffix):
    # an environment variable that disables safe loading must have no effect
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary, path = tmp_path / "canary", tmp_path / f"bomb{suffix}"
    content = torch.load(file, weights_only=True)
    if how == "hyperparameter":
        content["hyper_parameters"]["beta"] = Bomb(canary)
    elif how == "weight":
        content["state_dict"]["decoder.1.bias"] = Bomb(canary)
    else:
        content["extra"] = Bomb(canary)
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": {}, "extra": Bomb(canary)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    refused(path, "is refused: it is damaged, or contains objects that could run code")
    assert not canary.exists()
    if how != "pickle":
        torch.load(path, weights_only=False)
        assert canary.exists(), "the file does not run code"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_checkpoint_is_refused(refused, file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert str(file) in refused(file)


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_with_a_changed_byte_loads_or_is_refused(tmp_path, zipped):
    model = aezoo.create_model("vae", input_shape=(4,), latent_dim=2, hidden_dims=(3,))
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "aezoo": {"model": "vae"}}
    file, rng, refusals = tmp_path / "x.ckpt", random.Random(0), 0
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    sound = file.read_bytes()
    for _ in range(300):
        changed = bytearray(sound)
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        file.write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                aezoo.load_model(file)
            except AezooError as error:
                assert len(str(error).splitlines()) == 1  # noqa: PT017
                refusals += 1
    assert refusals > 50


@pytest.mark.parametrize("content", [b"", b"not a checkpoint\n", b"PK\x03\x04" + bytes(100), bytes(1000)])
def test_non_checkpoint_file_is_refused(refused, tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    assert "x.ckpt" in refused(tmp_path / "x.ckpt")


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}, {"state_dict": 3}, torch.zeros(2)])
def test_checkpoint_without_state_dict_is_refused(refused, tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "it has no state_dict")


def test_weights_only_file_names_how_to_load_it(refused, saved, model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    refused(
        tmp_path / "weights.pt",
        "only weights: create the model with aezoo.create_model and load them with its load_sta",
    )
    refused(saved / "model.safetensors", f"it has no state_dict; give the folder of the saved model, {saved}")


def test_checkpoint_without_registered_name_is_refused(refused, file):
    for stamp in (None, "vae", {}, {"model": None}):
        edit(file, lambda c, stamp=stamp: c.update(aezoo=stamp))
        refused(file, "has no registered model: load it with YourClass.load_from_checkpoint")
    edit(file, lambda c: c.pop("aezoo"))
    refused(file, "has no registered model")


@pytest.mark.slow
def test_unregistered_class_is_refused_by_load_model(refused, tmp_path):
    class Mine(VAE):
        """Not in the registry."""

    mine = Mine(input_shape=SHAPE)
    run = train(mine, tmp_path)
    refused(run, "has no registered model")
    back = Mine.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True).eval()
    assert torch.equal(back(X), mine.eval()(X))
    with pytest.raises(AezooError, match="Mine is not in the registry"):
        aezoo.save_model(mine, tmp_path / "saved")


def test_unknown_model_name_is_refused(refused, file):
    edit(file, lambda c: c["aezoo"].update(model="vae2"))
    refused(file, "unknown model 'vae2', did you mean 'vae'")


def test_foreign_state_dict_is_refused(refused, file):
    edit(file, lambda c: c.update(state_dict={"layer.weight": torch.zeros(2)}))
    assert "encoder" in refused(file, "the weights in .* do not fit vae")
    edit(file, lambda c: c.update(state_dict={}))
    refused(file, "do not fit vae")


@pytest.mark.parametrize("value", [torch.zeros(3), "text", None, 1.0])
def test_weight_of_wrong_shape_or_type_is_refused(refused, file, value):
    edit(file, lambda c: c["state_dict"].update({"decoder.1.bias": value}))
    assert "decoder.1.bias" in refused(file, "do not fit vae")


@pytest.mark.parametrize("keys", [{3: torch.zeros(1)}, {("a", "b"): torch.zeros(1)}])
def test_state_dict_with_non_string_keys_is_refused(refused, file, keys):
    edit(file, lambda c: c["state_dict"].update(keys))
    refused(file, "do not fit vae")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_dims": 3}, "no hyperparameter 'latent_dims': did you mean 'latent_dim'"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"latent_dim": "three"}, "does not describe a vae"),
        ({"latent_dim": None}, "does not describe a vae"),
        ({"latent_dim": 10**15}, "does not describe a vae"),
        ({"hidden_dims": "wide"}, "does not describe a vae"),
        ({"hidden_dims": ["wide"]}, "does not describe a vae"),
        ({"likelihood": 3}, "does not describe a vae"),
        ({"likelihood": {"class_path": "os.system", "init_args": {"command": "true"}}}, "does not describe a vae"),
        ({"lr": float("nan")}, "lr takes a finite number"),
        ({"input_shape": 5}, "does not describe a vae"),
        ({"input_shape": ()}, "input_shape must be"),
        ({3: 4}, "does not describe a vae|no hyperparameter"),
    ],
)
def test_unknown_hyperparameters_are_refused(refused, file, change, message):
    edit(file, lambda c: c["hyper_parameters"].update(change))
    assert "last.ckpt" in refused(file, message)


@pytest.mark.parametrize("value", [None, 3, "text", [1, 2]])
def test_non_dict_hyperparameters_are_refused(refused, file, value):
    edit(file, lambda c: c.update(hyper_parameters=value))
    refused(file, "hyperparameters|does not describe a vae")


def test_missing_hyperparameters_are_refused(refused, file):
    edit(file, lambda c: c.pop("hyper_parameters"))
    refused(file, "does not describe a vae.*input_shape")


def test_class_paths_in_a_checkpoint_are_never_followed(model, file, refused, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    (tmp_path / "evil_module.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    honest = {
        "_class_path": "aezoo.models.variational.vae.VAE",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }
    edit(file, lambda c: c["hyper_parameters"].update(honest))
    assert same(model, aezoo.load_model(file))
    for extra in ({"_class_path": "evil_module.Evil"}, {"_instantiator": "evil_module.Evil"}, {"_class_path": []}):
        edit(file, lambda c, extra=extra: c["hyper_parameters"].update({**honest, **extra}))
        refused(file, "is refused: it specifies other code")
    edit(file, lambda c: c["hyper_parameters"].update({**honest, "_target_": "os.system"}))
    refused(file, "no hyperparameter '_target_'")
    assert not canary.exists()
    assert "evil_module" not in sys.modules


# ---- saved folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True])
def test_modified_checkpoint_is_refused(refused, file, tmp_path, sealed):
    path = tmp_path / "best.ckpt"
    if sealed:
        atomic_files.save(torch.load(file, weights_only=True), path)
    else:
        shutil.copyfile(file, path)
    aezoo.load_model(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(path, "its checksum does not match its content")
    path.write_bytes(b"")
    refused(path, "it is empty")


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-10], lambda b: b[:4], lambda b: b"", lambda b: b"\xff" * 8 + b, lambda b: pickle.dumps(1)]
)
def test_damaged_weights_are_refused(refused, saved, damage):
    file = saved / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert "model.safetensors" in refused(saved, "cannot read")


def test_missing_weights_are_refused(refused, saved):
    (saved / "model.safetensors").unlink()
    assert "model.safetensors" in refused(saved, "cannot read")


def test_weights_of_different_model_are_refused(refused, saved):
    weights = load_file(saved / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != "decoder.1.bias"}, saved / "model.safetensors")
    refused(saved, "the weights in .* do not fit vae.*decoder.1.bias")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ("{", "cannot read"),
        ("\ufeff\x00", "cannot read"),
        ("[]", "has no model name"),
        ("3", "has no model name"),
        ("{}", "has no model name"),
        ('{"model": 3, "hyperparameters": {}}', "has no model name"),
        ('{"model": "vae"}', "has no hyperparameters"),
        ('{"model": "vae", "hyperparameters": []}', "has no hyperparameters"),
        ('{"model": "vae", "hyperparameters": {}}', "does not describe a vae"),
        ('{"model": "os.system", "hyperparameters": {}}', "unknown model 'os.system'"),
        ('{"model": "../vae", "hyperparameters": {}}', "unknown model"),
        ('{"model": "vae", "hyperparameters": {"input_shape": [1, 8, 8], "latent_dmi": 3}}', "mean 'latent_dim'"),
    ],
)
def test_damaged_config_is_refused(refused, saved, text, message):
    (saved / "config.json").write_text(text, encoding="utf-8")
    refused(saved, message)


def test_undecodable_config_is_refused(refused, saved):
    (saved / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(saved, "cannot read .*config.json")
    (saved / "config.json").write_text("[" * 100_000)
    refused(saved, "cannot read .*config.json")
