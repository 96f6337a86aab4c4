"""Linear autoencoder (Baldi & Hornik 1989), https://doi.org/10.1016/0893-6080(89)90014-2

Minimises the squared error of a linear map through a narrow code:

    L = ||x - x_hat||^2     z = W x + b     x_hat = V z + c

Every critical point that is not a saddle point spans the first D principal components, so the training error is at
best that of PCA with D components. The likelihood N(x_hat, 1/2) makes -log p = L + X/2 log(pi).

Shapes: B batch, X data dimensions, D code.
"""

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class LinearAE(Autoencoder, defaults={"likelihood": "gaussian"}, tags=("representation",)):
    """One linear encoder layer and one linear decoder layer: principal component analysis by gradient descent.

    Args:
        input_shape: shape of one sample; any.
        latent_dim: D, size of the code.
        **kwargs: see `Autoencoder`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, latent_dim: int = 16, **kwargs: Unpack[TrainingArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        self.code_shape = (latent_dim,)
        x_dim = math.prod(self.input_shape)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(x_dim, latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, x_dim), nn.Unflatten(1, self.input_shape))
        # W = V' and V'V = I initially, as at an optimum: independent random layers stay near saddle points for long
        with torch.no_grad():
            V_XD = nn.init.orthogonal_(self.decoder.get_parameter("0.weight"))
            self.encoder.get_parameter("1.weight").copy_(V_XD.T)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll_B = self.nll(self.decoder(self.encoder(x)), x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}
