"""Folders of MultiVae, compared with outputs of MultiVae."""

import itertools
import math
import pickle

import pytest
import torch
from folders_of_pythae import Bomb, Folders, assert_close, assert_refused, noise

import aezoo
from aezoo.cli.main import main

FOLDERS = Folders("multivae")
REFUSED = {"JMVAE": "train jmvae", "JNF": "train jnf", "TELBO": "train telbo", "MoPoE": "train mopoe_vae"}
NAMES = {
    "MVAE": "mvae", "MVTCAE": "mvtcae", "CRMVAE": "crmvae", "DMVAE": "dmvae", "MMVAE": "mmvae",
    "MMVAEPlus": "mmvae_plus", "CMVAE": "cmvae",
}  # fmt: skip
BATCH = 4


def whole(parts):
    """Concatenate parts: along their first dimension, or flattened."""
    alike = len({part.shape[2:] for part in parts}) == 1
    return torch.cat([part if alike else part.flatten(1) for part in parts], 1)


def terms_of(case, model, want, x):
    """Our terms and theirs, by name."""
    draws = [want[key] for key in sorted(want, key=lambda key: (len(key), key)) if key.startswith("noise")]
    theirs = {key.removeprefix("term_"): value for key, value in want.items() if key.startswith("term_")}
    m = len(model.sizes)
    if "eps" in want:
        n = len(want["eps"])
        with noise(*([want["eps"]] if case == "MMVAE" else [want["eps"], want["private"]])):
            found = model.loss(x.repeat(n // BATCH, *[1] * (x.ndim - 1)))
        return {"loss": (found["loss"], want["loss"] / n)}
    if case == "CRMVAE":
        draws = [draws[0], torch.stack(draws[1:], 1)]
    elif case == "DMVAE":
        draws = [torch.stack([torch.cat(draws[i : i + 1 + m], 1) for i in range(0, len(draws), 1 + m)], 1)]
    elif case.startswith("MVAE"):
        draws = [torch.stack(draws, 1)]
    with noise(*draws):
        found = model.loss(x)
    pairs = {} if case in ("CRMVAE", "DMVAE") else {"loss": (found["loss"], want["loss"])}
    if case == "MVTCAE":
        kls = sum(value for name, value in theirs.items() if name.startswith("kld"))
        likelihoods = sum(theirs[name] for name in FOLDERS.config(case)["input_dims"])
        pairs |= {"nll": (BATCH * found["nll"], likelihoods), "kl": (BATCH * found["kl"], theirs["joint_divergence"])}
        pairs |= {"parts_kl": (BATCH * found["parts_kl"], kls)}
    if case == "CRMVAE":
        joint = sum(value for name, value in theirs.items() if name.endswith("from_joint"))
        own = sum(value for name, value in theirs.items() if name.startswith("recon")) - joint
        kls = sum(value for name, value in theirs.items() if name.startswith("kl_"))
        pairs |= {"nll": (found["nll"], joint), "own_nll": (found["own_nll"], own)}
        pairs |= {"kl": (found["kl"], theirs["joint_divergence"]), "parts_kl": (found["parts_kl"], kls)}
    if case == "DMVAE":
        pairs |= {"nll + beta kl": (found["nll"] + 2 * found["kl"], theirs["joint"])}
    if case.startswith("MVAE"):
        pairs |= {"kl": (found["kl"], theirs[f"kld{'_'.join(sorted(FOLDERS.config(case)['input_dims']))}"])}
    return pairs


def assert_same(case, model):
    want, names = FOLDERS.expected(case), [*FOLDERS.config(case)["input_dims"]]
    x = whole([want[f"x_{name}"] for name in names])
    assert x.shape[1:] == model.input_shape
    pairs = {}
    with torch.no_grad():
        for chosen in itertools.chain(*(itertools.combinations(range(len(names)), n + 1) for n in range(len(names)))):
            which = "+".join(names[i] for i in chosen)
            if f"code_{which}" in want:
                samples = whole([want[f"from_{which}_{name}"] for name in names])
                assert samples.std() > 0.03 and want[f"code_{which}"].std() > 0.05
                pairs[f"code of {which}"] = model.infer(x, chosen)[0], want[f"code_{which}"]
                pairs[f"samples from {which}"] = model.reconstruct_from(x, chosen), samples
        if f"code_{'+'.join(names)}" in want:
            pairs["code"] = model.encode(x), want[f"code_{'+'.join(names)}"]
    assert len(pairs) >= 2 * len(names)
    assert_close(pairs | terms_of(case, model, want, x))


@pytest.mark.parametrize("case", [case for case in FOLDERS.cases if case not in REFUSED])
def test_codes_and_losses_are_those_of_multivae(tmp_path, case):
    imported = aezoo.import_model(FOLDERS.write(case, tmp_path / "multivae"))
    kind = FOLDERS.config(case)["name"].removesuffix("Config")
    assert type(imported.model) is aezoo.registry.model_class(NAMES[kind])
    parts = "image (1x4x5), label (3)" if "image" in FOLDERS.config(case)["input_dims"] else "b (1x3x4), a (2x3x4), c"
    assert imported.found.startswith(f"MultiVae, {kind}, {parts}") and imported.found.endswith("codes of 3")
    assert_same(case, imported.model)
    saved = aezoo.save_model(imported.model, tmp_path / "saved")
    assert_same(case, aezoo.load_model(saved))


def test_what_differs_and_the_layout_are_noted(tmp_path):
    notes = {
        case: aezoo.import_model(FOLDERS.write(case, tmp_path / case)).notes for case in ("MVTCAE", "CMVAE", "DMVAE")
    }
    assert notes["MVTCAE"] == ("a sample is a vector of 23 values: image, label, each flattened",)
    assert notes["DMVAE"][0] == "a sample has the parts b, a, c one after the other along its first dimension"
    assert "a random part" in " ".join(notes["CMVAE"]) and "cross_nelbo" in notes["DMVAE"][1]


@pytest.mark.parametrize("case", REFUSED)
def test_classes_without_a_model_are_refused(tmp_path, case):
    assert_refused(FOLDERS.write(case, tmp_path), f"MultiVae's {case} cannot be read: .*: {REFUSED[case]}")


def test_networks_that_are_code_are_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = FOLDERS.write("MVTCAE", tmp_path / "code", custom_architectures=["encoders"])
    (folder / "encoders.pkl").write_bytes(pickle.dumps(Bomb()))
    assert_refused(folder, "it has networks of its own .* never run")
    FOLDERS.write("MVTCAE", folder, pickled={"model_state_dict": Bomb()})
    assert_refused(folder, "contains objects that could run code")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("case", "settings", "message"),
    [
        ("MVTCAE", {"name": "x.MyConfig"}, r"there is no model for MultiVae's 'x.My'; classes that can be read: MVAE"),
        ("MVTCAE", {"input_dims": None}, "there is no input_dims"),
        ("MVTCAE", {"input_dims": {"image": [1, 4, 5]}}, "n_modalities is different"),
        ("MVTCAE", {"input_dims": {"image": [1, 4, 5]}, "n_modalities": 1}, "only one modality: train vae"),
        ("MVTCAE", {"input_dims": {"image": [1, 4, 5], "label": [4]}}, "encoders.label.layers.0.0 has the shapes"),
        ("MVTCAE", {"input_dims": {"image": [1, 4, 5], "la\nbel": [3]}}, "names of the modalities"),
        ("MVTCAE", {"input_dims": {"image": [1, 4, 5], "y": [3]}}, "there is no decoders.y.layers.0.0.bias"),
        ("MVTCAE", {"input_dims": {"image": [10**12], "label": [3]}}, "image of input_dims must be a list"),
        ("MVTCAE", {"input_dims": {"image": [10**9], "label": [3]}}, "encoders.image.layers.0.0 has the shapes"),
        ("MVTCAE", {"input_dims": {"image": "x", "label": [3]}}, "image of input_dims must be a list"),
        ("MVTCAE", {"latent_dim": 2**40}, "latent_dim must be a whole number"),
        ("MVTCAE", {"latent_dim": 4}, r"encoders.image.embedding .* require \(4, 512\)"),
        ("MVTCAE", {"alpha": 7}, "alpha must be from 0 to 1"),
        ("MVTCAE", {"beta": math.inf}, "beta must be a finite number"),
        (
            "MVTCAE",
            {"decoders_dist": {"image": "bernoulli", "label": "normal"}},
            "decoders_dist of image is 'bernoulli', but",
        ),
        ("MVTCAE", {"decoder_dist_params": {"image": {"scale": 0.5}}}, "the scales of the modalities differ"),
        ("MVTCAE", {"decoder_dist_params": {"image": 3}}, "decoder_dist_params must hold a dictionary"),
        ("MVTCAE", {"decoder_dist_params": {"image": {"scale": -1}}}, "scale must be above 0"),
        ("MVTCAE", {"uses_likelihood_rescaling": True}, "have weights .uses_likelihood_rescaling"),
        (
            "CRMVAE",
            {"uses_likelihood_rescaling": True, "rescale_factors": {"a": 2}},
            "have weights .uses_likelihood_rescaling",
        ),
        ("MVAE_apart", {"use_subsampling": False}, "use_subsampling is off"),
        ("MVAE_alike", {"k": 10**9}, "n_subsets must be from 0"),
        ("MMVAE", {"prior_and_posterior_dist": "laplace_with_softmax"}, "prior_and_posterior_dist must be normal"),
        ("MMVAE", {"K": 10}, "K is 10"),
        ("DMVAE", {"modalities_specific_dim": {"a": 2, "b": 2, "c": 1}}, "modalities_specific_dim must be one number"),
        ("DMVAE", {"modalities_specific_dim": None}, "modalities_specific_dim must be one number"),
        ("DMVAE", {"modalities_specific_betas": None}, "modalities_specific_betas must be beta"),
        ("CMVAE", {"number_of_clusters": 10**9}, "there is no logvar_clusters.10"),
        ("CMVAE", {"number_of_clusters": 3}, "is unknown in this format"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, case, settings, message):
    assert_refused(FOLDERS.write(case, tmp_path, **settings), message)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("MMVAE", {"prior_log_var": torch.ones(1, 3)}, "prior_log_var is not 0"),
        ("MMVAEPlus", {"logvars_priors.shared": torch.ones(1, 5)}, "logvars_priors.shared is not 0"),
        ("MMVAEPlus", {"logvars_priors.a": torch.ones(1, 3)}, "logvars_priors.a has the shape"),
        ("MVTCAE", {"encoders.label.layers.1.0.weight": None}, "there is no encoders.label.layers.1.0.weight"),
        (
            "MVTCAE",
            {"encoders.label.layers.1.0.weight": torch.ones(512, 8)},
            "encoders.label.layers.1.0 has the shapes",
        ),
        ("MVTCAE", {"decoders.label.layers.1.0.bias": torch.full((3,), math.nan)}, "contains NaN or infinite values"),
        ("MVTCAE", {"encoders.image.layers.0.0.bias": torch.ones(())}, "encoders.image.layers.0.0 has the shapes"),
        ("MVTCAE", {"joint_encoder.fc1.bias": torch.ones(3)}, "joint_encoder.fc1.bias is unknown"),
    ],
)
def test_wrong_weights_are_refused(tmp_path, case, change, message):
    state = {key: value for key, value in {**FOLDERS.state(case), **change}.items() if value is not None}
    assert_refused(FOLDERS.write(case, tmp_path, state=state), message)


def test_equal_weights_of_likelihoods_are_read(tmp_path):
    settings = {"uses_likelihood_rescaling": True, "rescale_factors": {"image": 1, "label": 1.0}}
    assert_same("MVTCAE", aezoo.load_model(FOLDERS.write("MVTCAE", tmp_path, **settings)))


def test_command_reads_a_folder_of_the_hub(hub, tmp_path, capsys):
    folder = FOLDERS.write("MVAE_apart", tmp_path / "multivae")
    hub.put("user/mvae", {path.name: path.read_bytes() for path in folder.iterdir()})
    main(["import", "hf://user/mvae", str(tmp_path / "out")])
    assert "found MultiVae, MVAE, image (1x4x5), label (3)" in capsys.readouterr().out
    assert_same("MVAE_apart", aezoo.load_model(tmp_path / "out"))
