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
# # Search and sort: what a code knows
#
# A code that is good for reconstruction is often good for other things: similar samples have similar codes. This
# notebook measures how much of the class of a digit is in its code, which no model here has been told.

# %%
import torch
from sklearn.linear_model import LogisticRegression

import aezoo
from aezoo.sklearn import AutoencoderTransformer

data = aezoo.DataModule("mnist5k", batch_size=64)
model = aezoo.load_model("conv_ae.mnist")

# %% [markdown]
# `aezoo.embed` writes codes, draws them in a plane, and classifies test samples by a linear classifier (probe) and by
# the nearest training codes, beside the same with PCA of the same size and with the raw pixels.

# %%
found = aezoo.embed(model, data, fit_on=data, nearest=5)
print(found.summary())
found.table.iloc[:5, :8]

# %%
found.figure

# %% [markdown]
# ## Several models
#
# Which of the pretrained models has the most useful code? The best code for a linear classifier is not the one with
# the least reconstruction error.

# %%
x, _ = data.tensors("test")
for name in (
    "dense_ae.mnist",
    "conv_ae.mnist",
    "denoising_ae.mnist",
    "vae.mnist",
    "wae_mmd.mnist",
    "sparse_ae_l1.mnist",
):
    each = aezoo.load_model(name)
    accuracies = aezoo.embed(each, data, fit_on=data, n_shown=0).accuracies[0]
    with torch.no_grad():
        error = float((each(x) - x).square().mean())
    print(
        f"{name}: {accuracies['size']} numbers, mean squared error {error:.4f}, accuracy of the probe "
        f"{accuracies['probe']:.3f}, of the nearest neighbour {accuracies['knn']:.3f}"
    )

# %% [markdown]
# ## In a pipeline of scikit-learn
#
# `AutoencoderTransformer` trains a model in `fit` and gives codes in `transform`. Here with few labels: all 4,000
# digits for the codes, but labels for 100 of them alone.

# %%
x_train, y_train = (t.numpy() for t in data.tensors("train"))
x_test, y_test = (t.numpy() for t in data.tensors("test"))
codes = AutoencoderTransformer("dense_ae", latent_dim=16, max_epochs=20, random_state=0).fit(x_train.reshape(-1, 784))
few = slice(0, 100)
with_codes = LogisticRegression(max_iter=2000).fit(codes.transform(x_train[few].reshape(-1, 784)), y_train[few])
with_pixels = LogisticRegression(max_iter=2000).fit(x_train[few].reshape(-1, 784), y_train[few])
print(f"100 labels: accuracy {with_codes.score(codes.transform(x_test.reshape(-1, 784)), y_test):.3f} from codes, "
      f"{with_pixels.score(x_test.reshape(-1, 784), y_test):.3f} from pixels")  # fmt: skip

# %% [markdown]
# Sixteen numbers do about as well as 784 pixels here. A code need not be better than the samples for a classifier, so
# measure both: `aezoo.embed` always does.
#
# ## Disentangled codes
#
# `beta_vae` and others of its family aim at one number for each cause of variation; [the
# results](../results/disentanglement.md) measure how far they get, on drawn shapes whose causes are known. In the
# picture below, each row moves one number of the code.

# %%
aezoo.generate(aezoo.load_model("vae.mnist"), data, traverse=True, fit_on=data, walks=6).figure

# %% [markdown]
# On the command line: `aezoo embed --ckpt_path conv_ae.mnist --data mnist5k --nearest 5`, and `--table parquet` for a
# table of the codes.
