"""Input and output: checkpoints, saved models, the hub, run folders and atomic writes."""
