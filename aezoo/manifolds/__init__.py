"""Curved spaces of codes: their maps, distributions on them, and motion through them, independent of any model."""
