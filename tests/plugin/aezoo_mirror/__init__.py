"""A third-party package with one model that works and one that does not."""
