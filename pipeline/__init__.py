"""PPO for language models on the Hugging Face stack. `docs/architecture.md` draws the house."""
