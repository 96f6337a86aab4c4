"""Masked autoencoders of their authors and of transformers, compared with outputs of timm and transformers.

The files were written by `tests/mae_fixtures.py`.
"""

import argparse
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import aezoo
from aezoo.cli.main import main
from aezoo.nets import vit

FIXTURES = Path(__file__).parent.parent / "fixtures" / "mae"
VALUES, PATCHES, VISIBLE = 3 * 8 * 8, 16, 4


def imported(library: str) -> tuple[Any, dict[str, Tensor]]:
    return aezoo.import_model(FIXTURES / library).model, load_file(FIXTURES / library / "expected.safetensors")


@pytest.mark.parametrize("library", ["transformers", "authors"])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_outputs_are_those_of_the_library(library, norm_pix, monkeypatch):
    model, expected = imported(library)
    if norm_pix:  # another objective of the same networks
        weights = model.state_dict()
        settings = {key: value for key, value in model.hparams.items() if key != "input_shape"}
        model = aezoo.create_model("mae", (3, 8, 8), **{**settings, "norm_pix": True})
        assert model.load_state_dict(weights, strict=False).missing_keys == [
            "decoder.scale.weight",
            "decoder.scale.bias",
        ]
    x, order = expected["x"], expected["noise"].argsort(1)
    torch.testing.assert_close(model.encode(x), expected["tokens"].mT, rtol=1e-5, atol=1e-5)
    embed, blocks, _ = model.encoder.children()
    hidden = model.decoder.hidden(blocks(vit.shuffle(embed(x), order[:, :VISIBLE])), order)
    by_place = expected["patches"].unflatten(2, (2, 2, 3)).movedim(4, 2).flatten(2)
    torch.testing.assert_close(model.decoder.out(hidden), by_place, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(vit, "random_order", lambda *_: order)
    nll = model.loss(x)["nll"] - VALUES / 2 * math.log(math.pi)
    torch.testing.assert_close(nll / VALUES, expected[f"loss_{norm_pix}"], rtol=1e-5, atol=1e-5)


def test_decode_predicts_patches_from_class_token_and_others():
    model, expected = imported("transformers")
    decoder, z = model.decoder, model.encode(expected["x"])
    patches, counts = torch.zeros(2, PATCHES, 12), torch.zeros(PATCHES, 1)
    for order in decoder.orders_KN:
        hidden = order[VISIBLE:]
        tokens = torch.cat([z[:, :, :1], z[:, :, 1 + order[:VISIBLE]]], 2).mT
        patches[:, hidden] += decoder.out(decoder.hidden(tokens, order.expand(2, -1)))[:, hidden]
        counts[hidden] += 1
    normalised = decoder.patchify.inverse(patches / counts)
    mean, std = (torch.tensor(n)[:, None, None] for n in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(model.decode(z), normalised * std + mean, rtol=1e-5, atol=1e-5)


def test_settings_are_read():
    model, _ = imported("transformers")
    settings = {key: model.hparams[key] for key in ("heads", "decoder_heads", "norm_eps", "depth", "decoder_depth")}
    assert settings == {"heads": 3, "decoder_heads": 2, "norm_eps": 1e-12, "depth": 2, "decoder_depth": 1}
    assert model.code_shape == (12, 1 + PATCHES) and model.masked == PATCHES - VISIBLE


def test_imported_model_is_saved_trained_and_read_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["import", str(FIXTURES / "authors"), "out"])
    assert "found MAE, encoder and decoder, width 12" in capsys.readouterr().out
    model, expected = imported("authors")
    again = aezoo.load_model("out")
    assert torch.equal(again.encode(expected["x"]), model.encode(expected["x"]))
    # in [0, 1], like the input
    assert again(expected["x"]).shape == (2, 3, 8, 8)
    again.train().loss(expected["x"])["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in again.parameters())


def state_of(library: str) -> dict[str, Tensor]:
    if library == "transformers":
        return load_file(FIXTURES / library / "model.safetensors")
    content: dict[str, Tensor] = torch.load(FIXTURES / "authors" / "checkpoint.pth", weights_only=False)["model"]
    return content


def encoder_alone() -> dict[str, Tensor]:
    """As in mae_pretrain_vit_base.pth, with fixed positions."""
    return {k: v for k, v in state_of("authors").items() if not k.startswith(("decoder", "mask"))}


def test_file_with_only_an_encoder_is_read(tmp_path):
    file = tmp_path / "mae_pretrain_vit_base.pth"
    torch.save({"model": encoder_alone()}, file)
    found = aezoo.import_model(file)
    assert "MAE, encoder, width 12" in found.found and "no decoder" in found.notes[0]
    _, expected = imported("authors")
    torch.testing.assert_close(found.model.encode(expected["x"]), expected["tokens"].mT, rtol=1e-5, atol=1e-5)


def test_weights_of_transformers_in_other_files_are_read(tmp_path):
    """As in older versions: pickled, and with the attribute's name for decoder layers."""
    shutil.copy(FIXTURES / "transformers" / "config.json", tmp_path)
    state = {k.replace("decoder_encoder.layer", "decoder_layers"): v for k, v in state_of("transformers").items()}
    assert any("decoder_layers" in key for key in state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    found, (model, expected) = aezoo.import_model(tmp_path), imported("transformers")
    assert torch.equal(found.model.encode(expected["x"]), model.encode(expected["x"]))
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), model.parameters(), strict=True))


def test_another_vision_transformer_is_not_recognised(tmp_path):
    state = encoder_alone()
    trained = state | {"pos_embed": state["pos_embed"] + 0.1 * torch.randn(1, 17, 12)}
    for name, content in (("a", trained), ("b", state | {"head.weight": torch.zeros(2, 12)})):
        torch.save({"model": content}, tmp_path / f"{name}.pth")
        with pytest.raises(aezoo.AezooError, match="has an unknown format"):
            aezoo.import_model(tmp_path / f"{name}.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.bias"), "has no norm.bias: it is damaged"),
        (lambda s: s.update({"extra": torch.zeros(1)}), "it also has extra"),
        (lambda s: s.update({"blocks.1.mlp.fc1.weight": torch.zeros(47, 12)}), r"fc1.weight has shape \(47, 12\)"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 16, 12)}), "15 patches"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(12, 3, 2)}), r"patches of \[2\]"),
        (lambda s: s.update({"blocks.7.norm1.weight": torch.zeros(12)}), "has no blocks.2.norm1.weight"),
        (lambda s: s["decoder_pos_embed"][0, 0].fill_(1.0), "a position for the class token"),
        (lambda s: s.update({"cls_token": "text"}), "cls_token is a str, not a tensor"),
        (lambda s: s.update({"mask_token": torch.zeros(1, 1, 10**5)}), "far fewer weights"),
    ],
)
def test_damaged_checkpoint_is_refused(tmp_path, change, message):
    state = state_of("authors")
    change(state)
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(aezoo.AezooError, match=message) as raised:
        aezoo.import_model(tmp_path / "x.pth")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "quick_gelu", "does not support hidden_act 'quick_gelu'"),
        ("num_attention_heads", 5, "5 heads do not divide"),
        ("num_attention_heads", "__import__", "is '__import__', not a number"),
        ("mask_ratio", 1.0, "mask_ratio 1.0"),
        ("layer_norm_eps", -1, "norm_eps must be above 0"),
    ],
)
def test_configuration_that_no_model_has_is_refused(tmp_path, key, value, message):
    folder = shutil.copytree(FIXTURES / "transformers", tmp_path / "x")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(aezoo.AezooError, match=message) as raised:
        aezoo.import_model(folder)
    assert "\n" not in str(raised.value)


def test_folder_without_weights_is_refused(tmp_path):
    shutil.copy(FIXTURES / "transformers" / "config.json", tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(aezoo.AezooError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        aezoo.import_model(tmp_path)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_settings_of_a_script_are_values_and_never_code(tmp_path):
    state = state_of("authors")
    settings = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.6)
    torch.save({"model": state, "args": settings}, tmp_path / "x.pth")
    model = aezoo.import_model(tmp_path / "x.pth").model
    # of 16 patches theirs leaves int(16 x 0.4) = 6 visible
    assert model.hparams["norm_pix"] and model.masked == 10
    torch.save({"model": state, "args": argparse.Namespace(lr=Bomb())}, tmp_path / "x.pth", pickle_module=pickle)
    with pytest.raises(aezoo.AezooError, match="contains objects that could run code"):
        aezoo.import_model(tmp_path / "x.pth")
