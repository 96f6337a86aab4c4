"""Laws of TiTok, a transformer-based 1-dimensional tokenizer (Yu et al. 2024)."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    test_inference_calls_do_not_update_codebook,
)
from token_laws import (  # noqa: F401
    SHAPE,
    SMALL,
    K,
    N,
    bernoulli,
    data,
    rows_of,
    small,
    squares,
    test_invalid_values_are_refused,
    test_number_of_tokens_is_independent_of_input_size,
    test_the_code_does_not_depend_on_the_decoder,
    unit,
)
from torch import Tensor

from aezoo.models.quantised.titok import TiTok

# ---- titok -----------------------------------------------------------------------------------------------------------


def reference_titok(model: Any, x: Tensor, beta: float, wrong: bool = False) -> dict[str, float]:
    """Terms of equation 2 with l2-normalised codes, by numpy; wrong puts beta on the codebook term."""
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
def test_titok_loss_matches_formula(update: str, cosine: bool, shifted: Any) -> None:
    model, x = small("titok", shifted, update=update, cosine=cosine, beta=0.3).eval(), data()
    terms, wanted = model.loss(x), reference_titok(model, x, 0.3)
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9), name
    assert wanted["commitment"] > 1e-3


def beta_law(cls: type[TiTok], shifted: Any) -> None:
    """Beta scales the gradient of the encoder, not that of the codes."""
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
    """As in 1d-tokenizer #95 and taming-transformers: beta weights the term with sg(z)."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        loss = terms["nll"] + terms["commitment"] + self.beta * terms["codebook"]
        return terms | {"loss": loss}


class BetaOnBoth(TiTok):
    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        return terms | {"loss": terms["nll"] + self.beta * (terms["commitment"] + terms["codebook"])}


def test_beta_weights_only_the_commitment(shifted: Any) -> None:
    beta_law(TiTok, shifted)


@pytest.mark.parametrize("rival", [BetaOnTheCodebook, BetaOnBoth])
def test_beta_on_wrong_term_is_detected(rival: Any, shifted: Any) -> None:
    with pytest.raises(AssertionError):
        beta_law(rival, shifted)


def test_titok_codes_are_unit_norm_and_ignore_length(shifted: Any) -> None:
    model, x = small("titok", shifted).eval(), data()
    code = model.encode(x)
    torch.testing.assert_close(code.norm(dim=1), torch.ones(6, N, dtype=torch.float64))
    with torch.no_grad():
        model.encoder.out.weight *= 7
        model.encoder.bias_DN *= 7
        model.quantiser.code_KD *= torch.linspace(0.5, 3, K, dtype=torch.float64)[:, None]
    torch.testing.assert_close(model.encode(x), code)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_indices_roundtrip_after_training(update: str, shifted: Any) -> None:
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
    """With cosine, the gradient of z is that of z_q without its component along z, divided by ||z||."""
    model, x = small("titok", shifted, beta=0.0).eval(), data(3)
    z = model.encoder(x)
    z_q = model.quantiser(z).z_q
    by_q, by_z = torch.autograd.grad(model.nll(model.decoder(z_q), x).sum(), (z_q, z))
    u, norm = F.normalize(z, dim=1), z.norm(dim=1, keepdim=True)
    torch.testing.assert_close(by_z, (by_q - u * (by_q * u).sum(1, keepdim=True)) / norm)
    assert by_z.abs().max() > 1e-4
