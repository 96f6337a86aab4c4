"""Checks of one model and one batch: the constructor, the shapes, the loss and its gradients."""

import copy
import inspect
import io
import json
import math
import re
import sys
from contextlib import suppress
from typing import Any
from unittest import SkipTest

import torch

from aezoo.bases.entropy_coded import EntropyCoded
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.errors import AezooError
from aezoo.testing.ranks import SharedNoise
from aezoo.testing.subject import (
    BATCH,
    SHAPES,
    Subject,
    as_check,
    require,
    require_close,
    require_finite_gradients,
    require_shape,
    require_terms,
    state_shapes,
)


@as_check
def check_constructor(subject: Subject) -> None:
    """The constructor is the configuration: `input_shape`, then documented keyword arguments with plain defaults."""
    parameters = [*inspect.signature(subject.cls).parameters.values()]
    _require_signature(subject.cls, parameters)
    require((sys.modules[subject.cls.__module__].__doc__ or "").strip() != "", "its module needs a docstring")

    model = subject.build()
    plain = {p.name: p.default for p in parameters} | dict(subject.hyperparameters) | {"input_shape": subject.shape}
    lost, extra = sorted(plain.keys() - model.hparams.keys()), sorted(model.hparams.keys() - plain.keys())
    require(not lost, f"hparams lack {', '.join(lost)}, arguments of this class: do not ignore them")
    require(not extra, f"hparams contain {', '.join(extra)} of a parent, which no argument of this class sets")
    for name, value in plain.items():
        held = model.hparams[name]
        if value in (None, "auto") and name not in subject.hyperparameters:
            plain[name] = held  # a constructor records what it chooses
        require(held == plain[name], f"hparams contain {name}={held!r} where {value!r} was given")
    buffer = io.BytesIO()
    torch.save(dict(model.hparams), buffer)
    buffer.seek(0)
    require(torch.load(buffer, weights_only=True) == plain, "hparams do not load with weights_only=True")
    json.dumps(plain)  # fails on values that cannot be saved

    lists = {name: _with_lists(value) for name, value in plain.items()}
    given = copy.deepcopy(lists)
    other = subject.cls(**given)
    require(given == lists, "the constructor changes the lists or dicts that it is given")
    require(state_shapes(other) == state_shapes(model), "lists as arguments build another model than tuples do")


def _require_signature(cls: type, parameters: list[inspect.Parameter]) -> None:
    require(bool(parameters) and parameters[0].name == "input_shape", "the first argument must be input_shape")
    documented = set().union(*map(_documented_arguments, cls.__mro__))
    for p in parameters:
        require(
            p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL),
            f"spell out the arguments, or take a group by Unpack, instead of *{p.name}",
        )
        require(p.name in documented, f"the class docstring's Args do not describe {p.name}")
        if p.name != "input_shape":
            require(p.kind is p.KEYWORD_ONLY, f"argument {p.name} must be keyword-only")
            require(p.default is not p.empty, f"argument {p.name} needs a default")
            require(_is_plain(p.default), f"the default of {p.name} is a {type(p.default).__name__}, not a plain value")
    unknown = ", ".join(sorted(_documented_arguments(cls) - {p.name for p in parameters}))
    require(not unknown, f"the class docstring's Args describe {unknown}, which the constructor does not have")


def _documented_arguments(cls: type) -> set[str]:
    """The names under Args in the docstring of one class."""
    doc = inspect.cleandoc(vars(cls).get("__doc__") or "")
    args = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"^ {4}(\w+): \S", args[1], re.MULTILINE)) if args else set()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def _with_lists(value: Any) -> Any:
    """The value with lists instead of tuples, as in a configuration file."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


@as_check
def check_shapes(subject: Subject) -> None:
    """Codes, reconstructions, scores and samples have their shapes for every input shape; others are rejected early."""
    for shape in SHAPES:
        # subject.shape fails for models that accept no shape
        if shape == subject.shape or subject.takes(shape):
            _require_shapes(subject, shape)


def _require_shapes(subject: Subject, shape: tuple[int, ...]) -> None:
    model, x = subject.build(shape).eval(), subject.data(3, shape)
    require(model.input_shape == shape, f"input_shape is {model.input_shape} for data of {shape}")
    require(_is_shape(model.code_shape), f"code_shape must be a tuple of ints, got {model.code_shape!r}")
    with torch.no_grad():
        z = model.encode(x)
        require_shape("encode", z, (3, *model.code_shape))
        require_shape("decode", model.decode(z), (3, *shape))
        require_shape("forward", model(x), (3, *shape))
        require_shape("score", model.score(x), (3,))
        posterior: Any = getattr(model, "posterior", None)
        for part in posterior(x) if posterior else ():
            require_shape("posterior", part, (3, *model.code_shape))
        if model.has_prior:
            require_shape("sample", model.sample(2), (2, *shape))
        else:
            with suppress(AezooError):
                model.sample(2)
                raise AssertionError("sample works although has_prior is False")


@as_check
def check_indices(subject: Subject) -> None:
    """Codes of indices or of entropy-coded whole numbers are in range, and they suffice for a reconstruction."""
    model, x = subject.build().eval(), subject.data()
    if isinstance(model, EntropyCoded):
        _require_symbols(model, x)
    if not isinstance(model, DiscreteAutoencoder):
        require(not model.discrete_code, "discrete_code is for subclasses of aezoo.bases.quantised.DiscreteAutoencoder")
        return
    with torch.no_grad():
        indices, x_hat = model.encode_indices(x), model(x)
        require_shape("encode_indices", indices, (BATCH, *model.index_shape))
        require(indices.dtype == torch.long, f"indices are {indices.dtype}, not long")
        require(
            len(model.index_sizes) == model.index_shape[0], "index_sizes must have a size for each index of a position"
        )
        for i, size in enumerate(model.index_sizes):
            low, high = int(indices[:, i].min()), int(indices[:, i].max())
            require(low >= 0 and high < size, f"indices from {low} to {high} of a codebook of {size}")
        require_close("codes(encode_indices(x))", model.codes(indices), model.encode(x), 1e-5)
        require_close("decode_indices(encode_indices(x))", model.decode_indices(indices), x_hat, 1e-5)
    codebooks = model.codebooks(indices)
    counted = sum(values.numel() for values, _ in codebooks.values())
    require(counted == indices.numel(), f"codebooks contain {counted} of {indices.numel()} indices")


def _require_symbols(model: EntropyCoded, x: torch.Tensor) -> None:
    with torch.no_grad():
        symbols = model.encode_symbols(x)
        require(symbols.dtype == torch.long, f"whole numbers are {symbols.dtype}, not long")
        # a coder of files needs the very same distributions both ways
        same = torch.equal(model.codes(symbols), model.encode(x))
        require(same, "codes(encode_symbols(x)) is not encode(x): code_latents must pass the same values, known or not")
        require_close("decode(codes(encode_symbols(x)))", model.decode(model.codes(symbols)), model(x), 1e-5)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, tuple) and len(shape) > 0 and all(type(n) is int and n > 0 for n in shape)


@as_check
def check_loss(subject: Subject) -> None:
    """The loss terms are named, finite, differentiable scalars, in training and evaluation."""
    for mode in (True, False):
        model = subject.build().train(mode)
        terms = model.loss(subject.data())
        require_terms(f"loss in {'training' if mode else 'evaluation'}", terms)
        require(terms["loss"].requires_grad, "the loss has no gradient")
        terms["loss"].backward()
        require_finite_gradients("", model)


@as_check
def check_batch_of_one(subject: Subject) -> None:
    """A single sample can be trained on and evaluated."""
    x = subject.data(1)
    for mode in (True, False):
        model = subject.build().train(mode)
        terms = model.loss(x)
        require_terms("loss of one sample", terms)
        terms["loss"].backward()
        require_shape("forward of one sample", model(x), (1, *subject.shape))
        require_shape("score of one sample", model.score(x), (1,))


@as_check
def check_gradients(subject: Subject) -> None:
    """Every parameter gets a gradient within a few steps, without labels or with labels."""
    model = subject.build().train()
    without = {name for name, p in model.named_parameters() if p.requires_grad}
    for seed in range(4):
        model.zero_grad()
        y = None if seed < 3 else torch.arange(BATCH) % 2
        model.loss(subject.data(seed=seed), y)["loss"].backward()
        without -= {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        with torch.no_grad():  # a layer that is initialised with zeros passes no gradient on before the first step
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(1e-3 * p.grad.sign())
    require(not without, f"no gradient reaches {', '.join(sorted(without))}")


@as_check
def check_inputs_unchanged(subject: Subject) -> None:
    """No method writes into its input tensors."""
    x = subject.data()
    for mode in (True, False):
        model = subject.build().train(mode)
        z = model.encode(x.clone()).detach()
        for name in ("loss", "encode", "forward", "score", "posterior", "corruption", "decode"):
            method: Any = getattr(model, name, None)  # not every model has a posterior or a corruption
            if callable(method):
                original = z if name == "decode" else x
                given = original.clone()
                method(given)
                require(torch.equal(given, original), f"{name} changes its input in place")


@as_check
def check_batch_mean(subject: Subject) -> None:
    """The loss is a mean over the batch: a batch repeated twice, with the same noise, has the same loss.

    Models that compare the samples of a batch with each other declare this with `compares_samples`.
    """
    if subject.cls.compares_samples:
        raise SkipTest("the loss compares the samples of a batch with each other")
    model, x = subject.build().eval(), subject.data()
    rows = list(range(BATCH))
    with torch.no_grad():
        with SharedNoise(rows, BATCH):
            once = model.loss(x)
        with SharedNoise(rows * 2, BATCH):
            twice = model.loss(torch.cat([x, x]))
    for name, value in once.items():
        require_close(f"{name} of a batch given twice", twice[name], value, 1e-4)


@as_check
def check_batch_independence(subject: Subject) -> None:
    """In evaluation a sample's code, reconstruction and score do not depend on the rest of its batch."""
    model, x = subject.build().eval(), subject.data()
    with torch.no_grad():
        model.loss(x)  # statistics that evaluation must not use would be gathered here
        for name, call in (("encode", model.encode), ("forward", model), ("score", model.score)):
            whole = call(x)
            single = torch.cat([call(x[i : i + 1]) for i in range(len(x))])
            require_close(f"{name} of single samples, against the batch of them,", single, whole, 1e-4)
            other_batches = torch.cat([call(torch.cat([x[i : i + 1], 1 - x[:3]]))[:1] for i in range(len(x))])
            require_close(f"{name} of a sample in another batch", other_batches, whole, 1e-4)
