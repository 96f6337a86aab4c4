"""Why a converged model may have a larger error than PCA, and hyperparameters with which that cause does not act.

`python -m benchmarks.quality --without-causes` trains the models with these hyperparameters. If the error is then at
most PCA's, the cause is confirmed, and users know what to set.
"""

from typing import Any, NamedTuple


class Cause(NamedTuple):
    """Why a model's error may be larger than PCA's.

    Attributes:
        words: the cause.
        without: hyperparameters with which it does not act or is negligible.
        whole: also train on samples of one part, for models of samples of several parts.
        model: a model with the same network on which the cause does not act, if no hyperparameter switches it off. Its
            own row is then the check.
    """

    words: str
    without: dict[str, Any]
    whole: bool = False
    model: str = ""

    def flags(self) -> str:
        """Flags of `aezoo fit` with which the cause does not act."""
        if self.model:
            return f"--model {self.model}"
        return " ".join(f"--model.{name} {value}" for name, value in self.without.items()) + self.parts()

    def parts(self) -> str:
        """What else must change: the samples."""
        return " and samples of one part" * self.whole


_ELBO = "the ELBO switches off latent numbers whose KL costs more nats than they save in error"
# the error then costs so many nats that the KL is negligible beside it
_PRECISE = {"likelihood": "gaussian:0.05"}
_LABEL = f"{_ELBO}, and ten of its 16 numbers are the class"
_BETA = "a weight above 1 favours a small KL over reconstruction"
_ALL_PARTS = f"{_ELBO}, and its posterior is also fitted to the posteriors of single parts"
_SINGLE_PARTS = f"{_ELBO}, and decoders must also work with codes of only some parts"
_PRIVATE = "shared numbers must come from a single part, and private ones are drawn at random for the other parts"

_OF_ELBO = (
    *("ada_gvae", "ciwae", "denoising_vae", "dip_vae_i", "dip_vae_ii", "factor_vae", "flow_prior_vae", "gamma_vae"),
    *("hierarchical_vae", "hvae", "info_vae", "iwae", "ladder_vae", "mine_vae", "miwae", "mixture_vae", "mlvae"),
    *("msssim_vae", "perceptual_vae", "piwae", "poincare_vae", "rhvae", "semi_supervised_m1", "triplet_vae", "vae"),
    *("vae_flow", "vae_gan", "vae_iaf", "vamp_vae"),
)
CAUSES: dict[str, Cause] = {
    **dict.fromkeys(_OF_ELBO, Cause(_ELBO, _PRECISE)),
    **dict.fromkeys(("conditional_vae", "semi_supervised_vae"), Cause(_LABEL, _PRECISE | {"latent_dim": 16})),
    **dict.fromkeys(("jmvae", "jnf", "mvtcae", "telbo"), Cause(_ALL_PARTS, _PRECISE, whole=True)),
    **dict.fromkeys(("crmvae", "dmvae", "mhvae", "mopoe_vae", "mvae"), Cause(_SINGLE_PARTS, _PRECISE, whole=True)),
    **dict.fromkeys(("cmvae", "mmvae_plus"), Cause(f"{_ELBO}; {_PRIVATE}", _PRECISE, whole=True)),
    "annealed_vae": Cause("the KL is held at a capacity, which limits the information in a code", _PRECISE),
    "beta_tcvae": Cause("a weight above 1 favours independent numbers over reconstruction", _PRECISE),
    "beta_vae": Cause(_BETA, _PRECISE),
    "categorical_vae": Cause(_ELBO, _PRECISE),
    "contractive_ae": Cause(
        "the decoder has the encoder's weights, which the penalty keeps small", {"contraction": 0.0, "tied": False}
    ),
    "dagmm": Cause("the code must also fit a small mixture", {"energy_weight": 0.0, "covariance_weight": 0.0}),
    "dvae": Cause(
        "a weight of 6.6 favours a small KL over reconstruction, and its likelihood fits black pixels first",
        {"likelihood": "bernoulli", "beta": 0.1},
    ),
    "hyperspherical_vae": Cause(f"{_ELBO}, and directions have one degree of freedom less than numbers", _PRECISE),
    "joint_vae": Cause(
        "both KL terms are held at capacities, which limit the information in a code, and ten of its numbers are those "
        "of one discrete variable",
        _PRECISE | {"latent_dim": 16, "max_capacity": 60.0},
    ),
    "jumprelu_sae": Cause(
        "twice as many numbers are active as asked for, with which PCA keeps nearly all", {"l0_weight": 1.0}
    ),
    "lfq_vae": Cause("the commitment term keeps the encoder's output away from where signs change", {"beta": 0.0}),
    "masked_conv_ae": Cause("values are only predicted from those of other patches", {}, model="conv_ae"),
    "mmvae": Cause("each code comes from a single part, and the whole sample is decoded from it", _PRECISE, whole=True),
    "nexus": Cause(
        f"{_ELBO}, and its decoders use only eight of its 16 numbers, those of its parts", _PRECISE | {"part_dim": 8}
    ),
    "soft_vq": Cause("at its default learning rate the loss soon stops falling", {"lr": 1e-3}),
    "sparse_ae_l1": Cause(
        "its default weight leaves more than 30 numbers active, with which PCA keeps nearly all", {"l1": 0.3}
    ),
}


def without_cause(name: str, input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Hyperparameters with which a model's cause does not act, on samples of a shape; empty if no cause is known."""
    cause = CAUSES.get(name)
    return {} if cause is None else cause.without | ({"parts": input_shape[1:2]} if cause.whole else {})
