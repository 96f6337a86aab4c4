"""Laws of the very deep VAE (Child 2021)."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor

import aezoo
from aezoo.tasks.compress import compress
from aezoo.tasks.decompress import decompress

# ---- the very deep VAE: Child 2021 -----------------------------------------------------------------------------------


BLOCKS = {"width": 8, "latent_channels": 2, "enc_blocks": (1, 2), "dec_blocks": (2, 1)}


def deep(shifted: Any | None, shape: tuple[int, ...] = (1, 4, 6), **settings: Any) -> Any:
    model = aezoo.create_model("vdvae", input_shape=shape, **BLOCKS | settings)
    return (shifted(model) if shifted else model).double()


def images(n: int = 5, shape: tuple[int, ...] = (1, 4, 6)) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def apply(net: Any, y: Tensor) -> Tensor:
    """A bottleneck block, computed from its weights."""
    weights = list(net.parameters())
    for weight, bias in zip(weights[::2], weights[1::2], strict=True):
        y = torch.nn.functional.conv2d(torch.nn.functional.gelu(y), weight, bias, padding=weight.shape[-1] // 2)
    return y


def written_out(model: Any, x: Tensor, noise: list[Tensor]) -> tuple[Tensor, list[D.Normal], list[D.Normal], Tensor]:
    """The code, all q and p, and the decoder's output for two resolutions, by torch.distributions from the paper."""
    up, down = model.encoder, model.decoder
    y = torch.nn.functional.conv2d(x, up.first.weight, up.first.bias, padding=1)
    y = y + apply(up.stages[0][0], y)
    fine = y
    y = (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4
    for net in up.stages[1]:
        y = y + apply(net, y)
    z, qs, ps = [], [], []
    y_of = {1: down.starts[1].expand_as(y)}
    for stage, a in ((1, y), (0, fine)):
        if stage == 0:
            y_of[0] = y_of[1].repeat_interleave(2, 2).repeat_interleave(2, 3) + down.starts[0]
        for block in down.stages[stage]:
            stream = y_of[stage]
            m, log_s, f = apply(block.p, stream).split([2, 2, 8], 1)
            mu, log_sigma = apply(block.q, torch.cat([stream, a], 1)).chunk(2, 1)
            qs.append(D.Normal(mu, log_sigma.exp()))
            ps.append(D.Normal(m, log_s.exp()))
            z.append(qs[-1].loc + qs[-1].scale * noise[len(z)])
            stream = stream + f + torch.nn.functional.conv2d(z[-1], block.of_z.weight, block.of_z.bias)
            y_of[stage] = stream + apply(block.net, stream)
    out = torch.nn.functional.conv2d(down.gain * y_of[0] + down.bias, down.last.weight, down.last.bias)
    return torch.cat([part.flatten(1) for part in z], 1), qs, ps, out


def noise_of(model: Any, n: int) -> list[Tensor]:
    """The noise that the model draws next: for the coarse block, then for the two fine ones."""
    return [torch.randn(n, 2, *grid, dtype=torch.float64) for grid in ((2, 3), (4, 6), (4, 6))]


def test_vdvae_bound_and_gradients_match_paper(shifted: Any) -> None:
    model, x = deep(shifted), images()
    torch.manual_seed(2)
    found = model.loss(x)
    torch.manual_seed(2)
    _, q, p, out = written_out(model, x, noise_of(model, 5))
    fit = -D.Bernoulli(logits=out, validate_args=False).log_prob(x).flatten(1).sum(1).mean()
    kl_BN = torch.stack([D.kl_divergence(*pair).flatten(1).sum(1) for pair in zip(q, p, strict=True)], 1)
    kl = kl_BN.sum(1).mean()
    assert (kl_BN.mean(0) > 0.1).all()
    expected = {"loss": fit + kl, "nll": fit, "kl": kl, "elbo": -(fit + kl)}
    assert set(found) == set(expected)
    for term, value in expected.items():
        torch.testing.assert_close(found[term], value, rtol=1e-9, atol=1e-9)
    weights = [*model.parameters()]
    for a, b in zip(
        torch.autograd.grad(found["loss"], weights), torch.autograd.grad(expected["loss"], weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        assert b.any()


@pytest.mark.slow
def test_vdvae_codes_scores_densities_match_its_groups(shifted: Any) -> None:
    model, x, n = deep(shifted).eval(), images(), 1500
    with torch.no_grad():
        code, q, p, out = written_out(model, x, [torch.zeros(()).double()] * 3)
        torch.testing.assert_close(model.encode(x), code)
        torch.testing.assert_close(model(x), out.sigmoid())
        torch.testing.assert_close(model.decode(code), out.sigmoid())
        kl = sum(D.kl_divergence(*pair).flatten(1).sum(1) for pair in zip(q, p, strict=True))
        fit = -D.Bernoulli(logits=out, validate_args=False).log_prob(x).flatten(1).sum(1)
        torch.testing.assert_close(model.score(x), fit + kl)
        log_std = torch.cat([d.scale.log().flatten(1) for d in q], 1)
        torch.testing.assert_close(model.posterior(x)[1], 2 * log_std)
        # many draws for one image
        torch.manual_seed(3)
        z_KBD, log_q_KB = model.sample_posterior(x[:1], n)
        torch.manual_seed(3)
        noise = noise_of(model, n)
        z, q, p, out = written_out(model, x[:1].expand(n, 1, 4, 6), noise)
        torch.testing.assert_close(z_KBD[:, 0], z)
        parts = [part.unflatten(1, d.loc.shape[1:]) for part, d in zip(z.split((12, 48, 48), 1), q, strict=True)]
        for found, ds in ((log_q_KB, q), (model.log_prior(z_KBD), p)):
            density = sum(d.log_prob(part).flatten(1).sum(1) for d, part in zip(ds, parts, strict=True))
            torch.testing.assert_close(found[:, 0], density)
        torch.testing.assert_close(model.decode(z_KBD[:, 0]), out.sigmoid())
        # the distributions of each group given the earlier ones, which the codec uses
        many, flat = x[:1].expand(n, 1, 4, 6), [part.flatten(1) for part in parts]
        for i, layer in enumerate(model.latent_chain().layers):
            for (mean, scale), d in ((layer.posterior(many, flat[:i]), q[i]), (layer.prior(flat[:i], n), p[i])):
                torch.testing.assert_close(mean, d.loc.flatten(1))
                torch.testing.assert_close(scale, d.scale.flatten(1))
        # draws from the prior, standardised with its means and scales, are standard normal
        drawn = model.sample_prior(n)
        levels = model.decoder.forward_levels(n, codes=[*drawn.split((12, 48, 48), 1)])[1]
        free = torch.cat([(level.z - level.m) * torch.exp(-0.5 * level.log_s2) for level in levels], 1)
        assert torch.equal(torch.cat([level.z for level in levels], 1), drawn)
        torch.testing.assert_close(free.mean(0), torch.zeros(108).double(), rtol=0, atol=5 / math.sqrt(n))
        torch.testing.assert_close(free.T.cov(), torch.eye(108).double(), rtol=0, atol=8 / math.sqrt(n))


@pytest.mark.slow
def test_vdvae_log_likelihood_is_importance_bound(shifted: Any) -> None:
    """A single pass equals the three steps of the VAE for any number of rows; the bound rises from the ELBO."""
    model, x = deep(shifted), images()
    for n in (1, 7):
        torch.manual_seed(4)
        one = model.log_likelihood(x, n)
        torch.manual_seed(4)
        torch.testing.assert_close(one, aezoo.model_class("vae").log_likelihood(model, x, n))
        assert not one.requires_grad
    with torch.no_grad():
        elbo = torch.stack([model.loss(x)["elbo"] for _ in range(200)]).mean().item()
    bounds = [
        torch.stack([model.log_likelihood(x, n).mean() for _ in range(r)]).mean() for n, r in ((1, 300), (30, 20))
    ]
    assert bounds[0].item() == pytest.approx(elbo, abs=0.5)
    assert bounds[1] > bounds[0] + 1
    rows: list[int] = []
    model.decoder.last.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    wide = images(4, (1, 4, 6)).repeat(25, 1, 1, 1)
    model.width = 1024  # only to limit rows: 2^23 / (1024 * 24) fit
    model.log_likelihood(wide, 10)
    assert sum(rows) == 1000
    assert max(rows) == 300
    with pytest.raises(aezoo.AezooError, match="at least 1"):
        model.log_likelihood(x, 0)


def test_one_block_equals_flat_vae(shifted: Any) -> None:
    """With the initial prior N(0, I) the bound is that of the VAE."""
    model = deep(None, enc_blocks=(1,), dec_blocks=(1,))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("decoder.stages.0.0.p."):
                p += 0.2 * torch.randn_like(p)
        model.decoder.starts[0].zero_()
    x = images()
    mu, log_var = model.posterior(x)
    terms = model.loss(x)
    torch.testing.assert_close(terms["kl"], model.kl(mu, log_var).mean())
    assert terms["kl"] > 1
    z = torch.randn(4, 48).double()
    torch.testing.assert_close(model.log_prior(z), aezoo.model_class("vae").log_prior(model, z))


def test_init_has_standard_priors_and_depth_scaling() -> None:
    torch.manual_seed(0)
    model = aezoo.create_model("vdvae", input_shape=(3, 16, 16), width=32, enc_blocks=(3, 4, 2), dec_blocks=(7, 5, 4))
    x = torch.rand(4, 3, 16, 16)
    _, levels = model.infer(x)
    assert len(levels) == 16
    for level in levels:
        assert not level.m.any()
        assert not level.log_s2.any()
    # p_net adds nothing to the stream: without z and net the stream is the sum of the starts
    with torch.no_grad():
        starts = [start.normal_() for start in model.decoder.starts]
        for name, p in model.decoder.named_parameters():
            if ".of_z." in name or name.endswith((".net.7.weight", ".net.7.bias")):
                p.zero_()
    seen: list[Tensor] = []
    model.decoder.last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.infer(x)
    up = torch.nn.functional.interpolate
    whole = starts[0] + up(starts[1][None] + up(starts[2][None], scale_factor=2), scale_factor=2)
    torch.testing.assert_close(seen[0], whole.expand(4, 32, 16, 16))
    # the usual bound of torch's convolutions is 1 / sqrt(fan in)
    fresh = aezoo.create_model("vdvae", input_shape=(3, 16, 16), width=32, enc_blocks=(3, 4, 2), dec_blocks=(7, 5, 4))
    for block in [block for stage in fresh.decoder.stages for block in stage]:
        for weight, bound in (
            (block.net[-1].weight, math.sqrt(1 / 16 / 8)), (block.of_z.weight, math.sqrt(1 / 16 / 4)),
            (block.q[-1].weight, math.sqrt(1 / 8)), (block.net[3].weight, math.sqrt(1 / 72)),
        ):  # fmt: skip
            assert 0.9 * bound < weight.abs().max() <= bound
        assert not block.p[-1].weight.any()
        assert block.p[1].weight.any()
    for net in [net for stage in fresh.encoder.stages for net in stage]:
        assert 0.9 * math.sqrt(1 / 9 / 8) < net[-1].weight.abs().max() <= math.sqrt(1 / 9 / 8)
    assert not any(p.any() for name, p in fresh.named_parameters() if name.endswith("bias"))


def test_blocks_have_the_published_shapes() -> None:
    """https://github.com/openai/vdvae, vae.py: class Block, DecBlock and Decoder with width 32, zdim 5."""
    model = aezoo.create_model(
        "vdvae", input_shape=(3, 8, 8), width=32, latent_channels=5, enc_blocks=(1, 1, 1, 1), dec_blocks=(1, 1, 1, 2)
    )
    assert model.code_shape == (5 * (1 + 1 + 4 + 16 + 64),)

    def shapes(net: Any) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")]

    def bottleneck(n_in: int, n_out: int, kernel: int) -> list[tuple[int, ...]]:
        return [(8, n_in, 1, 1), (8, 8, kernel, kernel), (8, 8, kernel, kernel), (n_out, 8, 1, 1)]

    for i, kernel in enumerate((3, 3, 1, 1)):  # 3x3 kernels for grids above 2x2
        assert shapes(model.encoder.stages[i]) == bottleneck(32, 32, kernel)
        for block in model.decoder.stages[i]:
            assert shapes(block.q) == bottleneck(64, 10, kernel)
            assert shapes(block.p) == bottleneck(32, 10 + 32, kernel)
            assert shapes(block.of_z) == [(32, 5, 1, 1)]
            assert shapes(block.net) == bottleneck(32, 32, kernel)
            for layer, kind in zip(block.net, [torch.nn.GELU, torch.nn.Conv2d] * 4, strict=True):
                assert isinstance(layer, kind)
    assert len(model.decoder.stages[3]) == 2
    assert [tuple(start.shape) for start in model.decoder.starts] == [(32, n, n) for n in (8, 4, 2, 1)]
    assert shapes(model.encoder.first) == [(32, 3, 3, 3)]
    assert shapes(model.decoder.last) == [(3, 32, 1, 1)]
    big = aezoo.create_model("vdvae", input_shape=(1, 70, 130), width=4)
    assert [tuple(start.shape) for start in big.decoder.starts] == [(4, 1, 1), (4, 1, 1), (4, 18, 33)]


@pytest.mark.parametrize(
    ("shape", "grids"),
    [
        ((1, 28, 28), [(28, 28), (14, 14), (7, 7)]),
        ((3, 32, 32), [(32, 32), (16, 16), (8, 8)]),
        ((1, 27, 35), [(27, 35), (14, 18), (7, 9)]),
        ((2, 5, 1), [(5, 1), (3, 1), (2, 1)]),
        ((1, 2, 1), [(2, 1), (1, 1), (1, 1)]),
    ],
)
def test_resolutions_halve_for_any_image_size(shape: tuple[int, ...], grids: list[tuple[int, int]]) -> None:
    model = aezoo.create_model("vdvae", input_shape=shape, width=4, latent_channels=1)
    x = torch.rand(2, *shape)
    assert [tuple(a.shape[2:]) for a in model.encoder(x)] == grids
    assert model.decoder.sizes == [
        math.prod(grid) for grid, n in zip(grids[::-1], (2, 1, 1), strict=True) for _ in range(n)
    ]
    # at an odd edge a pooled value is the mean of fewer values
    with torch.no_grad():
        for stage in model.encoder.stages:
            for layer in (layer for net in stage for layer in net if hasattr(layer, "weight")):
                layer.weight.zero_()
    fine, coarse = model.encoder(x)[:2]
    for i, j in ((0, 0), (grids[1][0] - 1, grids[1][1] - 1)):
        torch.testing.assert_close(coarse[:, :, i, j], fine[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3)))
    assert model.sample(2).shape == model(x).shape == (2, *shape)


@pytest.mark.slow
def test_lossless_coding_rate_matches_bound(digits: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = aezoo.create_model("vdvae", input_shape=(1, 8, 8), **BLOCKS).eval()
    x = (digits[:200] > 0.5).float()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        nats = [model.loss(x) for _ in range(50)]
    bits = [len(x) * float(terms[name]) / math.log(2) for name in ("loss", "kl") for terms in nats]
    found = compress(model, x, mode="lossless", compare=False, out=str(tmp_path))
    assert np.array_equal(decompress(model, str(tmp_path / "samples.aez")).x, (255 * x).byte().numpy())
    assert found.net_bits == pytest.approx(np.mean(bits[:50]), rel=0.03)
    assert np.mean(bits[50:]) > 0.05 * np.mean(bits[:50])  # the latent variables have a share of the rate


@pytest.mark.parametrize(
    ("shape", "settings", "word"),
    [
        ((30,), {}, "images"),
        ((3, 128), {}, "images"),
        ((1, 12, 12, 12), {}, "images"),
        ((1, 8, 8), {"enc_blocks": ()}, "enc_blocks"),
        ((1, 8, 8), {"enc_blocks": (1, 1)}, "the same number for both"),
        ((1, 8, 8), {"dec_blocks": (1, 0, 1)}, "at least 1"),
        ((1, 8, 8), {"width": 0}, "width"),
        ((1, 8, 8), {"latent_channels": 0}, "latent_channels"),
    ],
)
def test_invalid_vdvae_settings_are_refused(shape: tuple[int, ...], settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        aezoo.create_model("vdvae", input_shape=shape, **settings)
