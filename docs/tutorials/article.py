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
# # What an autoencoder does
#
# An autoencoder is two networks. The encoder makes a short code of a sample, `z = f(Wx + b)`; the decoder makes the
# sample again from the code, `x_hat = g(W'z + b')`. Both are trained together so that what comes out is like what
# went in: they minimise a reconstruction error such as `L = ||x - x_hat||^2`. A code with fewer numbers than the
# sample cannot hold everything, so it has to hold what samples have in common.
#
# This notebook trains one on 4,000 handwritten digits that come with the package, and looks at its code, at
# underfitting and at overfitting.

# %%
import logging
import warnings

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import torch
from torch.utils.data import DataLoader, TensorDataset

import aezoo

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
pl.seed_everything(0, verbose=False)

data = aezoo.DataModule("mnist5k", batch_size=64)
aezoo.show(data)

# %% [markdown]
# ## 784 pixels in 32 numbers
#
# The layers have 784, 128, 64, 32, 64, 128 and 784 units. A digit of 784 grey values has to pass through the 32 in
# the middle.


# %%
class Losses(pl.Callback):
    """Keeps the loss of each epoch."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_epoch_start(self, trainer, model):
        # the loss of an epoch is known when the next one starts
        if "train/loss" in trainer.callback_metrics:
            self.train.append(float(trainer.callback_metrics["train/loss"]))
            self.val.append(float(trainer.callback_metrics["val/loss"]))

    on_fit_end = on_train_epoch_start


def train(model, epochs, *data):
    losses = Losses()
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[losses], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, *data)
    model.eval()
    return losses


def dense(latent_dim, hidden_dims=(128, 64)):
    # initial weights as in Keras, where this network comes from
    return aezoo.create_model(
        "dense_ae", data.input_shape, latent_dim=latent_dim, hidden_dims=hidden_dims, weight_init="glorot"
    )


model = dense(32)
losses = train(model, 60, data)
print(model)

# %% [markdown]
# Test digits above, their reconstructions below: `aezoo.reconstruct` chooses the best, the median and the worst ones.

# %%
found = aezoo.reconstruct(model, data)
print(found.summary())
found.figure

# %% [markdown]
# Is that good? Principal component analysis (PCA) with as many numbers is the best that any *linear* code can do, so
# it is the first thing to compare with.

# %%
x_train, _ = data.tensors("train")
x_test, y_test = data.tensors("test")
mean = x_train.flatten(1).mean(0)
_, _, v = torch.linalg.svd(x_train.flatten(1) - mean, full_matrices=False)


def pca_error(n):
    centred = x_test.flatten(1) - mean
    return float((centred - centred @ v[:n].T @ v[:n]).square().mean())


with torch.no_grad():
    error = float((model(x_test) - x_test).square().mean())
print(f"mean squared error: {error:.4f} with 32 numbers of the autoencoder, {pca_error(32):.4f} with 32 of PCA")

# %% [markdown]
# ## Ten numbers, two numbers
#
# The fewer numbers, the more has to be left out. With ten, digits are still read easily:

# %%
small = dense(10)
train(small, 60, data)
with torch.no_grad():
    error = float((small(x_test) - x_test).square().mean())
print(f"mean squared error: {error:.4f} with 10 numbers of the autoencoder, {pca_error(10):.4f} with 10 of PCA")
aezoo.reconstruct(small, data).figure

# %% [markdown]
# A code of two numbers can be drawn. Each point is a test digit, and its colour is the digit that it shows. Nobody
# told the network what the digits are.

# %%
plane = dense(2)
train(plane, 60, data)
with torch.no_grad():
    z = plane.encode(x_test)
figure, axes = plt.subplots(figsize=(5, 5))
points = axes.scatter(*z.T, c=y_test, cmap="tab10", s=12)
figure.colorbar(points, label="digit")
axes.set(xlabel="z0", ylabel="z1")
plt.close(figure)
figure

# %% [markdown]
# ## Underfitting and overfitting
#
# The loss on the training samples says how well the network does what it was trained for, and the loss on validation
# samples, which it has never seen, says what that is worth. Three runs: the one from above, one of three epochs, and
# one of a large network on 200 samples. A model is a LightningModule, so it takes DataLoaders, too.

# %%
few = DataLoader(TensorDataset(x_train[:200]), batch_size=64, shuffle=True)
others = DataLoader(TensorDataset(data.tensors("val")[0]), batch_size=256)
short = train(dense(32), 3, data)
large = train(dense(32, (1000,)), 120, few, others)

figure, panels = plt.subplots(1, 3, figsize=(12, 3), sharey=True)
for axes, run, title in zip(
    panels, (short, losses, large), ("3 epochs: underfitting", "60 epochs", "200 samples: overfitting"), strict=True
):
    axes.plot(run.train, label="training")
    axes.plot(run.val, label="validation")
    axes.set(title=title, xlabel="epoch")
panels[0].set_ylabel("loss (nats)")
panels[0].legend()
plt.close(figure)
figure

# %% [markdown]
# On the left both losses still fall: train longer, or take a larger network. On the right the training loss falls on
# while the validation loss has stopped falling or rises: take more samples, a smaller network, noise on the input
# (`denoising_ae`), a penalty on the code (`sparse_ae_l1`), or stop earlier. `aezoo fit` stops when the validation
# loss no longer falls, keeps the best weights, and says at the end which of the cases the curves show.
#
# Next: [remove noise](denoising.ipynb), [make new digits](generation.ipynb), [find what is
# strange](anomaly_detection.ipynb), [make files small](compression.ipynb), [search and sort](representations.ipynb).
