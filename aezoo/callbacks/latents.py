"""Pictures of validation samples in the latent space."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aezoo.callbacks import media
from aezoo.callbacks.base import Picture, check_count
from aezoo.io.atomic_files import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aezoo.autoencoder import Autoencoder

# a sprite sheet may have at most 8192 pixels per side
_SPRITE = 64


class LatentScatter(Picture):
    """Draws pictures/latents.png, the codes of validation samples coloured by label, reduced to two dimensions by PCA.

    Args:
        n: number of samples.
        every_n_epochs: epochs between two pictures; 0 disables them. None: every 5 epochs, or less often if all
            pictures would take more than 3 % of the fit's time.
    """

    def __init__(self, n: int = 2000, every_n_epochs: int | None = None) -> None:
        super().__init__(every_n_epochs, n_inputs=check_count(self, "n", n, 3, 1_000_000))
        self.n = n

    def draw(self, model: "Autoencoder", x: Tensor, y: Tensor | None) -> "dict[str, Figure]":
        from aezoo.callbacks import plotting

        points, labels = principal_plane(self.apply(model.encode, x).flatten(1))
        return {"latents": plotting.scatter_figure(points, y, labels, self.caption)}


class Projector(Picture):
    """Writes TensorBoard's Projector tab: codes of validation samples with their labels, and their images as sprites.

    Written once, at the end of a fit, to `projector/`; a resumed run replaces it. W&B receives the same as a table,
    MLflow as a CSV file.

    Args:
        n: number of samples; 0 disables it.
    """

    def __init__(self, n: int = 500) -> None:
        super().__init__(every_n_epochs=int(n > 0), n_inputs=check_count(self, "n", n, 0, 1_000_000))
        self.requested_period = 0
        self.n = n

    def draw(self, model: "Autoencoder", x: Tensor, y: Tensor | None) -> "dict[str, Figure]":
        from aezoo.callbacks import plotting

        codes = self.apply(model.encode, x).flatten(1)
        sprites = _sprites(x) if plotting.is_image(model.input_shape) else None
        name = f"codes at step {self._trainer.global_step}"
        columns = {} if y is None else {"label": y}
        media.log_embedding(
            self._trainer, "codes", codes, columns, sprites,
            lambda folder: write_embedding(folder, name, codes, columns, sprites),
        )  # fmt: skip
        return {}

    def is_due(self, epoch: int, last: bool) -> bool:
        return last


def write_embedding(
    run: Path, name: str, codes: Tensor, columns: Mapping[str, Tensor], sprites: Tensor | None, prefix: str = ""
) -> None:
    """Write the files of the Projector tab; SummaryWriter.add_embedding would create a folder per step.

    Points with the same prefix are replaced, others are kept.

    Args:
        run: the folder of the event files.
        name: name of the points in the tab.
        codes: (N, D).
        columns: metadata of the points, (N,) integers each.
        sprites: (N, 3, side, side) in [0, 1].
        prefix: prefix of the file names.
    """
    from tensorboard.plugins.projector.projector_config_pb2 import EmbeddingInfo

    from aezoo.callbacks import plotting

    folder = run / "projector"
    folder.mkdir(parents=True, exist_ok=True)
    info = EmbeddingInfo(tensor_name=name, tensor_path=f"projector/{prefix}codes.tsv")
    # the tab starts with three principal components and shows nothing if there are fewer dimensions
    codes = F.pad(codes, (0, max(0, 3 - codes.shape[1])))
    np.savetxt(run / info.tensor_path, codes.numpy(), "%.6g", "\t")
    if columns:
        info.metadata_path = f"projector/{prefix}labels.tsv"
        # the tab expects a first line of names if and only if there are several columns
        names = "\t".join(columns) if len(columns) > 1 else ""
        np.savetxt(
            run / info.metadata_path, torch.stack([*columns.values()], 1).numpy(), "%d", "\t", header=names, comments=""
        )
    if sprites is not None:
        side, count = sprites.shape[-1], math.ceil(len(sprites) ** 0.5)
        grid = F.pad(sprites, (0, 0, 0, 0, 0, 0, 0, count**2 - len(sprites))).unflatten(0, (count, count))
        sheet = grid.permute(0, 3, 1, 4, 2).reshape(count * side, count * side, 3)
        info.sprite.image_path = f"projector/{prefix}sprites.png"
        info.sprite.single_image_dim.extend([side, side])
        plotting.write_png(run / info.sprite.image_path, (sheet * 255).round().byte().numpy())
    _add_to_config(run / "projector_config.pbtxt", info)


def _add_to_config(path: Path, info: Any) -> None:
    """Add an embedding to the list that the tab reads, replacing an entry with the same file."""
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    others = ProjectorConfig()
    if path.is_file():
        try:
            text_format.Parse(path.read_text("utf-8"), others)
        except text_format.ParseError:  # from a run that was killed while writing
            others.Clear()
    kept = [other for other in others.embeddings if other.tensor_path != info.tensor_path]
    config = ProjectorConfig(embeddings=sorted([*kept, info], key=lambda entry: entry.tensor_path))
    write(path, lambda file: file.write(text_format.MessageToString(config).encode()))


def principal_plane(codes: Tensor) -> tuple[Tensor, tuple[str, str]]:
    """Project codes (N, D) to points (N, 2); also return the labels of the two axes."""
    if codes.shape[1] == 2 or (len(codes) == 1 and codes.shape[1] > 2):
        return codes[:, :2], ("z0", "z1")
    if codes.shape[1] == 1:
        return torch.cat([codes, torch.rand_like(codes)], 1), ("z0", "random")
    centred = codes - codes.mean(0)
    # more components than are shown, since with only two the second depends on the random initialisation
    _, s, v = torch.pca_lowrank(centred, q=min(8, *centred.shape), center=False, niter=4)
    s, v = s[:2], v[:, :2]
    # the sign of a principal axis is arbitrary; it is fixed so that pictures of two epochs are comparable
    v = v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    shares = (s**2 / centred.square().sum().clamp_min(1e-12) * 100).tolist()
    return centred @ v, (f"PC 1 ({shares[0]:.0f} %)", f"PC 2 ({shares[1]:.0f} %)")


def _sprites(x: Tensor) -> Tensor:
    from aezoo.callbacks import plotting

    rgb = torch.tensor(plotting.tiles(x, plotting.value_range(x))).permute(0, 3, 1, 2)
    side = max(rgb.shape[2:])
    # TensorBoard requires square sprites: pad, then shrink large ones
    rgb = F.pad(rgb, (0, side - rgb.shape[3], 0, side - rgb.shape[2]), value=1.0)
    return rgb if side <= _SPRITE else F.interpolate(rgb, size=(_SPRITE, _SPRITE), mode="area")
