"""Folders of MultiVae: `model_config.json` and `model.pt`, of models with the default networks (MLPs).

Source: https://github.com/AgatheSenellart/MultiVae, 1.0.3. Each modality has an encoder with one or two hidden layers
of 512 units and a decoder with one, which ends in a sigmoid: a normal distribution becomes the likelihood
`sigmoid_gaussian`. Custom networks are code, in `encoders.pkl` and `decoders.pkl`, which are never opened.

Modalities are the parts of a sample, in the order of the configuration. Parts that differ only in their first
dimension, such as channels, are concatenated along it; others are flattened first.

Codes of all subsets of the modalities, and samples from them, are equal to those of the original. Losses are equal too,
except that they are averaged over the batch instead of summed; other differences are reported in a note. See
docs/parity.md for the comparisons.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers.mlp import Layer, Settings, Weights, build, fill, names, shape_of
from aezoo.io.importers.source import WeightSource
from aezoo.io.importers.sparse_dictionary import float_tensors, value_of

NAME = "MultiVae"
CONFIG, WEIGHTS = "model_config.json", "model.pt"
_HEADS = {False: ("embedding", "log_var"), True: ("embedding", "style_embedding", "log_var", "style_log_var")}
_JOINT = "its joint encoder reads the codes of the parts' encoders, but that of {0} reads whole samples: train {0}"
_REFUSED = {
    "JMVAE": _JOINT.format("jmvae"),
    "JNF": _JOINT.format("jnf"),
    "TELBO": _JOINT.format("telbo"),
    "MoPoE": "it multiplies the product of all parts by the prior, which mopoe_vae does not: train mopoe_vae",
    "CVAE": "its condition is a modality, that of conditional_vae a label: train conditional_vae",
    "Nexus": "its networks are not those of nexus: train nexus",
    "MHVAE": "its networks are code, which is never run: train mhvae",
}


def recognise(source: WeightSource) -> bool:
    """Return whether the files have this format."""
    if source.given not in (None, CONFIG, WEIGHTS) or not source.has(CONFIG, WEIGHTS):
        return False
    return "custom_architectures" in source.json(CONFIG)


def read(source: WeightSource) -> Imported:
    """Read the model, after all checks."""
    label = source.label(CONFIG)
    kind = value_of(source.json(CONFIG), "name", str, label).removesuffix("Config")
    if kind in _REFUSED:
        raise AezooError(f"{label}: MultiVae's {kind} cannot be read: {_REFUSED[kind]}")
    if kind not in _READERS:
        raise AezooError(
            f"{label}: there is no model for MultiVae's {kind[:40]!r}; classes that can be read: {', '.join(_READERS)}"
        )
    if source.json(CONFIG)["custom_architectures"]:
        raise AezooError(
            f"{label}: it has networks of its own (custom_architectures), which are code that is never run: only "
            "default networks are read; train a model with --model.net conv or resnet for others"
        )
    folder = _Folder(source, kind)
    model = _READERS[kind](folder)
    parts = ", ".join(f"{name} ({'x'.join(map(str, shape))})" for name, shape in folder.parts.items())
    return Imported(model.eval(), f"MultiVae, {kind}, {parts}, codes of {folder.latent_dim}", tuple(folder.notes))


class _Folder:
    """A folder: its configuration and weights, and the properties common to all classes.

    Attributes:
        settings: the configuration.
        parts: shapes of the modalities by their names.
        latent_dim: D.
        notes: what differs from MultiVae, and how samples are laid out, one line each.
    """

    weights: Weights

    def __init__(self, source: WeightSource, kind: str) -> None:
        self.source, self.label, self.kind = source, source.label(CONFIG), kind
        self.settings = Settings(source.json(CONFIG), self.label)
        dims = value_of(self.settings.values, "input_dims", dict, self.label)
        if not dims or any(not name.isprintable() or "." in name or not 0 < len(name) <= 100 for name in dims):
            raise AezooError(
                f"{self.label}: input_dims must have names of the modalities, of up to 100 letters and without dots"
            )
        self.parts = {name: shape_of(dims[name], f"{self.label}: {name} of input_dims") for name in dims}
        if len(self.parts) != self.settings.count("n_modalities", len(self.parts)):
            raise AezooError(f"{self.label}: input_dims has {len(self.parts)} modalities, n_modalities is different")
        if len(self.parts) < 2:
            raise AezooError(f"{self.label}: input_dims has only one modality: train vae")
        self.latent_dim = self.settings.count("latent_dim")
        self._check_scales()
        self.input_shape, self.sizes, note = _layout(self.parts)
        self.notes = [note]

    def likelihood(self) -> str:
        """The likelihood of all decoders."""
        kinds = self._by_part("decoders_dist", "normal")
        if wrong := [f"{name} is {kind!r:.40}" for name, kind in kinds.items() if kind != "normal"]:
            raise AezooError(
                f"{self.label}: decoders_dist of {wrong[0]}, but default decoders end in a sigmoid, for which aezoo "
                "supports only normal"
            )
        params = self._by_part("decoder_dist_params", {})
        if not all(isinstance(value, dict) for value in params.values()):
            raise AezooError(f"{self.label}: decoder_dist_params must hold a dictionary for each modality")
        scales = {Settings(value, self.label).above_zero("scale", 1.0) for value in params.values()}
        if len(scales) > 1:
            raise AezooError(f"{self.label}: the scales of the modalities differ, and models of aezoo have one for all")
        return f"sigmoid_gaussian:{scales.pop()!r}"

    def _by_part(self, key: str, default: Any) -> dict[str, Any]:
        """Return a value for each modality."""
        given = value_of(self.settings.values, key, dict, self.label, {})
        return {name: given.get(name, default) for name in self.parts}

    def _check_scales(self) -> None:
        """Reject weights for the likelihoods of modalities."""
        if not self.settings.flag("uses_likelihood_rescaling", False):
            return
        sizes = [math.prod(shape) for shape in self.parts.values()]
        if self.settings.values.get("rescale_factors") is None:
            factors = [max(sizes) / size for size in sizes]
        else:
            given = Settings(self._by_part("rescale_factors", 1.0), self.label)
            factors = [given.number(name, 1.0) for name in self.parts]
        if any(factor != 1 for factor in factors):
            raise AezooError(
                f"{self.label}: the likelihoods of its modalities have weights (uses_likelihood_rescaling), which no "
                "model of aezoo supports: train one without"
            )

    def open(self, private: int = 0, others: tuple[str, ...] = ()) -> None:
        """Read and check the weights.

        Args:
            private: P, size of the private code of each modality.
            others: tensors other than those of encoders and decoders.
        """
        what, required, hidden = self.source.label(WEIGHTS), [*others], range(1 if private else 2)
        for part in self.parts:
            required += names(*(f"encoders.{part}.layers.{i}.0" for i in hidden))
            required += names(*(f"encoders.{part}.{head}" for head in _HEADS[private > 0]))
            required += names(*(f"decoders.{part}.layers.{i}.0" for i in (0, 1)))
        self.weights = Weights(float_tensors(self.source.some_tensors(WEIGHTS, ("",)), what, required), what)
        first, shape = next(iter(self.parts.items()))
        self.width = len(self.weights.layer(f"encoders.{first}.layers.0.0", math.prod(shape))[1])
        self.private, self.hidden = private, hidden

    def model(self, name: str, **settings: Any) -> Any:
        """Build a model with these networks; settings are the arguments other than those of the networks."""
        settings |= {
            "parts": self.sizes,
            "latent_dim": self.latent_dim,
            "hidden_dims": (self.width,) * len(self.hidden),
        }
        settings |= {"private_dim": self.private} if self.private else {}
        layers = [(self._encoder(part), self._decoder(part)) for part in self.parts]
        model = build(name, self.input_shape, self.weights, self.label, likelihood=self.likelihood(), **settings)
        for encoder, decoder, (of_encoder, of_decoder) in zip(model.encoder, model.decoder, layers, strict=True):
            fill(encoder, of_encoder)
            fill(decoder, of_decoder)
        return model

    def _encoder(self, part: str) -> list[Layer]:
        sizes = {"embedding": self.latent_dim, "log_var": self.latent_dim}
        inputs, layers = math.prod(self.parts[part]), []
        for i in self.hidden:
            layers.append(self.weights.layer(f"encoders.{part}.layers.{i}.0", inputs, self.width))
            inputs = self.width
        heads = [
            self.weights.layer(f"encoders.{part}.{head}", self.width, sizes.get(head, self.private))
            for head in _HEADS[self.private > 0]
        ]
        weight, bias = (torch.cat(values) for values in zip(*heads, strict=True))
        return [*layers, (weight, bias)]

    def _decoder(self, part: str) -> list[Layer]:
        first = self.weights.layer(f"decoders.{part}.layers.0.0", self.latent_dim + self.private, self.width)
        last = self.weights.layer(f"decoders.{part}.layers.1.0", self.width, math.prod(self.parts[part]))
        # decoders mirror encoders in aezoo: for values above 0, ReLU after the identity is the identity
        same = (torch.eye(self.width), torch.zeros(self.width))
        return [first, *[same] * (len(self.hidden) - 1), last]

    def tensor(self, name: str, size: int) -> Tensor:
        """Return a vector from the weights, (size,)."""
        found = self.weights.tensors[name]
        if found.numel() != size:
            raise AezooError(f"{self.weights.label}: {name} has the shape {tuple(found.shape)}, not {size} values")
        return found.flatten()

    def check_zero(self, name: str, size: int) -> None:
        """Reject a prior that aezoo does not support."""
        if self.tensor(name, size).any():
            raise AezooError(
                f"{self.weights.label}: {name} is not 0, so its prior is not N(0, I) as in aezoo: train with a "
                "prior that is not learned"
            )

    def check_sampling(self) -> None:
        """Reject mixtures of other distributions, and bounds with several samples."""
        self.settings.choice("prior_and_posterior_dist", "laplace_with_softmax", {"normal": ""})
        self.settings.choice("loss", "dreg_looser", {"iwae_looser": "", "dreg_looser": ""})
        if (k := self.settings.count("K", 10)) != 1:
            raise AezooError(
                f"{self.label}: K is {k}, but the bound of mixtures in aezoo takes one draw of each component"
            )
        self.notes.append(
            "the KL of each component is the closed form, in MultiVae an estimate from the draw, with the same mean"
        )


def _layout(parts: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Return the shape of samples, the sizes of the parts, and notes on them."""
    shapes, listed = [*parts.values()], ", ".join(parts)
    if len({shape[1:] for shape in shapes}) == 1:
        sizes = tuple(shape[0] for shape in shapes)
        shape = (sum(sizes), *shapes[0][1:])
        return shape, sizes, f"a sample has the parts {listed} one after the other along its first dimension"
    sizes = tuple(math.prod(shape) for shape in shapes)
    return (sum(sizes),), sizes, f"a sample is a vector of {sum(sizes):,} values: {listed}, each flattened"


def _mvae(folder: _Folder) -> Autoencoder:
    folder.open()
    given = folder.settings
    if not given.flag("use_subsampling", True):
        raise AezooError(
            f"{folder.label}: use_subsampling is off, and the loss of mvae always has the terms of subsets"
        )
    subsets = value_of(given.values, "k", int, folder.label, 0) if len(folder.parts) > 2 else 0
    if subsets:
        folder.notes.append("for random subsets, the size is drawn first; in MultiVae all subsets are equally likely")
    if given.number("warmup", 10):
        folder.notes.append("the warm-up of beta is over")
    return folder.model("mvae", beta=given.number("beta", 1.0), n_subsets=subsets)


def _mvtcae(folder: _Folder) -> Autoencoder:
    folder.open()
    alpha, beta = folder.settings.number("alpha", 0.1), folder.settings.number("beta", 2.5)
    return folder.model("mvtcae", alpha=alpha, beta=beta)


def _crmvae(folder: _Folder) -> Autoencoder:
    folder.open()
    folder.notes.append("the loss weights its terms as in the paper; MultiVae weights the likelihoods by 1 / (2 M + 2)")
    return folder.model("crmvae", beta=folder.settings.number("beta", 2.5))


def _dmvae(folder: _Folder) -> Autoencoder:
    dims = folder.settings.values.get("modalities_specific_dim")
    sizes = {*dims.values()} if isinstance(dims, dict) and all(type(n) is int for n in dims.values()) else set()
    if len(sizes) != 1 or min(sizes) < 1:
        raise AezooError(f"{folder.label}: modalities_specific_dim must be one number for all modalities to fit dmvae")
    folder.open(sizes.pop())
    beta, betas = folder.settings.number("beta", 1.0), folder.settings.values.get("modalities_specific_betas")
    own = Settings(betas if isinstance(betas, dict) else {}, folder.label)
    if any(own.number(name, 1.0) != beta for name in folder.parts):
        raise AezooError(f"{folder.label}: modalities_specific_betas must be beta for all modalities to fit dmvae")
    folder.notes.append("in cross_nelbo, a part's code is its expert times the prior, in MultiVae only the expert")
    return folder.model("dmvae", beta=beta)


def _mmvae(folder: _Folder) -> Autoencoder:
    folder.check_sampling()
    folder.open(others=("prior_mean", "prior_log_var"))
    for name in ("prior_mean", "prior_log_var"):
        folder.check_zero(name, folder.latent_dim)
    return folder.model("mmvae")  # MultiVae ignores its beta


def _mmvae_plus(folder: _Folder) -> Autoencoder:
    folder.check_sampling()
    private = folder.settings.count("modalities_specific_dim")
    priors = [f"{kind}_priors.{part}" for kind in ("mean", "logvars") for part in (*folder.parts, "shared")]
    folder.open(private, tuple(priors))
    for part in folder.parts:
        folder.check_zero(f"mean_priors.{part}", private)
    for kind in ("mean", "logvars"):
        folder.check_zero(f"{kind}_priors.shared", folder.latent_dim + private)
    model = folder.model("mmvae_plus", beta=folder.settings.number("beta", 1.0))
    _set_private_priors(folder, model, "logvars_priors")
    return model


def _cmvae(folder: _Folder) -> Autoencoder:
    folder.check_sampling()
    private, k = folder.settings.count("modalities_specific_dim"), folder.settings.count("number_of_clusters", 10)
    others = ["w_mean_prior", "w_logvar_prior", "_pc_params"]
    others += [f"r_{kind}_priors.{part}" for kind in ("mean", "logvars") for part in folder.parts]
    clusters = [f"{kind}_clusters.{i}" for kind in ("mean", "logvar") for i in range(min(k, 10_000))]
    folder.open(private, (*others, *clusters))
    for name in ("w_mean_prior", "w_logvar_prior", *(f"r_mean_priors.{part}" for part in folder.parts)):
        folder.check_zero(name, private)
    model = folder.model("cmvae", beta=folder.settings.number("beta", 1.0), n_components=k)
    _set_private_priors(folder, model, "r_logvars_priors")
    folder.notes.append("the code of several parts is the mean of their mixture, in MultiVae the code of a random part")
    with torch.no_grad():
        model.weight_K.copy_(folder.tensor("_pc_params", k))
        for values_KD, kind in ((model.mean_KD, "mean"), (model.log_var_KD, "logvar")):
            values_KD.copy_(torch.stack([folder.tensor(f"{kind}_clusters.{i}", folder.latent_dim) for i in range(k)]))
    return model


@torch.no_grad()
def _set_private_priors(folder: _Folder, model: Any, name: str) -> None:
    """Copy the log-variances of the private codes of missing parts."""
    model.r_log_var_MP.copy_(torch.stack([folder.tensor(f"{name}.{part}", folder.private) for part in folder.parts]))


_READERS: Mapping[str, Callable[[_Folder], Autoencoder]] = {
    "MVAE": _mvae,
    "MVTCAE": _mvtcae,
    "CRMVAE": _crmvae,
    "DMVAE": _dmvae,
    "MMVAE": _mmvae,
    "MMVAEPlus": _mmvae_plus,
    "CMVAE": _cmvae,
}
