"""Outputs that an evaluation needs twice are computed once, with the same results."""

import lightning.pytorch as pl
import pytest
import torch
from quiet_trainer import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import aezoo
from aezoo.callbacks import CodeStatistics
from aezoo.training.output_cache import OutputCache


def counting(network: nn.Module) -> list[Tensor]:
    """The inputs that a network's first layer receives from now on."""
    seen: list[Tensor] = []
    next(part for part in network.modules() if not [*part.children()]).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    return seen


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pictures are written there


def evaluate(model: pl.LightningModule) -> dict[str, float]:
    x = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    trainer = quiet_trainer(callbacks=[CodeStatistics()])
    (figures,) = trainer.validate(model, DataLoader(TensorDataset(x), batch_size=6), verbose=False)
    return figures


@pytest.mark.parametrize(("name", "decoded"), [("vae", 2), ("dense_ae", 1)])
def test_evaluation_encodes_each_batch_once(name, decoded):
    model = aezoo.create_model(name, (1, 6, 6), latent_dim=3)
    model.importance_samples = 1
    encoded, codes = counting(model.encoder), counting(model.decoder)
    evaluate(model)
    # two batches; the VAE also decodes importance samples
    assert len(encoded) == 2 and len(codes) == 2 * (decoded + (name == "vae"))


@pytest.mark.parametrize("name", ["vae", "dense_ae", "vq_vae", "denoising_ae"])
def test_figures_are_those_without_reuse(name, monkeypatch):
    shape = {"vq_vae": {"hidden_dims": (4, 4)}}.get(name, {})
    model = aezoo.create_model(name, (1, 6, 6), **shape)
    reused = evaluate(model)
    monkeypatch.setattr(OutputCache, "_cached", lambda self, network, forward: forward)
    assert evaluate(model) == reused


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@torch.no_grad()
def test_network_that_draws_is_computed_again():
    network, x = Drawing().eval(), torch.zeros(4)
    with OutputCache().used_by(network):
        assert not torch.equal(network(x), network(x))


@torch.no_grad()
def test_outputs_changed_in_place_are_not_reused():
    network, x = nn.Linear(2, 2).eval(), torch.ones(1, 2)
    expected = network(x)
    with OutputCache().used_by(network):
        for _ in range(3):
            assert torch.equal(network(x).add_(1), expected + 1)
        x.zero_()
        assert torch.equal(network(x), network.bias[None])


def test_gradients_and_training_bypass_the_cache():
    network, cache, x = nn.Linear(2, 2), OutputCache(), torch.ones(1, 2)
    with cache.used_by(network):
        assert "forward" not in vars(network)
    with cache.used_by(network.eval()):
        with torch.no_grad():
            network(x)
        assert network(x).requires_grad


def test_networks_are_restored_after_an_error():
    network = nn.Linear(2, 2).eval()
    with pytest.raises(KeyError), OutputCache().used_by(network, None):
        raise KeyError
    assert "forward" not in vars(network)
