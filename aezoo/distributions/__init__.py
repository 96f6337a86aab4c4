"""Likelihoods of data, Gaussian and categorical distributions of codes, and divergences between them."""
