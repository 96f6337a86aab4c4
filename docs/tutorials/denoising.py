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
# # Remove noise
#
# A denoising autoencoder (Vincent and others 2008) receives a noisy sample and is trained to return the clean sample.
# To do so, it has to learn what clean samples look like.

# %%
import logging
import warnings

import lightning.pytorch as pl

import aezoo

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
pl.seed_everything(0, verbose=False)

data = aezoo.DataModule("mnist5k", batch_size=64)
model = aezoo.create_model(
    "denoising_ae", data.input_shape, corruption="gaussian:0.3", latent_dim=64, hidden_dims=(512, 256)
)
trainer = pl.Trainer(
    max_epochs=25, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)
trainer.fit(model, data)
model = model.eval()

# %% [markdown]
# `aezoo.denoise` adds the same kind of noise to the test digits, removes it, and measures the peak signal-to-noise
# ratio (PSNR, in decibels, higher is better) and the structural similarity (SSIM, 1 is perfect). The model is compared
# with general filters, each with the strength that is best on training samples.

# %%
found = aezoo.denoise(model, data, corrupt="gaussian:0.3")
print(found.summary())
found.figure

# %%
found.table

# %% [markdown]
# ## Pretrained weights
#
# In the comparison above, a filter has a higher PSNR than the model, which was trained on only 4,000 digits for about a
# minute. `denoising_ae.mnist` is part of the package and was trained on all 60,000 digits of MNIST.

# %%
found = aezoo.denoise(aezoo.load_model("denoising_ae.mnist"), data, corrupt="gaussian:0.3")
print(found.summary())
found.figure

# %% [markdown]
# ## Other noise than in training
#
# A network learns to remove the kind of noise that it was trained with. Other kinds are, for example, pixels that are
# set to 0 or 1 at random, for which a median filter is well suited:

# %%
for corruption in ("gaussian:0.3", "gaussian:0.6", "salt_and_pepper:0.2", "masking:0.5"):
    table = aezoo.denoise(model, data, corrupt=corruption, n_shown=0).table.set_index("method")
    print(corruption, *(f"{method} {psnr:.1f} dB" for method, psnr in table["psnr"].items()), sep=", ")

# %% [markdown]
# If no clean samples are available, `noise2noise` can be trained on pairs of noisy samples and `noise2void` on single
# noisy samples. On the command line, use `aezoo denoise --ckpt_path denoising_ae.mnist --data mnist5k --corrupt
# gaussian:0.3`.
