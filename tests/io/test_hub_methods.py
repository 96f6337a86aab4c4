"""Methods of models with the interface of huggingface_hub's PyTorchModelHubMixin, and results on the model card."""

import inspect
import io
from pathlib import Path

import pytest
import torch
from hub_server import OWNER
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image

import aezoo
from aezoo.training.hub_methods import HubMethods

VAE = aezoo.model_class("vae")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return aezoo.create_model("vae", input_shape=(1, 8, 8), latent_dim=3).eval()


def files_of(hub, branch="main"):
    return hub.commits["user/digits"][branch][-1][2]


def same_weights(a, b):
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


@pytest.mark.parametrize("method", ["from_pretrained", "save_pretrained", "push_to_hub"])
def test_arguments_are_those_of_the_mixin(method):
    theirs = inspect.signature(getattr(PyTorchModelHubMixin, method)).parameters
    ours = inspect.signature(getattr(HubMethods, method)).parameters
    # versions before 1.0 also have resume_download and proxies, which have no effect
    excepted = {"config", "allow_patterns", "ignore_patterns", "delete_patterns", "resume_download", "proxies"}
    assert theirs.keys() - excepted == ours.keys()
    assert all(theirs[key].kind is parameter.kind for key, parameter in ours.items())


def test_pushed_model_is_loaded_by_its_class(hub, model):
    url = model.push_to_hub("user/digits", commit_message="first", private=True, token=OWNER)
    assert url.startswith(f"{hub.address}/user/digits/commit/") and hub.private["user/digits"]
    assert hub.commits["user/digits"]["main"][-1][1] == "first"
    for cls, name in ((VAE, "user/digits"), (aezoo.Autoencoder, "user/digits"), (VAE, "hf://user/digits")):
        loaded = cls.from_pretrained(name)
        assert type(loaded) is VAE and not loaded.training and same_weights(loaded, model)
    with pytest.raises(aezoo.AezooError, match="user/digits is a VAE, not a ConvAE: load_model loads both"):
        aezoo.model_class("conv_ae").from_pretrained("user/digits")


def test_branch_proposal_and_revision(hub, model):
    model.push_to_hub("user/digits", branch="v2")
    assert "config.json" in files_of(hub, "v2") and "config.json" not in files_of(hub)
    assert "aezoo.load_model('hf://user/digits@v2')" in files_of(hub, "v2")["README.md"].decode()
    assert same_weights(VAE.from_pretrained("user/digits", revision="v2"), model)
    url = model.push_to_hub("user/digits", create_pr=True)
    assert url == f"{hub.address}/user/digits/discussions/1"
    assert "config.json" in files_of(hub, "refs/pr/1") and "config.json" not in files_of(hub)
    for source in ("hf://user/digits@v2", "vae.mnist"):
        with pytest.raises(aezoo.AezooError, match="revision 'v2' needs a repository on the hub"):
            VAE.from_pretrained(source, revision="v2")


def test_cache_arguments_are_followed(hub, model, tmp_path):
    model.push_to_hub("user/digits")
    other = tmp_path / "other"
    with pytest.raises(aezoo.AezooError, match="digits is not in the cache, and local_files_only disables downloads"):
        VAE.from_pretrained("user/digits", cache_dir=other, local_files_only=True)
    VAE.from_pretrained("user/digits", cache_dir=other)
    assert list(other.rglob("model.safetensors")) and not list((tmp_path / "cache").rglob("model.safetensors"))
    hub.asked.clear()
    assert same_weights(VAE.from_pretrained("user/digits", cache_dir=other, local_files_only=True), model)
    assert not hub.asked
    weights = files_of(hub)["model.safetensors"]
    next(other.rglob("model.safetensors")).resolve().write_bytes(b"damaged")
    with pytest.raises(aezoo.AezooError, match="cannot read"):
        VAE.from_pretrained("user/digits", cache_dir=other)
    assert same_weights(VAE.from_pretrained("user/digits", cache_dir=other, force_download=True), model)
    assert next(other.rglob("model.safetensors")).read_bytes() == weights
    # arguments apply to one call only
    aezoo.load_model("hf://user/digits")
    assert list((tmp_path / "cache").rglob("model.safetensors"))


def test_token_is_sent(hub, model, monkeypatch):
    model.push_to_hub("user/digits", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(aezoo.AezooError, match="or log in with `hf auth login`"):
        VAE.from_pretrained("user/digits")
    assert same_weights(VAE.from_pretrained("user/digits", token=OWNER), model)


def test_given_hyperparameters_replace_saved_ones(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    loaded = VAE.from_pretrained(tmp_path / "saved", lr=0.5)
    assert loaded.hparams["lr"] == 0.5 == loaded.lr and same_weights(loaded, model) and not loaded.training
    with pytest.raises(aezoo.AezooError, match="vae has no hyperparameter 'latent_dims': did you mean 'latent_dim'"):
        VAE.from_pretrained(tmp_path / "saved", latent_dims=3)
    with pytest.raises(aezoo.AezooError, match="were trained with latent_dim 3, not 4: omit settings that do not fit"):
        VAE.from_pretrained(tmp_path / "saved", latent_dim=4)


def test_tag_of_pretrained_weights_is_accepted():
    assert VAE.from_pretrained("vae.mnist").input_shape == (1, 28, 28)
    with pytest.raises(aezoo.AezooError, match=r"vae\.mnist is a VAE, not a DenseAE"):
        aezoo.model_class("dense_ae").from_pretrained("vae.mnist")


def test_saved_folder_has_a_card_and_is_pushed_if_asked(hub, model, tmp_path):
    folder = tmp_path / "digits"
    card = {"license": "mit", "metrics": {"test/loss": 98.25}}
    assert model.save_pretrained(folder, model_card_kwargs=card) is None and not hub.commits
    text = (folder / "README.md").read_text()
    assert f"aezoo.load_model('{folder}')" in text and "| test/loss | 98.25 |" in text and "license: mit" in text
    url = model.save_pretrained(folder, repo_id="user/digits", push_to_hub=True, model_card_kwargs=card, private=True)
    assert url.startswith(hub.address) and hub.private["user/digits"]
    assert "hf://user/digits" in files_of(hub)["README.md"].decode()
    with pytest.raises(aezoo.AezooError, match="'digits' is not a repository: give user/name"):
        model.save_pretrained(folder, push_to_hub=True)


def test_results_are_on_the_card(hub, model):
    x = torch.rand(6, 1, 8, 8)
    results = [aezoo.reconstruct(model, x), aezoo.generate(model, n=4)]
    model.push_to_hub("user/digits", model_card_kwargs={"results": results})
    files = files_of(hub)
    text = files["README.md"].decode()
    for name, result in zip(("1-reconstruction", "2-generation"), results, strict=True):
        assert f"](pictures/{name}.png)" in text and result.summary() in text
        picture = Image.open(io.BytesIO(files[f"pictures/{name}.png"]))
        assert min(picture.size) > 50 and picture.convert("L").getextrema()[0] < 100
    # a custom card keeps its pictures
    hub.put("user/digits", {"README.md": b"mine"})
    del hub.commits["user/digits"]["main"][-1][2]["pictures/2-generation.png"]
    aezoo.push_to_hub(model, "user/digits", results=results)
    assert files_of(hub)["README.md"] == b"mine" and "pictures/2-generation.png" not in files_of(hub)
    aezoo.push_to_hub(model, "user/digits", results=results, replace_card=True)
    assert "pictures/2-generation.png" in files_of(hub)
    assert same_weights(aezoo.load_model("hf://user/digits"), model)
    assert not list(Path("cache").rglob("*.png"))
