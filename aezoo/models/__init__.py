"""One file per model: the folder is its family, and the file name without `.py` is its name."""
