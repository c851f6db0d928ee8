"""The network: geometry, local attention and the transformer. Knows nothing of flows, prompts or pictures."""
