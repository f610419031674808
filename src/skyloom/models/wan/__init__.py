"""The Wan family (Wan team 2025, arXiv 2503.20314)."""
