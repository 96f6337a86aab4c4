"""Laws of VQ-VAE-2, two levels of codes (Razavi et al. 2019)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    test_inference_calls_do_not_update_codebook,
)
from relaxed_codebook_laws import (  # noqa: F401
    SHAPE,
    SMALL,
    fitted,
    nll_of,
    test_invalid_values_are_refused,
)
from torch import Tensor

import aezoo
import aezoo.distributions.categorical
from aezoo.models.quantised.vq_vae_2 import VQVAE2
from aezoo.quantisers.base import Quantised


def two_levels(shifted: Any, **settings: Any) -> VQVAE2:
    """A model whose codes are initialised near the encoder's rows, so that all of them are in use."""
    given = SMALL | {"top_dims": (5,), "dead_below": 0.0, "data_init": False} | settings
    model = shifted(aezoo.create_model("vq_vae_2", input_shape=SHAPE, **given)).double()
    assert isinstance(model, VQVAE2)
    model.init_from_data(torch.rand(9, *SHAPE, dtype=torch.float64))
    return model


def images(n: int = 6) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


# ---- vq_vae_2: dependencies ------------------------------------------------------------------------------------------


OF_TOP = ("encoder.", "top_encoder.", "top.")


class TopReadsBottom(VQVAE2):
    """The top quantises the features minus the mean over channels of the bottom's code."""

    def quantise(self, x: Tensor) -> Quantised:
        h = self.encoder(x)
        bottom = self.bottom.quantise(self.bottom_input(h, self.top.quantise(self.top_encoder(h))))
        left = h - bottom.z_q.mean(1, keepdim=True)
        top = self.top.quantise(self.top_encoder(left))
        z_q = torch.cat([top.z_q.flatten(2), bottom.z_q.flatten(2)], 2)
        return Quantised(z_q, torch.cat([top.indices.flatten(2), bottom.indices.flatten(2)], 2), top.terms)


def top_law(model: VQVAE2) -> None:
    """The indices of the top grid do not depend on the weights and codes of the bottom."""
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


def test_top_indices_ignore_bottom_weights_and_codes(shifted: Any) -> None:
    top_law(two_levels(shifted))


def test_top_reading_bottom_is_detected(shifted: Any) -> None:
    model = two_levels(shifted)
    model.__class__ = TopReadsBottom
    with pytest.raises(AssertionError):
        top_law(model)


def test_bottom_indices_depend_on_top_codes(shifted: Any) -> None:
    """Other top codes give other bottom indices for the same features."""
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


def test_top_and_bottom_codes_have_their_gradients(shifted: Any) -> None:
    """With diveq, gradients reach codebooks through the codes themselves."""
    model = two_levels(shifted, update="gradient", estimator="diveq").train()
    z_q = model.quantise(images()).z_q
    n_top, both = model.places[0], [model.top.code_KD, model.bottom.code_KD]
    for part, reached in ((z_q[..., :n_top], (True, False)), (z_q[..., n_top:], (True, True))):
        found = torch.autograd.grad((part**2).sum(), both, retain_graph=True, allow_unused=True)
        assert tuple(g is not None and bool(g.any()) for g in found) == reached


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_each_term_trains_its_own_networks(update: str, shifted: Any) -> None:
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


# ---- vq_vae_2: loss --------------------------------------------------------------------------------------------------


def by_hand(model: VQVAE2, x: Tensor) -> dict[str, Tensor]:
    """The terms, (), computed from the networks and codes only."""

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
    """A common mistake of public ports: beta weights the term that trains the codes."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        loss = nll + terms["commitment"] + self.beta * terms["codebook"]
        return {"loss": loss, "nll": nll, **terms}


class MeanCommitment(VQVAE2):
    """A mean over channels and positions, although the likelihood is a sum."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        mean = terms["commitment"] / math.prod(self.code_shape)
        return terms | {"commitment": mean, "loss": terms["nll"] + self.beta * mean}


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_two_level_loss_matches_paper(update: str, shifted: Any) -> None:
    formula_law(two_levels(shifted, beta=0.7, update=update))


def commitment_gradient_law(model: VQVAE2) -> None:
    """The gradient of codes is that of the codebook term, with weight 1."""
    terms = model.loss(images())
    for code in (model.top.code_KD, model.bottom.code_KD):
        found, wanted = (torch.autograd.grad(terms[t], code, retain_graph=True)[0] for t in ("loss", "codebook"))
        torch.testing.assert_close(found, wanted)


def test_beta_weights_only_the_commitment(shifted: Any) -> None:
    commitment_gradient_law(two_levels(shifted, beta=0.7, update="gradient"))
    wrong = two_levels(shifted, beta=0.7, update="gradient")
    wrong.__class__ = BetaOnTheCodebook
    with pytest.raises(AssertionError):
        commitment_gradient_law(wrong)


def test_mean_instead_of_sum_over_positions_is_detected(shifted: Any) -> None:
    model = two_levels(shifted, beta=0.7)
    model.__class__ = MeanCommitment
    with pytest.raises(AssertionError):
        formula_law(model)


def test_ignored_top_level_equals_vq_vae(shifted: Any) -> None:
    """Where neither the bottom nor the decoder reads the top, the bottom level is a VQ-VAE of the same nets."""
    model, x = two_levels(shifted), images()
    one = aezoo.create_model("vq_vae", input_shape=SHAPE, **SMALL, dead_below=0.0, data_init=False).double()
    with torch.no_grad():
        model.to_bottom.weight[:, 5:] = 0  # the first five channels are the features
        head = model.decoder[1][0]
        head.weight[:, :4] = 0
        # the encoder's last layer and `to_bottom` are successive linear maps of channels
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


# ---- vq_vae_2: codebooks ---------------------------------------------------------------------------------------------


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
    """With decay 0 the codes become the means of the rows that chose them; with 0.8 moving averages."""
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


def test_init_is_k_means_top_then_bottom(shifted: Any) -> None:
    """The codes of each level are a fixed point of Lloyd's algorithm on its rows."""
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


# ---- vq_vae_2: layout and use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 27, 35), (3, 13), (2, 5, 6, 7), (1, 1, 1), (1, 4, 9)])
@pytest.mark.parametrize("net", ["resnet", "conv", "vit"])
def test_codes_are_top_first_each_grid_row_by_row(net: str, shape: tuple[int, ...]) -> None:
    model: Any = aezoo.create_model("vq_vae_2", input_shape=shape, **SMALL, top_dims=(5,), net=net).eval()
    x = torch.rand(3, *shape)
    h = model.encoder(x)
    top = model.top.quantise(model.top_encoder(h))
    bottom = model.bottom.quantise(model.bottom_input(h, top))
    n_top, n_bottom = math.prod(top.z_q.shape[2:]), math.prod(bottom.z_q.shape[2:])
    assert model.code_shape == (4, n_top + n_bottom)
    assert model.index_shape == (1, n_top + n_bottom) and model.index_sizes == (7,)
    code, indices = model.encode(x), model.encode_indices(x)
    assert torch.equal(code[..., :n_top].reshape(top.z_q.shape), top.z_q)
    assert torch.equal(code[..., n_top:].reshape(bottom.z_q.shape), bottom.z_q)
    assert torch.equal(indices[..., :n_top].reshape(top.indices.shape), top.indices)
    assert torch.equal(indices[..., n_top:].reshape(bottom.indices.shape), bottom.indices)
    if net != "vit":  # a vit has a grid of patches
        sides = [[math.ceil(n / 4) for n in shape[1:]], [math.ceil(math.ceil(n / 4) / 2) for n in shape[1:]]]
        assert (n_bottom, n_top) == (math.prod(sides[0]), math.prod(sides[1]))


def test_the_reconstruction_reads_both_levels(shifted: Any) -> None:
    model, x = two_levels(shifted).eval(), images(2)
    z, n_top = model.encode(x), model.places[0]
    for part in (slice(None, n_top), slice(n_top, None)):
        other = z.clone()
        other[..., part] += 1
        assert (model.decode(other) - model.decode(z)).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"cosine": True}, {"update": "gradient"}, {"estimator": "rotation"}])
def test_two_level_indices_roundtrip_after_training(settings: dict[str, Any], quiet: Any) -> None:
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


# ---- gumbel_vq_vae and dvae: gradients, codes and samples ------------------------------------------------------------


def test_vector_input_is_refused() -> None:
    with pytest.raises(aezoo.AezooError, match="convolutions take"):
        aezoo.create_model("vq_vae_2", input_shape=(30,))
