"""Models with one mistake each: every check of `aezoo.testing` must fail on one of them."""

import dataclasses
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.bases.entropy_coded import Coder, EntropyCoded, Factorised, ProbabilityTable
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.errors import AezooError
from aezoo.quantisers.fsq import FSQ


class CorrectModel(Autoencoder):
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


class UndocumentedArgument(Autoencoder):
    """Does not document an argument.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...], *, latent_dim: int = 8) -> None:
        super().__init__(input_shape)
        self.save_hyperparameters()
        self.code_shape = (latent_dim,)


class DocumentsUnknownArgument(CorrectModel):
    """Documents an argument that does not exist.

    Args:
        input_shape: shape of one sample.
        latent_size: size of the code.
        latent_dim: size of the code.
    """

    def __init__(self, input_shape: tuple[int, ...], *, latent_dim: int = 8) -> None:
        super().__init__(input_shape, latent_dim=latent_dim)
        self.save_hyperparameters()


class UntypedKwargs(CorrectModel):
    """Takes its arguments as `**kwargs` without a type.

    Args:
        input_shape: shape of one sample.
        kwargs: for the parent.
    """

    def __init__(self, input_shape: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(input_shape, **kwargs)


class PositionalArgument(CorrectModel):
    """An argument is not keyword-only.

    Args:
        input_shape: shape of one sample.
        latent_dim: size of the code.
    """

    def __init__(self, input_shape: tuple[int, ...], latent_dim: int = 8) -> None:
        super().__init__(input_shape, latent_dim=latent_dim)
        self.save_hyperparameters()


class MissingDefault(CorrectModel):
    """An argument has no default.

    Args:
        input_shape: shape of one sample.
        latent_dim: size of the code.
    """

    def __init__(self, input_shape: tuple[int, ...], *, latent_dim: int) -> None:
        super().__init__(input_shape, latent_dim=latent_dim)
        self.save_hyperparameters()


class ModuleArgument(CorrectModel):
    """Has a module as a hyperparameter, which no checkpoint can contain.

    Args:
        input_shape: shape of one sample.
        act: an activation.
    """

    def __init__(self, input_shape: tuple[int, ...], *, act: nn.Module = nn.ReLU()) -> None:  # noqa: B008
        super().__init__(input_shape)
        self.save_hyperparameters()


class MissingHyperparameter(CorrectModel):
    """Saves the parent's hyperparameters, but not its own.

    Args:
        input_shape: shape of one sample.
        scale: not saved.
    """

    def __init__(self, input_shape: tuple[int, ...], *, scale: float = 1.0) -> None:
        super().__init__(input_shape)
        self.save_hyperparameters(ignore=["scale"])


class MutatesArguments(CorrectModel):
    """Reverses the list that the caller has passed.

    Args:
        input_shape: shape of one sample.
        widths: sizes of the hidden layers.
    """

    def __init__(self, input_shape: tuple[int, ...], *, widths: tuple[int, ...] = (32, 16)) -> None:
        super().__init__(input_shape, widths=tuple(widths))
        self.save_hyperparameters()
        if isinstance(widths, list):
            widths.reverse()


class HardCodedShape(CorrectModel):
    """Takes only 28x28 and does not refuse other shapes."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x.reshape(-1, 1, 28, 28))


class TorchErrorForShape(CorrectModel):
    """Refuses a shape with an error of torch.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        self.save_hyperparameters()
        nn.Conv2d(input_shape[0], 4, 3)(torch.zeros(1, *input_shape))


class RefusesEveryShape(CorrectModel):
    """Refuses every shape.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        raise AezooError("this model takes (7, 7) only")


class WrongCodeShape(CorrectModel):
    """The codes do not have the shape `code_shape`."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x)[:, None]

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z[:, 0])


class BatchMeanScore(CorrectModel):
    """The score is a mean over the batch."""

    def score(self, x: Tensor) -> Tensor:
        return super().score(x).mean()


class SamplesWithoutPrior(CorrectModel):
    """Can sample although `has_prior` is False."""

    def sample(self, n: int) -> Tensor:
        return torch.rand(n, *self.input_shape)


class PriorWithoutSamples(CorrectModel):
    """Cannot sample although `has_prior` is True."""

    has_prior = True


class MissingLoss(CorrectModel):
    """The terms do not include `loss`."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return {"nll": super().loss(x)["nll"]}


class DetachedLoss(CorrectModel):
    """The loss is detached from the parameters."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in super().loss(x).items()}


class InfiniteTerm(CorrectModel):
    """A term is log(0)."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x) | {"entropy": torch.log(self.encode(x).relu().min() * 0)}


class UnreducedTerm(CorrectModel):
    """A term is not reduced over the batch."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x) | {"size": self.encode(x).abs().sum(1)}


class TermNamedLikeMetric(CorrectModel):
    """A term has the name of an evaluation metric."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x) | {"mse": (self(x) - x).square().mean()}


class InfiniteGradient(CorrectModel):
    """Takes the square root of 0: a finite loss with an infinite gradient."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        length = (self.encode(x) * 0).square().sum().sqrt()
        return terms | {"loss": terms["loss"] + length}


class UnbiasedBatchVariance(CorrectModel):
    """Uses the unbiased variance of the batch, which one sample does not have."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        return terms | {"loss": terms["loss"] + self.encode(x).var(0).mean()}


class DetachedCode(CorrectModel):
    """No gradient reaches the encoder."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.encode(x).detach()), x).mean()
        return {"loss": nll, "nll": nll}


class UnusedLayer(CorrectModel):
    """Has a layer that is not used.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        self.save_hyperparameters()
        self.unused = nn.Linear(2, 2)


class InPlaceNoise(CorrectModel):
    """Corrupts the caller's batch in place."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x.mul_(0.9) if self.training else x)


class InPlaceDecode(CorrectModel):
    """Clamps the caller's code in place."""

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z.clamp_(-0.01, 0.01))


class DiscreteWithoutIndices(CorrectModel):
    """Sets `discrete_code` without having indices."""

    discrete_code = True


class CorrectDiscreteModel(DiscreteAutoencoder):
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


class OneBasedIndices(CorrectDiscreteModel):
    """Its indices start at 1."""

    def encode_indices(self, x: Tensor) -> Tensor:
        return super().encode_indices(x) + 1

    def codes(self, indices: Tensor) -> Tensor:
        return super().codes(indices - 1)


class UnquantisedForward(CorrectDiscreteModel):
    """The decoder gets a part of the code that is not quantised."""

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x) + 0.1 * self.encoder(x))


class DifferentIndicesWhenExported(CorrectDiscreteModel):
    """Gives other indices while it is compiled."""

    def encode_indices(self, x: Tensor) -> Tensor:
        indices = super().encode_indices(x)
        return 7 - indices if torch.compiler.is_compiling() else indices


class NonCausalDistribution(EntropyCoded):
    """The distribution depends on the symbol to be decoded, which is not available to a decoder.

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
        distribution = self.density.distribution((n, *self.code_shape))
        return coder(y, distribution if y is None else dataclasses.replace(distribution, mean=y))

    def tables(self) -> list[ProbabilityTable]:
        return self.density.tables()


class SumOverBatch(CorrectModel):
    """Sums over the batch instead of averaging."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.encode(x)), x).sum()
        return {"loss": nll, "nll": nll}


class BatchStatisticsInEvaluation(CorrectModel):
    """Subtracts the mean of the batch from codes, in evaluation too."""

    def encode(self, x: Tensor) -> Tensor:
        z = super().encode(x)
        return z - z.mean(0)


class NoiseInEvaluation(CorrectModel):
    """`encode` samples from the posterior instead of returning its mean."""

    def encode(self, x: Tensor) -> Tensor:
        z = super().encode(x)
        return z + 0.1 * torch.randn_like(z)


class DropoutInEvaluation(CorrectModel):
    """Applies functional dropout in evaluation too."""

    def encode(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().encode(x), 0.2)


class BufferUpdateInEvaluation(CorrectModel):
    """Updates a buffer in evaluation.

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


class UnloggedTerms(CorrectModel):
    """Overrides the training step and does not log the terms."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self._unpack(batch)[0])["loss"]


class PredictionWithoutScore(CorrectModel):
    """Predictions do not include the score."""

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {key: value for key, value in super().predict_step(batch, batch_idx).items() if key != "score"}


class WrongPredictedScore(CorrectModel):
    """The predicted score differs from `score`."""

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        outputs = super().predict_step(batch, batch_idx)
        return outputs | {"score": outputs["score"] / 2}


class ShiftedTarget(CorrectModel):
    """Compares each reconstruction with the next sample."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.encode(x)), x.roll(1, 0)).mean()
        return {"loss": nll, "nll": nll}


class WrongSign(CorrectModel):
    """Maximises the loss."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = self.nll(self.decoder(self.encode(x)), x).mean()
        return {"loss": -nll, "nll": nll}


class OptimizesCopies(CorrectModel):
    """The optimiser gets copies of the parameters."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p.detach().clone().requires_grad_() for p in self.parameters()], lr=self.lr)


class UnseededNoise(CorrectModel):
    """Draws noise that torch's seed does not determine."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x * (1 - os.urandom(1)[0] / 2560))


class SeedsInConstructor(CorrectModel):
    """Sets torch's global seed in the constructor.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        super().__init__(input_shape)
        self.save_hyperparameters()


class SeedsInLoss(CorrectModel):
    """Sets torch's global seed in every loss."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return super().loss(x + 0.01 * torch.randn_like(x))


class LazyBuffer(CorrectModel):
    """Registers a buffer at the first call."""

    def encode(self, x: Tensor) -> Tensor:
        if not hasattr(self, "centre"):
            self.register_buffer("centre", torch.zeros(1))
        return super().encode(x)


class UnregisteredBuffer(CorrectModel):
    """Keeps state in a plain attribute, which no checkpoint contains.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        self.save_hyperparameters()
        self.offset = torch.randn(8)

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) + self.offset


class NonPersistentBuffer(CorrectModel):
    """A running statistic is a non-persistent buffer.

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


class CounterOutsideCheckpoint(CorrectModel):
    """The weight of a term depends on a counter that no checkpoint contains."""

    seen = 0

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        self.seen += self.training
        return {**terms, "loss": terms["loss"] * (1 + self.seen)}


class LateWeightChange(CorrectModel):
    """Changes weights after callbacks have saved the checkpoint of the step."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step == 4:
            with torch.no_grad():
                next(self.encoder.parameters()).zero_()


class PenaltyInHalfPrecision(CorrectModel):
    """Computes a term in autocast's precision."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms, size = super().loss(x), self.encode(x).square().sum(1).mean()
        return {**terms, "loss": terms["loss"] + size, "size": size}


class CancellationInHalfPrecision(CorrectModel):
    """Subtracts large numbers whose difference is small."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms, z = super().loss(x), self.encode(x)
        spread = at_least_float32((z + 300 - 300 - z).square().sum(1)).mean()
        return {**terms, "loss": terms["loss"] + 1000 * spread}


class DifferentWhenCompiled(CorrectModel):
    """Computes another loss while it is compiled."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        return {**terms, "loss": terms["loss"] * (1.01 if torch.compiler.is_compiling() else 1)}


class BufferWhenCompiled(CorrectModel):
    """Registers a buffer while it is compiled."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        if torch.compiler.is_compiling():
            self.register_buffer("compiled", torch.tensor(True))
        return super().loss(x)


class FixedBatchSize(CorrectModel):
    """The exported batch size is a constant."""

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z).reshape(7 if len(z) == 7 else len(z), *self.input_shape)


class DataDependentBranch(CorrectModel):
    """Branches on the values of its input."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x if x.mean() > 0 else -x)


class OperatorMissingInONNX(CorrectModel):
    """Uses an operator that ONNX does not have."""

    def encode(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(super().encode(x))


class UnreducedStatistic(CorrectModel):
    """A penalty is not linear in the mean, which is not reduced over ranks."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        size = 10 * self.encode(x).mean(0).square().sum()
        return {**terms, "loss": terms["loss"] + size, "size": size}


class UnreducedGradient(CorrectModel):
    """Reduces a statistic over ranks, but not its gradient."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        terms, z = super().loss(x), self.encode(x)
        mean = self.batch_mean(z.detach()) + (z.mean(0) - z.mean(0).detach()) / max(1, self.trainer.world_size)
        size = 1000 * mean.square().sum()
        return {**terms, "loss": terms["loss"] + size, "size": size}


class UnreducedBuffer(BufferUpdateInEvaluation):
    """Does not reduce a buffer over ranks.

    Args:
        input_shape: shape of one sample.
    """

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return super().loss(x) if self.training else CorrectModel.loss(self, x)


class FailsOnTwoRanks(CorrectModel):
    """Fails in two processes."""

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        if self.trainer.world_size > 1:
            raise RuntimeError("cannot train on two ranks")
        return super().loss(x)
