"""What a model is given by mistake is answered in one line; what works, works as before."""

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
    with pytest.raises(AezooError, match=r"labels must be one .* a sample, got torch.int64 of shape \(6, 1\)"):
        model(name).loss(X, torch.zeros(6, 1).long())


def test_decode_checks_code_shape():
    with pytest.raises(AezooError, match="decode expects codes of shape Bx16, got 6x12"):
        model().decode(X)


def test_valid_input_check_does_not_read_parameters(monkeypatch):
    """To find the first of them takes as long as a small layer."""
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
    with torch.autocast("cpu", torch.bfloat16):  # and a narrow one what autocast makes of its inputs
        assert model().eval().encode(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["encode", "forward", "score", "loss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_input_dtype_must_match_weights(method, dtype):
    says = f"({method}|encode) expects {dtype} like the model's weights, got torch.float32: give x.to\\({dtype}\\)"
    with pytest.raises(AezooError, match=says):
        getattr(model().to(dtype).eval(), method)(X)


@pytest.mark.parametrize("n", [-1, 2.5, "3", None])
@pytest.mark.parametrize("name", ["vae", "conditional_vae"])  # the second has its `sample` from a class beside
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
        (X[0].double(), r"the data are float64, the model's weights float32: give x\.float\(\), or .*64-true"),
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
