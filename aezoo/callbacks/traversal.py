"""Pictures of traversals of the latent space."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aezoo.callbacks.base import MAX_DRAWN, Picture, check_count
from aezoo.errors import AezooError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aezoo.autoencoder import Autoencoder

_INPUTS = 256


class Traversal(Picture):
    """Draws pictures/traversal.png, interpolation.png and, for two-dimensional codes, latent_map.png.

    The traversal changes one dimension of a sample's code at a time, from -span to span standard deviations if the
    prior is N(0, I), else over the range of the codes. Dimensions are sorted by KL if available, else by variance. The
    interpolation is linear between the codes of two samples, with the originals at both ends. The map decodes a grid of
    quantiles of the prior or, without a prior, of the codes.

    Args:
        n_dims: maximum number of dimensions to traverse.
        n_pairs: number of pairs of samples to interpolate between.
        steps: number of images per traversal or interpolation.
        span: range of the traversal, in standard deviations of the prior.
        side: number of images along each side of the map.
        every_n_epochs: epochs between two pictures; 0 disables them. None: every 5 epochs, or less often if all
            pictures would take more than 3 % of the fit's time.
    """

    def __init__(
        self,
        n_dims: int = 10,
        n_pairs: int = 5,
        steps: int = 9,
        span: float = 3.0,
        side: int = 20,
        every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(every_n_epochs, n_inputs=max(_INPUTS, 2 * n_pairs))
        if not 0 < span <= 100:
            raise AezooError(f"Traversal.span must be above 0 and at most 100, got {span}")
        self.n_dims, self.n_pairs = (
            check_count(self, "n_dims", n_dims, maximum=MAX_DRAWN),
            check_count(self, "n_pairs", n_pairs, maximum=MAX_DRAWN),
        )
        self.steps, self.side = (
            check_count(self, "steps", steps, 2, 1000),
            check_count(self, "side", side, 2, 1000),
        )
        self.span = span

    def draw(self, model: "Autoencoder", x: Tensor, y: Tensor | None) -> "dict[str, Figure]":
        from aezoo.callbacks import plotting

        codes = self.apply(model.encode, x).flatten(1)
        self._limits = plotting.value_range(x)
        figures = {"traversal": self._traversal(model, x, codes)}
        if len(x) > 1:
            figures["interpolation"] = self._interpolation(model, x, codes)
        if codes.shape[1] == 2 and plotting.is_image(model.input_shape):
            figures["latent_map"] = self._map(model, codes)
        return figures

    def _traversal(self, model: "Autoencoder", x: Tensor, codes: Tensor) -> "Figure":
        if model.normal_prior:
            kl = _mean_kl(self, model, x)
            order, names = kl.argsort(descending=True), [f"KL {value:.2f}" for value in kl.tolist()]
            ends = torch.tensor([[-self.span], [self.span]]).expand(2, codes.shape[1])
        else:
            spread = codes.var(0, unbiased=False)
            order, names = spread.argsort(descending=True), [f"var {value:.2g}" for value in spread.tolist()]
            ends = torch.stack([codes.amin(0), codes.amax(0)])
        walks, labels = [], []
        for d in order[: self.n_dims].tolist():
            walk = codes[:1].repeat(self.steps, 1)
            walk[:, d] = torch.linspace(float(ends[0, d]), float(ends[1, d]), self.steps)
            walks.append(walk)
            labels.append(f"z{d}  {names[d]}")
        decoded = self._decode(model, torch.cat(walks)).unflatten(0, (len(walks), self.steps))
        same = model.normal_prior
        positions = torch.linspace(-self.span, self.span, self.steps).tolist()
        columns = [f"{p:.1f}" for p in positions] if same else ["min", *[""] * (self.steps - 2), "max"]
        return self._figure(list(decoded), labels, columns)

    def _interpolation(self, model: "Autoencoder", x: Tensor, codes: Tensor) -> "Figure":
        pairs = min(self.n_pairs, len(x) // 2)
        weights = torch.linspace(0, 1, self.steps)[:, None]
        walks = [torch.lerp(codes[2 * i], codes[2 * i + 1], weights) for i in range(pairs)]
        decoded = self._decode(model, torch.cat(walks)).unflatten(0, (pairs, self.steps))
        rows = [torch.cat([x[2 * i, None], decoded[i], x[2 * i + 1, None]]) for i in range(pairs)]
        return self._figure(rows, [], ["original", *[f"{w:.2f}" for w in weights.flatten().tolist()], "original "])

    def _map(self, model: "Autoencoder", codes: Tensor) -> "Figure":
        from aezoo.callbacks import plotting

        levels = torch.linspace(0.02, 0.98, self.side)
        normal = torch.distributions.Normal(0.0, 1.0).icdf(levels)
        ticks = [normal if model.normal_prior else codes[:, d].quantile(levels) for d in (0, 1)]
        down, across = torch.meshgrid(ticks[1].flip(0), ticks[0], indexing="ij")
        decoded = self._decode(model, torch.stack([across.flatten(), down.flatten()], 1))
        edges = ticks[0].tolist(), ticks[1].flip(0).tolist()
        return plotting.map_figure(decoded, edges, self._limits, f"decode(z), z on quantiles; {self.caption}")

    def _decode(self, model: "Autoencoder", codes: Tensor) -> Tensor:
        return self.apply(lambda z: model.decode(z.unflatten(1, model.code_shape)), codes)

    def _figure(self, rows: list[Tensor], labels: list[str], columns: list[str]) -> "Figure":
        from aezoo.callbacks import plotting

        if plotting.is_image(rows[0].shape[1:]):
            return plotting.mosaic_figure(
                [plotting.tiles(r, self._limits) for r in rows], labels, columns, self.caption
            )
        ends = {"original": "first sample", "original ": "second sample"}
        names = [ends.get(name, name) or f"step {i}" for i, name in enumerate(columns)]
        panels = [dict(zip(names, row, strict=True)) for row in rows]
        return plotting.panel_figure(panels, labels, self.caption, ordered=True, columns=self.columns)


def _mean_kl(picture: Picture, model: Any, x: Tensor) -> Tensor:
    """Return KL(q(z_d|x) || N(0, 1)) of each dimension in nats, averaged over x."""

    def kl(part: Tensor) -> Tensor:
        mu, log_var = (p.float().flatten(1) for p in model.posterior(part)[:2])
        terms: Tensor = 0.5 * (mu**2 + log_var.exp() - 1 - log_var)
        return terms

    return picture.apply(kl, x).mean(0)
