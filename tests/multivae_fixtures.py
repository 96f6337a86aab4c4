"""Settings of small models of MultiVae, and its outputs with random weights.

    python tests/multivae_fixtures.py        with multivae 1.0.3 in addition to torch; aezoo is not imported

writes to `tests/fixtures/multivae` for each case the `model_config.json` that MultiVae saves, and an `.npz` with the
names and shapes of its weights, from which `tests/io/drawn_weights.py` draws the weights again, samples, codes of
subsets of modalities and samples from them, terms of the loss, and the noise in the order of its use.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from multivae import models as multivae
from multivae.data.datasets.base import MultimodalBaseDataset
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "io"))
from drawn_weights import drawn

OUT = Path(__file__).parent / "fixtures" / "multivae"
LATENT, PRIVATE, BATCH = 3, 2, 4
APART = {"image": (1, 4, 5), "label": (3,)}
ALIKE = {"b": (1, 3, 4), "a": (2, 3, 4), "c": (2, 3, 4)}
SCALES = {name: {"scale": 0.6} for name in ALIKE}
MIXTURE = {"prior_and_posterior_dist": "normal", "K": 1, "loss": "iwae_looser"}
PRIVATES = {**MIXTURE, "modalities_specific_dim": PRIVATE, "beta": 2.0}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "MVAE_apart": ("MVAE", APART, {"beta": 2.0}),
    "MVAE_alike": ("MVAE", ALIKE, {"beta": 2.0, "k": 0, "decoder_dist_params": SCALES}),
    "MVTCAE": ("MVTCAE", APART, {"alpha": 0.6, "beta": 2.0}),
    "CRMVAE": ("CRMVAE", ALIKE, {"beta": 2.0}),
    "DMVAE": (
        "DMVAE",
        ALIKE,
        {
            "beta": 2.0,
            "modalities_specific_dim": dict.fromkeys(ALIKE, PRIVATE),
            "modalities_specific_betas": dict.fromkeys(ALIKE, 2.0),
        },
    ),
    "MMVAE": ("MMVAE", APART, {**MIXTURE, "learn_prior": False}),
    "MMVAEPlus": ("MMVAEPlus", ALIKE, PRIVATES),
    "CMVAE": ("CMVAE", APART, {**PRIVATES, "number_of_clusters": 4}),
    # no corresponding model in the zoo
    **{kind: (kind, APART, {}) for kind in ("MoPoE", "JMVAE", "TELBO", "JNF")},
}
READ = ("MVAE", "MVTCAE", "CRMVAE", "DMVAE", "MMVAE", "MMVAEPlus", "CMVAE")
# not learned, so they stay 0
FIXED = ("prior_mean", "prior_log_var", "mean_priors.", "logvars_priors.shared", "w_mean", "w_logvar", "r_mean")


def build(kind: str, dims: dict[str, Any], settings: dict[str, Any]) -> Any:
    config = getattr(multivae, f"{kind}Config")
    return getattr(multivae, kind)(config(n_modalities=len(dims), latent_dim=LATENT, input_dims=dims, **settings))


def draw_weights(model: Any) -> dict[str, tuple[int, ...]]:
    """Draw the weights of a model, and return their shapes."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if not key.startswith(FIXED)}
    state = {key: torch.from_numpy(value) for key, value in drawn(shapes, 0).items()}
    model.load_state_dict(state, strict=False)
    return shapes


def moment_noise(parts: int, size: int) -> np.ndarray:
    """Noise of mean 0 and covariance I over 2 size copies of the samples: (2 size BATCH, parts, size).

    The mean of log q(z) - log p(z) over the copies is then the KL.
    """
    numbers = np.random.RandomState(3).standard_normal((BATCH, parts, size, size))
    axes = np.sqrt(size) * np.linalg.qr(numbers)[0]
    return np.stack([axes, -axes]).transpose(0, 3, 1, 2, 4).reshape(-1, parts, size).astype(np.float32)


class Noise:
    """Returns the arrays of a list, and standard normal numbers of a fixed stream when there are none left."""

    def __init__(self, given: list[np.ndarray]) -> None:
        self.numbers, self.given, self.left = np.random.RandomState(2), [], given

    def __call__(self, shape: Any) -> Tensor:
        values = self.left.pop(0) if self.left else self.numbers.standard_normal(tuple(shape)).astype(np.float32)
        self.given.append(values.reshape(tuple(shape)))
        return torch.from_numpy(self.given[-1])


def computed(model: Any, kind: str, dims: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs of MultiVae."""
    numbers = np.random.RandomState(1)
    data = {name: numbers.uniform(size=(BATCH, *shape)).astype(np.float32) for name, shape in dims.items()}
    found = {f"x_{name}": values for name, values in data.items()}
    given = MultimodalBaseDataset({name: torch.from_numpy(values) for name, values in data.items()})
    names = [*dims]
    subsets = [chosen for n in range(1, len(names) + 1) for chosen in itertools.combinations(names, n)]
    with torch.no_grad():
        for chosen in subsets[: len(names)] if kind == "CMVAE" else subsets:
            code = model.encode(given, [*chosen], return_mean=True)
            values = torch.cat(
                [code.z, *(code.modalities_z[m] for m in names)] if not code.one_latent_space else [code.z], 1
            )
            found[f"code_{'+'.join(chosen)}"] = values.numpy()
            decoded = model.decode(code)
            found |= {f"from_{'+'.join(chosen)}_{m}": decoded[m].numpy() for m in names}
    whole, mixture = given, "MMVAE" in kind or kind == "CMVAE"
    if mixture:
        size = LATENT + (0 if kind == "MMVAE" else PRIVATE)
        eps, copies = moment_noise(len(names), size), 2 * size
        private = numbers.standard_normal((copies * BATCH, len(names), len(names), PRIVATE)).astype(np.float32)
        found["eps"], found["private"] = eps, private
        whole = MultimodalBaseDataset(
            {m: values.repeat(copies, *[1] * (values.ndim - 1)) for m, values in given.data.items()}
        )
        each = []
        for i in range(len(names)):
            each += [eps[:, i, :LATENT], eps[:, i, LATENT:]] if kind != "MMVAE" else [eps[:, i]]
            each += [private[:, i, j] for j in range(len(names)) if j != i and kind != "MMVAE"]
    noise = Noise(each if mixture else [])
    with (
        mock.patch("torch.randn_like", lambda like, **_: noise(like.shape)),
        mock.patch("torch.distributions.normal._standard_normal", lambda shape, **_: noise(shape)),
    ):
        terms = model(whole, epoch=100)
    assert not noise.left
    found |= {f"noise_{i}": values for i, values in enumerate(noise.given) if not mixture}
    found["loss"] = terms.loss.detach().numpy()
    metrics = {} if mixture else terms.metrics
    return found | {f"term_{name}": np.asarray(torch.as_tensor(value).detach()) for name, value in metrics.items()}


def main() -> None:
    """Write the files."""
    for case, (kind, dims, settings) in CASES.items():
        model = build(kind, dims, settings).eval()
        (OUT / case).mkdir(exist_ok=True, parents=True)
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder)
            config = json.loads((Path(folder) / "model_config.json").read_text())
        (OUT / case / "model_config.json").write_text(json.dumps(config) + "\n")
        fixed = {key: tuple(value.shape) for key, value in model.state_dict().items() if key.startswith(FIXED)}
        shapes = draw_weights(model)
        arrays = computed(model, kind, dims) if kind in READ else {}
        np.savez_compressed(OUT / case / "expected.npz", shapes=json.dumps(shapes), fixed=json.dumps(fixed), **arrays)


if __name__ == "__main__":
    main()
