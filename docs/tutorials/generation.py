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
# # Make new samples
#
# A variational autoencoder (Kingma and Welling 2013) is trained so that the codes of all samples together look like
# draws from a standard normal distribution. New samples are then decoded draws.

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
# The loss is the negative evidence lower bound (ELBO): how well samples are reconstructed (`nll`) plus how far their
# codes are from the prior (`kl`), both in nats.

# %%
x, y = data.tensors("test")
with torch.no_grad():
    print({name: round(float(value), 2) for name, value in model.loss(x).items()})
    print(f"log p(x) by importance sampling: {float(model.log_likelihood(x, n=100).mean()):.2f} nats")

# %% [markdown]
# ## How good are they?
#
# `quality` measures the Fréchet distance (FID) of samples to held-out digits in the features of a small classifier
# that is trained on the labels, the precision (do samples look like digits?) and the recall (are all kinds of digits
# among them?), beside real digits as the best that is possible. It also measures how near samples are to training
# digits: a model that copies would be found out.

# %%
print(aezoo.generate(model, data, fit_on=data, quality=500).summary())

# %% [markdown]
# ## Priors
#
# The codes of a plain autoencoder are nowhere near a normal distribution, but one can fit a distribution to them
# afterwards and draw from that. `prior` names it: `gmm` is a Gaussian mixture.

# %%
plain = train(aezoo.create_model("dense_ae", data.input_shape, latent_dim=10, hidden_dims=(400, 200)), epochs=20)
aezoo.generate(plain, n=32, prior="gmm", fit_on=data).figure

# %% [markdown]
# ## Between two digits, and along each number of the code

# %%
aezoo.generate(model, data, interpolate=True, walks=4).figure

# %%
aezoo.generate(model, data, traverse=True, fit_on=data, walks=5).figure

# %% [markdown]
# ## A map of two numbers
#
# The pretrained `vae.mnist_2d` has a code of two numbers. Decoding a grid of them shows the whole space of digits.

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
# `conditional_vae` draws a digit that you name: `aezoo.generate(aezoo.load_model("conditional_vae.mnist"), label=7)`.

# %%
aezoo.generate(aezoo.load_model("conditional_vae.mnist"), n=16, label=7).figure
