"""The diorama family: the bundled model's own U-Net and autoencoder."""
