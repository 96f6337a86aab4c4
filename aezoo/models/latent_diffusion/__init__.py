"""First stages of latent diffusion: maps of codes that another model learns to draw."""
