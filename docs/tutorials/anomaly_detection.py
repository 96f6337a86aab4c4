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
# # Detect anomalies
#
# A model that was trained on normal samples only reconstructs normal samples well and other samples badly. The
# reconstruction error therefore gives an anomaly score, and samples with a score above a threshold are reported as
# anomalies. This notebook has two examples: a table with `scikit-learn`'s interface, and pictures.
#
# ## A table
#
# `AutoencoderDetector` has the interface of scikit-learn's outlier detectors: `fit`, `predict` (1 is normal, -1 is an
# anomaly) and `score_samples`. The data are 30 measurements of cell nuclei in benign and malignant tumours. The
# detector is trained on benign tumours only.

# %%
import logging
import warnings

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset

import aezoo
from aezoo.sklearn import AutoencoderDetector

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")

X, y = load_breast_cancer(return_X_y=True, as_frame=True)
benign = np.flatnonzero(y == 1)
rng = np.random.default_rng(0)
train = rng.choice(benign, 250, replace=False)
test = np.setdiff1d(np.arange(len(X)), train)
is_malignant = (y.iloc[test] == 0).to_numpy()

detector = AutoencoderDetector(contamination=0.05, random_state=0).fit(X.iloc[train])
forest = IsolationForest(random_state=0).fit(X.iloc[train])
for name, fitted in (("autoencoder", detector), ("isolation forest", forest)):
    print(f"{name}: AUROC {roc_auc_score(is_malignant, -fitted.score_samples(X.iloc[test])):.3f}")

# %% [markdown]
# `contamination=0.05` sets the threshold so that at most 5 % of new normal samples are expected to exceed it. It is
# estimated on samples that the network was not trained on.

# %%
flagged = detector.predict(X.iloc[test]) == -1
print(
    f"flagged: {flagged[is_malignant].mean():.0%} of the malignant, {flagged[~is_malignant].mean():.0%} of the benign"
)

# %% [markdown]
# To see why a sample has a high score, look at the contributions of the columns, which add up to the score.

# %%
strangest = int(np.argmax(-detector.score_samples(X.iloc[test])))
contributions = detector.contributions(X.iloc[[test[strangest]]])[0]
order = np.argsort(contributions)[::-1][:5]
for i in order:
    print(f"{X.columns[i]}: {X.iloc[test[strangest], i]:.4g} (benign: {X.iloc[train, i].mean():.4g} on average)")

# %% [markdown]
# ## Pictures
#
# This model is trained only on the digit 1, so all other digits should be anomalies. `normal="1"` names the normal
# class, so that the area under the ROC curve can be measured. The table also contains detectors that do not train a
# network, for comparison.

# %%
pl.seed_everything(0, verbose=False)
data = aezoo.DataModule("mnist5k", batch_size=64)
x, labels = data.tensors("train")
x_val, labels_val = data.tensors("val")
ones = aezoo.create_model("vae", data.input_shape, latent_dim=4, hidden_dims=(200,))
trainer = pl.Trainer(
    max_epochs=60, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)
trainer.fit(ones, DataLoader(TensorDataset(x[labels == 1]), batch_size=64, shuffle=True))
ones = ones.eval()

found = aezoo.detect(
    ones, data, normal="1", fit_on=x[labels == 1], calibrate_on=x_val[labels_val == 1], score="deviance,mse"
)
print(found.summary())
found.figure

# %%
found.table

# %% [markdown]
# The scores of normal and of other digits:

# %%
x_test, labels_test = data.tensors("test")
scores = ones.anomaly_score(x_test).detach().numpy()
figure, axes = plt.subplots(figsize=(6, 3))
bins = np.linspace(scores.min(), scores.max(), 40)
axes.hist(scores[labels_test == 1], bins, label="ones", density=True, alpha=0.7)
axes.hist(scores[labels_test != 1], bins, label="other digits", density=True, alpha=0.7)
axes.set(xlabel="score (nats)", ylabel="density")
axes.legend()
plt.close(figure)
figure

# %% [markdown]
# ## Limit the share of false alarms
#
# If the number of anomalies is unknown, the share of false alarms among the flagged samples can be limited instead, by
# the procedure of Benjamini and Hochberg on conformal p-values. To find a few anomalies among many samples, it needs
# many held-out normal samples.

# %%
normal = x[labels == 1]
found = aezoo.detect(ones, x_test, calibrate_on=normal[:300], fit_on=normal[300:], fdr=0.1, baselines=False, n_shown=0)
flags = np.asarray(found.is_anomaly)
of_ones, of_others = flags[labels_test == 1].mean(), flags[labels_test != 1].mean()
print(f"flagged: {of_others:.0%} of the other digits, {of_ones:.0%} of the ones")

# %% [markdown]
# On the command line, use `aezoo fit` and then `aezoo detect RUN --input new.npy --fdr 0.1`. `aezoo export RUN --what
# score` writes the score and the threshold as an ONNX file. `aezoo list --tag anomaly` lists the models for this task.
