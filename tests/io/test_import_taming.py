"""First stages of taming-transformers and latent diffusion, compared with outputs of taming's networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from drawn_weights import drawn
from safetensors.torch import save_file

import aezoo
from aezoo.cli.main import main
from aezoo.errors import AezooError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "taming"
DD = {
    "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "resolution": 16, "in_channels": 3,
    "out_ch": 3, "z_channels": 5, "dropout": 0.0,
}  # fmt: skip


def expected(name):
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "shapes"}


def state_of(name, prefix=""):
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        shapes = json.loads(str(arrays["shapes"]))
    return {f"{prefix}{key}": torch.from_numpy(value) for key, value in drawn(shapes, 0).items()}


def images():
    return torch.from_numpy(np.random.RandomState(1).uniform(size=(1, 3, 16, 24)).astype(np.float32))


def assert_same(model, name):
    want, x = expected(name), images()
    with torch.no_grad():
        if name == "vq":
            torch.testing.assert_close(model.encode(x), want["z"], rtol=0, atol=1e-5)
            k = model.decoder.net.quantize(model.encode(x))[2][2]
            assert torch.equal(k, want["indices"].flatten()) and len(k.unique()) > 2
        else:
            moments = torch.cat(model.moments(x), 1)
            torch.testing.assert_close(moments, want["moments"], rtol=0, atol=1e-5)
        torch.testing.assert_close(model(x), want["x_hat"], rtol=0, atol=1e-5)
        assert want["x_hat"].std() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vq", "kl"])
def test_outputs_are_those_of_the_original_networks(tmp_path, name):
    state = state_of(name) | {"loss.perceptual_loss.lin0.model.1.weight": torch.ones(1)}
    torch.save({"state_dict": state, "epoch": 3, "global_step": 7}, tmp_path / "last.ckpt")
    assert_same(aezoo.load_model(tmp_path / "last.ckpt"), name)
    imported = aezoo.import_model(tmp_path / "last.ckpt")
    assert ("VQModel" if name == "vq" else "AutoencoderKL") in imported.found
    assert imported.model.standardiser.scale.item() == 1 and "0.18215" in imported.notes[-1]
    saved = aezoo.save_model(imported.model, tmp_path / "saved")
    assert_same(aezoo.load_model(saved), name)


@pytest.mark.parametrize(
    ("others", "scale", "shift"),
    [
        (["cond_stage_model.transformer.text_model.x"], 0.18215, 0.0),
        (["conditioner.embedders.1.model.x"], 0.13025, 0.0),
        (["model.diffusion_model.joint_blocks.0.x"], 1.5305, 0.0609),
        (["model.diffusion_model.double_blocks.0.x"], 0.3611, 0.1159),
        (["model.diffusion_model.input_blocks.0.0.weight"], 1.0, 0.0),
    ],
)
def test_first_stage_is_found_in_a_diffusion_model(tmp_path, others, scale, shift):
    state = state_of("kl", "first_stage_model.") | {key: torch.ones(2) for key in others}
    save_file(state, tmp_path / "model.safetensors")
    model = aezoo.load_model(tmp_path)
    assert_same(model, "kl")
    z = model.encode(images()).detach()
    torch.testing.assert_close(model.standardiser(z), scale * (z - shift))
    torch.testing.assert_close(model.standardiser.restore(model.standardiser(z)), z)


def test_trained_scale_is_read_from_the_weights(tmp_path):
    state = state_of("vq", "first_stage_model.") | {
        "scale_factor": torch.tensor(0.7),
        "model_ema.decay": torch.ones(()),
    }
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    imported = aezoo.import_model(tmp_path / "x.ckpt")
    assert imported.model.standardiser.scale.item() == pytest.approx(0.7)
    assert any("moving averages" in note for note in imported.notes)


def test_configuration_next_to_a_file_sets_size_and_scale(tmp_path):
    torch.save({"state_dict": state_of("kl")}, tmp_path / "last.ckpt")
    first = {"target": "evil.Model", "params": {"embed_dim": 5, "ddconfig": {**DD, "double_z": True}}}
    config = {"model": {"target": "evil.Diffusion", "params": {"scale_factor": 0.25, "first_stage_config": first}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    model = aezoo.import_model(tmp_path / "last.ckpt").model
    assert model.input_shape == (3, 16, 16) and model.standardiser.scale.item() == 0.25
    assert_same(model, "kl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_channels": 4}, "z_channels is 4 there, 5 in the weights"),
        ({"ch": 64}, r"ch times ch_mult is \[64, 128\] there, \[32, 64\] in the weights"),
        ({"num_res_blocks": 2}, "num_res_blocks is 2 there, 1"),
        ({"double_z": True}, "double_z is True there, False"),
        ({"tanh_out": True}, "sets tanh_out"),
        ({"resamp_with_conv": False}, "sets resamp_with_conv"),
    ],
)
def test_configuration_of_other_weights_is_refused(tmp_path, change, message):
    torch.save({"state_dict": state_of("vq")}, tmp_path / "last.ckpt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"params": {"ddconfig": {**DD, **change}}}}))
    with pytest.raises(AezooError, match=message) as refusal:
        aezoo.import_model(tmp_path / "last.ckpt")
    assert "\n" not in str(refusal.value)


class ModelCheckpoint:
    pass


class Other:
    pass


def test_classes_of_old_lightning_are_read_and_others_refused(tmp_path):
    def saved(cls, module):
        cls.__module__, cls.__qualname__ = module, cls.__name__
        import sys
        import types

        parts = module.split(".")
        modules = {".".join(parts[: i + 1]): types.ModuleType(".".join(parts[: i + 1])) for i in range(len(parts))}
        setattr(modules[module], cls.__name__, cls)
        before = {name: sys.modules.get(name) for name in modules}
        sys.modules.update(modules)
        try:
            torch.save({"callbacks": {cls: {"best": 1.0}}, "state_dict": state_of("vq")}, tmp_path / "old.ckpt")
        finally:
            for name, module_before in before.items():
                sys.modules.pop(name) if module_before is None else sys.modules.update({name: module_before})

    saved(ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint")
    assert_same(aezoo.load_model(tmp_path / "old.ckpt"), "vq")
    saved(Other, "evil.callbacks")
    for read in (aezoo.load_model, aezoo.import_model):
        with pytest.raises(AezooError, match="contains objects that could run code"):
            read(tmp_path / "old.ckpt")


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "decoder.conv_out.weight"), "has no decoder.conv_out.weight"),
        (
            lambda s: without(s, "encoder.mid.block_2.conv1.weight"),
            "it has no encoder.mid_block.resnets.1.conv1.weight",
        ),
        (lambda s: s | {"quant_conv.weight": torch.ones(9, 5, 1, 1)}, "quant_conv.weight has the shape"),
        (lambda s: s | {"encoder.more.weight": torch.ones(1)}, "unknown encoder.more.weight"),
        (lambda s: s | {"more.weight": torch.ones(1)}, "unknown weights: more.weight"),
        (lambda s: s | {"decoder.conv_in.weight": s["decoder.conv_in.weight"].to(torch.int8)}, "int8, whose scale"),
        (lambda s: s | {"colorize": torch.ones(1)}, "segmentation"),
        (lambda s: s | {"quantize.embed.weight": torch.ones(7, 4)}, "Gumbel"),
        (lambda s: s | {"quantize.used": torch.ones(7)}, "quantize.used"),
        (lambda s: s | {"decoder.up.999999999.block.0.norm1.weight": torch.ones(1)}, "unknown decoder"),
        (lambda s: s | {"encoder.conv_in.weight": torch.ones(4)}, "has no encoder.conv_in.weight of convolutions"),
        (lambda s: s | {"encoder.conv_in.weight": 3}, "is a int, not a tensor"),
    ],
)
def test_wrong_weights_are_refused_in_one_line(tmp_path, change, message):
    torch.save(change(state_of("vq")), tmp_path / "x.pt")
    with pytest.raises(AezooError, match=message) as refusal:
        aezoo.import_model(tmp_path / "x.pt")
    assert "\n" not in str(refusal.value)


def test_command_reads_a_checkpoint_of_the_hub(hub, tmp_path, capsys):
    file = tmp_path / "made.ckpt"
    torch.save({"state_dict": state_of("vq")}, file)
    sha = hub.put("user/vqgan", {"f2/last.ckpt": file.read_bytes()})
    hub.put("user/vqgan", {"f2/last.ckpt": b"broken later"})
    main(["import", f"hf://user/vqgan/f2/last.ckpt@{sha}", str(tmp_path / "out")])
    assert "found a first stage in the layout of taming-transformers, VQModel" in capsys.readouterr().out
    assert_same(aezoo.load_model(tmp_path / "out"), "vq")
