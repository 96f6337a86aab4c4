"""Autoencoders trained for a small file size of their code and for the quality of the reconstruction."""
