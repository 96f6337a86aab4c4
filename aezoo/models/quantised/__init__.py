"""Autoencoders whose code is indices into codebooks, and priors over such indices."""
