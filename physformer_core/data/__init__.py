"""Data: sources of captioned pictures, preprocessing and loading."""
