"""Write small sparse autoencoders in the formats of other libraries, and their outputs by these libraries.

    ENVIRONMENT/bin/python tests/sparse_autoencoder_fixtures.py sae_lens
    ENVIRONMENT/bin/python tests/sparse_autoencoder_fixtures.py dictionary_learning
    ENVIRONMENT/bin/python tests/sparse_autoencoder_fixtures.py crosscoder FORK
    ENVIRONMENT/bin/python tests/sparse_autoencoder_fixtures.py sparsify
    ENVIRONMENT/bin/python tests/sparse_autoencoder_fixtures.py openai CHECKOUT

Each environment has the library (sae-lens 6.54, dictionary-learning 0.1.0, eai-sparsify 1.3.3); FORK is the file
dictionary_learning/dictionary.py of https://github.com/science-of-finetuning/dictionary_learning at 088e5872957d, or
its class CrossCoder only; CHECKOUT is sparse_autoencoder/model.py of https://github.com/openai/sparse_autoencoder.
aezoo is not imported. A case is a folder of tests/fixtures/sparse_autoencoders with the original's files, and a file
with x, code and output next to it. All weights are random, with a seed per case.
"""

import importlib.util
import json
import os
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

OUT = Path(__file__).parent / "fixtures" / "sparse_autoencoders"
X, N, B, K = 6, 10, 8, 3


def seed(name: str) -> None:
    torch.manual_seed(zlib.crc32(name.encode()))


def randomise(module: torch.nn.Module, unit: str = "") -> None:
    """Random weights and positive thresholds; directions of norm 1 in the rows or columns of `unit`."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.5 if p.ndim > 1 else 0.4))
            if name == "threshold":
                p.abs_()
            if name == unit:
                axis = 1 if p.shape[1] == X else 0
                p.copy_(torch.nn.functional.normalize(p, dim=axis))


def batch() -> Tensor:
    return torch.randn(B, X) * 1.5 + 0.3


def write(name: str, x: Tensor, code: Tensor, output: Tensor) -> None:
    """Write the expected values, if some but not all latents are active."""
    assert code.shape == (B, N) and 0 < int((code != 0).sum()) < code.numel(), name
    tensors = {"x": x, "code": code, "output": output}
    save_file({key: value.detach().float().contiguous() for key, value in tensors.items()}, OUT / f"{name}.safetensors")


def folder(name: str) -> Path:
    path = OUT / name
    path.mkdir(parents=True, exist_ok=True)
    return path


# ---- SAELens ---------------------------------------------------------------------------------------------------------


def sae_lens() -> None:
    import sae_lens as library
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes import sae as base

    def case(name: str, kind: str, unit: bool = False, change: Any = None, **settings: Any) -> None:
        """A model in the current format; `change` may rewrite the configuration to that of older versions."""
        seed(name)
        path, x = folder(name), batch()
        made = base.SAE.from_dict({"architecture": kind, "d_in": X, "d_sae": N, "metadata": {}, **settings})
        randomise(made, "W_dec" if unit else "")
        made.save_model(path)
        config = json.loads((path / "cfg.json").read_text())
        config["metadata"] = {"sae_lens_version": library.__version__}
        if change is not None:
            change(config)
        (path / "cfg.json").write_text(json.dumps(config, indent=1) + "\n")
        loaded = base.SAE.load_from_disk(path)
        assert type(loaded) is type(made) and loaded.cfg.normalize_activations == made.cfg.normalize_activations
        with torch.no_grad():
            write(name, x, loaded.encode(x), loaded(x))

    def older(**values: Any) -> Any:
        def change(config: dict[str, Any]) -> None:
            for key in ("metadata", "k", "rescale_acts_by_decoder_norm", "apply_b_dec_to_input", "architecture"):
                config.pop(key, None)
            config.update({"sae_lens_training_version": "2.1.3", "hook_point": "blocks.8.hook_resid_pre"} | values)

        return change

    case("sae_lens_standard", "standard")
    case("sae_lens_standard_unit_norm", "standard", unit=True)
    case("sae_lens_standard_uncentred", "standard", apply_b_dec_to_input=False)
    case("sae_lens_standard_layer_norm", "standard", normalize_activations="layer_norm")
    case("sae_lens_standard_constant_norm", "standard", normalize_activations="constant_norm_rescale")
    case("sae_lens_gated", "gated")
    case("sae_lens_gated_unit_norm", "gated", unit=True)
    case("sae_lens_gated_layer_norm", "gated", normalize_activations="layer_norm", apply_b_dec_to_input=False)
    case("sae_lens_jumprelu", "jumprelu")
    case("sae_lens_jumprelu_uncentred", "jumprelu", apply_b_dec_to_input=False)
    case("sae_lens_jumprelu_layer_norm", "jumprelu", normalize_activations="layer_norm")
    case("sae_lens_topk", "topk", k=K)
    case("sae_lens_topk_unit_norm", "topk", unit=True, k=K)
    case("sae_lens_topk_uncentred", "topk", k=K, apply_b_dec_to_input=False)
    case("sae_lens_topk_rescaled", "topk", k=K, rescale_acts_by_decoder_norm=True)
    case("sae_lens_topk_layer_norm", "topk", k=K, normalize_activations="layer_norm")
    case("sae_lens_abstopk", "abstopk", k=K)
    case("sae_lens_abstopk_rescaled", "abstopk", k=K, rescale_acts_by_decoder_norm=True)
    case("sae_lens_old_standard", "standard", change=older(activation_fn_str="relu", normalize_activations=False))
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "architecture": "standard"}
    case("sae_lens_old_topk", "topk", k=K, change=older(**topk))
    normed = topk | {"normalize_activations": "layer_norm", "apply_b_dec_to_input": True}
    case("sae_lens_old_topk_layer_norm", "topk", k=K, normalize_activations="layer_norm", change=older(**normed))
    for kind in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        case(f"sae_lens_{kind}", kind, d_out=X, apply_b_dec_to_input=False)
    for kind, settings in (("batchtopk", {}), ("matryoshka_batchtopk", {"matryoshka_widths": [2, 5, N]})):
        training_checkpoint(f"sae_lens_{kind}", kind, settings)
    scopes(loaders, base)


def training_checkpoint(name: str, kind: str, settings: dict[str, Any]) -> None:
    """A training checkpoint, with the outputs of the JumpReLU SAE that SAELens makes of it."""
    import tempfile

    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes import sae as base

    seed(name)
    cls, config = get_sae_training_class(kind)
    made = cls(config(d_in=X, d_sae=N, k=K, **settings))
    randomise(made)
    made.topk_threshold.fill_(0.7)
    made.save_model(folder(name))
    with tempfile.TemporaryDirectory() as inference:
        made.save_inference_model(inference)
        loaded = base.SAE.load_from_disk(inference)
    x = batch()
    with torch.no_grad():
        write(name, x, loaded.encode(x), loaded(x))


def scopes(loaders: Any, base: Any) -> None:
    """Formats that SAELens reads with its own loaders, by key, from local files instead of the hub."""
    from safetensors.torch import load_file

    def local(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = OUT / repo_id.replace("/", "+") / (subfolder or "") / filename
        if not path.is_file():
            raise loaders.EntryNotFoundError(str(path))
        return str(path)

    loaders.hf_hub_download = local
    loaders.get_safetensors_tensor_shapes = lambda repo, name: {
        key: list(value.shape) for key, value in load_file(local(repo, name)).items()
    }

    def expect(loader: str, repo: str, inside: str, name: str, scale: float | None = None) -> None:
        read = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader]

        def converter(cfg_overrides: dict[str, Any], **given: Any) -> Any:
            return read(
                cfg_overrides=cfg_overrides | {"d_in": X, "d_sae": N} | ({"d_out": X} if "transcoder" in name else {}),
                **given,
            )

        base.get_norm_scaling_factor = lambda release, sae_id: scale
        sae = base.SAE.from_pretrained(repo, inside, converter=converter)
        x = batch()
        with torch.no_grad():
            write(name, x, sae.encode(x), sae(x))

    def dictionary(**others: Tensor) -> dict[str, Tensor]:
        scale = 0.5
        return {
            "W_enc": torch.randn(X, N) * scale,
            "W_dec": torch.nn.functional.normalize(torch.randn(N, X), dim=1),
            "b_enc": torch.randn(N) * scale,
            "b_dec": torch.randn(X) * scale,
            **others,
        }

    def path_of(repo: str, inside: str) -> Path:
        path = OUT / repo.replace("/", "+") / inside
        path.mkdir(parents=True, exist_ok=True)
        return path

    # Gemma Scope 1
    for repo, inside, loader, name, lower in (
        ("google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_59", "gemma_2", "gemma_scope", False),
        ("google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", "gemma_2", "gemma_scope_embedding", True),
        ("google/gemma-scope-2b-pt-transcoders", "layer_3/width_16k/average_l0_76", "gemma_2_transcoder",
         "gemma_scope_transcoder", False),
    ):  # fmt: skip
        seed(name)
        weights = dictionary(threshold=torch.rand(N))
        weights = {key.lower() if lower else key: value for key, value in weights.items()}
        np.savez(path_of(repo, inside) / "params.npz", **{key: value.numpy() for key, value in weights.items()})
        expect(loader, repo, inside, name)
    # Gemma Scope 2
    repo = "google/gemma-scope-2-4b-pt"
    for inside, name, config in (
        ("resid_post/layer_17_width_16k_l0_big", "gemma_scope_2", True),
        ("resid_post_all/layer_3_width_16k_l0_big", "gemma_scope_2_without_config", False),
        ("transcoder/layer_17_width_16k_l0_big", "gemma_scope_2_transcoder", True),
        ("transcoder_all/layer_3_width_16k_l0_big_affine", "gemma_scope_2_skip_transcoder", False),
        ("transcoder/layer_17_width_16k_l0_small_affine", "gemma_scope_2_skip_transcoder_with_config", True),
    ):
        seed(name)
        weights = {key.lower(): value for key, value in dictionary(threshold=torch.rand(N)).items()}
        weights |= {"affine_skip_connection": torch.randn(X, X)} if "affine" in inside else {}
        save_file(weights, path_of(repo, inside) / "params.safetensors")
        if config:
            stated = {
                "architecture": "jump_relu",
                "model_name": "gemma-v3-4b-pt",
                "hf_hook_point_in": "model.layers.17.output",
            }
            if "transcoder" in inside:
                stated["hf_hook_point_in"] = "model.layers.17.pre_feedforward_layernorm.output"
                stated["hf_hook_point_out"] = "model.layers.17.post_feedforward_layernorm.output"
                stated["affine_connection"] = "affine" in inside
            (path_of(repo, inside) / "config.json").write_text(json.dumps(stated, indent=1) + "\n")
        expect("gemma_3", repo, inside, name)
    # Llama Scope
    repo, inside, name = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x", "llama_scope"
    seed(name)
    stated = {
        "d_model": X, "d_sae": N, "act_fn": "jumprelu", "jump_relu_threshold": 0.31, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 1.7, "out": 1.7}, "sparsity_include_decoder_norm": True, "top_k": 50,
        "apply_decoder_bias_to_pre_encoder": False, "hook_point_in": "blocks.8.hook_resid_post",
        "hook_point_out": "blocks.8.hook_resid_post",
    }  # fmt: skip
    linear = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
    weights = dictionary()
    # directions have norm 1, so the factor of the threshold that SAELens leaves out makes no difference
    state = {
        key: (weights[other].t() if "W" in other else weights[other]).contiguous() for key, other in linear.items()
    }
    (path_of(repo, inside) / "hyperparams.json").write_text(json.dumps(stated, indent=1) + "\n")
    save_file(state, path_of(repo, f"{inside}/checkpoints") / "final.safetensors")
    expect("llama_scope", repo, inside, name, X**0.5 / 1.7)
    repo, inside, name = "fnlp/Llama-Scope-R1-Distill", "800M-Slimpajama-0-OpenR1-Math-220k/L5R", "llama_scope_r1"
    seed(name)
    weights, hook = dictionary(), "blocks.5.hook_resid_post"
    state = {
        key: (weights[other].t() if "W" in other else weights[other]).contiguous() for key, other in linear.items()
    }
    state["log_jumprelu_threshold"] = torch.randn(N) - 1
    state |= {f"dataset_average_activation_norm.{hook}": torch.tensor(1.3)}
    stated = {"d_model": X, "expansion_factor": N / X, "act_fn": "jumprelu", "norm_activation": "dataset-wise",
              "hook_point_in": hook, "hook_point_out": hook}  # fmt: skip
    (path_of(repo, inside) / "config.json").write_text(json.dumps(stated, indent=1) + "\n")
    save_file(state, path_of(repo, inside) / "sae_weights.safetensors")
    expect("llama_scope_r1_distill", repo, inside, name, X**0.5 / 1.3)
    # Qwen Scope
    repo, inside, name = "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_3", "layer0.sae.pt", "qwen_scope"
    seed(name)
    weights = dictionary()
    state = {key: (value.t() if "W" in key else value).contiguous() for key, value in weights.items()}
    torch.save(state, path_of(repo, "") / inside)
    expect("qwen_scope", repo, inside, name)


# ---- dictionary_learning ---------------------------------------------------------------------------------------------


def dictionary_learning() -> None:
    from dictionary_learning import dictionary as classes
    from dictionary_learning import utils
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = {
        "AutoEncoder": lambda: classes.AutoEncoder(X, N),
        "AutoEncoderNew": lambda: classes.AutoEncoderNew(X, N),
        "GatedAutoEncoder": lambda: classes.GatedAutoEncoder(X, N),
        "JumpReluAutoEncoder": lambda: classes.JumpReluAutoEncoder(X, N),
        "AutoEncoderTopK": lambda: AutoEncoderTopK(X, N, K),
        "BatchTopKSAE": lambda: BatchTopKSAE(X, N, K),
        "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(X, N, K, [2, 3, 5]),
    }
    for kind, build in made.items():
        for unit in (False, True):
            name = f"dictionary_learning_{kind}{'_unit_norm' if unit else ''}"
            seed(name)
            module = build()
            randomise(module, ("W_dec" if hasattr(module, "W_dec") else "decoder.weight") if unit else "")
            if "k" in dict(module.named_buffers()):
                module.threshold.fill_(0.4)
            path, x = folder(name), batch()
            trainer = {"dict_class": kind, "activation_dim": X, "dict_size": N, "lm_name": "gpt2", "layer": 5}
            trainer |= {"k": K} if hasattr(module, "k") else {}
            config = {"trainer": trainer, "buffer": {"d_submodule": X, "ctx_len": 128}}
            (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            torch.save(module.state_dict(), path / "ae.pt")
            loaded, _ = utils.load_dictionary(str(path), "cpu")
            with torch.no_grad():
                write(name, x, loaded.encode(x), loaded(x))


def crosscoder(fork: str) -> None:
    spec = importlib.util.spec_from_file_location("fork", fork)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name = "dictionary_learning_CrossCoder"
    seed(name)
    made = module.CrossCoder(X, N, num_layers=2)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape) * 0.5)
    path, x = folder(name), torch.randn(B, 2, X)
    config = {"trainer": {"dict_class": "CrossCoder", "activation_dim": X, "dict_size": N}}
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    torch.save(made.state_dict(), path / "ae.pt")
    loaded = module.CrossCoder.from_pretrained(path / "ae.pt")
    with torch.no_grad():
        write(name, x, loaded.encode(x), loaded(x))


# ---- sparsify --------------------------------------------------------------------------------------------------------


def sparsify() -> None:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    for name, unit, settings in (
        ("sparsify", False, {}),
        ("sparsify_unit_norm", True, {}),
        ("sparsify_transcoder", False, {"transcode": True}),
        ("sparsify_skip_transcoder", False, {"transcode": True, "skip_connection": True}),
    ):
        seed(name)
        made = SparseCoder(X, SparseCoderConfig(num_latents=N, k=K, **settings))
        randomise(made, "W_dec" if unit else "")
        path, x = folder(name), batch()
        made.save_to_disk(path)
        loaded = SparseCoder.load_from_disk(path)
        with torch.no_grad():
            out = loaded(x)
            code = torch.zeros(B, N).scatter(1, out.latent_indices, out.latent_acts)
            write(name, x, code, out.sae_out)


# ---- OpenAI ----------------------------------------------------------------------------------------------------------


def openai(checkout: str) -> None:
    spec = importlib.util.spec_from_file_location("model", checkout)
    assert spec is not None and spec.loader is not None
    module: types.ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, activation in (("openai_topk", module.TopK(K)), ("openai_relu", torch.nn.ReLU())):
        seed(name)
        made = module.Autoencoder(N, X, activation=activation, normalize=name == "openai_topk")
        randomise(made)
        path, x = folder(name), batch()
        # the state its loader reads; torch adds the activation's entries a second time
        state = {key: value for key, value in made.state_dict().items() if not key.startswith("activation.")}
        torch.save(state, path / "6.pt")
        loaded = module.Autoencoder.from_state_dict(torch.load(path / "6.pt", weights_only=True))
        with torch.no_grad():
            _, code, output = loaded(x)
            write(name, x, code, output)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    parts = (sae_lens, dictionary_learning, crosscoder, sparsify, openai)
    {part.__name__: part for part in parts}[sys.argv[1]](*sys.argv[2:])
