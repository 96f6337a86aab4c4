"""A small classifier that is trained on a data set's labels in seconds and provides activations of its samples."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from aezoo.nets.build import encoder

STEPS = 500
_BATCH, _LR, _SIZE = 128, 1e-3, 64


class Classifier(nn.Module):
    """An encoder to 64 activations, followed by a layer of logits.

    Args:
        input_shape: shape of one sample.
        classes: number of classes.
    """

    low: Tensor
    scale: Tensor

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        net, widths = ("conv", (16, 32)) if len(input_shape) > 1 else ("mlp", (128,))
        self.body = encoder(net, input_shape, (_SIZE,), widths)
        self.features = nn.ReLU()
        self.head = nn.Linear(_SIZE, classes)
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def activations(self, x: Tensor) -> Tensor:
        """Return the input of the last layer, (B, *input_shape) -> (B, 64)."""
        found: Tensor = self.features(self.body((x - self.low) / self.scale))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, *input_shape) -> (B, classes)."""
        found: Tensor = self.head(self.activations(x))
        return found

    def standardise(self, x: Tensor) -> None:
        """Set the shift and scale of inputs from the statistics of these samples."""
        self.low.copy_(x.mean())
        self.scale.copy_(x.std() + 1e-6)

    def learn(self, x: Tensor, y: Tensor, advance: Callable[[int], None] = lambda n: None) -> None:
        """Train for `STEPS` steps on samples (N, *input_shape) and labels (N,), drawn by torch's RNG; then freeze."""
        device = self.low.device
        optimizer = torch.optim.Adam(self.requires_grad_(True).train().parameters(), _LR)
        for _ in range(STEPS):
            rows = torch.randint(len(x), (_BATCH,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(self(x[rows].to(device)), y[rows].long().to(device)).backward()
            optimizer.step()
            advance(1)
        self.requires_grad_(False).eval()
