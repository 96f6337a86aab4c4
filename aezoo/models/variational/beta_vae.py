"""beta-VAE (Higgins et al. 2017), https://openreview.net/forum?id=Sy2fzU9gl

    L = E_q[-log p(x|z)] + beta KL(q(z|x) || p(z))     (equation 4, with the sign of a loss)

in nats per sample. beta > 1 restricts the code in order to disentangle its dimensions; beta = 1 is the VAE.
"""

from aezoo.models.variational.vae import VAE


class BetaVAE(VAE, defaults={"beta": 4.0}, tags=("disentanglement",)):
    """A VAE whose KL term has a larger weight than its likelihood."""
