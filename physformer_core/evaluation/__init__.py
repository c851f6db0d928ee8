"""Evaluation: what trained models are worth. Features of pictures, distances between sets, and prompt accuracy."""
