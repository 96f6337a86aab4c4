"""The check that two processes train like one, and the noise that makes the two comparable."""

import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aezoo.testing.subject import (
    BATCH,
    Model,
    Subject,
    equal,
    one_line,
    quiet_and_isolated,
    require,
    require_close,
    snapshot,
    subject_of,
)
from aezoo.testing.training import fit

_STEPS = 4
_TIMEOUT = 300


class SharedNoise(TorchFunctionMode):
    """Within it random numbers depend on the sample, not on its process or batch.

    A draw with a dimension as long as the batch is made for `total` samples, from one seeded generator, and the rows
    of this batch are returned; any other draw is the same for all. So two processes with different rows together draw
    what one process draws for all rows.

    Args:
        rows: for each sample of the batch, its index among all samples.
        total: number of all samples.
    """

    def __init__(self, rows: Sequence[int], total: int) -> None:
        super().__init__()
        self.rows, self.total = torch.tensor(list(rows)), total
        self.generator = torch.Generator().manual_seed(total)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:  # draws from a generator are handled separately
            return func(*args, **kwargs)
        # of torch._standard_gamma, but not of Tensor.__eq__, which every object has
        draw = getattr(self, f"_{getattr(func, '__name__', '').lstrip('_')}", None)
        return func(*args, **kwargs) if draw is None else draw(func, *args, **kwargs)

    def _draw(self, source: Callable[..., Tensor], like: Tensor) -> Tensor:
        sizes = list(like.shape)
        if len(self.rows) not in sizes:
            return source(sizes, generator=self.generator).to(like)
        dim = sizes.index(len(self.rows))
        sizes[dim] = self.total
        return source(sizes, generator=self.generator).index_select(dim, self.rows).to(like)

    def _randn(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self._draw(torch.randn, func(*args, **kwargs))

    def _rand(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self._draw(torch.rand, func(*args, **kwargs))

    _randn_like, _rand_like = _randn, _rand

    def _normal(self, func: Any, mean: Any, std: Any = 1.0, *args: Any, **kwargs: Any) -> Tensor:
        return mean + std * self._draw(torch.randn, func(mean, std, *args, **kwargs))

    def _bernoulli(self, func: Any, p: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        share = args[0] if args else kwargs.get("p")
        return (self._draw(torch.rand, p) < (p if share is None else share)).to(p.dtype)

    def _dropout(
        self, func: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **_: Any
    ) -> Tensor:
        # with p = 0 torch draws nothing either
        return x * (self._draw(torch.rand, x) >= p) / (1 - p) if training and 0 < p < 1 else func(x, p, training)

    def _normal_(self, func: Any, x: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
        return x.copy_(mean + std * self._draw(torch.randn, x))

    def _uniform_(self, func: Any, x: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
        return x.copy_(low + (high - low) * self._draw(torch.rand, x))

    def _bernoulli_(self, func: Any, x: Tensor, p: Any = 0.5, **_: Any) -> Tensor:
        return x.copy_(self._draw(torch.rand, x) < p)

    def _exponential_(self, func: Any, x: Tensor, lambd: float = 1.0, **_: Any) -> Tensor:
        return x.copy_(-torch.log1p(-self._draw(torch.rand, x)) / lambd)

    def _standard_gamma(self, func: Any, shape: Tensor, *_: Any, **__: Any) -> Tensor:
        """The quantile of uniform noise, because the number of draws of torch's sampler depends on the shape."""
        from scipy.special import gammaincinv

        alpha = shape.detach()
        drawn = gammaincinv(alpha.double().numpy(), self._draw(torch.rand, alpha.double()).numpy())
        z = torch.from_numpy(drawn).to(alpha).clamp(min=torch.finfo(alpha.dtype).tiny)
        return z + (shape - alpha) * torch._standard_gamma_grad(alpha, z)


def check_ddp(*models: Model, **hyperparameters: Any) -> None:
    """Two processes train like one on the concatenated batches: weights, buffers, loss terms and logged figures.

    Both sides draw the same noise for the same sample. One launch of two processes trains all models, because most of
    its time goes into starting them. They train in float64, in which the rounding of a deep network stays small when
    Adam enlarges it, and real errors remain. A model that fails so is trained again in float32: it may have no float64.

    Args:
        *models: registry names, classes or subjects; a class must be importable by another process.
        **hyperparameters: constructor arguments of all of them.
    """
    subjects = [subject_of(model, **hyperparameters) for model in models]
    for subject in subjects:
        if "<locals>" in subject.cls.__qualname__ or subject.cls.__module__ == "__main__":
            raise SkipTest(f"{subject.cls.__qualname__} cannot be imported by another process: put it into a module")
    wrong = _differences(subjects, torch.float64)
    if wrong:
        wrong = _differences([subjects[i] for i in wrong], torch.float32)
    if wrong:
        raise AssertionError("\n".join(wrong.values()))


def _differences(subjects: Sequence[Subject], dtype: torch.dtype) -> dict[int, str]:
    """What is wrong with the subjects of these numbers."""
    wrong: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as name, quiet_and_isolated():
        folder = Path(name)
        with _two_processes(subjects, dtype, folder) as process:
            single = [_recorded_fit(subject, dtype, 0, 1) for subject in subjects]
            log = _log(process)
        for i, (subject, one) in enumerate(zip(subjects, single, strict=True)):
            try:
                require("error" not in one, f"fails on one process with {one.get('error')}")
                _compare(one, *(_result(_file(folder, i, rank), log) for rank in (0, 1)))
            except AssertionError as error:
                wrong[i] = f"{subject.label} fails check_ddp: {error}"
    return wrong


# ---- the two processes ----------------------------------------------------------------------------------------------


@contextmanager
def _two_processes(subjects: Sequence[Subject], dtype: torch.dtype, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Processes that train the subjects and leave the results in the folder, ended when the context is left."""
    spec = [(s.cls.__module__, s.cls.__qualname__, dict(s.hyperparameters), dtype) for s in subjects]
    torch.save(spec, _spec(folder))
    # a launcher's variables would make these processes part of its group
    kept = {k: v for k, v in os.environ.items() if not re.match(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD)", k)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*command, "-m", "aezoo.testing", str(folder)],
        env=kept | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers
            process.communicate()


def _log(process: subprocess.Popen[str]) -> str:
    """Wait for the end and return what the processes wrote."""
    try:
        return process.communicate(timeout=_TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        return f"RuntimeError: no end after {_TIMEOUT} s"


def train_subjects(folder: Path) -> None:
    """The work of each of the two processes: train every subject and write the result to the folder."""
    rank = int(os.environ["RANK"])
    for i, (module, qualname, hyperparameters, dtype) in enumerate(torch.load(_spec(folder), weights_only=True)):
        with quiet_and_isolated():
            subject = Subject(pkgutil.resolve_name(f"{module}:{qualname}"), hyperparameters)
            result = _recorded_fit(subject, dtype, rank, 2)
        torch.save(result, _file(folder, i, rank))


def _spec(folder: Path) -> Path:
    return folder / "spec.pt"


def _file(folder: Path, number: int, rank: int) -> Path:
    return folder / f"{number}-{rank}.pt"


def _recorded_fit(subject: Subject, dtype: torch.dtype, rank: int, world: int) -> dict[str, Any]:
    total = 2 * BATCH
    batches = [subject.data(total, seed=i).to(dtype).chunk(world)[rank] for i in range(_STEPS)]
    rows = range(total)[rank * total // world : (rank + 1) * total // world]
    options: dict[str, Any] = {}
    if world > 1:
        strategy = DDPStrategy(timeout=timedelta(seconds=60))
        options = {"strategy": strategy, "devices": world, "use_distributed_sampler": False}
    torch.manual_seed(0)
    try:
        model = subject.build().to(dtype)
        start = snapshot(model)
        with SharedNoise(rows, total):
            losses, figures = fit(model, batches, **options)
    except Exception as error:
        return {"error": one_line(error)}
    return {"start": start, "end": snapshot(model), "losses": losses, "figures": figures}


def _result(file: Path, log: str) -> dict[str, Any]:
    if not file.is_file():
        lines = [line for line in log.splitlines() if re.search(r"\w*(Error|Exception)\b", line)] or log.splitlines()
        raise AssertionError(f"a process ended without a result: {(lines or ['it wrote nothing'])[0].strip()[:300]}")
    result: dict[str, Any] = torch.load(file, weights_only=True)
    require("error" not in result, f"fails on two processes with {result.get('error')}")
    return result


def _compare(one: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> None:
    require(equal(one["start"], first["start"]), "the initial weights differ from those of one process")
    for step, terms in enumerate(one["losses"]):
        for name, value in terms.items():
            both = (first["losses"][step][name] + second["losses"][step][name]) / 2
            require_close(f"{name} at step {step}, two processes against one,", both, value, 1e-5)
    for name, value in one["end"].items():
        require(torch.equal(first["end"][name], second["end"][name]), f"{name} differs between the two processes")
        # relative to the change by training, since weights that do not change are equal anyway; and as a norm, since
        # Adam makes a step of full length even if the gradient is only rounding
        moved = float((value.double() - one["start"][name].double()).norm())
        off = float((value.double() - first["end"][name].double()).norm())
        require(off <= 2e-4 * moved + 1e-7, f"{name} is off by {off:.2g} from one process, after moving {moved:.2g}")
    for name, value in one["figures"].items():
        require_close(f"{name}, two processes against one,", first["figures"][name], value, 1e-5)
