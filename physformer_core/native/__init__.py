"""Kernels in C, and what compiles them. Their Python sides are where they are used: model/native, data/averages.py."""
