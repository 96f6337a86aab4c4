"""Where validation samples lie in the latent space."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from aezoo.callbacks.base import Picture, check_count, tensorboard_writers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aezoo.autoencoder import Autoencoder

# a sprite sheet may have 8192 pixels a side
_SPRITE = 64


class LatentScatter(Picture):
    """pictures/latents.png: codes of validation samples, coloured by label; more than two dimensions through PCA.

    Args:
        n: number of samples.
        every_n_epochs: epochs between two pictures; 0 turns them off.
    """

    def __init__(self, n: int = 2000, every_n_epochs: int = 5) -> None:
        super().__init__(every_n_epochs, n_inputs=check_count(self, "n", n, 3))
        self.n = n

    def draw(self, model: "Autoencoder", x: Tensor, y: Tensor | None) -> "dict[str, Figure]":
        from aezoo.callbacks import drawing

        points, labels = principal_plane(self.apply(model.encode, x).flatten(1))
        return {"latents": drawing.scatter_figure(points, y, labels, self.caption)}


class Projector(Picture):
    """TensorBoard's Projector tab: codes of validation samples with their labels, and their images as sprites.

    Written once, at the end of a fit. Needs a TensorBoardLogger.

    Args:
        n: number of samples; 0 turns it off.
    """

    def __init__(self, n: int = 500) -> None:
        super().__init__(every_n_epochs=int(n > 0), n_inputs=check_count(self, "n", n, 0))
        self.n = n

    def draw(self, model: "Autoencoder", x: Tensor, y: Tensor | None) -> "dict[str, Figure]":
        from aezoo.callbacks import drawing

        codes = self.apply(model.encode, x).flatten(1)
        sprites = _sprites(x) if drawing.is_image(model.input_shape) else None
        for writer in tensorboard_writers(self._trainer):
            writer.add_embedding(
                codes,
                metadata=None if y is None else y.tolist(),
                label_img=sprites,
                global_step=self._trainer.global_step,
                tag="codes",
            )
        return {}

    def due(self, epoch: int, last: bool) -> bool:
        return last


def principal_plane(codes: Tensor) -> tuple[Tensor, tuple[str, str]]:
    """Codes (N, D) as points (N, 2), and what the two axes are."""
    if codes.shape[1] == 2:
        return codes, ("z0", "z1")
    if codes.shape[1] == 1:
        return torch.cat([codes, torch.rand_like(codes)], 1), ("z0", "spread at random")
    centred = codes - codes.mean(0)
    _, s, v = torch.pca_lowrank(centred, q=2, center=False, niter=4)
    # a principal axis has no sign of its own: fix it, so that pictures of two epochs compare
    v = v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    shares = (s**2 / centred.square().sum().clamp_min(1e-12) * 100).tolist()
    return centred @ v, (f"PC 1 ({shares[0]:.0f} %)", f"PC 2 ({shares[1]:.0f} %)")


def _sprites(x: Tensor) -> Tensor:
    from aezoo.callbacks import drawing

    rgb = torch.tensor(drawing.tiles(x, drawing.value_range(x))).permute(0, 3, 1, 2)
    side = max(rgb.shape[2:])
    # TensorBoard wants square sprites: pad, then shrink what is large
    rgb = F.pad(rgb, (0, side - rgb.shape[3], 0, side - rgb.shape[2]), value=1.0)
    return rgb if side <= _SPRITE else F.interpolate(rgb, size=(_SPRITE, _SPRITE), mode="area")
