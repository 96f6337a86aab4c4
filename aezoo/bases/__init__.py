"""Base classes that several models share: subclasses of `aezoo.Autoencoder`, or mixins for it."""
