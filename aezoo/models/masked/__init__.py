"""Models that predict masked parts of their input."""
