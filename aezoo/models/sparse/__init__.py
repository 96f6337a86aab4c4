"""Autoencoders whose code is mostly zero."""
