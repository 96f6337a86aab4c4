"""First stages of latent diffusion: autoencoders for whose code maps a generative model is trained."""
