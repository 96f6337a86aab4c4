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
# # Sparse dictionaries
#
# The code of a sparse autoencoder has *more* numbers than the sample, but only a few of them are not zero. Each number
# belongs to one direction, an atom of a dictionary, and a sample is a sum of a few atoms. Such codes are easier to
# interpret than dense codes. They are therefore used to analyse neural networks; the samples are then the activations
# of a layer.
#
# In the first example the right answer is known: samples are sums of a few of 64 known directions.

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


def train(model, data, epochs):
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    return model.eval()


g = torch.Generator().manual_seed(0)
n_atoms, dim, active = 64, 24, 3
atoms = torch.nn.functional.normalize(torch.randn(n_atoms, dim, generator=g), dim=1)
chosen = torch.rand(20_000, n_atoms, generator=g).argsort(1)[:, :active]
amounts = torch.zeros(20_000, n_atoms).scatter(1, chosen, 0.5 + torch.rand(20_000, active, generator=g))
x = amounts @ atoms

# %% [markdown]
# `topk_sae` (Gao and others 2024) keeps the `k` largest numbers of the code.

# %%
data = DataLoader(TensorDataset(x), batch_size=256, shuffle=True)
model = train(aezoo.create_model("topk_sae", (dim,), latent_dim=96, k=active, likelihood="gaussian"), data, epochs=25)
z = model.encode(x[:2000]).detach()
print(f"numbers that are not zero: {float((z != 0).sum(1).float().mean()):.1f} of {z.shape[1]}")

# %% [markdown]
# To see whether the model finds the directions, compute the cosine between each true atom and the nearest learned atom.
# It is 1 if the directions are the same.

# %%
with torch.no_grad():
    zero = model.decode(torch.zeros(1, 96))
    learnt = torch.nn.functional.normalize(model.decode(torch.eye(96)) - zero, dim=1)
nearest = (atoms @ learnt.T).amax(1)
print(f"true atoms with a cosine above 0.9: {float((nearest > 0.9).float().mean()):.0%}")
figure, axes = plt.subplots(figsize=(5, 3))
axes.hist(nearest.numpy(), 30, range=(0, 1))
axes.set(xlabel="cosine to the nearest learnt atom", ylabel="true atoms")
plt.close(figure)
figure

# %% [markdown]
# ## Digits
#
# The pretrained model `topk_sae.mnist` represents a digit by a few of 256 atoms. The atoms that most test digits use
# are strokes:

# %%
digits = aezoo.DataModule("mnist5k", batch_size=64)
sae = aezoo.load_model("topk_sae.mnist")
x_test, _ = digits.tensors("test")
with torch.no_grad():
    z = sae.encode(x_test)
    often = (z != 0).sum(0).argsort(descending=True)[:32]
    strokes = sae.decode(torch.eye(z.shape[1])[often] * z.max()) - sae.decode(torch.zeros(1, z.shape[1]))
print(f"numbers that are not zero: {float((z != 0).sum(1).float().mean()):.1f} of {z.shape[1]}")
aezoo.show(strokes, n=32)

# %% [markdown]
# The next picture shows one digit as a sum of its atoms: the sample, its reconstruction, and partial sums with one, two
# and more atoms.

# %%
with torch.no_grad():
    code = z[:1]
    order = code[0].abs().argsort(descending=True)[: int((code != 0).sum())]
    parts = [torch.zeros_like(code).index_copy(1, order[:n], code[:, order[:n]]) for n in range(1, len(order) + 1)]
    pictures = torch.cat([x_test[:1], sae(x_test[:1]), *map(sae.decode, parts)])
aezoo.show(pictures[:16])

# %% [markdown]
# ## Activations of a network
#
# `--data activations` reads the activations of a layer of a language model of `transformers`, and `aezoo fit --model
# topk_sae` trains on them; see [the page on data](../data.md). `aezoo import` reads dictionaries of SAELens and other
# libraries. [The results](../results/known-dictionaries.md) show how well each of the sparse models finds known
# directions.
