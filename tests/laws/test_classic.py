"""Laws of the deterministic models: principal components, Wiener filter, score of the noisy density, Jacobian."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.io.checkpoint import save_model
from aezoo.models.classic.denoising_ae import DenoisingAE

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

# training MSE per value of PCA on Fashion-MNIST's 60,000 images / 255, by an eigendecomposition in float64
FASHION_PCA = {2: 0.046294, 4: 0.036744, 8: 0.026689, 16: 0.020430}
# the same for scikit-learn's digits / 16, its first 1,437
DIGITS_PCA = {2: 0.052584, 4: 0.037560, 8: 0.023809, 10: 0.019129, 16: 0.010922}


def mse(model: aezoo.Autoencoder, x: Tensor) -> float:
    """Mean squared error per value in float64."""
    with torch.no_grad():
        return float(((model.double()(x.double()) - x.double()) ** 2).mean())


def principal_angle(model: aezoo.Autoencoder, vectors: np.ndarray) -> float:
    weight = model.decoder[0].weight.detach().double().numpy()
    return float(subspace_angles(weight, vectors[:, : weight.shape[1]]).max())


# ---- linear_ae: Baldi & Hornik 1989 ----------------------------------------------------------------------------------


def linear_ae_is_pca(x: Tensor, k: int, fitted: aezoo.Autoencoder, spectrum: Any) -> tuple[float, float]:
    """The ratio to PCA's error and the largest principal angle, after checking that PCA is never beaten."""
    _, values, vectors = spectrum(x)
    best = values[k:].sum() / len(values)
    ratio = mse(fitted, x) / best
    assert 1 - 1e-9 < ratio < 1.01
    return ratio, principal_angle(fitted, vectors)


@pytest.mark.parametrize("k", [4, 10])
def test_linear_ae_is_pca_on_digits(k: int, digits: Tensor, spectrum: Any, centred: Any, adam: Any, lbfgs: Any) -> None:
    x = digits[:1437]
    assert spectrum(x)[1][k:].sum() / 64 == pytest.approx(DIGITS_PCA[k], abs=1e-6)
    sk = PCA(k).fit(x.flatten(1).numpy())
    rebuilt = torch.from_numpy(sk.inverse_transform(sk.transform(x.flatten(1).numpy())))
    assert ((rebuilt - x.flatten(1)) ** 2).mean() == pytest.approx(DIGITS_PCA[k], abs=1e-6)
    model = centred(aezoo.create_model("linear_ae", input_shape=(1, 8, 8), latent_dim=k), x)
    adam(model, x.float(), steps=1500, lr=5e-3, batch=256)
    lbfgs(model.double(), x, rounds=250)
    ratio, angle = linear_ae_is_pca(x, k, model, spectrum)
    assert ratio < 1 + 1e-4
    assert angle < 1e-2


@pytest.mark.slow
def test_linear_ae_is_pca_on_mnist(mnist5k: Tensor, spectrum: Any, centred: Any, adam: Any, lbfgs: Any) -> None:
    model = centred(aezoo.create_model("linear_ae", input_shape=(1, 28, 28), latent_dim=6), mnist5k)
    adam(model, mnist5k.float(), steps=1000, lr=3e-3, batch=256)
    lbfgs(model.double(), mnist5k, rounds=100)
    assert linear_ae_is_pca(mnist5k, 6, model, spectrum)[1] < 1e-2


@pytest.mark.slow
def test_linear_ae_is_pca_on_fashion_mnist(
    fashion_mnist: Any, spectrum: Any, centred: Any, adam: Any, lbfgs: Any
) -> None:
    x = fashion_mnist[0]
    assert len(x) == 60_000
    values = spectrum(x)[1]
    for k, figure in FASHION_PCA.items():
        assert values[k:].sum() / 784 == pytest.approx(figure, abs=1e-6)
    # k = 8 has the wide gap between eigenvalues that determines the subspace, 16 has none
    for k, rounds in ((8, 40), (16, 5)):
        model = centred(aezoo.create_model("linear_ae", input_shape=(1, 28, 28), latent_dim=k), x)
        adam(model, x, steps=4000, lr=3e-3, batch=512)
        lbfgs(model.double(), x.double(), rounds)
        ratio, angle = linear_ae_is_pca(x, k, model, spectrum)
        assert ratio == pytest.approx(1, abs=1e-3)
        assert k == 16 or angle < 1e-2


def test_linear_ae_minimises_the_plain_squared_error(shifted: Any) -> None:
    model = shifted(aezoo.create_model("linear_ae", input_shape=(3, 5), latent_dim=2).double())
    x = torch.rand(7, 3, 5, dtype=torch.float64)
    W, b = model.encoder[1].weight, model.encoder[1].bias
    V, c = model.decoder[0].weight, model.decoder[0].bias
    x_hat = (x.flatten(1) @ W.T + b) @ V.T + c
    sse = ((x.flatten(1) - x_hat) ** 2).sum(1)
    torch.testing.assert_close(model.loss(x)["loss"], sse.mean() + 7.5 * math.log(math.pi))
    torch.testing.assert_close(model.score(x), sse + 7.5 * math.log(math.pi))


# ---- denoising_ae: Vincent et al. 2008, Alain & Bengio 2014 ----------------------------------------------------------


def linear_denoiser(dims: int, std: float) -> aezoo.Autoencoder:
    return aezoo.create_model(
        "denoising_ae", input_shape=(dims,), corruption=f"gaussian:{std}", latent_dim=dims + 1, hidden_dims=(),
        likelihood="gaussian",
    ).double()  # fmt: skip


def as_matrix(model: aezoo.Autoencoder, dims: int) -> Tensor:
    """The linear map of a linear model, from its outputs: row i is the image of e_i."""
    with torch.no_grad():
        eye = torch.eye(dims, dtype=torch.float64)
        return model.decode(model.encode(eye)) - model.decode(model.encode(0 * eye))


def test_the_linear_denoiser_is_the_wiener_filter() -> None:
    dims, std, n = 4, 0.6, 100_000
    A = torch.randn(dims, dims, dtype=torch.float64) * 0.7
    S = A @ A.T
    x = torch.randn(n, dims, dtype=torch.float64) @ A.T
    model = linear_denoiser(dims, std)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=120, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        torch.manual_seed(5)  # one draw of the noise, so that the optimum of this very sample is known as well
        optimizer.zero_grad()
        loss = model.loss(x)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.manual_seed(5)
    fitted = LinearRegression().fit(model.corruption(x).numpy(), x.numpy())
    found = as_matrix(model, dims)
    torch.testing.assert_close(found, torch.from_numpy(fitted.coef_).T.contiguous(), rtol=0, atol=1e-4)
    wiener = torch.linalg.solve(S + std**2 * torch.eye(dims, dtype=torch.float64), S)  # (S + s^2 I)^-1 S, its transpose
    torch.testing.assert_close(found, wiener, rtol=0, atol=1e-2)
    assert (found - torch.eye(dims)).abs().max() > 0.1
    # Tweedie on N(0, S): r(x~) - x~ = s^2 grad log N(x~; 0, S + s^2 I)
    noisy = torch.randn(50, dims, dtype=torch.float64, requires_grad=True)
    normal = torch.distributions.MultivariateNormal(noisy.new_zeros(dims), S + std**2 * torch.eye(dims))
    (score,) = torch.autograd.grad(normal.log_prob(noisy).sum(), noisy)
    torch.testing.assert_close(noisy @ wiener - noisy, std**2 * score)


def mixture(std: float) -> torch.distributions.MixtureSameFamily:
    """Three Gaussians in the plane, each blurred by noise of that deviation."""
    means = torch.tensor([[-1.5, 0.0], [1.2, 0.8], [0.3, -1.4]])
    scales = torch.tensor([[0.3, 0.5], [0.4, 0.25], [0.5, 0.3]])
    parts = torch.distributions.Independent(torch.distributions.Normal(means, (scales**2 + std**2).sqrt()), 1)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.tensor([0.5, 0.3, 0.2])), parts)


@pytest.mark.slow
def test_a_nonlinear_denoiser_finds_the_score_of_the_noisy_density() -> None:
    std = 0.5
    model = aezoo.create_model(
        "denoising_ae", input_shape=(2,), corruption=f"gaussian:{std}", latent_dim=64, hidden_dims=(64,),
        activation="silu", likelihood="gaussian",
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2500)
    for _ in range(2500):
        optimizer.zero_grad()
        model.loss(mixture(0).sample((1024,)))["loss"].backward()
        optimizer.step()
        schedule.step()
    noisy = mixture(std).sample((4000,)).requires_grad_()
    (score,) = torch.autograd.grad(mixture(std).log_prob(noisy).sum(), noisy)
    with torch.no_grad():
        found = (model(noisy) - noisy) / std**2
    error = ((found - score) ** 2).mean() / (score**2).mean()
    assert error < 0.01
    # the score of the clean density, or a slip in the factor, would not pass
    (clean,) = torch.autograd.grad(mixture(0).log_prob(noisy).sum(), noisy)
    assert ((found - clean) ** 2).mean() / (clean**2).mean() > 0.1


@pytest.mark.parametrize("name", ["gaussian:0", "masking:0", "salt_and_pepper:0", "none"])
def test_without_noise_the_denoiser_is_the_dense_autoencoder_bit_for_bit(name: str, shifted: Any) -> None:
    x = torch.rand(5, 1, 6, 7)
    settings = {"input_shape": (1, 6, 7), "hidden_dims": (16, 8), "latent_dim": 4}
    torch.manual_seed(0)
    dense = shifted(aezoo.create_model("dense_ae", **settings))
    torch.manual_seed(0)
    denoising = shifted(aezoo.create_model("denoising_ae", corruption=name, **settings))
    for model in (dense, denoising):
        model.loss(x)["loss"].backward()
    assert torch.equal(dense.loss(x)["loss"], denoising.loss(x)["loss"])
    pairs = zip(dense.parameters(), denoising.parameters(), strict=True)
    assert all(torch.equal(a, b) and torch.equal(a.grad, b.grad) for a, b in pairs)


class Watched(nn.Module):
    """A corruption that keeps the noise it adds, by the model's mode."""

    def __init__(self, model: aezoo.Autoencoder) -> None:
        super().__init__()
        self.inner, self.seen = model.corruption, {True: [], False: []}

    def forward(self, x: Tensor) -> Tensor:
        noisy: Tensor = self.inner(x)
        self.seen[self.training].append((noisy - x).detach())
        return noisy


def noise_law(model: aezoo.Autoencoder, quiet: Any) -> None:
    """Evaluation is corrupted too, by the same noise at every epoch; each training batch by noise of its own."""
    loader = DataLoader(torch.rand(12, 1, 4, 4), batch_size=6)
    model.corruption = Watched(model)
    seen = model.corruption.seen
    trainer = quiet(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(model, loader, loader)
    first, second = seen[False][:4], seen[False][4:]  # two batches, each for its loss and for its reconstruction
    assert len(second) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[2])
    assert all(noise.abs().max() > 0 for noise in first)
    assert len(seen[True]) == 4
    assert all(not torch.equal(a, b) for a, b in pairwise(seen[True]))
    a, b = (trainer.validate(model, loader, verbose=False)[0] for _ in range(2))
    assert a == b


def test_noise_is_fixed_in_evaluation_and_anew_for_every_training_batch(quiet: Any) -> None:
    noise_law(DenoisingAE((1, 4, 4), corruption="gaussian:0.3"), quiet)


class Encdr(DenoisingAE):
    """Validates on clean input, as the library of that name does."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        if self.training:
            return super().loss(x)
        nll = self.nll(self.decoder(self.encoder(x)), x).mean()
        return {"loss": nll, "nll": nll}


def test_a_clean_validation_loss_breaks_the_law(quiet: Any) -> None:
    with pytest.raises(AssertionError):
        noise_law(Encdr((1, 4, 4), corruption="gaussian:0.3"), quiet)


# ---- contractive_ae: Rifai et al. 2011 -------------------------------------------------------------------------------


def contractive(**settings: Any) -> aezoo.Autoencoder:
    return aezoo.create_model("contractive_ae", input_shape=(2, 3, 4), latent_dim=7, **settings).double()


def jacobians(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """||dh/dx||_F^2 of each sample by autograd."""
    return torch.stack([torch.autograd.functional.jacobian(encode, row[None]).square().sum() for row in x])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_the_contractive_penalty_is_autograd_s_jacobian(shift: bool, training: bool, shifted: Any) -> None:
    model = contractive(contraction=0.7).train(training)
    model = shifted(model) if shift else model
    x = torch.rand(5, 2, 3, 4, dtype=torch.float64)
    truth = jacobians(model.encode, x)
    terms = model.loss(x)
    torch.testing.assert_close(model.jacobian_norm(model.encode(x)), truth, rtol=1e-9, atol=0)
    torch.testing.assert_close(terms["jacobian"], truth.mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(terms["loss"], model.score(x).mean() + 0.7 * truth.mean())
    # ports that pylearn2 #90 and #142 report: the mean over units, the sum before the square
    h, W = model.encode(x), model.encoder[1].weight
    assert ((h * (1 - h)).square() * W.square().sum(1)).mean(1).sub(truth).abs().min() > 1e-3
    assert (((h * (1 - h)) @ W.square().sum(1)).square() - truth).abs().min() > 1e-3


def test_the_contractive_gradient_is_that_of_the_jacobian(shifted: Any) -> None:
    model = shifted(contractive(contraction=1.0))
    x = torch.rand(3, 2, 3, 4, dtype=torch.float64)
    W, b = model.encoder[1].weight, model.encoder[1].bias
    terms = model.loss(x)
    found = torch.autograd.grad(terms["loss"] - terms["nll"], (W, b))

    def penalty(W: Tensor, b: Tensor) -> Tensor:
        rows = [
            torch.autograd.functional.jacobian(lambda v: torch.sigmoid(W @ v + b), v, create_graph=True)
            for v in x.flatten(1)
        ]
        return torch.stack([J.square().sum() for J in rows]).mean()

    expected = torch.autograd.grad(penalty(W, b), (W, b))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("data_init", [True, False])
def test_the_contractive_outputs_start_at_the_mean_of_the_first_batch(data_init: bool, shifted: Any) -> None:
    model, x = shifted(contractive(data_init=data_init)).train(), torch.rand(4, 2, 3, 4, dtype=torch.float64)
    before = model.decoder[0].bias.detach().clone()
    for batch_idx, batch in enumerate((x, 1 - x)):
        model.begin_step(batch, batch_idx)
    expected = x.mean(0).clamp(0.01, 0.99).logit().flatten() if data_init else before
    torch.testing.assert_close(model.decoder[0].bias.detach(), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_contractive_code_of_few_units_tells_digits_apart(
    tied: bool, adam: Callable[..., float], mnist5k: Tensor
) -> None:
    """Without a start at the mean all units of free weights saturate alike, and every output is the mean image."""
    x, said = mnist5k[:1280].float(), {}
    for data_init in (False, True):
        torch.manual_seed(0)
        model = aezoo.create_model("contractive_ae", (1, 28, 28), latent_dim=8, data_init=data_init, tied=tied)
        model.begin_step(x[:128], 0)
        adam(model, x, 300, 3e-3, 128)
        with torch.no_grad():
            said[data_init] = float(model(x).var(0).mean() / x.var(0).mean())
    assert said[True] > 0.01 and said[True] > (1.2 if tied else 10) * said[False]
    assert (said[False] > 0.01) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_without_contraction_only_the_likelihood_is_left(tied: bool, shifted: Any) -> None:
    model, x = shifted(contractive(contraction=0.0, tied=tied)), torch.rand(4, 2, 3, 4, dtype=torch.float64)
    terms = model.loss(x)
    assert torch.equal(terms["loss"], terms["nll"])
    back = model.encoder[1].weight if tied else model.decoder[0].weight.T
    logits = model.encoder(x) @ back + model.decoder[0].bias
    bce = -torch.distributions.Bernoulli(logits=logits, validate_args=False).log_prob(x.flatten(1)).sum(1)
    torch.testing.assert_close(terms["loss"], bce.mean())


def test_the_contractive_decoder_has_the_encoder_s_weights(shifted: Any, tmp_path: Path) -> None:
    model, free = shifted(contractive()), contractive(tied=False)
    x, W = torch.rand(9, 2, 3, 4, dtype=torch.float64), model.encoder[1].weight
    assert model.decoder[0].weight is W
    assert sum(p.numel() for p in model.parameters()) == 7 * 24 + 7 + 24
    free.load_state_dict(model.state_dict() | {"decoder.0.weight": W.T})
    found, expected = model.loss(x), free.loss(x)
    torch.testing.assert_close(found["loss"], expected["loss"])
    down, up = torch.autograd.grad(expected["loss"], (free.encoder[1].weight, free.decoder[0].weight))
    (tied,) = torch.autograd.grad(found["loss"], W)
    torch.testing.assert_close(tied, down + up.T)
    # once they are saved and loaded, too
    loaded = aezoo.load_model(save_model(model, tmp_path / "saved")).double()
    assert loaded.decoder[0].weight is loaded.encoder[1].weight
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_contraction_cannot_be_evaded_where_weights_are_tied(tied: bool) -> None:
    """The encoder times 0.01 and the decoder divided by it: nearly the same reconstruction, for no penalty."""
    model, x = contractive(tied=tied), torch.rand(50, 2, 3, 4, dtype=torch.float64)
    (_, down, _), (up, _) = model.encoder, model.decoder
    with torch.no_grad():
        down.bias.zero_()
        before, half = model.loss(x), torch.full((7,), 0.5, dtype=torch.float64)
        at_half = up(half[None])
        down.weight.mul_(0.01)
        up.weight.div_(0.01)
        up.bias += (at_half - up(half[None]))[0]
        after = model.loss(x)
    assert after["nll"].item() == pytest.approx(before["nll"].item(), rel=1e-12 if tied else 1e-2)
    assert after["jacobian"].item() == pytest.approx((1 if tied else 1e-4) * before["jacobian"].item(), rel=0.3)
