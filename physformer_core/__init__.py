"""PhysFormer core."""
