"""Steps of validation, test and prediction."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from aezoo.metrics import Evaluation
from aezoo.training.batches import BatchUnpacker
from aezoo.training.output_cache import OutputCache
from aezoo.training.seeding import forked_rng, seed_all

_EVALUATION_SEED = 20


class EvaluationSteps(BatchUnpacker):
    """Evaluation of every model: terms of the loss, reconstruction quality, and metrics for the kind of code."""

    def __init__(self) -> None:
        super().__init__()
        self._evaluations: dict[int, Evaluation] = {}
        self._outputs = OutputCache()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        x, y = self._unpack(batch)
        code, reconstruction, score = self.code_reconstruction_score(x)
        found = {"code": code, "reconstruction": reconstruction, "score": score}
        return found if y is None else {**found, "label": y}

    def _evaluate(self, batch: Any, batch_idx: int, loader: int) -> None:
        x, y = self._unpack(batch)
        if loader not in self._evaluations:
            code_shape = self.code_shape if self.sparse_code else None
            self._evaluations[loader] = Evaluation(self.input_shape, self.device, code_shape, self.takes_missing)
        self._outputs.clear()
        with self._fixed_noise(batch_idx), self.computed_once():
            terms = self.loss(x, y)
            read = x if self.corruption is None else self.corruption(x)
            x_hat, seen = self._reconstruct(read)
            log_likelihood = getattr(self, "log_likelihood", None)
            trainer = self._trainer
            if callable(log_likelihood) and trainer is not None and trainer.state.fn in ("validate", "test"):
                terms["log_likelihood"] = log_likelihood(x, self.importance_samples).mean()
        self._evaluations[loader].add(terms, x, x_hat, **seen)

    @contextmanager
    def computed_once(self) -> Iterator[None]:
        """Reuse outputs of encoder and decoder for the last evaluated batch inside this context."""
        with self._outputs.used_by(getattr(self, "encoder", None), getattr(self, "decoder", None)):
            yield

    def _reconstruct(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the reconstruction, and further arguments of `Evaluation.add`."""
        if self.sparse_code:
            code = self.encode(x)
            return self.decode(code), {"code": code}
        return self(x), {}

    def _log_evaluation(self, stage: str) -> None:
        for loader, evaluation in self._evaluations.items():
            # the first loader has the plain names, which checkpoints monitor
            group = f"{stage}_{loader}" if loader else stage
            figures = {f"{group}/{name}": value for name, value in evaluation.compute().items()}
            self.log_dict(figures, sync_dist=True)
        self._evaluations.clear()
        self._outputs.clear()

    @contextmanager
    def _fixed_noise(self, batch_idx: int) -> Iterator[None]:
        """Use equal noise for a batch in every evaluation, so that epochs are comparable; training is not affected."""
        with forked_rng(self.device):
            seed = (_EVALUATION_SEED * 1_000_003 + self.global_rank) * 1_000_003 + batch_idx
            seed_all(seed, self.device, others=False)
            yield
