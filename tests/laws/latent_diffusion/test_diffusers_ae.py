"""Models of diffusers in the zoo: comparison with diffusers itself, explicit losses, and invalid settings."""

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
from diffusers_reference import CONSISTENCY, RAE, decoded, encoded, side_for
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

SHAPE, SQUARE = (3, 12, 16), (3, 16, 16)


# with attention, which small models do not have, and more code channels than image channels
MORE: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"mid_block_add_attention": True, "latent_channels": 5},
    "VQModel": {"mid_block_add_attention": True, "num_vq_embeddings": 7, "vq_embed_dim": 5},
    "AutoencoderDC": {
        "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
        "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
        "encoder_qkv_multiscales": [[], [3]],
        "decoder_qkv_multiscales": [[], [3]],
    },
    RAE: {"latents_mean": [0.3], "latents_std": [1.7], "scaling_factor": 0.6, **side_for(RAE, 16)},
    CONSISTENCY: {"scaling_factor": 0.7, "encoder_norm_num_groups": 4},
}


GAUSSIAN = [kind for kind in KINDS if "KL" in kind]


every = pytest.mark.parametrize("kind", KINDS)


def theirs(kind: str, **settings: Any) -> Any:
    """A model of diffusers, with random offsets added to its initial weights."""
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


def shape_of(kind: str) -> tuple[int, ...]:
    return SQUARE if kind == RAE else SHAPE


def small_shape_of(kind: str) -> tuple[int, ...]:
    return (3 if kind in (RAE, CONSISTENCY) else 1, 8, 8)


def ours(folder: Path, kind: str = "AutoencoderKL", **settings: Any) -> Any:
    return aezoo.create_model("diffusers_ae", shape_of(kind), pretrained=str(folder), **settings)


def new(kind: str, shape: tuple[int, ...] | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    return aezoo.create_model("diffusers_ae", shape or small_shape_of(kind), kind=kind, **settings)


def images(n: int = 4, shape: tuple[int, ...] = SHAPE, **how: Any) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(7), **how)


# ---- comparison with diffusers ---------------------------------------------------------------------------------------


@pytest.mark.slow
@every
@torch.no_grad()
def test_codes_and_reconstructions_match_diffusers(kind: str, tmp_path: Path) -> None:
    net, x = stored(kind, tmp_path), images(shape=shape_of(kind))
    model = ours(tmp_path, kind).eval()
    z = encoded(net, x)
    assert model.code_shape == tuple(z.shape[1:])
    torch.testing.assert_close(model.encode(x), z, rtol=1e-6, atol=1e-6)
    x_hat = decoded(net, z)
    torch.testing.assert_close(model.decode(z), x_hat, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(x), x_hat, rtol=1e-6, atol=1e-6)
    assert x_hat.std() > 0.01  # not a constant image
    # forward rounds the code of the first kind to bytes, draws noise in the second, and reads [0, 1] in the third
    if kind not in ("AutoencoderTiny", CONSISTENCY, RAE):
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
    model = new(kind, shape_of(kind), config=MORE.get(kind))
    net = getattr(diffusers, kind)(**{**KINDS[kind], **MORE.get(kind, {}), **_channels(kind, 3)})
    shapes = {name: p.shape for name, p in net.state_dict().items()}
    half = {name.partition(".net.")[2]: p.shape for name, p in model.state_dict().items() if ".net." in name}
    assert half == shapes
    if kind not in (RAE, CONSISTENCY):
        assert new(kind, (1, 8, 8)).encoder.net.config.in_channels == 1


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderKLFlux2", "VQModel"])
def test_number_of_blocks_follows_given_widths(kind: str) -> None:
    names = [name for name in KINDS[kind] if name.endswith("block_out_channels")]
    model = new(kind, config={name: [8, 16, 24] for name in names})
    assert model.code_shape[1:] == (2, 2)
    assert model.encoder.net.config.down_block_types == ["DownEncoderBlock2D"] * 3


def test_legacy_attention_weight_names_are_loaded(tmp_path: Path) -> None:
    """Checkpoints of Stable Diffusion have these names, which diffusers maps to its own."""
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
    """From 64 samples on, diffusers uses another algorithm."""
    net, x = stored(kind, tmp_path).double(), images(70, shape_of(kind), dtype=torch.float64)
    model = ours(tmp_path, kind).double().eval()
    torch.testing.assert_close(model(x)[:4], model(x[:4]))
    torch.testing.assert_close(model(x), decoded(net, encoded(net, x)))


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
    # codebook trains the codes only, commitment the encoder only
    weights = [*model.encoder.parameters()]
    of_book = torch.autograd.grad(terms["codebook"], [codebook, *weights], retain_graph=True, allow_unused=True)
    assert of_book[0] is not None and of_book[0].any() and all(g is None for g in of_book[1:])
    of_codes = torch.autograd.grad(terms["commitment"], [codebook, *weights], retain_graph=True, allow_unused=True)
    assert of_codes[0] is None and all(g is not None and g.any() for g in of_codes[1:])
    # the reconstruction has no gradient with respect to the codes
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
    model, x = new(kind, beta=0.01, likelihood="gaussian:0.2"), images(8, small_shape_of(kind))
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
    frozen = {name for name in before if "condition_encoder" in name or (kind == RAE and name.startswith("encoder."))}
    assert still == frozen and bool(frozen) == (kind in ("AsymmetricAutoencoderKL", RAE))
    # with frozen parameters that require gradients, DDP would wait for them
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_the_loss_of_a_consistency_decoder_by_hand() -> None:
    """f, its noise and its steps as in the scheduler of diffusers, and the distance of the paper."""
    model = new(CONSISTENCY, SHAPE, beta=0.3, likelihood="laplace:0.2").double()
    x = images(6, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    torch.manual_seed(3)
    terms = model.loss(x)
    table, unet = diffusers.schedulers.ConsistencyDecoderScheduler(), model.decoder.net.decoder_unet
    q = model.encoder.net.encode(2 * x - 1).latent_dist
    torch.manual_seed(3)
    z = q.mean + q.std * torch.randn(q.mean.shape, dtype=x.dtype)
    means, stds = (torch.tensor(v)[:, None, None] for v in (
        [0.38862467, 0.02253063, 0.07381133, -0.0171294], [0.9654121, 1.0440036, 0.76147926, 0.77022034]
    ))  # fmt: skip
    y = ((0.18215 * z - means) / stds).repeat_interleave(2, 2).repeat_interleave(2, 3)

    def f(noisy: Tensor, t: int) -> Tensor:
        out = unet(torch.cat([table.c_in[t] * noisy, y[i : i + 1]], 1), t).sample[:, :3]
        return table.c_skip[t] * noisy + table.c_out[t] * out

    def noisy(image: Tensor, noise: Tensor, t: int) -> Tensor:
        return table.sqrt_alphas_cumprod[t] * image + table.sqrt_one_minus_alphas_cumprod[t] * noise

    draws = torch.randn_like(x), torch.randn_like(x)
    u, e = torch.rand(len(x), dtype=x.dtype), torch.randn_like(x)
    nll, consistency, seen = [], [], set()
    for i in range(len(x)):
        image = f(table.sqrt_one_minus_alphas_cumprod[1008] * draws[0][i : i + 1], 1008)
        image = f(noisy(image, draws[1][i : i + 1], 512), 512)
        nll.append(-D.Laplace((image + 1) / 2, 0.2).log_prob(x[i : i + 1]).sum())
        n, clean = int(63 * u[i]) + 1, 2 * x[i : i + 1] - 1
        seen.add(n)
        sigma = [
            (table.sqrt_one_minus_alphas_cumprod[16 * k] / table.sqrt_alphas_cumprod[16 * k]).item() for k in (n - 1, n)
        ]
        target = f(noisy(clean, e[i : i + 1], 16 * (n - 1)), 16 * (n - 1)) if n > 1 else clean
        distance = (f(noisy(clean, e[i : i + 1], 16 * n), 16 * n) - target).square().sum()
        c = 0.00054 * x[0].numel() ** 0.5
        consistency.append(((distance + c**2).sqrt() - c) / (sigma[1] - sigma[0] * (n > 1)))
    assert len(seen) > 3
    kl = D.kl_divergence(D.Normal(q.mean, q.std), D.Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    expected = {"nll": sum(nll) / len(x), "kl": kl, "consistency": sum(consistency) / len(x)}
    expected["loss"] = expected["nll"] + 0.3 * kl + expected["consistency"]
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-6, atol=0)
    # all weights have a gradient
    names, weights = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(terms["consistency"], weights, retain_graph=True, allow_unused=True)
    missing = {name for name, g in zip(names, grads, strict=True) if g is None}
    assert missing <= {"likelihood.log_scale"}
    by_hand = torch.autograd.grad(sum(consistency) / len(x), [unet.conv_out.weight], retain_graph=True)[0]
    found = torch.autograd.grad(terms["consistency"], [unet.conv_out.weight])[0]
    assert not torch.allclose(found, by_hand)  # in by_hand the target has a gradient, too


def test_first_step_of_consistency_is_compared_with_the_sample(monkeypatch: Any) -> None:
    model, x = new(CONSISTENCY, SHAPE).double(), images(dtype=torch.float64)
    z = model.encode(x)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(*shape, dtype=x.dtype))
    torch.manual_seed(0)
    found = model.consistency(x, z)
    torch.manual_seed(0)
    e, y, t = torch.randn_like(x), model.decoder.condition(z), torch.full((len(x),), 16)
    apart = model.decoder.f(model.decoder.noisy(2 * x - 1, e, t), t, y) - (2 * x - 1)
    a, s = model.decoder.schedule[:2, 16].double()
    c = 0.00054 * x[0].numel() ** 0.5
    expected = ((apart.square().sum((1, 2, 3)) + c**2).sqrt() - c) / (s / a)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@torch.no_grad()
def test_consistency_decoder_samples_match_diffusers(tmp_path: Path) -> None:
    net, x = stored(CONSISTENCY, tmp_path), images()
    model = ours(tmp_path).eval()
    z = model.encode(x)
    found = [model.decoder.draw(z, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    for seed, x_hat in zip((1, 2), found, strict=True):
        expected = decoded(net, z, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(x_hat, expected, rtol=1e-6, atol=1e-6)
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert torch.equal(model.decode(z), model.decode(z))
    torch.testing.assert_close(model.decode(z)[:1], model.decode(z[:1]))  # every sample has the same noise
    # also for codes of another size than the model's
    z = torch.randn(2, 4, 7, 5)
    torch.testing.assert_close(model.decode(z), decoded(net, z), rtol=1e-6, atol=1e-6)
    assert torch.equal(aezoo.at_size(model, (14, 10)).decode(z), model.decode(z))


def test_schedule_of_noise_stays_exact_in_bfloat16() -> None:
    model = new(CONSISTENCY, SHAPE)
    table = model.decoder.schedule.clone()
    assert torch.equal(model.bfloat16().decoder.schedule, table) and table.dtype == torch.float32
    assert model.decode(torch.randn(2, *model.code_shape, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("stats", [{}, {"latents_mean": [0.3], "latents_std": [1.7], "scaling_factor": 0.6}])
@pytest.mark.parametrize("tokens", [False, True])
def test_the_loss_of_a_representation_autoencoder_by_hand(stats: dict[str, Any], tokens: bool) -> None:
    config = {"noise_tau": 0.5, "use_encoder_loss": True, "reshape_to_2d": not tokens, **stats}
    model = new(RAE, SQUARE, config=config, likelihood="laplace:0.2").double()
    net = diffusers.AutoencoderRAE(**{**KINDS[RAE], **side_for(RAE, 16), **config}).double()
    state = {**model.encoder.net.state_dict(), **model.decoder.net.state_dict()}
    net.load_state_dict(state)
    x = images(4, SQUARE, dtype=torch.float64)
    clean = net.eval().encode(x).latent
    for training in (True, False):
        torch.manual_seed(3)
        terms = model.train(training).loss(x)
        # diffusers adds noise in training, from the same random numbers
        torch.manual_seed(3)
        z = net.train(training).encode(x).latent
        assert torch.equal(z, clean) != training
        x_hat = net.decode(z).sample
        nll = -D.Laplace(x_hat, 0.2).log_prob(x).sum((1, 2, 3)).mean()
        features = (net.eval().encode(x_hat).latent - clean).square().flatten(1).sum(1).mean() / 2
        expected = {"loss": nll + features, "nll": nll, "features": features}
        assert terms.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(model.train().encode(x), clean)  # the code has no noise
    plain = new(RAE, SQUARE, config=stats, likelihood="laplace:0.2").double()
    assert plain.loss(x).keys() == {"loss", "nll"}


@pytest.mark.parametrize("kind", ["dinov2", "siglip2", "mae"])
@torch.no_grad()
def test_each_encoder_of_a_representation_autoencoder(kind: str) -> None:
    """Compared with the network of transformers: patch tokens only, without class and register tokens."""
    import transformers

    patch = 14 if kind == "dinov2" else 16
    config = {"encoder_type": kind, "encoder_patch_size": patch, "latents_mean": [0.3], "latents_std": [2.0]}
    model = new(RAE, SQUARE, config=config).eval()
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    net, x = model.encoder.net.encoder, images(3, SQUARE)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    resized = torch.nn.functional.interpolate(x, size=(4 * patch, 4 * patch), mode="bicubic")
    classes = {
        "dinov2": transformers.Dinov2WithRegistersModel,
        "siglip2": transformers.SiglipVisionModel,
        "mae": transformers.ViTMAEModel,
    }
    assert type(net) is classes[kind]
    order = {"noise": torch.arange(16.0).expand(3, -1)} if kind == "mae" else {}
    at = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    tokens = net((resized - mean) / std, **order, **at).last_hidden_state[
        :, {"dinov2": 5, "siglip2": 0, "mae": 1}[kind] :
    ]
    expected = ((tokens - 0.3) / (2 + 1e-5)).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(model.encode(x), expected, rtol=1e-5, atol=1e-5)
    assert not hasattr(transformers.SiglipVisionModel, "vision_model") or "vision_model" in vars(net)["_modules"]


# ---- saved and loaded ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every
def test_saved_model_loads_without_its_source_folder(kind: str, tmp_path: Path) -> None:
    stored(kind, tmp_path / "theirs")
    model, x = ours(tmp_path / "theirs", kind).eval(), images(shape=shape_of(kind))
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
    assert not torch.equal(found, start) and (found - start).abs().max() < 0.01  # two steps from the pretrained weights


@pytest.mark.slow
def test_config_without_argument_uses_class_default(tmp_path: Path) -> None:
    """An argument missing in the file has the default of the class, not that of our small model."""
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


# ---- invalid settings ------------------------------------------------------------------------------------------------


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
        ({"kind": RAE}, r"AutoencoderRAE takes 3 channels, got \(1, 8, 8\): give --data.channels 3"),
        ({"kind": CONSISTENCY}, r"takes 3 channels, got \(1, 8, 8\): give --data.channels 3"),
        ({"kind": RAE, "config": {"encoder_type": "clip"}}, "does not take config .*encoder_type='clip'"),
        ({"kind": RAE, "config": {"encoder_patch_size": 0}}, "does not take config .*zero"),
        ({"kind": RAE, "config": {"encoder_input_size": 10**9}}, "at most 256 positions per side, got 71428571"),
        ({"kind": CONSISTENCY, "config": {"decoder_num_train_timesteps": 512}}, "it decodes at .*1008, 512"),
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
        ((1, 27, 35), r"gives \(1, 26, 34\) back for \(1, 27, 35\): use sides that are multiples of 2"),
        ((1, 1, 1), "does not take samples of shape"),
    ],
)
def test_unsupported_shapes_are_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(AezooError, match=words) as refusal:
        aezoo.create_model("diffusers_ae", shape)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [
        (RAE, (3, 18, 18), r"gives \(3, 16, 16\) back for \(3, 18, 18\): give --data.size 16"),
        (RAE, (3, 16, 8), r"gives \(3, 16, 16\) back for \(3, 16, 8\): give --data.size 16"),
        (CONSISTENCY, (3, 16, 15), "use sides that are multiples of 2"),
    ],
)
def test_unsupported_sides_of_kinds_are_refused(kind: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(AezooError, match=words) as refusal:
        new(kind, shape)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_non_image_autoencoders_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    for settings in ({"kind": kind}, {"pretrained": str(tmp_path)}):
        with pytest.raises(AezooError, match=f"{kind} of diffusers .*: choose from AutoencoderKL") as refusal:
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
    refused("has no model name")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "quantization_config": {"a": 1}}))
    refused("is quantised")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**26 + 1)
    refused("more than 67108864 bytes")
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
    with pytest.raises(
        AezooError, match=r"^diffusers_ae needs diffusers: pip install '\.\[diffusers\]' in a checkout of aezoo$"
    ):
        aezoo.create_model("diffusers_ae", (1, 8, 8))
    main(["info", "diffusers_ae"])
    assert "AutoencoderKL" in capsys.readouterr().out
    assert "diffusers_ae" in aezoo.list_models() and aezoo.model_class("diffusers_ae").__name__ == "DiffusersAE"
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model", "diffusers_ae", "--data.name", "digits"])
    *_, line = capsys.readouterr().err.splitlines()
    assert (
        end.value.code == 2
        and line.startswith("aezoo: ")
        and line.endswith("pip install '.[diffusers]' in a checkout of aezoo")
    )


def test_missing_transformers_names_extra_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    needed = (
        r"^the encoder of AutoencoderRAE needs transformers: pip install '\.\[transformers\]' in a checkout of aezoo$"
    )
    with pytest.raises(AezooError, match=needed):
        new(RAE)
    assert new("VQModel").code_shape == (4, 4, 4)


@pytest.mark.slow
def test_diffusers_is_imported_lazily() -> None:
    code = "import sys, aezoo; aezoo.model_class('diffusers_ae'); print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_outdated_diffusers_suggests_upgrade(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", type(sys)("diffusers"))
    with pytest.raises(AezooError, match=r"diffusers cannot give VQModel, .*pip install '\.\[diffusers\]"):
        new("VQModel")
