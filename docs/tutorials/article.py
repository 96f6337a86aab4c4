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
# An autoencoder consists of two networks. The encoder maps a sample to a short code, `z = f(Wx + b)`, and the decoder
# maps the code back to a sample, `x_hat = g(W'z + b')`. Both are trained together so that the output is close to the
# input: they minimise a reconstruction error such as `L = ||x - x_hat||^2`. A code with fewer numbers than the sample
# cannot contain all of its information, so the network has to learn what samples have in common.
#
# This notebook trains an autoencoder on 4,000 handwritten digits that are part of the package. It then examines the
# code, underfitting and overfitting.

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
# The layers have 784, 128, 64, 32, 64, 128 and 784 units, so the 784 grey values of a digit are represented by the 32
# numbers in the middle.


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
# The picture shows test digits with their reconstructions below them. `aezoo.reconstruct` selects the digits with the
# smallest, the median and the largest errors.

# %%
found = aezoo.reconstruct(model, data)
print(found.summary())
found.figure

# %% [markdown]
# Principal component analysis (PCA) with the same number of components gives the lowest error of all *linear* codes,
# so it is the natural baseline.

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
# ## Codes of ten and of two numbers
#
# The fewer numbers a code has, the more information is lost. With ten numbers, the digits are still easy to read:

# %%
small = dense(10)
train(small, 60, data)
with torch.no_grad():
    error = float((small(x_test) - x_test).square().mean())
print(f"mean squared error: {error:.4f} with 10 numbers of the autoencoder, {pca_error(10):.4f} with 10 of PCA")
aezoo.reconstruct(small, data).figure

# %% [markdown]
# A code of two numbers can be drawn in a plane. Each point is a test digit, and its colour shows its class. The network
# was trained without the classes.

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
# The training loss says how well the network fits the training samples. The validation loss says how well it works on
# samples that it was not trained on. Three runs are compared: the one above, one with only three epochs, and one with a
# large network and only 200 samples. A model is a LightningModule, so it can also be trained with DataLoaders.

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
# On the left, both losses are still falling (underfitting): train longer or use a larger network. On the right, the
# training loss continues to fall, but the validation loss has stopped falling or rises (overfitting): use more samples,
# a smaller network, noise on the input (`denoising_ae`) or a penalty on the code (`sparse_ae_l1`), or stop earlier.
# `aezoo fit` stops when the validation loss no longer falls, keeps the best weights, and says at the end which of these
# cases the curves show.
#
# Next: [remove noise](denoising.ipynb), [generate new samples](generation.ipynb), [detect
# anomalies](anomaly_detection.ipynb), [compress files](compression.ipynb), [search and classify with
# codes](representations.ipynb).
