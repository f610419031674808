"""The procedural world of skyloom's bundled model, and the training of its networks."""
