"""Sparse autoencoders of other libraries give the codes and outputs of the originals, and wrong files are refused.

tests/sparse_autoencoder_fixtures.py has written the fixtures with the libraries themselves.
"""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

import aezoo
from aezoo.cli.main import main
from aezoo.io import scale_folding
from aezoo.registry import name_of

ROOT = Path(__file__).parent.parent / "fixtures" / "sparse_autoencoders"
N = 10
# cases whose folder has the name that the format needs
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
# the model of the zoo, by the first of these words in a case's name
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
    assert set(IMPORTERS) == {"sae_lens", "sparsify", "dictionary_learning", "gemma_scope", "gemma_scope_2",
                              "llama_scope", "qwen_scope", "openai_sae"} & set(IMPORTERS)  # fmt: skip


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
