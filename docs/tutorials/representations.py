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
# # Search and classify with codes
#
# Similar samples usually have similar codes, so codes are useful for other tasks than reconstruction. This notebook
# measures how well the class of a digit can be predicted from its code. The models were trained without labels.

# %%
import torch
from sklearn.linear_model import LogisticRegression

import aezoo
from aezoo.sklearn import AutoencoderTransformer

data = aezoo.DataModule("mnist5k", batch_size=64)
model = aezoo.load_model("conv_ae.mnist")

# %% [markdown]
# `aezoo.embed` writes codes, draws them in a plane, and classifies test samples by a linear classifier (probe) and by
# the nearest training codes. It does the same with PCA of the same size and with the raw pixels, for comparison.

# %%
found = aezoo.embed(model, data, fit_on=data, nearest=5)
print(found.summary())
found.table.iloc[:5, :8]

# %%
found.figure

# %% [markdown]
# ## Several models
#
# This cell compares the codes of several pretrained models. The best code for a linear classifier is not the one with
# the lowest reconstruction error.

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
# `AutoencoderTransformer` trains a model in `fit` and returns codes in `transform`. In this example the model is
# trained on all 4,000 digits, but only 100 of them have labels.

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
# Here, sixteen numbers are about as good as 784 pixels. A code is not always better for a classifier than the samples,
# so measure both, as `aezoo.embed` does.
#
# ## Disentangled codes
#
# `beta_vae` and related models try to represent each factor of variation by one number of the code. [The
# results](../results/disentanglement.md) show how well they succeed on drawn shapes whose factors are known. In the
# picture below, each row varies one number of the code.

# %%
aezoo.generate(aezoo.load_model("vae.mnist"), data, traverse=True, fit_on=data, walks=6).figure

# %% [markdown]
# On the command line, use `aezoo embed --ckpt_path conv_ae.mnist --data mnist5k --nearest 5`. `--table parquet` writes
# a table of the codes.
