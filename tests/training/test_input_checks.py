"""Invalid inputs of models are refused with one line; valid ones work."""

import math
import warnings

import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader, Dataset, TensorDataset

import aezoo
from aezoo.errors import AezooError
from aezoo.training import input_checks

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

X = torch.rand(6, 12)


def model(name="vae", shape=(12,), **settings):
    torch.manual_seed(0)
    return aezoo.create_model(name, shape, **{"hidden_dims": (8,), **settings})


WRONG = {
    "array": (X.numpy(), r"expects a tensor, got ndarray of shape 6x12: give torch\.as_tensor"),
    "list": (X.tolist(), "expects a tensor, got list"),
    "doubles": (X.double(), r"expects float32 like the model's weights, got float64: give x\.float\(\)"),
    "bytes": (X.byte(), r"expects float data, got torch\.uint8"),
    "one sample": (X[0], r"expects samples of shape Bx12, got 12: one sample needs a batch dimension too, x\[None\]"),
    "other size": (torch.rand(6, 13), "expects samples of shape Bx12, got 6x13"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["encode", "forward", "score", "loss"])
@pytest.mark.parametrize("what", WRONG)
def test_inputs_of_wrong_shape_or_type_are_refused(what, method, training):
    given, says = WRONG[what]
    with pytest.raises(AezooError, match=rf"{says}") as error:
        getattr(model().train(training), method)(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "method", "settings"), [("vq_vae", "encode_indices", {"net": "mlp"}), ("mvae", "reconstruct_from", {})]
)
@pytest.mark.parametrize("what", WRONG)
def test_model_specific_methods_refuse_wrong_inputs(what, name, method, settings):
    given, says = WRONG[what]
    with pytest.raises(AezooError, match=rf"^{method} {says}"):
        getattr(model(name, **settings).eval(), method)(given)


def test_inpaint_refuses_wrong_shape():
    with pytest.raises(AezooError, match=r"^inpaint expects samples of shape Bx1x8x8, got 6x12"):
        model("asymmetric_kl", (1, 8, 8)).eval().inpaint(X, X > 0.5)


@pytest.mark.parametrize("name", ["mlvae", "triplet_ae", "semi_supervised_vae"])
def test_labels_must_be_one_per_sample(name):
    with pytest.raises(AezooError, match=r"labels must be one .* per sample, got torch.int64 of shape \(6, 1\)"):
        model(name).loss(X, torch.zeros(6, 1).long())


def test_decode_checks_code_shape():
    with pytest.raises(AezooError, match="decode expects codes of shape Bx16, got 6x12"):
        model().decode(X)


def test_valid_input_check_does_not_read_parameters(monkeypatch):
    """Iterating over parameters takes as long as a small layer."""
    model, asked = aezoo.create_model("dense_ae", (30,)).eval(), []
    monkeypatch.setattr(model, "parameters", lambda: asked.append(1) or iter(()))
    model.score(torch.rand(1, 30))
    model(torch.rand(1, 30))
    assert not asked


def test_model_errors_are_not_replaced():
    class Broken(type(model())):
        def encode(self, x):
            raise RuntimeError("my own mistake")

    with pytest.raises(RuntimeError, match="my own mistake"):
        Broken((12,), hidden_dims=(8,)).encode(X)


def test_model_accepts_inputs_of_its_precision():
    assert model().double().eval().encode(X.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):  # a float32 model takes inputs that autocast has converted
        assert model().eval().encode(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["encode", "forward", "score", "loss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_input_dtype_must_match_weights(method, dtype):
    says = f"({method}|encode) expects {dtype} like the model's weights, got torch.float32: give x.to\\({dtype}\\)"
    with pytest.raises(AezooError, match=says):
        getattr(model().to(dtype).eval(), method)(X)


@pytest.mark.parametrize("n", [-1, 2.5, "3", None])
@pytest.mark.parametrize("name", ["vae", "conditional_vae"])  # the second inherits `sample` from another base
def test_invalid_sample_counts_are_refused(n, name):
    with pytest.raises(AezooError, match=r"sample takes a whole number of samples, at least 0, got"):
        model(name).sample(n)


def test_sample_accepts_numpy_integer():
    assert model().sample(np.int64(2)).shape == (2, 12)


@pytest.mark.parametrize("name", ["vae", "mixture_vae"])
def test_sample_accepts_zero(name):
    assert model(name).sample(0).shape == (0, 12)


class Rows(Dataset):
    def __init__(self, row):
        self.row = row

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return self.row


def trained(own, data):
    quiet_trainer(max_epochs=1).fit(own, DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"image": X[0]}, r"a batch must be x, \(x,\) or \(x, y\) of tensors, got a dict with 'image'"),
        ((["a"], X[0]), r"a batch must be .* got list"),
        (X[0].double(), r"the data are float64, but the model's weights are float32: give x\.float\(\), or .*64-true"),
        ((X[0].numpy().astype(float), 1), "the data are float64"),
    ],
)
def test_invalid_training_batches_are_refused(row, says):
    with pytest.raises(AezooError, match=says):
        trained(model(), Rows(row))


@pytest.mark.parametrize("row", [X[0], (X[0],), (X[0], 3), [X[0], 3]])
def test_batches_may_have_labels(row):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a batch has")
        trained(model(), Rows(row))


def test_unused_batch_parts_warn():
    with pytest.warns(UserWarning, match="a batch has 3 parts: .* the others are ignored"):
        trained(model(), Rows((X[0], 3, 0.5)))


@pytest.mark.parametrize(
    ("gives", "says"),
    [
        (lambda loss: loss, r"Own\.loss must return named scalars, \{'loss': \.\.\., .* got one tensor"),
        (lambda loss: {"nll": loss}, "got only 'nll'"),
        (lambda loss: {}, "got dict"),
        (lambda loss: (loss, loss), "got tuple"),
    ],
)
def test_invalid_custom_loss_return_is_refused(gives, says):
    class Own(type(model("dense_ae"))):
        def loss(self, x, y=None):
            return gives((self(x) - x).square().mean())

    with pytest.raises(AezooError, match=says):
        trained(Own((12,), hidden_dims=(8,)), TensorDataset(X))


def test_custom_loss_must_accept_labels():
    with pytest.raises(AezooError, match=r"Own\.loss must take self, x and y: def loss\(self, x, y=None\)"):

        class Own(type(model("dense_ae"))):
            def loss(self, x):
                return {"loss": self.score(x).mean()}


def test_guard_wraps_method_once_and_keeps_metadata():
    kind = type(model())
    for name in ("encode", "decode", "forward", "score", "loss", "sample"):
        method = getattr(kind, name)
        assert method.__name__ == name and method.__module__.startswith("aezoo.")
        before = method
        input_checks.guard(kind)
        assert getattr(kind, name) is before


def test_integer_input_shape_suggests_tuple():
    with pytest.raises(AezooError, match=r"input_shape takes a list of whole numbers, got 784: give \(784,\)"):
        aezoo.create_model("vae", 784)


# ---- models with few attributes --------------------------------------------------------------------------------------


class Methods(aezoo.Autoencoder):
    """Defines encode and decode, and sets neither encoder, decoder nor code_shape."""

    def __init__(self, input_shape: tuple[int, ...], *, width: int = 3) -> None:
        super().__init__(input_shape)
        self.down = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 2 * width), torch.nn.BatchNorm1d(2 * width)
        )
        self.up = torch.nn.Linear(2 * width, 64)

    def encode(self, x):
        return self.down(x).unflatten(1, (2, -1))

    def decode(self, z):
        return self.up(z.flatten(1)).sigmoid().unflatten(1, self.input_shape)

    def loss(self, x, y=None):
        mse = (self.decode(self.encode(x)) - x).square().sum() / len(x)
        return {"loss": mse, "error": mse}


class Parts(aezoo.Autoencoder):
    """Sets an encoder, and neither sets nor defines a decoder."""

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        self.encoder = torch.nn.Flatten()

    def loss(self, x, y=None):
        return {"loss": (self(x) - x).square().mean()}


def test_code_shape_is_measured_without_a_trace():
    loose, states = Methods((1, 8, 8)), torch.random.get_rng_state()
    before = {name: value.clone() for name, value in loose.state_dict().items()}
    assert loose.code_shape == (2, 3)
    assert all(module.training for module in loose.modules())
    assert torch.equal(torch.random.get_rng_state(), states)
    assert all(torch.equal(value, before[name]) for name, value in loose.state_dict().items())
    loose.code_shape = (6,)
    assert loose.code_shape == (6,)


def test_code_shape_is_named_if_no_sample_determines_it():
    class Broken(Methods):
        def encode(self, x):
            return self.down(x).unflatten(1, self.code_shape)

    with pytest.raises(AezooError, match=r"^Broken sets no code_shape, and encoding .*: set self.code_shape in its"):
        _ = Broken((1, 8, 8)).code_shape
    assert "code_shape=unknown" in repr(Broken((1, 8, 8)))


@pytest.mark.parametrize("shape", [(64,), (1, 1, 1)])
def test_decode_of_another_shape_is_refused_immediately(shape):
    class Flat(Methods):
        def decode(self, z):
            return self.up(z.flatten(1)).sigmoid()[:, : math.prod(shape)].unflatten(1, shape)

    what = "x".join(map(str, shape))
    with pytest.raises(AezooError, match=rf"^Flat.decode gives samples of shape {what}, the data are 1x8x8: have"):
        quiet_trainer(max_steps=1).fit(Flat((1, 8, 8)), *[DataLoader(torch.rand(4, 1, 8, 8), 2)] * 2)


@pytest.mark.parametrize("method", ["forward", "score", "loss"])
def test_missing_decoder_is_named(method):
    with pytest.raises(
        AezooError, match=r"^Parts sets no decoder: set self.decoder in its constructor, or write decode"
    ):
        getattr(Parts((1, 8, 8)), method)(torch.rand(2, 1, 8, 8))


@pytest.mark.slow
def test_model_without_networks_works_with_all_tasks():
    torch.manual_seed(0)
    x = torch.rand(40, 1, 8, 8)
    loose, data = Methods((1, 8, 8)), DataLoader(TensorDataset(x), 20)
    quiet_trainer(max_epochs=1).fit(loose, data, data)
    loose.eval()
    assert aezoo.embed(loose, x).codes.shape == (40, 2, 3)
    assert aezoo.reconstruct(loose, x).x_hat.shape == (40, 1, 8, 8)
    assert aezoo.detect(loose, x[:5], fit_on=x).scores.shape == (5,)
    torch.testing.assert_close(
        loose.score(x), torch.nn.functional.binary_cross_entropy(loose(x), x, reduction="none").sum((1, 2, 3))
    )
    for score in ("sap", "nap", "deep_svdd"):
        with pytest.raises(
            AezooError, match=f"^{score} reads the layers of the encoder, and Methods sets none: set self"
        ):
            aezoo.detect(loose, x[:5], score=score, fit_on=x)
