"""Hypothesis without clocks: a busy machine is no failure, and every run tries the same examples."""

from hypothesis import settings

settings.register_profile(
    "skyloom", deadline=None, max_examples=40, derandomize=True, database=None
)
settings.load_profile("skyloom")
