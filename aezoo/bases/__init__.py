"""Base classes that several models share, one file each: subclasses of `aezoo.Autoencoder`, or mixins for it."""
