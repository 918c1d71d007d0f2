"""Loading, the policy with its value head, LoRA, the reference, saving. Knows nothing of data."""
