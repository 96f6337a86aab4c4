"""Files: checkpoints and saved models, the hub, run folders, atomic writes."""
