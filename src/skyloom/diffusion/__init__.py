"""The maths of making video from noise; knows tensors and callables, never a model class."""
