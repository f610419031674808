"""Metrics about videos."""
