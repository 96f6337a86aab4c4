"""Every model beside PCA of as many numbers: how many are ahead, which are not, and why."""

from collections.abc import Sequence

from .common import number
from .report_columns import Row

NOT_EXPLAINED = "not explained: a defect until it is"
# of models that are behind PCA where the reason is their own and not the budget's
_RATE = "the ELBO switches off numbers that cost more nats of KL than they save in error"
_L1 = "an L1 penalty shrinks what is active"
_CORRUPTED = "its error is that of corrupted samples"
_PRIVATE = "the shared numbers must come from one part alone, and the private ones be drawn where another's are"
REASONS = {
    "ae1svm": "codes lie between 0 and 1, and a one-class SVM draws them together",
    "aae": "the encoder serves the discriminator as well",
    "alad": "encoder and decoder serve three discriminators as well",
    "annealed_vae": "the KL is held at a capacity, which bounds what a code can say",
    "beta_tcvae": "a weight above 1 buys independence of the numbers with reconstruction",
    "beta_vae": "a weight above 1 buys a smaller KL with reconstruction",
    "categorical_vae": "its numbers are one-hot: 20 variables of 4 classes are 40 bits",
    "cmvae": _PRIVATE,
    "contractive_ae": "one sigmoid layer, and a penalty on what the code tells apart",
    "crosscoder": _L1,
    "crmvae": f"{_RATE}, its posterior is pulled to what each part can tell alone, and that is decoded as well",
    "dagmm": "the code must fit a small mixture as well",
    "deep_svdd": "codes are drawn to one point by an encoder without biases",
    "dense_ae": "its layers of 128 and 64 ReLUs hold less than a linear code of as many numbers",
    "denoising_ae": _CORRUPTED,
    "dip_vae_ii": "a penalty on the covariance of codes trades against reconstruction",
    "denoising_vae": _CORRUPTED,
    "dmvae": f"{_RATE}, and decoders serve shared codes of one part alone as well",
    "f_anogan": "the generator serves the critic as well, and heeds a tenth of what the encoder does",
    "factor_vae": "a weight on the total correlation buys independence with reconstruction",
    "gamma_vae": _RATE,
    "gated_sae": "the L1 penalty keeps gates shut that would save little error",
    "hierarchical_vae": _RATE,
    "hyperspherical_vae": "a direction has a number less than its coordinates, and a noise of its own",
    "jmvae": f"{_RATE}, and its posterior is pulled to what each part can tell alone",
    "jnf": _RATE,
    "jumprelu_sae": "its penalty counts active numbers, and goes on to trade them for error",
    "joint_vae": "both KL terms are held at capacities, which bound what a code can say",
    "ladder_vae": _RATE,
    "linear_ae": "PCA is its optimum: what is left is the optimiser's distance",
    "maetok": "its 512 numbers pass a transformer as a row of tokens, for which so little training does not do",
    "masked_conv_ae": "it learns to fill in what is masked; whole samples are new to it",
    "mhvae": f"{_RATE}, and decoders serve codes of some parts alone as well",
    "mine_vae": _RATE,
    "mmvae": "each number must come from one part alone, and the whole sample be decoded from it",
    "mmvae_plus": _PRIVATE,
    "mopoe_vae": "most of its codes are of some parts alone, from which the whole sample is decoded",
    "mvae": f"{_RATE}, and decoders serve codes of some parts alone as well",
    "mvtcae": f"{_RATE}, and its posterior is pulled to what each part can tell alone",
    "nexus": f"{_RATE}, and no number of a part's code may tell of another part",
    "ra_sae": "its directions stay within a distance of 1 from mixtures of 128 samples",
    "sae_l1": _L1,
    "semantic_hash_ae": "its numbers are bits",
    "sequence_ae": "a recurrent network learns slowly: its error still falls at the end of the longest run",
    "sparse_ae_kl": "sigmoid units are never 0, so that all of them count as in use",
    "sparse_ae_l1": _L1,
    "stacked_dae": f"{_CORRUPTED}, and layers are trained one by one first",
    "temporal_sae": "PCA gets as many numbers as its two codes hold together, of which few are free",
    "transcoder": _L1,
    "telbo": _RATE,
    "triplet_vae": "the triplet loss moves means apart by label, beside the ELBO's price of each number",
    "vae": _RATE,
    "wta_ae": "its decoder reads what reaches a unit's threshold, about 13 of 256; the rest counts as in use",
    "wae_gan": "the encoder serves the discriminator as well, with ten times the weight of the error",
}


def floor(row: Row) -> float | None:
    """The error of PCA with as many numbers as a code has, a sparse one in use, or None."""
    return number(row, "pca_mse_at_l0" if row.get("l0") else "pca_mse")


def ratio(row: Row) -> float | None:
    """The row's error as a multiple of PCA's, or None."""
    pca, mse = floor(row), number(row, "mse")
    return mse / pca if pca and mse is not None else None


def section(judged: Sequence[Row], rows: Sequence[Row]) -> str:
    """Text and table.

    Args:
        judged: medians over seeds, of a data set all of one budget.
        rows: medians over seeds of any budgets, which may say why a model is behind.
    """
    ratios = [(row, found) for row in judged if (found := ratio(row)) is not None]
    if not ratios:
        return ""
    lines = []
    for dataset in dict.fromkeys(row["dataset"] for row, _ in ratios):
        of = [(row, found) for row, found in ratios if row["dataset"] == dataset]
        ahead = sum(found <= 1 for _, found in of)
        lines.append(
            f"- {dataset}, {of[0][0].get('budget', '')}: {ahead} of {len(of)} models and code sizes are ahead of PCA."
        )
    behind = sorted(
        ((row, found) for row, found in ratios if found > 1), key=lambda of: (of[0]["model"], of[0]["dataset"], -of[1])
    )
    table = ["| data | model | numbers | mse / PCA's | why |", "| --- | --- | --- | --- | --- |"]
    for row, found in behind:
        numbers = f"{l0:.0f} of {row['code_size']}" if (l0 := number(row, "l0")) is not None else row["code_size"]
        table.append(f"| {row['dataset']} | {row['model']} | {numbers} | {found:.2f} | {why(row, [*judged, *rows])} |")
    return "\n\n".join(
        [
            "## Beside PCA",
            "PCA with as many numbers as a code has, or as a sparse code has in use, leaves the error that a linear "
            "code can reach. A model that is ahead with more steps, or on another set, has no defect of its own: its "
            "budget is short here, or, of variational models, samples of few values are worth few nats of KL.",
            "\n".join(lines),
            *(["\n".join(table)] if behind else []),
        ]
    )


def why(row: Row, rows: Sequence[Row]) -> str:
    """Why a row is behind: a budget that is short, or that ends a run, another set that suits better, or a reason."""
    alike = [other for other in rows if all(other.get(key) == row.get(key) for key in ("model", "code_size"))]
    for here in (True, False):
        for other in alike:
            found, same = ratio(other), other["dataset"] == row["dataset"]
            longer = not same or (number(other, "steps") or 0) > (number(row, "steps") or 0)
            if found is not None and found <= 1 and same == here and longer:
                where = "the budget: {0:.2f} at {1}" if here else "ahead elsewhere: {0:.2f} on {2}, {1}"
                return where.format(found, other.get("budget"), other["dataset"])
    epochs, asked = number(row, "epochs"), row.get("budget", "").partition("epochs=")[2]
    if epochs is not None and asked and epochs < float(asked):
        return f"the budget: cut off after {epochs:.1f} of {asked} epochs"
    return REASONS.get(row["model"], NOT_EXPLAINED)
