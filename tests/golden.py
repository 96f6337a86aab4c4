"""Golden values: the first results of every model, so that no change goes unnoticed.

    python -m tests.golden

records in `tests/golden.json` what is not recorded yet; a pull request that changes a value deletes it there and says
why. Values are computed in float64: kernels of other processors round differently, by about 1e-16, which the first
batch and one optimiser step do not amplify. Values that depend on a tie decided by rounding are refused.
"""

import json
import math
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo
from aezoo.autoencoder import Autoencoder
from aezoo.registry import entries
from aezoo.testing import Subject, subject_of
from aezoo.testing.subject import quiet_and_isolated

Record = dict[str, dict[str, float]]

FILE = Path(__file__).with_suffix(".json")
SHAPE, BATCH, CLASSES = (1, 28, 28), 16, 10
LABELS = torch.arange(BATCH) % CLASSES
# rows that initialise the queue are at equal distances, which rounding would decide
WITHOUT_TIES = {"vp_vae": {"data_init": False}}
# relative tolerance of values; differences between processors are a thousandth of it
TOLERANCE = 1e-7
# relative perturbation of inputs and weights with which values are tested for ties
PERTURBATION = 1e-9
# code paths that no default uses
VARIANTS = [
    subject_of("conv_ae", latent_map=True, latent_dim=4),
    subject_of("resnet_ae", latent_map=True, latent_dim=4, hidden_dims=(8, 8)),
    subject_of("dense_ae", hidden_dims=(), code_activation="relu", likelihood="continuous_bernoulli"),
    subject_of("dense_ae", likelihood="gaussian:learned"),
    subject_of("dense_ae", likelihood="laplace:learned", lr_schedule="cosine", warmup_steps=2),
    subject_of("dense_ae", likelihood="discretised_logistic", optimizer="sgd", lr=1e-5),
    subject_of("dense_ae", likelihood="beta_binomial"),
    subject_of("denoising_ae", corruption="masking:0.3", net="conv", hidden_dims=(8, 8)),
    subject_of("denoising_ae", corruption="salt_and_pepper:0.2"),
    subject_of("denoising_ae", corruption="none"),
    subject_of("sparse_ae_kl", net="conv", hidden_dims=(8, 8), latent_dim=32),
    subject_of("sparse_ae_l1", net="resnet", hidden_dims=(8, 8), latent_dim=32),
    subject_of("topk_sae", dead_after=1, k=4, k_aux=32, aux_weight=1.0),
    subject_of(
        "topk_sae",
        dead_after=1,
        k=4,
        k_aux=32,
        multi_weight=0.125,
        aux_scale="variance",
        data_init=True,
        decode="gather",
    ),
    subject_of("topk_sae", decode="dense"),
    subject_of("abs_topk_sae", dead_after=1, k=4, k_aux=32, aux_weight=1.0, multi_weight=0.125, data_init=True),
    subject_of("ra_sae", delta=0.0, n_points=5, dead_after=1, k=4, k_aux=32, aux_weight=1.0),
    subject_of("batch_topk_sae", dead_after=1, k=4, k_aux=32, aux_weight=1.0, data_init=True),
    subject_of("matryoshka_sae", fractions=()),
    subject_of("matching_pursuit_sae", data_init=True, likelihood="bernoulli"),
    subject_of("omp_sae", data_init=True, likelihood="laplace"),
    subject_of("temporal_sae", dead_after=1, k=4, k_aux=32, aux_weight=1.0, key_dim=3, heads=1, data_init=True),
    subject_of("k_sparse", start_k=100, k_steps=2),
    subject_of("wta_ae", spatial=True, lifetime=0.3, latent_dim=8, hidden_dims=(6,)),
    subject_of("sae_l1", form="april", l1_steps=2),
    subject_of("sae_l1", resample_steps=2, dead_after=20),
    subject_of("jumprelu_sae", target_l0=5.0, l0_steps=2),
    subject_of("dncnn", residual=False, depth=3, width=8),
    subject_of("noise2void", depth=3, width=8, corruption="gaussian:0.1", residual=True, masked=0.3),
    subject_of("unet_ae", latent_map=True, latent_dim=4, hidden_dims=(8, 8)),
    subject_of("sequence_ae", net="transformer", hidden_dims=(16,)),
    subject_of("sequence_ae", pad_value=0.0),
    subject_of("sequence_ae", net="transformer", pad_value=0.0, hidden_dims=(16, 24), likelihood="gaussian:learned"),
    subject_of("wae_mmd", kernel="rbf", kernel_scales=(1.0,)),
    subject_of("cw_ae", latent_dim=32),
    subject_of(
        "rae",
        regulariser="gp",
        regulariser_weight=1e-2,
        net="conv",
        hidden_dims=(8, 8),
        likelihood="discretised_logistic",
    ),
    subject_of("rae", regulariser="sn"),
    subject_of("rae", regulariser="sn", net="resnet", hidden_dims=(8, 8)),
    subject_of(
        "wae_gan",
        gaussian_posterior=True,
        net="conv",
        hidden_dims=(8, 8),
        discriminator_dims=(),
        likelihood="gaussian:learned",
    ),
    subject_of("mae", norm_pix=True, patch_size=5),
    subject_of("mae", likelihood="bernoulli", mask_ratio=0.5),
    subject_of("simmim", likelihood="gaussian:learned", patch_size=5),
    subject_of("simmim", net="mixer", patch_size=5),
    subject_of("ijepa", patch_size=5, momentum=0.5, momentum_steps=2, n_targets=2, likelihood="bernoulli"),
    subject_of("maetok", patch_size=5, aux_weight=0.0, least_masked=0.0, likelihood="gaussian:learned"),
    subject_of("masked_conv_ae", net="convnext", hidden_dims=(8, 8), latent_map=True, learned_token=False),
    subject_of("denoising_ae", net="vit", hidden_dims=(16, 12)),
    subject_of("memory_ae", shrinkage=0.0, net="conv", hidden_dims=(8, 8)),
    subject_of("semantic_hash_ae", binarisation="improved", noise_std=1.0),
    subject_of("isometric_ae", distortion="relaxed", likelihood="gaussian:learned"),
    subject_of("isometric_ae", net="resnet", hidden_dims=(8, 8)),
    subject_of("stacked_dae", activation="tanh", likelihood="gaussian:learned", corruption="gaussian:0.2"),
    subject_of("stacked_dae", phase_epochs=1, hidden_dims=()),
    subject_of("dagmm", net="conv", hidden_dims=(8, 8), n_components=2, likelihood="bernoulli", dropout=0.0),
    subject_of("ganomaly", net="conv", hidden_dims=(8, 8), likelihood="gaussian:learned"),
    subject_of("ae1svm", net="conv", hidden_dims=(8, 8), code_activation="identity", likelihood="bernoulli"),
    subject_of("alad", net="conv", hidden_dims=(8, 8), likelihood="gaussian:learned"),
    subject_of("draem", source="samples", net="conv", hidden_dims=(8, 8), likelihood="bernoulli"),
    subject_of("f_anogan", generator_weight=0.0, net="conv", hidden_dims=(8, 8), likelihood="gaussian:learned"),
    subject_of("deep_svdd", nu=0.2, net="conv", hidden_dims=(8, 8), likelihood="gaussian:learned"),
    subject_of("vae", net="conv", hidden_dims=(8, 8), beta=4.0),
    subject_of("iwae", estimator="dreg"),
    subject_of("iwae", estimator="stl"),
    subject_of("piwae", estimator="dreg", likelihood="gaussian:learned"),
    subject_of("ciwae", estimator="dreg", beta=0.0),
    subject_of("dense_ae", likelihood="logcosh:learned"),
    subject_of("categorical_vae", straight_through=True, temperature_steps=3),
    subject_of("joint_vae", n_variables=2, straight_through=True, temperature_steps=3),
    subject_of("joint_vae", n_variables=0),
    subject_of("semi_supervised_vae", net="resnet", hidden_dims=(8, 8), likelihood="gaussian:learned"),
    subject_of("factor_vae", net="conv", hidden_dims=(8, 8), discriminator_dims=(), likelihood="gaussian:learned"),
    subject_of("mine_vae", mi_weight=2.0, decay=0.0, net="conv", hidden_dims=(8, 8), likelihood="gaussian:learned"),
    subject_of("vae_gan", net="conv", hidden_dims=(8, 8), likelihood="discretised_logistic"),
    subject_of("hierarchical_vae", latent_dims=(8, 6, 4), free_bits=0.01, net="conv", hidden_dims=(8, 8)),
    subject_of("ladder_vae", latent_dims=(8,)),
    subject_of("ladder_vae", latent_dims=(8, 6, 4), likelihood="gaussian:learned"),
    subject_of("vdvae", width=8, enc_blocks=(1, 2), dec_blocks=(2, 2), likelihood="discretised_logistic"),
    subject_of("vae_flow", flow="radial"),
    subject_of("vae_flow", flow="sylvester", n_flows=3),
    subject_of("flow_prior_vae", prior="maf"),
    subject_of("vamp_vae", likelihood="gaussian:learned", n_components=10),
    subject_of("two_stage_vae", likelihood="bernoulli"),
    subject_of("mvae", parts=(10, 10, 8), n_subsets=2, net="conv", hidden_dims=(8, 8)),
    subject_of("mmvae", net="conv", hidden_dims=(8, 8), likelihood="gaussian:learned"),
    subject_of("mopoe_vae", parts=(10, 10, 8), likelihood="gaussian:learned"),
    subject_of("jmvae", parts=(10, 10, 8), alpha=1.0, net="conv", hidden_dims=(8, 8), likelihood="gaussian:learned"),
    subject_of("mmvae_plus", parts=(10, 10, 8), private_dim=2, net="conv", hidden_dims=(8, 8)),
    subject_of("mmvae_plus", private_dim=0, likelihood="gaussian:learned"),
    subject_of("jnf", parts=(10, 10, 8), n_flows=3, net="conv", hidden_dims=(8, 8)),
    subject_of("jnf", n_flows=0, likelihood="gaussian:learned"),
    subject_of("nexus", parts=(10, 10, 8), dropout=1.0, net="conv", hidden_dims=(8, 8), likelihood="gaussian:learned"),
    subject_of("mvtcae", parts=(10, 10, 8), alpha=1.0, net="conv", hidden_dims=(8, 8)),
    subject_of("mvtcae", alpha=0.0, beta=2.5, likelihood="gaussian:learned"),
    subject_of("mhvae", parts=(10, 10, 8), latent_dims=(8, 6, 4), net="conv", hidden_dims=(8, 8)),
    subject_of("mhvae", latent_dims=(8,), likelihood="gaussian:learned"),
    subject_of("dmvae", parts=(10, 10, 8), private_dim=2, net="conv", hidden_dims=(8, 8)),
    subject_of("dmvae", private_dim=0, likelihood="gaussian:learned"),
    subject_of("telbo", parts=(10, 10, 8), gamma=3.0, net="conv", hidden_dims=(8, 8), likelihood="gaussian:learned"),
    subject_of("crmvae", parts=(10, 10, 8), alpha=1.0, net="conv", hidden_dims=(8, 8)),
    subject_of("crmvae", beta=2.5, likelihood="gaussian:learned"),
    subject_of("cmvae", parts=(10, 10, 8), private_dim=2, n_components=3, net="conv", hidden_dims=(8, 8)),
    subject_of("cmvae", private_dim=0, likelihood="gaussian:learned"),
    subject_of("hyperspherical_vae", posterior="vmf"),
    subject_of("gamma_vae", prior_shape=0.5, prior_rate=3.0, likelihood="gaussian:learned"),
    subject_of("hvae", n_leapfrog=0),
    subject_of("poincare_vae", curvature=4.0, likelihood="gaussian:learned"),
    subject_of("beta_tcvae", estimator="mws"),
    subject_of("beta_tcvae", estimator="mss_mean", dataset_size=500),
    subject_of("msssim_vae", window=7),
    subject_of("perceptual_vae", likelihood="gaussian:learned"),
    subject_of("denoising_vae", corruption="none"),
    subject_of("denoising_vae", corruption="masking:0.3"),
    subject_of("vae", net="conv_keras", hidden_dims=(8, 8)),
    subject_of("vae", net="gdn", hidden_dims=(8, 8)),
    subject_of("vae", net="ldm", hidden_dims=(8, 8)),
    subject_of("vae", net="dc", hidden_dims=(8, 8)),
    subject_of("vae", net="mixer", hidden_dims=(16, 12)),
    subject_of("factorized_prior", net="mlp", hidden_dims=(24,)),
    subject_of("mean_scale_hyperprior", net="mlp", hidden_dims=(24,)),
    subject_of("cheng2020", mixtures=1, attention=False, hidden_dims=(8, 8)),
    subject_of("compressai", architecture="bmshj2018-factorized-relu", width=4, latent_dim=6),
    subject_of("compressai", architecture="bmshj2018-hyperprior", width=4, latent_dim=6),
    subject_of("compressai", architecture="mbt2018", width=4, latent_dim=6),
    subject_of("compressai", architecture="cheng2020-attn", width=16, latent_dim=16),
    subject_of("vae", activation="gated", hidden_dims=(20,), optimizer="adam:eps=1e-4"),
    subject_of("vae", net="resnet", hidden_dims=(8, 8), likelihood="gaussian:learned"),
    subject_of("vq_vae", update="gradient", estimator="rotation", cosine=True, dead_below=4.0, hidden_dims=(8, 8)),
    subject_of("vq_vae", update="gradient", estimator="diveq", data_init=False, net="mlp", hidden_dims=(16,)),
    subject_of("vq_vae", estimator="gumbel", net="mlp", hidden_dims=(16,)),
    subject_of("vq_vae", n_groups=4, codebook_size=32, net="mlp", hidden_dims=(16,)),
    subject_of("rq_vae", levels=3, codebook_size=8, dropout=0.5, update="gradient", net="mlp", hidden_dims=(16,)),
    subject_of("fsq_vae", depth=2, dropout=0.5, net="mlp", hidden_dims=(16,)),
    subject_of("fsp_vae", squash="normal", eta=0.5, quantised=0.2, net="mlp", hidden_dims=(16,)),
    subject_of("vp_vae", eta=0.5, neighbours=2, queue_size=64, data_init=False, net="mlp", hidden_dims=(16,)),
    subject_of("fvq_vae", codebook_size=30, width=16, depth=1, estimator="rotation", net="mlp", hidden_dims=(16,)),
    subject_of("bsq_vae", beta=0.25, net="mlp", hidden_dims=(16,)),
    # with more codes than rows some are equal, and rounding chooses between them
    subject_of(
        "vq_vae_2", codebook_size=32, update="gradient", estimator="rotation", hidden_dims=(8, 8), top_dims=(8,)
    ),
    subject_of("gumbel_vq_vae", hard=True, temperature_steps=3, hidden_dims=(8, 8), codebook_size=32),
    subject_of("sq_vae", variance="sample", hard=True, temperature_steps=3, hidden_dims=(8, 8), codebook_size=32),
    subject_of("sq_vae", variance="place", net="mlp", hidden_dims=(20,), codebook_size=32),
    subject_of("dvae", net="mlp", kl_steps=2, likelihood="gaussian:learned", hidden_dims=(20,), codebook_size=32),
    subject_of("dense_ae", likelihood="logit_laplace"),
    subject_of("pixelcnn", tokenizer={"model": "rq_vae"}, dropout=0.0),
    subject_of("index_transformer", tokenizer={"model": "vq_vae", "net": "mlp"}, width=24, depth=2, activation="relu"),
    subject_of("titok", update="gradient", cosine=False, patch_size=7, codebook_size=32),
    subject_of("soft_vq", cosine=False, temperature=1.0, data_init=False),
    subject_of("autoencoder_kl", features="none", net="conv", hidden_dims=(8, 8), beta=1.0),
    subject_of("va_vae", features="none", net="conv", hidden_dims=(8, 8), cosine_margin=0.0, matrix_margin=0.0),
    subject_of("asymmetric_kl", features="none", net="conv", hidden_dims=(8, 8), decoder_dims=(12, 8), full_mask=0.0),
    subject_of("vqgan", features="none", update="ema", cosine=True, codebook_size=32),
    subject_of("consistency_decoder", nll_weight=0.0, net="conv", hidden_dims=(8, 8), noise_levels=20, level_steps=2),
    subject_of("representation_ae", code_shape=(16,), tau=0.0, features="none", likelihood="gaussian:learned"),
    *(subject_of("diffusers_ae", kind=kind) for kind in ("VQModel", "AutoencoderDC", "AutoencoderTiny")),
    subject_of(
        "diffusers_ae",
        kind="ConsistencyDecoderVAE",
        config={"encoder_block_out_channels": [16, 16], "decoder_block_out_channels": [16, 16]},
    ),
    subject_of("diffusers_ae", kind="AutoencoderRAE", config={"noise_tau": 0.5, "use_encoder_loss": True}),
]


def own_models() -> list[str]:
    """The models of this package, without those of installed plug-ins."""
    return [name for name in aezoo.list_models() if entries()[name].owner == "aezoo"]


def subjects() -> list[Subject]:
    """All models with their defaults, unless these have ties, and the variants."""
    return [*(subject_of(name, **WITHOUT_TIES.get(name, {})) for name in own_models()), *VARIANTS]


@contextmanager
def _in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with quiet_and_isolated(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def _perturb(values: Tensor, nudge: float, rng: np.random.Generator) -> Tensor:
    return values * (1 + nudge * torch.from_numpy(rng.uniform(-1, 1, values.shape)))


def _shape(subject: Subject) -> tuple[int, ...]:
    """`SHAPE`, or the first accepted shape for models of 3 channels."""
    return SHAPE if subject.takes(SHAPE) else subject.shape


def _batches(shape: tuple[int, ...]) -> list[Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.random((BATCH, *shape))) for _ in range(3)]


def _build(subject: Subject, nudge: float, rng: np.random.Generator) -> Autoencoder:
    torch.manual_seed(0)
    model = subject.build(_shape(subject)).double().train()
    with torch.no_grad():
        for parameter in model.parameters() if nudge else ():
            parameter.copy_(_perturb(parameter, nudge, rng))
    return model


def gradient_digest(model: Autoencoder) -> dict[str, float]:
    """The norm of the gradient of each part of the model, and its projection on a fixed direction."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.grad is not None:
            parts[name.partition(".")[0]].append(parameter.grad.flatten())
    values = {}
    for name, gradients in parts.items():
        gradient = torch.cat(gradients)
        direction = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, len(gradient)))
        values[f"{name}.norm"] = float(gradient.norm())
        values[f"{name}.projection"] = float(gradient @ direction / math.sqrt(len(gradient)))
    return values


def _fit(model: Autoencoder, batches: list[Any]) -> dict[str, float]:
    """The loss before and after one optimiser step of a Trainer's fit."""
    losses: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            precision="64-true",
            max_epochs=1,
            callbacks=[Losses()],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(batches, batch_size=None))
    return dict(zip(("before", "after"), losses, strict=True))


def golden_values(subject: Subject, nudge: float = 0.0) -> Record:
    """The first results of a model, in float64, from seed 0 and data drawn by NumPy.

    Args:
        subject: the model.
        nudge: relative size of a random change of inputs and weights.

    Returns:
        `terms`, the loss terms of a batch without labels; `gradient`, its digest; `step`, the losses of a batch with
        labels and of the next one after an optimiser step.
    """
    rng = np.random.default_rng(1)
    model, terms = first_step(subject, nudge=nudge, rng=rng)
    values = {"terms": {name: term.item() for name, term in terms.items()}, "gradient": gradient_digest(model)}
    with _in_float64():
        model = _build(subject, nudge, rng)
        torch.manual_seed(1)
        return {
            **values,
            "step": _fit(model, [(_perturb(x, nudge, rng), LABELS) for x in _batches(model.input_shape)[1:]]),
        }


def first_step(
    subject: Subject, labelled: bool = False, nudge: float = 0.0, rng: np.random.Generator | None = None
) -> tuple[Autoencoder, dict[str, Tensor]]:
    """A model from seed 0 with the gradients of its first batch, and the loss terms.

    Args:
        subject: the model.
        labelled: pass labels with the batch.
        nudge: see `golden_values`.
        rng: draws the nudge.
    """
    rng = rng or np.random.default_rng(1)
    with _in_float64():
        model = _build(subject, nudge, rng)
        torch.manual_seed(1)
        x = _perturb(_batches(model.input_shape)[0], nudge, rng)
        terms = model.training_step((x, LABELS) if labelled else x, 0)
        terms["loss"].backward()
    return model, terms


def differences(values: Record, recorded: Record, tolerance: float) -> list[str]:
    """Values outside of the tolerance, relative to the loss for terms and to the total norm for gradients."""
    off = [f"{kind} has {sorted(values[kind])}" for kind in recorded if values[kind].keys() != recorded[kind].keys()]
    scales = {
        "terms": abs(recorded["terms"]["loss"]),
        "step": abs(recorded["step"]["before"]),
        "gradient": math.hypot(*(v for name, v in recorded["gradient"].items() if name.endswith(".norm"))),
    }
    for kind, scale in scales.items() if not off else ():
        for name, wanted in recorded[kind].items():
            # a part that is much smaller than the whole is compared relative to its own size
            bound = tolerance * max(abs(wanted), 1e-6 * scale)
            if not abs(values[kind][name] - wanted) <= bound:
                off.append(f"{kind} {name} is {values[kind][name]!r}, not {wanted!r}")
    return off


def recorded() -> dict[str, Record]:
    """The values of `tests/golden.json` by label."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}


def main() -> int:
    """Record new values and return the exit status: 1 if some depend on a tie."""
    table, chosen, tied = recorded(), subjects(), False
    for subject in chosen:
        if subject.label in table:
            continue
        values = golden_values(subject)
        ties = differences(golden_values(subject, PERTURBATION), values, 1000 * PERTURBATION)
        if ties:
            tied = True
            print(f"{subject.label}: rounding decides here, take other settings: {'; '.join(ties)}")
        else:
            table[subject.label] = values
    labels = {subject.label for subject in chosen}
    rows = [f"{json.dumps(label)}: {json.dumps(table[label])}" for label in sorted(table) if label in labels]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    print(f"wrote {FILE}")
    return int(tied)


if __name__ == "__main__":
    sys.exit(main())
