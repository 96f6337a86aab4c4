"""Backbones of timm as encoders: features and weights equal timm's, frozen and trained backbones, refusals."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from representative_models import BACKBONES, RESNET, VIT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aezoo
from aezoo import nets, testing
from aezoo.nets.blocks.features import feature_map_shapes, feature_maps
from aezoo.nets.blocks.timm_backbone import Backbone, parse

MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def perturbed(net: nn.Module) -> nn.Module:
    """Perturb all weights and statistics, since mean 0 and variance 1 would hide mistakes."""
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.add_(0.05 * torch.rand_like(value))
    return net.eval()


def weights_of(net: nn.Module, file: Path) -> str:
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, file)
    return str(file)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_encoder_reads_the_last_map_of_timm(name: str, tmp_path: Path) -> None:
    theirs = perturbed(timm.create_model(name, num_classes=0))
    file = weights_of(theirs, tmp_path / "x.safetensors")
    encoder: Any = nets.encoder(f"timm:{name},pretrained={file}", (3, 64, 64), (5,), ())
    x = torch.rand(2, 3, 64, 64)
    config = theirs.pretrained_cfg
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    expected = theirs.forward_intermediates((x - mean) / std, indices=1, intermediates_only=True)[-1]
    found = encoder.eval().backbone(x)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder(x), encoder.head(expected), rtol=1e-5, atol=1e-5)


def test_vision_transformer_returns_normalised_token_map(tmp_path: Path) -> None:
    theirs = perturbed(timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8))
    file = weights_of(theirs, tmp_path / "x.safetensors")
    encoder: Any = nets.encoder(f"{VIT},pretrained={file}", (3, 32, 32), (5, 4, 4), ())
    x, mean = torch.rand(2, 3, 32, 32), torch.tensor(theirs.pretrained_cfg["mean"])[:, None, None]
    std = torch.tensor(theirs.pretrained_cfg["std"])[:, None, None]
    tokens = theirs.forward_features((x - mean) / std)[:, theirs.num_prefix_tokens :]
    torch.testing.assert_close(encoder.eval().backbone(x)[-1], tokens.mT.unflatten(2, (4, 4)), rtol=1e-5, atol=1e-5)


def test_weights_of_masked_autoencoders_are_read(tmp_path: Path) -> None:
    """Checkpoints of the authors and of transformers, without their decoders."""
    home = Path(__file__).parent.parent / "fixtures" / "mae"
    for source, expected, heads, eps in (
        ("authors/checkpoint.pth", "authors", 1, 1e-6), ("transformers/model.safetensors", "transformers", 3, 1e-12)
    ):  # fmt: skip
        sizes = f"img_size=8,patch_size=2,embed_dim=12,depth=2,num_heads={heads}"
        text = f"timm:vit_base_patch16_224.mae,{sizes},pretrained={home / source},frozen"
        encoder: Any = nets.encoder(text, (3, 8, 8), (5, 4, 4), ())
        outputs = load_file(home / expected / "expected.safetensors")
        tokens = outputs["tokens"][:, 1:].mT.unflatten(2, (4, 4))
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
        torch.testing.assert_close(encoder.backbone(outputs["x"])[-1], tokens, rtol=1e-4, atol=1e-4)


def test_one_channel_has_the_sum_of_pretrained_weights(tmp_path: Path) -> None:
    theirs = perturbed(timm.create_model("test_resnet"))
    file = weights_of(theirs, tmp_path / "x.safetensors")
    grey, colour = (Backbone(parse(f"test_resnet,pretrained={file}"), (n, 32, 32)) for n in (1, 3))
    first = {n: next(net.parameters()) for n, net in ((1, grey), (3, colour))}
    torch.testing.assert_close(first[1], first[3].sum(1, keepdim=True))
    assert grey.norm.mean.shape == (1, 1, 1)
    assert grey.norm.mean.item() == pytest.approx(colour.norm.mean.mean().item())


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (4, 27, 35)])
@pytest.mark.parametrize(
    "net", [RESNET, VIT, f"{RESNET},out_indices=1", f"{RESNET},decoder=mlp", f"{RESNET},img_size=64"]
)
def test_sample_shape_is_restored(net: str, shape: tuple[int, ...]) -> None:
    dims = nets.default_hidden_dims(net, shape)
    for code in ((6,), nets.map_shape(net, shape, dims, 4)):
        encoder, decoder = nets.encoder(net, shape, code, dims), nets.decoder(net, code, shape, dims[::-1])
        z = encoder(torch.rand(2, *shape))
        assert z.shape == (2, *code)
        assert decoder(z).shape == (2, *shape)
    if "mlp" not in net and "img_size" not in net:
        assert not any(isinstance(layer, nn.Upsample) for layer in decoder.modules())


def step(model: Any) -> dict[str, Tensor]:
    """Do a training step and return the weights before it."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-6)
    model.train().loss(torch.rand(4, *model.input_shape))["loss"].backward()
    optimizer.step()
    return before


def test_frozen_backbone_does_not_change() -> None:
    model: Any = aezoo.create_model("vae", (3, 32, 32), net=f"{RESNET},frozen,drop_path_rate=0.5")
    backbone = model.encoder.backbone
    assert not backbone.training and not any(part.training for part in backbone.modules())
    before, after = step(model), model.state_dict()
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert moved and not any("backbone" in key for key in moved)
    assert any("encoder.head" in key for key in moved)


def test_trained_backbone_keeps_the_statistics_of_batchnorm() -> None:
    model: Any = aezoo.create_model("vae", (3, 32, 32), net=RESNET)
    # two steps, since the last normalisation of a block starts at 0
    before, _, after = step(model), step(model), model.state_dict()
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert all(
        key in moved for key, _ in model.encoder.backbone.named_parameters("encoder.backbone") if "bn" not in key
    )
    assert not any("running" in key or "num_batches" in key for key in moved)
    # a new network gets the statistics of random images, so that its outputs are neither 0 nor large
    assert 0.1 < model.encoder.backbone(torch.rand(64, 3, 32, 32))[-1].std() < 10
    assert all(module.momentum == 0.1 for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_saved_model_needs_no_file_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(weights_of(perturbed(timm.create_model("test_resnet")), tmp_path / "x.safetensors"))
    model: Any = aezoo.create_model("vae", (3, 32, 32), net=f"{RESNET},pretrained={file},frozen")
    assert model.hparams["net"] == f"{RESNET},frozen"
    aezoo.save_model(model, tmp_path / "saved")
    file.unlink()
    again, x = aezoo.load_model(tmp_path / "saved"), torch.rand(2, 3, 32, 32)
    assert torch.equal(again.encode(x), model.eval().encode(x))
    # a config that names a file of weights does not load it
    config = tmp_path / "saved" / "config.json"
    config.write_text(config.read_text().replace(f"{RESNET},frozen", f"{RESNET},pretrained={file},frozen"))
    assert torch.equal(aezoo.load_model(tmp_path / "saved").encode(x), model.encode(x))


def test_manually_stored_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    text = f"{RESNET}.r160_in1k,pretrained"
    place = tmp_path / "checkpoints" / "test_resnet.r160_in1k.safetensors"
    with pytest.raises(
        aezoo.AezooError, match=f"cannot fetch the weights of test_resnet.r160_in1k .* put the file at {place}"
    ) as raised:
        nets.encoder(text, (3, 32, 32), (2,), ())
    assert "hf download timm/test_resnet.r160_in1k model.safetensors" in str(raised.value) and "\n" not in str(
        raised.value
    )
    place.parent.mkdir()
    theirs = perturbed(timm.create_model("test_resnet"))
    weights_of(theirs, place)
    encoder: Any = nets.encoder(text, (3, 32, 32), (2,), ())
    assert torch.equal(next(encoder.backbone.parameters()), next(theirs.parameters()))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ("timm:test_resnt", "did you mean test_resnet"),
        ("timm:test_resnet.nothing", r"no weights 'test_resnet.nothing': choose from test_resnet\.r160_in1k"),
        ("timm:test_resnet,frozen=7", "frozen cannot be '7'"),
        ("timm:test_resnet,frozen,frozen", "'frozen' is given twice"),
        ("timm:test_resnet,num_classes=3", "'num_classes' is given twice, or is not allowed"),
        ("timm:test_resnet,checkpoint_path=x.pth", "not allowed"),
        ("timm:test_resnet,bogus=1", "unexpected keyword argument 'bogus'"),
        ("timm:test_resnet,pretrained=nowhere", "names 0 files of weights"),
        ("timm:test_resnet,out_indices=1:2", "out_indices one number"),
        ("timm:test_resnet,decoder=vit", "decoder takes conv"),
        ("timm:", "timm has no model ''"),
        ("tim:resnet18", "or timm:NAME"),
    ],
)
def test_texts_that_describe_no_backbone_are_refused(net: str, message: str) -> None:
    with pytest.raises(aezoo.AezooError, match=message) as raised:
        aezoo.create_model("vae", (3, 32, 32), net=net)
    assert "\n" not in str(raised.value)


def test_samples_that_a_backbone_cannot_take_are_refused() -> None:
    for shape in ((30,), (3, 128), (1, 12, 12, 12)):
        with pytest.raises(aezoo.AezooError, match="take images"):
            aezoo.create_model("vae", shape, net=RESNET)
    with pytest.raises(aezoo.AezooError, match=r"does not take samples of shape \(1, 8, 8\)"):
        aezoo.create_model("vae", (1, 8, 8), net="timm:test_convnext")


def test_file_without_all_weights_is_refused(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    file = tmp_path / "x.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, file)
    nets.encoder(f"{RESNET},pretrained={file}", (3, 32, 32), (2,), ())
    for content, message in (
        ({k: v for k, v in state.items() if not k.startswith("layer2")}, "it has no layer2.0.conv1.weight"),
        ({"a": torch.zeros(1)}, "it has no conv1"),
        (state | {"layer2.0.conv1.weight": torch.zeros(1)}, "size mismatch"),
        (state | {"layer2.0.conv1.weight": "text"}, "is a str, not a tensor"),
        (torch.zeros(3), "contains a Tensor"),
    ):
        torch.save(content, file)
        with pytest.raises(aezoo.AezooError, match=message) as raised:
            nets.encoder(f"{RESNET},pretrained={file}", (3, 32, 32), (2,), ())
        assert "\n" not in str(raised.value)


def test_new_weights_depend_only_on_the_seed() -> None:
    def first() -> Tensor:
        torch.manual_seed(3)
        return next(nets.encoder("timm:test_convnext", (3, 48, 64), (2,), ()).parameters())

    assert torch.equal(first(), first())


@pytest.mark.slow
def test_light_commands_do_not_import_timm() -> None:
    code = (
        "import sys, aezoo; from aezoo.cli.main import main; main(['list']); aezoo.create_model('vae'); "
        "assert 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ---- the contract ----------------------------------------------------------------------------------------------------

_QUICK = (
    testing.check_shapes, testing.check_loss, testing.check_batch_of_one, testing.check_gradients,
    testing.check_inputs_unchanged, testing.check_batch_independence, testing.check_state_dict,
)  # fmt: skip


@pytest.mark.parametrize("check", _QUICK, ids=lambda check: check.__name__)
@pytest.mark.parametrize("net", [RESNET, VIT])
def test_contract_is_kept(net: str, check: Any) -> None:
    check("vae", net=net)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "net"), BACKBONES)
def test_whole_contract_is_kept(name: str, net: str) -> None:
    # check_onnx includes check_export; the graphs of a frozen network are those of one that trains
    graphs = ["check_onnx", "check_compile"] if "frozen" in net else ["check_compile"] if net == RESNET else []
    testing.check_model(name, exclude=["check_ddp", "check_export", *graphs], net=net)


# ---- feature maps ----------------------------------------------------------------------------------------------------


def test_feature_maps_are_those_of_timm() -> None:
    net = feature_maps("timm:test_resnet,out_indices=1:2:3", (3, 64, 64))
    theirs = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3)).eval()
    theirs.load_state_dict(net.backbone.net.state_dict())  # type: ignore[union-attr]
    x = torch.rand(2, 3, 64, 64)
    config = theirs.pretrained_cfg
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    for found, expected in zip(net(x), theirs((x - mean) / std), strict=True):
        torch.testing.assert_close(found, expected)
    assert [tuple(f.shape[1:]) for f in net(x)] == feature_map_shapes("timm:test_resnet,out_indices=1:2:3", (3, 64, 64))
    assert not any(p.requires_grad for p in net.parameters()) and not net.training
    assert net.distance(net(x), net(x)).abs().max() == 0 and (net.distance(net(x), net(1 - x)) > 0).all()
    # Swin gives channels last
    swin = feature_map_shapes("timm:swin_tiny_patch4_window7_224,embed_dim=12,img_size=64,window_size=2", (3, 64, 64))
    assert swin == [(12, 16, 16), (24, 8, 8), (48, 4, 4), (96, 2, 2)]


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_feature_maps_are_those_of_torchvision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    from aezoo.nets.blocks.pretrained import cached_file

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    text = f"torchvision:{name},out_indices=0:-1"
    with pytest.raises(aezoo.AezooError, match=f"no weights of {name}"):
        feature_maps(text, (3, 64, 64))
    theirs = perturbed(models.get_model(name, weights=None))
    torch.save(theirs.state_dict(), cached_file(name))
    net, x = feature_maps(text, (3, 64, 64)), torch.rand(2, 3, 64, 64)
    first, last = net(x)
    out = (x - MEAN) / STD
    if name == "resnet18":
        for part in ("conv1", "bn1", "relu", "maxpool", *(f"layer{i}" for i in range(1, 5))):
            out = getattr(theirs, part)(out)
            if part == "relu":
                torch.testing.assert_close(first, out)
    else:
        out = theirs.features(out)
    torch.testing.assert_close(last, out)
    assert [tuple(f.shape[1:]) for f in (first, last)] == feature_map_shapes(text, (3, 64, 64))
    assert net(x[:, :1])[0].shape == first.shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet81", "did you mean"),
        ("torchvision:vit_b_16", "no feature maps: use timm:NAME"),
        ("torchvision:resnet18,out_indices=5", "feature maps 0 to 4"),
    ],
)
def test_names_without_feature_maps_are_refused(name: str, message: str) -> None:
    with pytest.raises(aezoo.AezooError, match=message):
        feature_map_shapes(name, (3, 64, 64))


def test_models_and_detectors_compare_feature_maps() -> None:
    from aezoo.tasks.detect_features import FrozenFeatures

    x = torch.rand(2, 3, 32, 32)
    for name, argument in (("perceptual_vae", "features"), ("vqgan", "features"), ("va_vae", "foundation")):
        model: Any = aezoo.create_model(name, (3, 32, 32), **{argument: f"{RESNET},out_indices=1:2"})
        terms = model.loss(x)
        assert all(value.isfinite() for value in terms.values())
        terms["loss"].backward()
        assert not any("backbone" in key for key in model.state_dict())
    # random weights are reproducible
    first, second = (feature_maps(RESNET, (3, 32, 32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first(x), second(x), strict=True))
    assert FrozenFeatures(f"{RESNET},out_indices=2", (3, 32, 32))(x).shape[0] == 2
