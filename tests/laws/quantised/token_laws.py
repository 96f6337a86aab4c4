"""Laws of the models whose code is a row of tokens without a grid, titok and soft_vq, and of their shared networks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from torch import Tensor

import aezoo
from aezoo.errors import AezooError

SHAPE, K, N, DIM = (1, 8, 8), 11, 5, 6


SMALL: dict[str, Any] = {
    "n_tokens": N,
    "latent_dim": DIM,
    "codebook_size": K,
    "width": 12,
    "depth": 1,
    "decoder_width": 10,
    "decoder_depth": 1,
}


both = pytest.mark.parametrize("name", ["titok", "soft_vq"])


def small(name: str, shifted: Any, shape: tuple[int, ...] = SHAPE, **settings: Any) -> Any:
    """A float64 model with random offsets added to its initial weights, and codes near the encoder's rows."""
    torch.manual_seed(0)
    model = shifted(aezoo.create_model(name, input_shape=shape, **{**SMALL, **settings})).double()
    with torch.no_grad():
        model.init_from_data(torch.rand(40, *shape, dtype=torch.float64))
        model.encoder.bias_DN += 0.3 * torch.randn_like(model.encoder.bias_DN)
        codes = model.quantiser.code_KD if name == "titok" else model.code_KD
        codes += 0.05 * torch.randn_like(codes)
    return model


def data(n: int = 6, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def rows_of_encoder(encoder: Any, x: Tensor) -> np.ndarray:
    """Tokens as a numpy array, (B, N, D)."""
    return np.asarray(encoder(x).detach().numpy().swapaxes(1, 2))


def rows_of(model: Any, x: Tensor) -> np.ndarray:
    """The rows that are quantised, (B, N, D)."""
    return rows_of_encoder(model.encoder, x)


def squares(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """||z - e||^2 of all pairs, (B, N, D), (K, D) -> (B, N, K)."""
    return np.asarray(((rows[:, :, None] - codes) ** 2).sum(-1))


def bernoulli(model: Any, code: np.ndarray, x: Tensor) -> float:
    """-log p(x | codes) summed over the sample, mean over the batch: codes (B, N, D)."""
    logits = model.decoder(torch.from_numpy(code.swapaxes(1, 2).copy())).detach()
    return float(-D.Bernoulli(logits=logits, validate_args=False).log_prob(x).flatten(1).sum(1).mean())


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(1, 28, 28), (3, 32, 32), (1, 27, 35), (1, 64, 48), (3, 50), (2, 6, 5, 7)],
    ids=lambda s: "x".join(map(str, s)),
)
@both
def test_number_of_tokens_is_independent_of_input_size(name: str, shape: tuple[int, ...]) -> None:
    model, x = aezoo.create_model(name, input_shape=shape, **SMALL).eval(), torch.rand(2, *shape)
    assert model.code_shape == model.encode(x).shape[1:] == (DIM, N)
    assert model(x).shape == x.shape
    if name == "titok":
        assert model.index_shape == model.encode_indices(x).shape[1:] == (1, N)
        assert model.decode_indices(torch.zeros(2, 1, N, dtype=torch.long)).shape == x.shape


@both
def test_the_code_does_not_depend_on_the_decoder(name: str, shifted: Any) -> None:
    model, x = small(name, shifted).eval(), data()
    code = model.encode(x)
    by_decoder = torch.autograd.grad(code.sum(), [*model.decoder.parameters()], allow_unused=True)
    assert all(g is None for g in by_decoder)
    shifted(model.decoder)
    assert torch.equal(model.encode(x), code)


# ---- invalid values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        *[(name, {key: 0}, key) for name in ("titok", "soft_vq") for key in SMALL],
        ("titok", {"beta": -1.0}, "beta"),
        ("titok", {"beta": math.nan}, "beta"),
        ("titok", {"patch_size": -1}, "patch_size"),
        ("soft_vq", {"temperature": 0.0}, "temperature"),
        ("soft_vq", {"temperature": math.inf}, "temperature"),
        ("soft_vq", {"entropy_weight": -1.0}, "entropy_weight"),
        ("soft_vq", {"gamma": math.nan}, "gamma"),
        ("titok", {"input_shape": (30,)}, "patches"),
        ("soft_vq", {"input_shape": (30,)}, "patches"),
    ],
)
def test_invalid_values_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(AezooError, match=word) as refusal:
        aezoo.create_model(name, **{"input_shape": SHAPE, **SMALL, **settings})
    assert len(str(refusal.value).splitlines()) == 1
