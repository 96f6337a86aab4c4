"""Checks of other ways to run the model: half precision, compilers, exporters."""

import copy
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.errors import AezooError
from aezoo.io.exporters import graphs
from aezoo.testing.ranks import SharedNoise
from aezoo.testing.subject import (
    BATCH,
    Subject,
    as_check,
    require,
    require_close,
    require_finite_gradients,
    require_terms,
    state_shapes,
)
from aezoo.training import speed


@as_check
def check_bf16(subject: Subject) -> None:
    """Under bf16 autocast the loss stays within 2 %, with finite terms in float32; in pure bf16 everything runs."""
    model, x = subject.build().train(), subject.data()
    other = copy.deepcopy(model)
    with SharedNoise(range(BATCH), BATCH):
        exact = model.loss(x)
    with SharedNoise(range(BATCH), BATCH), torch.autocast("cpu", torch.bfloat16):
        half = other.loss(x)
    require_terms("loss under bf16", half)
    for name, value in half.items():
        require(value.dtype == torch.float32, f"{name} is computed in {value.dtype} under autocast")
    require_close("the loss under bf16", half["loss"], exact["loss"], 2e-2)
    half["loss"].backward()
    require_finite_gradients(" under bf16", other)
    pure, given = copy.deepcopy(model).bfloat16(), x.bfloat16()
    require_terms("loss in bf16", pure.loss(given))
    for name in ("encode", "forward"):
        found = getattr(pure, name)(given)
        require(found.dtype == torch.bfloat16, f"{name} of a model in bf16 gives {found.dtype}")
    require(bool(pure.score(given).isfinite().all()), "the score in bf16 is not finite")


@as_check
def check_compile(subject: Subject) -> None:
    """The loss and its gradients are the same through torch.compile without code generation (`aot_eager`)."""
    _require_same_compiled(subject, "aot_eager", {})


@as_check
def check_inductor(subject: Subject) -> None:
    """The loss and its gradients are the same through torch.compile with its default backend; needs a C++ compiler.

    Both are one graph if a fit may use one, and if they can be compiled as one.
    """
    # eager's random numbers, so that the two can be compared
    _require_same_compiled(subject, "inductor", {"fallback_random": True})


def _require_same_compiled(subject: Subject, backend: str, options: dict[str, Any]) -> None:
    try:
        _compare_compiled(subject, backend, options, torch.float32)
    except AssertionError:
        # in float64 rounding errors vanish, and other differences remain
        _compare_compiled(subject, backend, options, torch.float64)


def _compare_compiled(subject: Subject, backend: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model, x = subject.build().train().to(dtype), subject.data().to(dtype)
    other = copy.deepcopy(model)
    torch.compiler.reset()
    try:
        torch.manual_seed(1)
        eager = model.loss(x)
        eager["loss"].backward()
        torch.manual_seed(1)
        compiled = _joint(other, x, options) if backend == "inductor" else None
        if compiled is None:
            torch.manual_seed(1)
            compiled = torch.compile(other.loss, backend=backend, options=options)(x)
            compiled["loss"].backward()
    finally:
        torch.compiler.reset()
    require(state_shapes(other) == state_shapes(model), "a compiled loss changes the state_dict's keys or shapes")
    for name, value in eager.items():
        require_close(f"the compiled {name}", compiled[name], value, 1e-4)
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if p.grad is not None:
            require(q.grad is not None, f"compiled, {name} gets no gradient")
            # a gradient that nearly cancels has the rounding errors of large ones
            tolerance = 1e-4 * max(1.0, 0.05 * largest / max(1e-3, float(p.grad.abs().max())))
            require_close(f"the compiled gradient of {name}", q.grad, p.grad, tolerance)
    for name, buffer in model.named_buffers():
        require_close(f"the buffer {name} after the compiled loss", other.get_buffer(name), buffer, 1e-4)


def _joint(model: Autoencoder, x: Tensor, options: dict[str, Any]) -> dict[str, Tensor] | None:
    """The terms of the loss, with gradients in the parameters; None if they are not computed at once."""
    if not (model.automatic_optimization and type(model).training_step is Autoencoder.training_step):
        return None
    before = copy.deepcopy(model.state_dict())
    step = speed.joint_step(model, lambda x, _: (model.loss(x), x))
    if step is None:
        return None
    with torch._inductor.config.patch(options):
        found = step(x)
    if found is not None:
        terms: dict[str, Tensor] = found[0]
        return terms
    model.load_state_dict(before)
    model.zero_grad()
    return None


@as_check
def check_export(subject: Subject) -> None:
    """torch.export of forward gives the same output for any batch size; so does that of indices, if codes are these."""
    for _ in _exported(subject):
        pass


@as_check
def check_onnx(subject: Subject) -> None:
    """What `check_export` checks, and ONNX files of these exports in onnxruntime, too; needs the extra onnx."""
    try:
        graphs.require_onnx()
    except AezooError as error:
        raise SkipTest(str(error)) from None
    for part, batches, exported in _exported(subject):
        with tempfile.TemporaryDirectory() as folder:
            run = graphs.write_onnx(part, batches[0], Path(folder) / "model.onnx", exported=exported)
        for given in batches:
            _require_same("ONNX", part, given, run(given))


def _exported(subject: Subject) -> Iterator[tuple[torch.nn.Module, list[Tensor], torch.export.ExportedProgram]]:
    """The programs of a model, which give what it gives, with batches of several sizes for each."""
    model, x, other = subject.build().eval(), subject.data(), subject.data(3, seed=1)
    for part, batches in _parts(model, [x, other, x[:1]]):
        program = graphs.program(part, batches[0])
        exported = program.module()
        for given in batches:
            _require_same("exported", part, given, exported(given))
        yield part, batches, program


class _Part(torch.nn.Module):
    """Methods of a model as one module."""

    def __init__(self, model: Autoencoder, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.eval()

    def forward(self, given: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self.model, name)(given) for name in self.names)


@torch.no_grad()
def _parts(model: Autoencoder, batches: list[Tensor]) -> Iterator[tuple[torch.nn.Module, list[Tensor]]]:
    """What is exported of a model, and batches for it."""
    if not isinstance(model, DiscreteAutoencoder):
        yield _Part(model, "forward"), batches
        return
    yield _Part(model, "forward", "encode_indices"), batches
    yield _Part(model, "decode_indices"), [model.encode_indices(x) for x in batches]


@torch.no_grad()
def _require_same(kind: str, part: Any, given: Tensor, found: Iterable[Tensor]) -> None:
    for name, value, wanted in zip(part.names, found, part(given), strict=True):
        what = f"the {kind} {name} of a batch of {len(given)}"
        if wanted.is_floating_point():
            require_close(what, value, wanted, 1e-4)
        else:
            require(torch.equal(value, wanted), f"{what} gives other indices")
