"""VA-VAE, codes aligned with the features of a trained network (Yao et al. 2025), https://arxiv.org/abs/2501.01423

A diffusion model learns codes more easily if they resemble, position by position, the features of a pretrained image
network than if they only reconstruct well; in nats per sample:

    L = R + beta KL(q(z|x) || p(z)) + w_D lambda L_G + w_A lambda_A A     R, L_G, L_D and lambda as in autoencoder_kl
    A = mean_i (1 - m_c - cos(v_i, f_i))^+ + mean_ij (|cos(v_i, v_j) - cos(f_i, f_j)| - m_d)^+     v = W z
    lambda_A = ||dR / dW_e|| / (||dA / dW_e|| + 1e-4), at most 1e8     W_e the weight of the encoder's last layer

for positions i and j of a sample's code. f are the features F(x) on the code's grid, averaged over the area of each
position. F is frozen; it is DINOv2 in the paper, and here one of the networks of perceptual losses. A enters the loss
through its gradient only. w_A = 0 gives autoencoder_kl. W is a linear map from codes to features. W and the constants
are those of https://github.com/hustvl/LightningDiT, which uses the margins only in its last epochs.

Shapes: B batch, C channels, F channels of features, P positions.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.models.latent_diffusion.autoencoder_kl import AutoencoderKL, AutoencoderKLArgs
from aezoo.nets.blocks import adversarial
from aezoo.nets.blocks.adversarial import gradient_only, value_and_grad
from aezoo.nets.blocks.features import FeatureDistance
from aezoo.nets.conv import CONVS
from aezoo.training.limits import check_at_least


class VAVAE(AutoencoderKL, tags=("latent diffusion",)):
    """Learns a Gaussian feature map that resembles the features of a frozen network.

    Args:
        foundation: network whose features the codes should resemble: random, vgg16, vgg19, a .pth file of such a
            network, or the last feature map of torchvision:NAME or timm:NAME, such as
            timm:vit_base_patch14_dinov2.lvd142m,pretrained.
        alignment_weight: w_A.
        cosine_margin: m_c, tolerated distance of a cosine from 1.
        matrix_margin: m_d, tolerated difference between the cosines of two positions.
        **kwargs: see `AutoencoderKL`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        foundation: str = "random",
        alignment_weight: float = 0.1,
        cosine_margin: float = 0.5,
        matrix_margin: float = 0.25,
        **kwargs: Unpack[AutoencoderKLArgs],
    ) -> None:
        check_at_least(0, alignment_weight=alignment_weight, cosine_margin=cosine_margin, matrix_margin=matrix_margin)
        if foundation == "none":
            raise AezooError("foundation must be a network: without one use autoencoder_kl")
        super().__init__(input_shape, **kwargs)
        self.alignment_weight = alignment_weight
        self.margins = (cosine_margin, matrix_margin)
        self.foundation = FeatureDistance(foundation, self.input_shape, "foundation")
        self.projection = CONVS[len(input_shape) - 1](self.latent_dim, self.foundation.channels, 1, bias=False)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.foundation.read()

    def alignment_loss(self, z: Tensor, f: Tensor) -> Tensor:
        """Return A, (B, C, *grid), (B, F, *grid) -> ()."""
        cosine_margin, matrix_margin = self.margins
        v_BFP, f_BFP = (F.normalize(at_least_float32(part).flatten(2), dim=1) for part in (self.projection(z), f))
        apart_BPP = (v_BFP.mT @ v_BFP - f_BFP.mT @ f_BFP).abs()
        cosine_BP = (v_BFP * f_BFP).sum(1)
        return (1 - cosine_margin - cosine_BP).relu().mean() + (apart_BPP - matrix_margin).relu().mean()

    @torch.no_grad()
    def features_on_grid(self, x: Tensor, grid: torch.Size) -> Tensor:
        """Return f, (B, *input_shape) -> (B, F, *grid)."""
        net = self.foundation.move_to(x).read()
        assert net is not None
        with torch.autocast(x.device.type, enabled=False):
            return F.interpolate(net(at_least_float32(x))[-1], grid, mode="area")

    def extra_terms(self, x: Tensor, z: Tensor, mu: Tensor, g_R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.alignment_weight:
            return super().extra_terms(x, z, mu, g_R)
        f, z = self.features_on_grid(x, z.shape[2:]), z.to(x.dtype)
        alignment, g_A = value_and_grad(lambda at: self.alignment_loss(at, f), z)
        moments, to_last_layer = adversarial.last_layer_vjp(self.encoder, x)
        g_z = adversarial.input_gradient(self.decoder, z, g_R), g_A
        # z = mu + exp(log_var / 2) noise
        at_moments = (torch.cat([g, g * 0.5 * (z - mu).detach()], 1).to(moments.dtype) for g in g_z)
        weight = adversarial.adaptive_weight(
            *(self.batch_mean(to_last_layer(g)[None]) for g in at_moments), max_weight=1e8
        )
        terms = {"alignment": alignment, "alignment_weight": weight}
        return gradient_only(self.alignment_weight * weight * alignment), terms
