"""Laws of VQ-VAE-2, the Gumbel VQ-VAE and DALL-E's dVAE: levels, bounds by enumeration, schedules, rivals' slips."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo
import aezoo.distributions.categorical
from aezoo.models.quantised import gumbel_vq_vae
from aezoo.models.quantised.gumbel_vq_vae import GumbelVQVAE
from aezoo.models.quantised.vq_vae_2 import VQVAE2
from aezoo.quantisers.base import Quantised

K, P = 3, 2  # codes and places, so few that all codes of a sample can be listed
SHAPE = (1, 11, 9)
SMALL: dict[str, Any] = {"latent_dim": 4, "codebook_size": 7, "hidden_dims": (6, 5)}
GUMBEL = ("gumbel_vq_vae", "dvae")


def two_levels(shifted: Any, **settings: Any) -> VQVAE2:
    """With codes that lie where the encoders put their rows, so that all of them are in use."""
    given = SMALL | {"top_dims": (5,), "dead_below": 0.0, "data_init": False} | settings
    model = shifted(aezoo.create_model("vq_vae_2", input_shape=SHAPE, **given)).double()
    assert isinstance(model, VQVAE2)
    model.init_from_data(torch.rand(9, *SHAPE, dtype=torch.float64))
    return model


def tiny(shifted: Any, name: str = "gumbel_vq_vae", **settings: Any) -> Any:
    """P places of K codes on vectors of 6, with sure and unsure places."""
    given = {"latent_dim": 4, "codebook_size": K, "places": P, "net": "mlp", "hidden_dims": (12,)}
    made = aezoo.create_model(name, input_shape=(6,), **given | settings)
    model = shifted(made).double()
    with torch.no_grad():
        [*model.encoder.parameters()][-2].mul_(8)
    return model


def images(n: int = 6) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def vectors(n: int = 5) -> Tensor:
    return torch.rand(n, 6, dtype=torch.float64)


def nll_of(params: Tensor, x: Tensor) -> Tensor:
    """-log p(x | params) of a Bernoulli by torch.distributions, (B,)."""
    return -D.Bernoulli(logits=params, validate_args=False).log_prob(x).flatten(1).sum(1)


# ---- vq_vae_2: what depends on what ---------------------------------------------------------------------------------

OF_TOP = ("encoder.", "top_encoder.", "top.")


class TopReadsBottom(VQVAE2):
    """The top is quantised after the bottom, of what the bottom's codes leave."""

    def quantise(self, x: Tensor) -> Quantised:
        h = self.encoder(x)
        bottom = self.bottom.quantise(self.before_bottom(h, self.top.quantise(self.top_encoder(h))))
        left = h - bottom.z_q.mean(1, keepdim=True)
        top = self.top.quantise(self.top_encoder(left))
        z_q = torch.cat([top.z_q.flatten(2), bottom.z_q.flatten(2)], 2)
        return Quantised(z_q, torch.cat([top.indices.flatten(2), bottom.indices.flatten(2)], 2), top.terms)


def top_law(model: VQVAE2) -> None:
    """The indices of the top grid stay whatever the weights and codes of the bottom become."""
    x, n_top = images(40), model.places[0]
    model.eval()
    before = model.encode_indices(x)
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if not name.startswith(OF_TOP) and values.is_floating_point():
                values += torch.randn_like(values)
    after = model.encode_indices(x)
    assert not torch.equal(before[..., n_top:], after[..., n_top:])
    assert torch.equal(before[..., :n_top], after[..., :n_top])


def test_top_indices_depend_on_no_bottom_weight_and_no_bottom_code(shifted: Any) -> None:
    top_law(two_levels(shifted))


def test_a_top_that_reads_the_bottom_breaks_the_law(shifted: Any) -> None:
    model = two_levels(shifted)
    model.__class__ = TopReadsBottom
    with pytest.raises(AssertionError):
        top_law(model)


def test_bottom_indices_depend_on_top_codes(shifted: Any) -> None:
    """It is conditional: other top codes on the same features give another bottom."""
    model, x = two_levels(shifted).eval(), images(40)
    before = model.encode_indices(x)
    with torch.no_grad():
        model.top.code_KD += 3 * torch.randn_like(model.top.code_KD)
        wanted = model.top.quantise(model.top_encoder(model.encoder(x)))
        z_b = model.to_bottom(torch.cat([model.encoder(x), model.top_decoder(wanted.z_q)], 1))
        chosen = torch.cdist(z_b.movedim(1, -1).flatten(0, -2), model.bottom.code_KD).argmin(1)
    after = model.encode_indices(x)
    n_top = model.places[0]
    assert not torch.equal(before[..., n_top:], after[..., n_top:])
    assert torch.equal(after[:, 0, n_top:].flatten(), chosen)


def test_top_codes_pass_no_gradient_to_the_bottom_codebook_and_bottom_codes_do_to_the_top(shifted: Any) -> None:
    """By diveq, where a gradient reaches codebooks through the codes themselves."""
    model = two_levels(shifted, update="gradient", estimator="diveq").train()
    z_q = model.quantise(images()).z_q
    n_top, both = model.places[0], [model.top.code_KD, model.bottom.code_KD]
    for part, reached in ((z_q[..., :n_top], (True, False)), (z_q[..., n_top:], (True, True))):
        found = torch.autograd.grad((part**2).sum(), both, retain_graph=True, allow_unused=True)
        assert tuple(g is not None and bool(g.any()) for g in found) == reached


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_each_term_moves_its_own_part(update: str, shifted: Any) -> None:
    model = two_levels(shifted, update=update)
    terms = model.loss(images())
    names = [name for name, _ in model.named_parameters()]
    moved = {}
    for term in ("nll", "commitment", *(["codebook"] if update == "gradient" else [])):
        found = torch.autograd.grad(terms[term], [*model.parameters()], retain_graph=True, allow_unused=True)
        moved[term] = {name.split(".")[0] for name, g in zip(names, found, strict=True) if g is not None and g.any()}
    encoders = {"encoder", "top_encoder", "top_decoder", "to_bottom"}
    assert moved["nll"] == encoders | {"decoder"}
    assert moved["commitment"] == encoders
    assert moved.get("codebook", {"top", "bottom"}) == {"top", "bottom"}


# ---- vq_vae_2: its formula ------------------------------------------------------------------------------------------


def by_hand(model: VQVAE2, x: Tensor) -> dict[str, Tensor]:
    """The terms by distances and one-hot products, (), of nets and codes alone."""

    def nearest(z: Tensor, code_KD: Tensor) -> tuple[Tensor, Tensor]:
        rows = z.movedim(1, -1)
        chosen = torch.cdist(rows.flatten(0, -2), code_KD).argmin(1)
        return code_KD[chosen].view_as(rows).movedim(-1, 1), chosen

    with torch.no_grad():
        h = model.encoder(x)
        z_t = model.top_encoder(h)
        t, _ = nearest(z_t, model.top.code_KD)
        z_b = model.to_bottom(torch.cat([h, model.top_decoder(t)], 1))
        b, _ = nearest(z_b, model.bottom.code_KD)
        n_t, n_b = t.shape[2:], b.shape[2:]
        rows, columns = (torch.arange(n_b[i]) * n_t[i] // n_b[i] for i in (0, 1))
        up = t[:, :, rows][:, :, :, columns]
        nll = nll_of(model.decoder[1](torch.cat([up, b], 1)), x).mean()
        far = [(z - q).square().flatten(1).sum(1).mean() for z, q in ((z_t, t), (z_b, b))]
    return {"nll": nll, "commitment": far[0] + far[1]}


def formula_law(model: VQVAE2) -> None:
    x = images()
    for training in (False, True):
        wanted, found = by_hand(model, x), model.train(training).loss(x)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value)
        total = wanted["nll"] + 0.7 * wanted["commitment"]
        if "codebook" in found:
            torch.testing.assert_close(found["codebook"], wanted["commitment"])
            total = total + wanted["commitment"]
        torch.testing.assert_close(found["loss"], total)


class BetaOnTheCodebook(VQVAE2):
    """The fault of six public ports: beta weights the term that trains the codes."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        loss = nll + terms["commitment"] + self.beta * terms["codebook"]
        return {"loss": loss, "nll": nll, **terms}


class MeanCommitment(VQVAE2):
    """A mean over channels and places, where the likelihood is a sum."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        mean = terms["commitment"] / math.prod(self.code_shape)
        return terms | {"commitment": mean, "loss": terms["nll"] + self.beta * mean}


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_the_loss_of_two_levels_is_that_of_the_paper(update: str, shifted: Any) -> None:
    formula_law(two_levels(shifted, beta=0.7, update=update))


def commitment_gradient_law(model: VQVAE2) -> None:
    """The gradient of codes is that of the codebook term, with weight 1."""
    terms = model.loss(images())
    for code in (model.top.code_KD, model.bottom.code_KD):
        found, wanted = (torch.autograd.grad(terms[t], code, retain_graph=True)[0] for t in ("loss", "codebook"))
        torch.testing.assert_close(found, wanted)


def test_beta_weights_the_commitment_alone(shifted: Any) -> None:
    commitment_gradient_law(two_levels(shifted, beta=0.7, update="gradient"))
    wrong = two_levels(shifted, beta=0.7, update="gradient")
    wrong.__class__ = BetaOnTheCodebook
    with pytest.raises(AssertionError):
        commitment_gradient_law(wrong)


def test_a_mean_for_the_sum_over_places_breaks_the_law(shifted: Any) -> None:
    model = two_levels(shifted, beta=0.7)
    model.__class__ = MeanCommitment
    with pytest.raises(AssertionError):
        formula_law(model)


def test_without_a_top_it_is_vq_vae(shifted: Any) -> None:
    """Where neither the bottom nor the decoder reads the top, the bottom level is a VQ-VAE of the same nets."""
    model, x = two_levels(shifted), images()
    one = aezoo.create_model("vq_vae", input_shape=SHAPE, **SMALL, dead_below=0.0, data_init=False).double()
    with torch.no_grad():
        model.to_bottom.weight[:, 5:] = 0  # after the features' five channels
        head = model.decoder[1][0]
        head.weight[:, :4] = 0
        # the encoder's last layer and `to_bottom` are linear maps of channels, one after the other
        first, second = model.encoder[-1], model.to_bottom
        w_1, w_2 = first.weight[:, :, 0, 0], second.weight[:, :5, 0, 0]
        one.encoder.load_state_dict(
            model.encoder.state_dict()
            | {
                f"{len(model.encoder) - 1}.weight": (w_2 @ w_1)[:, :, None, None],
                f"{len(model.encoder) - 1}.bias": w_2 @ first.bias + second.bias,
            }
        )
        one.decoder.load_state_dict(model.decoder[1].state_dict() | {"0.weight": head.weight[:, 4:]})
        one.quantiser.code_KD.copy_(model.bottom.code_KD)
    n_top = model.places[0]
    assert torch.equal(model.eval().encode_indices(x)[:, 0, n_top:], one.eval().encode_indices(x).flatten(2)[:, 0])
    torch.testing.assert_close(model(x), one(x))
    torch.testing.assert_close(model.loss(x)["nll"], one.loss(x)["nll"])


# ---- vq_vae_2: codebooks --------------------------------------------------------------------------------------------


def averages(code: Any, sums: Any, counts: Any, rows: Any, chosen: Any, decay: float) -> tuple[Any, Any, Any]:
    """A step of moving averages in numpy, code by code."""
    code, sums, counts = code.copy(), sums.copy(), counts.copy()
    for k in range(len(code)):
        mine = rows[chosen == k]
        counts[k] = decay * counts[k] + (1 - decay) * len(mine)
        sums[k] = decay * sums[k] + (1 - decay) * mine.sum(0)
        if len(mine):
            code[k] = sums[k] / counts[k]
    return code, sums, counts


def test_a_step_moves_both_codebooks_to_their_cluster_means(shifted: Any) -> None:
    """With decay 0 the codes are the means of the rows that chose them; with 0.8 moving averages."""
    for decay in (0.0, 0.8):
        model, x = two_levels(shifted, decay=decay).train(), images(9)
        with torch.no_grad():
            h = model.encoder(x)
            z_t = model.top_encoder(h)
        before = {name: (q.code_KD.numpy().copy(), q.sum_KD.numpy().copy(), q.count_K.numpy().copy())
                  for name, q in (("top", model.top), ("bottom", model.bottom))}  # fmt: skip
        model.loss(x)
        with torch.no_grad():
            top_code = torch.from_numpy(before["top"][0])
            rows = {"top": z_t.movedim(1, -1).flatten(0, -2)}
            chosen = {"top": torch.cdist(rows["top"], top_code).argmin(1)}
            t = top_code[chosen["top"]].view(z_t.movedim(1, -1).shape).movedim(-1, 1)
            z_b = model.to_bottom(torch.cat([h, model.top_decoder(t)], 1))
            rows["bottom"] = z_b.movedim(1, -1).flatten(0, -2)
            chosen["bottom"] = torch.cdist(rows["bottom"], torch.from_numpy(before["bottom"][0])).argmin(1)
        for name, q in (("top", model.top), ("bottom", model.bottom)):
            wanted = averages(*before[name], rows[name].numpy(), chosen[name].numpy(), decay)
            for value, due in zip((q.code_KD, q.sum_KD, q.count_K), wanted, strict=True):
                np.testing.assert_allclose(value.numpy(), due, rtol=1e-9, atol=1e-12)
            if decay == 0:
                for k in chosen[name].unique():
                    mean = rows[name][chosen[name] == k].mean(0)
                    torch.testing.assert_close(q.code_KD[k], mean)


def test_the_start_is_k_means_of_the_top_and_then_of_the_bottom_given_it(shifted: Any) -> None:
    """A fixed point of Lloyd's step on rows that each level will see, in training mode, where nothing learns yet."""
    model, x = two_levels(shifted).train(), images(9)
    model.init_from_data(x)
    with torch.no_grad():
        h = model.encoder(x)
        z_t = model.top_encoder(h)
        t_rows = z_t.movedim(1, -1).flatten(0, -2)
        chosen = torch.cdist(t_rows, model.top.code_KD).argmin(1)
        t = model.top.code_KD[chosen].view(z_t.movedim(1, -1).shape).movedim(-1, 1)
        b_rows = model.to_bottom(torch.cat([h, model.top_decoder(t)], 1)).movedim(1, -1).flatten(0, -2)
    for q, rows in ((model.top, t_rows), (model.bottom, b_rows)):
        label = torch.cdist(rows, q.code_KD).argmin(1)
        means = torch.stack([rows[label == k].mean(0) for k in range(7)])
        torch.testing.assert_close(q.code_KD, means, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(q.count_K, label.bincount(minlength=7).double())
        torch.testing.assert_close(q.sum_KD, means * q.count_K[:, None], rtol=1e-6, atol=1e-6)
        assert q.training and q.updates == 0


# ---- vq_vae_2: layout and use ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 27, 35), (3, 13), (2, 5, 6, 7), (1, 1, 1), (1, 4, 9)])
@pytest.mark.parametrize("net", ["resnet", "conv", "vit"])
def test_codes_are_top_first_each_grid_row_by_row(net: str, shape: tuple[int, ...]) -> None:
    model: Any = aezoo.create_model("vq_vae_2", input_shape=shape, **SMALL, top_dims=(5,), net=net).eval()
    x = torch.rand(3, *shape)
    h = model.encoder(x)
    top = model.top.quantise(model.top_encoder(h))
    bottom = model.bottom.quantise(model.before_bottom(h, top))
    n_top, n_bottom = math.prod(top.z_q.shape[2:]), math.prod(bottom.z_q.shape[2:])
    assert model.code_shape == (4, n_top + n_bottom)
    assert model.index_shape == (1, n_top + n_bottom) and model.index_sizes == (7,)
    code, indices = model.encode(x), model.encode_indices(x)
    assert torch.equal(code[..., :n_top].reshape(top.z_q.shape), top.z_q)
    assert torch.equal(code[..., n_top:].reshape(bottom.z_q.shape), bottom.z_q)
    assert torch.equal(indices[..., :n_top].reshape(top.indices.shape), top.indices)
    assert torch.equal(indices[..., n_top:].reshape(bottom.indices.shape), bottom.indices)
    if net != "vit":  # whose grid is of patches
        sides = [[math.ceil(n / 4) for n in shape[1:]], [math.ceil(math.ceil(n / 4) / 2) for n in shape[1:]]]
        assert (n_bottom, n_top) == (math.prod(sides[0]), math.prod(sides[1]))


def test_the_reconstruction_reads_both_levels(shifted: Any) -> None:
    model, x = two_levels(shifted).eval(), images(2)
    z, n_top = model.encode(x), model.places[0]
    for part in (slice(None, n_top), slice(n_top, None)):
        other = z.clone()
        other[..., part] += 1
        assert (model.decode(other) - model.decode(z)).abs().max() > 1e-3


def fitted(name: str, quiet: Any, **settings: Any) -> tuple[Any, Tensor, dict[str, float]]:
    """A model after 12 steps on spots, validation data and its figures."""
    made = aezoo.create_model(name, input_shape=SHAPE, **SMALL | settings)
    x = (torch.rand(40, 1, 1, 1) * torch.rand(40, *SHAPE)).clamp(0, 1)
    trainer = quiet(max_epochs=3)
    batches = DataLoader(x, batch_size=10)
    trainer.fit(made, batches, batches)
    found = trainer.validate(made, batches, verbose=False)[0]
    return made.eval(), x, found


@pytest.mark.parametrize("settings", [{}, {"cosine": True}, {"update": "gradient"}, {"estimator": "rotation"}])
def test_two_levels_survive_training_there_and_back(settings: dict[str, Any], quiet: Any) -> None:
    model, x, found = fitted("vq_vae_2", quiet, **settings, top_dims=(5,))
    indices = model.encode_indices(x)
    assert torch.equal(model.codes(indices), model.encode(x))
    torch.testing.assert_close(model.decode_indices(indices), model(x))
    n_top = model.places[0]
    for level, part in (("top", indices[..., :n_top]), ("bottom", indices[..., n_top:])):
        counts = part.flatten().bincount(minlength=7).double()
        p = counts / counts.sum()
        assert found[f"val/usage_{level}"] == pytest.approx(float((counts > 0).double().mean()))
        assert found[f"val/perplexity_{level}"] == pytest.approx(float(torch.special.entr(p).sum().exp()), rel=1e-5)
    assert found["val/usage_top"] > 2 / 7 and found["val/usage_bottom"] > 2 / 7
    assert "val/usage" not in found


# ---- gumbel_vq_vae and dvae: the formula ----------------------------------------------------------------------------


def with_noise(monkeypatch: pytest.MonkeyPatch, g_BPK: Tensor) -> None:
    """Let this be the Gumbel noise of every draw."""
    for module in (aezoo.distributions.categorical, gumbel_vq_vae):
        monkeypatch.setattr(module, "sample_gumbel", lambda like: g_BPK.view_as(like))


def reference_kl(logits_BPK: Tensor) -> Tensor:
    uniform = D.Categorical(logits=torch.zeros_like(logits_BPK))
    return D.kl_divergence(D.Categorical(logits=logits_BPK), uniform).sum(1).mean()


def loss_law(model: Any, monkeypatch: pytest.MonkeyPatch, tau: float, beta: float) -> None:
    """In training of the relaxed code, in evaluation of the drawn one; the KL is a sum over places of the full one."""
    x, g_BPK = vectors(), D.Gumbel(torch.zeros(5, P, K).double(), 1.0).sample()
    with_noise(monkeypatch, g_BPK)
    logits_BPK = model.encoder(x).movedim(1, 2)
    codes_KC = model.quantiser.code_KC
    for training in (True, False):
        noisy = logits_BPK.log_softmax(2) + g_BPK
        y = (noisy / tau).softmax(2) if training else torch.eye(K).double()[noisy.argmax(2)]
        nll = nll_of(model.decoder((y @ codes_KC).movedim(2, 1)), x).mean()
        kl = reference_kl(logits_BPK)
        found = model.train(training).loss(x)
        wanted = {"loss": nll + beta * kl, "nll": nll, "kl": kl, "elbo": -nll - kl}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value)


class MeanOverPlaces(GumbelVQVAE):
    """As in taming-transformers: a sum over codes, and a mean over places and the batch."""

    def draw(self, x: Tensor) -> Quantised:
        found = super().draw(x)
        return found._replace(terms={"kl": found.terms["kl"] / math.prod(self.index_shape)})


class MeanOverCodes(GumbelVQVAE):
    """A mean over codes as well."""

    def draw(self, x: Tensor) -> Quantised:
        found = super().draw(x)
        return found._replace(terms={"kl": found.terms["kl"] / self.index_sizes[0]})


class NegativeEntropy(GumbelVQVAE):
    """Without log K: what is left of the KL after dropping the prior."""

    def draw(self, x: Tensor) -> Quantised:
        found = super().draw(x)
        return found._replace(terms={"kl": found.terms["kl"] - P * math.log(K)})


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_the_loss_of_drawn_codes_is_that_of_the_formula(
    tau: float, shifted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(shifted, beta=2.5, temperature=tau, start_temperature=tau)
    loss_law(model, monkeypatch, tau, 2.5)


@pytest.mark.parametrize("rival", [MeanOverPlaces, MeanOverCodes, NegativeEntropy])
def test_another_scale_of_the_kl_breaks_the_law(rival: Any, shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(shifted, beta=2.5, temperature=1.0)
    model.__class__ = rival
    with pytest.raises(AssertionError):
        loss_law(model, monkeypatch, 1.0, 2.5)


def test_the_loss_of_dvae_is_that_of_the_paper(shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Density of logit-Laplace by torch.distributions, with the decoder's own scales and the step's weight."""
    model, x = tiny(shifted, "dvae", kl_steps=8, temperature_steps=6), vectors()
    g_BPK = D.Gumbel(torch.zeros(5, P, K).double(), 1.0).sample()
    with_noise(monkeypatch, g_BPK)
    logits_BPK = model.encoder(x).movedim(1, 2)
    for steps, beta in ((0, 0.0), (4, 3.3), (8, 6.6), (50, 6.6)):
        model.steps.fill_(steps)
        noisy = logits_BPK.log_softmax(2) + g_BPK
        z_q = torch.eye(K).double()[noisy.argmax(2)] @ model.quantiser.code_KC
        params = model.decoder(z_q.movedim(2, 1))
        assert params.shape == (5, 12)
        b = ((params[:, 6:].double().exp() * math.exp(5) + 1).log() - 5).exp()  # softly at least exp(-5)
        onto = [D.SigmoidTransform(), D.AffineTransform(-0.1 / 0.8, 1 / 0.8)]
        nll = -D.TransformedDistribution(D.Laplace(params[:, :6], b), onto).log_prob(x).sum(1).mean()
        found = model.eval().loss(x)
        torch.testing.assert_close(found["nll"], nll)
        torch.testing.assert_close(found["kl"], reference_kl(logits_BPK))
        torch.testing.assert_close(found["loss"], nll + beta * found["kl"])
        torch.testing.assert_close(found["elbo"], -nll - found["kl"])


def test_a_scale_of_dvae_is_its_decoder_s_but_for_the_floor() -> None:
    own: Any = aezoo.create_model("dvae", input_shape=(2, 4)).likelihood
    raw = torch.tensor([-1e4, -30.0, -5.0, -2.0, 0.0, 2.0, 1e4], dtype=torch.float64)
    mu, log_b = own.split(torch.stack([torch.zeros_like(raw), raw])[None])
    assert not mu.any()
    torch.testing.assert_close(log_b[0, 0, 3:6], raw[3:6], rtol=0, atol=0.05)
    assert (log_b[0, 0, :2] + 5).abs().max() < 1e-9 and log_b[0, 0, -1] == 5
    # a constant pixel, whose likelihood has no greatest value, stays finite
    assert own.log_prob(torch.tensor([[[10.0], [-1e4]]]), torch.ones(1, 1, 1)).isfinite().all()


@pytest.mark.parametrize("net", ["resnet", "conv", "vit", "mlp"])
def test_dvae_has_a_location_and_a_scale_for_each_value_and_one_map_elsewhere(net: str) -> None:
    for likelihood, maps in (("logit_laplace", 6), ("logit_laplace:learned", 3), ("bernoulli", 3)):
        model = aezoo.create_model("dvae", input_shape=(3, 8, 9), **SMALL, net=net, likelihood=likelihood).eval()
        z = model.encode(torch.rand(2, 3, 8, 9))
        assert model.decoder(z).shape == (2, maps, 8, 9)
        assert model.decode(z).shape == (2, 3, 8, 9)


# ---- gumbel_vq_vae and dvae: bounds ---------------------------------------------------------------------------------


def exact(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(x) and the ELBO by enumeration of all K^P codes: (B,), (B,)."""
    every = torch.tensor([*itertools.product(range(K), repeat=P)])
    log_q_BPK = model.encoder(x).movedim(1, 2).log_softmax(2)
    log_px, log_q = [], []
    for one in every:
        z = model.quantiser.code_KC[one].T.expand(len(x), -1, -1)
        log_px.append(-model.nll(model.decoder(z), x))
        log_q.append(log_q_BPK[:, torch.arange(P), one].sum(1))
    log_p = torch.stack(log_px, 1) - P * math.log(K)
    log_q_BM = torch.stack(log_q, 1)
    return torch.logsumexp(log_p, 1), (log_q_BM.exp() * (log_p - log_q_BM)).sum(1)


@pytest.mark.parametrize("name", GUMBEL)
@pytest.mark.parametrize("hard", [False, True])
def test_the_elbo_is_a_bound_where_codes_are_drawn(name: str, hard: bool, shifted: Any) -> None:
    """In evaluation, and in training with hard codes, its mean over draws is the exact ELBO, below log p(x)."""
    model, x = tiny(shifted, name, hard=hard), vectors(1)
    with torch.no_grad():
        log_p, elbo = exact(model, x)
        assert elbo < log_p - 0.05
        for training in (False, True):
            parts = [model.train(training).loss(x.expand(500, -1))["elbo"] for _ in range(40)]
            found = torch.stack(parts)
            error = 5 * found.std() / math.sqrt(40) + 1e-6
            if hard or not training:
                assert (found.mean() - elbo).abs() < error
            else:  # relaxed codes are others
                assert (found.mean() - elbo).abs() > error


@pytest.mark.parametrize("name", GUMBEL)
def test_likeliest_codes_would_report_no_bound(name: str, shifted: Any) -> None:
    """The KL of what is drawn with the nll of what is not exceeds log p(x): why the loss draws in evaluation."""
    model = tiny(shifted, name).eval()
    with torch.no_grad():
        for p in [*model.encoder.parameters()][-2:]:
            p.mul_(0.02)  # unsure, so that the KL is small
        for p in model.decoder.parameters():
            p.mul_(3)
        x = model(vectors(50)).clamp(0, 1)  # what likeliest codes reconstruct
        log_p, elbo = exact(model, x)
        assert (elbo <= log_p + 1e-9).all()
        assert (-model.score(x) > log_p + 0.1).any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", GUMBEL)
def test_the_score_is_that_of_a_vae_at_the_likeliest_codes(name: str, training: bool, shifted: Any) -> None:
    """-log p(x | code) alone would give codes away for nothing."""
    model, x = tiny(shifted, name, beta=2.5).train(training), vectors()
    with torch.no_grad():
        logits_BPK = model.encoder(x).movedim(1, 2)
        z = (torch.eye(K).double()[logits_BPK.argmax(2)] @ model.quantiser.code_KC).movedim(2, 1)
        kl = torch.stack([reference_kl(logits[None]) for logits in logits_BPK])
        assert (kl > 0.01).all()
        torch.testing.assert_close(model.score(x), model.nll(model.decoder(z), x) + kl)
        if name == "gumbel_vq_vae":
            torch.testing.assert_close(model.score(x), nll_of(model.decoder(z), x) + kl)
    pictures = aezoo.create_model(name, input_shape=SHAPE, **SMALL)
    assert pictures.score(torch.rand(3, *SHAPE)).shape == (3,)


# ---- gumbel_vq_vae and dvae: temperature ----------------------------------------------------------------------------


def test_the_temperature_falls_by_a_constant_factor() -> None:
    model: Any = aezoo.create_model(
        "gumbel_vq_vae", SHAPE, **SMALL, start_temperature=2.0, temperature=0.5, temperature_steps=10
    )
    for steps, tau in ((0, 2.0), (5, 1.0), (10, 0.5), (77, 0.5)):
        model.steps.fill_(steps)
        assert float(model.tau()) == pytest.approx(tau)
    assert model.quantiser.temperature == 2
    model.temperature_steps = 0
    model.steps.zero_()
    assert float(model.tau()) == 0.5


def test_the_schedules_of_dvae_are_half_a_cosine() -> None:
    """1 -> 1/16 and 0 -> 6.6; flat at both ends, where a line is not and a constant factor neither."""
    model: Any = aezoo.create_model("dvae", SHAPE, **SMALL, temperature_steps=12, kl_steps=8)
    for steps in (0, 1, 3, 6, 9, 12, 40):
        model.steps.fill_(steps)
        left, done = min(1, steps / 12), min(1, steps / 8)
        tau = 1 / 16 + (1 - 1 / 16) * math.cos(math.pi / 2 * left) ** 2
        assert float(model.tau()) == pytest.approx(tau)
        assert float(model.kl_weight()) == pytest.approx(6.6 * math.sin(math.pi / 2 * done) ** 2, abs=1e-6)
    model.steps.fill_(6)
    assert float(model.tau()) == pytest.approx(17 / 32)
    for kl_steps, beta in ((8, 0.0), (0, 6.6)):
        model.kl_steps = kl_steps
        model.steps.zero_()
        assert float(model.kl_weight()) == pytest.approx(beta)


@pytest.mark.parametrize("name", GUMBEL)
def test_the_quantiser_has_the_temperature_of_the_step(name: str, quiet: Any) -> None:
    model, _, _ = fitted(name, quiet, temperature_steps=20)
    assert model.steps == 11  # of the last of 12
    torch.testing.assert_close(model.quantiser.temperature, model.tau())
    assert 0.3 < model.tau() < 0.95


@pytest.mark.parametrize("name", GUMBEL)
def test_cold_codes_are_discrete(name: str, shifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tau falls the code tends to that of the largest noisy logit, and so does the loss in training."""
    model, x = tiny(shifted, name), vectors()
    with_noise(monkeypatch, D.Gumbel(torch.zeros(5, P, K).double(), 1.0).sample())
    drawn = model.eval().draw(x)
    far = []
    for tau in (2.0, 0.3, 0.05, 1e-4):
        model.quantiser.temperature.fill_(tau)
        relaxed = model.train().draw(x)
        assert torch.equal(relaxed.indices, drawn.indices)
        far.append(float((relaxed.z_q - drawn.z_q).detach().abs().max()))
    assert far[0] > far[1] > far[2] > far[3] and far[0] > 0.1 and far[3] < 1e-9
    torch.testing.assert_close(model.loss(x)["loss"], model.eval().loss(x)["loss"])


# ---- gumbel_vq_vae and dvae: gradients, codes and samples -----------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", GUMBEL)
def test_the_kl_moves_the_encoder_alone_and_the_likelihood_everything(name: str, hard: bool, shifted: Any) -> None:
    model = tiny(shifted, name, hard=hard).train()
    terms, names = model.loss(vectors()), [name for name, _ in model.named_parameters()]
    moved = {}
    for term in ("nll", "kl"):
        found = torch.autograd.grad(terms[term], [*model.parameters()], retain_graph=True, allow_unused=True)
        moved[term] = {name.split(".")[0] for name, g in zip(names, found, strict=True) if g is not None and g.any()}
    assert moved == {"nll": {"encoder", "quantiser", "decoder"}, "kl": {"encoder"}}


@pytest.mark.parametrize("name", GUMBEL)
def test_hard_codes_are_codes_with_the_gradient_of_relaxed_ones(
    name: str, shifted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, x = tiny(shifted, name, temperature_steps=0, temperature=0.7), vectors()
    with_noise(monkeypatch, D.Gumbel(torch.zeros(5, P, K).double(), 1.0).sample())
    hard = tiny(shifted, name, temperature_steps=0, temperature=0.7, hard=True)
    hard.load_state_dict(soft.state_dict())
    found = {kind: model.train().draw(x) for kind, model in (("soft", soft), ("hard", hard))}
    torch.testing.assert_close(found["hard"].z_q, hard.codes(found["hard"].indices))
    assert (found["soft"].z_q - found["hard"].z_q).abs().max() > 1e-2
    towards = torch.randn_like(found["soft"].z_q)
    one, two = (
        torch.autograd.grad((found[kind].z_q * towards).sum(), [*model.encoder.parameters()])
        for kind, model in (("soft", soft), ("hard", hard))
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", GUMBEL)
def test_drawn_codes_survive_training_there_and_back(name: str, quiet: Any) -> None:
    model, x, found = fitted(name, quiet, beta=0.01)
    indices = model.encode_indices(x)
    assert torch.equal(indices, model.encoder(x).argmax(1, keepdim=True))
    assert torch.equal(model.codes(indices), model.encode(x))
    torch.testing.assert_close(model.decode_indices(indices), model(x))
    counts = indices.flatten().bincount(minlength=7)
    assert found["val/usage"] == pytest.approx(float((counts > 0).double().mean()))
    assert found["val/bits_per_dim"] == pytest.approx(-found["val/elbo"] / (99 * math.log(2)), rel=1e-5)


@pytest.mark.parametrize("name", GUMBEL)
def test_samples_decode_uniform_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = aezoo.create_model(name, SHAPE, **SMALL).eval()
    seen = []
    monkeypatch.setattr(model, "decode_indices", lambda given: seen.append(given) or model.decode(model.codes(given)))
    found = model.sample(500)
    assert found.shape == (500, *SHAPE)
    (indices,) = seen
    assert indices.shape == (500, *model.index_shape) and indices.dtype == torch.long
    n = indices.numel()
    share = indices.flatten().bincount(minlength=7).double() / n
    assert (share - 1 / 7).abs().max() < 5 * math.sqrt(1 / 7 / n)
    at_places = torch.nn.functional.one_hot(indices, 7).double().mean(0)
    assert (at_places - 1 / 7).abs().max() < 6 * math.sqrt(1 / 7 / 500)
    assert torch.equal(found, model.decode(model.codes(indices)))


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("vq_vae_2", {"beta": -1.0}, "beta"),
        ("vq_vae_2", {"codebook_size": 0}, "codebook_size"),
        ("vq_vae_2", {"latent_dim": 0}, "latent_dim"),
        ("vq_vae_2", {"net": "mlp"}, "mlp"),
        ("vq_vae_2", {"net": "lstm"}, "lstm"),
        ("vq_vae_2", {"decay": 1.0}, "decay"),
        ("vq_vae_2", {"top_dims": (0,)}, "hidden_dims"),
        *(
            (name, settings, word)
            for name in GUMBEL
            for settings, word in (
                ({"beta": math.inf}, "beta"),
                ({"codebook_size": 1}, "codebook_size"),
                ({"latent_dim": 0}, "latent_dim"),
                ({"temperature": 0.0}, "temperature"),
                ({"start_temperature": 0.001}, "start_temperature"),
                ({"temperature_steps": -1}, "temperature_steps"),
                ({"likelihood": "logit_laplace:0"}, "logit_laplace"),
            )
        ),
        ("dvae", {"kl_steps": -1}, "kl_steps"),
    ],
)
def test_values_that_cannot_work_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word) as refusal:
        aezoo.create_model(name, input_shape=(1, 8, 8), **settings)
    assert len(str(refusal.value).splitlines()) == 1


def test_two_levels_need_a_grid() -> None:
    with pytest.raises(aezoo.AezooError, match="convolutions take"):
        aezoo.create_model("vq_vae_2", input_shape=(30,))
