"""Procedural video generator with captions and labels; training data of the bundled model."""
