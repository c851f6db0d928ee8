"""Kernels in Triton for what lies between a network's matrix products on a GPU: `kernels`, and `ops` around them."""
