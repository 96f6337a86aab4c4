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
# # Compress files
#
# A code is shorter than its sample, so it can be stored instead of the sample. The size of the file depends on how the
# code is stored: its numbers are rounded, and frequent values are written with few bits. aezoo writes files (`.aez`)
# that the same model decompresses.

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch

import aezoo

data = aezoo.DataModule("mnist5k", batch_size=64)
x, _ = data.tensors("test")
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A model that is trained for compression
#
# `mean_scale_hyperprior` (Minnen and others 2018) minimises a weighted sum of the error and the number of bits. Its
# codes are integers, which are stored by entropy coding with the distributions that the model has learned.

# %%
model = aezoo.load_model("mean_scale_hyperprior.mnist")
found = aezoo.compress(model, x, out=str(folder / "lossy"), compare=False)
file = folder / "lossy" / "samples.aez"
pixels = x.numel()
print(f"{file.stat().st_size:,} bytes for {len(x)} digits: {8 * file.stat().st_size / pixels:.3f} bits per pixel")

# %%
opened = aezoo.decompress(model, str(file))
restored = torch.as_tensor(np.asarray(opened.x))
mse = float((restored - x).square().mean())
print(f"mean squared error {mse:.5f}, PSNR {-10 * np.log10(mse):.1f} dB")
aezoo.show(torch.cat([x[:8], restored[:8]]))

# %% [markdown]
# ## Comparison with JPEG, WebP and PCA
#
# Any model can be used: the numbers of its code are rounded with the precision that `quality` sets. Each point in the
# picture is a file.

# %%
model = aezoo.load_model("conv_ae.mnist")
found = aezoo.compress(model, data, fit_on=data, quality=(2, 3, 4, 5), out=str(folder / "curve"))
print(found.summary())
found.figure

# %% [markdown]
# ## Lossless compression
#
# A variational model with a likelihood for each pixel can store samples exactly. This takes about as many bits as its
# negative evidence lower bound (bits-back coding, Townsend and others 2019). The example uses black and white digits:

# %%
model = aezoo.load_model("vae.mnist_binary")
found = aezoo.compress(model, data, binarise=True, out=str(folder / "exact"))
print(found.summary())
found.table

# %%
opened = aezoo.decompress(model, str(folder / "exact" / "samples.aez"))
print(opened.summary())
print("the same pixels:", bool(((np.asarray(opened.x) > 0) == (x.numpy() > 0.5)).all()))

# %% [markdown]
# On the command line, use `aezoo compress --ckpt_path mean_scale_hyperprior.mnist --input folder_of_images`, and `aezoo
# decompress` to restore the samples. A separate page documents [the format of .aez files](../aez.md).
