"""Deterministic autoencoders with a regularised distribution of codes, which can be sampled."""
