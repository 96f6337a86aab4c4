"""The models, one file each; the folder is the family, the file's stem the name."""
