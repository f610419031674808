"""From rendered clips to training batches; every step can be interrupted and goes on where it stopped."""
