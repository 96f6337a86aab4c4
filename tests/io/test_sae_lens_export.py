"""Folders for SAELens: reading them gives the same model; tests/parity reads them with SAELens itself."""

import json

import pytest
import torch

import aezoo
from aezoo.io.exporters.sae_lens import save_sae_lens
from aezoo.registry import name_of

X, N = 6, 10
MODELS = [
    ("sae_l1", {}, "sae_l1"),
    ("sae_l1", {"form": "april", "input_norm": "rms_norm"}, "sae_l1"),
    ("gated_sae", {"form": "april"}, "gated_sae"),
    ("jumprelu_sae", {"threshold": 0.2, "input_norm": "layer_norm"}, "jumprelu_sae"),
    ("topk_sae", {"k": 3, "unit_norm": False}, "topk_sae"),
    ("abs_topk_sae", {"k": 3}, "abs_topk_sae"),
    ("batch_topk_sae", {"k": 3}, "jumprelu_sae"),
    ("matryoshka_sae", {"k": 3, "fractions": (0.5,)}, "jumprelu_sae"),
    *(("transcoder", {"targets": (1,), "skip": skip, "activation": activation}, "transcoder")
      for skip in (False, True) for activation in ("relu", "jumprelu")),
]  # fmt: skip


def build(name, **settings):
    torch.manual_seed(0)
    shape = (2, X) if name == "transcoder" else (X,)
    model = aezoo.create_model(name, shape, latent_dim=N, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.rand_like(p))
    if hasattr(model, "theta"):
        model.theta.value.fill_(0.25)
    model.after_optimizer_step()
    return model, torch.randn(9, *shape)


@pytest.mark.parametrize(("name", "settings", "back"), MODELS)
def test_written_folder_is_read_as_the_same_model(tmp_path, name, settings, back):
    model, x = build(name, **settings)
    found = aezoo.load_model(save_sae_lens(model, tmp_path / "out", {"hook_name": "blocks.3.hook_resid_post"}))
    assert name_of(type(found)) == back
    code = model.encode(x)
    assert 0 < int((code[:, :N] != 0).sum()) < code[:, :N].numel()
    torch.testing.assert_close(found.encode(x), code, rtol=1e-5, atol=1e-5)
    of_targets = (slice(None), 1) if name == "transcoder" else slice(None)
    torch.testing.assert_close(found(x)[of_targets], model(x)[of_targets], rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert config["metadata"] == {"sae_lens_version": "6.0.0", "hook_name": "blocks.3.hook_resid_post"}


def test_values_equal_to_the_threshold_stay_active(tmp_path):
    model, _ = build("batch_topk_sae", k=3)
    with torch.no_grad():
        model.encoder.weight.zero_()
        model.encoder.bias.fill_(0.25)
    x = torch.randn(2, X)
    assert (model.encode(x) == 0.25).all()
    assert (aezoo.load_model(save_sae_lens(model, tmp_path)).encode(x) == 0.25).all()


def test_scaling_is_folded(tmp_path):
    model, x = build("sae_l1", form="april")
    found = aezoo.load_model(save_sae_lens(model, tmp_path, scaling=4.0))
    torch.testing.assert_close(found(4 * x), 4 * model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("k_sparse", {"k": 3}, "no model like k_sparse"),
        ("sae_l1", {"likelihood": "bernoulli"}, "no output function"),
        ("transcoder", {"targets": (1,), "activation": "topk:3"}, "this one has topk:3"),
        ("transcoder", {}, "read one row and predict one"),
    ],
)
def test_what_sae_lens_does_not_have_is_refused(tmp_path, name, settings, message):
    shape = (2, X) if name == "transcoder" else (X,)
    model = aezoo.create_model(name, shape, latent_dim=N, **settings)
    with pytest.raises(aezoo.AezooError, match=message):
        save_sae_lens(model, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_metadata_that_are_no_plain_values_are_refused(tmp_path):
    model, _ = build("sae_l1")
    with pytest.raises(aezoo.AezooError, match="the metadata for SAELens"):
        save_sae_lens(model, tmp_path, {"hook": object()})
