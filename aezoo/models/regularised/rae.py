"""RAE, regularised autoencoder (Ghosh et al. 2020), https://arxiv.org/abs/1903.12436

    L = E[-log p(x | g(z))] + beta 1/2 ||z||^2 + lam R     z = f(x)     (section 3)
    R = ||theta_g||^2 (l2), ||dg/dz||_F^2 (gp), or 0

L is in nats per sample. A regulariser of the decoder replaces the noise of a VAE, which makes its decoder smooth. With
sn, there is no term R: each weight W of the decoder is divided by its largest singular value (Miyato et al. 2018,
https://arxiv.org/abs/1802.05957); for a convolution, by that of its kernel as a matrix. The singular vector is updated
after every step, starting from its previous value; with an update before the step, as in `torch.nn.utils`, the largest
singular value was 1.16 in a run on MNIST.

gp uses the Jacobian J of the reconstruction; for a linear decoder, it is ||W||_F^2. It is estimated as E ||J' v||^2, v
~ N(0, I), with one draw of v for each sample (Hutchinson 1989, https://doi.org/10.1080/03610918908812806). The authors'
code uses the gradient of the sum of g^2, which is 2 J' g.

There is no prior. `aezoo generate --prior gmm` fits a density to the codes after training (section 4).

Shapes: B batch, D code; O outputs and I inputs of a layer, K vectors.
"""

import math
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.func import vjp
from torch.nn.functional import normalize
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.errors import AezooError
from aezoo.training.limits import check_at_least
from aezoo.training.projected_weights import Constrained

REGULARISERS = ("l2", "gp", "sn", "none")
# products with W'W in each search; in a run on MNIST, 10 gave spectral norms of 1.005, and 16 of 1.0008
_PRODUCTS = 16
_WEIGHTED = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class SpectralNorm(nn.Module):
    """Maps W to W / ||W||_2, with ||W||_2 = ||W v||, where v is the first right singular vector of W as a matrix."""

    v_I: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("v_I", normalize(torch.randn(weight[0].numel()), dim=0))
        if not weight.is_meta:  # else v is loaded with the weights
            for _ in range(10):
                self.search(weight)

    def forward(self, weight: Tensor) -> Tensor:
        norm = (at_least_float32(weight).flatten(1) * self.v_I).sum(1).norm()  # autocast would round W v
        return weight / norm.clamp(min=1e-12).to(weight.dtype)

    @torch.no_grad()
    def search(self, weight: Tensor) -> None:
        """Update v to its best approximation in the Krylov space that starts at the previous v."""
        # diverged weights are reported elsewhere; the squares of 1e15 can be summed without overflow
        W_OI = at_least_float32(weight).flatten(1).nan_to_num().clamp(-1e15, 1e15)
        space = [at_least_float32(self.v_I)]
        for _ in range(_PRODUCTS):
            space.append(normalize(W_OI.T @ (W_OI @ space[-1]), dim=0))
        basis_IK = torch.linalg.qr(torch.stack(space, 1)).Q
        self.v_I.copy_(basis_IK @ torch.linalg.svd(W_OI @ basis_IK, full_matrices=False).Vh[0])


class RAE(Constrained, NetworkAutoencoder, defaults={"likelihood": "gaussian"}, tags=("generation",)):
    """Deterministic codes near 0 and a smooth decoder; samples use codes from a density that is fitted after training.

    Args:
        latent_dim: D, size of the code.
        beta: weight of 1/2 ||z||^2.
        regulariser: regulariser of the decoder: l2 (of its parameters), gp (of its Jacobian), sn (spectral norm) or
            none.
        regulariser_weight: lam, weight of l2 or gp.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        beta: float = 1e-4,
        regulariser: str = "l2",
        regulariser_weight: float = 1e-7,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        if not (0 <= beta < math.inf and 0 <= regulariser_weight < math.inf):
            raise AezooError(f"beta and regulariser_weight must be at least 0 and finite: {beta}, {regulariser_weight}")
        if regulariser not in REGULARISERS:
            raise AezooError(f"regulariser takes {', '.join(REGULARISERS)}, got {regulariser!r}")
        self.beta = beta
        self.regulariser = regulariser
        self.regulariser_weight = regulariser_weight
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)
        layers = [m for m in self.decoder.modules() if isinstance(m, _WEIGHTED)]
        for layer in layers if regulariser == "sn" else []:
            register_parametrization(layer, "weight", SpectralNorm(layer.weight))

    def after_optimizer_step(self) -> None:
        for held in self.decoder.modules():
            if isinstance(held, ParametrizationList):
                held[0].search(held.original)  # type: ignore[operator]

    def jacobian_norm(self, z_BD: Tensor) -> Tensor:
        """Return an unbiased estimate of ||dg/dz||_F^2 of each sample, (B, D) -> (B,)."""
        g, pullback, *_ = vjp(self.decode, z_BD)
        Jv_BD: Tensor = pullback(torch.randn_like(g))[0]
        return at_least_float32(Jv_BD).square().sum(1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BD = self.encoder(x)
        nll = self.nll(self.decoder(z_BD), x).mean()
        code = 0.5 * at_least_float32(z_BD).square().sum(1).mean()
        terms = {"loss": nll + self.beta * code, "nll": nll, "code": code}
        if self.regulariser == "l2":
            terms["l2"] = torch.stack([at_least_float32(p).square().sum() for p in self.decoder.parameters()]).sum()
        if self.regulariser == "gp":
            terms["gp"] = self.jacobian_norm(z_BD).mean()
        if self.regulariser in terms:
            terms["loss"] = terms["loss"] + self.regulariser_weight * terms[self.regulariser]
        return terms
