"""Models with one mistake each, for the proof that the checks of `aezoo.testing` can fail."""

import dataclasses
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.bases.entropy_coded import Coder, EntropyCoded, Factorised, Table
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.errors import AezooError
from aezoo.quantisers.fsq import FSQ


class Sound(Autoencoder):
    """A small model without a mistake.

    Args:
        input_shape: shape of one sample; any.
        latent_dim: size of the code.
        widths: sizes of the hidden layers.
        lr: learning rate.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 8,
        widths: tuple[int, ...] = (32,),
        lr: float = 1e-3,
    ) -> None:
        super().__init__(input_shape, lr=lr)
        self.save_hyperparameters()
        self.code_shape = (latent_dim,)
        x_dim = math.prod(self.input_shape)
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(x_dim, widths[0]), nn.ReLU(), nn.Linear(widths[0], latent_dim)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, widths[0]),
            nn.ReLU(),
            nn.Linear(widths[0], x_dim),
            nn.Unflatten(1, self.input_shape),
        )

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.encode(x)), x).mean()
        return {"loss": nll, "nll": nll}


class ArgumentUndescribed(Autoencoder):
    """The docstring leaves out an argument.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...], *, latent_dim: int = 8) -> None:
        super().__init__(input_shape)
        self.save_hyperparameters()
        self.code_shape = (latent_dim,)


class DescribesWhatIsNotThere(Sound):
    """Describes an argument that was renamed.

    Args:
        input_shape: shape of one sample.
        latent_size: size of the code.
        latent_dim: size of the code.
    """

    def __init__(self, input_shape: tuple[int, ...], *, latent_dim: int = 8) -> None:
        super().__init__(input_shape, latent_dim=latent_dim)
        self.save_hyperparameters()


class ArgumentsInBulk(Sound):
    """Takes anything.

    Args:
        input_shape: shape of one sample.
        kwargs: for the parent.
    """

    def __init__(self, input_shape: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(input_shape, **kwargs)


class PositionalArgument(Sound):
    """An argument is not keyword-only.

    Args:
        input_shape: shape of one sample.
        latent_dim: size of the code.
    """

    def __init__(self, input_shape: tuple[int, ...], latent_dim: int = 8) -> None:
        super().__init__(input_shape, latent_dim=latent_dim)
        self.save_hyperparameters()


class NoDefault(Sound):
    """An argument has no default.

    Args:
        input_shape: shape of one sample.
        latent_dim: size of the code.
    """

    def __init__(self, input_shape: tuple[int, ...], *, latent_dim: int) -> None:
        super().__init__(input_shape, latent_dim=latent_dim)
        self.save_hyperparameters()


class ModuleAsArgument(Sound):
    """A module as a hyperparameter: no checkpoint of it loads.

    Args:
        input_shape: shape of one sample.
        act: an activation.
    """

    def __init__(self, input_shape: tuple[int, ...], *, act: nn.Module = nn.ReLU()) -> None:  # noqa: B008
        super().__init__(input_shape)
        self.save_hyperparameters()


class HyperparametersLost(Sound):
    """Keeps the parent's hyperparameters and loses its own.

    Args:
        input_shape: shape of one sample.
        scale: not kept.
    """

    def __init__(self, input_shape: tuple[int, ...], *, scale: float = 1.0) -> None:
        super().__init__(input_shape)
        self.save_hyperparameters(ignore=["scale"])


class ChangesItsArguments(Sound):
    """Mirrors the widths in the caller's own list.

    Args:
        input_shape: shape of one sample.
        widths: sizes of the hidden layers.
    """

    def __init__(self, input_shape: tuple[int, ...], *, widths: tuple[int, ...] = (32, 16)) -> None:
        super().__init__(input_shape, widths=tuple(widths))
        self.save_hyperparameters()
        if isinstance(widths, list):
            widths.reverse()


class HardCodedShape(Sound):
    """Works on 28x28 alone and does not say so."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x.reshape(-1, 1, 28, 28))


class RefusesInTorchsWords(Sound):
    """A shape that it cannot take ends in torch's own error.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        self.save_hyperparameters()
        nn.Conv2d(input_shape[0], 4, 3)(torch.zeros(1, *input_shape))


class TakesNothing(Sound):
    """Refuses every shape.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        raise AezooError("this model takes (7, 7) only")


class WrongCodeShape(Sound):
    """Its codes have another shape than code_shape says."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x)[:, None]

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z[:, 0])


class OneScoreForTheBatch(Sound):
    """The score is a mean over the batch."""

    def score(self, x: Tensor) -> Tensor:
        return super().score(x).mean()


class SamplesWithoutPrior(Sound):
    """`sample` works and has_prior denies it."""

    def sample(self, n: int) -> Tensor:
        return torch.rand(n, *self.input_shape)


class PriorWithoutSamples(Sound):
    """has_prior promises samples that are not there."""

    has_prior = True


class NoLoss(Sound):
    """The terms lack `loss`."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return {"nll": super().loss(x)["nll"]}


class LossWithoutGradient(Sound):
    """The loss is cut off from the parameters."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in super().loss(x).items()}


class LossNotFinite(Sound):
    """log(0) in a term."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x) | {"entropy": torch.log(self.encode(x).relu().min() * 0)}


class TermPerSample(Sound):
    """A term is not averaged."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x) | {"size": self.encode(x).abs().sum(1)}


class TermHidesMetric(Sound):
    """A term has the name of a metric of every evaluation."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x) | {"mse": (self(x) - x).square().mean()}


class InfiniteGradient(Sound):
    """sqrt at 0: a finite loss with an infinite gradient."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        length = (self.encode(x) * 0).square().sum().sqrt()
        return terms | {"loss": terms["loss"] + length}


class SpreadOfTheBatch(Sound):
    """The unbiased variance of one sample does not exist."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        return terms | {"loss": terms["loss"] + self.encode(x).var(0).mean()}


class DetachedCode(Sound):
    """No gradient reaches the encoder."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.encode(x).detach()), x).mean()
        return {"loss": nll, "nll": nll}


class DeadLayer(Sound):
    """A layer that nothing uses.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        self.save_hyperparameters()
        self.unused = nn.Linear(2, 2)


class InPlaceNoise(Sound):
    """Corrupts the caller's batch, which is the target too."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x.mul_(0.9) if self.training else x)


class InPlaceDecode(Sound):
    """Clips the caller's code."""

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z.clamp_(-0.01, 0.01))


class DiscreteByName(Sound):
    """Says that its code is discrete, and has no indices."""

    discrete_code = True


class Indexed(DiscreteAutoencoder):
    """A small model with indices, without a mistake.

    Args:
        input_shape: shape of one sample; any.
        lr: learning rate.
    """

    def __init__(self, input_shape: tuple[int, ...], *, lr: float = 1e-3) -> None:
        super().__init__(input_shape, lr=lr)
        self.save_hyperparameters()
        self.build_nets("mlp", (3, 3), (), "relu", 4)
        self.quantiser = FSQ((2, 2, 2))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.encode(x)), x).mean()
        return {"loss": nll, "nll": nll}


class OneTooMany(Indexed):
    """Counts from one."""

    def encode_indices(self, x: Tensor) -> Tensor:
        return super().encode_indices(x) + 1

    def codes(self, indices: Tensor) -> Tensor:
        return super().codes(indices - 1)


class KeepsMoreThanIndices(Indexed):
    """The decoder sees a little of what was not quantised."""

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x) + 0.1 * self.encoder(x))


class OtherIndicesWhenExported(Indexed):
    """A branch for the compiler alone."""

    def encode_indices(self, x: Tensor) -> Tensor:
        indices = super().encode_indices(x)
        return 7 - indices if torch.compiler.is_compiling() else indices


class LawOfWhatIsNotYetCoded(EntropyCoded):
    """Takes the mean from the code itself, which a reader of a file does not know.

    Args:
        input_shape: shape of one sample; any.
        lr: learning rate.
    """

    def __init__(self, input_shape: tuple[int, ...], *, lr: float = 1e-3) -> None:
        super().__init__(input_shape, lr=lr)
        self.save_hyperparameters()
        self.build_nets("mlp", 3, (), "relu", 0.01)
        self.density = Factorised(3)

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        law = self.density.distribution((n, *self.code_shape))
        return coder(y, law if y is None else dataclasses.replace(law, mean=y))

    def tables(self) -> list[Table]:
        return self.density.tables()


class SumOverBatch(Sound):
    """Adds up the batch, so that its size changes the learning rate."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.encode(x)), x).sum()
        return {"loss": nll, "nll": nll}


class BatchStatisticsInEvaluation(Sound):
    """Centres codes by their batch."""

    def encode(self, x: Tensor) -> Tensor:
        z = super().encode(x)
        return z - z.mean(0)


class NoiseInEvaluation(Sound):
    """encode draws from the posterior instead of giving its mean."""

    def encode(self, x: Tensor) -> Tensor:
        z = super().encode(x)
        return z + 0.1 * torch.randn_like(z)


class DropoutInEvaluation(Sound):
    """The functional dropout is on by default."""

    def encode(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().encode(x), 0.2)


class CountsInEvaluation(Sound):
    """Evaluation moves a statistic of training.

    Args:
        input_shape: shape of one sample.
    """

    seen: Tensor

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        self.save_hyperparameters()
        self.register_buffer("seen", torch.zeros(()))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        self.seen += len(x)
        return super().loss(x)


class LogsNothing(Sound):
    """Its own training step forgets to report the terms."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self._unpack(batch)[0])["loss"]


class PredictsLess(Sound):
    """Predictions lack the score."""

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {key: value for key, value in super().predict_step(batch, batch_idx).items() if key != "score"}


class PredictsAnother(Sound):
    """A prediction that is not what the methods give."""

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        found = super().predict_step(batch, batch_idx)
        return found | {"score": found["score"] / 2}


class ShiftedTarget(Sound):
    """Compares each reconstruction with the next sample."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.encode(x)), x.roll(1, 0)).mean()
        return {"loss": nll, "nll": nll}


class WrongSign(Sound):
    """Maximises what it should minimise."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.encode(x)), x).mean()
        return {"loss": -nll, "nll": nll}


class WrongStep(Sound):
    """The optimiser has other tensors than the model."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p.detach().clone().requires_grad_() for p in self.parameters()], lr=self.lr)


class UnseededNoise(Sound):
    """Noise from outside of torch's seed."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x * (1 - os.urandom(1)[0] / 2560))


class Reseeds(Sound):
    """Fixes the seed of everything else.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        super().__init__(input_shape)
        self.save_hyperparameters()


class ReseedsEveryLoss(Sound):
    """The same noise at every step."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return super().loss(x + 0.01 * torch.randn_like(x))


class BufferMadeLate(Sound):
    """A buffer comes into being at the first call."""

    def encode(self, x: Tensor) -> Tensor:
        if not hasattr(self, "centre"):
            self.register_buffer("centre", torch.zeros(1))
        return super().encode(x)


class UnregisteredBuffer(Sound):
    """State in a plain attribute is in no checkpoint.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        self.save_hyperparameters()
        self.offset = torch.randn(8)

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) + self.offset


class BufferNotSaved(Sound):
    """A statistic of training that the checkpoint leaves out.

    Args:
        input_shape: shape of one sample.
    """

    centre: Tensor

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        self.save_hyperparameters()
        self.register_buffer("centre", torch.zeros(8), persistent=False)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        if self.training:
            self.centre += self.batch_mean(super().encode(x)).detach()
        return super().loss(x)

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) - self.centre


class CountsByItself(Sound):
    """The weight of a term rises with a count that no checkpoint holds."""

    seen = 0

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        self.seen += self.training
        return {**terms, "loss": terms["loss"] * (1 + self.seen)}


class ActsAfterTheBatch(Sound):
    """Changes weights when callbacks have written their checkpoints of the step."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step == 4:
            with torch.no_grad():
                next(self.encoder.parameters()).zero_()


class PenaltyInHalfPrecision(Sound):
    """A term stays in autocast's precision."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms, size = super().loss(x), self.encode(x).square().sum(1).mean()
        return {**terms, "loss": terms["loss"] + size, "size": size}


class CancelsInHalfPrecision(Sound):
    """A small difference of large numbers."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms, z = super().loss(x), self.encode(x)
        spread = at_least_float32((z + 300 - 300 - z).square().sum(1)).mean()
        return {**terms, "loss": terms["loss"] + 1000 * spread}


class OtherWhenCompiled(Sound):
    """Takes a short cut under the compiler."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        return {**terms, "loss": terms["loss"] * (1.01 if torch.compiler.is_compiling() else 1)}


class RemembersTheCompiler(Sound):
    """A buffer that only a compiled loss makes."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        if torch.compiler.is_compiling():
            self.register_buffer("compiled", torch.tensor(True))
        return super().loss(x)


class FixedBatch(Sound):
    """Its reshape names the batch size that the export saw."""

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z).reshape(7 if len(z) == 7 else len(z), *self.input_shape)


class DecidesByTheData(Sound):
    """A branch on values."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x if x.mean() > 0 else -x)


class NoSuchOperator(Sound):
    """An operator that ONNX lacks."""

    def encode(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(super().encode(x))


class StatisticOfOneRank(Sound):
    """A penalty that is not linear in a mean over this rank's samples."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        size = 10 * self.encode(x).mean(0).square().sum()
        return {**terms, "loss": terms["loss"] + size, "size": size}


class GradientOfOneRank(Sound):
    """The statistic is reduced over ranks, its gradient is not."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms, z = super().loss(x), self.encode(x)
        mean = self.batch_mean(z.detach()) + (z.mean(0) - z.mean(0).detach()) / max(1, self.trainer.world_size)
        size = 1000 * mean.square().sum()
        return {**terms, "loss": terms["loss"] + size, "size": size}


class BufferOfOneRank(CountsInEvaluation):
    """Counts the samples of one rank.

    Args:
        input_shape: shape of one sample.
    """

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x) if self.training else Sound.loss(self, x)


class FailsOnTwoRanks(Sound):
    """Cannot be trained by two processes."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        if self.trainer.world_size > 1:
            raise RuntimeError("cannot train on two ranks")
        return super().loss(x)
