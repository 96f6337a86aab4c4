"""Models of diffusers under the zoo's contract: beside diffusers itself, their losses by hand, what is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aezoo
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.io.checkpoint import load_run
from aezoo.nets.blocks import diffusers as blocks
from aezoo.nets.blocks.diffusers import KINDS, REFUSED, WEIGHTS
from aezoo.testing import check_export

SHAPE = (3, 12, 16)


# with attention, which the small ones leave out, and more channels of a code than of a sample
MORE: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"mid_block_add_attention": True, "latent_channels": 5},
    "VQModel": {"mid_block_add_attention": True, "num_vq_embeddings": 7, "vq_embed_dim": 5},
    "AutoencoderDC": {
        "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
        "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
        "encoder_qkv_multiscales": [[], [3]],
        "decoder_qkv_multiscales": [[], [3]],
    },
}


GAUSSIAN = [kind for kind in KINDS if "KL" in kind]


every = pytest.mark.parametrize("kind", KINDS)


def theirs(kind: str, **settings: Any) -> Any:
    """A model of diffusers, all of its weights away from where they start."""
    torch.manual_seed(0)
    net: Any = getattr(diffusers, kind)(**{**KINDS[kind], **MORE.get(kind, {}), **_channels(kind, 3), **settings})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


def _channels(kind: str, n: int) -> dict[str, int]:
    return {key: n for key in blocks._arguments(getattr(diffusers, kind)) if key in ("in_channels", "out_channels")}


def stored(kind: str, folder: Path, **settings: Any) -> Any:
    net = theirs(kind, **settings)
    net.save_pretrained(folder)
    return net


def ours(folder: Path, **settings: Any) -> Any:
    return aezoo.create_model("diffusers_ae", SHAPE, pretrained=str(folder), **settings)


def new(kind: str, shape: tuple[int, ...] = (1, 8, 8), **settings: Any) -> Any:
    torch.manual_seed(0)
    return aezoo.create_model("diffusers_ae", shape, kind=kind, **settings)


def images(n: int = 4, shape: tuple[int, ...] = SHAPE, **how: Any) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(7), **how)


def code_of(net: Any, x: Tensor) -> Tensor:
    """The deterministic code that diffusers gives an image in [-1, 1]."""
    found = net.encode(x)
    if hasattr(found, "latent_dist"):
        mode: Tensor = found.latent_dist.mode()
        return mode
    code: Tensor = found[0]
    return code


# ---- as diffusers computes it ----------------------------------------------------------------------------------------


@pytest.mark.slow
@every
@torch.no_grad()
def test_codes_and_reconstructions_match_diffusers(kind: str, tmp_path: Path) -> None:
    net, x = stored(kind, tmp_path), images()
    model = ours(tmp_path).eval()
    z = code_of(net, 2 * x - 1)
    assert model.code_shape == tuple(z.shape[1:])
    torch.testing.assert_close(model.encode(x), z, rtol=1e-6, atol=1e-6)
    x_hat = net.decode(z).sample / 2 + 0.5
    torch.testing.assert_close(model.decode(z), x_hat, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(x), x_hat, rtol=1e-6, atol=1e-6)
    assert x_hat.std() > 0.01  # something is compared
    if kind != "AutoencoderTiny":  # whose own forward rounds the code to bytes
        torch.testing.assert_close(model(x), net(2 * x - 1).sample / 2 + 0.5, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GAUSSIAN)
@torch.no_grad()
def test_moments_match_diffusers_and_stay_finite(kind: str, tmp_path: Path) -> None:
    net, x = stored(kind, tmp_path), images()
    model = ours(tmp_path).eval()
    *_, last = [m for m in (net.quant_conv if hasattr(net, "quant_conv") else net.encoder).modules() if has_bias(m)]
    for bias in (0.0, 60.0, -60.0):
        last.bias.fill_(bias)
        net.save_pretrained(tmp_path)
        model = ours(tmp_path).eval()
        q = net.encode(2 * x - 1).latent_dist
        mu, log_var = model.moments(x)
        torch.testing.assert_close(mu, q.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(log_var, q.logvar, rtol=1e-6, atol=1e-6)
        assert all(term.isfinite() for term in model.loss(x).values())


def has_bias(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.bias is not None


@every
def test_model_without_folder_equals_diffusers_class(kind: str) -> None:
    model = new(kind, SHAPE, config=MORE.get(kind))
    net = getattr(diffusers, kind)(**{**KINDS[kind], **MORE.get(kind, {}), **_channels(kind, 3)})
    shapes = {name: p.shape for name, p in net.state_dict().items()}
    half = {name.partition(".net.")[2]: p.shape for name, p in model.state_dict().items() if ".net." in name}
    assert half == shapes
    assert new(kind, (1, 8, 8)).encoder.net.config.in_channels == 1


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderKLFlux2", "VQModel"])
def test_number_of_blocks_follows_given_widths(kind: str) -> None:
    names = [name for name in KINDS[kind] if name.endswith("block_out_channels")]
    model = new(kind, config={name: [8, 16, 24] for name in names})
    assert model.code_shape[1:] == (2, 2)
    assert model.encoder.net.config.down_block_types == ["DownEncoderBlock2D"] * 3


def test_legacy_attention_weight_names_are_loaded(tmp_path: Path) -> None:
    """Those of Stable Diffusion are stored so; diffusers itself knows the names."""
    net, x = stored("AutoencoderKL", tmp_path), images()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(tmp_path / WEIGHTS)
    for new_name, old in names.items():
        state = {
            re.sub(rf"(attentions\.\d+\.){re.escape(new_name)}\.", rf"\1{old}.", key): v for key, v in state.items()
        }
    assert sum("proj_attn" in key for key in state) == 4
    save_file(state, tmp_path / WEIGHTS, {"format": "pt"})
    with torch.no_grad():
        torch.testing.assert_close(ours(tmp_path).eval()(x), net(2 * x - 1).sample / 2 + 0.5, rtol=1e-6, atol=1e-6)


def test_half_precision_weights_load_as_trainable_float32(tmp_path: Path) -> None:
    stored("AutoencoderKL", tmp_path)
    save_file({key: v.half() for key, v in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS, {"format": "pt"})
    model = ours(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


@pytest.mark.slow
@every
@torch.no_grad()
def test_large_batch_matches_small_batch(kind: str, tmp_path: Path) -> None:
    """From 64 on diffusers goes another way."""
    net, x = stored(kind, tmp_path).double(), images(70, dtype=torch.float64)
    model = ours(tmp_path).double().eval()
    torch.testing.assert_close(model(x)[:4], model(x[:4]))
    torch.testing.assert_close(model(x), net.decode(code_of(net, 2 * x - 1)).sample / 2 + 0.5)


@pytest.mark.slow
@every
def test_each_kind_is_exported_for_batches_of_any_size(kind: str) -> None:
    check_export("diffusers_ae", kind=kind)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_the_loss_of_a_gaussian_code_by_hand(kind: str) -> None:
    model, x = new(kind, SHAPE, beta=0.3, likelihood="laplace:0.2").double(), images(dtype=torch.float64)
    torch.manual_seed(3)
    terms = model.loss(x)
    q = model.encoder.net.encode(2 * x - 1).latent_dist
    torch.manual_seed(3)
    z = q.mean + q.std * torch.randn(q.mean.shape, dtype=q.mean.dtype)
    p = D.Laplace(model.decoder.net.decode(z).sample / 2 + 0.5, 0.2)
    nll = -p.log_prob(x).sum((1, 2, 3)).mean()
    kl = D.kl_divergence(D.Normal(q.mean, q.std), D.Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    expected = {"loss": nll + 0.3 * kl, "nll": nll, "kl": kl, "elbo": -nll - kl}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_the_loss_of_vqmodel_by_hand() -> None:
    given = {"num_vq_embeddings": 9, "vq_embed_dim": 3}
    model = new("VQModel", SHAPE, config=given, commitment=0.4, likelihood="gaussian:0.2").double()
    x = images(dtype=torch.float64)
    codebook = model.decoder.net.quantize.embedding.weight
    with torch.no_grad():
        codebook.copy_(torch.randn(9, 3, dtype=torch.float64))
    terms = model.loss(x)
    z = model.encoder.net.encode(2 * x - 1).latents
    rows = z.movedim(1, -1)
    e = codebook[((rows[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)]
    assert len(e.unique(dim=None)) > 3  # several codes are in use
    nll = -D.Normal(model(x), 0.2).log_prob(x).sum((1, 2, 3)).mean()
    squares = ((rows - e) ** 2).sum((1, 2, 3)).mean()
    expected = {"loss": nll + 1.4 * squares, "nll": nll, "codebook": squares, "commitment": squares}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    # each term moves its own side alone
    weights = [*model.encoder.parameters()]
    of_book = torch.autograd.grad(terms["codebook"], [codebook, *weights], retain_graph=True, allow_unused=True)
    assert of_book[0] is not None and of_book[0].any() and all(g is None for g in of_book[1:])
    of_codes = torch.autograd.grad(terms["commitment"], [codebook, *weights], retain_graph=True, allow_unused=True)
    assert of_codes[0] is None and all(g is not None and g.any() for g in of_codes[1:])
    # the reconstruction's gradient passes the codebook by
    of_nll = torch.autograd.grad(terms["nll"], [codebook, *weights], allow_unused=True)
    assert of_nll[0] is None and all(g is not None for g in of_nll[1:])


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderTiny"])
def test_deterministic_kinds_use_likelihood_only(kind: str) -> None:
    model, x = new(kind, SHAPE, likelihood="laplace:0.2").double(), images(dtype=torch.float64)
    z = model.encoder.net.encode(2 * x - 1)[0]
    p = D.Laplace(model.decoder.net.decode(z).sample / 2 + 0.5, 0.2)
    terms = model.loss(x)
    assert terms.keys() == {"loss", "nll"}
    torch.testing.assert_close(terms["loss"], -p.log_prob(x).sum((1, 2, 3)).mean())
    torch.testing.assert_close(terms["nll"], terms["loss"])


@pytest.mark.slow
@every
def test_training_moves_all_weights_and_the_loss_falls(kind: str) -> None:
    model, x = new(kind, beta=0.01, likelihood="gaussian:0.2"), images(8, (1, 8, 8))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model.loss(x)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    frozen = {name for name in before if "condition_encoder" in name}
    assert still == frozen and bool(frozen) == (kind == "AsymmetricAutoencoderKL")
    # two processes would wait for its gradient
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


# ---- saved and loaded ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every
def test_saved_model_loads_without_its_source_folder(kind: str, tmp_path: Path) -> None:
    stored(kind, tmp_path / "theirs")
    model, x = ours(tmp_path / "theirs").eval(), images()
    shutil.rmtree(tmp_path / "theirs")
    assert model.hparams["pretrained"] == "none" and model.hparams["kind"] == kind
    again = aezoo.load_model(aezoo.save_model(model, tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and torch.equal(again.encode(x), model.encode(x))
    assert again.hparams == model.hparams
    assert "theirs" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.slow
def test_run_from_pretrained_folder_continues_without_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(**{**KINDS["AutoencoderKL"], "in_channels": 1, "out_channels": 1})
    net.save_pretrained("theirs")
    fit = ["fit", "--model", "diffusers_ae", "--model.pretrained", "theirs", "--data.name", "digits"]
    quick = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
    main([*fit, *quick, "--trainer.accelerator", "cpu"])
    shutil.rmtree("theirs")
    model = load_run("runs/diffusers_ae-digits/0")[0]
    assert model.hparams["pretrained"] == "none"
    start = net.state_dict()["encoder.conv_in.weight"]
    found = model.state_dict()["encoder.net.encoder.conv_in.weight"]
    assert not torch.equal(found, start) and (found - start).abs().max() < 0.01  # two steps from where it began


@pytest.mark.slow
def test_config_without_argument_uses_class_default(tmp_path: Path) -> None:
    """An argument that a file does not have is the class's own, not that of our small model."""
    stored("AutoencoderKL", tmp_path, norm_num_groups=32)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["norm_num_groups"]
    file.write_text(json.dumps(config))
    model = ours(tmp_path)
    assert model.hparams["config"]["norm_num_groups"] == 32 != KINDS["AutoencoderKL"]["norm_num_groups"]
    again = aezoo.load_model(aezoo.save_model(model, tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again(images()), model.eval()(images()))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "AutoencoderKl"}, "unknown kind 'AutoencoderKl', did you mean 'AutoencoderKL'"),
        ({"kind": "VAE"}, "unknown kind 'VAE': Take one of AutoencoderKL, "),
        ({"config": {"latent_channel": 3}}, "has no 'latent_channel', did you mean 'latent_channels'"),
        ({"config": {"norm_num_groups": 7}}, "AutoencoderKL does not take config .*7"),
        ({"config": {"down_block_types": ["os.system"]}}, "does not take config"),
        ({"config": {"class_path": "os.system"}}, "has no 'class_path'"),
        ({"config": {"out_channels": 2}}, r"gives \(2, 8, 8\) back"),
        ({"config": {"in_channels": 3}}, "takes 3 channels, got .*--data.channels 3"),
        ({"pretrained": "nowhere"}, "nowhere has no config.json: give the folder"),
        ({"pretrained": "nowhere", "config": {}}, "leave it out"),
        ({"pretrained": "nowhere", "likelihood": "bernoulli"}, "takes likelihood gaussian, laplace or logcosh"),
        ({"commitment": -1.0}, "commitment must be at least 0"),
        ({"beta": -1.0}, "beta must be at least 0"),
    ],
)
def test_invalid_values_are_refused_in_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AezooError, match=words) as refusal:
        aezoo.create_model("diffusers_ae", (1, 8, 8), **settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((64,), "takes images"),
        ((1, 64), "takes images"),
        ((1, 4, 4, 4), "takes images"),
        ((1, 27, 35), r"gives \(1, 26, 34\) back for \(1, 27, 35\): take sides that are multiples of 2"),
        ((1, 1, 1), "does not take samples of shape"),
    ],
)
def test_unsupported_shapes_are_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(AezooError, match=words) as refusal:
        aezoo.create_model("diffusers_ae", shape)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_non_image_autoencoders_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    for settings in ({"kind": kind}, {"pretrained": str(tmp_path)}):
        with pytest.raises(AezooError, match=f"{kind} of diffusers .*: take one of AutoencoderKL") as refusal:
            aezoo.create_model("diffusers_ae", SHAPE, **settings)
        assert "\n" not in str(refusal.value)


def test_every_diffusers_autoencoder_is_taken_or_refused() -> None:
    from diffusers.models import autoencoders

    classes = {name for name, cls in vars(autoencoders).items() if isinstance(cls, type)}
    assert len(classes) > 20
    with_codes = {name for name in classes if hasattr(getattr(diffusers, name), "encode")}
    assert with_codes - {*KINDS, *REFUSED} == set()


def test_invalid_model_folders_are_refused(tmp_path: Path) -> None:
    net = stored("AutoencoderKL", tmp_path)
    whole = {file: (tmp_path / file).read_bytes() for file in ("config.json", WEIGHTS)}

    def refused(words: str) -> None:
        with pytest.raises(AezooError, match=words) as refusal:
            ours(tmp_path)
        assert "\n" not in str(refusal.value)
        for file, content in whole.items():
            (tmp_path / file).write_bytes(content)

    state = load_file(tmp_path / WEIGHTS)
    (tmp_path / "config.json").unlink()
    refused("has no config.json: give the folder of a model")
    (tmp_path / "config.json").write_text("{")
    refused("cannot read .*config.json")
    (tmp_path / "config.json").write_text("[]")
    refused("names no model")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "quantization_config": {"a": 1}}))
    refused("is quantised")
    (tmp_path / "config.json").write_text(" " * 2**21)
    refused("more than 1048576 bytes")
    (tmp_path / WEIGHTS).unlink()
    refused(f"has no {WEIGHTS}, so that there are no weights")
    (tmp_path / WEIGHTS).write_bytes(b"\0" * 20)
    refused("cannot read .* as AutoencoderKL")
    save_file(
        {key: v for key, v in state.items() if key != "decoder.conv_in.bias"}, tmp_path / WEIGHTS, {"format": "pt"}
    )
    refused("it has no decoder.conv_in.bias")
    save_file({**state, "more": torch.zeros(1)}, tmp_path / WEIGHTS, {"format": "pt"})
    refused("it has unknown more")
    for key, value, words in (
        ("decoder.conv_in.bias", state["decoder.conv_in.bias"][:3], r"decoder.conv_in.bias has the shape \(3,\), not"),
        ("decoder.conv_in.weight", state["decoder.conv_in.weight"].to(torch.int8), "as int8, whose scale is not in it"),
    ):
        save_file({**state, key: value}, tmp_path / WEIGHTS, {"format": "pt"})
        refused(words)
    (tmp_path / WEIGHTS).unlink()
    net.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / WEIGHTS).exists()
    refused("diffusion_pytorch_model.bin is refused, since a pickle can run code")
    (tmp_path / f"{WEIGHTS}.index.json").write_text("{}")
    refused("weights in several files: `aezoo import")


# ---- without diffusers -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_missing_diffusers_names_extra_to_install(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(AezooError, match=r"^diffusers_ae needs diffusers: pip install 'aezoo\[diffusers\]'$"):
        aezoo.create_model("diffusers_ae", (1, 8, 8))
    main(["info", "diffusers_ae"])
    assert "AutoencoderKL" in capsys.readouterr().out
    assert "diffusers_ae" in aezoo.list_models() and aezoo.model_class("diffusers_ae").__name__ == "DiffusersAE"
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model", "diffusers_ae", "--data.name", "digits"])
    *_, line = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("aezoo: ") and line.endswith("pip install 'aezoo[diffusers]'")


@pytest.mark.slow
def test_diffusers_is_imported_lazily() -> None:
    code = "import sys, aezoo; aezoo.model_class('diffusers_ae'); print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_outdated_diffusers_suggests_upgrade(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", type(sys)("diffusers"))
    with pytest.raises(AezooError, match=r"diffusers cannot give VQModel, .*pip install -U .aezoo\[diffusers\]"):
        new("VQModel")
