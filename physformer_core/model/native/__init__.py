"""What runs between the matrix products of a network on a CPU: one pass over memory each, in C, with gradients."""
