"""Folders of pythae, compared with outputs of pythae."""

import math
import pickle

import pytest
import torch
from folders_of_pythae import CLOSE, Bomb, Folders, assert_close, assert_refused, noise

import aezoo
from aezoo.cli.main import main

FOLDERS = Folders("pythae")
REFUSED = {
    "HVAE": "train hvae",
    "RHVAE": "train rhvae",
    "PoincareVAE": "train poincare_vae",
    "VAE_IAF": "train vae_iaf",
}
NAMES = {
    "AE": "dense_ae", "VAE": "vae", "BetaVAE": "beta_vae", "DisentangledBetaVAE": "annealed_vae", "VAMP": "vamp_vae",
    "BetaTCVAE": "beta_tcvae", "FactorVAE": "factor_vae", "INFOVAE_MMD": "info_vae", "WAE_MMD": "wae_mmd",
    "Adversarial_AE": "aae", "VAEGAN": "vae_gan", "IWAE": "iwae", "CIWAE": "ciwae", "MIWAE": "miwae", "PIWAE": "piwae",
    "SVAE": "hyperspherical_vae", "VQVAE": "vq_vae", "RAE_L2": "rae", "RAE_GP": "rae", "MSSSIM_VAE": "msssim_vae",
    "VAE_LinNF": "vae_flow",
}  # fmt: skip


def constant(model):
    """The constant that pythae leaves out of the density of a sample of 20 values."""
    scale = getattr(model.likelihood, "log_scale", None)
    return 0.0 if scale is None else 20 * (scale.item() + 0.5 * math.log(2 * math.pi))


def terms_of(case, model, want):
    """Terms of the loss, given noise in our order, which may differ from pythae's."""
    x, draws = want["x"], [want[key] for key in sorted(want) if key.startswith("noise")]
    if case.startswith(("MIWAE", "PIWAE")):
        draws = [draws[0].transpose(1, 2)]
    if case == "Adversarial_AE_deterministic":
        draws = draws[1:]
    if case == "FactorVAE":
        permuted = draws.pop()
        model.permute_dims = lambda z: permuted
    if case == "RAE_GP":
        draws = [torch.ones_like(x)]
    if case == "SVAE":
        model.family.sample = lambda *_: draws[0]
    with noise(*([] if case == "SVAE" else draws)):
        return model.loss(x)


def pairs_of(case, model, want):
    """Our terms and theirs, by our names."""
    found, off = terms_of(case, model, want), constant(model)
    recon, reg, loss = (want.get(key) for key in ("recon_loss", "reg_loss", "loss"))
    nll, total = found["nll"] - off, found["loss"] - off
    if case == "AE":
        return {"nll": (nll, loss), "loss": (total, loss)}
    if case.startswith("BetaTCVAE"):
        weighted = 1.5 * found["mi"] + 6 * found["tc"] + 0.7 * found["dwkl"]
        same = {"nll": (nll, recon)}
        return same if case.endswith("mss") else {**same, "kl": (weighted, reg), "loss": (total, loss)}
    if case == "FactorVAE":
        return {
            "nll": (nll, recon),
            "loss": (total, want["autoencoder_loss"]),
            "discriminator": (found["discriminator"], want["discriminator_loss"]),
            "tc": (model.discriminator(want["noise_1"]).flatten(), want["ratio"]),
        }
    if case.startswith("Adversarial"):
        scale = 0.5 if case.endswith("deterministic") else 1.0
        return {
            "loss": (scale * total, want["autoencoder_loss"]),
            "nll": (nll, recon),
            "discriminator": (found["discriminator"], want["discriminator_loss"]),
        }
    if case.startswith("WAE"):
        scale = 2.5 if case.endswith("imq") else 1.0
        return {
            "loss": (scale * total, loss),
            "nll": (scale * nll, recon),
            "mmd": (found["mmd"], want["mmd_loss"]),
        }
    if case.endswith("IWAE"):  # their loss has the gradient of the bound, but another value
        (gradient,) = torch.autograd.grad(found["loss"], [*model.encoder.parameters()][-1])
        return {"nll": (nll, recon), "kl": (found["kl"], reg), "gradient": (gradient[:3], want["gradient"])}
    if case.startswith("VQVAE"):
        factor = 1.0 if case.endswith("ema") else 3 / 1.7
        commitment = want["vq_loss"] if case.endswith("ema") else want["vq_loss"] * 0.4 / 2.1
        return {
            "loss": (total, factor * loss),
            "nll": (nll, factor * recon),
            "commitment": (0.4 / 3 * found["commitment"], commitment),
        }
    if case == "RAE_L2":
        rest = found["loss"] - 0.01 * found["l2"] - off
        return {"nll": (nll, recon), "code": (found["code"], want["embedding_loss"]), "loss": (rest, loss)}
    if case == "RAE_GP":
        rest = found["loss"] - 0.02 * found["gp"] - off
        theirs = loss - 0.02 * want["gen_reg_loss"]
        return {"nll": (nll, recon), "code": (found["code"], want["embedding_loss"]), "loss": (rest, theirs)}
    if case == "VAEGAN":
        return {"kl": (found["kl"], want["encoder_loss"] - want["recon_loss"])}
    if case == "MSSSIM_VAE":
        return {"kl": (found["kl"], (want["loss"] - want["recon_loss"]) / 0.2)}
    if case.startswith("VAE_LinNF"):
        mean, log_var, steps = model.amortised(want["x"])
        share, (_, log_det) = 0.01 if case.endswith("planar") else 1.0, model.flow(mean, steps)
        return {
            "nll": (nll, recon),
            "log_var": (log_var, want["log_var"]),
            # pythae adds 1e-4 to the determinant of each planar step
            "log_det": (share * log_det, share * want["log_det"]),
        }
    pairs = {"nll": (nll, recon), "kl": (found["kl"], reg), "loss": (total, loss)}
    return pairs | ({"mmd": (found["mmd"], want["mmd_loss"])} if "mmd_loss" in want else {})


def assert_same(case, model):
    want = FOLDERS.expected(case)
    x = want["x"]
    with torch.no_grad():
        code = model.encode(x)
        torch.testing.assert_close(code.flatten(1), want["code"].flatten(1), **CLOSE)
        torch.testing.assert_close(model(x), want["reconstruction"], **CLOSE)
    assert code.std() > 0.1 and want["reconstruction"].std() > 0.04
    assert_close(pairs_of(case, model, want))


@pytest.mark.parametrize("case", [case for case in FOLDERS.cases if case not in REFUSED])
def test_codes_and_losses_are_those_of_pythae(tmp_path, case):
    folder = FOLDERS.write(case, tmp_path / "pythae")
    imported = aezoo.import_model(folder)
    kind = FOLDERS.config(case)["name"].removesuffix("Config").removesuffix("_")
    assert type(imported.model) is aezoo.registry.model_class(NAMES[kind])
    assert imported.found == f"pythae, {kind}, samples of 1x4x5, codes of 3"
    assert_same(case, imported.model)
    saved = aezoo.save_model(imported.model, tmp_path / "saved")
    assert_same(case, aezoo.load_model(saved))


def test_indices_of_codes_are_those_of_pythae(tmp_path):
    for case in ("VQVAE_gradient", "VQVAE_ema"):
        model, want = aezoo.load_model(FOLDERS.write(case, tmp_path / case)), FOLDERS.expected(case)
        assert torch.equal(model.encode_indices(want["x"]).flatten(), want["indices"].flatten())
        assert len(want["indices"].unique()) > 2


def test_what_differs_is_noted(tmp_path):
    silent = ("AE", "VAE_mse", "BetaVAE", "FactorVAE", "SVAE", "VQVAE_ema", "WAE_MMD_rbf", "INFOVAE_MMD_imq")
    for case in silent:
        assert aezoo.import_model(FOLDERS.write(case, tmp_path / case)).notes == ()
    noted = {
        "BetaTCVAE_mss": "1/N", "VAEGAN": "untrained", "MIWAE": "n_groups", "RAE_GP": "Jacobian", "RAE_L2": "l2",
        "MSSSIM_VAE": "similarity", "VQVAE_gradient": "times 1.76", "WAE_MMD_imq": "divided by", "VAMP": "warm-up",
        "VAE_LinNF_planar": "1e-4",
    }  # fmt: skip
    for case, word in noted.items():
        assert word in " ".join(aezoo.import_model(FOLDERS.write(case, tmp_path / case)).notes)


@pytest.mark.parametrize("case", REFUSED)
def test_classes_without_a_model_are_refused(tmp_path, case):
    assert_refused(FOLDERS.write(case, tmp_path), f"pythae's {case} cannot be read: .*: {REFUSED[case]}")


@pytest.mark.parametrize("part", ["encoder", "decoder", "discriminator"])
def test_networks_that_are_code_are_never_run(tmp_path, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    folder = FOLDERS.write("Adversarial_AE_drawn", tmp_path / "code", **{f"uses_default_{part}": False})
    (folder / f"{part}.pkl").write_bytes(pickle.dumps(Bomb()))
    assert_refused(folder, f"its {part} is not pythae's default but code, {part}.pkl, which is never run")
    FOLDERS.write("VAE_mse", folder, pickled={"model_state_dict": Bomb()})
    assert_refused(folder, "contains objects that could run code")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("case", "settings", "message"),
    [
        (
            "AE",
            {"name": "evil.ModelConfig"},
            r"there is no model for pythae's 'evil.Model'; classes that can be read: AE",
        ),
        ("AE", {"name": 3}, "name must be a str"),
        ("AE", {"input_dim": None}, "input_dim must be a list of 1 to 4 whole numbers"),
        ("AE", {"input_dim": [1, 4.0, 5]}, "input_dim must be a list"),
        ("AE", {"input_dim": [10**9, 10**9, 10**9]}, r"encoder.layers.0.0 has the shapes \(512, 20\)"),
        ("AE", {"input_dim": [1, 4, 4]}, r"require \(any number, 16\)"),
        ("AE", {"latent_dim": 4}, r"decoder.layers.0.0 .* require \(512, 4\)"),
        ("AE", {"latent_dim": 2**70}, "latent_dim must be a whole number"),
        ("AE", {"latent_dim": True}, "latent_dim must be a int"),
        ("AE", {"uses_default_encoder": "yes"}, "uses_default_encoder must be a bool"),
        ("VAE_mse", {"reconstruction_loss": "l1"}, "reconstruction_loss must be mse or bce, got 'l1'"),
        ("BetaVAE", {"beta": 10**400}, "beta must be a finite number"),
        ("BetaVAE", {"beta": math.nan}, "beta must be a finite number"),
        ("BetaVAE", {"beta": "x"}, "beta must be a float"),
        ("BetaVAE", {"beta": -1}, "model_config.json: beta must be at least 0"),
        ("INFOVAE_MMD_imq", {"lbd": 0.001}, "mmd_weight must be at least 1 - alpha"),
        ("INFOVAE_MMD_imq", {"scales": [1.0, "x"]}, "scales must be a list of numbers"),
        ("INFOVAE_MMD_imq", {"scales": 3}, "scales must be a list of numbers"),
        ("INFOVAE_MMD_imq", {"scales": []}, "kernel_scales must be one or more numbers above 0"),
        ("WAE_MMD_imq", {"reconstruction_loss_scale": 0}, "reconstruction_loss_scale must be above 0"),
        ("WAE_MMD_imq", {"kernel_bandwidth": 1e200}, "kernel_scales takes a list, got .inf"),
        ("VAE_LinNF_planar", {"flows": "a\nb"}, "flows must all be"),
        ("VAE_mse", {"input_dim": "a\nb"}, "input_dim must be a list"),
        ("WAE_MMD_imq", {"kernel_choice": "laplace"}, "kernel_choice must be imq or rbf"),
        ("VAEGAN", {"adversarial_loss_scale": 1.5}, "gamma must be at least 0"),
        ("VAMP", {"number_components": 6}, "pseudo_inputs.0 has the shapes"),
        ("IWAE", {"number_samples": 10**8}, "n_samples must be from 1 to"),
        ("MIWAE", {"number_samples": 0}, "number_samples must be a whole number above 0"),
        ("VQVAE_gradient", {"num_embeddings": 9}, r"quantizer.embeddings.weight has the shape \(8, 1\), not \(9, 1\)"),
        ("VQVAE_gradient", {"use_ema": True}, "there is no quantizer.cluster_size"),
        ("VQVAE_ema", {"decay": 1.0}, "decay in"),
        ("MSSSIM_VAE", {"window_size": 4}, "window must be odd"),
        ("VAE_LinNF_planar", {"flows": ["Planar", "Radial"]}, "flows must all be Planar or all Radial"),
        ("VAE_LinNF_planar", {"flows": ["Planar"]}, "net.1.b, net.1.u, net.1.w is unknown"),
        ("VAE_LinNF_planar", {"flows": [["Planar"]]}, "flows must all be"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, case, settings, message):
    assert_refused(FOLDERS.write(case, tmp_path, **settings), message)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("VAE_mse", {"encoder.log_var.weight": None}, "there is no encoder.log_var.weight"),
        ("VAE_mse", {"encoder.layers.1.0.weight": torch.ones(512, 512)}, "encoder.layers.1.0.weight is unknown"),
        ("VAE_mse", {"encoder.log_var.weight": torch.ones(4, 512)}, "encoder.log_var has the shapes"),
        ("VAE_mse", {"encoder.layers.0.0.bias": torch.ones(())}, "encoder.layers.0.0 has the shapes"),
        ("VAE_mse", {"encoder.embedding.bias": torch.ones(1)}, "encoder.embedding has the shapes"),
        ("VAE_mse", {"decoder.layers.1.0.bias": torch.full((20,), math.nan)}, "contains NaN or infinite values"),
        ("VAE_mse", {"decoder.layers.1.0.bias": torch.ones(20, dtype=torch.long)}, "int64, not floating-point"),
        ("VAE_mse", {"decoder.layers.1.0.bias": torch.ones(1).expand(20)[:0]}, "decoder.layers.1.0 has the shapes"),
        ("VAE_mse", {"decoder.layers.1.0.bias": 3}, "is a int, not a tensor"),
        (
            "FactorVAE",
            {"discriminator.layers.10.weight": torch.ones(3, 1000)},
            "discriminator.layers.10 has the shapes",
        ),
        (
            "VAE_LinNF_planar",
            {"net.1.u": torch.full((1, 3), -9.0), "net.1.w": torch.ones(1, 3)},
            "net.1 is not an invertible",
        ),
        ("VAE_LinNF_planar", {"net.1.u": torch.ones(3, 1, 1)[:2]}, "net.1 has the shapes"),
        ("VAE_LinNF_radial", {"net.0.log_alpha": torch.full((1,), 99.0)}, "net.0 has a factor that"),
    ],
)
def test_wrong_weights_are_refused(tmp_path, case, change, message):
    state = {key: value for key, value in {**FOLDERS.state(case), **change}.items() if value is not None}
    assert_refused(FOLDERS.write(case, tmp_path, state=state), message)


def test_content_of_other_kinds_is_refused(tmp_path):
    for pickled in ([1, 2], {"model_state_dict": [1]}, {"model_state_dict": {3: torch.ones(1)}}):
        assert_refused(
            FOLDERS.write("VAE_mse", tmp_path, pickled=pickled),
            "contains no named weights|the file has no decoder",
        )
    (tmp_path / "model.pt").write_bytes(b"\x80\x02damaged")
    assert_refused(tmp_path, "damaged")
    (tmp_path / "model_config.json").write_text("[" * 1000)
    assert_refused(tmp_path, "model_config.json")


def test_command_reads_a_folder_of_the_hub(hub, tmp_path, capsys):
    folder = FOLDERS.write("VAE_bce", tmp_path / "pythae")
    files = {f"models/vae/{path.name}": path.read_bytes() for path in folder.iterdir()}
    sha = hub.put("user/vae", files)
    hub.put("user/vae", {"models/vae/model_config.json": b"{}"})
    main(["import", f"hf://user/vae/models/vae@{sha}", str(tmp_path / "out")])
    assert "found pythae, VAE, samples of 1x4x5" in capsys.readouterr().out
    assert_same("VAE_bce", aezoo.load_model(tmp_path / "out"))
    assert_same("VAE_bce", aezoo.load_model(folder / "model.pt"))
