"""The LSTM autoencoder of sequitur (Shobrook 2020), and its training on sequences of different lengths.

It takes one sequence at a time, (L, F), and its decoder reads the code at each step, as ours does.

Source: https://github.com/shobrook/sequitur
"""

import copy
import math
from typing import Any

import pytest
import torch
from sequitur.models import LSTM_AE
from sequitur.models.lstm_ae import Encoder
from sequitur.quick_train import train_model
from torch import Tensor, nn

import aezoo
from aezoo.nets.lstm import LSTM

F, L, CODE, PAD = 3, 7, 4, -1.0


class ForBatch(nn.Module):
    """One of their networks in our interface, for batches of one sequence."""

    def __init__(self, net: nn.Module, *more: int) -> None:
        super().__init__()
        self.net, self.more = net, more

    def forward(self, x: Tensor, length: Tensor | None = None) -> Tensor:
        out: Tensor = self.net(x[0].T if x.ndim == 3 else x[0], *self.more)
        return (out.T if out.ndim == 2 else out)[None]


class ForSequence(nn.Module):
    """One of our models in their interface: reconstructs one sequence of any length, without padding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        settings = self.model.hparams | {"input_shape": (F, len(x)), "pad_value": None}
        alone: Any = aezoo.create_model("sequence_ae", **settings).double()
        alone.load_state_dict(self.model.state_dict())
        return alone.decoder(alone.encoder(x.T[None]))[0].T


def test_layers_of_the_encoder(compare):
    layers, theirs = nn.Sequential(LSTM(F, 5), LSTM(5, CODE)), Encoder(F, CODE, [5], None, None)
    pairs = []
    for a, b in zip(layers, theirs.layers, strict=True):
        nn.init.normal_(a.bias)
        b.bias_hh_l0.data.zero_()
        for name, other in (("weight_ih", b.weight_ih_l0), ("weight_hh", b.weight_hh_l0), ("bias", b.bias_ih_l0)):
            other.data.copy_(getattr(a, name))
            pairs.append((getattr(a, name), other))
    x = torch.randn(L, F)
    found, expected = layers(x[None])[0, -1], theirs(x)
    row = compare("sequence_ae", "sequitur", "Encoder")
    row.equal("state after the last step", found, expected)
    row.equal_gradients(found.square().sum(), expected.square().sum(), pairs)


def test_loss_on_networks_of_theirs(compare):
    theirs = LSTM_AE(F, CODE, [6, 5]).double()
    net = copy.deepcopy(theirs)
    model = aezoo.create_model("sequence_ae", (F, L), latent_dim=CODE, likelihood="gaussian").double()
    model.encoder, model.decoder = ForBatch(net.encoder), ForBatch(net.decoder, L)
    x = torch.randn(L, F)
    (expected,) = train_model(theirs, [x], verbose=False, lr=0.0, epochs=1, denoise=False)
    loss = model.loss(x.T[None])["loss"]
    row = compare("sequence_ae", "sequitur", "LSTM_AE, train_model")
    row.equal("code", model.encode(x.T[None])[0], theirs.encoder(x))
    row.equal("reconstruction", model(x.T[None])[0].T, theirs(x))
    row.equal("loss without its constant", loss - F * L / 2 * math.log(math.pi), expected)
    # gradients left by their training
    of_theirs = sum((p * p.grad.clone()).sum() for p in theirs.parameters())
    row.equal_gradients(loss, of_theirs, zip(net.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("net", ["lstm", "transformer"])
def test_padded_batch_is_the_mean_of_its_sequences(compare, net):
    model = aezoo.create_model(
        "sequence_ae", (F, L), net=net, latent_dim=CODE, hidden_dims=(6, 8), likelihood="gaussian", pad_value=PAD
    ).double()
    lengths = [3, L, 1, 5]
    sequences = [torch.randn(n, F) for n in lengths]
    padded = torch.full((len(lengths), F, L), PAD)
    for row_of_batch, sequence in zip(padded, sequences, strict=True):
        row_of_batch[:, : len(sequence)] = sequence.T
    (expected,) = train_model(ForSequence(model), sequences, False, lr=0.0, epochs=1, denoise=False)
    constant = F * sum(lengths) / len(lengths) / 2 * math.log(math.pi)
    row = compare("sequence_ae", "sequitur", f"train_model, net={net}")
    row.equal("loss of a padded batch without its constant", model.loss(padded)["loss"] - constant, expected)
