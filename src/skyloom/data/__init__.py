"""Training data: shards of clips, encoded latents and captions, batches. All steps resume."""
