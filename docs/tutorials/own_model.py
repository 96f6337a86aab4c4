# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write a model and a plug-in
#
# A model is one class that builds an encoder and a decoder and defines a loss. aezoo adds training, metrics, pictures,
# the commands for trained models, checkpoints and the command line.
#
# The model of this example is an autoencoder with a penalty that pulls its codes towards the unit sphere. Its file is
# written into an empty folder:

# %%
import os
import tempfile

folder = tempfile.mkdtemp()
os.chdir(folder)

# %%
# %%writefile my_ae.py
"""Autoencoder with codes near the unit sphere (an example), https://example.org

L = -log p(x | g(f(x))) + weight (||f(x)|| - 1)^2 in nats per sample
"""

from typing import Unpack

from aezoo import Autoencoder, nets
from aezoo.training.arguments import TrainingArgs


class SphereAE(Autoencoder):
    """Pulls codes towards length 1.

    Args:
        latent_dim: size of the code.
        weight: of the pull.
        **kwargs: likelihood, lr and others of every model, see `Autoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 8,
        weight: float = 100.0,
        **kwargs: Unpack[TrainingArgs],
    ):
        super().__init__(input_shape, **kwargs)
        self.code_shape = (latent_dim,)
        self.weight = weight
        self.encoder = nets.encoder("mlp", self.input_shape, self.code_shape, (128,), "relu")
        self.decoder = nets.decoder("mlp", self.code_shape, self.input_shape, (128,), "relu")

    def loss(self, x, y=None):
        z = self.encoder(x)
        nll = self.nll(self.decoder(z), x).mean()
        pull = (z.norm(dim=1) - 1).square().mean()
        return {"loss": nll + self.weight * pull, "nll": nll, "pull": pull}


# %% [markdown]
# Each term that `loss` returns is logged as `train/...` and `val/...`. The model is trained like any other model:

# %%
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl

sys.path.insert(0, folder)
from my_ae import SphereAE

import aezoo
from aezoo import testing

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
pl.seed_everything(0, verbose=False)

data = aezoo.DataModule("mnist5k", batch_size=64)
model = SphereAE(data.input_shape, latent_dim=16)
trainer = pl.Trainer(
    max_epochs=15, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)
trainer.fit(model, data)
model = model.eval()
x, _ = data.tensors("test")
print("lengths of codes:", model.encode(x[:6]).norm(dim=1).tolist())

# %%
found = aezoo.reconstruct(model, data)
print(found.summary())
found.figure

# %% [markdown]
# ## Check the model
#
# `aezoo.testing` contains the checks that all built-in models pass: shapes, gradients, codes that do not depend on the
# other samples of a batch, checkpoints, resumed training, and more. The next cell runs three of them;
# `testing.check_model(SphereAE)` runs all of them in about a minute.

# %%
for check in (testing.check_shapes, testing.check_gradients, testing.check_batch_independence):
    check(SphereAE)
    print(check.__name__, "passed")

# %% [markdown]
# ## A plug-in
#
# To use the model by its name, in Python and on the command line, put it into a package with an entry point. The entry
# point states the group `aezoo.models`, the name of the model, and the location of the class.

# %%
_ = Path("pyproject.toml").write_text("""
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "my-ae"
version = "0.1"

[project.entry-points."aezoo.models"]
sphere_ae = "my_ae:SphereAE"

[tool.setuptools]
py-modules = ["my_ae"]
""")

# %% [markdown]
# Then install the package with `pip install .`. This notebook installs it into a separate folder, so that your
# environment is not changed.

# %%
subprocess.run(
    [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", "installed", "."], check=True
)
environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path("installed").resolve()), *sys.path])}


def aezoo_command(*words):
    done = subprocess.run([sys.executable, "-m", "aezoo", *words], env=environment, capture_output=True, text=True)
    print(done.stdout or done.stderr)


aezoo_command("list", "sphere_ae")

# %%
aezoo_command("info", "sphere_ae")

# %% [markdown]
# Now `aezoo fit --model sphere_ae`, `aezoo.load_model`, the commands for trained models and `aezoo tune` work as for
# built-in models. [Add a model](../extend.md) explains how to test a model.
