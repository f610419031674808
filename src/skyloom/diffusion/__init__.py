"""Diffusion mathematics on tensors and callables; independent of any model class."""
