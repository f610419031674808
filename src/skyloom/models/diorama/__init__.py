"""Diorama model family: the bundled U-Net and autoencoder."""
