"""Benchmarks: scripts that train, measure, and write their results to files."""
