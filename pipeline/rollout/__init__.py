"""Sampling responses and what the update needs to know of them. Knows nothing of rewards."""
