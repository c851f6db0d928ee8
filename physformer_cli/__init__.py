"""The `physformer` command: parses, calls `physformer_core`, prints."""
