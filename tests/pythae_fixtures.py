"""Settings of small models of pythae, and its outputs with random weights.

    python tests/pythae_fixtures.py        with pythae 0.1.2 in addition to torch; aezoo is not imported

writes to `tests/fixtures/pythae` for each case the `model_config.json` that pythae saves, and an `.npz` with the names
and shapes of its weights, from which `tests/io/drawn_weights.py` draws the weights again, samples, codes,
reconstructions, terms of the loss, and the noise in the order of its use.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from pythae import models as pythae
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "io"))
from drawn_weights import drawn

OUT = Path(__file__).parent / "fixtures" / "pythae"
SHAPE, LATENT, BATCH = (1, 4, 5), 3, 6
MSE, BCE = {"reconstruction_loss": "mse"}, {"reconstruction_loss": "bce"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "AE": ("AE", {}),
    "VAE_mse": ("VAE", MSE),
    "VAE_bce": ("VAE", BCE),
    "BetaVAE": ("BetaVAE", {"beta": 3.0, **BCE}),
    "DisentangledBetaVAE": ("DisentangledBetaVAE", {"beta": 7.0, "C": 2.0, "warmup_epoch": 4, **MSE}),
    "BetaTCVAE_mws": ("BetaTCVAE", {"alpha": 1.5, "beta": 6.0, "gamma": 0.7, "use_mss": False, **BCE}),
    "BetaTCVAE_mss": ("BetaTCVAE", {"alpha": 1.5, "beta": 6.0, "gamma": 0.7, "use_mss": True, **MSE}),
    "FactorVAE": ("FactorVAE", {"gamma": 6.0, **MSE}),
    "INFOVAE_MMD_imq": ("INFOVAE_MMD", {"alpha": 0.3, "lbd": 5.0, "kernel_bandwidth": 1.3, **MSE}),
    "INFOVAE_MMD_rbf": ("INFOVAE_MMD", {"kernel_choice": "rbf", "lbd": 5.0, "kernel_bandwidth": 1.3, **BCE}),
    "WAE_MMD_imq": ("WAE_MMD", {"reg_weight": 2.0, "kernel_bandwidth": 1.3, "reconstruction_loss_scale": 2.5}),
    "WAE_MMD_rbf": ("WAE_MMD", {"kernel_choice": "rbf", "reg_weight": 2.0, "kernel_bandwidth": 1.3}),
    "Adversarial_AE_drawn": ("Adversarial_AE", {"adversarial_loss_scale": 0.7, **MSE}),
    "Adversarial_AE_deterministic": (
        "Adversarial_AE",
        {"adversarial_loss_scale": 0.7, "deterministic_posterior": True, "reconstruction_loss_scale": 0.5, **BCE},
    ),
    "VAEGAN": ("VAEGAN", {"adversarial_loss_scale": 0.8, **BCE}),
    "VAMP": ("VAMP", {"number_components": 5, "linear_scheduling_steps": 3, **BCE}),
    "IWAE": ("IWAE", {"number_samples": 4, **MSE}),
    "CIWAE": ("CIWAE", {"number_samples": 4, "beta": 0.3, **BCE}),
    "MIWAE": ("MIWAE", {"number_samples": 4, "number_gradient_estimates": 2, **BCE}),
    "PIWAE": ("PIWAE", {"number_samples": 4, "number_gradient_estimates": 2, **MSE}),
    "SVAE": ("SVAE", BCE),
    "VQVAE_gradient": ("VQVAE", {"num_embeddings": 8, "commitment_loss_factor": 0.4, "quantization_loss_factor": 1.7}),
    "VQVAE_ema": ("VQVAE", {"num_embeddings": 8, "commitment_loss_factor": 0.4, "use_ema": True, "decay": 0.9}),
    "RAE_L2": ("RAE_L2", {"embedding_weight": 0.1, "reg_weight": 0.02}),
    "RAE_GP": ("RAE_GP", {"embedding_weight": 0.1, "reg_weight": 0.02}),
    "MSSSIM_VAE": ("MSSSIM_VAE", {"beta": 0.2, "window_size": 3, **MSE}),
    "VAE_LinNF_planar": ("VAE_LinNF", {"flows": ["Planar", "Planar"], **BCE}),
    "VAE_LinNF_radial": ("VAE_LinNF", {"flows": ["Radial", "Radial", "Radial"], **MSE}),
    # no corresponding model in the zoo
    "HVAE": ("HVAE", MSE),
    "RHVAE": ("RHVAE", MSE),
    "PoincareVAE": ("PoincareVAE", MSE),
    "VAE_IAF": ("VAE_IAF", MSE),
}
READ = [case for case in CASES if case not in ("HVAE", "RHVAE", "PoincareVAE", "VAE_IAF")]


def build(kind: str, settings: dict[str, Any]) -> Any:
    config = getattr(pythae, f"{kind}Config", None) or getattr(pythae, f"{kind}_Config")
    return getattr(pythae, kind)(config(input_dim=SHAPE, latent_dim=LATENT, **settings))


def draw_weights(model: Any) -> dict[str, tuple[int, ...]]:
    """Draw the weights of a model, and return their shapes."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = {key: torch.from_numpy(value) for key, value in drawn(shapes, 0).items()}
    model.load_state_dict(state)
    return shapes


class Noise:
    """Returns standard normal numbers of a fixed stream, and keeps them."""

    def __init__(self) -> None:
        self.numbers, self.given = np.random.RandomState(2), []

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.given.append(self.numbers.standard_normal(shape).astype(np.float32))
        return torch.from_numpy(self.given[-1])


def computed(model: Any, kind: str, x: Tensor) -> dict[str, Any]:
    """Outputs of pythae."""
    noise = Noise()
    out = model.encoder(x)
    mean = out.embedding
    found = {"code": mean}
    if kind == "SVAE":
        found["code"] = mean / mean.norm(dim=1, keepdim=True)
        on_sphere = noise((BATCH, LATENT))
        on_sphere = on_sphere / on_sphere.norm(dim=1, keepdim=True)
        noise.given[-1] = on_sphere.numpy()
        model._sample_von_mises = lambda *_: on_sphere
    with mock.patch("torch.randn_like", lambda like, **_: noise(tuple(like.shape))):
        if kind == "FactorVAE":
            eps, permuted = noise((BATCH, LATENT)), noise((BATCH, LATENT))
            z = mean + torch.exp(0.5 * out.log_covariance) * eps
            recon = model.decoder(z).reconstruction
            terms = model.loss_function(recon, x, mean, out.log_covariance, z, permuted)
            scores = model.discriminator(permuted)
            found |= dict(zip(("recon_loss", "autoencoder_loss", "discriminator_loss"), terms, strict=True))
            found["ratio"] = scores[:, 0] - scores[:, 1]
        else:
            terms = model({"data": x.clone()}, epoch=100)  # RAE_GP needs gradients; at this epoch warm-ups have ended
            found |= {name: value.mean() for name, value in terms.items() if name.endswith("loss")}
            if kind.endswith("IWAE"):
                of_encoder = terms.get("encoder_loss", terms.loss)
                found["gradient"] = torch.autograd.grad(of_encoder, model.encoder.embedding.bias)[0]
            if kind == "VQVAE":
                found |= {"code": terms.z, "indices": terms.quantized_indices}
    if kind == "VAE_LinNF":
        found["log_det"] = torch.zeros(BATCH)
        found["log_var"] = out.log_covariance
        for layer in model.net:
            moved = layer(found["code"])
            found |= {"code": moved.out, "log_det": found["log_det"] + moved.log_abs_det_jac}
    found["reconstruction"] = model.decoder(found["code"]).reconstruction
    arrays = {name: value.detach().numpy() for name, value in found.items()}
    return arrays | {f"noise_{i}": value for i, value in enumerate(noise.given)}


def main() -> None:
    """Write the files."""
    OUT.mkdir(exist_ok=True, parents=True)
    for case, (kind, settings) in CASES.items():
        model = build(kind, settings).eval()
        (OUT / case).mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder)
            config = json.loads((Path(folder) / "model_config.json").read_text())
            assert list(torch.load(Path(folder) / "model.pt", weights_only=False))[-1] == "model_state_dict"
        (OUT / case / "model_config.json").write_text(json.dumps(config) + "\n")
        shapes = draw_weights(model)
        x = torch.from_numpy(np.random.RandomState(1).uniform(size=(BATCH, *SHAPE)).astype(np.float32))
        arrays = computed(model, kind, x) if case in READ else {}
        np.savez_compressed(OUT / case / "expected.npz", shapes=json.dumps(shapes), x=x.numpy(), **arrays)


if __name__ == "__main__":
    main()
