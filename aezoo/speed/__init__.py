"""Optimisations of speed, which do not change results."""
