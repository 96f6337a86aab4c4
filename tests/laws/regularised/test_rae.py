"""Laws of RAE, the regularised autoencoder (Ghosh et al. 2020)."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from aggregate_posterior_laws import (  # noqa: F401
    SHAPE,
    assert_law_fails,
    images,
    normal,
    same,
    small,
    test_default_likelihood_is_the_papers_squared_error,
    test_fitted_priors_follow_the_codes,
    test_regularisation_term_trains_encoder,
    test_zero_weight_equals_dense_autoencoder,
)
from gradient_laws import (
    test_gradients_are_derivatives_of_the_terms,  # noqa: F401
    test_gradients_with_other_settings_are_derivatives,  # noqa: F401
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.cli.main import main
from aezoo.io.checkpoint import save_model
from aezoo.models.regularised.rae import RAE, SpectralNorm
from aezoo.tasks.generate import generate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- RAE: Ghosh et al. 2020 ------------------------------------------------------------------------------------------


def test_loss_penalises_code_and_decoder_norms(shifted: Any) -> None:
    model, x = shifted(small("rae", beta=0.3, regulariser_weight=0.2)), images()
    terms = model.loss(x)
    code = np.linalg.norm(model.encode(x).detach(), axis=1) ** 2 / 2
    size = sum(float(np.linalg.norm(p.detach()) ** 2) for p in model.decoder.parameters())
    assert terms["code"].item() == pytest.approx(code.mean(), rel=1e-9)
    assert terms["l2"].item() == pytest.approx(size, rel=1e-9)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.3 * terms["code"] + 0.2 * terms["l2"])
    for each, keys in (("gp", {"code", "gp"}), ("sn", {"code"}), ("none", {"code"})):
        assert small("rae", regulariser=each).loss(x).keys() == {"loss", "nll", *keys}


def jacobians(model: Any, z: Tensor) -> Tensor:
    """dg/dz of each sample by autograd, (B, D) -> (B, X, D)."""
    rows = [
        torch.autograd.functional.jacobian(lambda one: model.decode(one[None]), one, create_graph=True) for one in z
    ]
    return torch.stack([row.flatten(0, -2) for row in rows])


class GradientByImage(RAE):
    """pythae: the derivative of the reconstruction's sum with respect to the image."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        return {**super().loss(x), "gp": g.square().flatten(1).sum(1).mean()}


class GradientOfSquares(RAE):
    """The authors' code: the gradient of the sum of squares, 2 J' g."""

    def jacobian_norm(self, z_BD: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(self.decode(z_BD).square().sum(), z_BD, create_graph=True)
        return g.square().mean(1)


def linear_law(cls: Any) -> None:
    """For a linear decoder the Jacobian is its weight, whose squared Frobenius norm is known."""
    torch.manual_seed(5)
    model = small(cls, hidden_dims=(), regulariser="gp")
    found = torch.stack([model.loss(images(2000))["gp"] for _ in range(3)])
    expected = np.linalg.norm(model.decoder[1].weight.detach().numpy(), "fro") ** 2
    assert found.mean().item() == pytest.approx(expected, rel=0.05)


def test_linear_decoder_penalty_is_squared_norm() -> None:
    linear_law(RAE)
    assert_law_fails(linear_law, GradientByImage)
    assert_law_fails(linear_law, GradientOfSquares)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_jacobian_estimate_matches_autograd(likelihood: str, shifted: Any) -> None:
    model, x = shifted(small("rae", regulariser="gp", activation="tanh", likelihood=likelihood)), images()
    z, weight = model.encode(x), model.decoder[1].weight
    torch.manual_seed(3)
    found = model.jacobian_norm(z)
    torch.manual_seed(3)
    v = torch.randn_like(x).flatten(1)
    J = jacobians(model, z)
    expected = (J.mT @ v[:, :, None]).square().sum((1, 2))
    torch.testing.assert_close(found, expected)
    same(found.mean(), expected.mean(), weight)
    same(found.mean(), expected.mean(), model.encoder[1].weight)
    with torch.no_grad():  # as in validation
        draws = torch.stack([model.jacobian_norm(z) for _ in range(2000)])
    exact = J.square().sum((1, 2)).detach()
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / math.sqrt(2000)).all()


def norms(model: Any) -> list[float]:
    """The largest singular value of each weight of the decoder, by NumPy."""
    layers = [m for m in model.decoder.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    assert len(layers) >= 2
    return [float(np.linalg.norm(m.weight.detach().flatten(1).numpy(), 2)) for m in layers]


class StaleSingularVectors(RAE):
    """torch.nn.utils: the singular vectors are from before the step."""

    def after_optimizer_step(self) -> None:
        pass


def spectral_law(cls: Any, quiet: Any, **settings: Any) -> None:
    torch.manual_seed(0)
    model = cls((1, 8, 8), latent_dim=4, regulariser="sn", **settings)
    assert max(norms(model)) <= 1 + 1e-3 and min(norms(model)) > 1 - 1e-4
    batches = [3 * torch.rand(32, 1, 8, 8) for _ in range(40)]
    seen: list[float] = []
    look = pl.callbacks.LambdaCallback(on_train_batch_end=lambda *_: seen.extend(norms(model)))
    quiet(max_epochs=1, callbacks=[look]).fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert len(seen) >= 80
    assert max(seen) <= 1 + 1e-3 and min(seen) > 1 - 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"hidden_dims": (40,)}, {"net": "conv", "hidden_dims": (8, 12)}])
def test_decoder_weights_keep_spectral_norm_1(settings: Any, quiet: Any) -> None:
    spectral_law(RAE, quiet, **settings)
    assert_law_fails(lambda cls: spectral_law(cls, quiet, **settings), StaleSingularVectors)
    assert max(abs(norm - 1) for norm in norms(RAE((1, 8, 8), regulariser="none", **settings))) > 0.1


@pytest.mark.slow
def test_normalised_weights_load_as_saved(tmp_path: Path) -> None:
    model = aezoo.create_model("rae", SHAPE, regulariser="sn", hidden_dims=(8,))
    x = images().float()
    loaded = aezoo.load_model(save_model(model, tmp_path / "saved"))
    assert torch.equal(loaded(x), model.eval()(x))


def test_spectral_norm_gradient_matches_autograd() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    norm, direction = SpectralNorm(weight.detach().float()).double(), torch.randn(6, 5, dtype=torch.float64)
    norm.search(weight)
    same((norm(weight) * direction).sum(), (weight / torch.linalg.matrix_norm(weight, 2) * direction).sum(), weight)
    norm(0 * weight.detach())  # a norm of 0 raises no error
    single = SpectralNorm(weight.detach().float())
    for diverged in (math.nan, math.inf, 1e36, 1e20):
        single.search(weight.detach().float() * diverged)


def test_spectrally_normalised_decoder_is_1_lipschitz() -> None:
    model = small("rae", regulariser="sn", hidden_dims=(8, 12)).eval()
    z, other = 3 * normal(200), 3 * normal(200)
    moved = (model.decode(z) - model.decode(other)).flatten(1).norm(dim=1)
    assert (moved <= (1 + 3e-3) * (z - other).norm(dim=1)).all()


@pytest.mark.slow
def test_generate_samples_from_post_hoc_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    off = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]
    main([
        *("fit", "--model=rae", "--model.latent_dim=4", "--model.hidden_dims=[16]", "--data.name=digits"),
        *("--trainer.max_epochs=1", "--projector.n=0", "--trainer.accelerator=cpu", *off),
    ])  # fmt: skip
    main(["generate", "--ckpt_path", "runs/rae-digits/0", "--prior", "gmm", "--n", "12", "--data.name", "digits"])
    (file,) = tmp_path.glob("**/samples.npy")
    drawn = np.load(file)
    assert drawn.shape == (12, 1, 8, 8) and np.isfinite(drawn).all() and drawn.std(0).max() > 0
    model = aezoo.load_model("runs/rae-digits/0")
    with pytest.raises(aezoo.AezooError, match="has no prior"):
        generate(model, prior="own")
