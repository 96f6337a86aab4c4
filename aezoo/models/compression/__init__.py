"""Autoencoders trained for the size of the file that their code makes, and for what comes back from it."""
