"""The accelerator, gathering, seeding, signals, tracking. Knows nothing of PPO."""
