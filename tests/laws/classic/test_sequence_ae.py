"""Laws of the sequence autoencoder, LSTM or Transformer (Srivastava et al. 2015).

The parity with sequitur is in tests/parity. The authors' code is written in Python 2 with CUDA matrices and was
read line by line: lstm.py and lstm_combo.py of

    https://github.com/mansimov/unsupervised-videos, commit 29407a8ff85d63b7421248c8271d956faa8303e6

It has the cross-entropy for binary data, like this model, else half of the squared error, summed over steps and values.
Differs: their code is the state of all layers, from which the decoder starts without other input, and the decoder's
targets are in reverse order; both follow the paper. Ours gives the decoder a vector at each step, as sequitur does, in
the order of the data. Their gates also depend on the state of the cell.
"""

from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import (
    test_gradients_are_derivatives_of_the_terms,  # noqa: F401
    test_gradients_with_other_settings_are_derivatives,  # noqa: F401
)
from torch import Tensor

import aezoo
from aezoo import nets
from aezoo.models.classic.sequence_ae import SequenceAE
from aezoo.models.classic.unet_ae import UNetAE
from aezoo.nets import transformer

NETS = ["lstm", "transformer"]


PAD = 0.25


LONG = 11


LENGTHS = torch.tensor([3, 11, 7, 1, 10])


def small(net: str, shape: tuple[int, ...] = (2, LONG), **settings: Any) -> Any:
    given = {"latent_dim": 4, "hidden_dims": (6, 8), "pad_value": PAD, "activation": "silu", **settings}
    return SequenceAE(shape, net=net, **given).double()


def sequences(n_steps: int = LONG, seed: int = 0) -> Tensor:
    """Sequences of LENGTHS, padded to n_steps; some steps of the data have the padding's value too."""
    x = torch.rand(5, 2, LONG, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[:, :, 2::4] = PAD
    x[torch.arange(5), :, LENGTHS - 1] = 0.9  # the last step is data
    x = torch.where(torch.arange(LONG) < LENGTHS[:, None, None], x, PAD)
    more = torch.full((5, 2, max(0, n_steps - LONG)), PAD, dtype=torch.float64)
    return torch.cat([x, more], 2)[..., :n_steps]


# ---- sequence_ae: padding beyond the length changes nothing ----------------------------------------------------------


def padding_law(make: Any, net: str, shifted: Any, **settings: Any) -> None:
    """With more padding the same weights give the same codes, steps, scores, losses and gradients."""
    short = shifted(make(net, **settings))
    long = make(net, (2, LONG + 9), **settings)
    long.load_state_dict(short.state_dict())
    x, padded = sequences(), sequences(LONG + 9)
    assert (padded[..., LONG:] == PAD).all()
    for name in ("encode", "score"):
        torch.testing.assert_close(getattr(long, name)(padded), getattr(short, name)(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(long(padded)[..., :LONG], short(x), rtol=1e-9, atol=1e-12)
    found = [model.loss(given)["loss"] for model, given in ((short, x), (long, padded))]
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)
    for a, b in zip(*(torch.autograd.grad(f, [*m.parameters()]) for f, m in zip(found, (short, long), strict=True)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    # each sequence alone and without padding gives the same
    for i, n in enumerate(LENGTHS.tolist()):
        alone = make(net, (2, n), **settings)
        alone.load_state_dict(short.state_dict())
        torch.testing.assert_close(alone.encode(x[i : i + 1, :, :n]), short.encode(x[i : i + 1]), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(alone.score(x[i : i + 1, :, :n]), short.score(x[i : i + 1]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian:learned"])
@pytest.mark.parametrize("net", NETS)
def test_loss_and_code_are_invariant_to_padding(net: str, likelihood: str, shifted: Any) -> None:
    padding_law(small, net, shifted, likelihood=likelihood)


class AllSteps(SequenceAE):
    """Includes padding in the loss."""

    def sequence_nll(self, x: Tensor) -> Tensor:
        return self.nll(self.decoder(self.encoder(x, self.lengths(x))), x)


class ReadsPadding(SequenceAE):
    """Lets the encoder read padding."""

    def sequence_nll(self, x: Tensor) -> Tensor:
        read, self.encoder.forward = self.encoder.forward, lambda x, length=None: read(x)
        try:
            return super().sequence_nll(x)
        finally:
            del self.encoder.forward


class EndsAtFirstPadValue(SequenceAE):
    """Takes the first step with the padding's value as the end."""

    def lengths(self, x: Tensor) -> Tensor:
        data_BL = (self.to_steps(x) != PAD).any(2)
        return data_BL.long().cumprod(1).sum(1).clamp(min=1)


class PerStep(SequenceAE):
    """Divides the loss by the steps of the shape."""

    def sequence_nll(self, x: Tensor) -> Tensor:
        return super().sequence_nll(x) / self.to_steps(x).shape[1]


def maker(cls: Any) -> Any:
    def make(net: str, shape: tuple[int, ...] = (2, LONG), **settings: Any) -> Any:
        return cls(shape, net=net, latent_dim=4, hidden_dims=(6, 8), pad_value=PAD, **settings).double()

    return make


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("cls", [AllSteps, ReadsPadding, PerStep])
def test_padding_leaks_are_detected(cls: Any, net: str, shifted: Any) -> None:
    with pytest.raises(AssertionError):
        padding_law(maker(cls), net, shifted)


def test_pad_value_inside_sequence_counts_as_data() -> None:
    x = sequences()
    assert (x[1, :, 2] == PAD).all() and (x[1, :, 6] == PAD).all()
    assert small("lstm").lengths(x).tolist() == LENGTHS.tolist()
    assert maker(EndsAtFirstPadValue)("lstm").lengths(x).tolist() != LENGTHS.tolist()
    # a single channel of a step may have the padding's value
    x[0, 0, 2] = PAD
    assert small("lstm").lengths(x).tolist() == LENGTHS.tolist()
    assert small("lstm").lengths(torch.full_like(x, PAD)).tolist() == [1] * 5
    assert small("lstm", pad_value=None).lengths(x) is None


@pytest.mark.parametrize("net", NETS)
def test_code_ignores_values_beyond_length(net: str, shifted: Any) -> None:
    encoder = shifted(small(net)).encoder
    x = sequences().requires_grad_()
    code = encoder(x, LENGTHS)
    (slope,) = torch.autograd.grad(code.sum(), x)
    valid = torch.arange(LONG) < LENGTHS[:, None, None]
    assert not slope.where(~valid, 0.0).any()
    assert (slope.abs().sum(1) > 0).eq(valid[:, 0]).all()
    garbage = torch.where(valid, x, torch.randn_like(x))
    assert torch.equal(encoder(garbage, LENGTHS), code)
    assert not torch.allclose(encoder(garbage), code)


@pytest.mark.parametrize("net", NETS)
def test_decoder_is_causal_and_position_aware(net: str, shifted: Any) -> None:
    short, long = small(net, (2, 4)), shifted(small(net, (2, 30)))
    short.load_state_dict(long.state_dict())
    z = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(short.decoder(z), long.decoder(z)[..., :4])
    steps = long.decoder(z).transpose(1, 2)
    assert all((steps[:, t] - steps[:, u]).abs().max() > 1e-4 for t in range(30) for u in range(t))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian:0.3", "laplace:0.5"])
@pytest.mark.parametrize("net", NETS)
def test_the_loss_is_the_likelihood_of_the_steps_before_the_end(net: str, likelihood: str, shifted: Any) -> None:
    model, x = shifted(small(net, likelihood=likelihood)), sequences()
    steps = model.decoder(model.encode(x)[:, :-1])
    density = {
        "bernoulli": lambda p: D.Bernoulli(logits=p, validate_args=False),
        "gaussian:0.3": lambda p: D.Normal(p, 0.3),
        "laplace:0.5": lambda p: D.Laplace(p, 0.5),
    }[likelihood](steps)
    log_p = density.log_prob(x)
    expected = torch.stack([-log_p[i, :, :n].sum() for i, n in enumerate(LENGTHS.tolist())])
    torch.testing.assert_close(model.score(x), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model.loss(x)["loss"], expected.mean(), rtol=1e-6, atol=1e-8)
    assert (-log_p.flatten(1).sum(1) - expected).abs().max() > 1e-2  # unlike with padding included


@pytest.mark.parametrize("shape", [(2, 7), (1, 5, 6), (9,), (2, 3, 4, 5)])
@pytest.mark.parametrize("net", NETS)
def test_pad_value_has_no_effect_without_padding(net: str, shape: tuple[int, ...], shifted: Any) -> None:
    plain, padded = shifted(small(net, shape, pad_value=None)), small(net, shape)
    padded.load_state_dict(plain.state_dict())
    x = torch.rand(3, *shape, dtype=torch.float64)
    steps = shape[0] if len(shape) == 1 else shape[1]
    torch.testing.assert_close(padded.loss(x)["loss"], plain.loss(x)["loss"])
    torch.testing.assert_close(padded.score(x), plain.score(x))
    assert torch.equal(plain.score(x), plain.nll(plain.decoder(plain.encoder(x)), x))
    torch.testing.assert_close(padded(x), plain(x))
    torch.testing.assert_close(padded.encode(x), torch.cat([plain.encode(x), torch.full((3, 1), steps)], 1))


@pytest.mark.parametrize("net", NETS)
def test_code_stores_length_and_decoder_pads_beyond_it(net: str, shifted: Any) -> None:
    model, x = shifted(small(net)).eval(), sequences()
    z = model.encode(x)
    assert model.code_shape == (5,) == z.shape[1:]
    assert torch.equal(z[:, -1], LENGTHS.double())
    x_hat = model(x)
    padding = (torch.arange(LONG) >= LENGTHS[:, None, None]).expand_as(x)
    assert (x_hat[padding] == PAD).all() and (x_hat[~padding] != PAD).all()
    # a sampled code can have a length that is not an integer or too long
    made = z[:1].repeat(4, 1)
    made[:, -1] = torch.tensor([4.4, 4.6, -3.0, 99.0])
    assert model.lengths(model.decode(made)).tolist() == [4, 5, 1, LONG]


def test_lengths_beyond_256_survive_half_precision() -> None:
    model = SequenceAE((1, 400), pad_value=0.0, latent_dim=2, hidden_dims=(4,)).eval()
    x = torch.zeros(1, 1, 400)
    x[..., :301] = 0.7
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(x)[0, -1] == 301


# ---- invalid values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: SequenceAE((2, 9), net="conv"), "lstm or transformer"),
        (lambda: SequenceAE((2, 9), hidden_dims=()), "at least one layer"),
        (lambda: SequenceAE((2, 9), latent_dim=0), "latent_dim"),
        (lambda: SequenceAE((2, 9), pad_value=-1.0), "pad_value"),
        (lambda: nets.encoder("transformer", (2, 9), (3, 9), (4,)), "latent_map"),
        (lambda: nets.decoder("lstm", (3, 9), (2, 9), (4,)), "latent_map"),
        (lambda: nets.map_shape("transformer", (2, 9), (4,), 3), "no feature map"),
        (lambda: nets.encoder("lstm", (2, 9), (3,), (4,), "gated"), "mlp"),
        (lambda: UNetAE((30,)), "convolutions take"),
        (lambda: UNetAE((1, 8, 8), latent_dim=0), "latent_dim"),
        (lambda: nets.encoder("unet", (1, 8, 8), (4, 3, 3), (8,)), "does not fit"),
    ],
)
def test_invalid_values_are_refused(build: Any, word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word) as error:
        build()
    assert "\n" not in str(error.value)


def test_padding_outside_interval_needs_other_likelihood() -> None:
    assert SequenceAE((2, 9), pad_value=-1.0, likelihood="gaussian").pad_value == -1
    assert transformer.Block(7, "relu", False).heads == 1 and transformer.Block(64, "relu", False).heads == 4
