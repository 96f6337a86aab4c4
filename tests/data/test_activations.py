"""Activations of a layer over a set: compared with a hook, in memory or mapped, and folded back into models."""

import copy
import gc
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import aezoo
from aezoo import registry
from aezoo.autoencoder import Autoencoder
from aezoo.cli.main import main
from aezoo.cli.task_commands import read
from aezoo.data import DataModule
from aezoo.data.networks import layer_outputs
from aezoo.errors import AezooError
from aezoo.io.checkpoint import load_model, load_run, save_model
from aezoo.io.scale_folding import fold
from aezoo.models.classic.linear_ae import LinearAE
from aezoo.models.sparse.topk_sae import TopKSAE
from aezoo.nets.blocks.classifier import Classifier
from aezoo.security import policy

NETS = '''
import os
from torch import nn
import torch

class Net(nn.Module):
    """Maps, then tokens, then vectors."""
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3)
        self.act = nn.ReLU(inplace=True)
        self.mix = nn.Linear(6, 6)
        self.flat = nn.Linear(216, 5)
        self.idle = nn.Linear(3, 3)
        self.both = Both()
    def forward(self, x):
        maps = self.act(self.first(x))
        tokens = self.mix(maps.flatten(2).transpose(1, 2))
        return self.both(self.flat(tokens.flatten(1)))

class Both(nn.Module):
    def forward(self, x):
        return (x, 2 * x)

class Scalar(nn.Module):
    def forward(self, x):
        return x.sum()

def ready():
    torch.manual_seed(3)
    return Net()

def wrong():
    return 3

def needs(size):
    return Net()

made = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), Scalar())
run = os.system
'''


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    policy.enforce(["own_nets"])
    yield
    sys.modules.pop("own_nets", None)
    policy.enforce()


def activations(layer, network="own_nets.ready", **given):
    return DataModule("activations", network=network, layer=layer, **{"of": "digits", "normalise": False, **given})


def by_hand(layer, stage="train", of="digits"):
    """The output that a forward hook sees, for all samples at once."""
    from own_nets import ready

    x, y = DataModule(of).tensors(stage)
    net, seen = ready().eval(), []
    net.act.inplace = False
    net.get_submodule(layer).register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        net(x)
    return seen[0], y


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_activations_match_forward_hook_in_order(stage):
    expected, y = by_hand("flat", stage)
    found, labels = activations("flat").tensors(stage)
    assert found.shape == expected.shape == (len(y), 5)
    assert torch.allclose(found, expected, atol=1e-6) and torch.equal(labels, y)


def test_layer_with_in_place_output_change_is_captured_first():
    expected, _ = by_hand("first", "val")
    found, _ = activations("first").tensors("val")
    assert float(found.min()) < 0
    assert torch.allclose(found, expected.movedim(1, -1).reshape(-1, 6), atol=1e-6)


@pytest.mark.slow
def test_bytes_are_scaled_unless_kept():
    import own_nets

    x = DataModule("mnist5k").dataset("val").x
    assert x.dtype == torch.uint8
    with torch.no_grad():
        for scale, samples in (("auto", x / 255), ("none", x.float())):
            data = activations("0", "own_nets.made", of="mnist5k", positions="mean", scale=scale)
            expected = own_nets.made[0](samples).mean((2, 3))
            assert torch.allclose(data.tensors("val")[0], expected, rtol=1e-4, atol=1e-5)


def test_positions_are_separate_samples_or_pooled():
    maps, y = by_hand("first", "val")
    each = activations("first")
    assert each.input_shape == (6,) and each.source.positions == 36 and each.num_classes == 10
    x, labels = each.tensors("val")
    # sample i, row r and column c are at index 36 i + 6 r + c
    assert torch.allclose(x[36 * 5 + 6 * 2 + 3], maps[5, :, 2, 3], atol=1e-6)
    assert torch.equal(labels, y.repeat_interleave(36))
    for positions, pooled in (("mean", maps.mean((2, 3))), ("max", maps.amax((2, 3)))):
        x, labels = activations("first", positions=positions).tensors("val")
        assert torch.allclose(x, pooled, atol=1e-6) and torch.equal(labels, y)


def test_activation_layouts_default_by_rank():
    tokens, _ = by_hand("mix", "val")
    x, _ = activations("mix").tensors("val")
    assert torch.allclose(x, tokens.reshape(-1, 6), atol=1e-6)
    assert activations("mix", feature_axis="first").input_shape == (36,)
    assert activations("first", feature_axis="last").source.positions == 36


def test_several_layers_are_stacked_as_streams():
    first, _ = by_hand("first", "val")
    tokens, _ = by_hand("mix", "val")
    data = activations("first, mix")
    x, _ = data.tensors("val")
    assert data.input_shape == (2, 6) and x.shape[1:] == (2, 6)
    assert torch.allclose(x[:, 0], first.movedim(1, -1).reshape(-1, 6), atol=1e-6)
    assert torch.allclose(x[:, 1], tokens.reshape(-1, 6), atol=1e-6)


@pytest.mark.slow
def test_training_split_is_scaled_to_norm_sqrt_dim():
    raw, normal = activations("first,mix"), activations("first,mix", normalise=True)
    x, _ = normal.tensors("train")
    a, _ = raw.tensors("train")
    state = normal.source.scaling.state()
    assert raw.source.scaling is None and set(state) == {"offset", "factor"}
    assert state["factor"].shape == (2, 1) and not state["offset"].any()
    assert x.double().square().sum(2).mean(0).tolist() == pytest.approx([6, 6], rel=1e-5)
    assert torch.equal(x, a / state["factor"])
    # other splits are divided by the same factor
    assert torch.equal(normal.tensors("test")[0], raw.tensors("test")[0] / state["factor"])
    single = activations("first", normalise=True)
    single.setup()
    assert single.source.scaling.state()["factor"].shape == ()
    assert float(single.source.scaling.factor) == pytest.approx(float(state["factor"][0]), rel=1e-6)


# ---- storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_mapped_activations_match_in_memory():
    held, mapped = (activations("flat", normalise=True, memory=memory) for memory in ("on", "off"))
    for stage in ("train", "val", "test"):
        one, other = held.tensors(stage), mapped.tensors(stage)
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    dataset = mapped.dataset("val")
    assert len(pickle.dumps(dataset)) < 4 * 5 * len(dataset)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[7][0], held.dataset("val")[7][0])
    assert torch.equal(dataset[-1][0], dataset[len(dataset) - 1][0])
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    seen = []
    for data, num_workers in ((held, 0), (mapped, 0), (mapped, 2)):
        data.num_workers = num_workers
        seen.append([*data.train_dataloader()][:5])
    for batches in seen[1:]:
        assert all(torch.equal(a, b) for one, other in zip(seen[0], batches, strict=True)
                   for a, b in zip(one, other, strict=True))  # fmt: skip


@pytest.mark.slow
def test_mapped_file_is_deleted_with_its_data():
    data = activations("flat", memory="off")
    folder = Path(data.dataset("train")._path).parent
    assert folder.is_dir() and folder.name.startswith("aezoo-activations-")
    if (child := os.fork()) == 0:
        del data
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()  # another process must not delete it when it ends
    del data
    gc.collect()
    assert not folder.exists()


def test_oversized_activations_are_mapped_or_refused(monkeypatch):
    monkeypatch.setattr("aezoo.data.activations.fits_in_memory", lambda *_: False)
    data = activations("flat")
    assert data.dataset("val")._path
    monkeypatch.setattr("aezoo.data.activations.free_memory", lambda _: 100)
    with pytest.raises(AezooError, match="more than is free"):
        activations("flat", memory="on").setup()


@pytest.mark.slow
def test_activations_are_seeded_and_keep_rng_state(monkeypatch):
    monkeypatch.setattr("aezoo.nets.blocks.classifier.STEPS", 10)
    before = torch.get_rng_state()
    one, other = (activations("features", network="classifier", seed=2).tensors("val")[0] for _ in range(2))
    assert torch.equal(one, other) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(activations("features", network="classifier", seed=3).tensors("val")[0][:50], one[:50])


def test_activations_made_in_inference_mode_are_trainable():
    with torch.inference_mode():
        x = activations("flat").dataset("train").x
    weight = torch.ones(5, requires_grad=True)
    (x @ weight).sum().backward()
    assert torch.allclose(weight.grad, x.sum(0))


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_classifier_learns_labels_unless_random():
    data = activations("head", network="classifier", positions="each")
    x, y = data.tensors("test")
    assert float((x.argmax(1) == y).float().mean()) > 0.9
    with pytest.warns(UserWarning, match="classifier gets RANDOM weights"):
        data = activations("head", network="classifier", weights="random")
    x, y = data.tensors("test")
    assert float((x.argmax(1) == y).float().mean()) < 0.5
    vector = Classifier((7,), 3)
    assert vector(torch.rand(4, 7)).shape == (4, 3)


@pytest.mark.slow
def test_saved_zoo_model_provides_layers(tmp_path):
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=4, hidden_dims=(16,)).eval()
    save_model(model, tmp_path / "ae")
    data = activations("encoder", network=str(tmp_path / "ae"))
    x, _ = DataModule("digits").tensors("test")
    with torch.no_grad():
        assert torch.allclose(data.tensors("test")[0], model.encoder(x), atol=1e-6)
    with pytest.raises(AezooError, match="has weights of its own"):
        activations("encoder", network=str(tmp_path / "ae"), weights="random")
    with pytest.raises(AezooError, match="samples of 8x8"):
        activations("encoder", network=str(tmp_path / "ae"), of="mnist5k")
    with pytest.raises(AezooError, match="no checkpoint at"):
        activations("encoder", network=str(tmp_path / "none" / "x.ckpt"))


def test_pretrained_weights_are_found_or_refused(tmp_path, monkeypatch):
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    wide = {"layer": "features.0", "network": "squeezenet1_1", "size": 32}
    with pytest.raises(AezooError, match=r"no weights of squeezenet1_1 .*weights='DEFAULT'.*--data.weights random"):
        activations(**wide)
    torch.manual_seed(5)
    trained = squeezenet1_1(weights=None).eval()
    file = tmp_path / "checkpoints" / SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir()
    torch.save(trained.state_dict(), file)
    x, _ = DataModule("digits", size=32).tensors("val")
    expected = trained.features[0](SqueezeNet1_1_Weights.DEFAULT.transforms(crop_size=32, resize_size=32)(
        x[:4].expand(-1, 3, -1, -1)
    ))  # fmt: skip
    found, _ = activations(**wide).tensors("val")
    first = expected.movedim(1, -1).reshape(-1, 64)
    assert torch.allclose(found[: len(first)], first, atol=1e-5) and float(found.min()) < 0
    file.write_bytes(b"no weights")
    with pytest.raises(AezooError, match="contains no weights of squeezenet1_1"):
        activations(**wide)


def test_random_weights_warn_and_are_seeded():
    seen = []
    for seed in (0, 0, 1):
        with pytest.warns(UserWarning, match="squeezenet1_1 gets RANDOM weights, fixed by --data.seed"):
            data = activations("features.3", "squeezenet1_1", size=32, weights="random", seed=seed)
        seen.append(next(data.source.network.module.parameters()))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer": "firsst"}, r"no layer 'firsst' .*it has 6, such as first"),
        ({"layer": ""}, r"no layer '' .*such as first, act"),
        ({"layer": "idle"}, "layer idle returns no tensor, or is not used"),
        ({"layer": "first,flat"}, r"number of positions and of features, got first 36 x 6, flat 1 x 5"),
        ({"layer": "flat", "of": "activations"}, "no samples of its own"),
        ({"layer": "flat", "of": "digitss"}, "did you mean 'digits'"),
        ({"layer": "flat", "of": "mnist5k"}, r"does not accept samples of shape \(1, 28, 28\)"),
        ({"layer": "2", "network": "own_nets.made"}, r"returns \(\) for 1 samples"),
        ({"layer": "flat", "network": "own_nets.Nett"}, r"no attribute 'Nett', did you mean 'Net'"),
        ({"layer": "flat", "network": "own_nets.wrong"}, "returns a int, not a torch.nn.Module"),
        ({"layer": "flat", "network": "own_nets.needs"}, "without arguments .*give a function"),
        ({"layer": "flat", "network": "own_netz.Net"}, "not imported.*add --allow own_netz"),
        ({"layer": "flat", "network": "own_nets.run"}, "never posix"),
        ({"layer": "flat", "network": "os.system"}, "add --allow os"),
        ({"layer": "flat", "network": "aezoo.registry.import_plugins"}, "nor a function of yours"),
        ({"layer": "flat", "network": "torch.optim.Adam"}, r"an import path .*torch.nn.modules.module.Module\]$"),
        ({"layer": "flat", "network": "own_nets.ready", "weights": "random"}, "has weights of its own"),
        ({"layer": "flat", "network": "resnet81"}, "did you mean 'resnet18'"),
        ({"layer": "flat", "network": "clasifier"}, "did you mean 'classifier'"),
        ({"layer": "flat", "positions": "all"}, "choose from each, mean, max"),
        ({"layer": "flat", "weights": "trained"}, "choose from stored, random"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(given, message):
    with pytest.raises(AezooError, match=message) as caught:
        activations(**given)
    assert "\n" not in str(caught.value)


def test_unsuitable_datasets_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50, 9)).astype("float32"))
    vectors = str(tmp_path / "x.npy")
    with pytest.raises(AezooError, match="has no classes for a classifier"):
        activations("head", "classifier", of=vectors)
    with pytest.raises(AezooError, match="resnet18 takes images"), pytest.warns(UserWarning, match="RANDOM"):
        activations("layer1", "resnet18", of=vectors, weights="random")


def test_sequences_have_their_features_first(tmp_path):
    (tmp_path / "own_more.py").write_text(
        "from torch import nn\nnet = nn.Sequential(nn.Conv1d(3, 5, 3), nn.ReLU())\n"
        "dead = nn.Sequential(nn.Conv1d(3, 5, 3), nn.Threshold(1e9, 0.0))\n"
    )
    x = np.random.default_rng(0).normal(size=(60, 3, 10)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    policy.enforce(["own_more"])
    data = activations("0", "own_more.net", of=str(tmp_path / "x.npy"), scale="none")
    assert data.input_shape == (5,) and data.source.positions == 8
    with pytest.raises(AezooError, match="gives only zeros, NaN or infinity"):
        activations("1", "own_more.dead", of=str(tmp_path / "x.npy"), normalise=True).setup()


def test_module_is_imported_only_if_allowed(monkeypatch):
    policy.enforce()
    with pytest.raises(AezooError, match=r"own_nets.Net is not imported.*add --allow own_nets"):
        activations("flat", "own_nets.Net")
    assert "own_nets" not in sys.modules
    # in a program without the command line
    monkeypatch.setattr(policy, "_opened", set())
    with pytest.raises(AezooError, match=r"not imported|not run"):
        activations("flat", "own_nets.Net")
    assert "own_nets" not in sys.modules
    monkeypatch.setattr(policy, "_opened", set())
    monkeypatch.setenv(policy.VARIABLE, "own_nets")
    assert activations("flat", "own_nets.Net").input_shape == (5,)


def test_user_module_is_not_modified():
    import own_nets

    own_nets.made[2] = nn.Flatten()
    own_nets.made.train()
    data = activations("1", "own_nets.made")
    data.setup()
    assert own_nets.made.training and next(own_nets.made.parameters()).requires_grad
    assert not data.source.network.module.training
    assert not any(module._forward_hooks for module in data.source.network.module.modules())
    expected = copy.deepcopy(own_nets.made).eval()
    x, _ = DataModule("digits").tensors("val")
    assert torch.allclose(activations("1", "own_nets.made").tensors("val")[0], layer_outputs(expected, ["1"], x)[0]
                          .movedim(1, -1).reshape(-1, 2), atol=1e-6)  # fmt: skip


# ---- back to raw activations -----------------------------------------------------------------------------------------


def sparse_model(name, shape=(12,)):
    own = registry.hyperparameters(name)
    given = {"latent_dim": 20, "k": 4, "likelihood": "gaussian"}
    torch.manual_seed(0)
    model = aezoo.create_model(name, shape, **{key: value for key, value in given.items() if key in own}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    return model


def takes(name, shape):
    try:
        return sparse_model(name, shape) is not None
    except AezooError:
        return False


SPARSE = [name for name in registry.list_models(family="sparse") if takes(name, (12,))]


@pytest.mark.parametrize("name", [*SPARSE, "linear_ae", "dense_ae", "vae"])
@pytest.mark.parametrize("c", [0.03, 40.0])
def test_folded_scale_gives_equal_raw_reconstructions(name, c):
    model = sparse_model(name)
    folded = fold(model, c)
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = c * model(x)
        assert torch.allclose(folded(c * x), wanted, atol=1e-4 * float(wanted.abs().max()))
        # without folding, or with half of it, they differ
        assert not torch.allclose(model(c * x), wanted, atol=0.05 * float(wanted.abs().max()))
        one, other = model.encode(x), folded.encode(c * x)
        scale = 1 if torch.allclose(one, other, atol=1e-4) else c
        assert torch.allclose(scale * one, other, atol=1e-4 * scale * float(one.abs().max()))
    assert type(folded) is type(model) and folded.hparams == model.hparams
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), sparse_model(name).state_dict().values(),
                                                 strict=True))  # fmt: skip


@pytest.mark.parametrize(("name", "given"), [
    ("topk_sae", {"k": 4}), ("crosscoder", {}), ("transcoder", {"targets": (1,)}), ("transcoder", {"targets": (0,)}),
    ("matryoshka_sae", {"k": 8}),
])  # fmt: skip
def test_each_stream_is_folded_by_its_scale(name, given):
    torch.manual_seed(0)
    model = aezoo.create_model(name, (2, 6), latent_dim=20, **given).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    c = torch.tensor([[0.2], [30.0]])
    folded = fold(model, {"offset": torch.zeros(2, 1), "factor": c})
    x = torch.randn(50, 2, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(folded(c * x) / c, model(x), atol=1e-4)
        assert torch.allclose(folded.encode(c * x), model.encode(x), atol=1e-4)


def test_tied_weights_refuse_scale_per_stream():
    with pytest.raises(AezooError, match="KSparse cannot fold"):
        fold(sparse_model("k_sparse", (2, 6)), torch.tensor([[0.2], [30.0]]))
    fold(sparse_model("k_sparse", (2, 6)), torch.tensor([[2.0], [2.0]]))


def test_folding_distinguishes_axes_of_equal_size():
    model = aezoo.create_model("dense_ae", (6,), latent_dim=6, hidden_dims=(6, 6), likelihood="gaussian").eval()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(fold(model, 9.0)(9 * x), 9 * model(x), atol=1e-4)


class Shifted(LinearAE):
    """Adds an offset to its input."""

    def encode(self, x):
        return super().encode(x + 1)


def test_unfoldable_model_or_scaling_is_refused():
    with pytest.raises(AezooError, match="Shifted cannot fold the scale"):
        fold(Shifted((5,), latent_dim=3, likelihood="gaussian"), 2.0)
    for scaling in ({}, {"offset": torch.ones(3), "factor": torch.ones(3)}):
        with pytest.raises(AezooError, match="other data"):
            fold(sparse_model("topk_sae"), scaling)


@pytest.mark.slow
def test_run_keeps_scale_and_model_takes_raw_activations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    off = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]
    main(["fit", "--model=topk_sae", "--model.latent_dim=24", "--model.k=3", "--data.name=activations",
              "--data.network=own_nets.ready", "--data.layer=flat", "--data.of=digits", "--allow", "own_nets",
              "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.limit_train_batches=3",
              "--projector.n=0", *off])  # fmt: skip
    (run,) = tmp_path.glob("runs/*/0")
    model, trained = load_run(run)
    raw, _ = activations("flat").tensors("test")
    data = DataModule(**trained["settings"])
    x, _ = data.tensors("test")
    factor = trained["scaling"]["factor"]
    assert torch.equal(x, raw / factor) and torch.equal(factor, data.source.scaling.factor)
    # a file of raw activations is scaled like those of training
    np.save(tmp_path / "raw.npy", raw.numpy())
    assert torch.equal(read(str(tmp_path / "raw.npy"), model.data_units).rows(range(len(raw))), x)
    save_model(model, tmp_path / "folded", trained["scaling"])
    folded = load_model(tmp_path / "folded")
    assert folded.data_units is None and isinstance(folded, TopKSAE) and isinstance(folded, Autoencoder)
    with torch.no_grad():
        assert torch.allclose(folded(raw), factor * model(x), atol=1e-4 * float(factor))
    with pytest.raises(SystemExit):  # importing its module needs an option of the command line
        main(["test", "--ckpt_path", str(run)])
