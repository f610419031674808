"""Diorama model family: U-Net and autoencoder of the next bundled model."""
