"""From shards to weights: one loop, several objectives."""
