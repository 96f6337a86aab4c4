"""Default sizes: exact by network and shape, and at a cost within what docs/networks.md states, for every model."""

import inspect
import itertools

import pytest
import torch
from representative_models import SLOW_REPRESENTATIVE
from torch.utils.flop_counter import FlopCounterMode

import aezoo
from aezoo import nets
from aezoo.bases.network import NetworkAutoencoder
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE
from aezoo.nets.mlp import narrowed
from aezoo.registry import entries
from aezoo.training import cost

CPU = torch.device("cpu")
# docs/networks.md: parameters of both networks, and FLOPs of one sample through them
MOST_PARAMETERS, MOST_FLOPS, MOST_FLOPS_OF_PAPERS = 20_000_000, 2e8, 5.5e8
# seconds for 128 samples on two threads of the processor in docs/networks.md, which lists the exceptions too
LONGEST_STEP = 3.0
# alad passes 13 batches through its networks; torch counts a transformer's attention from 2.15 on
LONGEST_STEPS = {"piwae": 55, "miwae": 28, "alad": 12, "consistency_decoder": 8, "diffusers_ae": 8, "cheng2020": 5}
# the networks that cost the most time at one of the sizes, or have the most weights
COSTLY = ("mlp", "transformer", "vit", "conv_keras", "gdn", "resnet")
SHAPES = [(4,), (784,), (8, 256), (1, 28, 28), (3, 64, 64), (3, 128, 128), (1, 16, 16, 16)]
TRANSFORMER = [(64, 64), (32,), *[(64, 64)] * 5]
STAGES = (32, 64, 128, 128, 128)
DEFAULTS = {
    "mlp": [(400,)] * 7,
    "lstm": [(64,)] * 7,
    "transformer": TRANSFORMER,
    "conv": [None, None, STAGES, (32, 64), (32, 64, 128), (16, 32, 64, 128), (32, 64)],
    "resnet": [None, None, STAGES, (32, 64), (16, 32, 64), (8, 16, 32, 64), (16, 32)],
    "unet": [None, None, STAGES, (16, 32), (8, 16, 32), (4, 8, 16, 32), (8, 16)],
    "ldm": [None, None, (32, 32, 64, 128, 128), (16, 16), (8, 8, 16), (4, 4, 8, 16), (8, 8)],
    "vit": [None, None, *[(128, 128)] * 5],
}
DEFAULTS |= {"conv_keras": DEFAULTS["conv"], "gdn": DEFAULTS["conv"], "mixer": DEFAULTS["vit"]}
DEFAULTS |= {"convnext": DEFAULTS["resnet"], "dc": DEFAULTS["resnet"]}


@pytest.mark.parametrize("name", nets.NETS)
def test_default_dims_of_each_shape(name):
    for shape, dims in zip(SHAPES, DEFAULTS[name], strict=True):
        if dims is None:
            with pytest.raises(AezooError, match="for a vector"):
                nets.default_hidden_dims(name, shape)
        else:
            dims = (170,) if name == "mlp" and shape == (3, 128, 128) else dims
            assert nets.default_hidden_dims(name, shape) == dims


def test_default_dims_of_large_and_tiny_samples():
    assert nets.default_hidden_dims("resnet", (3, 512, 300)) == (4, 8, 16, 32, 64, 128)
    assert nets.default_hidden_dims("conv", (1, 1)) == (32, 64)
    assert nets.default_hidden_dims("vit", (3, 256, 256)) == (64, 64)
    assert narrowed((), (3, 512, 512)) == ()
    assert narrowed((1000, 1000), (3, 64, 64)) == (682, 1000)
    assert narrowed((5,), (2**24,)) == (1,)


@pytest.mark.slow
def test_default_networks_of_all_models_are_affordable():
    classes = [aezoo.model_class(name) for name in entries() if entries()[name].owner == "aezoo"]
    own = {of for cls in classes for of in getattr(cls, "own_hidden_dims", {}).items()}
    for (name, of_paper), shape in itertools.product([*dict.fromkeys(nets.NETS).items(), *sorted(own)], SHAPES):
        stays = of_paper is not None and name != "mlp"  # the dims of a paper are not reduced for larger samples
        if (stays and shape == (3, 128, 128)) or (len(shape) == 1 and name not in nets.WITHOUT_GRID):
            continue
        dims = nets.default_hidden_dims(name, shape, of_paper)
        parts = nets.encoder(name, shape, (16,), dims), nets.decoder(name, (16,), shape, dims[::-1])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            parts[1](parts[0](torch.rand(1, *shape)))
        parameters, flops = sum(p.numel() for part in parts for p in part.parameters()), counter.get_total_flops()
        most_flops = MOST_FLOPS_OF_PAPERS if stays else MOST_FLOPS
        assert parameters <= MOST_PARAMETERS and flops <= most_flops, (name, shape, dims, parameters, flops)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in entries().items() if entry.owner == "aezoo"])
def test_model_is_affordable_with_costly_networks(name, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    takes_net = "net" in inspect.signature(aezoo.model_class(name)).parameters
    # a network costs about the same in most models, so that these test the last network only
    tests_all_networks = name in (*SLOW_REPRESENTATIVE, *LONGEST_STEPS, "simmim")
    costly = COSTLY if tests_all_networks else COSTLY[-1:]
    built = 0
    for net, shape in itertools.product(costly if takes_net else [None], [(3, 64, 64), (1, 28, 28), (784,)]):
        if built and not tests_all_networks:
            break
        try:
            model = aezoo.create_model(name, shape, **({"net": net} if net else {}))
        except AezooError:
            continue
        built += 1
        assert sum(p.numel() for p in model.parameters()) <= 22.5e6, (net, shape)
        assert cost.seconds_per_step(model, 128, CPU) <= LONGEST_STEPS.get(name, LONGEST_STEP), (net, shape)
    assert built


def test_models_with_net_argument_choose_default_dims():
    for name, entry in entries().items():
        cls = aezoo.model_class(name) if entry.owner == "aezoo" else object
        parameters = inspect.signature(cls).parameters
        if issubclass(cls, NetworkAutoencoder) and "net" in parameters:
            assert parameters["hidden_dims"].default is None, name


@pytest.mark.parametrize(
    ("name", "given", "chosen"),
    [
        ("vae", {}, (400,)),
        ("vae", {"net": "resnet"}, (32, 64)),
        ("vae", {"net": "conv", "hidden_dims": (5,)}, (5,)),
        ("aae", {}, (1000, 1000)),
        ("sparse_ae_l1", {}, ()),
        ("sparse_ae_l1", {"net": "conv"}, (32, 64)),
        ("elic", {}, (64, 64)),
        ("factorized_prior", {"net": "unet"}, (16, 32)),
        ("cheng2020", {}, (64, 64)),
    ],
)
def test_hyperparameters_contain_the_chosen_dims(name, given, chosen):
    model = aezoo.create_model(name, (1, 28, 28), **given)
    assert model.hidden_dims == model.hparams["hidden_dims"] == model.hparams_initial["hidden_dims"] == chosen


def test_class_without_the_argument_keeps_hyperparameters():
    class Fixed(VAE):
        def __init__(self, input_shape: tuple[int, ...], *, latent_dim: int = 3) -> None:
            super().__init__(input_shape, latent_dim=latent_dim, net="conv")

    model = Fixed((1, 8, 8))
    assert model.hidden_dims == (32, 64)
    assert dict(model.hparams) == {"input_shape": (1, 8, 8), "latent_dim": 3}
    assert cost.advice(model, 10**9, CPU).endswith(" s for a step of 1000000000 samples: lower --model.latent_dim")


# ---- the line at the start of a fit ----------------------------------------------------------------------------------


def test_slow_fit_names_cost_and_flag(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    wide = VAE((1, 28, 28), net="resnet", hidden_dims=(100,))
    states = torch.random.get_rng_state()
    # mostly 4 convolutions of 3x3 on 14x14 places, 2 in each of two blocks: 2 * 4 * 9 * 100^2 * 196 FLOPs
    assert cost.seconds_per_step(wide, 128, CPU) == pytest.approx(3 * 128 * 72 * 1e4 * 196 / 1e11, rel=0.05)
    assert cost.advice(wide, 128, CPU) is None
    line = (
        r"this is slow to train, an estimated 5.5 s for a step of 1280 samples: lower --model.hidden_dims; the default"
    )
    assert cost.advice(wide, 1280, CPU).startswith(line)
    assert cost.advice(wide, 1280, CPU).endswith(" here is --model.hidden_dims '[32, 64]'")
    assert cost.advice(wide, 1280, torch.device("cuda")) is None
    assert torch.equal(torch.random.get_rng_state(), states) and wide.training
    monkeypatch.setattr(cost, "MANY_PARAMETERS", 100)
    assert cost.advice(VAE((4,)), 10, CPU) == "this is slow to train, 23,236 parameters: lower --model.hidden_dims"


@pytest.mark.slow
def test_fit_prints_cost_and_info_prints_default_dims(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "MANY_PARAMETERS", 100)
    main(["fit", "--model=vae", "--model.hidden_dims=[8]", "--data=digits", "--trainer.fast_dev_run=true"])
    out = capsys.readouterr().out
    assert "parameters: lower --model.hidden_dims; the default here is --model.hidden_dims '[400]'" in out
    main(["info", "denoising_ae", "--shape", "1", "8", "8"])
    assert "Default hidden_dims: mlp (256,); conv, resnet," in capsys.readouterr().out
    main(["info", "dense_ae", "--shape", "1", "8", "8"])
    assert "Default hidden_dims" not in capsys.readouterr().out
