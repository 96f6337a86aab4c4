"""Curved latent spaces: maps, distributions and dynamics on them, independent of models."""
