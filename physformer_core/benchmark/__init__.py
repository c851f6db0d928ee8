"""What an attention layer, a network, a picture and a training step cost here, beside others of the same size.

fit <- counting, machine <- cases <- workers <- measure <- report, plot. ``training`` stands beside them.
"""
