"""Autoencoders whose code consists of codebook indices, and priors over such indices."""
