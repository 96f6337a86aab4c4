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
# # Generate new samples
#
# A variational autoencoder (Kingma and Welling 2013) is trained so that the codes of all samples together are
# distributed approximately like a standard normal distribution. To generate a new sample, a code is drawn from this
# distribution and decoded.

# %%
import logging
import warnings

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import torch

import aezoo

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
pl.seed_everything(0, verbose=False)

data = aezoo.DataModule("mnist5k", batch_size=64)


def train(model, epochs):
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    return model.eval()


model = train(aezoo.create_model("vae", data.input_shape, latent_dim=10, hidden_dims=(400, 200)), epochs=30)
aezoo.generate(model, n=64).figure

# %% [markdown]
# The loss is the negative evidence lower bound (ELBO). It is the sum of the reconstruction error (`nll`) and the
# distance of the codes' distributions from the prior (`kl`), both in nats.

# %%
x, y = data.tensors("test")
with torch.no_grad():
    print({name: round(float(value), 2) for name, value in model.loss(x).items()})
    print(f"log p(x) by importance sampling: {float(model.log_likelihood(x, n=100).mean()):.2f} nats")

# %% [markdown]
# ## Measure the quality of samples
#
# `quality` measures three figures in the feature space of a small classifier that is trained on the labels: the
# Fréchet distance (FID) between generated samples and held-out digits, the precision (do the samples look like
# digits?) and the recall (do the samples cover all kinds of digits?). The same figures of real digits show the best
# possible values. `quality` also measures how close the samples are to training digits, which reveals models that copy
# them.

# %%
print(aezoo.generate(model, data, fit_on=data, quality=500).summary())

# %% [markdown]
# ## Priors
#
# The codes of an autoencoder that is not variational are not normally distributed. After training, however, a
# distribution can be fitted to its codes, and new codes can be drawn from that distribution. `prior` names the kind of
# distribution; `gmm` is a Gaussian mixture.

# %%
plain = train(aezoo.create_model("dense_ae", data.input_shape, latent_dim=10, hidden_dims=(400, 200)), epochs=20)
aezoo.generate(plain, n=32, prior="gmm", fit_on=data).figure

# %% [markdown]
# ## Interpolate between digits, and vary single numbers of the code

# %%
aezoo.generate(model, data, interpolate=True, walks=4).figure

# %%
aezoo.generate(model, data, traverse=True, fit_on=data, walks=5).figure

# %% [markdown]
# ## A plane of codes
#
# The pretrained model `vae.mnist_2d` has a code of two numbers. Decoding a grid of codes shows which digit belongs to
# which part of the plane.

# %%
plane = aezoo.load_model("vae.mnist_2d")
side = torch.distributions.Normal(0, 1).icdf(torch.linspace(0.03, 0.97, 15))
grid = torch.cartesian_prod(side, side)
with torch.no_grad():
    pictures = plane.decode(grid)[:, 0].reshape(15, 15, 28, 28)
figure, axes = plt.subplots(figsize=(6, 6))
axes.imshow(pictures.permute(0, 2, 1, 3).reshape(15 * 28, 15 * 28), cmap="gray")
axes.axis("off")
plt.close(figure)
figure

# %% [markdown]
# `conditional_vae` generates digits of a chosen class:

# %%
aezoo.generate(aezoo.load_model("conditional_vae.mnist"), n=16, label=7).figure
