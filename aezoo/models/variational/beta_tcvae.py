"""beta-TCVAE (Chen et al. 2018), https://arxiv.org/abs/1802.04942

    L = E_q[-log p(x|z)] + alpha MI + beta TC + gamma DW     (equation 4)
    MI = E[log q(z|x) - log q(z)]                mutual information of sample and code
    TC = E[log q(z) - sum_d log q(z_d)]          total correlation of the code's dimensions
    DW = E[sum_d (log q(z_d) - log p(z_d))]      KL of each dimension from the prior

in nats per sample. With alpha = beta = gamma = 1 the three terms sum to E[log q(z|x) - log p(z)], the VAE's KL term at
the sampled z. q(z), the density of the codes of all N data samples, is estimated from a batch of n samples over all
ranks:

    log q(z_i) = log sum_j W_ij q(z_i|x_j)
    mws        W_ij = 1 / (N n)                                                        (equation 5)
    mss        W_ii = 1/N,  W_ij = 1/M except for one j, where it is (N - M) / (N M),  M = n - 1     (appendix C.2)
    mss_mean   W_ii = 1/N,  W_ij = (N - 1) / (N M): the mean of mss over the choice of this j

The authors' code (https://github.com/rtqichen/beta-tcvae) fills the first two columns of W for mss, instead of two
diagonals.

Shapes: B batch on this rank, n batch over all ranks, D code; N data samples.
"""

import math
from collections.abc import Sized
from typing import Any, Unpack

import torch
from torch import Tensor

from aezoo.distributions.divergences import ESTIMATORS, aggregate_log_weights
from aezoo.distributions.gaussians import LOG_2PI
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE, VAEArgs
from aezoo.training.limits import check_at_least


class BetaTCVAE(VAE, defaults={"beta": 6.0}, compares_samples=True, tags=("disentanglement",)):
    """A VAE with a separate weight for the dependence between the dimensions of the code.

    Args:
        alpha: weight of the mutual information.
        beta: weight of the total correlation.
        gamma: weight of the dimension-wise KL from the prior.
        estimator: how q(z) is estimated from a batch: mss, mss_mean or mws.
        dataset_size: N, number of training samples; 0 uses the size of the training data, or of the batch if there is
            none.
        **kwargs: see `VAE`.
    """

    n_data: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        alpha: float = 1.0,
        gamma: float = 1.0,
        estimator: str = "mss",
        dataset_size: int = 0,
        **kwargs: Unpack[VAEArgs],
    ) -> None:
        check_at_least(0, alpha=alpha, gamma=gamma, dataset_size=dataset_size)
        if estimator not in ESTIMATORS:
            raise AezooError(f"unknown estimator {estimator!r}: choose from {', '.join(ESTIMATORS)}")
        super().__init__(input_shape, **kwargs)
        del self.capacity  # BetaAnnealing may increase beta, but no single KL term has a capacity
        self.alpha = alpha
        self.gamma = gamma
        self.estimator = estimator
        self.dataset_size = dataset_size
        self._counted = False
        self._samples = 0
        self.register_buffer("n_data", torch.tensor(dataset_size))  # saved, so that evaluation uses the N of training

    def on_train_start(self) -> None:
        super().on_train_start()
        resumed = self.trainer.ckpt_path is not None and bool(self.n_data)  # keeps the saved N
        self._counted = self.dataset_size > 0 or resumed
        self._samples = 0

    def begin_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        x, y = super().begin_step(batch, batch_idx)
        if not self._counted and self._trainer is not None:
            # at each step, because the fault guard restores the buffers after a non-finite step
            self._samples = self._samples or self.training_samples(len(x))
            self.n_data.fill_(self._samples)
        return x, y

    def training_samples(self, batch_size: int) -> int:
        """Return the samples per epoch over all ranks, from the loader's sampler or number of batches; 0 if unknown."""
        loader = self.trainer.train_dataloader
        sampler = getattr(loader, "sampler", None)
        if isinstance(getattr(loader, "batch_size", None), int) and isinstance(sampler, Sized):
            return len(sampler) * self.trainer.world_size
        batches = self.trainer.num_training_batches
        return 0 if math.isinf(batches) else int(batches) * batch_size * self.trainer.world_size

    def log_weights(self, z_BD: Tensor, n: int) -> Tensor:
        """Return log W for this rank's codes and the posteriors of all n samples, (B, n)."""
        n_data = self.n_data.clamp(min=n).to(z_BD.dtype)
        return aggregate_log_weights(self.estimator, self.local_rows(z_BD), n, n_data)

    def log_aggregate(self, z_BD: Tensor, mu_BD: Tensor, log_var_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of log q(z) and of log q(z_d) in each dimension: three (B, D) -> (B,), (B, D)."""
        mu_nD, log_var_nD = self.all_gather_batch(mu_BD).to(z_BD), self.all_gather_batch(log_var_BD).to(z_BD)
        log_q_BnD = -0.5 * ((z_BD[:, None] - mu_nD) ** 2 * torch.exp(-log_var_nD) + log_var_nD + LOG_2PI)
        log_w_Bn = self.log_weights(z_BD, len(mu_nD))
        return torch.logsumexp(log_w_Bn + log_q_BnD.sum(2), 1), torch.logsumexp(log_w_Bn[..., None] + log_q_BnD, 1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.kl(mu_BD, log_var_BD).mean()
        # small differences of large logarithms: in float32, a total correlation has three correct digits
        z_BD = z_BD if z_BD.device.type == "mps" else z_BD.double()
        eps_BD = (z_BD - mu_BD) * torch.exp(-0.5 * log_var_BD)
        log_qx_B = -0.5 * (eps_BD**2 + log_var_BD + LOG_2PI).sum(1)
        log_q_B, log_q_BD = self.log_aggregate(z_BD, mu_BD, log_var_BD)
        mi = (log_qx_B - log_q_B).mean().to(nll)
        tc = (log_q_B - log_q_BD.sum(1)).mean().to(nll)
        dw = (log_q_BD.sum(1) - self.log_prior(z_BD)).mean().to(nll)
        loss = nll + self.alpha * mi + self.beta * tc + self.gamma * dw
        return {"loss": loss, "nll": nll, "kl": kl, "elbo": -(nll + kl), "mi": mi, "tc": tc, "dwkl": dw}
