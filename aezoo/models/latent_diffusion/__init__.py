"""First stages of latent diffusion: autoencoders whose maps of codes another model learns to draw."""
