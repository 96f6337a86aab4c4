"""detect: scores that train a copy of the encoder, frozen features, and anomaly models with the command."""

import copy
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchvision
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch import nn

import aezoo
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.nets.blocks.features import random_features
from aezoo.tasks import detect_deep_svdd, detect_features
from aezoo.tasks.detect import Detector, detect
from aezoo.tasks.detect_deep_svdd import DeepSVDDScorer, SVDDSettings
from aezoo.tasks.detect_features import FrozenFeatures
from aezoo.tasks.detectors import Baseline
from aezoo.tasks.samples import SampleSet


def images(n, shape=(1, 8, 8), seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def moved(name="dense_ae", shape=(1, 8, 8), seed=0, **settings):
    """A model with random offsets added to its initial weights: zero biases would hide many mistakes."""
    torch.manual_seed(seed)
    model = aezoo.create_model(name, shape, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) if p.ndim < 2 else 0.05 * torch.randn_like(p))
    return model.eval()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def learnt(x, steps=400, **settings):
    """An autoencoder trained on digits."""
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=32, hidden_dims=(128,), **settings)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(x[torch.randint(len(x), (64,))])["loss"].backward()
        optimizer.step()
    return model.eval()


def without(digit):
    """Digits whose training split lacks one."""
    return aezoo.DataModule("digits", batch_size=64, train_classes=[c for c in range(10) if c != digit])


# ---- RaPP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["sap", "nap"])
def test_perfect_autoencoder_has_zero_scores(score):
    """Also if the code is wider than the data, and with hidden layers separated by an activation."""
    model = aezoo.create_model("dense_ae", (5,), hidden_dims=(10,), latent_dim=10, likelihood="gaussian")
    eye = torch.eye(5)
    both = torch.cat([eye, -eye])  # relu(x) - relu(-x) = x
    with torch.no_grad():
        for net, weights in ((model.encoder, (both, torch.eye(10))), (model.decoder, (torch.eye(10), both.T))):
            layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
            for layer, weight in zip(layers, weights, strict=True):
                layer.weight.copy_(weight)
                layer.bias.zero_()
    x = torch.randn(30, 5)
    found = Detector(model, score).fit(x).decision_function(torch.randn(9, 5))
    assert np.allclose(found, 0, atol=1e-9)
    with torch.no_grad():
        model.decoder[-2].bias[0] += 0.1
    assert (Detector(model, "sap").fit(x).decision_function(x) > 1e-3).all()


def test_sap_without_hidden_layers_is_squared_error():
    """h_0 is the sample, with a term of D times mse; the code is the last layer, which the paper includes."""
    model, x = moved("dense_ae", (6,), hidden_dims=(), latent_dim=3, likelihood="gaussian"), torch.randn(20, 6)
    scores = {name: Detector(model, name).fit(x).decision_scores_ for name in ("sap", "mse")}
    with torch.no_grad():
        code = (model.encode(x) - model.encode(model(x))).square().sum(1).numpy()
        assert np.allclose(scores["sap"], 6 * scores["mse"] + code, rtol=1e-5)
        for p in model.encoder.parameters():
            p.zero_()
    # an encoder without dependence on its input: only the error of the sample remains
    scores = {name: Detector(model, name).fit(x).decision_scores_ for name in ("sap", "mse")}
    assert np.allclose(scores["sap"], 6 * scores["mse"], rtol=1e-6) and scores["mse"].min() > 0


# ---- Deep SVDD -------------------------------------------------------------------------------------------------------


def fitted(model, x, **tuning):
    scorer = DeepSVDDScorer(model, SVDDSettings(**tuning))
    with torch.no_grad():
        torch.manual_seed(0)
        scorer.fit(x.split(7), len(x))
    return scorer


def test_centre_is_mean_of_initial_codes_away_from_0():
    model, x = moved(latent_dim=12, hidden_dims=(16,)), images(40)
    scorer = fitted(model, x, epochs=0)
    weights = [p.detach().double() for name, p in model.encoder.named_parameters() if name.endswith("weight")]
    # the network without its biases
    mean = ((x.flatten(1).double() @ weights[0].T).relu() @ weights[1].T).mean(0)
    near = mean.abs() < 0.1
    assert near.any() and not near.all()
    expected = torch.where(near, torch.where(mean < 0, -0.1, 0.1), mean)
    assert torch.allclose(scorer.centre_D.double(), expected, atol=1e-6)


def test_svdd_score_is_distance_from_centre():
    model, x = moved(latent_dim=3, hidden_dims=(16,)), images(40)
    scorer = fitted(model, x, epochs=3)
    code = scorer._copy.encode(x).double()
    assert torch.allclose(scorer(x).double(), ((code - scorer.centre_D) ** 2).sum(1), rtol=1e-5)
    assert not torch.allclose(code.float(), model.encode(x))
    whole = Detector(model, "deep_svdd", svdd_epochs=3, batch_size=7, seed=4).fit(x)
    assert np.allclose(whole.decision_scores_, whole.decision_function(x))
    assert whole.threshold_ == np.percentile(whole.decision_scores_, 90)


def test_svdd_step_is_adam_on_mean_squared_distance():
    model, x = moved(latent_dim=3, hidden_dims=(16,)), images(40)
    before, after = fitted(model, x, epochs=0), fitted(model, x, epochs=1, lr=1e-3)
    by_hand = copy.deepcopy(before._copy)
    weights = [p.requires_grad_() for name, p in by_hand.encoder.named_parameters() if name.endswith("weight")]
    (by_hand.encode(x) - before.centre_D).square().sum(1).mean().backward()
    for p in weights:
        # the length of Adam's first step is its rate, whatever the gradient
        g = p.grad + 1e-6 * p.detach()
        p.data -= 1e-3 * g / (g.abs() + 1e-8)
    for mine, theirs in zip(by_hand.encoder.parameters(), after._copy.encoder.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-7)


def test_svdd_training_contracts_codes_and_keeps_model():
    model, x = moved(latent_dim=3, hidden_dims=(16,)), images(60)
    held, modes = state(model), [m.training for m in model.modules()]
    before, after = fitted(model, x, epochs=0), fitted(model, x, epochs=30, lr=1e-3)
    assert after(x).mean() < 0.5 * before(x).mean()
    assert torch.equal(after.centre_D, before.centre_D)
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert modes == [m.training for m in model.modules()]


def test_svdd_is_seeded_and_keeps_global_rng():
    model, x = moved(latent_dim=3, hidden_dims=(16,)), images(300)
    torch.manual_seed(8)
    first, again, other = (
        Detector(model, "deep_svdd", svdd_epochs=2, seed=seed).fit(x).decision_scores_ for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    drawn = torch.rand(3)
    torch.manual_seed(8)
    assert torch.equal(torch.rand(3), drawn)


def test_a_constant_code_cannot_be_reached():
    """With biases, zero weights and the centre as the last bias give score 0 to all samples, as in PyOD's fit."""
    model, x = moved(latent_dim=4, hidden_dims=(16,)), images(40)
    scorer = fitted(model, x, epochs=5, lr=1e-2)
    biases = [p for name, p in scorer._copy.encoder.named_parameters() if name.endswith("bias")]
    assert biases and all(not p.any() for p in biases)
    with torch.no_grad():
        for p in scorer._copy.encoder.parameters():
            p.zero_()
    # the best remaining constant costs at least 0.1^2 for each number of the code
    assert torch.allclose(scorer(x), scorer.centre_D.square().sum()) and scorer.centre_D.square().sum() >= 0.04
    with torch.no_grad():
        biases[-1].copy_(scorer.centre_D)
    assert not scorer(x).any()


@pytest.mark.slow
def test_biases_collapse_svdd_to_a_constant(monkeypatch):
    x = images(64)
    model = moved(latent_dim=2, hidden_dims=(4,))

    def spread(scorer):
        """The variance of codes relative to their squared length."""
        codes = scorer.codes(x).detach()
        return float(codes.var(0).sum() / codes.square().sum(1).mean())

    sound = fitted(model, x, epochs=300, lr=1e-2)
    monkeypatch.setattr(detect_deep_svdd, "without_biases", lambda net: [*net.requires_grad_().parameters()])
    collapsed = fitted(model, x, epochs=300, lr=1e-2)
    assert spread(sound) > 1e-3 and spread(collapsed) < 0.1 * spread(sound)


@pytest.mark.parametrize("act", ["tanh", "sigmoid", "elu", "softplus"])
def test_activations_nonzero_at_zero_are_refused(act):
    with pytest.raises(AezooError, match="relu, leaky_relu, gelu or silu") as refused:
        Detector(moved(activation=act, hidden_dims=(8,)), "deep_svdd")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "gelu", "silu", "gated", "identity"])
def test_bias_free_svdd_code_of_zero_is_zero(act):
    """So that zero weights give the code 0, which is not the centre."""
    scorer = fitted(moved(activation=act, hidden_dims=(8,)), images(20), epochs=1)
    assert not scorer.codes(torch.zeros(1, 1, 8, 8)).any()


def test_soft_boundary_svdd_uses_nu_quantile_radius():
    """Only samples outside of the radius have a gradient, divided by nu n."""
    model, x = moved(latent_dim=3, hidden_dims=(16,)), images(100)
    start = fitted(model, x, epochs=0)
    d2 = start(x)
    nu = 0.1
    radius2 = float(np.sort(d2.numpy())[math.ceil(0.9 * 100) - 1])
    outside = d2 > radius2
    assert outside.sum() == 10
    by_hand = copy.deepcopy(start._copy)
    weights = [p.requires_grad_() for name, p in by_hand.encoder.named_parameters() if name.endswith("weight")]
    ((by_hand.encode(x[outside]) - start.centre_D).square().sum(1) - radius2).sum().div(nu * 100).backward()
    soft = fitted(model, x, epochs=1, lr=1e-3, nu=nu)
    for p, theirs in zip(weights, [p for p in soft._copy.encoder.parameters() if p.ndim > 1], strict=True):
        g = p.grad + 1e-6 * p.detach()
        assert torch.allclose(p.detach() - 1e-3 * g / (g.abs() + 1e-8), theirs, atol=2e-6)


@pytest.mark.slow
def test_trained_beats_untrained_network_on_digits():
    """PyOD 3.6.3 to 3.6.5 had the AUC of an untrained network, .746 (its changelog)."""
    found = {"trained": [], "codes": [], "untrained": []}
    for digit in (0, 5, 8):
        data = without(digit)

        def auroc(net, epochs, data=data, digit=digit):
            options = {"svdd_epochs": epochs, "svdd_lr": 1e-3, "anomaly": str(digit), "baselines": False}
            return detect(net, data, score="deep_svdd", **options).rows[0]["auroc"]

        model = learnt(data.tensors("train")[0], steps=300)
        for seed in range(5):
            torch.manual_seed(seed)
            found["untrained"].append(auroc(aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=32), 0))
        found["codes"].append(auroc(model, 0))
        found["trained"].append(auroc(model, 25))
    mean = {name: np.mean(values) for name, values in found.items()}
    assert mean["trained"] > mean["untrained"] + 0.1
    assert mean["trained"] > mean["codes"] + 0.3
    assert min(found["trained"]) > 0.55


@pytest.mark.parametrize("name", ["conv_ae", "resnet_ae", "vae", "topk_sae", "linear_ae"])
def test_any_model_whose_codes_have_a_gradient_can_be_tuned(name):
    model, x = moved(name), images(20)
    found = detect(model, x, score="deep_svdd,nll", svdd_epochs=2, baselines=False)
    assert np.isfinite(found.scores).all() and len(found.rows) == 2
    after = fitted(model, x, epochs=20, lr=1e-3)
    assert after(x).mean() < fitted(model, x, epochs=0)(x).mean()


def test_codes_without_a_gradient_are_refused():
    model = moved(hidden_dims=(8,))
    model.encode = lambda x: model.encoder(x).round().detach()
    with pytest.raises(AezooError, match="needs codes with a gradient"):
        Detector(model, "deep_svdd").fit(images(9))


@pytest.mark.parametrize(
    "options", [{"svdd_epochs": -1}, {"svdd_epochs": 10**12}, {"svdd_lr": 0.0}, {"svdd_nu": 1.0}, {"svdd_nu": -0.1}]
)
def test_bad_tuning_is_refused_in_one_line(options):
    with pytest.raises(AezooError, match="deep_svdd takes") as refused:
        detect(moved(), images(9), score="deep_svdd", **options)
    assert "\n" not in str(refused.value)


def test_attached_trainer_is_not_copied():
    model = moved(hidden_dims=(8,))
    model._trainer = trainer = object.__new__(pl.Trainer)
    scorer = fitted(model, images(9), epochs=1)
    assert model._trainer is trainer and scorer._copy._trainer is None


# ---- frozen features -------------------------------------------------------------------------------------------------


def test_fre_matches_pca_error_of_features():
    """The optimum of a linear autoencoder in closed form, keeping half of the 64 features."""
    train, x = images(300), images(20, seed=1)
    found = Baseline("fre", features="random").fit(SampleSet.from_data(train)).decision_function(SampleSet.from_data(x))
    net = random_features((1, 8, 8))
    with torch.no_grad():
        f, g = (net(part)[-1].flatten(1).double().numpy() for part in (train, x))
    assert f.shape == (300, 64)
    pca = PCA(32).fit(f)
    expected = ((g - pca.inverse_transform(pca.transform(g))) ** 2).sum(1)
    assert np.allclose(found, expected, rtol=1e-3) and expected.min() > 0


@pytest.mark.slow
def test_linear_autoencoder_of_features_reaches_fre():
    """Baldi & Hornik 1989; anomalib trains this by Adam."""
    net = random_features((1, 8, 8))
    with torch.no_grad():
        f = net(images(200))[-1].flatten(1)[:, :12]
    f = (f - f.mean(0)) / f.std()
    torch.manual_seed(0)
    model = aezoo.create_model("linear_ae", (12,), latent_dim=6, likelihood="gaussian")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(1500):
        optimizer.zero_grad()
        model.loss(f)["loss"].backward()
        optimizer.step()
    error = (model.eval()(f) - f).square().sum(1).mean().item()
    f = f.numpy()
    pca = PCA(6).fit(f)
    floor = float(((f - pca.inverse_transform(pca.transform(f))) ** 2).sum(1).mean())
    assert floor - 1e-4 < error < 1.02 * floor


@pytest.mark.slow
def test_fre_baseline_is_added_with_features():
    data = without(5)
    model = learnt(data.tensors("train")[0], steps=60)
    found = detect(model, data, score="deep_svdd,nll", svdd_epochs=2, features="random", anomaly="5", n_shown=0)
    assert [row["method"] for row in found.rows] == [
        *("deep_svdd", "nll", "pca", "mean", "knn", "isolation_forest", "fre"),
    ]
    rows = {row["method"]: row for row in found.rows}
    alone = Baseline("fre", features="random").fit(SampleSet.from_data(data, "train"))
    y = data.tensors("test")[1].numpy()
    auroc = roc_auc_score(y == 5, alone.decision_function(SampleSet.from_data(data, "test")))
    assert rows["fre"]["auroc"] == pytest.approx(auroc) and auroc > 0.75
    only = detect(model, data, features="random", baselines=False, anomaly="5", n_shown=0)
    assert [row["method"] for row in only.rows] == ["deviance", "fre"]
    assert only.rows[1]["auroc"] == pytest.approx(auroc)


def test_model_features_are_last_hidden_layer(tmp_path):
    model, x = moved("conv_ae", hidden_dims=(3, 5)), images(30)
    path = aezoo.save_model(model, tmp_path / "saved")
    with torch.no_grad():
        expected = nn.Sequential(*list(model.encoder)[:4])(x).flatten(1)
    assert torch.allclose(FrozenFeatures(str(path), (1, 8, 8))(x), expected, atol=1e-6)
    found = Baseline("fre", features=str(path)).fit(SampleSet.from_data(x))
    assert np.isfinite(found.decision_scores_).all()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_resnet_features_resize_and_normalise_images(channels, tmp_path, monkeypatch):
    """Weights are not downloaded; here random ones are stored where torchvision puts them."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(AezooError, match="fetch them once, python -c") as refused:
        FrozenFeatures("resnet18", (channels, 8, 8))
    assert "\n" not in str(refused.value)
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    torch.save(net.state_dict(), tmp_path / "checkpoints" / name)
    state = torch.get_rng_state()
    frozen = FrozenFeatures("resnet18", (channels, 8, 12))
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(detect_features, "_SIDE", 32)
    x, seen = images(2, (channels, 8, 12)), {}
    net.layer3.register_forward_hook(lambda module, given, output: seen.update(features=output))
    with torch.no_grad():
        large = nn.functional.interpolate(x, (32, 48), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
        net(torchvision.transforms.functional.normalize(large, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert torch.allclose(frozen(x), seen["features"].flatten(1), atol=1e-5)
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.net.training
    monkeypatch.setattr(detect_features, "_MAX_FEATURES", 600)
    # 256 x 2 x 3 values are too many
    pooled = nn.functional.adaptive_avg_pool2d(seen["features"], (1, 2)).flatten(1)
    assert torch.allclose(frozen(x), pooled, atol=1e-5)
    (tmp_path / "checkpoints" / name).write_bytes(b"no weights")
    with pytest.raises(AezooError, match="contains no weights of resnet18"):
        FrozenFeatures("resnet18", (channels, 8, 8))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet50", (9,), "takes images of 1 or 3 channels"),
        ("resnet50", (2, 8, 8), "takes images of 1 or 3 channels"),
        ("nothing", (9,), "features takes random, resnet18"),
        ("", (9,), "features takes random, resnet18"),
        ("vgg16", (9,), "takes images"),
    ],
)
def test_unavailable_features_are_refused_in_one_line(name, shape, message):
    with pytest.raises(AezooError, match=message) as refused:
        FrozenFeatures(name, shape)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_fre_keeps_half_as_many_directions_as_samples(n):
    x = images(n)
    found = Baseline("fre", features="random").fit(SampleSet.from_data(x))
    net = random_features((1, 8, 8))
    with torch.no_grad():
        f = net(x)[-1].flatten(1).double().numpy()
    pca = PCA(max(n // 2, 1)).fit(f)
    assert np.allclose(found.decision_scores_, ((f - pca.inverse_transform(pca.transform(f))) ** 2).sum(1), atol=1e-5)


# ---- on the command line ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense_ae", "dagmm", "ganomaly"])
def test_detect_compares_scores_on_held_out_digits(name, tmp_path, capsys):
    """`aezoo fit --data.train_classes`, then `aezoo detect`: the scores and baselines."""
    flags = ["--data.name=digits", "--data.train_classes=[3]", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    main(["fit", f"--model={name}", *flags, f"--trainer.default_root_dir={tmp_path / 'runs'}"])
    (run,) = (path.parent for path in (tmp_path / "runs").rglob("config.yaml"))
    capsys.readouterr()
    # saturating activations, such as dagmm's tanh, are not supported by deep_svdd
    score = "nll,mse,sap,nap,mahalanobis" + ("" if name == "dagmm" else ",deep_svdd")
    main(["detect", f"--ckpt_path={run}", f"--score={score}", "--normal=3", "--features=random", "--svdd_epochs=3"])
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.split()}
    for method in (*score.split(","), "pca", "mean", "knn", "isolation_forest", "fre"):
        assert 0 < float(rows[method][1]) <= 1, method
    assert "one-vs-rest: 3 is normal" in printed and (run / "detect" / "scores.csv").is_file()
    if name == "dagmm":
        with pytest.raises(SystemExit):
            main(["detect", f"--ckpt_path={run}", "--score=deep_svdd"])
        assert "by its Tanh" in capsys.readouterr().err
