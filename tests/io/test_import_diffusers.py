"""Image autoencoders of diffusers: folders, pipelines, subfolders, variants and single files."""

import json
import re
import shutil
from contextlib import nullcontext

import diffusers
import pytest
import torch
from diffusers_reference import CONSISTENCY, RAE, decoded, encoded, side_for
from representative_models import others_slow
from safetensors.torch import load_file, save_file

import aezoo
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.io.exporters.diffusers import save_diffusers
from aezoo.io.importers.diffusers import infer_arguments
from aezoo.nets.blocks.diffusers import KINDS, REFUSED

WEIGHTS = "diffusion_pytorch_model.safetensors"
TWO = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
SMALL = {**TWO, "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
HEADER = {"format": "pt"}


def made(kind="AutoencoderKL", **settings):
    torch.manual_seed(0)
    net = getattr(diffusers, kind)(**settings).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def small(**settings):
    return made(**SMALL, **settings)


def images(n=1, shape=(3, 16, 24)):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def assert_same(model, net, x=None):
    x = images() if x is None else x
    z = encoded(net, x)
    x_hat = decoded(net, z)
    torch.testing.assert_close(model.encode(x), z, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x), x_hat, rtol=0, atol=1e-5)
    assert z.std() > 0.01 and x_hat.std() > 0.01


@pytest.mark.parametrize("kind", others_slow(KINDS, ("AutoencoderKL", "VQModel")))
def test_folder_of_each_kind(tmp_path, kind):
    channels = {"in_channels": 3, "out_channels": 3} if kind == "AutoencoderKLHunyuanImage" else {}
    net = made(kind, **KINDS[kind], **channels, **side_for(kind, 16))
    x = images(2, (3, 16, 16)) if kind == RAE else None
    net.save_pretrained(tmp_path / "theirs")
    imported = aezoo.import_model(tmp_path / "theirs")
    assert imported.found.startswith(f"diffusers, {kind}, 3 channels, codes of ")
    model = imported.model
    assert not model.training and model.hparams["pretrained"] == "none"
    assert_same(model, net, x)  # of another size than that of the config
    saved = aezoo.save_model(model, tmp_path / "saved")
    shutil.rmtree(tmp_path / "theirs")
    assert_same(aezoo.load_model(saved), net, x)


@pytest.mark.slow
def test_pipeline_with_a_consistency_decoder(tmp_path, hub):
    """As in a pipeline of Stable Diffusion, and by an address with a subfolder."""
    net = made(CONSISTENCY, **KINDS[CONSISTENCY])
    pipeline(tmp_path, net)
    imported = aezoo.import_model(tmp_path)
    assert_same(imported.model, net)
    assert imported.model.input_shape == (3, 32, 32) and "model.decoder.draw(z) draws it" in imported.notes[-1]
    z = imported.model.encode(images()).detach()
    torch.testing.assert_close(imported.model.standardiser(z), 0.18215 * z)
    names = ("model_index.json", "vae/config.json", f"vae/{WEIGHTS}")
    hub.put("user/pipe", {name: (tmp_path / name).read_bytes() for name in names})
    for address in ("hf://user/pipe", "hf://user/pipe/vae", f"hf://user/pipe/vae/{WEIGHTS}"):
        assert_same(aezoo.load_model(address), net)


# ---- representation autoencoders -------------------------------------------------------------------------------------


def representation(side=16, **settings):
    net = made(RAE, **{**KINDS[RAE], **side_for(RAE, side), **settings})
    for name, mean in (("_latents_mean", 0.0), ("_latents_std", 1.0)):
        buffer = getattr(net, name)
        buffer.copy_(mean + 0.3 * torch.rand_like(buffer))
    return net


def statistics(*shape):
    values = torch.zeros(shape).tolist()
    return {"latents_mean": values, "latents_std": values, "scaling_factor": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1,), (64, 1, 1), (64, 4, 4)])
def test_statistics_of_codes_are_read_from_the_weights(tmp_path, shape):
    """Published models have as many statistics as code values, also in the config, which is then large."""
    net, x = representation(**statistics(*shape)), images(2, (3, 16, 16))
    net.save_pretrained(tmp_path / "theirs")
    for model in (
        aezoo.load_model(tmp_path / "theirs"),
        aezoo.create_model("diffusers_ae", (3, 16, 16), pretrained=str(tmp_path / "theirs")).eval(),
    ):
        assert_same(model, net, x)
        assert model.hparams["config"]["latents_mean"] is None
        z = model.encode(x)
        assert model.standardiser(z).equal(z) and model.standardiser.restore(z).equal(z)
    saved = aezoo.save_model(model, tmp_path / "saved")
    assert_same(aezoo.load_model(saved), net, x)
    save_diffusers(aezoo.load_model(saved), tmp_path / "back")
    assert_same(model, getattr(diffusers, RAE).from_pretrained(tmp_path / "back").eval(), x)


def test_statistics_of_another_shape_than_a_code_are_refused(tmp_path):
    representation(**statistics(1)).save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    for shape in ((63, 4, 4), (64, 5, 4), (2, 64, 4, 4)):
        save_file({**state, "_latents_mean": torch.zeros(shape)}, tmp_path / WEIGHTS, HEADER)
        with pytest.raises(AezooError, match="_latents_mean has the shape"):
            aezoo.load_model(tmp_path)
    save_file({key: value for key, value in state.items() if key != "_latents_std"}, tmp_path / WEIGHTS, HEADER)
    with pytest.raises(AezooError, match="it has no _latents_std"):
        aezoo.load_model(tmp_path)


def test_config_larger_than_other_files_is_read(tmp_path):
    representation(**statistics(64, 4, 4)).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text() + " " * (2**24 + 1))
    assert aezoo.load_model(tmp_path).kind == RAE


# names of attention layers in version 4 of transformers, with which the published weights were written
FULL = {"q": "query", "k": "key", "v": "value"}
FORMER = {
    "dinov2": (
        (r"\.attention\.(q|k|v)_proj\.", lambda m: f".attention.attention.{FULL[m[1]]}."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
    ),
    "siglip2": ((r"^encoder\.", "encoder.vision_model."),),
    "mae": (
        (r"^encoder\.layers\.", "encoder.encoder.layer."),
        (r"\.attention\.(q|k|v)_proj\.", lambda m: f".attention.attention.{FULL[m[1]]}."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
}


@pytest.mark.parametrize("kind", others_slow(FORMER, ("mae",)))
def test_names_of_earlier_transformers_are_read(tmp_path, kind):
    patch = 14 if kind == "dinov2" else 16
    config = {"encoder_type": kind, "encoder_patch_size": patch, "encoder_input_size": 4 * patch}
    model, x = aezoo.create_model("diffusers_ae", (3, 16, 16), kind=RAE, config=config).eval(), images(1, (3, 16, 16))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_diffusers(model, tmp_path / "theirs")
    state, named = load_file(tmp_path / "theirs" / WEIGHTS), {}
    # transformers 5.0 still has the former names
    has_former = any(re.search(r"\.attention\.attention\.query|^encoder\.vision_model\.", key) for key in state)
    for key, value in state.items():
        for old, new in () if has_former else FORMER[kind]:
            key = re.sub(old, new, key) if key.startswith("encoder.") else key
        named[key] = value
    assert has_former or len(named.keys() - state.keys()) >= 6
    save_file(named, tmp_path / "theirs" / WEIGHTS, HEADER)
    found = aezoo.load_model(tmp_path / "theirs")
    assert torch.equal(found(x), model(x)) and found(x).std() > 0.01
    # also in a saved model
    saved = aezoo.save_model(model, tmp_path / "saved")
    weights = next(path for path in saved.iterdir() if path.suffix == ".safetensors")
    state = load_file(weights)
    inside = "encoder.net."
    for key in [key for key in state if key.startswith(f"{inside}encoder.")]:
        new = key.removeprefix(inside)
        for old, to in () if has_former else FORMER[kind]:
            new = re.sub(old, to, new)
        state[f"{inside}{new}"] = state.pop(key)
    save_file(state, weights)
    assert torch.equal(aezoo.load_model(saved)(x), model(x))


def test_weights_in_several_files(tmp_path):
    net = small()
    net.save_pretrained(tmp_path, max_shard_size="5KB")
    assert not (tmp_path / WEIGHTS).exists()
    imported = aezoo.import_model(tmp_path)
    assert_same(imported.model, net)
    assert re.search(r"weights from \d+ files, ", imported.notes[0])


@pytest.mark.slow
def test_half_precision_variant_and_pickled_weights(tmp_path):
    net = small()
    net.half().save_pretrained(tmp_path / "half", variant="fp16")
    model = aezoo.load_model(tmp_path / "half")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same(model, net.float())
    net.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert not (tmp_path / "bin" / WEIGHTS).exists()
    assert_same(aezoo.load_model(tmp_path / "bin"), net)
    shutil.copy(
        tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors",
        tmp_path / "half" / "diffusion_pytorch_model.ema.safetensors",
    )
    with pytest.raises(AezooError, match="several variants: give one of"):
        aezoo.import_model(tmp_path / "half")
    assert_same(aezoo.load_model(tmp_path / "half" / "diffusion_pytorch_model.ema.safetensors"), net)


def pipeline(folder, net, name="vae", **others):
    net.save_pretrained(folder / name)
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], **others}
    (folder / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", type(net).__name__]}))


@pytest.mark.slow
def test_autoencoder_of_a_pipeline_is_found(tmp_path):
    net = small(scaling_factor=0.3, shift_factor=0.1)
    pipeline(tmp_path, net, safety_checker=[None, None], requires_aesthetics_score=False)
    for address in (tmp_path, tmp_path / "model_index.json", tmp_path / "vae"):
        imported = aezoo.import_model(address)
        assert_same(imported.model, net)
    assert "scaling_factor 0.3, shift_factor 0.1" in imported.notes[-1]
    (tmp_path / "model_index.json").unlink()
    assert_same(aezoo.load_model(tmp_path), net)
    vq = made("VQModel", **SMALL)
    pipeline(tmp_path / "other", vq, "movq")
    assert aezoo.import_model(tmp_path / "other").found.startswith("the movq of a pipeline of diffusers, VQModel")
    pipeline(tmp_path / "other", net, "second", movq=["diffusers", "VQModel"])
    with pytest.raises(AezooError, match="several, movq, second: give the folder of one"):
        aezoo.import_model(tmp_path / "other")
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(AezooError, match="autoencoders in it: none"):
        aezoo.import_model(tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "movq")
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(AezooError, match=r"has no vae/config.json, which its model_index.json names"):
        aezoo.import_model(tmp_path / "other")


@pytest.mark.slow
def test_addresses_with_subfolder_and_revision(hub, tmp_path):
    first, second = small(), small(latent_channels=3)
    commits = []
    for net in (first, second):
        pipeline(tmp_path / "pipe", net)
        names = ("model_index.json", "vae/config.json", f"vae/{WEIGHTS}")
        commits.append(hub.put("user/pipe", {name: (tmp_path / "pipe" / name).read_bytes() for name in names}))
        hub.put("user/pipe", {"unet/config.json": b"{}", f"unet/{WEIGHTS}": b"not asked for"})
    assert_same(aezoo.load_model("hf://user/pipe"), second)
    assert_same(aezoo.load_model("hf://user/pipe/vae"), second)
    assert_same(aezoo.load_model(f"hf://user/pipe/vae@{commits[0]}"), first)
    assert_same(aezoo.load_model(f"hf://user/pipe/vae/{WEIGHTS}@{commits[0]}"), first)
    assert not any("unet" in path for path in hub.asked)
    main(["import", f"hf://user/pipe/vae@{commits[0]}", "ours"])
    assert_same(aezoo.load_model("ours"), first)
    with pytest.raises(AezooError, match="has no revision 'other'"):
        aezoo.load_model("hf://user/pipe/vae@other")


# ---- codes for diffusion models --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "scaled"),
    [
        ({"scaling_factor": 0.5}, lambda z: 0.5 * z),
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, lambda z: 0.5 * (z - 0.25)),
        (
            {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 8.0]},
            lambda z: 0.5 * (z - torch.arange(1.0, 5)[:, None, None]) / torch.tensor([1.0, 2, 4, 8])[:, None, None],
        ),
    ],
)
def test_codes_are_scaled_as_the_config_states(tmp_path, settings, scaled):
    small(latent_channels=4, **settings).save_pretrained(tmp_path / "theirs")
    model = aezoo.load_model(aezoo.save_model(aezoo.load_model(tmp_path / "theirs"), tmp_path / "ours"))
    z = model.encode(images()).detach()
    torch.testing.assert_close(model.standardiser(z), scaled(z))
    torch.testing.assert_close(model.standardiser.restore(model.standardiser(z)), z)
    # taesd learns these codes
    student = aezoo.create_model("taesd", (3, 16, 16), teacher=str(tmp_path / "ours"), hidden_dims=(4,))
    x = images(2, (3, 16, 16))
    torch.testing.assert_close(student.teacher_codes(x), scaled(aezoo.at_size(model, (16, 16)).encode(x).detach()))


def test_codes_of_flux_2_are_normalised_patch_by_patch(tmp_path):
    net = made("AutoencoderKLFlux2", **KINDS["AutoencoderKLFlux2"])
    net.bn.running_mean.copy_(torch.randn(32))
    net.bn.running_var.copy_(torch.rand(32) + 0.5)
    net.save_pretrained(tmp_path)
    model, x = aezoo.load_model(tmp_path), images()
    z = model.encode(x).detach()
    patches = torch.nn.functional.pixel_unshuffle(z, 2)  # ordered by channel, then by row and column in the patch
    normal = torch.nn.functional.pixel_shuffle(net.bn(patches), 2)
    torch.testing.assert_close(model.standardiser(z), normal, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.standardiser.restore(normal), z, rtol=1e-5, atol=1e-5)
    assert model.standardiser(z[..., :-1, :]).shape == z[..., :-1, :].shape


# ---- single files ----------------------------------------------------------------------------------------------------


def test_single_file_without_config(tmp_path):
    net = made(
        "AutoencoderKL", **{**SMALL, "block_out_channels": [32, 64], "norm_num_groups": 32, "latent_channels": 5}
    )
    save_file(net.state_dict(), tmp_path / "vae.safetensors", HEADER)
    imported = aezoo.import_model(tmp_path / "vae.safetensors")
    assert_same(imported.model, net)
    assert imported.model.input_shape == (3, 256, 256) and "0.18215" in imported.notes[-1]
    vq = made("VQModel", **{**SMALL, "block_out_channels": [32, 64], "norm_num_groups": 32, "vq_embed_dim": 2})
    torch.save(vq.state_dict(), tmp_path / "vq.pt")
    assert_same(aezoo.load_model(tmp_path / "vq.pt"), vq)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CONSISTENCY, RAE])
def test_single_file_of_other_kinds_needs_its_config(tmp_path, kind):
    net = made(kind, **KINDS[kind], **side_for(kind, 16))
    net.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "other.safetensors")
    x = images(1, (3, 16, 16))
    assert_same(aezoo.load_model(tmp_path / "other.safetensors"), net, x)
    (tmp_path / "config.json").unlink()
    with pytest.raises(AezooError, match=f"contains weights of {kind}, .* put its config.json beside it") as refusal:
        aezoo.import_model(tmp_path / "other.safetensors")
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_stable_diffusions_layout_as_diffusers_reads_it(tmp_path):
    """The diffusers class converts the file with our arguments, and gives the same outputs."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    settings = {**blocks, "block_out_channels": [32, 32, 64], "layers_per_block": 2, "latent_channels": 5}
    net = made("AutoencoderKL", **settings)
    save_file(original(net.state_dict(), 3), tmp_path / "sd.safetensors", HEADER)
    model = aezoo.load_model(tmp_path / "sd.safetensors")
    assert_same(model, net)
    name, arguments = infer_arguments(net.state_dict(), "")
    getattr(diffusers, name)(**arguments).save_config(tmp_path / "config")
    theirs = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "sd.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    )
    assert_same(model, theirs.eval())


def original(state, n):
    """Weights by their names in latent diffusion."""
    names = (
        (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
        (r"mid_block\.resnets\.0\.", "mid.block_1."),
        (r"mid_block\.resnets\.1\.", "mid.block_2."),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    )
    found = {}
    for key, value in state.items():
        up = re.match(r"decoder\.up_blocks\.(\d+)\.", key)
        if up:
            key = f"decoder.up.{n - 1 - int(up[1])}.{key[up.end() :]}"
            key = key.replace("resnets", "block").replace("upsamplers.0", "upsample")
        for old, new in names:
            key = re.sub(old, new, key)
        linear = "attn_1" in key and value.ndim == 2
        found[f"first_stage_model.{key}"] = value[..., None, None].contiguous() if linear else value
    return found


DC = {
    "encoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_qkv_multiscales": [[], [], [5]],
    "decoder_qkv_multiscales": [[], [], [5]],
    "encoder_block_out_channels": [32, 32, 64],
    "decoder_block_out_channels": [32, 32, 64],
    "latent_channels": 8,
}
SANA = {"downsample_block_type": "conv", "upsample_block_type": "interpolate"}
FIRST = {"encoder_layers_per_block": [0, 1, 2], "decoder_layers_per_block": [0, 2, 1]}
ALL = {"encoder_layers_per_block": [1, 1, 2], "decoder_layers_per_block": [1, 2, 1]}
NORMS = {
    "decoder_norm_types": ["batch_norm", "batch_norm", "rms_norm"],
    "decoder_act_fns": ["relu", "relu", "silu"],
}


def original_dc(state):
    """Weights by their names in DC-AE's own code, as used by its converter in diffusers."""
    found = {}
    qkv = {}
    first = {"encoder.conv_in": "encoder.project_in", "decoder.conv_out": "decoder.project_out.2"}
    for key, value in state.items():
        name, _, rest = key.rpartition(".")
        if name in first or name.removesuffix(".conv") in first:
            inside = ".conv" if name.endswith(".conv") else ""
            found[f"{first[name.removesuffix('.conv')]}.conv{inside}.{rest}"] = value
            continue
        for part, to in (("encoder.down_blocks", "encoder.stages"), ("decoder.up_blocks", "decoder.stages")):
            key = key.replace(part, to)
        ends = {
            "encoder.conv_out": "encoder.project_out.0.conv",
            "decoder.conv_in": "decoder.project_in.conv",
            "decoder.norm_out": "decoder.project_out.0",
        }
        if name in ends:
            found[f"{ends[name]}.{rest}"] = value
            continue
        match = re.match(r"(\w+\.stages\.\d+)\.(\d+)\.(.+)", key)
        stage, block, rest = match[1], match[2], match[3]
        start = f"{stage}.op_list.{block}"
        if rest.startswith("attn.to_") and rest[8] in "qkv" and rest[9] == ".":
            qkv.setdefault(f"{start}.context_module.main.qkv.conv.weight", {})[rest[8]] = value[..., None, None]
            continue
        rules = (
            (r"^attn\.to_qkv_multiscale\.(\d+)\.proj_in\.", r"context_module.main.aggreg.\1.0."),
            (r"^attn\.to_qkv_multiscale\.(\d+)\.proj_out\.", r"context_module.main.aggreg.\1.1."),
            (r"^attn\.to_out\.", "context_module.main.proj.conv."),
            (r"^attn\.norm_out\.", "context_module.main.proj.norm."),
            (r"^conv_out\.conv_inverted\.", "local_module.main.inverted_conv.conv."),
            (r"^conv_out\.conv_depth\.", "local_module.main.depth_conv.conv."),
            (r"^conv_out\.conv_point\.", "local_module.main.point_conv.conv."),
            (r"^conv_out\.norm\.", "local_module.main.point_conv.norm."),
            (r"^conv1\.", "main.conv1.conv."),
            (r"^conv2\.", "main.conv2.conv."),
            (r"^norm\.", "main.conv2.norm."),
            (r"^conv\.", "main.conv.conv."),
        )
        for old, new in rules:
            rest = re.sub(old, new, rest)
        is_linear = rest.endswith("proj.conv.weight") and value.ndim == 2
        found[f"{start}.{rest}"] = value[..., None, None].contiguous() if is_linear else value
    return found | {key: torch.cat([parts[name] for name in "qkv"]).contiguous() for key, parts in qkv.items()}


@pytest.mark.parametrize("more", [ALL, {**FIRST, **NORMS}, {**ALL, **SANA}], ids=["all", "first stage empty", "sana"])
def test_deep_compression_autoencoders_as_diffusers_reads_them(tmp_path, more):
    net = made("AutoencoderDC", **DC, **more)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    save_file(original_dc(net.state_dict()), tmp_path / "model.safetensors", HEADER)
    model = aezoo.import_model(tmp_path / "model.safetensors").model
    assert_same(model, net)
    net.save_config(tmp_path / "config")
    theirs = diffusers.AutoencoderDC.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    )
    assert_same(model, theirs.eval())
    (tmp_path / "broken.pt").write_bytes(b"")
    state = load_file(tmp_path / "model.safetensors")
    torch.save({k: v for k, v in state.items() if "project_out.0.conv" not in k}, tmp_path / "broken.pt")
    with pytest.raises(AezooError, match="is not a whole AutoencoderDC"):
        aezoo.import_model(tmp_path / "broken.pt")


# ---- invalid files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "unknown kind 'UNet2DModel'"),
        ({"_class_name": ["AutoencoderKL"]}, "has no model name"),
        ({"_class_name": "AutoencoderKLWan"}, "is made for videos"),
        ({"_class_name": "AutoencoderRAE"}, "ask for far more than the"),
        ({"_class_name": "AutoencoderRAE", "encoder_patch_size": "evil"}, "does not take config"),
        (
            {"_class_name": "AutoencoderRAE", "encoder_patch_size": 1, "encoder_input_size": 10**6},
            "at most 256 positions",
        ),
        ({"_class_name": "AutoencoderRAE", "encoder_hidden_size": 10**6}, "ask for far more than the"),
        ({"_class_name": "AutoencoderRAE", "encoder_type": "evil.Evil"}, "does not take config"),
        ({"_class_name": "ConsistencyDecoderVAE"}, "ask for far more than the"),
        ({"_class_name": "ConsistencyDecoderVAE", "decoder_num_train_timesteps": 9}, "it decodes at"),
        (
            {"_class_name": "ConsistencyDecoderVAE", "decoder_up_block_types": ["evil.Evil"] * 4},
            "does not take config|ask",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised"),
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "specifies other code to run instead of"),
        ({"down_block_types": ["evil.Evil"] * 2}, "does not take config"),
        ({"block_out_channels": {"class_path": "evil.Evil"}}, "names a class to import"),
        ({"block_out_channels": [4096, 4096]}, "ask for far more than the"),
        ({"latent_channels": 3}, "has the shape"),
        ({"layers_per_block": 2}, "has no .*resnets"),
        ({"in_channels": 10**9}, "not a number of channels"),
        ({"in_channels": "3"}, "not a number of channels"),
        ({"out_channels": 2}, "gives .* back for"),
    ],
    ids=str,
)
def test_wrong_and_hostile_configs_are_refused_in_one_line(tmp_path, change, message):
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(AezooError, match=message) as refusal:
        aezoo.import_model(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("side", [10**9, 0, -1, "large", 33, [16, 8]])
def test_invalid_sample_sizes_in_the_config(tmp_path, side):
    net = small()
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sample_size": side}))
    if side in (0, "large", -1, 10**9):
        with pytest.raises(AezooError, match="does not take config") if side == "large" else nullcontext():
            assert_same(aezoo.import_model(tmp_path).model, net)
        return
    model = aezoo.import_model(tmp_path).model
    assert model.input_shape[1:] == ((16, 8) if side == [16, 8] else (256, 256))
    assert_same(model, net)


def test_wrong_indices_and_missing_files_are_refused(tmp_path):
    small().save_pretrained(tmp_path, max_shard_size="5KB")
    index = tmp_path / f"{WEIGHTS}.index.json"
    places = json.loads(index.read_text())["weight_map"]
    one, *_, other = sorted(set(places.values()))

    def refused(message):
        with pytest.raises(AezooError, match=message) as refusal:
            aezoo.import_model(tmp_path)
        assert "\n" not in str(refusal.value)

    for name in ("part.bin", "../x.safetensors", "/etc/x.safetensors"):
        index.write_text(json.dumps({"weight_map": {**places, "more": name}}))
        refused("is refused: .* is not a .safetensors file beside it")
    index.write_text(json.dumps({"weight_map": {**places, "more": 3}}))
    refused("names no files")
    index.write_text(json.dumps({"weight_map": {**places, "more": "no.safetensors"}}))
    refused("has no no.safetensors, which its index names")
    index.write_text(json.dumps({"weight_map": places}))
    shutil.copy(tmp_path / one, tmp_path / other)
    refused("contains .* a second time")
    index.unlink()
    for name in {*places.values()}:
        (tmp_path / name).unlink()
    refused(f"has no weights {WEIGHTS}")
    (tmp_path / WEIGHTS).write_bytes(b"\0" * 20)
    refused("cannot read .*diffusion_pytorch_model")


def test_kinds_that_are_no_images_are_refused(tmp_path):
    for kind in REFUSED:
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
        with pytest.raises(AezooError, match=f"{kind} of diffusers"):
            aezoo.import_model(tmp_path)
