"""Deterministic codes whose distribution is shaped, so that they can be drawn."""
