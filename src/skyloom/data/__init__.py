"""Training data: rendered clips, encoded latents and captions, batches. All steps resume."""
