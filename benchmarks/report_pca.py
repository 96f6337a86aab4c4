"""Every model compared with PCA of as many numbers: how many have a lower error, which do not, and why."""

from collections.abc import Sequence

from .common import number
from .report_columns import Row

NOT_EXPLAINED = "not explained, and therefore regarded as a defect"
# reasons why models are behind PCA, where the cause is the model and not the budget
_RATE = "the ELBO switches off latent numbers whose KL costs more nats than they save in error"
_L1 = "the L1 penalty shrinks active latents"
_CORRUPTED = "its error is measured from corrupted inputs"
_PRIVATE = "shared numbers must come from a single part, and private ones are drawn at random for the other parts"
REASONS = {
    "ae1svm": "codes lie between 0 and 1, and a one-class SVM pulls them together",
    "aae": "the encoder also serves the discriminator",
    "alad": "encoder and decoder also serve three discriminators",
    "annealed_vae": "the KL is held at a capacity, which limits the information in a code",
    "beta_tcvae": "a weight above 1 favours independent numbers over reconstruction",
    "beta_vae": "a weight above 1 favours a small KL over reconstruction",
    "categorical_vae": "its numbers are one-hot: 20 variables of 4 classes are 40 bits",
    "cmvae": _PRIVATE,
    "contractive_ae": "one sigmoid layer, and a penalty on the code's sensitivity to the input",
    "crosscoder": _L1,
    "crmvae": f"{_RATE}, its posterior is pulled towards those of single parts, which are decoded as well",
    "dagmm": "the code must also fit a small mixture",
    "deep_svdd": "an encoder without biases pulls all codes to one point",
    "dense_ae": "its layers of 128 and 64 ReLUs pass on less than a linear code of as many numbers",
    "denoising_ae": _CORRUPTED,
    "dip_vae_ii": "a penalty on the covariance of codes trades against reconstruction",
    "denoising_vae": _CORRUPTED,
    "dmvae": f"{_RATE}, and decoders must also work with the shared code of a single part",
    "draem": "it repairs damaged samples as well, and structure and segmentation weigh as much as the error",
    "f_anogan": "the generator also serves the critic, and its weight on the error is a tenth of the encoder's",
    "factor_vae": "a weight on the total correlation favours independence over reconstruction",
    "gamma_vae": _RATE,
    "gated_sae": "the L1 penalty keeps gates closed if opening them saves little error",
    "hierarchical_vae": _RATE,
    "hyperspherical_vae": "a direction has one degree of freedom less than coordinates, and a different kind of noise",
    "jmvae": f"{_RATE}, and its posterior is pulled to what each single part can tell",
    "jnf": _RATE,
    "jumprelu_sae": "its penalty counts active numbers and keeps trading error for fewer of them",
    "joint_vae": "both KL terms are held at capacities, which limit the information in a code",
    "ladder_vae": _RATE,
    "linear_ae": "PCA is its optimum; the optimiser has not fully reached it",
    "maetok": "a transformer handles its 512 numbers as a sequence of tokens and needs more training than this",
    "masked_conv_ae": "it learns to fill in masked parts and never sees whole samples in training",
    "mhvae": f"{_RATE}, and decoders must also work with codes of only some parts",
    "mine_vae": _RATE,
    "mmvae": "each code comes from a single part, and the whole sample is decoded from it",
    "mmvae_plus": _PRIVATE,
    "mopoe_vae": "most of its codes come from some of the parts, and the whole sample is decoded from them",
    "mvae": f"{_RATE}, and decoders must also work with codes of only some parts",
    "mvtcae": f"{_RATE}, and its posterior is pulled to what each single part can tell",
    "nexus": f"{_RATE}, and no number of a part's code may describe another part",
    "ra_sae": "its directions stay within a distance of 1 of mixtures of 128 samples",
    "sae_l1": _L1,
    "semantic_hash_ae": "its numbers are bits",
    "sequence_ae": "a recurrent network learns slowly: its error still falls at the end of the longest run",
    "sparse_ae_kl": "sigmoid units are never 0, so all of them count as active",
    "sparse_ae_l1": _L1,
    "stacked_dae": f"{_CORRUPTED}, and layers are trained one by one first",
    "temporal_sae": "PCA gets as many numbers as its two codes have together, but few of these are free",
    "transcoder": _L1,
    "telbo": _RATE,
    "triplet_vae": "the triplet loss separates means by label, in addition to the ELBO's cost of each number",
    "vae": _RATE,
    "wta_ae": "its decoder reads only units that reach their threshold, about 13 of 256; the others count too",
    "wae_gan": "the encoder also serves the discriminator, which has ten times the weight of the error",
}


def pca_error(row: Row) -> float | None:
    """The error of PCA with as many numbers as a code has, or as a sparse code has active; or None."""
    return number(row, "pca_mse_at_l0" if row.get("l0") else "pca_mse")


def ratio(row: Row) -> float | None:
    """The row's error divided by PCA's, or None."""
    pca, mse = pca_error(row), number(row, "mse")
    return mse / pca if pca and mse is not None else None


def section(compared: Sequence[Row], rows: Sequence[Row]) -> str:
    """Text and table.

    Args:
        compared: medians over seeds; all rows of a data set have the same budget.
        rows: medians over seeds of any budget, which may explain why a model is behind.
    """
    ratios = [(row, found) for row in compared if (found := ratio(row)) is not None]
    if not ratios:
        return ""
    lines = []
    for dataset in dict.fromkeys(row["dataset"] for row, _ in ratios):
        of = [(row, found) for row, found in ratios if row["dataset"] == dataset]
        ahead = sum(found <= 1 for _, found in of)
        lines.append(
            f"- {dataset}, {of[0][0].get('budget', '')}: {ahead} of {len(of)} models and code sizes have at most "
            "PCA's error."
        )
    behind = sorted(
        ((row, found) for row, found in ratios if found > 1), key=lambda of: (of[0]["model"], of[0]["dataset"], -of[1])
    )
    table = ["| data | model | numbers | mse / PCA's | why |", "| --- | --- | --- | --- | --- |"]
    for row, found in behind:
        numbers = f"{l0:.0f} of {row['code_size']}" if (l0 := number(row, "l0")) is not None else row["code_size"]
        table.append(
            f"| {row['dataset']} | {row['model']} | {numbers} | {found:.2f} | {reason(row, [*compared, *rows])} |"
        )
    return "\n\n".join(
        [
            "## Comparison with PCA",
            "PCA with as many numbers as a code has (for a sparse code: as many as are active) gives the lowest error "
            "that a linear code can reach. The table lists the models with a larger error. If a model is better than "
            "PCA with more steps or on another data set, the model is not at fault: either its budget is too short "
            "here or, for variational models, samples with few values do not justify many nats of KL.",
            "\n".join(lines),
            *(["\n".join(table)] if behind else []),
        ]
    )


def reason(row: Row, rows: Sequence[Row]) -> str:
    """Why a row is behind: a short or cut-off budget, a data set that suits the model less, or another reason."""
    alike = [other for other in rows if all(other.get(key) == row.get(key) for key in ("model", "code_size"))]
    for here in (True, False):
        for other in alike:
            found, same = ratio(other), other["dataset"] == row["dataset"]
            longer = not same or (number(other, "steps") or 0) > (number(row, "steps") or 0)
            if found is not None and found <= 1 and same == here and longer:
                where = "the budget: {0:.2f} at {1}" if here else "better on other data: {0:.2f} on {2}, {1}"
                return where.format(found, other.get("budget"), other["dataset"])
    epochs, asked = number(row, "epochs"), row.get("budget", "").partition("epochs=")[2]
    if epochs is not None and asked and epochs < float(asked):
        return f"the budget: cut off after {epochs:.1f} of {asked} epochs"
    return REASONS.get(row["model"], NOT_EXPLAINED)
