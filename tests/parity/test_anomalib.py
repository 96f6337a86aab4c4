"""Anomaly detectors of anomalib (Akcay et al. 2022): GANomaly, by an author of the paper, and those on frozen features.

Source: https://github.com/open-edge-platform/anomalib
"""

import copy
import importlib.util
import math
import types
from importlib import metadata
from typing import Any
from unittest import mock

import torch

import aezoo

D, CODE, BATCH = 6, 3, 8


def losses() -> Any:
    """The module of losses alone, which needs only torch; the package imports all models and their dependencies."""
    path = metadata.distribution("anomalib").locate_file("anomalib/models/image/ganomaly/loss.py")
    spec = importlib.util.spec_from_file_location("anomalib_ganomaly_loss", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_losses_of_generator_and_discriminator(compare):
    theirs = losses()
    settings = {"latent_dim": CODE, "hidden_dims": (5,), "discriminator_dims": (7,), "adv_weight": 0.1}
    model = aezoo.create_model("ganomaly", (D,), enc_weight=0.3, **settings).double()
    other, x = copy.deepcopy(model), torch.rand(BATCH, D)
    found = model.loss(x)
    z = other.encoder(x)
    back = other.decoder(z)
    again = other.second_encoder(back)
    assert (z - again).abs().max() < 1, "above 1, theirs is linear"
    frozen = copy.deepcopy(other.discriminator).requires_grad_(False)
    real, fake = (frozen(images) for images in (x, back))
    row = compare("ganomaly", "anomalib", "GeneratorLoss")
    # its distance of codes is half the square up to 1
    generator = theirs.GeneratorLoss(wadv=0.1, wcon=1, wenc=2 * 0.3)(z, again, x, back, real[0], fake[0])
    constant = D * math.log(2)
    reason = "theirs has means over values, ours the sum over a sample's values"
    value = found["loss"] - constant
    row.scaled("generator's loss without its constant, of features", value, generator, D, reason)
    names = ("encoder", "decoder", "second_encoder")
    pairs = [p for n in names for p in zip(getattr(model, n).parameters(), getattr(other, n).parameters(), strict=True)]
    row.equal_gradients(found["loss"], generator, pairs, "gradient of the generator", D, reason)
    means = theirs.GeneratorLoss()
    half = "theirs is the smooth absolute error, half the square up to 1, and a mean over values"
    row.scaled("encoding", found["encoding"], means.loss_enc(z, again), 2 * D, half)
    of_outputs = D * means.loss_adv(real[1].sigmoid(), fake[1].sigmoid())
    reason = "theirs compares the discriminator's outputs, the paper and ours its features"
    row.deviates("adversarial", found["adversarial"], of_outputs, reason, follows="ours")
    outputs = [other.discriminator(images)[1].sigmoid() for images in (x, back.detach())]
    # its targets are float32
    with mock.patch("torch.float32", torch.float64):
        discriminator = theirs.DiscriminatorLoss()(*outputs)
    row = compare("ganomaly", "anomalib", "DiscriminatorLoss")
    reason = "theirs is the mean of both terms, ours their sum"
    row.scaled("discriminator", found["discriminator"], discriminator, 2, reason)
    pairs = [*zip(model.discriminator.parameters(), other.discriminator.parameters(), strict=True)]
    row.equal_gradients(found["loss"], discriminator, pairs, "gradient of the discriminator", 2, reason)


# ---- images through frozen features ----------------------------------------------------------------------------------

IMAGES = "anomalib/models/image"


def module_of(path: str, **imported: dict[str, Any]) -> Any:
    """A file of the package without the rest of the package, whose dependencies are not installed.

    Args:
        path: the file.
        **imported: replacements of its imports: names by the last part of a module's name.
    """
    stubs: dict[str, Any] = {}
    for name in ("anomalib", "anomalib.data", "anomalib.models", "anomalib.models.components", "anomalib.utils"):
        stubs[name] = types.ModuleType(name)
    for name in ("anomalib.models.components.base", "anomalib.models.components.dimensionality_reduction"):
        stubs[name] = types.ModuleType(name)
    for last, values in imported.items():
        for name, stub in stubs.items():
            if name.rpartition(".")[2] == last:
                vars(stub).update(values)
    file = metadata.distribution("anomalib").locate_file(path)
    spec = importlib.util.spec_from_file_location(f"anomalib_{path.rpartition('/')[2].removesuffix('.py')}", str(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict("sys.modules", stubs):
        spec.loader.exec_module(module)
    return module


def frozen(name: str, **settings: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    return aezoo.create_model(name, (1, 12, 13), **settings).double(), torch.rand(9, 1, 12, 13)


def test_fre_matches_tied_autoencoder(compare):
    model, x = frozen("fre", latent_dim=5)
    part = module_of(
        f"{IMAGES}/fre/torch_model.py", data={"InferenceBatch": None}, components={"TimmFeatureExtractor": None}
    )
    f = model.feature_vector(x)
    tied = part.TiedAE(f.shape[1], 5)
    with torch.no_grad():
        tied.weight.copy_(model.W_DF)
        tied.encoder_bias.copy_(model.b_D.normal_())
        tied.decoder_bias.copy_(model.c_F.normal_())
    row = compare("fre", "anomalib", "TiedAE")
    errors = (f - tied(f)).square()
    row.equal("score", model.score(x), errors.sum(1))
    pairs = [(model.W_DF, tied.weight), (model.b_D, tied.encoder_bias), (model.c_F, tied.decoder_bias)]
    mean = "theirs is a mean over features, ours the sum over a sample's features"
    row.equal_gradients(model.loss(x)["fre"], errors.mean(), pairs, "gradient of 3 parameters", f.shape[1], mean)


def test_padim_matches_multivariate_gaussian(compare):
    model, x = frozen("padim", n_features=20, epsilon=0.01 + 1e-5)
    stats = module_of("anomalib/models/components/stats/multi_variate_gaussian.py", base={"DynamicBufferMixin": Plain})
    maps = module_of(f"{IMAGES}/padim/anomaly_map.py", components={"GaussianBlur2d": None})
    for part in x.split(4):
        model.train().loss(part)
    z = model.embed(x)
    mean, inverse = stats.MultiVariateGaussian()(z)
    row = compare("padim", "anomalib", "MultiVariateGaussian, AnomalyMapGenerator")
    row.equal("mean", model.mean_PD.mT, mean)
    row.equal("covariance", model.covariance(), torch.linalg.inv(inverse))
    new = model.embed(torch.rand(3, 1, 12, 13))
    theirs = maps.AnomalyMapGenerator.compute_distance(new, [mean, inverse])
    row.equal("distances", model.distances(new), theirs[:, 0])


class Plain:
    """Replaces a mixin that only loads buffers."""


def test_patchcore_matches_greedy_coreset(compare):
    model, x = frozen("patchcore", memory_size=20, n_neighbors=4)
    core = module_of(
        "anomalib/models/components/sampling/k_center_greedy.py",
        dimensionality_reduction={"SparseRandomProjection": lambda eps: None},
    )
    model.train().loss(x)
    z = model.encode(x).flatten(2).mT.flatten(0, 1)
    row = compare("patchcore", "anomalib", "KCenterGreedy")
    sampler = core.KCenterGreedy(z, 20 / len(z))
    sampler.features = z
    chosen = [torch.tensor(0)]
    for _ in range(19):
        sampler.update_distances(chosen[-1])
        chosen.append(sampler.get_new_idx())
    row.equal("memory, both from the first patch on", model.memory_MD, z[torch.stack(chosen)])


def test_student_teacher_matches_loss_and_map(compare):
    model, x = frozen("student_teacher")
    loss, maps = (module_of(f"{IMAGES}/stfpm/{name}.py") for name in ("loss", "anomaly_map"))
    with torch.no_grad():
        # cosine similarities are undefined where all features are 0
        for net in (model.backbone, model.student):
            for p in net.parameters():
                if p.ndim == 1:
                    p += 0.2
    teacher, student = (dict(enumerate(net(x))) for net in (model.backbone, model.student))
    row = compare("student_teacher", "anomalib", "STFPMLoss, AnomalyMapGenerator")
    reason = "theirs is the sum over a batch, ours its mean"
    row.scaled("imitation", model.loss(x)["imitation"], loss.STFPMLoss()(teacher, student), 1 / len(x), reason)
    theirs = maps.AnomalyMapGenerator().compute_anomaly_map(teacher, student, (12, 13))
    row.equal("map", model.anomaly_map(x), theirs[:, 0])


def test_reverse_distillation_matches_loss_of_one_place_and_map(compare):
    model, x = frozen("reverse_distillation", sigma=0.0)
    loss = module_of(f"{IMAGES}/reverse_distillation/loss.py")
    maps = module_of(f"{IMAGES}/reverse_distillation/anomaly_map.py", components={"GaussianBlur2d": Unblurred})
    E = model.maps(x)
    D = model.restore(model.encode(x))
    row = compare("reverse_distillation", "anomalib", "ReverseDistillationLoss, AnomalyMapGenerator")
    theirs = maps.AnomalyMapGenerator((12, 13), mode=maps.AnomalyMapGenerationMode.ADD)(E, D)
    row.equal("map before smoothing", model.anomaly_map(x), theirs[:, 0])
    reason = "theirs is the cosine of whole maps, as in the authors' code, the paper's and ours that of each place"
    value = loss.ReverseDistillationLoss()(E, D)
    row.deviates("distillation", model.loss(x)["distillation"], value, reason, follows="ours")
    places = [[found.permute(0, 2, 3, 1).flatten(0, 2) for found in both] for both in (E, D)]
    row.equal(
        "distillation of places as samples", model.loss(x)["distillation"], loss.ReverseDistillationLoss()(*places)
    )


class Unblurred(torch.nn.Module):
    """Replaces the filter of kornia; ours is compared with SciPy's."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
