"""STFPM, student-teacher feature pyramid matching (Wang et al. 2021), https://arxiv.org/abs/2103.04257

A student learns to predict the feature maps of a frozen teacher on normal samples; on anomalies, the two differ:

    L = sum_l 1/P_l sum_p d_lp - log p(x | g(z))     d_lp = 1/2 ||t_lp / ||t_lp|| - s_lp / ||s_lp||  ||^2  (equation 1)

for the feature maps l of the teacher t and the student s, a network of the same architecture with random initial
weights, and their P_l positions p. The map is the product over l of the interpolated d_l, and the score is its maximum.
g is a decoder that shows codes as samples; z is the teacher's last map, which receives no gradient (the paper has no
such decoder).

BatchNorm in the student uses stored statistics, computed on smooth random images, and only its scale and shift are
trained: the output for a sample therefore does not depend on its batch. The paper's student uses batch statistics. The
paper uses the maps of stages 1 to 3 of a ResNet-18: features="timm:resnet18.a1_in1k,pretrained,out_indices=1:2:3".
"""

import copy
from typing import Any, Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.frozen_features import FrozenFeatureArgs, FrozenFeatureAutoencoder
from aezoo.nets.blocks.features import FeatureNet
from aezoo.nets.blocks.timm_backbone import start_statistics


class StudentTeacher(FrozenFeatureAutoencoder, tags=("anomaly",)):
    """A student that imitates a frozen network on normal samples; the score is its error, which is larger on anomalies.

    Args:
        **kwargs: see `FrozenFeatureAutoencoder`.
    """

    def __init__(self, input_shape: tuple[int, ...], **kwargs: Unpack[FrozenFeatureArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        self.code_shape = self.map_shapes[-1]
        self.student: FeatureNet = copy.deepcopy(self.backbone)
        for part in self.student.modules():
            reset: Any = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()
        if next(self.student.parameters()).device.type != "meta":
            start_statistics(self.student, self.input_shape[1:], self.input_shape[0])
        self.student.requires_grad_(True)
        self.decoder = self.build_image_decoder()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.student.eval()
        return self

    def encode(self, x: Tensor) -> Tensor:
        return self.maps(x)[-1].to(x.dtype)

    def distances(self, x: Tensor, maps: list[Tensor]) -> list[Tensor]:
        """Return d_l of each feature map, (B, *input_shape) -> (B, H_l, W_l) each."""
        with torch.autocast(x.device.type, enabled=False):
            imitated: list[Tensor] = self.student(at_least_float32(x))
            pairs = zip(maps, imitated, strict=True)
            return [(F.normalize(t) - F.normalize(at_least_float32(s))).square().sum(1) / 2 for t, s in pairs]

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        maps = self.maps(x)
        imitation = torch.stack([d.mean() for d in self.distances(x, maps)]).sum()
        nll = self.decoder_nll(maps[-1], x)
        return {"loss": imitation + nll, "nll": nll, "imitation": imitation}

    def anomaly_map(self, x: Tensor) -> Tensor:
        """Return the product of all distances at each pixel, (B, C, H, W) -> (B, H, W)."""
        return torch.stack([self.enlarged(d) for d in self.distances(x, self.maps(x))]).prod(0)
