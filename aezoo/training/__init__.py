"""Training in addition to Lightning: optimisers, compilation, precision, processes, seeds, checks."""
