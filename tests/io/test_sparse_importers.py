"""Sparse autoencoders of other libraries: codes and outputs equal the originals', and invalid files are refused.

The fixtures were written by tests/sparse_autoencoder_fixtures.py with these libraries.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import aezoo
from aezoo.cli.main import main
from aezoo.io import scale_folding
from aezoo.registry import name_of

ROOT = Path(__file__).parent.parent / "fixtures" / "sparse_autoencoders"
N = 10
# cases that need a certain folder name
PATHS = {
    "gemma_scope": "google+gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_59",
    "gemma_scope_embedding": "google+gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6",
    "gemma_scope_transcoder": "google+gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_76",
    "gemma_scope_2": "google+gemma-scope-2-4b-pt/resid_post/layer_17_width_16k_l0_big",
    "gemma_scope_2_without_config": "google+gemma-scope-2-4b-pt/resid_post_all/layer_3_width_16k_l0_big",
    "gemma_scope_2_transcoder": "google+gemma-scope-2-4b-pt/transcoder/layer_17_width_16k_l0_big",
    "gemma_scope_2_skip_transcoder": "google+gemma-scope-2-4b-pt/transcoder_all/layer_3_width_16k_l0_big_affine",
    "gemma_scope_2_skip_transcoder_with_config": "google+gemma-scope-2-4b-pt/transcoder/"
    "layer_17_width_16k_l0_small_affine",
    "llama_scope": "fnlp+Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L8R-8x",
    "llama_scope_r1": "fnlp+Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k/L5R",
    "qwen_scope": "Qwen+SAE-Res-Qwen3-8B-Base-W64K-L0_3/layer0.sae.pt",
}
CASES = sorted(path.stem for path in ROOT.glob("*.safetensors"))
# the model of the zoo, by the first of these words in the name of a case
MODELS = {
    "transcoder": "transcoder",
    "CrossCoder": "crosscoder",
    "atryoshka": "matryoshka_sae",
    "batchtopk": "batch_topk_sae",
    "BatchTopK": "batch_topk_sae",
    "abstopk": "abs_topk_sae",
    **dict.fromkeys(("topk", "TopK", "qwen", "sparsify"), "topk_sae"),
    **dict.fromkeys(("gated", "Gated"), "gated_sae"),
    **dict.fromkeys(("jumprelu", "JumpRelu", "gemma", "llama"), "jumprelu_sae"),
    **dict.fromkeys(("standard", "AutoEncoder", "openai_relu"), "sae_l1"),
}


def source(case):
    return ROOT / PATHS.get(case, case)


def expected(case):
    return load_file(ROOT / f"{case}.safetensors")


def computed(model, x):
    """Code and output; a transcoder reads the first row and predicts the second."""
    transcodes = name_of(type(model)) == "transcoder"
    given = torch.stack([x, torch.zeros_like(x)], 1) if transcodes else x
    with torch.no_grad():
        code = model.encode(given)
        assert torch.equal(model(given), model.decode(code))
        return code[:, :N], model.decode(code)[:, 1] if transcodes else model.decode(code)


def test_every_format_and_kind_has_a_case():
    from aezoo.io.importers import IMPORTERS

    assert len(CASES) >= 55 and set(PATHS) <= set(CASES)
    assert set(IMPORTERS) >= {"sae_lens", "sparsify", "dictionary_learning", "gemma_scope", "gemma_scope_2",
                              "llama_scope", "qwen_scope", "openai_sae"}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_codes_and_outputs_are_those_of_the_original(case):
    imported = aezoo.import_model(source(case))
    want = expected(case)
    code, output = computed(imported.model, want["x"])
    assert name_of(type(imported.model)) == next(model for word, model in MODELS.items() if word in case)
    assert torch.equal((code != 0).sum(1), (want["code"] != 0).sum(1))
    torch.testing.assert_close(code, want["code"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, want["output"], rtol=1e-5, atol=1e-5)
    assert not imported.model.training and f"{N} latents" in imported.found
    assert all("\n" not in line for line in (imported.found, *imported.notes))


@pytest.mark.parametrize("case", ["sae_lens_topk_layer_norm", "sae_lens_skip_transcoder", "llama_scope",
                                  "dictionary_learning_MatryoshkaBatchTopKSAE"])  # fmt: skip
def test_imported_model_is_saved_and_loaded(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["import", str(source(case)), "out"])
    said = capsys.readouterr().out
    assert said.startswith("found ") and "out: " in said
    x = expected(case)["x"]
    direct = computed(aezoo.load_model(source(case)), x)
    for model in (aezoo.load_model("out"), aezoo.import_model(source(case)).model):
        assert all(map(torch.equal, computed(model, x), direct))


def test_scale_missing_in_the_file_can_be_given_and_folded(tmp_path):
    folder = copied("sae_lens_standard", tmp_path)
    change_config(folder, normalize_activations="expected_average_only_in")
    imported = aezoo.import_model(folder)
    assert any("mean norm" in note for note in imported.notes)
    x = expected("sae_lens_standard")["x"]
    folded = scale_folding.fold(imported.model, 3.0)
    torch.testing.assert_close(folded(3 * x), 3 * imported.model(x))


def test_llama_scope_thresholds_count_norms_of_directions(tmp_path):
    """As in the authors' standardize_parameters_of_dataset_activation_scaling and transform_to_unit_decoder_norm."""
    path, stretch = copied("llama_scope", tmp_path), torch.linspace(0.5, 2, N)
    change_config(path, "hyperparams.json", dataset_average_activation_norm={"in": 1.7, "out": 0.9})
    file = path / "checkpoints" / "final.safetensors"
    W = load_file(file)
    W["decoder.weight"] = W["decoder.weight"] * stretch
    save_file(W, file)
    read_by, written_by = 6**0.5 / 1.7, 6**0.5 / 0.9
    x = expected("llama_scope")["x"]
    decoder = W["decoder.weight"] * read_by / written_by
    pi = (x @ W["encoder.weight"].t() + W["encoder.bias"] / read_by) * decoder.norm(dim=0)
    f = torch.where(pi > 0.31, pi, 0).relu()
    want = f @ (decoder / decoder.norm(dim=0)).t() + W["decoder.bias"] / written_by
    code, output = computed(aezoo.load_model(path), x)
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(code > 0, f > 0) and 0 < (f > 0).sum() < f.numel()
    change_config(path, "hyperparams.json", sparsity_include_decoder_norm=False)
    pi = read_by * x @ W["encoder.weight"].t() + W["encoder.bias"]
    f = torch.where(pi > read_by * 0.31, pi, 0)
    torch.testing.assert_close(computed(aezoo.load_model(path), x)[0], f, rtol=1e-5, atol=1e-5)
    assert ((pi > 0.31) != (pi > read_by * 0.31)).any()


def test_scaling_factor_of_latents_is_folded_into_the_decoder(tmp_path):
    folder = copied("sae_lens_old_standard", tmp_path)
    change_config(folder, finetuning_scaling_factor=True)
    change_weights(folder / "sae_weights.safetensors", scaling_factor=torch.full((N,), 2.0))
    want = expected("sae_lens_old_standard")
    code, output = computed(aezoo.load_model(folder), want["x"])
    bias = load_file(folder / "sae_weights.safetensors")["b_dec"]
    torch.testing.assert_close(code, want["code"])
    torch.testing.assert_close(output - bias, 2 * (want["output"] - bias), rtol=1e-5, atol=1e-5)
    change_config(folder, finetuning_scaling_factor=False)
    with pytest.raises(aezoo.AezooError, match="finetuning_scaling_factor is false"):
        aezoo.import_model(folder)


def test_negative_threshold_is_that_of_the_relu_before_it(tmp_path):
    folder = copied("sae_lens_jumprelu_uncentred", tmp_path)
    change_weights(folder / S, threshold=lambda threshold: -threshold)
    W, x = load_file(folder / S), expected("sae_lens_jumprelu_uncentred")["x"]
    f = (x @ W["W_enc"] + W["b_enc"]).relu()
    torch.testing.assert_close(computed(aezoo.load_model(folder), x)[0], f, rtol=1e-5, atol=1e-5)


def test_old_sparsify_keeps_signs_if_configured(tmp_path):
    folder = copied("sparsify", tmp_path)
    change_config(folder, signed=True)
    imported = aezoo.import_model(folder)
    W, x = load_file(folder / "sae.safetensors"), expected("sparsify")["x"]
    pi = (x - W["b_dec"]) @ W["encoder.weight"].t() + W["encoder.bias"]
    kept = pi.abs() >= pi.abs().topk(3).values[:, -1:]
    torch.testing.assert_close(imported.model.encode(x), torch.where(kept, pi, 0), rtol=1e-5, atol=1e-5)
    assert name_of(type(imported.model)) == "abs_topk_sae"


# ---- the hub ---------------------------------------------------------------------------------------------------------


def test_subfolder_of_a_revision_is_read_from_the_hub(hub):
    def files(case, inside):
        return {f"{inside}/{path.name}": path.read_bytes() for path in sorted(source(case).iterdir())}

    sha = hub.put("user/saes", files("sae_lens_topk", "blocks.3/trainer_0"))
    hub.put("user/saes", files("sae_lens_gated", "blocks.3/trainer_0"))
    for address, case in ((f"@{sha}", "sae_lens_topk"), ("", "sae_lens_gated"), ("@main", "sae_lens_gated")):
        model = aezoo.load_model(f"hf://user/saes/blocks.3/trainer_0{address}")
        want = expected(case)
        torch.testing.assert_close(computed(model, want["x"])[0], want["code"], rtol=1e-5, atol=1e-5)
    # settings missing in the files follow from the repository's name
    for case, name in (("gemma_scope_transcoder", "google/gemma-scope-2b-pt-transcoders"),
                       ("gemma_scope", "google/gemma-scope-2b-pt-res")):  # fmt: skip
        hub.put(name, files(case, "layer_3/width_16k/average_l0_76"))
        want = expected(case)
        _, output = computed(aezoo.load_model(f"hf://{name}/layer_3/width_16k/average_l0_76"), want["x"])
        torch.testing.assert_close(output, want["output"], rtol=1e-5, atol=1e-5)
    hub.put("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_3", {"layer0.sae.pt": source("qwen_scope").read_bytes()})
    model = aezoo.load_model("hf://Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_3/layer0.sae.pt")
    torch.testing.assert_close(
        model(expected("qwen_scope")["x"]), expected("qwen_scope")["output"], rtol=1e-5, atol=1e-5
    )


# ---- wrong and hostile files -----------------------------------------------------------------------------------------


def copied(case, tmp_path):
    """A copy with the same folder names."""
    return Path(shutil.copytree(source(case), tmp_path / PATHS.get(case, case)))


def change_config(folder, name="cfg.json", /, **settings):
    path = folder / name
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def change_weights(path, **tensors):
    """Change tensors by name: values, functions of them, or None to remove them."""
    if path.suffix == ".npz":
        held = {key: torch.from_numpy(value) for key, value in np.load(path).items()}
    else:
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    for key, value in tensors.items():
        key = key.replace("__", ".")
        held[key] = value(held[key]) if callable(value) else value
    held = {key: value for key, value in held.items() if value is not None}
    if path.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in held.items()})
    elif path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in held.items()}, path)
    else:
        torch.save(held, path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


S, D = "sae_weights.safetensors", "dictionary_learning_"
WRONG_WEIGHTS = [
    ("sae_lens_standard", S, {"b_enc": None}, "there is no b_enc"),
    ("sae_lens_standard", S, {"b_extra": torch.ones(2)}, "b_extra is unknown in this format"),
    ("sae_lens_standard", S, {"W_dec": torch.ones(N, 7)}, r"the decoder has shape \(10, 7\)"),
    ("sae_lens_standard", S, {"W_enc": torch.ones(6)}, "must be matrices"),
    ("sae_lens_standard", S, {"b_dec": torch.ones(7)}, "the decoder's bias has shape"),
    ("sae_lens_standard", S, {"b_enc": torch.ones(N, dtype=torch.long)}, "b_enc contains int64"),
    ("sae_lens_standard", S, {"b_enc": torch.full((N,), torch.nan)}, "NaN or infinite"),
    ("sae_lens_standard", S, {"W_enc": torch.ones(0, N), "W_dec": torch.ones(N, 0), "b_dec": torch.ones(0)}, "have 0"),
    ("sae_lens_jumprelu", S, {"threshold": None}, "there is no threshold"),
    ("sae_lens_jumprelu", S, {"threshold": torch.ones(3)}, "the threshold has shape"),
    ("sae_lens_gated", S, {"r_mag": torch.ones(3)}, "the scale of magnitudes has shape"),
    ("sae_lens_skip_transcoder", S, {"W_skip": None}, "there is no W_skip"),
    ("sae_lens_transcoder", S, {"W_dec": torch.ones(N, 4), "b_dec": torch.ones(4)}, "reads 6 and writes 4 values"),
    ("sparsify", "sae.safetensors", {"W_dec": None}, "there is no W_dec"),
    (f"{D}BatchTopKSAE", "ae.pt", {"threshold": None}, "there is no threshold"),
    (f"{D}BatchTopKSAE", "ae.pt", {"k": torch.tensor(4)}, "k is 3 in the configuration and 4 in the weights"),
    (f"{D}BatchTopKSAE", "ae.pt", {"k": torch.tensor(4.0)}, "k must be one whole number"),
    (f"{D}MatryoshkaBatchTopKSAE", "ae.pt", {"group_sizes": torch.tensor([5, 6])}, "must be at least 1 and sum to 10"),
    (f"{D}MatryoshkaBatchTopKSAE", "ae.pt", {"group_sizes": None}, "there is no group_sizes"),
    (f"{D}JumpReluAutoEncoder", "ae.pt", {"threshold": None}, "there is no threshold"),
    (f"{D}CrossCoder", "ae.pt", {"encoder__weight": lambda w: w[:1]}, "a crosscoder has an encoder"),
    (f"{D}AutoEncoder", "ae.pt", {"bias": Bomb()}, "is refused"),
    (f"{D}AutoEncoder", "ae.pt", {"bias": "text"}, "is a str, not a tensor"),
    ("gemma_scope", "params.npz", {"threshold": None}, "there is no threshold"),
    ("gemma_scope_2", "params.safetensors", {"w_dec": torch.ones(N, 3, 6)}, "writes? to 3 layers"),
    ("gemma_scope_2", "params.safetensors", {"affine_skip_connection": torch.ones(6, 5)}, "skip connection has shape"),
    ("llama_scope", "checkpoints/final.safetensors", {"decoder__bias": None}, "there is no decoder.bias"),
    ("openai_topk", "6.pt", {"activation": "Identity"}, "the activation is 'Identity'"),
    ("openai_topk", "6.pt", {"activation_state_dict": {"k": 3, "postact_fn": "Identity"}}, "TopK with 'Identity'"),
    ("openai_topk", "6.pt", {"activation_state_dict": {}}, "there is no k"),
    ("openai_topk", "6.pt", {"activation_state_dict": {"k": 99}}, "k must lie between 1 and the 10 latents, got 99"),
    ("openai_topk", "6.pt", {"latent_bias": Bomb()}, "is refused"),
    ("openai_topk", "6.pt", {"latent_bias": 3}, "is a int, not a tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "file", "tensors", "message"), WRONG_WEIGHTS)
def test_wrong_weights_are_refused(tmp_path, monkeypatch, case, file, tensors, message):
    monkeypatch.chdir(tmp_path)
    folder = copied(case, tmp_path)
    change_weights(folder / file, **tensors)
    refused(folder, message)
    assert not Path("executed").exists()


def refused(address, message):
    with pytest.raises(aezoo.AezooError, match=message) as raised:
        aezoo.load_model(address)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


C, H = "config.json", "hyperparams.json"
WRONG_CONFIGS = [
    ("sae_lens_standard", "cfg.json", {"architecture": "temporal"}, "for the architecture 'temporal'"),
    ("sae_lens_standard", "cfg.json", {"architecture": 3}, "architecture must be a str"),
    ("sae_lens_standard", "cfg.json", {"activation_fn": "tanh-relu"}, "with the activation 'tanh-relu'"),
    ("sae_lens_gated", "cfg.json", {"activation_fn_str": "topk"}, "gated with the activation 'topk'"),
    ("sae_lens_standard", "cfg.json", {"d_sae": 11}, "d_sae is 11, but the weights have 10"),
    ("sae_lens_standard", "cfg.json", {"d_in": True}, "d_in must be a int"),
    ("sae_lens_standard", "cfg.json", {"normalize_activations": "covariance_whitening"}, "lacks the statistics"),
    ("sae_lens_standard", "cfg.json", {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input must be a bool"),
    ("sae_lens_topk", "cfg.json", {"k": "gone"}, "there is no k"),
    ("sae_lens_topk", "cfg.json", {"k": 0}, "k must lie between 1"),
    ("sae_lens_topk", "cfg.json", {"k": 2.5}, "k must be a whole number"),
    ("sae_lens_topk", "cfg.json", {"k": [3]}, "k must be a float"),
    ("sae_lens_topk", "cfg.json", {"activation_fn_kwargs": {"signed": True}}, "signed topk"),
    ("sae_lens_transcoder", "cfg.json", {"apply_b_dec_to_input": True}, "which a transcoder cannot do"),
    ("sae_lens_transcoder", "cfg.json", {"normalize_activations": "layer_norm"}, "normalises its input"),
    ("sae_lens_matryoshka_batchtopk", "cfg.json", {"matryoshka_widths": [5, 2]}, "matryoshka_widths must rise"),
    ("sparsify", "cfg.json", {"activation": "groupmax"}, "for the activation 'groupmax'"),
    ("sparsify_skip_transcoder", "cfg.json", {"transcode": False}, "would copy its input"),
    ("sparsify", "cfg.json", {"d_in": 7}, "d_in is 7, but the weights have 6"),
    (f"{D}AutoEncoder", C, {"trainer": {"dict_class": "IdentityDict"}}, "dict_class is 'IdentityDict'"),
    (f"{D}AutoEncoder", C, {"trainer": "gone"}, "there is no trainer"),
    ("gemma_scope_2", C, {"architecture": "relu"}, "the architecture is 'relu'"),
    ("gemma_scope_2", C, {"affine_connection": True}, "do not agree"),
    ("llama_scope", H, {"dataset_average_activation_norm": "gone"}, "there is no dataset_average_activation_norm"),
    ("llama_scope", H, {"dataset_average_activation_norm": {"in": 0.0, "out": 1.0}}, "must be above 0"),
    ("llama_scope", H, {"norm_activation": "token-wise"}, "norm_activation must be dataset-wise"),
    ("llama_scope", H, {"act_fn": "topk"}, "act_fn is 'topk'"),
    ("llama_scope", H, {"jump_relu_threshold": "gone"}, "there is no jump_relu_threshold"),
]


@pytest.mark.parametrize(("case", "file", "settings", "message"), WRONG_CONFIGS)
def test_wrong_configurations_are_refused(tmp_path, case, file, settings, message):
    folder = copied(case, tmp_path)
    change_config(folder, file, **settings)
    refused(folder, message)


@pytest.mark.parametrize(
    ("case", "file", "content", "message"),
    [
        ("sae_lens_standard", "cfg.json", b"{", "cannot read .*cfg.json"),
        ("sae_lens_standard", S, b"\xff" * 64, "cannot read .*sae_weights"),
        (f"{D}AutoEncoder", "ae.pt", pickle.dumps(Bomb(), 2), "damaged, or contains objects"),
        ("openai_relu", "6.pt", pickle.dumps(Bomb(), 2), "damaged, or contains objects"),
        ("gemma_scope", "params.npz", b"PK\x03\x04" + b"\0" * 90, "damaged|cannot read"),
    ],
)
def test_damaged_and_hostile_files_are_refused(tmp_path, monkeypatch, case, file, content, message):
    monkeypatch.chdir(tmp_path)
    folder = copied(case, tmp_path)
    (folder / file).write_bytes(content)
    refused(folder, message)
    assert not Path("executed").exists()


def test_qwen_scope_needs_a_layer_and_the_name_of_its_repository(tmp_path):
    layer = source("qwen_scope")
    for name in ("layer0.sae.pt", "layer1.sae.pt"):
        shutil.copy(layer, tmp_path / name)
    refused(tmp_path, "has 2 layers: give one of them")
    refused(tmp_path / "layer1.sae.pt", "k is only in the repository's name")
    assert aezoo.load_model(layer.parent).k == 3
