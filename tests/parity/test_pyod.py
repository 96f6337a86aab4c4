"""Detectors of pyod on copies of our networks (Zhao et al. 2019).

Several of its methods cast to float32, so samples are float32 here, and networks cast to float64.

Source: https://github.com/yzhao062/pyod
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import noise
from pyod.models.ae1svm import AE1SVM, InnerAE1SVM
from pyod.models.alad import ALAD
from pyod.models.auto_encoder import AutoEncoder
from pyod.models.deep_svdd import DeepSVDD, InnerDeepSVDD
from pyod.models.vae import VAE, VAEModel
from torch import Tensor, nn

import aezoo

N, X, CODE = 9, 6, 3
CONSTANT = X / 2 * math.log(math.pi)  # constant of the likelihood gaussian
SUMS = "sums over the values of a sample instead of means"


class Double(nn.Module):
    """A function in float64 of inputs that may be float32, with the parameters of a network."""

    def __init__(self, net: nn.Module, function: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.net, self.function = net, function or net

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.double())


class Unseen(nn.Module):
    """A network that does not register its parameters, so that steps and weight decay do not change them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.kept, self.other = [net], nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.kept[0](x.double())


class Half(nn.Module):
    """The first or the second half of the channels."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, 1)[self.which]


def ours(name: str, **settings: Any) -> Any:
    """A model with random offsets added to its initial weights."""
    given = {"latent_dim": CODE, "hidden_dims": (5,), "activation": "leaky_relu", "likelihood": "gaussian"}
    model = aezoo.create_model(name, (X,), **given | settings).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def samples() -> Tensor:
    return torch.randn(N, X).float().double()


def with_gradients(parameters: Iterable[Tensor]) -> Tensor:
    """A value whose gradients are those that their `backward` left in the parameters."""
    return torch.stack([(p * p.grad.detach().clone()).sum() for p in parameters if p.grad is not None]).sum()


def pairs_of(*both: tuple[nn.Module, nn.Module]) -> list[tuple[Tensor, Tensor]]:
    return [pair for a, b in both for pair in zip(a.parameters(), b.parameters(), strict=True)]


def test_dense_ae(compare):
    model, x = ours("dense_ae"), samples()
    its = copy.deepcopy(nn.Sequential(model.encoder, model.decoder))
    detector = AutoEncoder(preprocessing=False, verbose=0, device="cpu")
    detector.model, detector.optimizer = its, torch.optim.SGD(its.parameters(), 0.0)
    expected, found = detector.training_forward(x), model.loss(x)["loss"]
    pairs = pairs_of((model.encoder, its[0]), (model.decoder, its[1]))
    with_reference = compare("dense_ae", "pyod", "AutoEncoder")
    with_reference.scaled("loss without constants", found - CONSTANT, expected, X, SUMS)
    with_reference.equal_gradients(found, with_gradients(its.parameters()), pairs, scale=X, reason=SUMS)
    with torch.no_grad():
        with_reference.equal("score", (model.score(x) - CONSTANT).sqrt(), detector.evaluating_forward(x))


@pytest.mark.parametrize(("name", "beta"), [("vae", 1.0), ("beta_vae", 4.0)])
def test_vae(compare, name, beta):
    model, x, draw = ours(name, beta=beta), samples(), torch.randn(N, CODE)
    its = VAEModel(X, latent_dim=CODE)
    its.encoder, its.decoder = copy.deepcopy(model.encoder), copy.deepcopy(model.decoder)
    its.encoder_mu, its.encoder_logvar = Half(0), Half(1)
    detector = VAE(preprocessing=False, verbose=0, device="cpu", beta=beta / X, capacity=math.inf)
    detector.model, detector.optimizer = its, torch.optim.SGD(its.parameters(), 0.0)
    detector.logvar_clip_ = its.logvar_clip
    with noise([draw]):
        found = model.loss(x)
    with noise([draw]):
        expected = detector.training_forward(x)
    pairs = pairs_of((model.encoder, its.encoder), (model.decoder, its.decoder))
    with_reference = compare(name, "pyod", "VAE")
    with_reference.scaled("loss without constants", found["loss"] - CONSTANT, expected, X, SUMS)
    with_reference.equal_gradients(found["loss"], with_gradients(its.parameters()), pairs, scale=X, reason=SUMS)
    with noise([torch.zeros_like(draw)]), torch.no_grad():
        distance = detector.evaluating_forward(x)
    kl = model.kl(*model.posterior(x)).detach()
    with_reference.equal("score without KL", (model.score(x) - kl - CONSTANT).sqrt(), distance)
    detector.capacity = VAE().capacity
    with noise([draw]):
        without = detector.training_forward(x)
    with_reference.deviates(
        "loss with its default capacity",
        found["loss"] - CONSTANT,
        X * without,
        "theirs bounds KL by the capacity, 0 by default, and so leaves it out",
        follows="ours",
    )


def test_deep_svdd(compare):
    """Without their weight decay, the sum of norms times 1e-6, which ours leaves to the optimiser."""
    model, x = ours("deep_svdd", nll_weight=0.0), samples()
    with torch.no_grad():
        model.init_from_data(x)
    its = copy.deepcopy(model.encoder)
    inner = InnerDeepSVDD(X, False, [5, CODE], "leaky_relu", "sigmoid", 0.0, 0.0)
    inner.model = Unseen(its)
    detector = DeepSVDD(X, hidden_neurons=[5, CODE], epochs=1, batch_size=N, preprocessing=False, verbose=0)
    with mock.patch("pyod.models.deep_svdd.InnerDeepSVDD", return_value=inner):
        detector.fit(x.numpy())
    found = model.loss(x)
    with_reference = compare("deep_svdd", "pyod", "DeepSVDD")
    with_reference.equal("centre", model.centre_D, detector.c_)
    with_reference.equal("score", model.score(x), detector.decision_scores_)
    with_reference.equal("svdd", found["svdd"], detector.decision_scores_.mean())
    pairs = pairs_of((model.encoder, its))
    with_reference.equal_gradients(found["loss"], with_gradients(its.parameters()), pairs)


def test_ae1svm(compare):
    """Its features are cosines with phases, of which 0 and -pi / 2 give ours."""
    model, x = ours("ae1svm", n_frequencies=8), samples()
    its = InnerAE1SVM(X, CODE, 16, batch_norm=False, dropout_rate=0.0)
    its.encoder, its.decoder = Double(copy.deepcopy(model.encoder)), copy.deepcopy(model.decoder)
    its.rff.weights.data = torch.cat([model.omega_DR] * 2, 1)
    its.rff.bias.data = torch.tensor([0.0, -math.pi / 2]).repeat_interleave(8)
    its.svm_weights.data, its.svm_bias.data = model.w_F.detach() / 8**0.5, -model.rho.detach()[None]
    x_hat, features = its(x)
    with_reference = compare("ae1svm", "pyod", "AE1SVM")
    with_reference.equal("reconstructions", model(x), x_hat)
    phi = model.features(model.encode(x))
    with_reference.scaled("Fourier features", phi, features, 8**-0.5, "theirs are not of length 1")
    with_reference.equal("margin", -model.hinge_margin(model.encode(x)), its.svm_decision_function(features))
    detector = AE1SVM(preprocessing=False, epochs=1, learning_rate=0.0)
    detector.model, detector.device = its, "cpu"
    detector._train_autoencoder([(x, torch.arange(N))])
    with_reference.deviates(
        "svm",
        model.loss(x)["svm"],
        torch.tensor(detector.best_loss) - (x_hat - x).square().mean(),
        "theirs is the mean of max(0, 1 - w'phi - b), without the norm of w, rho and nu",
        follows="ours",
    )
    with_reference.deviates(
        "score",
        model.score(x),
        detector.decision_function(x.numpy()),
        "theirs is the distance from the reconstruction, ours that from the SVM's plane",
        follows="ours",
    )


def test_alad(compare):
    """With a constant cycle discriminator, theirs only has the terms of pairs of samples and codes."""
    model, x, z = ours("alad", nll_weight=0.0), samples(), torch.randn(N, CODE).float().double()
    its = copy.deepcopy(model)

    def judge(name: str, first: int) -> nn.Module:
        of = its.discriminator[name]
        return Double(of, lambda joined: of(joined[:, :first], joined[:, first:])[1].sigmoid())

    detector = ALAD(add_disc_zz_loss=False, device="cpu")
    detector.enc, detector.dec, detector.disc_xz = Double(its.encoder), Double(its.decoder), judge("xz", X)
    detector.disc_xx = Double(nn.Identity(), lambda joined: torch.full((len(joined), 1), 0.5))
    detector.opt_gen = torch.optim.SGD([*its.encoder.parameters(), *its.decoder.parameters()], 0.0)
    detector.opt_disc = torch.optim.SGD(its.discriminator.parameters(), 0.0)
    detector.hist_loss_gen, detector.hist_loss_disc = [], []
    of_discriminator: list[Tensor] = []
    detector.opt_disc.register_step_pre_hook(
        lambda *_: of_discriminator.append(with_gradients(its.discriminator["xz"].parameters()))
    )
    data = x.float().numpy(), z.float().numpy()
    detector.train_step(data)
    with noise([z]):
        found = model.loss(x)
    with_reference = compare("alad", "pyod", "ALAD")
    constant = 2 * math.log(2)
    with_reference.equal("adversarial", found["adversarial"], detector.hist_loss_gen[0] - constant)
    players = (model.encoder, its.encoder), (model.decoder, its.decoder)
    of_players = with_gradients(p for net in (its.encoder, its.decoder) for p in net.parameters())
    with_reference.equal_gradients(found["adversarial"], of_players, pairs_of(*players), "gradient of adversarial")
    with_reference.equal_gradients(
        found["discriminator"],
        of_discriminator[0],
        pairs_of((model.discriminator["xz"], its.discriminator["xz"])),
        "gradient of the discriminator of pairs",
    )
    detector.disc_xx = judge("xx", X)
    detector.train_step(data)
    with_reference.deviates(
        "cycle_x",
        found["cycle_x"],
        torch.tensor(detector.hist_loss_gen[1] - found["adversarial"].item()),
        "theirs compares x with G(z) of a random z, ours with G(E(x)), and adds a term of (x, x) without gradient",
        follows="ours",
    )
    with_reference.deviates(
        "score",
        model.score(x),
        detector.get_outlier_scores(x.float().numpy()),
        "theirs compares probabilities of the cycle discriminator, ours its features",
        follows="ours",
    )
