"""Training: objective, optimizer, averaging, checkpoints and the loop that survives being stopped."""
