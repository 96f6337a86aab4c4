"""Curved spaces of codes: their maps, the distributions on them, and motion through them; no model is known here."""
