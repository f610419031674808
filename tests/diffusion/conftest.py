"""Hypothesis settings: no deadline, and the same examples in every run."""

from hypothesis import settings

settings.register_profile(
    "skyloom", deadline=None, max_examples=40, derandomize=True, database=None
)
settings.load_profile("skyloom")
