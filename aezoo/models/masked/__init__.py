"""Models that fill in what was masked."""
