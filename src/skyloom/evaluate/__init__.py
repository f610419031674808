"""Numbers about videos."""
