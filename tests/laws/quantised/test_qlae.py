"""Laws of QLAE, quantised-latent autoencoder (Hsu et al. 2023)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
import vector_quantize_pytorch as peer
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    test_inference_calls_do_not_update_codebook,
)
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.models.quantised.qlae import QLAE
from aezoo.quantisers import LFQ, VQ, GroupedVQ, LatentQuantisation

DIM, K = 4, 5


def small(shifted: Any, **settings: Any) -> Any:
    """A float64 model with random offsets added to its initial weights, and a beta other than 1."""
    given = {"hidden_dims": (16,), "latent_dim": DIM, "n_values": K, "beta": 0.6, **settings}
    return shifted(aezoo.create_model("qlae", (6,), **given)).double()


def data(n: int = 9) -> Tensor:
    return torch.rand(n, 6, dtype=torch.float64)


def nearest(z: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The index of each number's nearest value: (N, D), (D, K) -> (N, D)."""
    return np.array([[int(np.argmin(np.abs(x - own))) for x, own in zip(row, values, strict=True)] for row in z])


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_loss_matches_numpy_formula(training: bool, shifted: Any) -> None:
    model, x = small(shifted).train(training), data()
    z, values = (t.detach().numpy() for t in (model.encoder(x), model.quantiser.value_DK))
    index = nearest(z, values)
    z_q = np.take_along_axis(values.T, index, 0)
    squares = float(((z - z_q) ** 2).sum()) / len(x)
    log_p = D.Bernoulli(logits=model.decoder(torch.from_numpy(z_q)), validate_args=False).log_prob(x)
    expected = {"nll": -log_p.sum().item() / len(x), "commitment": squares, "codebook": squares}
    expected["loss"] = expected["nll"] + squares + 0.6 * squares
    found = {name: value.item() for name, value in model.loss(x).items()}
    assert found == pytest.approx(expected, rel=1e-9)
    assert model.encode_indices(x).tolist() == index.tolist() and len(np.unique(index)) > 2
    np.testing.assert_allclose(model.encode(x).detach().numpy(), z_q, atol=1e-12)
    assert model.index_shape == (DIM,) and model.index_sizes == (K,) * DIM


def test_each_term_trains_its_parameters_straight_through(shifted: Any) -> None:
    model, x = small(shifted), data()
    parts = {"encoder": model.encoder, "values": model.quantiser, "decoder": model.decoder}
    terms = model.loss(x)
    for term, wanted in {"nll": {"encoder", "decoder"}, "commitment": {"encoder"}, "codebook": {"values"}}.items():
        moved = set()
        for part, module in parts.items():
            found = torch.autograd.grad(terms[term], [*module.parameters()], retain_graph=True, allow_unused=True)
            moved |= {part} if any(g is not None and g.any() for g in found) else set()
        assert moved == wanted, term
    z = model.encoder(x)
    z_q = model.quantiser(z).z_q
    of_q, of_z = torch.autograd.grad(model.nll(model.decoder(z_q), x).sum(), (z_q, z))
    assert torch.equal(of_q, of_z) and of_q.abs().max() > 1e-3 and not torch.equal(z, z_q)


def beta_law(cls: Any, shifted: Any) -> None:
    """Without the nll, z has the gradient of beta ||z - sg(z_q)||^2 and the values have that of ||sg(z) - z_q||^2."""
    torch.manual_seed(3)
    model: Any = shifted(cls((6,), hidden_dims=(16,), latent_dim=DIM, n_values=K, beta=0.6)).double()
    x = data()
    terms, z, values = model.loss(x), model.encoder(x), model.quantiser.value_DK
    index = torch.from_numpy(nearest(z.detach().numpy(), values.detach().numpy()))
    chosen = torch.stack([values[d, index[:, d]] for d in range(DIM)], 1)
    rest = terms["loss"] - terms["nll"]
    weight = next(model.encoder.parameters())
    for parameter, value in (
        (weight, 0.6 * (z - chosen.detach()).square().sum() / len(x)),
        (values, (z.detach() - chosen).square().sum() / len(x)),
    ):
        (found,), (wanted,) = (torch.autograd.grad(v, parameter, retain_graph=True) for v in (rest, value))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        assert wanted.abs().max() > 1e-3


class BetaOnTheValues(QLAE):
    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        return terms | {"loss": terms["nll"] + terms["commitment"] + self.beta * terms["codebook"]}


class NoCodebookGradient(QLAE):
    """As in vector-quantize-pytorch 1.32: both terms use the straight-through z_q, whose gradient reaches z only."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        z = self.encoder(x)
        codebook = (z.detach() - self.quantiser(z).z_q).square().sum(1).mean() + 0 * self.quantiser.value_DK.sum()
        return terms | {"loss": terms["nll"] + codebook + self.beta * terms["commitment"]}


def test_beta_weights_only_the_commitment(shifted: Any) -> None:
    beta_law(QLAE, shifted)


@pytest.mark.parametrize("rival", [BetaOnTheValues, NoCodebookGradient])
def test_wrong_beta_placement_is_detected(rival: Any, shifted: Any) -> None:
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        beta_law(rival, shifted)


# ---- values of the codebook ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 5, 10])
def test_values_start_evenly_from_minus_to_plus_a_half(size: int) -> None:
    model: Any = aezoo.create_model("qlae", (6,), latent_dim=3, n_values=size)
    np.testing.assert_allclose(model.quantiser.value_DK.detach(), [np.linspace(-0.5, 0.5, size)] * 3, atol=1e-7)


def test_every_code_is_reachable_and_distinct(shifted: Any) -> None:
    model = small(shifted, latent_dim=3)
    indices = torch.cartesian_prod(*(torch.arange(K),) * 3)
    codes = model.codes(indices)
    assert len(codes.unique(dim=0)) == K**3
    assert torch.equal(model.quantiser(codes).indices, indices) and torch.equal(model.quantiser(codes).z_q, codes)
    assert torch.equal(model.decode_indices(indices), model.decode(codes))


def test_each_latent_equals_one_channel_vq(shifted: Any) -> None:
    """Each number equals a `VQ` of one channel, with the same code, indices, terms and gradients."""
    quantiser = small(shifted).quantiser
    groups = GroupedVQ(DIM, DIM, K, update="gradient").double()
    with torch.no_grad():
        for group, values in zip(groups.groups, quantiser.value_DK, strict=True):
            assert isinstance(group, VQ)
            group.code_KD.copy_(values[:, None])
    z, grad = (torch.randn(30, DIM, 3, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    found = []
    for one in (quantiser, groups):
        z_q, indices, terms = one(z)
        loss = (grad * z_q).sum() + 0.3 * terms["commitment"] + 2 * terms["codebook"]
        of_z, *of_values = torch.autograd.grad(loss, [z, *one.parameters()])
        stacked = of_values[0] if one is quantiser else torch.stack([g[:, 0] for g in of_values])
        found.append([z_q, indices, terms["commitment"], terms["codebook"], of_z, stacked])
    torch.testing.assert_close(*found)


def test_two_values_of_minus_and_plus_1_are_the_signs_of_lfq() -> None:
    quantiser, z = LatentQuantisation(7, 2), torch.randn(200, 7)
    with torch.no_grad():
        quantiser.value_DK *= 2
    found, signs = quantiser(z), LFQ(7)(z)
    assert torch.equal(found.z_q, signs.z_q)
    assert torch.equal((found.indices * 2 ** torch.arange(7)).sum(1, keepdim=True), signs.indices)
    torch.testing.assert_close(found.terms["commitment"], signs.terms["commitment"])


def test_many_values_approach_dense_autoencoder(shifted: Any) -> None:
    """The loss converges to that of an autoencoder, and both terms vanish with the square of the spacing of values."""
    model, x, terms = small(shifted, n_values=400), data(), []
    dense: Any = aezoo.create_model("dense_ae", (6,), hidden_dims=(16,), latent_dim=DIM).double()
    for theirs, ours in ((dense.encoder, model.encoder), (dense.decoder, model.decoder)):
        theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    reach = 1.1 * float(model.encoder(x).detach().abs().max())
    for size in (3, 101, 10_001):
        model.quantiser = LatentQuantisation(DIM, size).double()
        with torch.no_grad():
            model.quantiser.value_DK *= 2 * reach
        error = (model.encode(x) - model.encoder(x)).abs().max()
        assert 0 < error <= reach / (size - 1) * (1 + 1e-6)
        terms.append({name: value.item() for name, value in model.loss(x).items()})
    wanted = dense.loss(x)["loss"].item()
    gaps = [abs(found["loss"] - wanted) for found in terms]
    assert gaps[2] < 1e-3 * gaps[0] and gaps[2] < 1e-4 * wanted
    assert terms[2]["commitment"] < 1e-3 * terms[1]["commitment"]


@pytest.mark.parametrize("odd", [3, 5, 9])
def test_codes_and_terms_match_peer_with_fixed_values(odd: int) -> None:
    theirs = peer.LatentQuantize(
        levels=[odd] * DIM, dim=DIM, commitment_loss_weight=0.0, quantization_loss_weight=1.0
    ).train()
    ours, z = LatentQuantisation(DIM, odd), (0.4 * torch.randn(50, DIM)).requires_grad_()
    out, _, loss = theirs(z)
    found = ours(z)
    torch.testing.assert_close(found.z_q, out)
    # theirs is one index for all numbers, and is exact only for the initial values
    packed = (found.indices * odd ** torch.arange(DIM)).sum(1)
    assert torch.equal(packed, theirs.codes_to_indices(found.z_q).long())
    torch.testing.assert_close(found.terms["commitment"], DIM * loss)  # theirs is a mean
    both = peer.LatentQuantize(levels=[odd] * DIM, dim=DIM).train()
    both(z)[2].backward()
    assert all(p.grad is None for p in both.values_per_latent)
    (of_values,) = torch.autograd.grad(found.terms["codebook"], ours.value_DK)
    assert of_values.abs().max() > 1e-3
    with torch.no_grad():
        for own, moved in zip(theirs.values_per_latent, ours.value_DK, strict=True):
            moved += 0.1 * torch.randn(odd)
            own.copy_(moved)
    torch.testing.assert_close(ours(z).z_q, theirs.quantize(z))


def on_data(dim: int, **settings: Any) -> Any:
    """A model with identity networks."""
    model: Any = QLAE((dim,), latent_dim=dim, likelihood="gaussian", **settings)
    model.encoder, model.decoder = nn.Identity(), nn.Identity()
    return model


@pytest.mark.slow
def test_identity_nets_reach_k_means_per_latent() -> None:
    """By steps of the codebook term only, from the initial values given to k-means."""
    x = torch.rand(2000, 8, dtype=torch.float64) ** torch.linspace(0.3, 4, 8)
    model = on_data(8, n_values=6).double()
    with torch.no_grad():
        model.quantiser.value_DK.copy_(torch.linspace(0.3, 0.6, 6).expand(8, 6))
    start = model.quantiser.value_DK.detach().clone()
    reference = sum(
        KMeans(6, init=start[d, :, None].numpy(), n_init=1, max_iter=300, tol=0).fit(x[:, d, None].numpy()).inertia_
        for d in range(8)
    )

    def error() -> float:
        return float((model(x) - x).double().square().sum())

    before = error()
    for _ in range(100):
        # N / (2 n) times this gradient is a step of Lloyd's algorithm, for a value chosen by n of N samples
        (gradient,) = torch.autograd.grad(model.loss(x)["codebook"], model.quantiser.value_DK)
        hits = torch.stack([torch.bincount(column, minlength=6) for column in model.encode_indices(x).T])
        with torch.no_grad():
            model.quantiser.value_DK -= gradient * len(x) / (2 * hits.clamp(min=1))
    assert before > 1.2 * reference
    assert error() == pytest.approx(reference, rel=1e-2)
    assert model.loss(x)["commitment"].item() * len(x) == pytest.approx(error(), rel=1e-9)


# ---- weight decay ----------------------------------------------------------------------------------------------------


def test_weight_decay_applies_to_matrices_and_kernels_only() -> None:
    """A step of AdamW without gradients is the decay, 1 - lr weight_decay, only."""
    model: Any = aezoo.create_model("qlae", (1, 8, 8), net="conv", hidden_dims=(4,), likelihood="gaussian:learned")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = []
    for name, p in model.named_parameters():
        if torch.equal(p, before[name]):
            kept.append(name)
        else:
            torch.testing.assert_close(p, before[name] * (1 - 1e-3 * 0.1))
    weights = {name for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1}
    assert len(weights) >= 4 and set(kept) == before.keys() - weights
    assert "quantiser.value_DK" in kept and any("likelihood" in name for name in kept)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_resumed_fit_keeps_or_changes_weight_decay(quiet: Any, tmp_path: Any) -> None:
    x: Any = torch.rand(32, 6, generator=torch.Generator().manual_seed(1))
    settings = {"hidden_dims": (8,), "latent_dim": 3, "n_values": 4}

    def fit(epochs: int, ckpt_path: Any = None, **more: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model, trainer = aezoo.create_model("qlae", (6,), **settings, **more), quiet(max_epochs=epochs)
        trainer.fit(model, DataLoader(x, batch_size=8), ckpt_path=ckpt_path, weights_only=True)
        return model, trainer

    whole, _ = fit(3)
    _, stopped = fit(2)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, trainer = fit(3, tmp_path / "stopped.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.0]
    _, trainer = fit(3, tmp_path / "stopped.ckpt", weight_decay=0.3)
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.3, 0.0]


def test_weight_decay_reaches_tokenizer_at_prior_value() -> None:
    prior: Any = aezoo.create_model(
        "index_transformer", (6,), tokenizer={"model": "qlae", "latent_dim": 3, "lr": 0.02}, weight_decay=0.05
    )
    groups = prior.configure_optimizers().param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(3e-3, 0.05), (0.02, 0.05), (0.02, 0.0)]
    assert any(p is prior.tokenizer.quantiser.value_DK for p in groups[2]["params"])


# ---- invalid values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"latent_dim": 0}, "latent_dim"),
        ({"n_values": 1}, "n_values"),
        ({"beta": -0.1}, "beta"),
        ({"beta": math.nan}, "beta"),
    ],
)
def test_invalid_values_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word) as refusal:
        aezoo.create_model("qlae", (6,), **settings)
    assert len(str(refusal.value).splitlines()) == 1
