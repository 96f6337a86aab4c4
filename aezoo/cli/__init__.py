"""The command line: `main` dispatches; light commands need no torch, training commands are a LightningCLI."""

# commands without torch, commands of LightningCLI, and commands that use a trained model
LIGHT = ("list", "info", "recipes", "cp", "benchmark", "tune")
HEAVY = ("fit", "validate", "test", "predict")
VERBS = ("reconstruct", "generate", "denoise", "detect", "embed", "compress", "decompress")
