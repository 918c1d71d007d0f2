"""What a response is worth. Knows nothing of PPO."""
