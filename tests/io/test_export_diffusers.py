"""Models of the zoo exported to diffusers, which loads them and gives the same outputs."""

import json

import diffusers
import pytest
import torch
from diffusers_reference import RAE, decoded, encoded
from representative_models import others_slow

import aezoo
from aezoo.errors import AezooError
from aezoo.io.exporters.diffusers import save_diffusers
from aezoo.nets.blocks.diffusers import KINDS

SHAPE = (3, 16, 24)
SMALL = {"net": "ldm", "hidden_dims": (8, 12), "latent_dim": 5, "features": "none", "discriminator_weight": 0.0}
MODELS = {
    "autoencoder_kl": ("AutoencoderKL", SMALL),
    "eq_vae": ("AutoencoderKL", SMALL),
    "va_vae": ("AutoencoderKL", SMALL),
    "vqgan": ("VQModel", {**SMALL, "codebook_size": 9}),
    "vq_vae": ("VQModel", {"net": "ldm", "activation": "silu", "likelihood": "gaussian", "codebook_size": 9}),
    "taesd": ("AutoencoderTiny", {"hidden_dims": (6, 6), "latent_dim": 5}),
    # stages of different widths, which AutoencoderTiny does not support
    "taesd, of several widths": ("AutoencoderTiny", {"hidden_dims": (4, 7, 5)}),
}


def made(name, shape=SHAPE, **settings):
    torch.manual_seed(0)
    model = aezoo.create_model(name.partition(",")[0], shape, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():  # so that gains of norms are not 1, and biases not 0
            p.add_(0.1 * torch.randn_like(p))
    return model


def images(n=2, shape=SHAPE):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def assert_same(model, theirs, x):
    """Compare codes, decoded codes, and reconstructions."""
    found = theirs.encode(2 * x - 1)
    z = found.latent_dist.mode() if hasattr(found, "latent_dist") else found[0]
    own = model.encoder(x) if hasattr(model, "quantiser") else model.encode(x)
    torch.testing.assert_close(own, z, rtol=0, atol=1e-5)
    x_hat = theirs.decode(z).sample / 2 + 0.5
    torch.testing.assert_close(model(x), x_hat, rtol=0, atol=1e-5)
    assert z.std() > 0.05 and x_hat.std() > 0.01
    if hasattr(found, "latent_dist"):
        torch.testing.assert_close(model.posterior(x)[1], found.latent_dist.logvar, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", others_slow(MODELS, ("vq_vae",)))
def test_diffusers_computes_the_same(tmp_path, name):
    kind, settings = MODELS[name]
    model = made(name, **settings)
    if kind == "VQModel":
        with torch.no_grad():  # codes near the encoder's outputs
            z = model.encoder(images()).movedim(1, -1).flatten(0, 2)
            model.quantiser.code_KD.copy_(z[:9] + 0.1 * torch.randn(9, z.shape[1]))
        assert len(model.encode_indices(images()).unique()) > 2
    save_diffusers(model, tmp_path / "theirs")
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "theirs").eval()
    assert_same(model, theirs, images())
    # also at another size, in a model loaded from the folder
    again = aezoo.load_model(tmp_path / "theirs")
    assert again.kind == kind
    x = images(1, (3, 32, 16))
    with torch.no_grad():
        torch.testing.assert_close(again(x), aezoo.at_size(model, (32, 16))(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_diffusers_come_back(tmp_path, kind):
    shape = (3, 16, 16) if kind == RAE else SHAPE
    model = made("diffusers_ae", shape, kind=kind)
    save_diffusers(model, tmp_path)
    theirs, found = getattr(diffusers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = images(shape=shape)
    with torch.no_grad():
        z = encoded(theirs.eval(), x)
        torch.testing.assert_close(model.encode(x), z, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(x), decoded(theirs, z), rtol=0, atol=1e-5)


def test_scale_and_shift_of_codes_are_those_of_the_standardiser(tmp_path):
    model = made("autoencoder_kl", **SMALL)
    z = torch.randn(50, 5, 4, 6, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4, 5])[:, None, None] + 2
    z += torch.arange(5.0)[:, None, None]
    model.standardiser.observe(z, lambda values: values.mean(0))
    save_diffusers(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["scaling_factor"] == pytest.approx(1 / z.std(correction=0).item(), rel=1e-5)
    assert config["shift_factor"] == pytest.approx(z.mean().item(), rel=1e-5)
    again = aezoo.load_model(tmp_path)
    scaled = again.standardiser(z.float())
    assert abs(scaled.mean()) < 1e-4 and scaled.std(correction=0) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "settings", "message"),
    [
        ("vae", SHAPE, {}, "diffusers has no class for vae"),
        ("autoencoder_kl", SHAPE, {}, "no network like net 'resnet'.*net='ldm'"),
        ("autoencoder_kl", SHAPE, {**SMALL, "activation": "relu"}, "end with silu"),
        (
            "autoencoder_kl",
            SHAPE,
            {**SMALL, "likelihood": "bernoulli"},
            "'bernoulli' the network's output is not an image",
        ),
        ("autoencoder_kl", (3, 16), SMALL, r"networks for images, \(C, H, W\)"),
        (
            "autoencoder_kl",
            (3, 18, 16),
            SMALL,
            "multiples of 4, this autoencoder_kl has 18x16: export aezoo.at_si",
        ),
        ("vqgan", SHAPE, {**SMALL, "cosine": True}, "of the nearest direction"),
        ("taesd", SHAPE, {"activation": "silu"}, "uses relu"),
        ("taesd", SHAPE, {"likelihood": "bernoulli"}, "output is not an image"),
        ("taesd", SHAPE, {"likelihood": "sigmoid_gaussian"}, "output is not an image"),
    ],
)
def test_models_that_diffusers_does_not_have_are_refused(tmp_path, name, shape, settings, message):
    with pytest.raises(AezooError, match=message) as refusal:
        save_diffusers(aezoo.create_model(name, shape, **settings), tmp_path)
    assert "\n" not in str(refusal.value) and not [*tmp_path.iterdir()]


def test_samples_scaled_by_their_statistics_are_refused(tmp_path):
    from aezoo.training.data_units import DataUnits

    model = made("taesd", hidden_dims=(4,))
    model.data_units = DataUnits({"offset": torch.zeros(()), "factor": torch.ones(())})
    with pytest.raises(AezooError, match="scaled by their statistics"):
        save_diffusers(model, tmp_path)
