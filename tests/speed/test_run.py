"""`aezoo.speed` as a whole: enabled during a fit or a prediction, disabled after it, with the same results."""

import ast
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import aezoo
from aezoo.errors import AezooError
from aezoo.nets import narrow_conv
from aezoo.speed import conv2d, layers, linear, parts
from aezoo.speed.swapping import Swapped
from aezoo.training import speed

PACKAGE = Path(aezoo.__file__).parent
CONV: dict[str, Any] = {"net": "conv", "hidden_dims": (8, 16), "latent_dim": 4}


def trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return pl.Trainer(callbacks=[*callbacks], enable_model_summary=False, **quiet, **settings)


def data(shape: tuple[int, ...], n: int = 64) -> aezoo.DataModule:
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(3))
    return aezoo.DataModule.from_arrays(x, batch_size=16, val_fraction=0.25, test_fraction=0.25)


def faster(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, Swapped)]


class Losses(pl.Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["loss"]))


def losses(setting: str, name: str, shape: tuple[int, ...], precision: Any, monkeypatch: Any, **plain: Any) -> Any:
    monkeypatch.setenv("AEZOO_SPEED", setting)
    pl.seed_everything(5, verbose=False)
    model, seen = aezoo.create_model(name, shape, **plain), Losses()
    trainer(seen, max_steps=50, precision=precision).fit(model, data(shape))
    assert not faster(model)
    return torch.tensor(seen.seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "plain", "precision"),
    [
        ("dense_ae", (1, 12, 12), {}, "32-true"),
        ("vae", (1, 12, 12), {}, "32-true"),
        ("topk_sae", (24,), {"latent_dim": 48, "k": 4}, "32-true"),
        # in float64, where training does not amplify the rounding of sums in another order
        ("vae", (1, 12, 12), CONV, "64-true"),
        ("vae", (3, 12, 12), {**CONV, "net": "resnet", "likelihood": "gaussian"}, "64-true"),
        ("vq_vae", (1, 12, 12), {"hidden_dims": (8, 8)}, "64-true"),
        ("wae_gan", (10,), {}, "64-true"),
        ("mae", (1, 12, 12), {"patch_size": 4}, "64-true"),
    ],
)
def test_losses_match_without_speed_package(
    name: str, shape: tuple[int, ...], plain: dict[str, Any], precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, wanted = (losses(setting, name, shape, precision, monkeypatch, **plain) for setting in ("auto", "off"))
    assert len(found) == 50
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


class SwapRecorder(pl.Callback):
    """Records the swapped classes, and copies of the model, during a fit or a prediction."""

    def __init__(self, then: BaseException | None = None) -> None:
        self.then = then
        self.kinds: set[type] = set()

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.kinds |= {type(part) for part in faster(module)}
        inner = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_checkpointing=False)
        before = module.trainer
        inner.predict(module, data(module.input_shape, 16))
        module.trainer = before
        module.train()
        assert {type(part) for part in faster(module)} == self.kinds  # a prediction within the fit restores none
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert not faster(other)
            assert [*other.state_dict()] == [*module.state_dict()]
        if self.then is not None:
            raise self.then

    def on_predict_batch_start(self, trainer: pl.Trainer, module: Any, *batch: Any) -> None:
        self.kinds |= {type(part) for part in faster(module)}
        if self.then is not None:
            raise self.then


@pytest.mark.parametrize("then", [None, ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_fit_restores_swapped_layers_after_any_end(then: BaseException | None) -> None:
    model, recorder = aezoo.create_model("vae", (1, 12, 12), **CONV), SwapRecorder(then)
    plain = [type(part) for part in model.modules()]
    try:
        trainer(recorder, max_steps=1).fit(model, data((1, 12, 12)))
    except (ValueError, KeyboardInterrupt, SystemExit):
        assert then is not None
    assert conv2d.NarrowConv2d in recorder.kinds
    assert [type(part) for part in model.modules()] == plain
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("then", [None, ValueError("no")], ids=repr)
def test_prediction_restores_swapped_layers_after_any_end(then: BaseException | None) -> None:
    model, recorder = aezoo.create_model("vae", (1, 12, 12), **CONV), SwapRecorder(then)
    plain = [type(part) for part in model.modules()]
    try:
        trainer(recorder).predict(model, data((1, 12, 12)))
    except ValueError:
        assert then is not None
    assert conv2d.NarrowConv2d in recorder.kinds
    assert [type(part) for part in model.modules()] == plain


def test_only_exact_layer_classes_are_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MKL_HALF_WIDTH", True)

    class Own(nn.Linear):
        """A user's layer."""

    scaled = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    net = nn.Sequential(nn.Linear(3, 3), Own(3, 3), scaled, nn.Conv2d(3, 3, 1), narrow_conv.Conv2d(3, 3, 1))
    swapped = layers.swap_in(net)
    assert swapped == [net[0], net[3], net[4]]
    assert layers.swap_in(net) == []
    layers.swap_out(swapped)
    assert [type(part) for part in (net[0], net[3], net[4])] == [nn.Linear, nn.Conv2d, narrow_conv.Conv2d]


def test_speed_features_can_be_disabled_individually(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEZOO_SPEED", "fast_loop, denormals")
    assert [part for part in parts.PARTS if not parts.is_enabled(part)] == ["fast_loop", "denormals"]
    monkeypatch.setenv("AEZOO_SPEED", "wheels")
    with pytest.raises(AezooError, match="AEZOO_SPEED disables 'wheels', which is not a part"):
        parts.is_enabled("fast_loop")


def test_command_line_can_disable_speed_features(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setenv("AEZOO_SPEED", "auto")
    monkeypatch.setattr("aezoo.speed.run.keep_memory", lambda: calls.append("keep_memory"))
    speed.choose("auto")
    speed.keep_memory()
    assert calls == ["keep_memory"]
    speed.choose("off")
    speed.keep_memory()
    assert calls == ["keep_memory"] and os.environ["AEZOO_SPEED"] == "off"


@pytest.mark.slow
def test_package_does_not_import_speed() -> None:
    for file in PACKAGE.rglob("*.py"):
        if (PACKAGE / "speed") in file.parents:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [name for name in names if f"{name}.".startswith("aezoo.speed.")], file


STEPS = """
import json, torch
import lightning.pytorch as pl
import aezoo

class Losses(pl.Callback):
    seen = []
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))

pl.seed_everything(5)
model = aezoo.create_model("vae", (1, 12, 12), net="conv", hidden_dims=(8, 16), latent_dim=4)
x = torch.rand(64, 1, 12, 12, generator=torch.Generator().manual_seed(3))
made = aezoo.DataModule.from_arrays(x, batch_size=16, val_fraction=0.25, test_fraction=0.25)
how = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
trainer = pl.Trainer(callbacks=[Losses()], max_steps=9, **how)
trainer.fit(model, made)
trainer.predict(model, made)
print(json.dumps({"losses": Losses.seen, "file": aezoo.__file__}))
"""


@pytest.mark.slow
def test_package_works_without_speed_folder(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("speed", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "aezoo", ignore=left_out)
    (tmp_path / "script.py").write_text(STEPS)
    found = []
    for where, setting in ((tmp_path, "auto"), (PACKAGE.parent, "off")):
        env = {**os.environ, "PYTHONPATH": str(where), "AEZOO_SPEED": setting}
        run = subprocess.run([sys.executable, "-P", tmp_path / "script.py"], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout.splitlines()[-1]))
    assert found[0]["file"] == str(tmp_path / "aezoo" / "__init__.py") != found[1]["file"]
    assert found[0]["losses"] == found[1]["losses"] and len(found[0]["losses"]) == 9
