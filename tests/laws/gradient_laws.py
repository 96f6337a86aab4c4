"""Gradients of all models' loss terms against finite differences, except where they are stopped or estimated."""

from typing import Any

import numpy as np
import pytest
import torch
from reductions_helpers import MODELS, SHAPE, build
from representative_models import others_slow
from torch import Tensor

STEP = 1e-8
LABELLED = (
    *("conditional_vae", "semi_supervised_m1", "semi_supervised_vae", "ada_gvae", "mlvae"),
    *("triplet_vae", "triplet_ae"),
)
_ADVERSARIAL_KL = {
    "adaptive_weight": "decoder discriminator encoder likelihood",
    "discriminator": "decoder encoder",
    "adversarial": "discriminator",
}
# parts of the model for which a term has no gradient although its value depends on them
STOPPED: dict[str, dict[str, str]] = {
    "isometric_ae": {"iso": "encoder"},
    "simmim": {"readout": "encoder mask_token"},
    "wae_gan": {"discriminator": "encoder", "adversarial": "discriminator"},
    "aae": {"discriminator": "encoder", "adversarial": "discriminator"},
    "ganomaly": {"discriminator": "decoder encoder", "adversarial": "discriminator"},
    "alad": {
        "discriminator": "decoder encoder",
        "adversarial": "discriminator",
        "cycle_x": "discriminator",
        "cycle_z": "discriminator",
    },
    "f_anogan": {"discriminator": "decoder", "features": "discriminator", "adversarial": "discriminator"},
    "fre": {"nll": "W_DF b_D"},
    "reverse_distillation": {"nll": "embedding fusions"},
    "sigma_vae": {"sigma": "decoder encoder"},
    "piwae": {"miwae": "decoder encoder"},
    "semi_supervised_m1": {"classifier": "encoder"},
    "factor_vae": {"discriminator": "encoder", "tc": "discriminator"},
    "mine_vae": {"mi": "discriminator encoder"},
    "vae_gan": {
        "nll": "decoder encoder",
        "discriminator": "decoder encoder",
        "elbo": "decoder",
        "feature_nll": "decoder discriminator",
    },
    "two_stage_vae": {"code_nll": "encoder", "code_kl": "encoder"},
    "jnf": {"parts_kl": "joint_encoder"},
    "nexus": {"top_nll": "encoder", "top_kl": "encoder"},
    "telbo": {"parts_nelbo": "decoder"},
    "sim_vq_vae": {"codebook": "encoder", "nll": "quantiser", "commitment": "quantiser"},
    "fvq_vae": {"codebook": "encoder", "nll": "quantiser", "commitment": "quantiser"},
    "qlae": {"codebook": "encoder", "nll": "quantiser", "commitment": "quantiser"},
    "sq_vae": {"sigma": "decoder quantiser"},
    "titok": {"codebook": "encoder", "nll": "quantiser", "commitment": "quantiser"},
    "compressai": {"quantiles": "density"},
    **dict.fromkeys(("autoencoder_kl", "eq_vae", "asymmetric_kl"), _ADVERSARIAL_KL),
    "va_vae": {**_ADVERSARIAL_KL, "alignment_weight": "decoder encoder likelihood projection"},
    "vqgan": {
        "codebook": "encoder",
        "adaptive_weight": "decoder discriminator quantiser",
        "discriminator": "decoder quantiser",
        "nll": "quantiser",
        "perceptual": "quantiser",
        "adversarial": "discriminator quantiser",
        "commitment": "quantiser",
    },
    "representation_ae": {
        "adaptive_weight": "decoder discriminator",
        "discriminator": "decoder",
        "adversarial": "discriminator",
    },
}
# parts of the model for which the gradient of a term is an estimate
ESTIMATED: dict[str, dict[str, str]] = {
    "topk_sae": {"aux": "decoder encoder"},
    "abs_topk_sae": {"aux": "decoder encoder"},
    "ra_sae": {"aux": "decoder encoder"},
    "batch_topk_sae": {"aux": "decoder encoder"},
    "matryoshka_sae": {"aux": "decoder encoder"},
    "temporal_sae": {"aux": "context decoder encoder"},
    "jumprelu_sae": {"nll": "theta_N", "l0": "theta_N"},
    "gated_sae": {"aux": "decoder"},
    "f_anogan": {"nll": "decoder", "features": "decoder"},
    "draem": {"segmentation": "decoder encoder segmentation"},
    "iwae": {"nll": "encoder", "kl": "encoder", "elbo": "encoder"},
    "piwae": {"kl": "encoder", "elbo": "encoder"},
    "categorical_vae": {"nll": "encoder", "elbo": "encoder"},
    "joint_vae": {"nll": "encoder", "elbo": "encoder"},
    "vae_gan": {"elbo": "encoder", "feature_nll": "encoder"},
    "two_stage_vae": {"elbo": "encoder"},
    "gamma_vae": {"nll": "encoder", "elbo": "encoder"},
    "nexus": {"elbo": "encoder"},
    "vq_vae": {"nll": "encoder"},
    "rq_vae": {"nll": "encoder"},
    "fsq_vae": {"nll": "encoder"},
    "lfq_vae": {"nll": "encoder"},
    "bsq_vae": {"nll": "encoder"},
    "sim_vq_vae": {"nll": "encoder"},
    "fvq_vae": {"nll": "encoder"},
    "fsp_vae": {"nll": "encoder"},
    "vp_vae": {"nll": "encoder"},
    "qlae": {"nll": "encoder"},
    "vq_vae_2": {"nll": "encoder to_bottom top_decoder top_encoder", "commitment": "encoder top_encoder"},
    "gumbel_vq_vae": {"nll": "encoder", "elbo": "encoder"},
    "sq_vae": {"nll": "encoder quantiser", "elbo": "encoder quantiser"},
    "titok": {"nll": "encoder"},
    "pixelcnn": {"tokenizer_loss": "tokenizer", "tokenizer_nll": "tokenizer"},
    "index_transformer": {"tokenizer_loss": "tokenizer", "tokenizer_nll": "tokenizer"},
    "dvae": {"nll": "encoder", "elbo": "encoder"},
    "vqgan": {"nll": "encoder", "perceptual": "encoder", "adversarial": "encoder"},
    "consistency_decoder": {"consistency": "decoder encoder"},
}


# settings that differ from those of reductions_helpers, and the prefix of the compared parameters
OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("iwae", {"estimator": "reparam"}, ""),
    ("mae", {"norm_pix": True}, "decoder.scale"),
    ("dncnn", {"residual": False}, ""),
    ("omp_sae", {"likelihood": "laplace"}, ""),
    ("sequence_ae", {"pad_value": 0.0}, ""),
    ("rq_vae", {"dropout": 0.5}, "encoder"),
    ("rae", {"regulariser": "gp", "likelihood": "bernoulli"}, ""),
    ("wae_gan", {"gaussian_posterior": True}, "encoder"),
]


class Case:
    """A model away from its initial weights, and its loss terms: with labels, without and with some if it uses labels.

    Args:
        name: the model.
        shifted: the fixture.
        **settings: replace those of reductions_helpers.
    """

    def __init__(self, name: str, shifted: Any, **settings: Any) -> None:
        self.model = build(name, shifted, **settings).double().train()
        self.model(torch.rand(6, *SHAPE).double())
        self.parameters = {key: p for key, p in self.model.named_parameters() if p.requires_grad}
        self._start = {key: value.detach().clone() for key, value in self._state().items()}
        self._labels = (torch.arange(6) % 3, None, torch.arange(6) % 3 - 1)[: 3 if name in LABELLED else 1]
        self.terms = self._terms()
        self.gradients = {key: self._gradient(term) for key, term in self.terms.items()}

    def _state(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _terms(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        x = torch.rand(6, *SHAPE).double()
        found = [self.model.loss(x, y) for y in self._labels]
        return {key: torch.stack([terms[key] for terms in found]).sum() for key in found[0]}

    def _gradient(self, term: Tensor) -> dict[str, Tensor]:
        if not term.requires_grad:
            return {key: torch.zeros_like(p) for key, p in self.parameters.items()}
        parameters = [*self.parameters.values()]
        found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        return dict(zip(self.parameters, found, strict=True))

    def moved(self, steps: dict[str, Tensor]) -> dict[str, float]:
        """The terms after these steps from the start."""
        with torch.no_grad():
            for key, value in self._state().items():
                value.copy_(self._start[key] + steps.get(key, 0))
        return {key: float(term.detach()) for key, term in self._terms().items()}

    def slopes(self, directions: dict[str, Tensor]) -> dict[str, tuple[float, float, float]]:
        """For each term the finite difference along these directions, that by its gradient, and the tolerance."""
        ahead, behind = (self.moved({key: sign * STEP * d for key, d in directions.items()}) for sign in (1, -1))
        found = {}
        for term, gradient in self.gradients.items():
            slope = (ahead[term] - behind[term]) / (2 * STEP)
            product = float(sum((gradient[key] * d).sum() for key, d in directions.items()))
            rounding = 1e-5 * max(abs(slope), abs(product)) + 1e-6 * max(1, abs(ahead[term]))
            found[term] = slope, product, rounding
        return found


def part(parameter: str) -> str:
    """The part of the model that a parameter belongs to."""
    return parameter.partition(".")[0]


def exceptions(name: str, term: str) -> set[str]:
    """The parts for which the gradient of a term is stopped or estimated."""
    stopped, estimated = STOPPED.get(name, {}), ESTIMATED.get(name, {})
    terms = {*stopped, *estimated} if term == "loss" else (term,)
    return {part for key in terms for part in f"{stopped.get(key, '')} {estimated.get(key, '')}".split()}


@pytest.mark.parametrize("name", others_slow([*MODELS], {*MODELS} - {"diffusers_ae"}))
def test_gradients_are_derivatives_of_the_terms(name: str, shifted: Any) -> None:
    case = Case(name, shifted)
    by_terms: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for key, p in case.parameters.items():
        where = tuple(term for term in case.terms if part(key) not in exceptions(name, term))
        by_terms.setdefault(where, {})[key] = torch.randn_like(p)
    for where, directions in by_terms.items():
        slopes = case.slopes(directions)
        for term in where:
            slope, product, rounding = slopes[term]
            assert abs(slope - product) <= rounding, (term, {part(key) for key in directions}, slope, product)
    reached = {term: {part(key) for key, values in case.gradients[term].items() if values.any()} for term in case.terms}
    for term, parts in STOPPED.get(name, {}).items():
        assert not reached[term] & {*parts.split()}, term
    for term, parts in ESTIMATED.get(name, {}).items():
        assert reached[term] >= {*parts.split()}, term


@pytest.mark.parametrize(("name", "settings", "start"), OTHERS)
def test_gradients_with_other_settings_are_derivatives(
    name: str, settings: dict[str, Any], start: str, shifted: Any
) -> None:
    case = Case(name, shifted, **settings)
    directions = {key: torch.randn_like(p) for key, p in case.parameters.items() if key.startswith(start)}
    parts = {part(key) for key in directions}
    for term, (slope, product, rounding) in case.slopes(directions).items():
        assert parts & exceptions(name, term) or abs(slope - product) <= rounding, (term, slope, product)


# the loss of these two weights a term differently for different parts of the model
@pytest.mark.parametrize("name", sorted({*STOPPED, *ESTIMATED} - {"mine_vae", "vae_gan"}))
def test_loss_gradient_is_the_weighted_sum_of_terms(name: str, shifted: Any) -> None:
    case = Case(name, shifted)
    columns = {term: flat(gradient) for term, gradient in case.gradients.items() if term != "loss"}
    columns = {term: column for term, column in columns.items() if column.any()}
    table, wanted = np.stack([*columns.values()], 1), flat(case.gradients["loss"])
    weights = dict(zip(columns, np.linalg.lstsq(table, wanted, rcond=1e-12)[0], strict=True))
    np.testing.assert_allclose(table @ [*weights.values()], wanted, atol=1e-9 * np.abs(wanted).max())
    # terms that contribute only their gradient to the loss
    gradient_only = {"discriminator", "gradient_penalty"}
    if name == "f_anogan" or "adaptive_weight" in case.terms:
        gradient_only |= {"adversarial", "alignment"}
    assert all(weight > 1e-3 for term, weight in weights.items() if term in gradient_only)
    value = sum(weight * case.terms[term].item() for term, weight in weights.items() if term not in gradient_only)
    assert value == pytest.approx(case.terms["loss"].item(), rel=1e-8)


def flat(gradient: dict[str, Tensor]) -> Any:
    return torch.cat([part.flatten() for part in gradient.values()]).numpy()
