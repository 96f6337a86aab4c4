"""Deep feature consistent VAE (Hou et al. 2016), https://arxiv.org/abs/1610.00291

    L = E_q[weight sum_l ||F_l(x) - F_l(xhat)||^2 / (2 n_l)] + beta KL(q(z|x) || p(z))     xhat = g(z)

F_l are the n_l activations of layer l of a frozen network, so that samples with similar activations have a small
distance.

    random          a convolutional network with random weights, the same everywhere (NumPy's RandomState(0), He et al.
                    2015 scale): no download; such features preserve the content of images (He, Wang & Hopcroft 2016,
                    https://papers.nips.cc/paper/2016/hash/58238e9ae2dd305d79c2ebc8c1883422-Abstract.html)
    vgg16, vgg19    relu1_1, relu2_1 and relu3_1 of torchvision's weights, the paper's VGG-123, if torch.hub has them
    torchvision:NAME, timm:NAME     feature maps of another network, see `aezoo.nets.blocks.features.feature_maps`
    a path          of such a file of weights (.pth), or of a run, checkpoint or saved model of the zoo: its encoder

The network is always in evaluation mode, gets no gradient and is not saved: a loaded model needs it only for losses and
scores. exp(-distance) is a density up to an unknown constant, so no ELBO, bits or log-likelihood are reported.

Shapes: B batch, D code.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.io.checkpoint import load_model
from aezoo.io.hub_files import local_path
from aezoo.models.variational.vae import VAE, VAEArgs
from aezoo.nets.blocks.features import (
    VGG,
    FeatureNet,
    has_feature_maps,
    named_features,
    random_features,
)
from aezoo.training.limits import check_above


class PerceptualVAE(VAE, tags=("generation",)):
    """A VAE that compares reconstructions with data by the activations of another network.

    Args:
        input_shape: shape of one sample; (1, H, W) or (3, H, W) for vgg16 and vgg19.
        features: random, vgg16, vgg19, torchvision:NAME, timm:NAME, or the path of a .pth file of VGG weights or of a
            model of the zoo.
        weight: nats for a mean squared difference of 2 in one layer.
        likelihood: whose mean of the decoder's output is the reconstruction, see vae; the rest of it is not used. Data
            outside of [0, 1] need gaussian.
        **kwargs: see `VAE`.
    """

    log_likelihood = None  # type: ignore[assignment]  # the constant of the density is not known

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        features: str = "random",
        weight: float = 1000.0,
        **kwargs: Unpack[VAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        features = str(features)
        self.update_hyperparameters(features=features)
        self.likelihood.requires_grad_(False)  # no term reads a scale
        check_above(0, weight=weight)
        known = features == "random" or features in VGG or has_feature_maps(features)
        if not known and not (features and (len(Path(features).parts) > 1 or Path(features).exists())):
            raise AezooError(
                f"features takes random, {', '.join(VGG)}, torchvision:NAME, timm:NAME or a path, got {features!r}"
            )
        self.features = features
        self.weight = weight
        # the tuple excludes the network from the state_dict, the optimiser, train() and the exchange between ranks
        self.frozen: tuple[FeatureNet, ...] = (random_features(self.input_shape),) if features == "random" else ()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        for net in self.frozen:
            net._apply(fn)
        return super()._apply(fn, recurse)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.feature_net()

    def feature_net(self) -> FeatureNet:
        """The network, read from its file at the first call, so that a model can be loaded without the file.

        Raises:
            AezooError: there is no such file, or it does not fit the data.
        """
        if not self.frozen:
            net = named_features(self.features, self.input_shape)
            net = zoo_features(self.features, self.input_shape) if net is None else net
            self.frozen = (net.to(next(self.decoder.parameters())),)
        return self.frozen[0]

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        """Return the weighted distance, which replaces -log p(x|z): (B, *shape), (B, *shape) -> (B,)."""
        net = self.feature_net()
        with torch.autocast(x.device.type, enabled=False):
            x_hat = self.likelihood.mean(at_least_float32(params))
            pairs = zip(net(x_hat), net(at_least_float32(x)), strict=True)
            distances = [((a - b) ** 2).flatten(1).mean(1) / 2 for a, b in pairs]
            return self.weight * torch.stack(distances).sum(0)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        return {"loss": nll + self.beta * (kl - self.capacity).abs(), "nll": nll, "kl": kl}


def zoo_features(path: str, input_shape: tuple[int, ...]) -> FeatureNet:
    """Return the encoder of a trained model of the zoo."""
    model = load_model(local_path(path)).float()
    if model.input_shape != input_shape:
        raise AezooError(f"features: the model in {path} takes samples of {model.input_shape}, not {input_shape}")
    net = FeatureNet([*model.encoder.children()] if isinstance(model.encoder, nn.Sequential) else [])
    if not net.read:
        raise AezooError(f"features: the encoder of the model in {path} has no hidden layers: use another, or random")
    return net
