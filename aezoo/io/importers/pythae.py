"""Folders of pythae: `model_config.json` and `model.pt`, of models with the default networks (MLPs).

Source: https://github.com/clementchadebec/benchmark_VAE, 0.1.2. The default networks have one hidden layer of 512 units
    with ReLU; decoders end in a sigmoid, so that a squared error becomes the likelihood `sigmoid_gaussian`. Custom
    networks are stored as code, in `encoder.pkl` and `decoder.pkl`, which are never opened.

Codes (the mean of a posterior) and reconstructions are equal to those of the original. Losses are equal up to the
constant of a Gaussian density; other differences are reported in a note. See docs/parity.md for the comparisons.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers.mlp import Layer, Settings, Weights, build, fill, names, shape_of
from aezoo.io.importers.source import WeightSource
from aezoo.io.importers.sparse_dictionary import float_tensors
from aezoo.nets.blocks.flows import FLOOR, inverse_above_minus_one

NAME = "pythae"
CONFIG, WEIGHTS = "model_config.json", "model.pt"
_FIRST, _HIDDEN, _LAST = "encoder.layers.0.0", "decoder.layers.0.0", "decoder.layers.1.0"
_KERNELS = {"imq": "inverse_multiquadratic", "rbf": "rbf"}
_LOSSES = {"mse": "sigmoid_gaussian:1", "bce": "bernoulli"}
_SCALES = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
# finite logits for pseudo-inputs of 0 and 1, with an error of 1e-7
_MOST_LOGIT = 16.0
_BOUND = "the value of the loss is minus the bound; pythae's is a weighted sum with the same gradient"
_REFUSED = {
    "HVAE": "it uses the softplus of the log-variance as a deviation, which hvae does not: train hvae",
    "RHVAE": "its metric reads samples, but that of rhvae reads codes: train rhvae",
    "PoincareVAE": "it uses the encoder's outputs as points of the ball, poincare_vae maps them: train poincare_vae",
    "VAE_IAF": "its steps have several hidden layers and do not read the sample as in vae_iaf: train vae_iaf",
}


def recognise(source: WeightSource) -> bool:
    """Return whether the files have this format."""
    if source.given not in (None, CONFIG, WEIGHTS) or not source.has(CONFIG, WEIGHTS):
        return False
    return "uses_default_encoder" in source.json(CONFIG)


def read(source: WeightSource) -> Imported:
    """Read the model, after all checks."""
    folder = _Folder(source)
    if folder.kind in _REFUSED:
        raise AezooError(f"{folder.label}: pythae's {folder.kind} cannot be read: {_REFUSED[folder.kind]}")
    if folder.kind not in _READERS:
        raise AezooError(
            f"{folder.label}: there is no model for pythae's {folder.kind[:40]!r}; classes that can be read: "
            f"{', '.join(_READERS)}"
        )
    for part in ("encoder", "decoder", "discriminator"):
        if not folder.settings.flag(f"uses_default_{part}", True):
            raise AezooError(
                f"{folder.label}: its {part} is not pythae's default but code, {part}.pkl, which is never run: only "
                "default networks are read; train a model with --model.net conv or resnet for others"
            )
    model = _READERS[folder.kind](folder)
    size = "x".join(map(str, folder.input_shape))
    found = f"pythae, {folder.kind}, samples of {size}, codes of {folder.latent_dim}"
    return Imported(model.eval(), found, tuple(folder.notes))


class _Folder:
    """A folder: its configuration and weights, and the properties common to all classes.

    Attributes:
        settings: the configuration.
        label: its file.
        kind: name of the class.
        input_shape: shape of a sample, X values.
        latent_dim: D.
        weights: layers of the file, after `open`.
        notes: what differs from pythae, one line each.
    """

    weights: Weights

    def __init__(self, source: WeightSource) -> None:
        self.source, self.label = source, source.label(CONFIG)
        self.settings = Settings(source.json(CONFIG), self.label)
        self.kind = self.settings.text("name").removesuffix("Config").removesuffix("_")
        self.input_shape = shape_of(self.settings.values.get("input_dim"), f"{self.label}: input_dim")
        self.latent_dim = self.settings.count("latent_dim")
        self.notes: list[str] = []

    def open(self, *heads: str, layers: Sequence[str] = (), others: Sequence[str] = (), ignored: str = "-") -> None:
        """Read and check the weights.

        Args:
            heads: the encoder's outputs other than the embedding.
            layers: further linear layers.
            others: further tensors.
            ignored: how names of tensors begin that are not read.
        """
        what = self.source.label(WEIGHTS)
        found = self.source.some_tensors(WEIGHTS, ("",))
        found = {name: tensor for name, tensor in found.items() if not name.startswith(ignored)}
        of_encoder = ("embedding", *heads)
        required = [*names(_FIRST, _HIDDEN, _LAST, *(f"encoder.{head}" for head in of_encoder), *layers), *others]
        self.weights = Weights(float_tensors(found, what, required), what)
        x = math.prod(self.input_shape)
        self.first = self.weights.layer(_FIRST, x)
        self.width = len(self.first[1])
        self.decoder = [
            self.weights.layer(_HIDDEN, self.latent_dim, self.width),
            self.weights.layer(_LAST, self.width, x),
        ]
        self.outputs = {head: self.weights.layer(f"encoder.{head}", self.width) for head in of_encoder}
        for head, (_, bias) in self.outputs.items():
            if len(bias) != (1 if head == "log_concentration" else self.latent_dim):
                raise AezooError(f"{what}: encoder.{head} has {len(bias)} outputs, but latent_dim is {self.latent_dim}")

    def model(
        self, name: str, code: Sequence[str] = ("embedding", "log_var"), constant: Tensor | None = None, **settings: Any
    ) -> Any:
        """Build a model with these networks.

        Args:
            name: in the registry.
            code: the encoder's outputs.
            constant: further outputs, the same for all samples.
            **settings: its arguments, without those of the networks.
        """
        settings = {"latent_dim": self.latent_dim, "hidden_dims": (self.width,), **settings}
        model = build(name, self.input_shape, self.weights, self.label, **settings)
        heads = [self.outputs[head] for head in code]
        if constant is not None:
            heads.append((torch.zeros(len(constant), self.width), constant))
        weight, bias = (torch.cat(parts) for parts in zip(*heads, strict=True))
        fill(model.encoder, [self.first, (weight, bias)])
        fill(model.decoder, self.decoder)
        return model

    def vae(self, name: str, **settings: Any) -> Any:
        """Build a model with a posterior, and the likelihood for reconstruction_loss."""
        return self.model(name, likelihood=self.likelihood(), **settings)

    def ae(self, name: str, **settings: Any) -> Any:
        """Build a model without a posterior, whose loss contains ||x - x_hat||^2."""
        return self.model(name, code=("embedding",), **{"likelihood": "sigmoid_gaussian", **settings})

    def likelihood(self) -> str:
        """The likelihood for reconstruction_loss."""
        return self.settings.choice("reconstruction_loss", "mse", _LOSSES)


def _ae(folder: _Folder) -> Autoencoder:
    folder.open()
    return folder.ae("dense_ae")


def _vae(folder: _Folder) -> Autoencoder:
    folder.open("log_var")
    return folder.vae("vae")


def _beta_vae(folder: _Folder) -> Autoencoder:
    folder.open("log_var")
    return folder.vae("beta_vae", beta=folder.settings.number("beta", 1.0))


def _disentangled_beta_vae(folder: _Folder) -> Autoencoder:
    folder.open("log_var")
    model = folder.vae(
        "annealed_vae",
        gamma=folder.settings.number("beta", 10.0),
        max_capacity=folder.settings.number("C", 50.0),
        capacity_steps=1,
        per_sample=True,
    )
    model.steps.fill_(1)
    folder.notes.append(f"the warm-up is over: the capacity is C = {model.max_capacity:g}")
    return model


def _beta_tcvae(folder: _Folder) -> Autoencoder:
    folder.open("log_var")
    given, mss = folder.settings, folder.settings.flag("use_mss", True)
    if mss:
        folder.notes.append("mi, tc and dwkl have the weights 1/N on the diagonal, in pythae (use_mss) in a column")
    weights = {name: given.number(name, 1.0) for name in ("alpha", "beta", "gamma")}
    return folder.vae("beta_tcvae", estimator="mss" if mss else "mws", **weights)


def _factor_vae(folder: _Folder) -> Autoencoder:
    layers = [f"discriminator.layers.{i}" for i in range(0, 11, 2)]
    folder.open("log_var", layers=layers)
    found: list[Layer] = []
    for name in layers:
        found.append(folder.weights.layer(name, len(found[-1][1]) if found else folder.latent_dim))
    *hidden, (weight, bias) = found
    folder.weights.layer(layers[-1], weight.shape[1], 2)
    dims = tuple(len(part[1]) for part in hidden)
    model = folder.vae("factor_vae", gamma=folder.settings.number("gamma", 2.0), discriminator_dims=dims)
    # only the difference of the two logits matters
    fill(model.discriminator, [*hidden, (weight[:1] - weight[1:], bias[:1] - bias[1:])])
    return model


def _info_vae(folder: _Folder) -> Autoencoder:
    folder.open("log_var")
    given = folder.settings
    kernel, scales = given.choice("kernel_choice", "imq", _KERNELS), given.numbers("scales", _SCALES)
    return folder.vae(
        "info_vae",
        alpha=given.number("alpha", 0.0),
        mmd_weight=given.number("lbd", 1e-3),
        kernel=kernel,
        kernel_scales=(1.0,) if kernel == "rbf" else scales,
        bandwidth=given.number("kernel_bandwidth", 1.0),
        unbiased=True,
    )


def _wae_mmd(folder: _Folder) -> Autoencoder:
    folder.open()
    given = folder.settings
    kernel, scales = given.choice("kernel_choice", "imq", _KERNELS), given.numbers("scales", _SCALES)
    bandwidth = given.above_zero("kernel_bandwidth", 1.0)
    width = bandwidth * bandwidth
    return folder.ae(
        "wae_mmd",
        mmd_weight=given.number("reg_weight", 3e-2) / _reconstruction_scale(folder),
        kernel=kernel,
        kernel_scales=(width,) if kernel == "rbf" else tuple(width * scale for scale in scales),
    )


def _reconstruction_scale(folder: _Folder) -> float:
    """Return the weight of the reconstruction, by which aezoo's loss is divided."""
    scale = folder.settings.above_zero("reconstruction_loss_scale", 1.0)
    if scale != 1:
        folder.notes.append(f"the loss is that of pythae divided by reconstruction_loss_scale = {scale:g}")
    return scale


def _aae(folder: _Folder) -> Autoencoder:
    layers = ("discriminator.layers.0.0", "discriminator.layers.1.0")
    folder.open("log_var", layers=layers)
    first = folder.weights.layer(layers[0], folder.latent_dim)
    last = folder.weights.layer(layers[1], len(first[1]), 1)
    drawn = not folder.settings.flag("deterministic_posterior", False)
    model = folder.vae(
        "aae",
        code=("embedding", "log_var") if drawn else ("embedding",),
        gaussian_posterior=drawn,
        adversarial_weight=folder.settings.number("adversarial_loss_scale", 0.5) / _reconstruction_scale(folder),
        discriminator_dims=(len(first[1]),),
    )
    fill(model.discriminator, [first, last])
    return model


def _vae_gan(folder: _Folder) -> Autoencoder:
    folder.open("log_var", ignored="discriminator.")
    share = folder.settings.above_zero("adversarial_loss_scale", 0.5)
    folder.notes.append(
        "the discriminator is untrained, as pythae's has other layers: feature_nll and discriminator are different"
    )
    return folder.vae("vae_gan", gamma=(1 - share) / share)


def _vamp(folder: _Folder) -> Autoencoder:
    name = "pseudo_inputs.0"
    folder.open("log_var", layers=(name,))
    k = folder.settings.count("number_components", 50)
    weight, bias = folder.weights.layer(name, k, math.prod(folder.input_shape))
    model = folder.vae("vamp_vae", n_components=k, data_init=False)
    pseudo_K = (weight + bias[:, None]).t().clamp(0, 1).logit().clamp(-_MOST_LOGIT, _MOST_LOGIT)
    with torch.no_grad():
        model.pseudo_K.copy_(pseudo_K.unflatten(1, folder.input_shape))
    if folder.settings.number("linear_scheduling_steps", 0):
        folder.notes.append("the warm-up (linear_scheduling_steps) is over: beta is 1")
    return model


def _iwae(folder: _Folder) -> Autoencoder:
    folder.open("log_var")
    folder.notes.append(_BOUND)
    return folder.vae("iwae", n_samples=folder.settings.count("number_samples", 10))


def _ciwae(folder: _Folder) -> Autoencoder:
    folder.open("log_var")
    folder.notes.append(_BOUND)
    beta = folder.settings.number("beta", 0.5)
    return folder.vae("ciwae", n_samples=folder.settings.count("number_samples", 10), beta=beta)


def _grouped(name: str) -> Callable[[_Folder], Autoencoder]:
    def read_groups(folder: _Folder) -> Autoencoder:
        folder.open("log_var")
        m, k = folder.settings.count("number_gradient_estimates", 5), folder.settings.count("number_samples", 10)
        folder.notes += [
            _BOUND,
            f"n_groups is number_samples = {k} and n_samples number_gradient_estimates = {m}, over which pythae "
            "normalises its weights",
        ]
        return folder.vae(name, n_groups=k, n_samples=m)

    return read_groups


def _svae(folder: _Folder) -> Autoencoder:
    folder.open("log_concentration")
    code = ("embedding", "log_concentration")
    return folder.vae("hyperspherical_vae", code=code, posterior="vmf", kappa_scale=1.0)


def _vq_vae(folder: _Folder) -> Autoencoder:
    given, places = folder.settings, folder.latent_dim
    ema = given.flag("use_ema", False)
    codes, average, counts = "quantizer.embeddings", "quantizer.ema_embed", "quantizer.cluster_size"
    folder.open(others=(codes, average, counts) if ema else (f"{codes}.weight",))
    size = given.count("num_embeddings", 512)
    tensors = folder.weights.tensors
    shapes = {codes: (size, 1), average: (size, 1), counts: (size,)} if ema else {f"{codes}.weight": (size, 1)}
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise AezooError(f"{folder.weights.label}: {name} has the shape {tuple(tensors[name].shape)}, not {shape}")
    # in pythae, these are means over positions, with one channel each
    commitment = given.number("commitment_loss_factor", 0.25) / places
    codebook = 1.0 if ema else given.above_zero("quantization_loss_factor", 1.0) / places
    if codebook != 1:
        folder.notes.append(f"the loss is that of pythae times {1 / codebook:g}, latent_dim / quantization_loss_factor")
    model = folder.ae(
        "vq_vae",
        net="mlp",
        places=places,
        latent_dim=1,
        codebook_size=size,
        data_init=False,
        dead_below=0.0,
        update="ema" if ema else "gradient",
        decay=given.number("decay", 0.99),
        beta=commitment / codebook,
        likelihood=f"sigmoid_gaussian:{math.sqrt(codebook / 2)!r}",
    )
    state = {"code_KD": codes, "sum_KD": average, "count_K": counts} if ema else {"code_KD": f"{codes}.weight"}
    with torch.no_grad():
        for own, name in state.items():
            getattr(model.quantiser, own).copy_(tensors[name])
    return model


def _rae_l2(folder: _Folder) -> Autoencoder:
    folder.open()
    folder.notes.append("the loss contains the term l2, which pythae leaves to the decoder's weight decay")
    beta, weight = folder.settings.number("embedding_weight", 1e-4), folder.settings.number("reg_weight", 1e-7) / 2
    return folder.ae("rae", beta=beta, regulariser="l2", regulariser_weight=weight)


def _rae_gp(folder: _Folder) -> Autoencoder:
    folder.open()
    folder.notes.append("the term gp is of the decoder's Jacobian, as in the paper; pythae's is of encoder and decoder")
    beta, weight = folder.settings.number("embedding_weight", 1e-4), folder.settings.number("reg_weight", 1e-7)
    return folder.ae("rae", beta=beta, regulariser="gp", regulariser_weight=weight)


def _msssim_vae(folder: _Folder) -> Autoencoder:
    folder.open("log_var")
    folder.notes.append(
        "the similarity in nll is that of Wang et al. for each image; pythae computes another one of the batch"
    )
    beta, window = folder.settings.number("beta", 1.0), folder.settings.count("window_size", 11)
    return folder.vae("msssim_vae", weight=1.0, beta=beta, window=window)


def _vae_lin_nf(folder: _Folder) -> Autoencoder:
    flows = folder.settings.values.get("flows", ["Planar", "Planar"])
    if not isinstance(flows, list) or flows not in ([kind] * len(flows) for kind in ("Planar", "Radial")):
        raise AezooError(
            f"{folder.label}: flows must all be Planar or all Radial for vae_flow, got {str(flows)[:60]!r}"
        )
    kind = flows[0].lower() if flows else "planar"
    parts = ("w", "u", "b") if kind == "planar" else ("x0", "log_alpha", "beta")
    folder.open("log_var", others=[f"net.{t}.{part}" for t in range(len(flows)) for part in parts])
    d, tensors, label = folder.latent_dim, folder.weights.tensors, folder.weights.label
    steps = []
    for t in range(len(flows)):
        found = [tensors[f"net.{t}.{part}"] for part in parts]
        sizes = (d, d, 1) if kind == "planar" else (d, 1, 1)
        if tuple(values.numel() for values in found) != sizes:
            shapes = ", ".join(str(tuple(values.shape)) for values in found)
            raise AezooError(f"{label}: net.{t} has the shapes {shapes}, but latent_dim is {d}")
        first, second, third = (values.double().flatten() for values in found)
        steps.append((_planar if kind == "planar" else _radial)(first, second, third, f"{label}: net.{t}"))
    if kind == "planar":
        folder.notes.append("kl does not have the 1e-4 that pythae adds to each step's determinant")
    folder.notes += [
        "the KL of q_0 is the closed form, in pythae an estimate from the draw, with the same mean",
        "the steps are the same for all samples; further training lets them depend on the sample",
    ]
    # the flow steps are the same for all samples: encoder outputs with weights 0
    bias = torch.cat([torch.zeros(0), *steps])
    return folder.vae("vae_flow", constant=bias, flow=kind, n_flows=len(flows))


def _planar(w_D: Tensor, u_D: Tensor, b: Tensor, what: str) -> Tensor:
    """Convert u, w, b of a planar step to aezoo's parameters, with which any u is invertible."""
    w_u = w_D @ u_D
    if not w_u > -1 + FLOOR:
        raise AezooError(f"{what} is not an invertible step, as w u = {w_u:g} is not above -1: it has no density")
    u_D = u_D + (inverse_above_minus_one(w_u) - w_u) * w_D / (w_D @ w_D).clamp_min(1e-12)
    return torch.cat([u_D, w_D, b]).float()


def _radial(centre_D: Tensor, log_alpha: Tensor, beta: Tensor, what: str) -> Tensor:
    """Convert c, a, b of a radial step to aezoo's parametrisation of positive factors."""
    alpha = log_alpha.exp()
    share = F.softplus(beta) / alpha - 1
    if not (FLOOR < alpha < 1e6 and -1 + FLOOR < share < 1e6):
        raise AezooError(f"{what} has a factor that vae_flow cannot represent: alpha {alpha.item():g}")
    a = torch.log(torch.expm1(alpha - FLOOR)) if alpha < 30 else alpha - FLOOR
    return torch.cat([centre_D, a, inverse_above_minus_one(share)]).float()


_READERS: Mapping[str, Callable[[_Folder], Autoencoder]] = {
    "AE": _ae,
    "VAE": _vae,
    "BetaVAE": _beta_vae,
    "DisentangledBetaVAE": _disentangled_beta_vae,
    "BetaTCVAE": _beta_tcvae,
    "FactorVAE": _factor_vae,
    "INFOVAE_MMD": _info_vae,
    "WAE_MMD": _wae_mmd,
    "Adversarial_AE": _aae,
    "VAEGAN": _vae_gan,
    "VAMP": _vamp,
    "IWAE": _iwae,
    "CIWAE": _ciwae,
    "MIWAE": _grouped("miwae"),
    "PIWAE": _grouped("piwae"),
    "SVAE": _svae,
    "VQVAE": _vq_vae,
    "RAE_L2": _rae_l2,
    "RAE_GP": _rae_gp,
    "MSSSIM_VAE": _msssim_vae,
    "VAE_LinNF": _vae_lin_nf,
}
