"""Autoencoders trained for small files of their codes and for the quality of reconstructions."""
