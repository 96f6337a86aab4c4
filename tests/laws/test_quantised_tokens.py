"""Laws of the models whose code is a row of tokens without a grid: titok, soft_vq, and the networks that both share."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn
from two_ranks import on_two_ranks

import aezoo
from aezoo.errors import AezooError
from aezoo.models.quantised.soft_vq import SoftVQ
from aezoo.models.quantised.titok import TiTok
from aezoo.nets import vit
from aezoo.nets.blocks import tokens
from aezoo.quantisers.vq import VQ
from aezoo.testing import SharedNoise, check_ddp, subject_of

SHAPE, K, N, DIM = (1, 8, 8), 11, 5, 6
SMALL: dict[str, Any] = {
    "n_tokens": N,
    "latent_dim": DIM,
    "codebook_size": K,
    "width": 12,
    "depth": 1,
    "decoder_width": 10,
    "decoder_depth": 1,
}
both = pytest.mark.parametrize("name", ["titok", "soft_vq"])


def small(name: str, shifted: Any, shape: tuple[int, ...] = SHAPE, **settings: Any) -> Any:
    """A model away from its initial weights, in float64, its codes where its rows lie."""
    torch.manual_seed(0)
    model = shifted(aezoo.create_model(name, input_shape=shape, **{**SMALL, **settings})).double()
    with torch.no_grad():
        model.init_from_data(torch.rand(40, *shape, dtype=torch.float64))
        model.encoder.bias_DN += 0.3 * torch.randn_like(model.encoder.bias_DN)
        codes = model.quantiser.code_KD if name == "titok" else model.code_KD
        codes += 0.05 * torch.randn_like(codes)
    return model


def data(n: int = 6, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def rows_of_encoder(encoder: Any, x: Tensor) -> np.ndarray:
    """Tokens as numpy sees them, (B, N, D)."""
    return np.asarray(encoder(x).detach().numpy().swapaxes(1, 2))


def rows_of(model: Any, x: Tensor) -> np.ndarray:
    """What is quantised, (B, N, D)."""
    return rows_of_encoder(model.encoder, x)


def squares(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """||z - e||^2 of all pairs, (B, N, D), (K, D) -> (B, N, K)."""
    return np.asarray(((rows[:, :, None] - codes) ** 2).sum(-1))


def bernoulli(model: Any, code: np.ndarray, x: Tensor) -> float:
    """-log p(x | codes) summed over the sample, mean over the batch: codes (B, N, D)."""
    logits = model.decoder(torch.from_numpy(code.swapaxes(1, 2).copy())).detach()
    return float(-D.Bernoulli(logits=logits, validate_args=False).log_prob(x).flatten(1).sum(1).mean())


# ---- networks --------------------------------------------------------------------------------------------------------


def nets(shape: tuple[int, ...] = SHAPE, n: int = N) -> tuple[tokens.TokenEncoder, tokens.TokenDecoder]:
    patchify = vit.Patchify(shape)
    encoder = tokens.TokenEncoder(patchify, (DIM, n), (12, 8), "gelu").double()
    return encoder, tokens.TokenDecoder(patchify, (DIM, n), (8, 12), "gelu").double()


@pytest.mark.parametrize(
    "shape",
    [(1, 28, 28), (3, 32, 32), (1, 27, 35), (1, 64, 48), (3, 50), (2, 6, 5, 7)],
    ids=lambda s: "x".join(map(str, s)),
)
@both
def test_the_number_of_tokens_is_that_asked_for_whatever_the_size(name: str, shape: tuple[int, ...]) -> None:
    model, x = aezoo.create_model(name, input_shape=shape, **SMALL).eval(), torch.rand(2, *shape)
    assert model.code_shape == model.encode(x).shape[1:] == (DIM, N)
    assert model(x).shape == x.shape
    if name == "titok":
        assert model.index_shape == model.encode_indices(x).shape[1:] == (1, N)
        assert model.decode_indices(torch.zeros(2, 1, N, dtype=torch.long)).shape == x.shape


def test_every_token_reads_every_patch() -> None:
    for shape in (SHAPE, (2, 12), (1, 4, 4, 4)):
        encoder, _ = nets(shape)
        x = data(1, shape).requires_grad_()
        for d in range(DIM):
            for token in encoder(x)[0, d]:
                (by_value,) = torch.autograd.grad(token, x, retain_graph=True)
                assert (encoder.embed[0](by_value)[0].abs().amax(1) > 1e-9).all()


def test_every_patch_is_written_from_every_token() -> None:
    _, decoder = nets()
    code = torch.randn(1, DIM, N, dtype=torch.float64)
    by_code = torch.autograd.functional.jacobian(decoder, code)[0, :, :, :, 0]  # (C, H, W, D, N)
    assert (by_code.abs().amax(3) > 1e-9).all()


def test_latent_tokens_permuted_give_tokens_permuted() -> None:
    """Each token of the code is the output of its own latent token, in its order."""
    encoder, decoder = nets()
    x, order = data(3), torch.tensor([3, 1, 4, 0, 2])
    code = encoder(x)
    with torch.no_grad():
        encoder.latent_NW.copy_(encoder.latent_NW[order])
        encoder.bias_DN.copy_(encoder.bias_DN[:, order])
    torch.testing.assert_close(encoder(x), code[..., order])
    x_hat = decoder(code)
    with torch.no_grad():
        decoder.place_NW.copy_(decoder.place_NW[order])
    torch.testing.assert_close(decoder(code[..., order]), x_hat)
    assert not torch.allclose(decoder(code), x_hat)  # the order of tokens says something


def test_rows_reshaped_instead_of_transposed_mix_the_tokens() -> None:
    """1d-tokenizer's `is_legacy` takes (B, N, W) for (B, W, N), so that a channel of the code mixes tokens."""

    class Legacy(tokens.TokenEncoder):
        def read(self, patches_BPW: Tensor) -> Tensor:
            code_BDN = super().read(patches_BPW)
            return code_BDN.transpose(1, 2).reshape(code_BDN.shape)

    legacy = Legacy(vit.Patchify(SHAPE), (DIM, N), (12, 8), "gelu").double()
    x, order = data(3), torch.tensor([3, 1, 4, 0, 2])
    code = legacy(x)
    with torch.no_grad():
        legacy.latent_NW.copy_(legacy.latent_NW[order])
    assert not torch.allclose(legacy(x), code[..., order])


def test_the_start_brings_each_token_to_mean_0_and_each_channel_to_variance_1(shifted: Any) -> None:
    encoder, x = shifted(nets()[0]), data(9)
    before = rows_of_encoder(encoder, x)
    encoder.init_from_data(x)
    after = rows_of_encoder(encoder, x)
    centred = before - before.mean(0)
    np.testing.assert_allclose(after, centred / np.sqrt((centred**2).mean((0, 1))), rtol=1e-7, atol=1e-9)


def test_the_start_from_one_sample_or_from_samples_alike_is_finite() -> None:
    for x in (data(1), data(1).expand(7, *SHAPE)):
        encoder, _ = nets()
        weight = encoder.out.weight.clone()
        encoder.init_from_data(x)
        torch.testing.assert_close(encoder.out.weight, weight)
        torch.testing.assert_close(encoder(x), torch.zeros(len(x), DIM, N, dtype=torch.float64))


def attention(layer: vit.Attention, x: np.ndarray) -> np.ndarray:
    """Self-attention of one sample, (P, W), written out in numpy."""
    q, k, v = (x @ w.T for w in np.split(layer.qkv.weight.detach().numpy(), 3))
    q = q + layer.bias_q.detach().numpy()
    parts = []
    for head in np.split(np.arange(x.shape[1]), layer.heads):
        p = scipy.special.softmax(q[:, head] @ k[:, head].T / math.sqrt(len(head)), axis=1)
        parts.append(p @ v[:, head])
    return apply(layer.out, np.concatenate(parts, 1))


def apply(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    return np.asarray(layer(torch.from_numpy(x)).detach().numpy())


def transformer(blocks: nn.Sequential, x: np.ndarray) -> np.ndarray:
    for layer in blocks:
        if isinstance(layer, vit.Block):
            x = x + attention(layer.attention, apply(layer.norm_1, x))
            x = x + apply(layer.mlp, apply(layer.norm_2, x))
        else:
            x = apply(layer, x)
    return x


def test_encoder_and_decoder_are_the_published_ones(shifted: Any) -> None:
    """Written out in numpy for one sample: concatenate, transform, keep the tokens of one kind, read them."""
    encoder, decoder = (shifted(net) for net in nets())
    x = data(1)
    cells = x[0, 0].numpy().reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(16, 4)
    seen = apply(encoder.embed[1], cells) + encoder.position_PW.detach().numpy()
    latent = encoder.latent_NW.detach().numpy()
    out = transformer(encoder.blocks, np.concatenate([seen, latent]))[16:]
    code = apply(encoder.out, out).T + encoder.bias_DN.detach().numpy()
    np.testing.assert_allclose(encoder(x)[0].detach().numpy(), code, rtol=1e-8, atol=1e-9)

    written = apply(decoder.embed, code.T.copy()) + decoder.place_NW.detach().numpy()
    mask = decoder.mask_W.detach().numpy() + decoder.position_PW.detach().numpy()
    out = transformer(decoder.blocks, np.concatenate([mask, written]))[:16]
    picture = apply(decoder.out, out).reshape(4, 4, 2, 2).swapaxes(1, 2).reshape(8, 8)
    np.testing.assert_allclose(decoder(encoder(x))[0, 0].detach().numpy(), picture, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", [3, 16, 21])
def test_at_the_start_each_token_meets_its_run_of_patches(n: int) -> None:
    """By the scores of the first attention: runs in order, all of them greater than those of the other patches."""
    torch.manual_seed(0)
    patchify, width = vit.Patchify(SHAPE), 128
    encoder = tokens.TokenEncoder(patchify, (DIM, n), (width,), "gelu")
    decoder = tokens.TokenDecoder(patchify, (DIM, n), (width,), "gelu")
    longest = max(n, 16)
    run = np.zeros((n, 16), dtype=bool)
    for step in range(longest):
        run[step * n // longest, step * 16 // longest] = True
    for net, queries, keys in (
        (encoder, encoder.latent_NW, encoder.position_PW),
        (decoder, decoder.position_PW, decoder.place_NW),
    ):
        q, k, _ = np.split(net.blocks.get_parameter("0.attention.qkv.weight").detach().numpy(), 3)
        np.testing.assert_allclose(q @ q.T, 2.25 * np.eye(width), atol=1e-4)
        np.testing.assert_allclose(k @ k.T, 2.25 * np.eye(width), atol=1e-4)
        scores = (queries.detach().numpy() @ q.T) @ (keys.detach().numpy() @ k.T).T
        scores = scores if net is encoder else scores.T
        assert scores[run].min() > scores[~run].max()
        own = 2.25 * width / np.sqrt(run.sum(1))  # E ||position||^2 is the width
        np.testing.assert_allclose((scores * run).sum(1) / run.sum(1), own, rtol=0.35)


@both
def test_the_code_does_not_depend_on_the_decoder(name: str, shifted: Any) -> None:
    model, x = small(name, shifted).eval(), data()
    code = model.encode(x)
    by_decoder = torch.autograd.grad(code.sum(), [*model.decoder.parameters()], allow_unused=True)
    assert all(g is None for g in by_decoder)
    shifted(model.decoder)
    assert torch.equal(model.encode(x), code)


# ---- titok -----------------------------------------------------------------------------------------------------------


def reference_titok(model: Any, x: Tensor, beta: float, wrong: bool = False) -> dict[str, float]:
    """Terms of equation 2 with codes l2-normalised, by numpy; wrong puts beta on the codebook's term."""
    u, codes = rows_of(model, x), model.quantiser.code_KD.detach().numpy()
    if model.quantiser.cosine:
        u, codes = unit(u), unit(codes)
    z_q = codes[squares(u, codes).argmin(-1)]
    distance = float(((u - z_q) ** 2).sum((1, 2)).mean())
    terms = {"nll": bernoulli(model, z_q, x), "commitment": distance}
    if not model.quantiser.uses_ema:
        terms["codebook"] = distance
    return {"loss": terms["nll"] + beta * distance + terms.get("codebook", 0), **terms}


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_the_loss_of_titok_is_its_formula(update: str, cosine: bool, shifted: Any) -> None:
    model, x = small("titok", shifted, update=update, cosine=cosine, beta=0.3).eval(), data()
    terms, wanted = model.loss(x), reference_titok(model, x, 0.3)
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9), name
    assert wanted["commitment"] > 1e-3


def beta_law(cls: type[TiTok], shifted: Any) -> None:
    """Beta scales what moves the encoder and leaves what moves the codes."""
    x, found = data(), {}
    for beta in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        model: Any = shifted(cls(SHAPE, **SMALL, update="gradient", beta=beta, data_init=False)).double().eval()
        terms = model.loss(x)
        rest = terms["loss"] - terms["nll"]
        found[beta] = rest, *torch.autograd.grad(rest, (model.quantiser.code_KD, model.encoder.out.weight))
    assert found[1.0][1].abs().max() > 1e-3
    assert found[1.0][2].abs().max() > 1e-3
    for beta, (rest, by_codes, by_encoder) in found.items():
        torch.testing.assert_close(rest, found[1.0][0] * (1 + beta) / 2)
        torch.testing.assert_close(by_codes, found[1.0][1])
        torch.testing.assert_close(by_encoder, found[1.0][2] * beta)


class BetaOnTheCodebook(TiTok):
    """1d-tokenizer #95, as taming-transformers before it: sg(z) in the term that beta weights."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        loss = terms["nll"] + terms["commitment"] + self.beta * terms["codebook"]
        return terms | {"loss": loss}


class BetaOnBoth(TiTok):
    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        return terms | {"loss": terms["nll"] + self.beta * (terms["commitment"] + terms["codebook"])}


def test_beta_weighs_the_commitment_alone(shifted: Any) -> None:
    beta_law(TiTok, shifted)


@pytest.mark.parametrize("rival", [BetaOnTheCodebook, BetaOnBoth])
def test_beta_on_another_term_breaks_the_law(rival: Any, shifted: Any) -> None:
    with pytest.raises(AssertionError):
        beta_law(rival, shifted)


def test_codes_of_titok_lie_on_the_sphere_and_do_not_see_the_length_of_z(shifted: Any) -> None:
    model, x = small("titok", shifted).eval(), data()
    code = model.encode(x)
    torch.testing.assert_close(code.norm(dim=1), torch.ones(6, N, dtype=torch.float64))
    with torch.no_grad():
        model.encoder.out.weight *= 7
        model.encoder.bias_DN *= 7
        model.quantiser.code_KD *= torch.linspace(0.5, 3, K, dtype=torch.float64)[:, None]
    torch.testing.assert_close(model.encode(x), code)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_indices_go_there_and_back_after_training(update: str, shifted: Any) -> None:
    model, x = small("titok", shifted, update=update).train(), data(20)
    optimiser = torch.optim.Adam(model.parameters(), 1e-5)
    before = model.quantiser.codebook().clone()
    for _ in range(5):
        optimiser.zero_grad()
        model.loss(x)["loss"].backward()
        optimiser.step()
    model.eval()
    indices = model.encode_indices(x)
    assert not torch.equal(model.quantiser.codebook(), before)
    assert len(indices.unique()) > 2
    torch.testing.assert_close(model.codes(indices), model.encode(x))
    torch.testing.assert_close(model.decode_indices(indices), model(x))
    codes = unit(model.quantiser.code_KD.detach().numpy())
    nearest = squares(unit(rows_of(model, x)), codes).argmin(-1)
    assert np.array_equal(indices[:, 0].numpy(), nearest)
    torch.testing.assert_close(model.encode(x), torch.from_numpy(codes[nearest].swapaxes(1, 2).copy()))


def test_the_gradient_passes_the_quantiser_straight_through(shifted: Any) -> None:
    """With cosine, through z / ||z|| too: what reaches z is what reaches z_q, less its part along z, over ||z||."""
    model, x = small("titok", shifted, beta=0.0).eval(), data(3)
    z = model.encoder(x)
    z_q = model.quantiser(z).z_q
    by_q, by_z = torch.autograd.grad(model.nll(model.decoder(z_q), x).sum(), (z_q, z))
    u, norm = F.normalize(z, dim=1), z.norm(dim=1, keepdim=True)
    torch.testing.assert_close(by_z, (by_q - u * (by_q * u).sum(1, keepdim=True)) / norm)
    assert by_z.abs().max() > 1e-4


# ---- soft_vq: the mixture --------------------------------------------------------------------------------------------


def reference_mixtures(model: Any, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """P and z_q by scipy, (B, N, K), (B, N, D)."""
    rows, codes = rows_of(model, x), model.code_KD.detach().numpy()
    if model.cosine:
        rows, codes = unit(rows), unit(codes)
    p = scipy.special.softmax(-squares(rows, codes) / model.temperature, axis=-1)
    return p, p @ codes


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("temperature", [0.05, 0.14, 1.0, 7.0])
def test_the_mixture_is_the_softmax_of_squared_distances(temperature: float, cosine: bool, shifted: Any) -> None:
    model, x = small("soft_vq", shifted, temperature=temperature, cosine=cosine).eval(), data()
    z_q, p = model.mixtures(x)
    wanted_p, wanted_q = reference_mixtures(model, x)
    np.testing.assert_allclose(p.detach().numpy(), wanted_p, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(z_q.detach().numpy().swapaxes(1, 2), wanted_q, rtol=1e-8, atol=1e-12)
    assert torch.equal(model.encode(x), z_q)
    torch.testing.assert_close(model(x), model.decode(z_q))


def test_with_cosine_it_is_the_softmax_of_cosines_over_half_the_temperature(shifted: Any) -> None:
    """As the paper's code has it, temperature 0.07."""
    model, x = small("soft_vq", shifted, temperature=0.14).eval(), data()
    cosines = F.cosine_similarity(model.encoder(x).transpose(1, 2)[:, :, None], model.code_KD, dim=-1)
    torch.testing.assert_close(model.mixtures(x)[1], (cosines / 0.07).softmax(-1))


@pytest.mark.parametrize("cosine", [True, False])
def test_a_low_temperature_gives_the_nearest_code_of_vq_and_a_high_one_the_mean(cosine: bool, shifted: Any) -> None:
    model, x = small("soft_vq", shifted, temperature=1e-7, cosine=cosine).eval(), data()
    vq = VQ(DIM, K, update="gradient", cosine=cosine).double().eval()
    with torch.no_grad():
        vq.code_KD.copy_(model.code_KD)
    found = vq(model.encoder(x))
    torch.testing.assert_close(model.encode(x), found.z_q)
    assert len(found.indices.unique()) > 1
    terms = model.loss(x)
    assert terms["entropy"].item() == pytest.approx(0, abs=1e-9)
    share = np.bincount(found.indices.flatten().numpy(), minlength=K) / (6 * N)
    assert terms["diversity"].item() == pytest.approx(N * scipy.stats.entropy(share), rel=1e-9)

    model.temperature = 1e9
    codes = F.normalize(model.code_KD, dim=1) if cosine else model.code_KD
    torch.testing.assert_close(model.encode(x), codes.mean(0)[None, :, None].expand(6, DIM, N), rtol=1e-6, atol=1e-7)
    for name in ("entropy", "diversity"):
        assert model.loss(x)[name].item() == pytest.approx(N * math.log(K), rel=1e-9)


@pytest.mark.parametrize("cosine", [True, False])
def test_codes_and_encoder_get_the_gradient_of_the_mixture_itself(cosine: bool, shifted: Any) -> None:
    """By finite differences: straight-through would give the encoder another gradient and the codes none."""
    model, x = small("soft_vq", shifted, temperature=0.5, cosine=cosine, entropy_weight=0.7), data(3)
    terms = model.loss(x)
    checked = (model.code_KD, model.encoder.out.weight, model.encoder.latent_NW)
    for p, gradient in zip(checked, torch.autograd.grad(terms["loss"], checked), strict=True):
        direction = torch.randn_like(p)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p += step * direction
                values.append(model.loss(x)["loss"].item())
                p -= step * direction
        slope = (values[0] - values[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4)
        assert abs(slope) > 1e-3


def test_straight_through_would_fail_the_finite_differences(shifted: Any) -> None:
    class Straight(SoftVQ):
        def mixtures(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = F.normalize(self.encoder(x), dim=1)
            z_q, p = super().mixtures(x)
            return z_q.detach() + (z - z.detach()), p

    torch.manual_seed(0)
    model, x = shifted(Straight(SHAPE, **SMALL, entropy_weight=0.0)).double(), data(3)
    weight = model.encoder.out.weight
    (gradient,) = torch.autograd.grad(model.loss(x)["loss"], weight)
    direction, values = torch.randn_like(weight), []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight += step * direction
            values.append(model.loss(x)["loss"].item())
            weight -= step * direction
    assert (gradient * direction).sum().item() != pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-2)


# ---- soft_vq: entropies ----------------------------------------------------------------------------------------------


def reference_soft(model: Any, x: Tensor) -> dict[str, float]:
    p, z_q = reference_mixtures(model, x)
    terms = {
        "nll": bernoulli(model, z_q, x),
        "entropy": float(scipy.stats.entropy(p, axis=-1).sum(1).mean()),
        "diversity": N * float(scipy.stats.entropy(p.mean((0, 1)))),
    }
    loss = terms["nll"] + model.entropy_weight * (terms["entropy"] - model.gamma * terms["diversity"])
    return {"loss": loss, **terms}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cosine", [True, False])
def test_the_loss_of_soft_vq_is_its_formula(cosine: bool, training: bool, shifted: Any) -> None:
    model = small("soft_vq", shifted, temperature=0.4, entropy_weight=0.7, gamma=1.6, cosine=cosine).train(training)
    x = data()
    terms, wanted = model.loss(x), reference_soft(model, x)
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-8), name
    assert 0.1 < wanted["entropy"] < wanted["diversity"] < N * math.log(K)


def entropies_at(p: Tensor) -> Tensor:
    """What the regulariser of a model is at given mixtures, (B, N, K) -> (), with gamma 1."""
    model = SoftVQ(SHAPE, **{**SMALL, "n_tokens": p.shape[1]}, entropy_weight=1.0).double()
    model.mixtures = lambda x: (torch.zeros(len(p), DIM, p.shape[1], dtype=torch.float64), p)  # type: ignore[method-assign]
    terms = model.loss(data(len(p)))
    return terms["loss"] - terms["nll"]


def test_the_regulariser_is_least_where_each_token_is_one_code_and_all_are_used() -> None:
    """There it is -N log K; 0 for equal mixtures of any kind; between these else, by the concavity of entropy."""
    best = F.one_hot(torch.arange(K).repeat(N).reshape(K, N), K).double()
    assert entropies_at(best).item() == pytest.approx(-N * math.log(K))
    same = torch.full((K, N, K), 1 / K, dtype=torch.float64)
    one = F.one_hot(torch.zeros(K, N, dtype=torch.long), K).double()
    for p in (same, one, torch.rand(K, dtype=torch.float64).softmax(0).expand(K, N, K)):
        assert entropies_at(p).item() == pytest.approx(0, abs=1e-9)
    for spread in (0.5, 2.0, 8.0):
        p = (spread * torch.randn(K, N, K, dtype=torch.float64)).softmax(2)
        assert -N * math.log(K) < entropies_at(p).item() < 0
    # a step from the best goes up in every direction that mixtures can take
    for _ in range(5):
        other = torch.randn(K, N, K, dtype=torch.float64).softmax(2)
        assert entropies_at(0.99 * best + 0.01 * other) > entropies_at(best)


def test_mixtures_of_one_code_have_finite_gradients(shifted: Any) -> None:
    model = small("soft_vq", shifted, temperature=1e-6)
    model.loss(data())["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_use_of_codes_is_that_of_both_ranks(shifted: Any) -> None:
    """Two ranks give the loss and the gradients of one; entropies of each rank's own use would give others."""
    model, x = small("soft_vq", shifted, temperature=0.4, entropy_weight=2.0), data(8)
    x[:4] *= 0.1  # the ranks differ in what they use
    with SharedNoise(range(8), 8):
        whole = model.loss(x)
    wanted = torch.autograd.grad(whole["loss"], [*model.parameters()])
    ranks, alone = on_two_ranks(model, x), on_two_ranks(model, x, exchange=False)
    for name in whole:
        torch.testing.assert_close(ranks.terms[name], whole[name], rtol=1e-9, atol=1e-9)
    for found, expected in zip(ranks.gradients(), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert alone.terms["diversity"] < whole["diversity"] - 1e-3


@pytest.mark.slow  # test_models has the defaults
def test_two_processes_train_like_one() -> None:
    settings = {**SMALL, "codebook_size": 7}
    check_ddp(
        subject_of("titok", **settings),
        subject_of("titok", **settings, update="gradient", cosine=False),
        subject_of("soft_vq", **settings, entropy_weight=2.0),
    )


# ---- starts and refusals ---------------------------------------------------------------------------------------------


def test_the_codes_of_soft_vq_start_where_k_means_puts_them() -> None:
    """With as many codes as different rows, each row is a code."""
    torch.manual_seed(0)
    model, x = SoftVQ(SHAPE, **{**SMALL, "codebook_size": 3 * N}, temperature=1e-4), torch.rand(3, *SHAPE)
    with torch.no_grad():
        model.init_from_data(x)
    rows = torch.from_numpy(unit(rows_of(model, x))).flatten(0, 1)
    assert torch.cdist(rows, model.code_KD).amin(1).max() < 1e-3
    torch.testing.assert_close(model.encode(x).transpose(1, 2).flatten(0, 1), rows, rtol=0, atol=1e-2)


def test_the_code_of_soft_vq_is_written_in_no_indices() -> None:
    assert not SoftVQ.discrete_code
    assert TiTok.discrete_code


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        *[(name, {key: 0}, key) for name in ("titok", "soft_vq") for key in SMALL],
        ("titok", {"beta": -1.0}, "beta"),
        ("titok", {"beta": math.nan}, "beta"),
        ("titok", {"patch_size": -1}, "patch_size"),
        ("soft_vq", {"temperature": 0.0}, "temperature"),
        ("soft_vq", {"temperature": math.inf}, "temperature"),
        ("soft_vq", {"entropy_weight": -1.0}, "entropy_weight"),
        ("soft_vq", {"gamma": math.nan}, "gamma"),
        ("titok", {"input_shape": (30,)}, "patches"),
        ("soft_vq", {"input_shape": (30,)}, "patches"),
    ],
)
def test_values_that_cannot_work_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(AezooError, match=word) as refusal:
        aezoo.create_model(name, **{"input_shape": SHAPE, **SMALL, **settings})
    assert len(str(refusal.value).splitlines()) == 1
