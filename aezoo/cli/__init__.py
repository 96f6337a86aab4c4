"""The command line: `main` dispatches; light commands need no torch, training commands are a LightningCLI."""

# commands that do not import torch, commands of LightningCLI, and commands that use a trained model
LIGHTWEIGHT_COMMANDS = ("list", "info", "recipes", "cp", "benchmark", "import", "report", "tune", "explore")
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
TASK_COMMANDS = ("reconstruct", "generate", "denoise", "impute", "detect", "embed", "compress", "decompress", "export")
