"""Run fits and predictions of conv_ae with one private name missing that only `aezoo.speed` needs.

`python tests/missing_private_names.py` prints a JSON object of the names without which something fails, with the
errors. A name is hidden only from aezoo, in a forked child: torch and Lightning still find it.
"""

import builtins
import importlib
import inspect
import json
import os
import sys
import tempfile
import traceback
import warnings
from typing import Any

import lightning.pytorch as pl
import private_name_scan as scan
import torch
from torch.utils.data import DataLoader, TensorDataset

import aezoo
from aezoo.training import private_names

# in the format of `torch.cpu`: a processor for which all parts of `aezoo.speed` are enabled
WIDE = {"cpu_name": "AMD Zen 5", "avx512_vp2intersect": True}
# imported by the parent, since each import takes longer than a fit
LIBRARIES = ("torch._dynamo.config", "torch._inductor.lowering", "torch.utils.flop_counter", "torch.nn.grad")


def hide(name: str) -> None:
    """Hide a name of a library from the modules of aezoo."""
    path, _, last = name.rpartition(".")
    owner: Any = scan.find(path)
    cls: Any = owner if inspect.isclass(owner) else type(owner)
    usual, load = cls.__getattribute__, builtins.__import__

    def asked_by_aezoo(asked: str) -> bool:
        return asked == last and str(sys._getframe(2).f_globals.get("__name__")).startswith("aezoo")

    def lookup(self: Any, asked: str) -> Any:
        if asked_by_aezoo(asked):
            raise AttributeError(asked)
        return usual(self, asked)

    def make(self: Any, asked: str) -> Any:
        """Replaces the lookup of operators by `torch.ops`."""
        if asked_by_aezoo(asked) or not hasattr(cls, "__getattr__"):
            raise AttributeError(asked)
        return cls.__getattr__(self, asked)

    def find(module: str, names: Any = None, local: Any = None, wanted: Any = (), level: int = 0) -> Any:
        if names is not None and str(names.get("__name__")).startswith("aezoo"):
            for asked in (module, *(f"{module}.{one}" for one in wanted or ())):
                if asked == name or asked.startswith(f"{name}."):
                    raise ModuleNotFoundError(asked)
        return load(module, names, local, wanted, level)

    builtins.__import__ = find
    if inspect.isclass(owner):
        cls.__getattribute__ = lookup
    else:
        owner.__class__ = type("Hiding", (cls,), {"__getattribute__": lookup, "__getattr__": make})


def build() -> tuple[pl.Trainer, Any, Any]:
    """A trainer, a model and data."""
    x = torch.rand(24, 1, 8, 8)
    data = aezoo.DataModule.from_arrays(x, batch_size=8, val_fraction=0.3, test_fraction=0.3)
    model = aezoo.create_model("conv_ae", (1, 8, 8), hidden_dims=(8, 8, 16), latent_dim=4)
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return pl.Trainer(max_epochs=1, limit_val_batches=0, enable_model_summary=False, **quiet), model, data


def run() -> None:
    """A fit and a prediction with all parts of `aezoo.speed` that do not compile, for layers of any size."""
    from aezoo.speed import conv2d, inductor_lowering, joint_backward, linear

    linear._LARGE = conv2d._MIN_SAMPLES = conv2d._MIN_PRODUCTS = 1
    trainer, model, data = build()
    trainer.fit(model, data)
    trainer.predict(model, DataLoader(TensorDataset(data.tensors("val")[0]), batch_size=4))
    inductor_lowering.enable()
    joint_backward.can_trace()
    linear.linear(torch.rand(2, 3, 4), torch.rand(5, 4))


def error_without(name: str) -> str:
    """The error without this name; empty if there is none."""
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if child == 0:
            try:
                if name:
                    hide(name)
                run()
            except BaseException as error:
                file.write(traceback.format_exception(error)[-1] + traceback.format_tb(error.__traceback__)[-1])
            file.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        return file.read() or ("" if status == 0 else f"ended by {status}")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.cpu.get_capabilities = lambda: WIDE
    for module in LIBRARIES:
        importlib.import_module(module)
    build()
    names = [entry.name for entry in private_names.PRIVATE_NAMES if entry.without == private_names._SLOWER]
    assert "aezoo.speed.linear" not in sys.modules
    found = {name: error_without(name) for name in ("", *names)}
    print(json.dumps({name: error for name, error in found.items() if error}, indent=1))


if __name__ == "__main__":
    main()
