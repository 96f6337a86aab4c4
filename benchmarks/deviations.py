"""Train models as they are and with the deviations of their authors' code, and compare the results: a CSV of both.

    python -m benchmarks.deviations                       all models, three seeds each
    python -m benchmarks.deviations hvae titok --again    these models again

For models whose docstring names a deviation from the authors' code and its effect. The variant `aezoo` is the model as
it is; in the others a formula of the authors' code, or a part of it, replaces ours. Trainings are small
and show how large an effect is, not which formula is better. Figures are of held-out samples, the terms those of the
model's loss; at the end, the script prints means over seeds.

    mse, mae       of reconstructions, per value
    latents_used   latents of a dictionary that are active in a training sample; dead: those that it counts as dead
    nmi            normalised mutual information of the classes of a categorical code and those of the data
    scale          of a likelihood that learns it
"""

import contextlib
import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

import aezoo
from aezoo.errors import AezooError
from aezoo.manifolds import hamiltonian
from aezoo.models.classic.memory_ae import MemoryAE
from aezoo.models.quantised.soft_vq import SoftVQ
from aezoo.models.regularised import draem
from aezoo.models.sparse.matryoshka_sae import MatryoshkaSAE
from aezoo.models.sparse.topk_sae import TopKSAE
from aezoo.models.variational import hyperspherical_vae
from aezoo.models.variational.hyperspherical_vae import HypersphericalVAE
from aezoo.models.variational.joint_vae import JointVAE
from aezoo.nets.blocks.ssim import similarity
from aezoo.quantisers.bsq import BSQ
from aezoo.quantisers.common import entropy, relative_distance
from aezoo.quantisers.lfq import LFQ

from .common import ResultsCSV, at_least, build_parser, command_line, environment, run_script
from .quality_row import quiet_trainer

KEY = ("model", "data", "variant", "seed", "steps")
_MOST_SAMPLES = 500
Terms = dict[str, Tensor]

# ---- formulas of the authors' code, as methods and functions that replace ours ---------------------------------------


def memory_product(self: MemoryAE, x: Tensor) -> Tensor:
    """The product of z and an item for their cosine, https://github.com/donggong1/memae-anomaly-detection."""
    product_BN = self.encoder(x) @ self.memory_ND.T
    w_BN = product_BN.detach().softmax(1)
    kept_BN = (w_BN > self.shrinkage / w_BN.shape[1]) | (w_BN == w_BN.amax(1, keepdim=True))
    return product_BN.masked_fill(~kept_BN, -torch.inf).softmax(1)


_joint_loss = JointVAE.loss


def joint_loss(self: JointVAE, x: Tensor, y: Tensor | None = None) -> Terms:
    """C_c = min(5 t / T, N log K), https://github.com/Schlumberger/joint-vae."""
    terms = _joint_loss(self, x, y)
    capacity = (5.0 * self.step_fraction(self.capacity_steps)).clamp(max=self.max_discrete_capacity)
    kl, ours = terms["kl_discrete"], terms["discrete_capacity"]
    return terms | {"loss": terms["loss"] + self.gamma * ((kl - capacity).abs() - (kl - ours).abs())}


def cooling(beta_0: float, n: int) -> list[float]:
    """1 / beta_k for 1 / sqrt(beta_k) in equation 6, https://github.com/anthonycaterini/hvae-nips."""
    return [(1 / beta_0 + (1 - 1 / beta_0) * (k / n) ** 2) ** -0.5 for k in range(n + 1)]


def concentration(self: HypersphericalVAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The concentration softplus(a) + 1, https://github.com/nicola-decao/s-vae-pytorch."""
    out_BE = self.encoder(x)
    mu_BD = F.normalize(out_BE[:, :-1], dim=1)
    return mu_BD, (F.softplus(out_BE[:, -1:]) + 1).expand_as(mu_BD)


_posterior = HypersphericalVAE.posterior


def unbounded_concentration(self: HypersphericalVAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The concentration D softplus(a)."""
    mu_BD, kappa_BD = _posterior(self, x)
    return mu_BD, (kappa_BD - self.least_kappa).clamp(min=1e-6)


_aux = TopKSAE.aux


def aux_without_share(self: TopKSAE, x: Tensor, x_hat: Tensor, pi_BN: Tensor) -> Tensor:
    """AuxK with s = 1, as in the paper."""
    return _aux(self, x, x_hat, pi_BN) / (self.dead_N.sum() / self.k_aux).clamp(1e-9, 1)


def aux_with_bias(self: TopKSAE, x: Tensor, x_hat: Tensor, pi_BN: Tensor) -> Tensor:
    """AuxK with b_pre in e_hat and frozen in e, https://github.com/openai/sparse_autoencoder."""
    b_X = self.decoder.b_X
    e_BX = (x - self.likelihood.mean(x_hat)).detach().flatten(1)
    return _aux_of_error(self, e_BX + b_X.detach() - b_X, pi_BN)


def aux_through_error(self: TopKSAE, x: Tensor, x_hat: Tensor, pi_BN: Tensor) -> Tensor:
    """AuxK with a gradient through e, https://github.com/bartbussmann/BatchTopK."""
    return _aux_of_error(self, (x - self.likelihood.mean(x_hat)).flatten(1), pi_BN)


def _aux_of_error(self: TopKSAE, e_BX: Tensor, pi_BN: Tensor) -> Tensor:
    dead = self.active(pi_BN.masked_fill(~self.dead_N, 0), self.k_aux)
    error_B = (e_BX - self.decoder.sum_of_directions(*dead)).square().sum(1)
    return error_B * (self.dead_N.sum() / self.k_aux).clamp(max=1)


_matryoshka_loss = MatryoshkaSAE.loss


def _errors(self: MatryoshkaSAE, x: Tensor, mean: bool, empty: bool) -> Terms:
    """The loss with the mean or the sum of the errors of prefixes, with or without the empty one."""
    terms = _matryoshka_loss(self, x)
    errors, count = terms["nll"] + terms["prefix_nll"], len(self.prefixes) + 1
    if not empty:
        errors, count = errors - self.nll(self.decoder.with_bias(torch.zeros_like(x.flatten(1))), x).mean(), count - 1
    total = errors / count if mean else errors
    return terms | {"loss": total + self.aux_weight * terms["aux"]}


def sum_of_prefixes(self: MatryoshkaSAE, x: Tensor, y: Tensor | None = None) -> Terms:
    """The paper's: the sum over prefixes."""
    return _errors(self, x, mean=False, empty=False)


def mean_of_prefixes(self: MatryoshkaSAE, x: Tensor, y: Tensor | None = None) -> Terms:
    """The mean over prefixes, without the empty one."""
    return _errors(self, x, mean=True, empty=False)


def sum_with_empty(self: MatryoshkaSAE, x: Tensor, y: Tensor | None = None) -> Terms:
    """The sum over prefixes and the empty one."""
    return _errors(self, x, mean=False, empty=True)


def similarity_with_zeros(x_p: Tensor, x_hat_p: Tensor, window: int) -> Tensor:
    """Zeros on the border of SSIM's windows, https://github.com/VitjanZ/DRAEM."""
    edge = window // 2
    inner = (slice(None), slice(None), slice(edge, -edge), slice(edge, -edge))
    x, x_hat = (F.pad(image[inner], (edge,) * 4) for image in (x_p, x_hat_p))
    return similarity(x, x_hat, window)


def scaled_signs(self: BSQ, z_ND: Tensor, rows_per_sample: int = 1) -> Any:
    """The straight-through estimator inside of the factor 1 / sqrt(D), https://github.com/zhaoyue-zephyrus/bsq-vit."""
    q_ND, index, terms = LFQ._quantise_rows(self, z_ND, rows_per_sample)
    u_ND = self.project(z_ND)
    return q_ND.detach() + self.scale * (u_ND - u_ND.detach()), index, terms


def detached_mixtures(self: SoftVQ, x: Tensor, temperature: float | None = None) -> tuple[Tensor, Tensor]:
    """Codes detached in p, https://github.com/Hhhhhhao/continuous_tokenizer."""
    code_KD, rows = self.project(self.code_KD), self.project(self.encoder(x).transpose(1, 2))
    distance = relative_distance(rows.flatten(0, 1), code_KD.detach())
    p_BNK = (-distance / (temperature or self.temperature)).softmax(1).unflatten(0, rows.shape[:2])
    return (p_BNK @ code_KD).transpose(1, 2), p_BNK


_soft_loss = SoftVQ.loss


def sharp_entropies(self: SoftVQ, x: Tensor, y: Tensor | None = None) -> Terms:
    """Entropies at a temperature of 0.02 with a weight of 0.01 X / N, as in the same code."""
    terms, p_BNK = _soft_loss(self, x, y), detached_mixtures(self, x, 0.02)[1]
    n = p_BNK.shape[1]
    entropies = entropy(p_BNK).sum(1).mean() - self.gamma * n * entropy(p_BNK.mean((0, 1)))
    return terms | {"loss": terms["nll"] + 0.01 * x[0].numel() / n * entropies}


# ---- what is trained ------------------------------------------------------------------------------------------------


_DIGITS = {"name": "digits", "batch_size": 64}


class Variant(NamedTuple):
    """The differences of the authors' code: options of the model, and attributes to replace, each with its object."""

    options: Mapping[str, Any] = {}
    formulas: Sequence[tuple[Any, str, Any]] = ()


class Case(NamedTuple):
    """The training of a model: steps, the terms to record, its variants, options and data sets."""

    steps: int
    terms: tuple[str, ...]
    variants: Mapping[str, Variant]
    options: Mapping[str, Any] = {}
    data: Sequence[Mapping[str, Any]] = (_DIGITS,)


_DICTIONARY = {"latent_dim": 256, "k": 4, "dead_after": 2000, "likelihood": "gaussian", "lr": 2e-3}
_TOKENS = {"n_tokens": 8, "codebook_size": 64}
_START = (hyperspherical_vae, "START", 0.0)  # initial value of a
_LEARNED_ERROR = (TopKSAE, "aux", aux_through_error)
CASES = {
    "memory_ae": Case(2500, ("nll",), {"authors": Variant(formulas=[(MemoryAE, "address", memory_product)])}),
    # without the 1/2 of equations 3 and 4, https://github.com/BorgwardtLab/topological-autoencoders
    "topological_ae": Case(
        1500, ("nll", "x_to_z", "z_to_x"), {"authors": Variant({"topology": 1000.0})}, {"latent_dim": 2}
    ),
    "joint_vae": Case(
        2500,
        ("nll", "kl_discrete"),
        {"authors": Variant(formulas=[(JointVAE, "loss", joint_loss)])},
        {"latent_dim": 6, "capacity_steps": 1500},
    ),
    "hvae": Case(1000, ("elbo",), {"cooling": Variant(formulas=[(hamiltonian, "quadratic_cooling", cooling)])}),
    "hyperspherical_vae": Case(
        1000,
        ("elbo", "kl"),
        {
            "authors": Variant(formulas=[(HypersphericalVAE, "posterior", concentration), _START]),
            "D softplus(a)": Variant(formulas=[(HypersphericalVAE, "posterior", unbounded_concentration), _START]),
        },
        {"posterior": "vmf"},
        (_DIGITS, {**_DIGITS, "name": "mnist5k"}),
    ),
    "topk_sae": Case(
        1400,
        ("l0",),
        {
            "s = 1": Variant(formulas=[(TopKSAE, "aux", aux_without_share)]),
            "gradient of b_pre": Variant(formulas=[(TopKSAE, "aux", aux_with_bias)]),
        },
        {**_DICTIONARY, "latent_dim": 64},
    ),
    "batch_topk_sae": Case(1400, ("l0",), {"gradient through e": Variant(formulas=[_LEARNED_ERROR])}, _DICTIONARY),
    "matryoshka_sae": Case(
        1400,
        ("l0",),
        {
            "authors": Variant(formulas=[_LEARNED_ERROR]),
            "paper": Variant(formulas=[(MatryoshkaSAE, "loss", sum_of_prefixes)]),
            "sum, empty prefix": Variant(formulas=[(MatryoshkaSAE, "loss", sum_with_empty)]),
            "mean, no empty prefix": Variant(formulas=[(MatryoshkaSAE, "loss", mean_of_prefixes)]),
        },
        _DICTIONARY,
    ),
    "draem": Case(
        1200,
        ("nll", "structure"),
        {"authors": Variant(formulas=[(draem, "similarity", similarity_with_zeros)])},
        {"hidden_dims": (8, 16), "segmentation_dims": (8,), "lr": 2e-3},
        ({"name": "sample_photos", "size": 32, "batch_size": 8},),
    ),
    # means over the values of a sample and of a code: beta X / (P D), https://github.com/google-deepmind/sonnet
    "vq_vae": Case(
        400,
        ("nll", "commitment"),
        {"authors": Variant({"beta": 0.25 / 4})},
        {"beta": 0.25, "hidden_dims": (16,), "codebook_size": 64},
    ),
    # the same: beta X / (N D), https://github.com/bytedance/1d-tokenizer
    "titok": Case(
        400, ("nll", "commitment"), {"authors": Variant({"beta": 0.5})}, {"beta": 0.25, "latent_dim": 4, **_TOKENS}
    ),
    "bsq_vae": Case(
        400,
        ("nll", "entropy", "diversity"),
        {"authors": Variant(formulas=[(BSQ, "_quantise_rows", scaled_signs)])},
        {"hidden_dims": (16,)},
    ),
    "soft_vq": Case(
        400,
        ("nll", "entropy", "diversity"),
        {"authors": Variant(formulas=[(SoftVQ, "mixtures", detached_mixtures), (SoftVQ, "loss", sharp_entropies)])},
        {"latent_dim": 8, **_TOKENS},
    ),
    # the optimiser leaves out the scale, https://github.com/CompVis/latent-diffusion
    "autoencoder_kl": Case(
        400,
        ("perceptual", "kl"),
        {"authors": Variant({"likelihood": "laplace"})},
        {"likelihood": "laplace:learned", "hidden_dims": (8, 16), "discriminator_weight": 0.0},
        ({"name": "mnist5k", "batch_size": 32},),
    ),
}


@contextlib.contextmanager
def replaced(variant: Variant) -> Iterator[None]:
    """Replace our formulas by those of the variant."""
    with contextlib.ExitStack() as stack:
        for owner, name, formula in variant.formulas:
            stack.enter_context(mock.patch.object(owner, name, formula))
        yield


def measure(row: Mapping[str, Any], data: Mapping[str, Any], variant: Variant) -> dict[str, float]:
    """Train the variant of a row and measure its errors."""
    case, seed = CASES[row["model"]], row["seed"]
    pl.seed_everything(seed, workers=True, verbose=False)
    opened = aezoo.DataModule(**data, num_workers=0, seed=seed)
    with replaced(variant):
        model = aezoo.create_model(row["model"], opened.input_shape, **{**case.options, **variant.options})
        quiet_trainer({"accelerator": "cpu"}, max_steps=row["steps"]).fit(model, opened)
        return figures(model.eval(), opened, case.terms)


@torch.no_grad()
def figures(model: aezoo.Autoencoder, data: aezoo.DataModule, terms: Sequence[str]) -> dict[str, float]:
    """Terms and errors of samples of the test split, and counts."""
    x, y = data.tensors("test")
    x = x[:_MOST_SAMPLES]
    error = model(x) - x
    torch.manual_seed(0)
    found, loss = {"mse": error.square().mean(), "mae": error.abs().mean()}, model.loss(x)
    found |= {term: loss[term] for term in terms}
    if isinstance(model, TopKSAE):
        used_N = (model.encode(data.tensors("train")[0]) != 0).any(0)
        found |= {"latents_used": used_N.sum(), "dead": model.dead_N.sum()}
    if isinstance(model, JointVAE) and y is not None:
        classes = model.parts(x)[2][:, 0].argmax(1)
        found["nmi"] = torch.tensor(normalized_mutual_info_score(y[:_MOST_SAMPLES].numpy(), classes.numpy()))
    if isinstance(log_scale := getattr(model.likelihood, "log_scale", None), nn.Parameter):
        found["scale"] = log_scale.exp()
    return {key: float(value) for key, value in found.items()}


def means(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A line for each model and variant: the means of its figures over seeds."""
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in KEY if name != "seed"), []).append(row)
    lines = []
    for key, group in groups.items():
        names = [name for name, cell in group[0].items() if cell and name not in (*KEY, "processor", "error")]
        values = {name: statistics.mean(float(row[name]) for row in group) for name in names}
        lines.append(f"{', '.join(key)} steps: " + "  ".join(f"{name} {value:.5g}" for name, value in values.items()))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows that do not exist yet, and print the means of all."""
    parser = build_parser("deviations", __doc__)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help=f"of {', '.join(CASES)}; by default all")
    add("--seeds", type=at_least(1), default=3, metavar="N", help="trainings of each variant (default 3)")
    add("--steps", type=at_least(1), metavar="N", help="training steps; by default those of the model's case")
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    if other := [name for name in arguments.models if name not in CASES]:
        raise AezooError(f"no deviation of {other[0]} is measured here: take of {', '.join(CASES)}")
    path = arguments.results / f"deviations-{environment(accelerator='cpu')}.csv"
    table = ResultsCSV(path, KEY, command_line("deviations", words), arguments.again)
    for name in arguments.models or CASES:
        case, steps = CASES[name], arguments.steps or CASES[name].steps
        changes = {"aezoo": Variant(), **case.variants}
        for data, (variant, change), seed in itertools.product(case.data, changes.items(), range(arguments.seeds)):
            row = {"model": name, "data": data["name"], "variant": variant, "seed": seed, "steps": steps}
            if table.needs(row):
                table.put(row | measure(row, data, change))
                print(table.find(row), flush=True)
    print(*means(table.rows), path, sep="\n")


if __name__ == "__main__":
    run_script(main)
