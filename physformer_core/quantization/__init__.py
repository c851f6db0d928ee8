"""Fewer bits per weight: storage, calibration on real activations, and what it costs. `torchao` does the arithmetic."""
