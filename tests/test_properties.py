"""Properties of every model and data source, for any shapes, values and numbers of samples."""

import math
import warnings

import numpy as np
import pytest
import torch
from golden import own_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from representative_models import others_slow

import aezoo
from aezoo.autoencoder import Autoencoder
from aezoo.data import DataModule
from aezoo.errors import AezooError

bounded = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
sides = st.integers(1, 13)
shapes = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 4), st.integers(1, 40)),
    st.tuples(st.integers(1, 4), sides, sides),
    st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
)
# values that fill a batch or a part of it
TINY = float(np.nextafter(np.float32(0), np.float32(1)))
values = st.sampled_from(["random", "zero", "one", "denormal", "edges", "constant"])
DENOISERS = ("dncnn", "noise2noise", "noise2void")
ON_FROZEN_FEATURES = ("fre", "padim", "patchcore", "student_teacher", "reverse_distillation")
MASKED = ("mae", "simmim", "masked_conv_ae", "ijepa")
SMALL = {"latent_dim": 3, "hidden_dims": (5, 4), "k": 2, "depth": 2, "codebook_size": 5, "heads": 1}
SMALL |= {"groups": (1, 2), "hyper_dim": 2, "hyper_hidden_dims": (3,)}
# models that need a grid unless they have another net
ON_A_GRID = [
    name for family in ("quantised", "compression", "latent_diffusion") for name in aezoo.list_models(family=family)
]


def small(name, shape):
    """A model that is built in a millisecond, or None if it refuses the shape with a message of one line."""
    known = aezoo.registry.hyperparameters(name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return aezoo.create_model(
                name, shape, **{key: value for key, value in SMALL.items() if key in known}
            ).eval()
    except AezooError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    # only convolutions need a grid
    without_grid = len(shape) == 1 and name in ("conv_ae", "resnet_ae", "unet_ae", *DENOISERS, *ON_A_GRID)
    no_picture = name in ("draem", "msssim_vae") and (len(shape) != 3 or min(shape[1:]) < 3)
    no_picture |= name in ("vdvae", "eq_vae", "ijepa", "maetok") and len(shape) != 3
    no_picture |= name in ON_FROZEN_FEATURES and len(shape) != 3
    no_picture |= name == "compressai" and len(shape) != 3
    no_picture |= name == "diffusers_ae" and (len(shape) != 3 or bool(shape[1] % 2 or shape[2] % 2))
    no_picture |= name == "noise2void" and math.prod(shape[1:]) == 1
    without_grid |= name == "pixelcnn" and len(shape) == 4
    without_grid |= name in MASKED and (len(shape) == 1 or math.prod(shape[1:]) == 1)
    assert without_grid or no_picture, f"{name} refuses {shape}: {message}"
    return None


def batch(n, shape, kind, seed, dtype=torch.float32):
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))
    made = {
        "random": x,
        "zero": torch.zeros_like(x),
        "one": torch.ones_like(x),
        "denormal": torch.full_like(x, TINY),
        "edges": x.round(),
        "constant": torch.full_like(x, 0.5),
    }[kind]
    return made.to(dtype)


@pytest.mark.parametrize("name", others_slow(own_models()))
@settings(bounded, max_examples=12)
@given(shape=shapes, n=st.integers(1, 5), kind=values, seed=st.integers(0, 99))
def test_a_model_keeps_shape_dtype_and_finiteness(name, shape, n, kind, seed):
    model = small(name, shape)
    if model is None:
        return
    x = batch(n, shape, kind, seed)
    before = x.clone()
    with torch.no_grad():
        z, x_hat, score = model.encode(x), model(x), model.score(x)
    for value, wanted in ((z, (n, *model.code_shape)), (x_hat, x.shape), (score, (n,))):
        assert value.shape == wanted and value.dtype == torch.float32 and value.isfinite().all()
    assert torch.equal(x, before)
    model.train()
    terms = model.loss(x)
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    terms["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", others_slow(own_models()))
@settings(bounded, max_examples=5)
@given(shape=shapes, n=st.integers(2, 5), kind=values, seed=st.integers(0, 99))
def test_evaluation_is_independent_of_batch(name, shape, n, kind, seed):
    model = small(name, shape)
    if model is None:
        return
    x = batch(n, shape, kind, seed)
    with torch.no_grad():
        for function in (model.encode, model, model.score):
            # sums may have another order in a batch of another size
            torch.testing.assert_close(function(x)[:1], function(x[:1]), rtol=1e-4, atol=1e-5)
            assert torch.equal(function(x), function(x))


@pytest.mark.parametrize("name", others_slow(own_models()))
@settings(bounded, max_examples=5)
@given(shape=shapes, n=st.integers(1, 3), kind=values, seed=st.integers(0, 99))
def test_float64_model_keeps_float64(name, shape, n, kind, seed):
    model = small(name, shape)
    if model is None:
        return
    model = model.double()
    x = batch(n, shape, kind, seed, torch.float64)
    with torch.no_grad():
        assert model(x).dtype == model.encode(x).dtype == torch.float64
        assert model.score(x).isfinite().all() and all(t.isfinite() for t in model.loss(x).values())


@pytest.mark.parametrize("name", others_slow(own_models()))
@settings(bounded, max_examples=5)
@given(
    shape=shapes,
    n=st.integers(1, 5),
    fault=st.sampled_from(["nan", "inf", "-inf", "above", "below", "uint8", "int64", "rank", "size"]),
    seed=st.integers(0, 99),
)
def test_invalid_batch_is_refused_in_one_line(name, shape, n, fault, seed):
    model = small(name, shape)
    if model is None:
        return
    model.train()
    if fault in ("above", "below") and not model.likelihood.unit_interval:
        return
    x = batch(n, shape, "random", seed)
    place = (int(torch.randint(n, (), generator=torch.Generator().manual_seed(seed))), *(0 for _ in shape))
    if fault in ("nan", "inf", "-inf", "above", "below"):
        x[place] = {"above": 1.5, "below": -0.5}.get(fault) or float(fault)
    elif fault in ("uint8", "int64"):
        x = x.to(getattr(torch, fault))
    else:
        x = x[..., None] if fault == "rank" else torch.cat([x, x], dim=1)
    with pytest.raises(AezooError) as refusal:
        model.training_step((x,), 0)
    assert len(str(refusal.value).splitlines()) == 1


# ---- data ------------------------------------------------------------------------------------------------------------


def read(x, y=None, **settings):
    """The DataModule of arrays and its splits, or the message with which they are refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = DataModule.from_arrays(x, y, **settings)
            return data, {stage: data.tensors(stage) for stage in data.splits()}, None
    except AezooError as error:
        return None, {}, str(error)


kinds = st.sampled_from(["uint8", "uint16", "float32", "float64", "int64", "bool"])


@pytest.mark.slow
@settings(bounded, max_examples=30)
@given(
    shape=shapes,
    n=st.integers(6, 40),
    kind=kinds,
    scale=st.sampled_from(["auto", "unit", "standard", "none"]),
    fractions=st.tuples(st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.0, 0.1, 0.3])),
    seed=st.integers(0, 99),
    labelled=st.booleans(),
)
def test_arrays_give_floats_in_disjoint_splits(shape, n, kind, scale, fractions, seed, labelled):
    rng = np.random.default_rng(seed)
    low, high = {"bool": (0, 2), "uint8": (0, 256), "uint16": (0, 2**16)}.get(kind, (-1000, 1000))
    x = rng.integers(low, high, (n, *shape)).astype(kind)
    # the label of a sample is its number, so that splits can be told apart
    y = np.arange(n)
    settings = {
        "val_fraction": fractions[0],
        "test_fraction": fractions[1],
        "scale": scale,
        "seed": seed,
        "batch_size": 4,
    }
    data, parts, message = read(x, y if labelled else None, **settings)
    if message is not None:
        assert len(message.splitlines()) == 1
        # a feature may be constant in few training samples, and values that are not scaled must be numbers
        assert "constant" in message or kind == "bool" or scale != "auto", message
        return
    assert set(parts) == {"train"} | {s for s, f in zip(("val", "test"), fractions, strict=True) if f}
    assert sum(len(part) for part, _ in parts.values()) == n
    for part, labels in parts.values():
        assert part.shape[1:] == data.input_shape and math.prod(data.input_shape) == math.prod(shape)
        assert part.dtype == torch.float32 and part.isfinite().all()
        assert labelled == (labels is not None)
    train = parts["train"][0]
    if scale in ("auto", "unit"):
        assert train.min() >= 0 and train.max() <= 1
    if labelled:
        rows = [row for _, labels in parts.values() for row in labels.tolist()]
        assert len(set(rows)) == n
    for stage in parts:
        loader = getattr(data, f"{stage}_dataloader")()
        seen = [len(found[0]) for found in loader]
        assert sum(seen) == len(parts[stage][0]) and max(seen) <= 4


@pytest.mark.slow
@settings(bounded, max_examples=12)
@given(
    name=st.sampled_from(["mnist5k", "digits"]),
    fractions=st.tuples(st.floats(0, 0.45), st.floats(0, 0.45)),
    batch_size=st.integers(1, 600),
    seed=st.integers(0, 2**31),
)
def test_offline_sets_keep_range_and_disjoint_splits(name, fractions, batch_size, seed):
    data = DataModule(name, val_fraction=fractions[0], test_fraction=fractions[1], batch_size=batch_size, seed=seed)
    data.setup()
    assert data.input_shape == {"mnist5k": (1, 28, 28), "digits": (1, 8, 8)}[name] and data.num_classes == 10
    seen = {}
    for stage in data.splits():
        x, y = data.tensors(stage)
        assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1 and y.shape == (len(x),)
        seen[stage] = {row.tobytes() for row in x.numpy()}
    total = sum(len(data.dataset(stage)) for stage in seen)
    assert total == {"mnist5k": 5000, "digits": 1797}[name]
    x = next(iter(data.train_dataloader()))[0]
    assert len(x) == min(batch_size, len(data.dataset("train")))


@pytest.mark.slow
@settings(bounded, max_examples=20)
@given(
    shape=shapes,
    fault=st.sampled_from(["nan", "inf", "text", "object", "complex", "empty", "one", "constant"]),
    seed=st.integers(0, 99),
)
def test_invalid_arrays_are_refused_in_one_line(shape, fault, seed):
    x = np.random.default_rng(seed).random((20, *shape)).astype(np.float32)
    if fault in ("nan", "inf"):
        x.reshape(-1)[seed % x.size] = float(fault)
    elif fault in ("text", "object", "complex"):
        x = x.astype({"text": str, "object": object, "complex": complex}[fault])
    elif fault == "constant":
        x = np.full_like(x, 0.3)
    else:
        x = x[: 0 if fault == "empty" else 1]
    message = read(x)[2]
    assert message is not None and len(message.splitlines()) == 1


def test_missing_input_check_is_detected(monkeypatch):
    """Without the check of inputs, NaN is not refused by torch."""
    monkeypatch.setattr(Autoencoder, "check_batch", lambda self, x: None)
    model = small("dense_ae", (4,)).train()
    assert model.training_step((torch.full((2, 4), math.nan),), 0)["loss"].isnan()
