"""The mutual information estimate MINE of torch-mist (Federici et al. 2023).

Source: https://github.com/mfederici/torch-mist
"""

import copy
import warnings

import torch
from comparison import noise
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import aezoo

# warnings of distutils
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch_mist.estimators.discriminative.implementations.mine import MINE

D, LATENT, BATCH, DECAY = 6, 3, 8, 0.8


class Critic(nn.Module):
    """A copy of our statistics network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([x, y], -1))[..., 0]


class NextCodes:
    """Pairs of samples and the codes of the next samples, as in ours."""

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def sample(self, _: torch.Size) -> Tensor:
        return self.codes.roll(-1, 0)[None]


def test_loss_with_mutual_information(compare):
    settings = {"latent_dim": LATENT, "hidden_dims": (5,), "discriminator_dims": (7,), "beta": 0.9, "mi_weight": 0.6}
    model = aezoo.create_model("mine_vae", (D,), decay=DECAY, **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    other, x, eps = copy.deepcopy(model), torch.rand(BATCH, D), torch.randn(BATCH, LATENT)
    with noise([eps]):
        found = model.loss(x)
    mean, log_var = other.encoder(x).chunk(2, 1)
    std = torch.exp(0.5 * log_var)
    z = mean + std * eps
    estimator = MINE(Critic(other.discriminator), gamma=DECAY).double()
    estimator.proposal = NextCodes(z)
    at_first = copy.deepcopy(estimator._train_baseline)
    # the moving average of ours starts at 1, where T is 0
    estimator._train_baseline.ema = torch.ones(())
    bound = estimator.batch_loss(x, z).mean()
    nll = F.binary_cross_entropy_with_logits(other.decoder(z), x, reduction="none").sum(1).mean()
    kl = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(1).mean()
    information = estimator.log_ratio(x, z).mean()
    row = compare("mine_vae", "torch-mist", "MINE")
    row.equal("mi", found["mi"], information)
    row.equal("loss", found["loss"], nll + 0.9 * kl - 0.6 * information)
    row.equal("log M", model.log_average, estimator._train_baseline.ema.log())
    pairs = [
        [*zip(getattr(model, part).parameters(), getattr(other, part).parameters(), strict=True)]
        for part in ("encoder", "decoder", "discriminator")
    ]
    expected = nll + 0.9 * kl + 0.6 * bound
    row.equal_gradients(found["loss"], expected, pairs[0] + pairs[1], "gradient of encoder and decoder")
    row.equal_gradients(found["loss"], bound, pairs[2], "gradient of T")
    at_first(x=x, f_=other.discriminator(torch.cat([x, z.roll(-1, 0)], 1))[None, :, 0])
    reason = "ours averages exp T with 1 before the first step, theirs starts at the first batch's mean"
    row.deviates("log M after the first step", model.log_average, at_first.ema.log(), reason, follows="both")
