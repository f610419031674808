"""Networks of the first bundled model, a transformer and its autoencoder."""
